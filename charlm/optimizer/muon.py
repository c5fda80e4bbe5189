"""Muon: momentum, made orthogonal, for the hidden matrices (Jordan et al. 2024); AdamW for the rest."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn
from torch.optim import Optimizer

from charlm.optimizer.adamw import AdamW, Beta, Betas, decay_groups


def muon(
    model: nn.Module,
    lr: Annotated[float, Gt(0)],
    adamw_lr: Annotated[float, Gt(0)],
    momentum: Beta,
    nesterov: bool,
    adjust_lr_fn: Literal["original", "match_rms_adamw"],
    betas: Betas,
    eps: Annotated[float, Gt(0)],
    weight_decay: Annotated[float, Ge(0)],
) -> Optimizer:
    """PyTorch's Muon for the hidden matrices, if the model has any, and AdamW for all other parameters, if any.

    Args:
        model: the model to train; its output layers must be called `head`.
        lr: learning rate of Muon at its peak.
        adamw_lr: learning rate of AdamW at its peak, for all that Muon does not train.
        momentum: momentum of Muon.
        nesterov: whether Muon's momentum is Nesterov's.
        adjust_lr_fn: how Muon's step depends on the shape of a matrix: original or match_rms_adamw. "original" scales
            its spectrum to lr; "match_rms_adamw" its entries to about those of AdamW at the same lr (Liu et al. 2025,
            section 2.2).
        betas: AdamW's decay rates of the averages of the gradient and of its square.
        eps: AdamW's term for numerical stability.
        weight_decay: decay of matrices and embeddings per step, as a factor of the learning rate.
    """
    hidden = hidden_matrices(model)
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    made: list[Optimizer] = []
    if hidden:
        settings = {"momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
        made.append(torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, **settings))  # type: ignore[arg-type]
    if rest:
        made.append(AdamW(decay_groups(rest, weight_decay), lr=adamw_lr, betas=tuple(betas), eps=eps))
    return made[0] if len(made) == 1 else Several(made)


class Several(Optimizer):
    """Several optimizers as one, because Lightning and schedules take one.

    It shares their groups and state, so a learning rate set here applies there.
    """

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = optimizers
        super().__init__(
            [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]], {}
        )
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Let each of them update its parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the hidden matrices: all except embeddings and output layers.

    Rows of an embedding are looked up one by one, and those of an output layer are used one by one: directions among
    them mean nothing, so that there is nothing to make orthogonal. A matrix that is both, tied, is an embedding's.
    """
    ends: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends += [module for name, module in model.named_modules() if name.rpartition(".")[2] == "head"]
    outside = {id(p) for module in ends for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in outside]
