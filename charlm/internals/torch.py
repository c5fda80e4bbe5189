"""Private names of PyTorch, from 2.11 to 2.13."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def log_softmax_backward(gradient: Tensor, log_p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of logits from that of their log-softmax over the last dimension: the kernel of autograd.

    It makes a gradient without autograd bitwise equal to one with it; public operations add up in another order.
    """
    return torch._log_softmax_backward_data(gradient, log_p, -1, dtype)


def lerp_all(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move each tensor towards its end, in place and in one kernel."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def add_to_all(tensors: Sequence[Tensor], number: int) -> None:
    """Add a number to each tensor, in place and in one kernel."""
    torch._foreach_add_(list(tensors), number)


def fused_adamw(*tensors: list[Tensor], **settings: Any) -> None:
    """Update parameters by AdamW: the kernel of `torch.optim.AdamW(fused=True)`, without its checks at each step."""
    torch._fused_adamw_(*tensors, **settings)


def is_observed(tensor: Tensor) -> bool:
    """Return whether hooks look at the gradient of a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def mps_generator() -> torch.Generator:
    """Return the generator that random operations on an Apple GPU draw from."""
    return torch.mps._get_default_mps_generator()


def has_cpp_compiler() -> bool:
    """Return whether torch.compile finds the C++ compiler that it needs on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
