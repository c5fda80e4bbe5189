"""Bigram: the next character from the last one alone, as a table of logits.

The model of Karpathy's "Let's build GPT" (2023); the idea is Markov's (1913). Its best possible loss is known in
closed form, from the counts of pairs of characters: `charlm.evaluate.baselines`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.internals.torch import log_softmax_backward
from charlm.model import keeps_arguments

LARGEST_TABLE = 512  # symbols; the rows that a batch looks up are less work than a larger table


@keeps_arguments
class Bigram(nn.Module):
    """Row i of the table is the logits of what follows character i.

    Args:
        vocab_size: V, the number of symbols.
    """

    block_size = 1  # the characters it looks back over

    def __init__(self, vocab_size: int):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V)."""
        return self.token_embedding_table(idx)

    def decode(self, idx: Tensor, state: None) -> tuple[Tensor, None]:
        """idx (B, T) int64 -> logits after the last of it (B, V). There is nothing else to remember."""
        return self.token_embedding_table.weight.index_select(0, idx[:, -1]), None

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets (B, T) int64 -> the loss of each target, -log p, in nats (B, T); 0 where a target is negative.

        All that a batch can ask for are the V rows of a table: their softmax is less work than that of B*T copies.
        """
        table = self.token_embedding_table.weight  # (V, V)
        if len(table) <= LARGEST_TABLE:
            losses: Tensor = TableLoss.apply(table, idx, targets)
            return losses
        logits = self(idx)  # (B, T, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class TableLoss(torch.autograd.Function):
    """The losses of a table of logits, with their gradient in as few operations as there can be.

    It is the gradient that autograd finds for log_softmax and gather, to the bit, in a third of the time.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor, targets: Tensor) -> Tensor:
        """table (V, V), idx and targets (B, T) -> losses (B, T), in single precision at least."""
        log_p = table.log_softmax(-1, dtype=torch.promote_types(table.dtype, torch.float32))
        ignored = targets < 0
        pairs = torch.add(targets, idx, alpha=len(table)).masked_fill_(ignored, 0)  # (B, T): idx * V + targets
        ctx.save_for_backward(log_p, pairs, ignored)
        ctx.dtype = table.dtype
        return log_p.take(pairs).neg_().masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        log_p, pairs, ignored = ctx.saved_tensors
        of_pairs = gradient.masked_fill(ignored, 0.0).neg_().view(-1)
        of_log_p = log_p.new_zeros(log_p.numel()).scatter_add_(0, pairs.view(-1), of_pairs).view_as(log_p)
        return log_softmax_backward(of_log_p, log_p, log_p.dtype).to(ctx.dtype), None, None
