"""Models: idx (B, T) in, logits (B, T, V) out. Plain torch: no Lightning, no Hydra, no text.

A model is an `nn.Module` with `forward(idx) -> logits` and `block_size`, the characters it can look back over: a
number, or None where it looks back over all that came before. If it cannot be given more than that, it says so.

A model may also have `decode(idx (B, T), state) -> (logits (B, V) of the last position, state)`, for generation: it
goes on after what `state` has seen, None at the beginning, without computing that again. It is equal to `forward`. A
state is used up when it is passed on; no gradients flow through it; with a `block_size`, at most that many characters
fit in.

Where there is a shorter way to a loss than through logits, it has `loss(idx, targets) -> (B, T)`: the loss of each
target in nats, as cross entropy of `forward` gives it, and 0 where a target is negative and does not count.

One that counts has `count(ids)`, which is given the training split, (N,), before the first step.

A list of equal blocks is an `nn.ModuleList`, by whose elements a model too large for one device is cut.

Shape legend: B batch, T time, C channels, V vocabulary.
"""
