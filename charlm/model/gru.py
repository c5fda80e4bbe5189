"""GRU: a recurrent state with two gates, where the LSTM has three gates and a cell.

Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation" (2014), in
the variant that cuDNN and PyTorch compute; as a model of characters it is one of those in Karpathy's char-rnn (2015).
"""

from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from charlm.model import keeps_arguments


@keeps_arguments
class GRU(nn.Module):
    """A GRU over the embedded characters.

    Args:
        vocab_size: V, the number of symbols.
        n_layer: number of recurrent layers.
        n_embd: C, size of the embedding and of each layer's state.
        dropout: probability of dropout after the embedding and after each layer.
    """

    block_size = None  # it looks back over all that came before

    def __init__(
        self,
        vocab_size: int,
        n_layer: Annotated[int, Ge(1)],
        n_embd: Annotated[int, Ge(1)],
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.rnn = nn.GRU(n_embd, n_embd, n_layer, batch_first=True, dropout=dropout if n_layer > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V)."""
        x, _ = self.rnn(self.dropout(self.token_embedding(idx)))  # (B, T, C)
        return self.head(self.dropout(x))

    @torch.no_grad()
    def decode(self, idx: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """idx (B, T) int64 -> logits (B, V) of its last position; the state is (n_layer, B, C)."""
        x, state = self.rnn(self.dropout(self.token_embedding(idx)), state)
        return self.head(self.dropout(x[:, -1])), state
