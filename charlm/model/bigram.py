"""Bigram: the next character from the last one alone, as a table of logits.

The model of Karpathy's "Let's build GPT" (2023); the idea is Markov's (1913). Its best possible loss is known in
closed form, from the counts of pairs of characters: `charlm.evaluate.references`.
"""

from torch import Tensor, nn


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
