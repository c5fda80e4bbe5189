"""MLP: the next character from the embeddings of the last few, side by side, through one hidden layer.

Bengio, Ducharme, Vincent and Jauvin, "A Neural Probabilistic Language Model" (2003), without its direct connections
from the embeddings to the logits, as in Karpathy's makemore.
"""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.model import keeps_arguments


@keeps_arguments
class MLP(nn.Module):
    """Takes any T: position t sees the characters t - block_size + 1 to t, and padding before the first.

    Args:
        vocab_size: V, the number of symbols.
        block_size: context in characters.
        n_embd: C, size of the embedding of a character.
        n_hidden: width of the hidden layer.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: Annotated[int, Ge(1)],
        n_embd: Annotated[int, Ge(1)],
        n_hidden: Annotated[int, Ge(1)],
    ):
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)  # the last row is what is before the text
        self.hidden = nn.Linear(block_size * n_embd, n_hidden)
        self.head = nn.Linear(n_hidden, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V)."""
        padding = self.token_embedding.num_embeddings - 1
        padded = F.pad(idx, (self.block_size - 1, 0), value=padding)  # (B, n - 1 + T)
        last = padded.unfold(1, self.block_size, 1)  # (B, T, n), a view
        x = self.token_embedding(last).flatten(2)  # (B, T, n * C)
        x = torch.tanh(self.hidden(x))
        return self.head(x)
