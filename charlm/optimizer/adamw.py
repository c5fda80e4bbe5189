"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Len, Lt, doc
from torch import Tensor, nn

from charlm.internals.torch import add_to_all, fused_adamw

Beta = Annotated[float, Ge(0), Lt(1)]
Betas = Annotated[list[Beta], Len(2, 2), doc("two numbers of at least 0 and below 1, as [0.9,0.999]")]


def adamw(
    model: nn.Module,
    lr: Annotated[float, Gt(0)] = 1e-3,
    betas: Betas = [0.9, 0.999],  # noqa: B006
    eps: Annotated[float, Gt(0)] = 1e-8,
    weight_decay: Annotated[float, Ge(0)] = 0.01,
) -> "AdamW":
    """AdamW for every parameter. Matrices and embeddings decay; gains and biases do not.

    Args:
        model: the model to train.
        lr: learning rate at its peak; a Transformer needs about a tenth of a bigram's.
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the root of the averaged square, for numerical stability.
        weight_decay: decay of matrices and embeddings per step, as a factor of the learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return AdamW(decay_groups(parameters, weight_decay), lr=lr, betas=tuple(betas), eps=eps)


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups in which only matrices and embeddings decay."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW with its fused kernel, and little overhead per step.

    PyTorch looks up and sorts the parameters anew at each step, which takes a small model longer than the update.
    """

    # For each group: itself and its parameters, both averages and step counters, in the same order.
    kept: list[tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = []  # noqa: RUF012
    kept_from: Any = None  # the state they belong to; loading a checkpoint replaces it

    def __init__(self, params: Any, **settings: Any):
        super().__init__(params, **settings, fused=True)
        # Gradients of 16-mixed are unscaled before hooks and clipping see them, not by the kernel.
        self._step_supports_amp_scaling = False

    def step(self, closure: Any = None) -> Any:
        """Update every parameter: bit for bit what PyTorch's own does."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients: list[list[Any]] = [[p.grad for p in parameters] for _, parameters, *_ in self.kept]
        known = self.kept_from is self.state and len(self.kept) == len(self.param_groups)
        if not known or any(g is None for gs in gradients for g in gs):
            super().step()
            self.keep()
            return loss
        for (group, parameters, averages, squares, steps), grads in zip(self.kept, gradients, strict=True):
            add_to_all(steps, 1)
            beta1, beta2 = group["betas"]
            settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            fused_adamw(parameters, grads, averages, squares, [], steps, beta1=beta1, beta2=beta2, **settings)
        return loss

    # PyTorch would put its profiler's label and hooks around each step, which take as long as the kernel of a bigram.
    step.hooked = True  # type: ignore[attr-defined]

    def keep(self) -> None:
        """Cache the state tensors, once every parameter has its state and all have one kind."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.kept, self.kept_from = [], self.state
        if any(p not in self.state for p in parameters) or len({(p.device, p.dtype) for p in parameters}) > 1:
            return
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"]]
            parts = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            self.kept.append((group, group["params"], *parts))
