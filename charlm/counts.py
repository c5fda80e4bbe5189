"""Counts of the contexts of a text, as tables: what a context of n characters changes in the shorter one's prediction.

The log-probability of a symbol is that without context, and to it are added the changes by the contexts of 1, 2, ... n
characters, as far as they were ever seen. So any model that backs off is a sum over one row per context.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLIER = 6364136223846793005  # the multiplier of Knuth's generator modulo 2^64
INVERSE = -(-pow(MULTIPLIER, -1, 2**64) % 2**64)  # to undo it, as a number with a sign
SCATTER = 0xBF58476D1CE4E5B9 - 2**64  # of SplitMix64
SCALE = 0.3  # brings logarithms of counts, which reach 10, near 1

# Shows progress: steps done, steps in all.
Reporter = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Show no progress."""


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
    first = starts[rows].long()
    lengths = starts[rows + 1] - first
    row = torch.arange(len(rows), device=rows.device).repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    return row, torch.arange(len(row), device=rows.device) + (first - ends + lengths)[row]


def discounts(counts: Tensor) -> Tensor:
    """Return the discounts of counts 0, 1, 2 and more: Chen and Goodman (1999), equation 26."""
    n = [float((counts == i).sum()) + 1 for i in range(1, 5)]
    y = n[0] / (n[0] + 2 * n[1])
    found = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
    return torch.tensor([0.0, *(min(max(d, 0.1 * i), 0.9 * i) for i, d in enumerate(found, 1))])


class Level(NamedTuple):
    """The contexts of n symbols in a text, at each of its N - n positions that have one and a next symbol."""

    contexts: Tensor  # (C,): their hashes, sorted
    context: Tensor  # (N - n,): number of the context
    pairs: Tensor  # (P,): number of the context * V + next symbol, sorted
    pair: Tensor  # (N - n,): number of the pair
    times: Tensor  # (P,): how often it occurs


def level(text: Tensor, vocab_size: int, n: int) -> Level:
    """Group the positions of a text, (N,) int64, by their contexts of n symbols. With n of 0, there is one context."""
    h = hashes(text[None, :-1], n)[0, n - 1 :] if n else torch.zeros_like(text[1:])
    contexts, context = h.unique(return_inverse=True)
    pairs, pair, times = (context * vocab_size + text[max(n, 1) :]).unique(return_inverse=True, return_counts=True)
    return Level(contexts, context, pairs, pair, times)


def anywhere(of: Level) -> Tensor:
    """Return a place of each pair of a level, (P,): an index into `pair`."""
    place = of.pair.new_empty(len(of.pairs))
    place[of.pair] = torch.arange(len(of.pair))
    return place


def span(of: Level, values: Tensor, reduce: str) -> Tensor:
    """The smallest (amin) or largest (amax) of the `values` (N - n,) at the places of each pair of a level: (P,)."""
    return values.new_zeros(len(of.pairs)).scatter_reduce(0, of.pair, values, reduce, include_self=False)


class Found(NamedTuple):
    """Counts at n positions, for K lengths of context."""

    alone: Tensor  # (n, V): log-probabilities of symbols without any context
    change: Tensor  # (K, n, V): what each longer context changes in those of the shorter one
    seen: Tensor  # (n, 3 * K): how often it was seen, followed by how many symbols, and whether at all

    def log_p(self) -> Tensor:
        """After the longest context that was ever seen, (n, V)."""
        return self.alone + self.change.sum(0)

    def last_of(self, T: int) -> "Found":
        """Return what was found at the last of every T positions."""
        return Found(self.alone[T - 1 :: T], self.change[:, T - 1 :: T], self.seen[T - 1 :: T])


class Table:
    """One row per context, which lists the symbols that followed it and has one number for all others.

    Row 0 is of contexts that never were; then come the contexts of 1 character in the order of their hashes, those of
    2, and so on.

    Args:
        alone: (n, V): log-probabilities of symbols without any context, for the whole text first.
        keys: for each length of context: the sorted hashes of its contexts, and the row of the first.
        starts: (n_rows + 1,): where the entries of each row begin.
        symbols, change: (n_entries,): a symbol, and what the context changes in its log-probability.
        other: (n_rows,): what it changes in that of every symbol that is not listed.
        seen: (n_rows, 3): how often it was seen, followed by how many symbols, and whether at all.
    """

    def __init__(
        self,
        alone: Tensor,
        keys: list[tuple[Tensor, int]],
        starts: Tensor,
        symbols: Tensor,
        change: Tensor,
        other: Tensor,
        seen: Tensor,
    ):
        self.alone, self.keys, self.starts, self.symbols = alone, keys, starts, symbols
        self.change, self.other, self.seen = change, other, seen
        self.V, self.K = alone.shape[1], len(keys)
        self.codes: Tensor | None = None  # row * V + symbol of each entry, once it is needed

    def to(self, device: str | torch.device) -> Self:
        """Return the table on a device."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        moved.keys = [(keys.to(device), first) for keys, first in self.keys]
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself, since nothing changes a table."""
        return self

    @property
    def device(self) -> torch.device:
        return self.change.device

    def rows(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """idx (B, T) -> the rows of the contexts that end at each position, (K, B, T), and of symbols alone, (B, T)."""
        T, found = idx.shape[1], []
        for n, (keys, first) in enumerate(self.keys, 1):
            h = hashes(idx, n)
            place = torch.searchsorted(keys, h).clamp_max(len(keys) - 1)
            known = (keys[place] == h) & (torch.arange(T, device=idx.device) >= n - 1)
            found.append(torch.where(known, first + place, 0))
        found += [torch.zeros_like(idx)] * (self.K - len(found))  # the text is too short for the longest contexts
        return torch.stack(found) if found else idx.new_zeros(0, *idx.shape), torch.zeros_like(idx)

    def look_up(self, rows: Tensor, alone: Tensor) -> Found:
        """Look up rows (K, n), and rows of single symbols (n,)."""
        change = self.other[rows][..., None].expand(*rows.shape, self.V).contiguous()
        row, entry = spread(self.starts, rows.flatten())
        with no_determinism():  # the indices are unique; a deterministic kernel would sort them
            change.view(-1)[row * self.V + self.symbols[entry]] = self.change[entry]
        return Found(self.alone[alone], change, self.seen[rows].permute(1, 0, 2).flatten(1))

    def log_p_of(self, targets: Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities of targets (n,) after the contexts of rows (K, n): (n,). No row lists a symbol twice."""
        if self.codes is None:
            row, _ = spread(self.starts, torch.arange(len(self.other), device=self.device))
            self.codes = row * self.V + self.symbols  # in ascending order
        log_p = self.alone[0, targets]
        for row in rows:
            code = row * self.V + targets
            place = torch.searchsorted(self.codes, code).clamp_max(max(0, len(self.codes) - 1))
            listed = self.codes[place] == code
            log_p = log_p + torch.where(listed, self.change[place], self.other[row])
        return log_p

    def tensors(self) -> dict[str, Tensor]:
        """Return the table without folds as named tensors, as a file keeps them."""
        first = torch.cat([torch.zeros(1, dtype=torch.long), *(f + torch.arange(len(k)) for k, f in self.keys)])
        row, entry = spread(self.starts, first)
        starts = F.pad(row.bincount(minlength=len(first)).cumsum(0), (1, 0))
        return {
            "alone": self.alone[:1],
            "starts": starts.int() if int(starts[-1]) < 2**31 else starts,
            "symbols": self.symbols[entry].to(torch.uint8 if self.V <= 256 else torch.int32),
            "change": self.change[entry],
            "other": self.other[first],
            "seen": self.seen[first],
            **{f"keys.{n}": keys for n, (keys, _) in enumerate(self.keys, 1)},
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor], vocab_size: int, n_context: int) -> "Table":
        """Make a table of `tensors`, perhaps mapped from a file of a stranger.

        Raises:
            ValueError: if they are no table for V symbols and contexts of up to n_context characters.
        """
        keys = [tensors[f"keys.{n}"] for n in range(1, n_context + 1) if f"keys.{n}" in tensors]
        firsts = torch.tensor([1, *(len(k) for k in keys)]).cumsum(0).tolist()
        n_rows, n_entries = firsts[-1], len(tensors["symbols"])
        starts, symbols = tensors["starts"], tensors["symbols"]
        shapes = {"alone": (1, vocab_size), "change": (n_entries,), "other": (n_rows,), "seen": (n_rows, 3)}
        whole = all(
            tensors[name].shape == shape and tensors[name].is_floating_point() for name, shape in shapes.items()
        )
        whole &= starts.shape == (n_rows + 1,) and int(starts[0]) == 0 and int(starts[-1]) == n_entries
        whole &= all(k.dtype == torch.long and bool((k[1:] > k[:-1]).all()) and len(k) > 0 for k in keys)
        integers = {torch.uint8, torch.int32, torch.long}
        if not whole or not {starts.dtype, symbols.dtype} <= integers or bool((starts[1:] < starts[:-1]).any()):
            raise ValueError("these are not the counts of a text")
        if n_entries and not (int(symbols.min()) >= 0 and int(symbols.max()) < vocab_size):
            raise ValueError("these are counts of other symbols")
        parts = (tensors[name] for name in ("change", "other", "seen"))
        table = cls(tensors["alone"], [*zip(keys, firsts, strict=False)], starts, symbols, *parts)
        table.K = n_context
        return table


class Counts(Table):
    """Next-symbol counts of every context in a text, and the same in all folds of the text but one.

    Counts back off as in modified Kneser-Ney (Chen and Goodman 1998, section 3): in all but the longest contexts, the
    count of a symbol is after how many different symbols it and its context stand, the start of the text included.

    Args:
        text: ids (N,) int64 on the CPU, where counting gives the same bits each time; N of at least 2.
        vocab_size: V.
        n_context: K, the characters of the longest context.
        n_folds: number of folds of the text. Each context has a row of counts per fold, taken from all other folds.
        report: shows the progress: lengths of contexts done, and in all.
    """

    def __init__(self, text: Tensor, vocab_size: int, n_context: int, n_folds: int, report: Reporter = silent):
        self.text, self.V, self.K, self.codes = text, vocab_size, n_context, None
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
        self.count(report)

    def count(self, report: Reporter) -> None:
        """Fill the table, from the shortest contexts to the longest."""
        V, y, n_folds = self.V, self.text[1:], len(self.alone) - 1
        nothing = torch.empty(0, dtype=torch.uint8 if V <= 256 else torch.int32)  # symbols of no entries
        zeros = self.alone.new_zeros
        table = [(y.new_zeros(1), nothing, zeros(0), zeros(1), zeros(1, 3))]
        n_rows, K = 1, min(self.K, len(y))
        whole, others = torch.zeros_like(self.fold), self.fold  # rows of the shorter context at each position
        codes, log_p = torch.arange(self.alone.numel()), self.alone.flatten()  # and all of its entries
        here = level(self.text, V, 1)
        for n in range(1, K + 1):
            at = self.position[n - 1 :]
            longer = level(self.text, V, n + 1) if n < K else None
            contexts, context, symbols = here.contexts, here.context, here.pairs % V
            # Count each occurrence of a pair; or, where longer contexts follow, each longer pair that ends with it.
            place, home = at - (n - 1), self.fold[at]
            if longer:
                first, last = (span(longer, home[1:], reduce) for reduce in ("amin", "amax"))
                place = F.pad(anywhere(longer) + 1, (1, 0))  # as if another symbol stood before the text
                home = F.pad(torch.where(first == last, first, 0), (1, 0), value=1)  # the only fold that it occurs in
            times = here.pair[place].bincount(minlength=len(here.pairs))
            # A context has its own row, and one per fold that it occurs in, counted in all others: if it occurs there.
            in_folds, in_fold = (context * (n_folds + 1) + self.fold[at]).unique(return_inverse=True)
            starts = F.pad((here.pairs // V).bincount(minlength=len(contexts)).cumsum(0), (1, 0))
            row, entry = spread(starts, in_folds // (n_folds + 1))
            within = place[home > 0]
            inside, times_inside = (in_fold[within] * V + y[at][within]).unique(return_counts=True)
            code = row * V + symbols[entry]
            found = torch.searchsorted(inside, code).clamp_max(len(inside) - 1)
            elsewhere = times[entry] - torch.where(inside[found] == code, times_inside[found], 0)
            kept = elsewhere > 0
            occurs = torch.zeros(len(in_folds), dtype=torch.bool)
            occurs[row[kept]] = True
            number = len(contexts) - 1 + occurs.cumsum(0)

            rows = torch.cat((here.pairs // V, number[row[kept]]))
            symbols = torch.cat((symbols, symbols[entry[kept]]))
            counts = torch.cat((times, elsewhere[kept]))
            lower = y.new_zeros(len(contexts) + int(occurs.sum()))
            often = context.bincount()
            often = torch.cat((often, (often[in_folds // (n_folds + 1)] - in_fold.bincount())[occurs]))
            there = occurs[in_fold]
            number = number[in_fold]
            lower[context], lower[number[there]] = whole[at], others[at][there]
            below = log_p[torch.searchsorted(codes, lower[rows] * V + symbols)]
            discount = discounts(times)[counts.clamp_max(3)]
            total, left = (rows.bincount(weight, len(lower)).float() for weight in (counts.double(), discount))
            codes = rows * V + symbols
            log_p = ((counts - discount + left[rows] * below.exp()) / total[rows]).log()
            lengths = rows.bincount(minlength=len(lower))
            other = torch.where(total > 0, (left / total).log(), 0.0)
            seen = torch.stack((SCALE * often.log1p(), SCALE * lengths.log1p(), (total > 0) * SCALE), 1)
            table.append((lengths, symbols.to(nothing.dtype), log_p - below, other, seen))
            self.keys.append((contexts, n_rows))
            self.rows_at[n - 1, at] = torch.where(there, n_rows + number, 0).int()
            n_rows += len(lower)
            whole, others = torch.zeros_like(whole), torch.zeros_like(others)
            whole[at], others[at] = context, number  # where it occurs nowhere else, no longer one does
            report(n, K)
            if longer:
                here = longer
        columns = (torch.cat(column) for column in zip(*table, strict=True))
        lengths, self.symbols, self.change, self.other, self.seen = columns
        self.starts = F.pad(lengths.cumsum(0), (1, 0))

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


def memory_to_count(n: int, n_context: int) -> int:
    """Return how many bytes counting n characters of text (not of random symbols) takes, the tables included."""
    return n * (200 + 75 * n_context)  # twice what code and prose took


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


class Counting(nn.Module):
    """A model that counts the contexts of a text. The text is kept with its weights, so that it can be counted again.

    Args:
        vocab_size: V, the number of symbols.
        n_context: longest counted context.
    """

    text: Tensor

    def __init__(self, vocab_size: int, n_context: int):
        super().__init__()
        self.vocab_size, self.n_context = vocab_size, n_context
        self.register_load_state_dict_pre_hook(make_room)
        self.register_buffer("text", torch.zeros(0, dtype=torch.uint8 if vocab_size <= 256 else torch.int32))
        self.counted: Table | None = None

    def counted_in(self, text: Tensor, report: Reporter = silent) -> Table:
        """Return the counts of a text, ids (N,) int64 on the CPU."""
        raise NotImplementedError

    def count(self, ids: Tensor, report: Reporter = silent) -> None:
        """Count the contexts of a text, ids (N,)."""
        self.text, self.counted = ids.to(self.text), None
        if len(ids) > 1:
            self.counted = self.counted_in(ids.cpu().long(), report)

    def table(self, device: torch.device) -> Table:
        """Return the counts of `text` on a device; they are made if they are not there."""
        if self.counted is None:
            self.counted = self.counted_in(self.text.cpu().long())
        if self.counted.device != device:
            self.counted = self.counted.to(device)
        return self.counted

    def counts(self) -> dict[str, Tensor]:
        """Return what was counted, as named tensors; `use_counts` takes them instead of counting again."""
        return self.counted.tensors() if self.counted else {}

    def use_counts(self, tensors: dict[str, Tensor]) -> None:
        """Take the counts of `text` from an equal model.

        Raises:
            ValueError, KeyError: if they cannot be such.
        """
        self.counted = Table.of(tensors, self.vocab_size, self.n_context)


def make_room(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a model's text the length that it has in a state dict; PyTorch calls this before it loads one."""
    text = state_dict.get(f"{prefix}text")
    if text is not None:
        if text.dim() != 1 or text.dtype != model.text.dtype or (len(text) and int(text.max()) >= model.vocab_size):
            raise ValueError("the text that the model has counted is not one of its symbols")
        model.text, model.counted = torch.empty_like(text), None
