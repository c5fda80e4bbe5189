"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

from collections.abc import Iterable
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Len, Lt, doc

Beta = Annotated[float, Ge(0), Lt(1)]


def adamw(
    params: Iterable[torch.nn.Parameter],
    lr: Annotated[float, Gt(0)],
    betas: Annotated[list[Beta], Len(2, 2), doc("two numbers of at least 0 and below 1, as [0.9,0.999]")],
    eps: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)],
) -> torch.optim.AdamW:
    """PyTorch's AdamW with its fused kernel: one pass over the parameters instead of a dozen."""
    beta1, beta2 = betas
    return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True)
