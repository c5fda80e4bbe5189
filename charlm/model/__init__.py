"""Models: idx (B, T) in, logits (B, T, V) out. Plain torch: no Lightning, no Hydra, no text.

A model is an `nn.Module` with `forward(idx) -> logits` and `block_size`, the characters it can look back over.
Shape legend: B batch, T time, C channels, V vocabulary.
"""
