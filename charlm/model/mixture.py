"""Mixture: n-gram counts of the last 1, 2, ... characters, weighted by networks, mixed with Transformers.

Counting knows a small text by heart at once; a network learns what to make of it. The logits are the log-probabilities
of symbols alone, and what each longer context changes in those of the shorter one, each with a weight: first contexts
of the training text, then those of the window itself, where names and phrases return. The weights depend on how often a
context was seen and on what a Transformer makes of the window, and the Transformer adds logits of its own. It is the
mixing of contexts of Mahoney's PAQ (2005; as a network: Knoll and de Freitas, "A machine learning perspective on
predictive coding with PAQ", 2012) and the residual of Li et al., "Residual learning of neural text generation with
n-gram language model" (2022). Counts of the text back off as in modified Kneser-Ney (Chen and Goodman, "An empirical
study of smoothing techniques for language modeling", 1998), those of the window by a Dirichlet prior (MacKay and Peto,
1995); the latter are the cache of Kuhn and De Mori (1990).

Counted on the very text that the network trains on, contexts would teach it to believe them blindly. So the text is cut
into folds, and in each the network is shown the counts of all others: deleted estimation (Jelinek and Mercer,
1980), or cross-fitting. The folds are long, because neighbouring text is about the same people.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Annotated, Any, Literal, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.counts import SCALE, Counting, Counts, Found, Reporter, memory_to_count, silent
from charlm.model import keeps_arguments
from charlm.model.transformerpp import Cache, TransformerPP

PRIORS = (512.0, 32.0, 8.0)  # how many counts in a window of 1, 2, 3 and more characters the probabilities before weigh

RULE = 2  # of counting; weights that were trained on counts by another rule would be wrong
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
    n, model = idx.shape[0] * last, MIXTURES[number]
    V, K, R = model.vocab_size, model.n_context, model.n_recent
    empty = partial(torch.empty, device=idx.device)
    return empty(n, V), empty(K + R, n, V), empty(n, 3 * K + 2 * R)


class State(NamedTuple):
    """State of `decode`: all characters so far (B, T), and the state of each network."""

    idx: Tensor
    caches: list[Cache]


class Network(TransformerPP):
    """A Transformer that is shown what was counted, and corrects it. It starts as the counts are, and they as uniform.

    Args:
        vocab_size: V, the number of symbols.
        n_context: K, the characters of the longest context.
        settings: as of `TransformerPP`.
    """

    def __init__(self, vocab_size: int, n_context: int, n_recent: int, **settings: Any):
        super().__init__(vocab_size, **settings)
        n_seen, n_weights = 3 * n_context + 2 * n_recent, n_context + n_recent + 1
        self.inject = nn.Linear(vocab_size + n_seen, settings["n_embd"], bias=False)
        last = nn.Linear(64, n_weights)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)  # the sum of all changes: the backed-off probabilities as they are
        self.trust = nn.Sequential(nn.Linear(n_seen, 64), nn.ReLU(), last)
        self.judge = nn.Linear(settings["n_embd"], n_weights, bias=False)
        nn.init.zeros_(self.judge.weight)

    def forward(self, idx: Tensor, found: Found, shown: Tensor) -> Tensor:  # type: ignore[override]
        """idx (B, T), what was found at its positions, and how that is shown (B * T, ...) -> logits (B, T, V)."""
        x, cos, sin = self.embed(idx, 0)
        x = self.trunk(x + self.inject(shown).view_as(x), cos, sin)
        return self.logits(x.flatten(0, 1), found).view(*idx.shape, -1)

    def decode(  # type: ignore[override]
        self, idx: Tensor, found: Found, shown: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """The same after what `cache` has seen, for the last position only: (B, V)."""
        x, cos, sin = self.embed(idx, cache.length if cache else 0)
        x, cache = self.decode_trunk(x + self.inject(shown).view_as(x), cos, sin, cache)
        return self.logits(x, found.last_of(idx.shape[1])), cache

    def logits(self, x: Tensor, found: Found) -> Tensor:
        """x (n, C), what the Transformer makes of n positions, and what was found there -> logits (n, V)."""
        weights = self.trust(found.seen.to(x.dtype)) + self.judge(x)  # (n, K + R + 1)
        changes = (found.change * weights.t()[:-1, :, None]).sum(0)
        return self.head(x) + found.alone * weights[:, -1:] + changes


@keeps_arguments
class Mixture(Counting):
    """Networks that weigh and correct what was counted, each by itself; their probabilities are averaged.

    Averaged, several err less than any of them ("deep ensembles": Lakshminarayanan et al. 2017). They begin apart, and
    see the same chunks.

    Args:
        vocab_size: V, the number of symbols.
        block_size: longest context in characters: the number of positions.
        n_context: longest counted context in characters.
        n_recent: longest context in characters that is counted in the window itself; 0 for none.
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
        n_recent: Annotated[int, Ge(0), Le(100)] = 6,
        n_folds: Annotated[int, Ge(2), Le(1000)] = 8,
        n_networks: Annotated[int, Ge(1)] = 1,
        mlp: Literal["relu2", "swiglu"] = "relu2",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__(vocab_size, n_context)
        self.block_size, self.n_recent, self.n_folds = block_size, n_recent, n_folds
        settings: dict[str, Any] = {"block_size": block_size, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        settings |= {"mlp": mlp, "dropout": dropout, "checkpointing": checkpointing}
        self.networks = nn.ModuleList(Network(vocab_size, n_context, n_recent, **settings) for _ in range(n_networks))
        self.register_buffer("rule", torch.tensor(RULE))
        self.register_load_state_dict_pre_hook(check_rule)
        self.register()

    def register(self) -> None:
        self.number = next(NUMBERS)
        MIXTURES[self.number] = self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.register()  # a copy has its own

    def counted_in(self, text: Tensor, report: Reporter = silent) -> Counts:
        return Counts(text, self.vocab_size, self.n_context, self.n_folds, report)

    @staticmethod
    def memory_to_count(n: int, n_context: int = 8, **_: Any) -> int:
        """Return how many bytes of memory counting a text of n tokens takes at most, for a model of these settings."""
        return memory_to_count(n, n_context)

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
        found = self.look_up(seen, idx.shape[1])
        shown, networks = self.shown(found), cast(list[Network], self.networks)
        caches = state.caches if state else [None] * len(networks)
        each = [network.decode(idx, found, shown, cache) for network, cache in zip(networks, caches, strict=True)]
        return averaged([logits for logits, _ in each]), State(seen, [cache for _, cache in each])

    @torch.no_grad()
    def look_up(self, idx: Tensor, last: int) -> Found:
        """Return the counts of the contexts that end at the `last` positions of idx (B, T): B * last of them."""
        V, K, R = self.vocab_size, self.n_context, self.n_recent
        if len(self.text) < 2:
            n = idx[:, -last:].numel()
            zeros = partial(torch.zeros, device=idx.device)
            return Found(zeros(n, V), zeros(K + R, n, V), zeros(n, 3 * K + 2 * R))
        counted = self.table(idx.device)
        if self.training and not isinstance(counted, Counts):
            self.count(self.text)  # counts from a file are those of the whole text only
            counted = self.table(idx.device)
        # In training, an instance of Counts.
        rows, alone = (
            counted.rows_elsewhere(idx) if self.training and isinstance(counted, Counts) else counted.rows(idx)
        )
        found = counted.look_up(rows[..., -last:].flatten(1), alone[:, -last:].flatten())
        change, seen = recent(idx, last, R, found.log_p().exp().view(-1, last, V))
        return Found(found.alone, torch.cat((found.change, change)), torch.cat((found.seen, seen), 1))

    def shown(self, found: Found) -> Tensor:
        """Return the features of the counts that networks read, (n, V + 3 * K)."""
        # Square roots, because small probabilities matter.
        features = torch.cat((found.log_p().mul(0.5).exp(), found.seen), 1)
        return features.to(next(self.parameters()).dtype)


def check_rule(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse weights that learned from counts by another rule; PyTorch calls this before it loads them."""
    rule = state_dict.get(f"{prefix}rule", torch.tensor(1))
    if rule.numel() != 1 or int(rule) != RULE:
        raise ValueError(f"it was trained on counts by rule {rule.tolist()}, and this version counts by rule {RULE}")


def recent(idx: Tensor, last: int, n_recent: int, p: Tensor) -> tuple[Tensor, Tensor]:
    """Count in windows idx (B, T) what followed the contexts of 1 to R characters at each of the `last` positions.

    Args:
        p: (B, last, V): the probabilities of symbols before.

    Returns:
        What each context changes in their logarithms, (R, B * last, V), and for each how often it was seen, followed by
        how many symbols, (B * last, 2 * R).
    """
    (B, T), V = idx.shape, p.shape[-1]
    position = torch.arange(T, device=idx.device)
    equal = (position < position[-last:, None]).expand(B, last, T)
    followed = F.pad(F.one_hot(idx[:, 1:], V).float(), (0, 0, 0, 1))  # (B, T, V)
    changes, seen = [p.new_empty(0, B * last, V)], [p.new_empty(B * last, 0)]
    for n in range(n_recent):
        before = F.pad(idx, (n, 0), value=-1)[:, :T, None]  # the character n positions before, if there is one
        equal = equal & (before[:, -last:] == before.mT) & (position >= n)
        with torch.autocast(idx.device.type, enabled=False):
            counts = equal.float() @ followed  # (B, last, V)
        total, prior = counts.sum(-1, keepdim=True), PRIORS[min(n, len(PRIORS) - 1)]
        longer = (counts + prior * p) / (total + prior)
        changes.append((longer / p).log().view(1, -1, V))
        p = longer
        seen.append(SCALE * torch.cat((total, (counts > 0).sum(-1, keepdim=True)), -1).log1p().view(-1, 2))
    return torch.cat(changes), torch.cat(seen, 1)


def log_probabilities(each: Sequence[Tensor]) -> Tensor:
    """The logits (..., V) of each of M networks -> their log-probabilities (M, ..., V)."""
    return torch.stack([logits.float().log_softmax(-1) for logits in each])


def averaged(each: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the networks' mean probabilities, (..., V); of a single network, its logits."""
    if len(each) == 1:
        return each[0]
    return log_probabilities(each).logsumexp(0) - math.log(len(each))
