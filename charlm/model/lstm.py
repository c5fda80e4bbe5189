"""LSTM: a state that is carried along the text, with gates that decide what it keeps.

Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers et al. (2000); as a model of
characters it is Karpathy's char-rnn, "The Unreasonable Effectiveness of Recurrent Neural Networks" (2015).
"""

from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from charlm.model import keeps_arguments

State = tuple[Tensor, Tensor]


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
        # One module per layer, because cuDNN would rebuild the state of dropout inside a module at each seeded step.
        layers = [nn.LSTM(n_embd, n_embd, batch_first=True) for _ in range(n_layer)]
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_embd, vocab_size)
        # The forget gate, second of the four, begins by keeping (Jozefowicz et al., 2015). Of its two biases, which
        # are added, one does that.
        with torch.no_grad():
            for layer in layers:
                layer.get_parameter("bias_ih_l0")[n_embd : 2 * n_embd] = 1.0
                layer.get_parameter("bias_hh_l0")[n_embd : 2 * n_embd] = 0.0

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V)."""
        x = self.token_embedding(idx)  # (B, T, C)
        for layer in self.layers:
            x, _ = layer(self.dropout(x))
        return self.head(self.dropout(x))

    @torch.no_grad()
    def decode(self, idx: Tensor, state: list[State] | None) -> tuple[Tensor, list[State]]:
        """idx (B, T) int64 -> logits (B, V) of its last position; the state of each layer is (h, c), (1, B, C) each."""
        x, states = self.token_embedding(idx), []
        for i, layer in enumerate(self.layers):
            x, new = layer(self.dropout(x), state[i] if state else None)
            states.append(new)
        return self.head(self.dropout(x[:, -1])), states
