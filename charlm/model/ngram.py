"""N-grams: the next symbol by how often each followed the same n - 1 symbols in the training text.

Nothing is learned by steps: the text is counted. Counts of long contexts are few, so they are smoothed by those of
shorter ones, down to symbols alone and from there to equal probabilities. Chen and Goodman, "An empirical study of
smoothing techniques for language modeling" (1998), compare the ways to do that.
"""

import math
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as F

from charlm.counts import SCALE, Counting, Reporter, Table, anywhere, discounts, level, memory_to_count, silent
from charlm.model import keeps_arguments

Smoothing = Literal["kneser_ney", "witten_bell", "backoff"]


def counted(text: Tensor, vocab_size: int, order: int, smoothing: Smoothing, report: Reporter = silent) -> Table:
    """The table of an n-gram model of a text, (N,) int64 on the CPU with N of at least 2."""
    V, K = vocab_size, min(order - 1, len(text) - 1)
    here = level(text, V, 0)
    below = torch.full((len(here.pairs),), -math.log(V))  # log-probability of each pair after a shorter context
    alone, keys, n_rows = below.new_empty(0), [], 1
    table = [(below.new_zeros(1), here.pairs[:0], below[:0], below.new_zeros(1), below.new_zeros(1, 3))]
    for n in range(K + 1):
        longer = level(text, V, n + 1) if n < K else None
        times = here.times
        if longer:
            shorter = here.pair[anywhere(longer) + min(n, 1)]  # number of the pair that each longer one ends with
            if smoothing == "kneser_ney":  # how many symbols stand before it; or none, where the text begins
                times = shorter.bincount(minlength=len(times)).clamp_min(1)
        context, symbols, n_contexts = here.pairs // V, here.pairs % V, len(here.contexts)
        total, kinds = context.bincount(times.double(), n_contexts), context.bincount(minlength=n_contexts)
        if smoothing == "witten_bell":
            taken, left = torch.zeros(len(times)), kinds.double()
            total = total + left
        else:
            taken = discounts(times)[times.clamp_max(3)]
            left = context.bincount(taken.double(), n_contexts)
        log_p = ((times - taken.double() + left[context] * below.double().exp()) / total[context]).log().float()
        other = (left / total).log().float()
        if n == 0:
            alone = (other - math.log(V)).repeat(V)
            alone[symbols] = log_p
        else:
            seen = torch.stack((SCALE * total.float().log1p(), SCALE * kinds.log1p(), torch.full_like(other, SCALE)), 1)
            table.append((kinds, symbols, log_p - below, other, seen))
            keys.append((here.contexts, n_rows))
            n_rows += n_contexts
        report(n + 1, K + 1)
        if longer:
            here, below = longer, log_p[shorter]
    lengths, symbols, change, other, seen = (torch.cat(column) for column in zip(*table, strict=True))
    starts = F.pad(lengths.long().cumsum(0), (1, 0))
    found = Table(alone[None], keys, starts, symbols.to(torch.uint8 if V <= 256 else torch.int32), change, other, seen)
    found.K = order - 1
    return found


@keeps_arguments
class NGram(Counting):
    """
    Args:
        vocab_size: V, the number of symbols.
        order: n, the symbols of the longest n-gram that is counted; it sees n - 1 of them.
        smoothing: kneser_ney: counts of shorter contexts say after how many symbols a symbol occurs, and three
            discounts are taken from all (modified Kneser-Ney: Chen and Goodman 1998, section 3). backoff: the same
            discounts, from plain counts. witten_bell: the more different symbols followed a context, the more weight
            have the shorter ones (Witten and Bell 1991).
    """

    closed_form = True  # there is nothing that steps could improve

    def __init__(
        self,
        vocab_size: int,
        order: Annotated[int, Ge(1), Le(100)] = 7,
        smoothing: Smoothing = "kneser_ney",
    ):
        super().__init__(vocab_size, order - 1)
        self.order, self.smoothing = order, smoothing
        self.block_size = max(1, order - 1)

    def counted_in(self, text: Tensor, report: Reporter = silent) -> Table:
        return counted(text, self.vocab_size, self.order, self.smoothing, report)

    @staticmethod
    def memory_to_count(n: int, order: int = 7, **_: Any) -> int:
        """Return how many bytes of memory counting a text of n tokens takes at most, for a model of these settings."""
        return memory_to_count(n, order)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> log-probabilities (B, T, V), which are logits as well. T may be of any length."""
        if not len(self.text):  # nothing is counted
            return torch.zeros(*idx.shape, self.vocab_size, device=idx.device)
        table = self.table(idx.device)
        rows, alone = table.rows(idx)
        return table.look_up(rows.flatten(1), alone.flatten()).log_p().view(*idx.shape, -1)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets (B, T) int64 -> the loss of each target, in nats (B, T)."""
        if not len(self.text):
            return torch.where(targets < 0, 0.0, math.log(self.vocab_size))
        table = self.table(idx.device)
        rows, _ = table.rows(idx)
        found = table.log_p_of(targets.clamp_min(0).flatten(), rows.flatten(1)).view_as(targets)
        return -found.masked_fill(targets < 0, 0.0)
