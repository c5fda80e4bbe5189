"""Models: idx (B, T) in, logits (B, T, V) out. Plain torch: no Lightning, no Hydra, no text.

A model is an `nn.Module` with `forward(idx) -> logits` and `block_size`, the characters it can look back over: a
number, or None if it looks back over the whole text. `forward` raises ValueError for an input that is too long.

A model may also have `decode(idx (B, T), state) -> (logits (B, V) of the last position, state)`, for generation: it
goes on after what `state` has seen, None at the beginning, without computing that again. It is equal to `forward`. A
state is used up when it is passed on; no gradients flow through it; with a `block_size`, at most that many characters
fit in.

Where there is a shorter way to a loss than through logits, it has `loss(idx, targets) -> (B, T)`: the loss of each
target in nats, as cross entropy of `forward` gives it, and 0 where a target is negative and does not count.

One that counts has `count(ids, report)`, which is given the training split, (N,), before the first step, and shows its
progress with `report(done, total)`; `text`, a buffer with
what it has counted; `memory_to_count(n, **arguments) -> bytes`, which tells in advance how much memory that takes; and
`counts() -> tensors` and `use_counts(tensors)`, so that nobody counts the same text twice. One that only
counts has `closed_form = True`, and takes no steps.

Its constructor's arguments are plain numbers and words, and `@keeps_arguments` remembers them: by its name and these a
checkpoint tells which model its weights belong to.

A list of equal blocks is an `nn.ModuleList`, by whose elements a model too large for one device is cut.

Shape legend: B batch, T time, C channels, V vocabulary.
"""

import inspect
from functools import wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Class = TypeVar("Class", bound=type[nn.Module])


def keeps_arguments(model: Class) -> Class:
    """Decorate a model so that it keeps its constructor's arguments, and the defaults of others, as `arguments`."""
    init: Any = model.__init__
    signature = inspect.signature(init)

    @wraps(init)
    def init_and_keep(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        self.arguments = {name: value for name, value in given.arguments.items() if value is not self}

    setattr(model, "__init__", init_and_keep)  # noqa: B010
    return model


def takes_no_steps(model: nn.Module) -> bool:
    """Return whether a model is ready once it has counted."""
    return getattr(model, "closed_form", False)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights, or of what it has counted."""
    return next(chain(model.parameters(), model.buffers())).device


def multiplications(model: nn.Module, tokens: int) -> int:
    """Return the multiplications of a forward pass on `tokens` tokens, roughly.

    10^8 take about 10 ms on a CPU, and the backward pass takes twice as long.
    """
    return max(1, sum(p.numel() for p in model.parameters()) * tokens)


def flops_per_token(model: nn.Module, tokens: int) -> float | None:
    """Return the floating-point operations of training per token, counted in one forward and one backward pass.

    PyTorch counts 2 for each multiplication of a product of matrices. The passes run on the meta device, which computes
    shapes only, because there attention and recurrent layers are made of products: fused kernels of a CPU would not be
    counted. Attention counts all pairs of positions, masked ones too, as in Hoffmann et al. (2022), appendix F. Not
    counted: elementwise operations, the optimizer, and what checkpointing computes again.

    Args:
        model: the model; it stays as it is.
        tokens: length of a chunk, in tokens.

    Returns:
        None if the model has no weights to train, or cannot run on the meta device because it reads values of tensors.
    """

    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)

    if not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    tensors = {name: on_meta(tensor) for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    idx = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    training = model.training
    model.eval()  # without dropout and checkpointing
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            logits = torch.func.functional_call(model, tensors, (idx,))
            F.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
    except (NotImplementedError, RuntimeError):
        return None
    finally:
        model.train(training)
    return counter.get_total_flops() / tokens
