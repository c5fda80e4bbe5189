"""GPTs of several runs as one batched model: `charlm.model.gpt` with an axis of runs in front.

A small model leaves most of a GPU idle, and most of its step is the launch of kernels; here one kernel serves all
runs. Products of several matrices add up in another order than those of one, so results are equal within rounding.

Shape legend: R runs, B chunks in a batch, T = block_size, C = n_embd, nh heads of hs channels, V symbols.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.evaluate import in_single, mean_loss
from charlm.internals.torch import is_observed
from charlm.model.gpt import GPT
from charlm.module import LanguageModel


class StackedGPT:
    """The forward pass of several GPTs.

    Args:
        model: one of the GPTs, whose shape all have.
        weights: those of all GPTs, stacked by parameter name: (R, ...) each.
    """

    def __init__(self, model: GPT, weights: Mapping[str, Tensor]):
        self.weights, self.n_layer, self.heads = weights, len(model.blocks), model.heads
        self.approximate = model.approximate
        tokens = weights["token_embedding.weight"]  # (R, V, C)
        R, V, _ = tokens.shape
        self.first_row = torch.arange(R, device=tokens.device)[:, None, None] * V

    def __call__(self, idx: Tensor) -> Tensor:
        """idx (R, B, T) int64 -> logits (R, B, T, V)."""
        R, B, T = idx.shape
        nh, hs = self.heads
        tokens, positions = self.weights["token_embedding.weight"], self.weights["position_embedding.weight"]
        x = F.embedding(idx + self.first_row, tokens.flatten(0, 1)) + positions[:, None, :T]
        x = x.flatten(1, 2)  # (R, B * T, C)
        for i in range(self.n_layer):
            block = f"blocks.{i}"
            qkv = self.linear(f"{block}.attention.qkv", self.norm(f"{block}.norm1", x)).view(R * B, T, 3, nh, hs)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (R * B, nh, T, hs) each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
            x = x + self.linear(f"{block}.attention.proj", y)
            y = self.linear(f"{block}.mlp.fc", self.norm(f"{block}.norm2", x))
            x = x + self.linear(f"{block}.mlp.proj", F.gelu(y, approximate=self.approximate))
        return torch.bmm(self.norm("norm", x), tokens.mT).view(R, B, T, -1)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (R, N, in) -> (R, N, out), by the matrices (R, out, in) and perhaps biases of one module."""
        weight, bias = self.weights[f"{name}.weight"].mT, self.weights.get(f"{name}.bias")
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """x (R, N, C) -> (R, N, C), by the gains (R, C) and perhaps biases of one LayerNorm."""
        bias = self.weights.get(f"{name}.bias")
        x = F.layer_norm(x, x.shape[-1:]) * self.weights[f"{name}.weight"][:, None]
        return x if bias is None else x + bias[:, None]


class StackedGradient:
    """Computes the mean losses of the batches of all runs and the gradients of all weights.

    Args:
        trainer: one run's, with the precision and the limit of the gradient norm that all runs have.
        module: the same run's.
        weights: those of all runs, stacked by parameter name: (R, ...) each.
    """

    def __init__(self, trainer: Any, module: LanguageModel, weights: Mapping[str, Tensor]):
        assert isinstance(module.model, GPT)
        self.precision, self.largest_norm = trainer.precision_plugin, trainer.gradient_clip_val
        # Leaves of their own, which share the memory of the weights.
        self.leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.model = StackedGPT(module.model, self.leaves)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """x and y (R, B, T) -> gradients in the order of the weights, (R, ...) each, and losses (R,)."""
        with torch.enable_grad():
            with self.precision.train_step_context():
                logits = in_single(self.model(x))  # (R, B, T, V)
                nll = F.cross_entropy(logits.flatten(0, 2), y.flatten(), reduction="none")
                losses = nll.view(len(x), -1).mean(1)
            # The loss of one run does not depend on the weights of another: the gradient of the sum has all of them.
            found = torch.autograd.grad(losses.sum(), [*self.leaves.values()])
        gradients = [gradient.contiguous() for gradient in found]  # as the fused kernel of AdamW takes for granted
        if self.largest_norm is not None:
            clip(gradients, self.largest_norm)
        return gradients, losses.detach()


def clip(gradients: Sequence[Tensor], largest_norm: float) -> None:
    """Scale the gradients of each run, (R, ...) each, as `torch.nn.utils.clip_grad_norm_` does those of one."""
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients])
    factors = (largest_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1)  # (R,)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def stacks(trainer: Any, module: LanguageModel) -> bool:
    """Return whether a run trains a plain GPT, in a way that a stacked one repeats."""
    model = module.model
    if type(model) is not GPT or model.dropout or model.checkpointing or module.mean_loss is not mean_loss:
        return False
    plain = all(
        type(p) is nn.Parameter and p.dtype == torch.float32 and p.requires_grad and not is_observed(p)
        for p in model.parameters()
    )
    simple = trainer.precision in ("32-true", "bf16-mixed") and trainer.accumulate_grad_batches == 1
    by_norm = trainer.gradient_clip_val is None or trainer.gradient_clip_algorithm in (None, "norm")
    return plain and simple and by_norm and not torch.is_anomaly_enabled()
