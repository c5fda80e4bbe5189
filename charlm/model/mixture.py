"""Mixture: n-gram counts of the last 1, 2, ... characters, weighted by networks, mixed with Transformers.

Counting knows a small text by heart at once; a network learns what to make of it. The logits are the log-probabilities
of symbols alone, and what each longer context changes in those of the shorter one, each with a weight; and to that a
Transformer adds what it knows. It is the mixing of contexts of Mahoney's PAQ (2005; as a network: Knoll and de Freitas,
"A machine learning perspective on predictive coding with PAQ", 2012) and the residual of Li et al., "Residual learning
of neural text generation with n-gram language model" (2022). Counts back off by the three discounts of Chen and
Goodman, "An empirical study of smoothing techniques for language modeling" (1998).

Counted on the very text that the network trains on, contexts would teach it to believe them blindly. So the text is cut
into folds, and in each the network is shown the counts of all others: deleted estimation (Jelinek and Mercer,
1980), or cross-fitting. The folds are long, because neighbouring text is about the same people.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Annotated, Any, Literal, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.model import keeps_arguments
from charlm.model.transformerpp import Cache, TransformerPP

MULTIPLIER = 6364136223846793005  # the multiplier of Knuth's generator modulo 2^64
INVERSE = -(-pow(MULTIPLIER, -1, 2**64) % 2**64)  # to undo it, as a number with a sign
SCATTER = 0xBF58476D1CE4E5B9 - 2**64  # of SplitMix64
SCALE = 0.3  # brings logarithms of counts, which reach 10, near 1


def hashes(idx: Tensor, n: int) -> Tensor:
    """A number for the last `n` characters up to each: idx (B, T) -> (B, T) int64, of use from position n - 1 on.

    Differences of the running sum of a polynomial (Karp and Rabin 1987), modulo 2^64.
    """
    T = idx.shape[1]
    powers = [torch.full((T,), factor, device=idx.device).cumprod(0) for factor in (MULTIPLIER, INVERSE)]
    sums = F.pad(((idx + 1) * powers[0]).cumsum(1), (1, 0))  # (B, T + 1)
    start = (torch.arange(1, T + 1, device=idx.device) - n).clamp_min(0)
    h = (sums[:, 1:] - sums[:, start]) * powers[1][start]
    h = (h ^ h >> 32) * SCATTER
    return h ^ h >> 32


def spread(starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of each of `rows`, as numbers of rows and of entries; row r has starts[r] to starts[r + 1]."""
    lengths = starts[rows + 1] - starts[rows]
    row = torch.arange(len(rows), device=rows.device).repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    return row, torch.arange(len(row), device=rows.device) + (starts[rows] - ends + lengths)[row]


def discounts(counts: Tensor) -> Tensor:
    """Return the discounts of counts 0, 1, 2 and more: Chen and Goodman (1999), equation 26."""
    n = [float((counts == i).sum()) + 1 for i in range(1, 5)]
    y = n[0] / (n[0] + 2 * n[1])
    found = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
    return torch.tensor([0.0, *(min(max(d, 0.1 * i), 0.9 * i) for i, d in enumerate(found, 1))])


class Found(NamedTuple):
    """Counts at n positions, for K lengths of context."""

    alone: Tensor  # (n, V): log-probabilities of symbols without any context
    change: Tensor  # (K, n, V): what each longer context changes in those of the shorter one
    seen: Tensor  # (n, 3 * K): how often it was seen, followed by how many symbols, and whether at all

    def log_p(self) -> Tensor:
        """After the longest context that was ever seen, (n, V)."""
        return self.alone + self.change.sum(0)


class Counts:
    """Next-symbol counts of every context in a text: a table with one row per context.

    A row lists the symbols that were seen, and has one number for all others. Row 0 is of contexts that never were.

    Args:
        text: ids (N,) int64 on the CPU, where counting gives the same bits each time; N of at least 2.
        vocab_size: V.
        n_context: K, the characters of the longest context.
        n_folds: number of folds of the text. Each context has a row of counts per fold, taken from all other folds.
        device: device of the table.
    """

    def __init__(self, text: Tensor, vocab_size: int, n_context: int, n_folds: int, device: str | torch.device = "cpu"):
        self.text, self.V, self.K = text, vocab_size, n_context
        self.order: dict[int, tuple[Tensor, Tensor]] = {}  # per length of chunk: sorted hashes, and their positions
        self.position = torch.arange(len(text) - 1)
        self.fold = self.position * n_folds // len(self.position) + 1
        self.keys: list[tuple[Tensor, int]] = []  # per length: hashes of its contexts, and their first row
        self.rows_at = self.fold.new_zeros(n_context, len(self.position), dtype=torch.int32)
        often = torch.bincount(self.fold * self.V + text[1:], minlength=(n_folds + 1) * self.V).view(
            n_folds + 1, self.V
        )
        often = often.sum(0) - often + 0.1  # row 0: in the whole text; row i: in all folds but the i-th
        self.alone = (often / often.sum(1, keepdim=True)).log()
        self.count()
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.keys = [(keys.to(device), first) for keys, first in self.keys]

    def count(self) -> None:
        """Fill the table, from the shortest contexts to the longest."""
        V, y, n_folds = self.V, self.text[1:], len(self.alone) - 1
        nothing = self.text[:0]
        zeros = self.alone.new_zeros
        table = [(nothing.new_zeros(1), nothing, zeros(0), zeros(1), zeros(1, 3))]
        n_rows = 1
        whole, others = torch.zeros_like(self.fold), self.fold  # rows of the shorter context at each position
        codes, log_p = torch.arange(self.alone.numel()), self.alone.flatten()  # and all of its entries
        for n in range(1, min(self.K, len(y)) + 1):
            at = self.position[n - 1 :]
            contexts, context = hashes(self.text[None, :-1], n)[0, at].unique(return_inverse=True)
            pairs, times = (context * V + y[at]).unique(return_counts=True)
            symbols = pairs % V
            # A context has its own row, and one row per fold it occurs in, counted in all other folds.
            in_folds, in_fold = (context * (n_folds + 1) + self.fold[at]).unique(return_inverse=True)
            starts = F.pad((pairs // V).bincount(minlength=len(contexts)).cumsum(0), (1, 0))
            row, entry = spread(starts, in_folds // (n_folds + 1))
            here, times_here = (in_fold * V + y[at]).unique(return_counts=True)
            code = row * V + symbols[entry]
            place = torch.searchsorted(here, code).clamp_max(len(here) - 1)
            elsewhere = times[entry] - torch.where(here[place] == code, times_here[place], 0)
            kept = elsewhere > 0

            rows = torch.cat((pairs // V, len(contexts) + row[kept]))
            symbols = torch.cat((symbols, symbols[entry[kept]]))
            counts = torch.cat((times, elsewhere[kept]))
            lower = y.new_zeros(len(contexts) + len(in_folds))
            lower[context], lower[len(contexts) + in_fold] = whole[at], others[at]
            below = log_p[torch.searchsorted(codes, lower[rows] * V + symbols)]
            discount = discounts(times)[counts.clamp_max(3)]
            total, left = (rows.bincount(weight, len(lower)).float() for weight in (counts.double(), discount))
            codes = rows * V + symbols
            log_p = ((counts - discount + left[rows] * below.exp()) / total[rows]).log()
            lengths = rows.bincount(minlength=len(lower))
            other = torch.where(total > 0, (left / total).log(), 0.0)
            seen = torch.stack((SCALE * total.log1p(), SCALE * lengths.log1p(), (total > 0) * SCALE), 1)
            table.append((lengths, symbols, log_p - below, other, seen))
            self.keys.append((contexts, n_rows))
            self.rows_at[n - 1, at] = (n_rows + len(contexts) + in_fold).int()
            n_rows += len(lower)
            whole, others = torch.zeros_like(whole), torch.zeros_like(others)
            whole[at], others[at] = context, len(contexts) + in_fold
        columns = (torch.cat(column) for column in zip(*table, strict=True))
        lengths, symbols, self.change, self.other, self.seen = columns
        self.starts, self.symbols = F.pad(lengths.cumsum(0), (1, 0)), symbols.to(torch.int32)

    def rows(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """idx (B, T) -> the rows of the contexts that end at each position, (K, B, T), and of symbols alone, (B, T)."""
        T, found = idx.shape[1], []
        for n, (keys, first) in enumerate(self.keys, 1):
            h = hashes(idx, n)
            place = torch.searchsorted(keys, h).clamp_max(len(keys) - 1)
            known = (keys[place] == h) & (torch.arange(T, device=idx.device) >= n - 1)
            found.append(torch.where(known, first + place, 0))
        found += [torch.zeros_like(idx)] * (self.K - len(found))  # the text is too short for the longest contexts
        return torch.stack(found), torch.zeros_like(idx)

    def rows_elsewhere(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """As `rows`, without the fold that each chunk is from; it is found there, and if not, as `rows`."""
        T = idx.shape[1]
        if T not in self.order:
            chunks = hashes(self.text[None, :-1], T)[0, T - 1 :]
            self.order[T] = tuple(chunks.sort())  # type: ignore[assignment]
        ordered, starts = self.order[T]
        h = hashes(idx, T)[:, -1].contiguous()
        place = torch.searchsorted(ordered, h).clamp_max(len(ordered) - 1)
        if not len(ordered) or not torch.equal(ordered[place], h):
            return self.rows(idx)
        t = torch.arange(T, device=idx.device)
        position = starts[place][:, None] + t  # (B, T)
        # A context must not reach out of the chunk.
        within = t >= torch.arange(self.K, device=idx.device)[:, None, None]
        return torch.where(within, self.rows_at[:, position].long(), 0), self.fold[position]

    def look_up(self, rows: Tensor, alone: Tensor) -> Found:
        """Look up rows (K, n), and rows of single symbols (n,)."""
        change = self.other[rows][..., None].expand(*rows.shape, self.V).contiguous()
        row, entry = spread(self.starts, rows.flatten())
        with no_determinism():  # the indices are unique; a deterministic kernel would sort them
            change.view(-1)[row * self.V + self.symbols[entry]] = self.change[entry]
        return Found(self.alone[alone], change, self.seen[rows].permute(1, 0, 2).flatten(1))


@contextmanager
def no_determinism() -> Iterator[None]:
    """Allow PyTorch's faster algorithms for operations that are deterministic anyway."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


MIXTURES: WeakValueDictionary[int, "Mixture"] = WeakValueDictionary()  # by their numbers
NUMBERS = count()


@torch.library.custom_op("charlm::look_up", mutates_args=())
def look_up(idx: Tensor, last: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Mixture.look_up` as one operation of PyTorch's, into which its compiler does not look."""
    alone, change, seen = MIXTURES[number].look_up(idx, last)
    return alone, change, seen


@look_up.register_fake
def _(idx: Tensor, last: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of what `look_up` returns."""
    n, K, V = idx.shape[0] * last, MIXTURES[number].n_context, MIXTURES[number].vocab_size
    empty = partial(torch.empty, device=idx.device)
    return empty(n, V), empty(K, n, V), empty(n, 3 * K)


class State(NamedTuple):
    """State of `decode`: the last characters (B, T), and the state of each network."""

    idx: Tensor
    caches: list[Cache]


class Network(TransformerPP):
    """A Transformer that is shown what was counted, and corrects it. It starts as the counts are, and they as uniform.

    Args:
        vocab_size: V, the number of symbols.
        n_context: K, the characters of the longest context.
        settings: as of `TransformerPP`.
    """

    def __init__(self, vocab_size: int, n_context: int, **settings: Any):
        super().__init__(vocab_size, **settings)
        self.inject = nn.Linear(vocab_size + 3 * n_context, settings["n_embd"], bias=False)
        last = nn.Linear(64, n_context + 1)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)  # the sum of all changes: the backed-off probabilities as they are
        self.trust = nn.Sequential(nn.Linear(3 * n_context, 64), nn.ReLU(), last)

    def forward(self, idx: Tensor, found: Found, shown: Tensor) -> Tensor:  # type: ignore[override]
        """idx (B, T), what was found at its positions, and how that is shown (B * T, V + 3 * K) -> logits (B, T, V)."""
        x, cos, sin = self.embed(idx, 0)
        x = self.trunk(x + self.inject(shown).view_as(x), cos, sin)
        return self.head(x) + self.weighed(found).view(*idx.shape, -1)

    def decode(  # type: ignore[override]
        self, idx: Tensor, found: Found, shown: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """The same after what `cache` has seen, for the last position only: (B, V)."""
        x, cos, sin = self.embed(idx, cache.length if cache else 0)
        x, cache = self.decode_trunk(x + self.inject(shown).view_as(x), cos, sin, cache)
        return self.head(x) + self.weighed(found).view(*idx.shape, -1)[:, -1], cache

    def weighed(self, found: Found) -> Tensor:
        """The logits of counting, (n, V)."""
        weights = self.trust(found.seen.to(self.inject.weight.dtype))  # (n, K + 1)
        return found.alone * weights[:, -1:] + (found.change * weights.t()[:-1, :, None]).sum(0)


@keeps_arguments
class Mixture(nn.Module):
    """Networks that weigh and correct what was counted, each by itself; their probabilities are averaged.

    Averaged, several err less than any of them ("deep ensembles": Lakshminarayanan et al. 2017). They begin apart, and
    see the same chunks.

    Args:
        vocab_size: V, the number of symbols.
        block_size: longest context in characters: the number of positions.
        n_context: longest counted context in characters.
        n_folds: folds of the training text; in each fold the networks see the counts of the other folds.
        n_networks: number of Transformers, whose probabilities are averaged.
        n_layer: Transformer blocks per network.
        n_head: attention heads per block.
        n_embd: width of the embedding: an even multiple of n_head.
        mlp: feed-forward layer: relu2 (squared ReLU) or swiglu, with as many parameters.
        dropout: probability of dropout in the embedding, attention and residual branches.
        checkpointing: recompute each block in the backward pass: less memory, a third more time, the same bits.

    Raises:
        ValueError: if n_embd is not an even multiple of n_head.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: Annotated[int, Ge(1)],
        n_layer: Annotated[int, Ge(0)],
        n_head: Annotated[int, Ge(1)],
        n_embd: Annotated[int, Ge(1)],
        n_context: Annotated[int, Ge(1), Le(100)] = 8,
        n_folds: Annotated[int, Ge(2), Le(1000)] = 8,
        n_networks: Annotated[int, Ge(1)] = 1,
        mlp: Literal["relu2", "swiglu"] = "relu2",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.block_size, self.vocab_size, self.n_context, self.n_folds = block_size, vocab_size, n_context, n_folds
        settings: dict[str, Any] = {"block_size": block_size, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        settings |= {"mlp": mlp, "dropout": dropout, "checkpointing": checkpointing}
        self.networks = nn.ModuleList(Network(vocab_size, n_context, **settings) for _ in range(n_networks))
        self.register_load_state_dict_pre_hook(make_room)
        self.register_buffer("text", torch.zeros(0, dtype=torch.uint8 if vocab_size <= 256 else torch.int32))
        self.text: Tensor
        self.counted: Counts | None = None
        self.register()

    def register(self) -> None:
        self.number = next(NUMBERS)
        MIXTURES[self.number] = self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.register()  # a copy has its own

    def count(self, ids: Tensor) -> None:
        """Take ids (N,) as the text that is counted; with the weights, it is kept in checkpoints."""
        self.text, self.counted = ids.to(self.text), None

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 with T of at most block_size -> logits (B, T, V)."""
        return averaged(self.each(idx))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets (B, T) int64 -> the loss of each target, in nats (B, T); in training, the mean of the networks'.

        Each network learns from its own loss, since an averaged loss would let one rely on another.
        """
        each = log_probabilities(self.each(idx))  # (M, B, T, V)
        known = targets.clamp_min(0).expand(len(each), *targets.shape)
        found = each.gather(-1, known[..., None])[..., 0]
        found = found.mean(0) if self.training else found.logsumexp(0) - math.log(len(each))
        return -found.masked_fill(targets < 0, 0.0)

    def each(self, idx: Tensor) -> list[Tensor]:
        """idx (B, T) -> the logits (B, T, V) of each network."""
        found = Found(*look_up(idx, idx.shape[1], self.number))
        shown = self.shown(found)
        return [network(idx, found, shown) for network in self.networks]

    @torch.no_grad()
    def decode(self, idx: Tensor, state: State | None) -> tuple[Tensor, State]:
        """idx (B, T) int64 -> logits (B, V) of its last position; the state is filled in place."""
        seen = torch.cat((state.idx, idx), 1) if state else idx
        seen = seen[:, -(idx.shape[1] + self.n_context - 1) :]  # no context reaches further
        found = self.look_up(seen, idx.shape[1])
        shown, networks = self.shown(found), cast(list[Network], self.networks)
        caches = state.caches if state else [None] * len(networks)
        each = [network.decode(idx, found, shown, cache) for network, cache in zip(networks, caches, strict=True)]
        return averaged([logits for logits, _ in each]), State(seen, [cache for _, cache in each])

    @torch.no_grad()
    def look_up(self, idx: Tensor, last: int) -> Found:
        """Return the counts of the contexts that end at the `last` positions of idx (B, T): B * last of them."""
        V, K = self.vocab_size, self.n_context
        if len(self.text) < 2:
            n = idx[:, -last:].numel()
            zeros = partial(torch.zeros, device=idx.device)
            return Found(zeros(n, V), zeros(K, n, V), zeros(n, 3 * K))
        if self.counted is None or self.counted.text.device != idx.device:
            self.counted = Counts(self.text.cpu().long(), V, K, self.n_folds, idx.device)
        rows, alone = self.counted.rows_elsewhere(idx) if self.training else self.counted.rows(idx)
        return self.counted.look_up(rows[..., -last:].flatten(1), alone[:, -last:].flatten())

    def shown(self, found: Found) -> Tensor:
        """Return the features of the counts that networks read, (n, V + 3 * K)."""
        # Square roots, because small probabilities matter.
        features = torch.cat((found.log_p().mul(0.5).exp(), found.seen), 1)
        return features.to(next(self.parameters()).dtype)


def make_room(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a model's text the length that it has in a state dict; PyTorch calls this before it loads one."""
    text = state_dict.get(f"{prefix}text")
    if text is not None:
        if text.dim() != 1 or text.dtype != model.text.dtype or (len(text) and text.max() >= model.vocab_size):
            raise ValueError("the text that the model has counted is not one of its symbols")
        model.text, model.counted = torch.empty_like(text), None


def log_probabilities(each: Sequence[Tensor]) -> Tensor:
    """The logits (..., V) of each of M networks -> their log-probabilities (M, ..., V)."""
    return torch.stack([logits.float().log_softmax(-1) for logits in each])


def averaged(each: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the networks' mean probabilities, (..., V); of a single network, its logits."""
    if len(each) == 1:
        return each[0]
    return log_probabilities(each).logsumexp(0) - math.log(len(each))
