"""LSTM: a state that is carried along the text, with gates that decide what it keeps.

Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers et al. (2000); as a model of
characters it is Karpathy's char-rnn, "The Unreasonable Effectiveness of Recurrent Neural Networks" (2015).
"""

from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from charlm.model import keeps_arguments


@keeps_arguments
class LSTM(nn.Module):
    """An LSTM over the embedded characters.

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
        self.rnn = nn.LSTM(n_embd, n_embd, n_layer, batch_first=True, dropout=dropout if n_layer > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_embd, vocab_size)
        # The forget gate, second of the four, begins by keeping (Jozefowicz et al., 2015). Of its two biases, which
        # are added, one does that.
        with torch.no_grad():
            for layer in range(n_layer):
                getattr(self.rnn, f"bias_ih_l{layer}")[n_embd : 2 * n_embd] = 1.0
                getattr(self.rnn, f"bias_hh_l{layer}")[n_embd : 2 * n_embd] = 0.0

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V)."""
        x, _ = self.rnn(self.dropout(self.token_embedding(idx)))  # (B, T, C)
        return self.head(self.dropout(x))

    @torch.no_grad()
    def decode(self, idx: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """idx (B, T) int64 -> logits (B, V) of its last position; the state is (h, c), (n_layer, B, C) each."""
        x, state = self.rnn(self.dropout(self.token_embedding(idx)), state)
        return self.head(self.dropout(x[:, -1])), state
