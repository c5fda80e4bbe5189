"""Bigram: the next character from the last one alone, as a table of logits.

The model of Karpathy's "Let's build GPT" (2023); the idea is Markov's (1913). Its best possible loss is known in
closed form, from the counts of pairs of characters: `charlm.evaluate.references`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def nll(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets (B, T) int64 -> the loss of each target, -log p, in nats (B, T).

        All that a batch can ask for are the V rows of the table: their softmax is less work than that of B*T copies.
        """
        table = self.token_embedding_table.weight  # (V, V)
        log_p = F.log_softmax(table, dim=-1, dtype=torch.float32).flatten()  # (V*V,)
        return -log_p.gather(0, torch.add(targets, idx, alpha=len(table)).flatten()).view_as(idx)

    def backward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets (B, T) int64 -> their mean loss, whose gradient is left in the table.

        The gradient is that of autograd through `nll`, to the bit, in a quarter of its time: it would look for its
        steps anew with each batch, which takes longer than they do. The loss is a product of what they need anyway.
        """
        weight = self.token_embedding_table.weight
        table = weight.detach()  # (V, V)
        n = table.shape[0]
        log_p = table.log_softmax(-1, dtype=torch.float32)
        pairs = torch.add(targets, idx, alpha=n).view(-1)  # (B*T,): idx * V + targets
        of_log_p = log_p.new_zeros(n * n).scatter_add_(0, pairs, log_p.new_full(pairs.shape, -1 / pairs.numel()))
        of_table = torch._log_softmax_backward_data(of_log_p.view(n, n), log_p, -1, torch.float32)
        weight.grad = of_table.to(table.dtype)
        return of_log_p.dot(log_p.view(-1))
