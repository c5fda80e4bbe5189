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
        # One module per layer, because cuDNN would rebuild the state of dropout inside a module at each seeded step.
        self.layers = nn.ModuleList(nn.GRU(n_embd, n_embd, batch_first=True) for _ in range(n_layer))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V)."""
        x = self.token_embedding(idx)  # (B, T, C)
        for layer in self.layers:
            x, _ = layer(self.dropout(x))
        return self.head(self.dropout(x))

    @torch.no_grad()
    def decode(self, idx: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """idx (B, T) int64 -> logits (B, V) of its last position; the state of each layer is (1, B, C)."""
        x, states = self.token_embedding(idx), []
        for i, layer in enumerate(self.layers):
            x, new = layer(self.dropout(x), state[i] if state else None)
            states.append(new)
        return self.head(self.dropout(x[:, -1])), states
