"""GPT: a Transformer that sees the past only, as in GPT-2.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): learned positions, LayerNorm before each
part of a block, GELU, and one matrix that both embeds the characters and scores them. The same function of the same
parameters as nanoGPT (Karpathy, 2023).
"""

import math
from typing import Annotated, Literal, NamedTuple, cast

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from charlm.model import keeps_arguments


class Cache(NamedTuple):
    """State of `decode`: the key-value cache, and the weights of the blocks, looked up once."""

    kv: Tensor  # keys and values (2, n_layer, B, nh, block_size, hs); the first `length` positions are filled
    length: int
    parts: list[list[tuple[Tensor, Tensor | None]]]  # per block: weight and bias of each module


class Attention(nn.Module):
    """Each position gathers from those up to itself; nh heads of hs = C / nh channels."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.proj = nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, nh, T, hs) each
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return F.dropout(self.proj(x), self.dropout, self.training)


class FeedForward(nn.Module):
    """Each position by itself: four times wider, and back."""

    def __init__(self, n_embd: int, dropout: float, bias: bool, approximate: str):
        super().__init__()
        self.dropout, self.approximate = dropout, approximate  # of GELU, as F.gelu takes it
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc(x), approximate=self.approximate)  # (B, T, 4C)
        return F.dropout(self.proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool, approximate: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd, bias=bias)
        self.attention = Attention(n_embd, n_head, dropout, bias)
        self.norm2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = FeedForward(n_embd, dropout, bias, approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each module, in the order in which `forward` comes to them."""
        modules = (self.norm1, self.attention.qkv, self.attention.proj, self.norm2, self.mlp.fc, self.mlp.proj)
        return [(module.weight, module.bias) for module in modules]


def gelu_of_few(x: Tensor, approximate: str) -> Tensor:
    """F.gelu, on a transposed view: on CPUs, what is contiguous goes to oneDNN, which starts slower than this ends."""
    return F.gelu(x.view(2, -1).t(), approximate=approximate).t().reshape(x.shape)


def add_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + F.linear(y, weight, bias), all (B * T, C), in one operation: x takes the place of the bias."""
    return F.linear(y, weight, x if bias is None else x + bias)


@keeps_arguments
class GPT(nn.Module):
    """
    Args:
        vocab_size: V, the number of symbols.
        block_size: longest context in characters: the number of positions.
        n_layer: number of Transformer blocks.
        n_head: attention heads per block.
        n_embd: C, width of the embedding: a multiple of n_head.
        dropout: probability of dropout in the embedding, attention and residual branches.
        activation: gelu (Hendrycks and Gimpel 2016), or gelu_tanh, their approximation of it, which GPT-2 has.
        bias: whether linear layers and LayerNorms have biases; without, as in nanoGPT, it is faster and no worse.
        checkpointing: recompute each block in the backward pass: less memory, a third more time, the same bits.

    Raises:
        ValueError: if n_embd is not a multiple of n_head.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: Annotated[int, Ge(1)],
        n_layer: Annotated[int, Ge(1)],
        n_head: Annotated[int, Ge(1)],
        n_embd: Annotated[int, Ge(1)],
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        bias: bool = False,
        checkpointing: bool = False,
        activation: Literal["gelu", "gelu_tanh"] = "gelu",
    ):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(
                f"n_embd={n_embd} cannot be shared out to n_head={n_head} heads: "
                f"choose a multiple of {n_head} as n_embd, or another n_head"
            )
        self.block_size, self.dropout, self.heads = block_size, dropout, (n_head, n_embd // n_head)
        self.checkpointing, self.approximate = checkpointing, "tanh" if activation == "gelu_tanh" else "none"
        self.token_embedding = nn.Embedding(vocab_size, n_embd)  # also scores, as the last step
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, bias, self.approximate) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=bias)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # 2 * n_layer parts add to what passes through; scaled so, its variance does not grow with them.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 with T of at most block_size -> logits (B, T, V)."""
        x = F.dropout(self.embed(idx, 0), self.dropout, self.training)  # (B, T, C)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return F.linear(self.norm(x), self.token_embedding.weight)  # (B, T, V)

    @torch.no_grad()
    def decode(self, idx: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        """idx (B, T) int64 -> logits (B, V) of its last position; the state is filled in place.

        Computes the blocks without calling their modules, since these calls double the time of a single character.
        """
        (B, T), (nh, hs) = idx.shape, self.heads
        if state is None:
            kv = self.position_embedding.weight.new_empty(2, len(self.blocks), B, nh, self.block_size, hs)
            state = Cache(kv, 0, [cast(Block, block).parts() for block in self.blocks])
        kv, start, end = state.kv, state.length, state.length + T
        x = self.embed(idx, start).flatten(0, 1)  # (B * T, C)
        mask = x.new_ones(T, end, dtype=torch.bool).tril(start) if start and T > 1 else None
        # All layers: slots of new keys and values, (2, B, nh, T, hs), and all of them, (B, nh, end, hs).
        new, (keys, values) = kv[..., start:end, :].unbind(1), (part.unbind() for part in kv[..., :end, :])
        for (norm1, qkv, proj, norm2, fc, out), new_kv, k, v in zip(state.parts, new, keys, values, strict=True):
            y = F.layer_norm(x, (nh * hs,), *norm1)
            y = F.linear(y, *qkv).view(B, T, 3, nh, hs).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
            new_kv.copy_(y[1:])
            y = F.scaled_dot_product_attention(y[0], k, v, mask, is_causal=T > 1 and not start)
            x = add_linear(x, y.transpose(1, 2).reshape(x.shape), *proj)
            y = F.layer_norm(x, (nh * hs,), *norm2)
            x = add_linear(x, gelu_of_few(F.linear(y, *fc), self.approximate), *out)
        logits = F.linear(self.norm(x[T - 1 :: T]), self.token_embedding.weight)  # (B, V)
        return logits, Cache(kv, end, state.parts)

    def embed(self, idx: Tensor, start: int) -> Tensor:
        """idx (B, T), whose first token has position `start` -> (B, T, C)."""
        end = start + idx.shape[1]
        if end > self.block_size:
            raise ValueError(
                f"{end} characters are more than the {self.block_size} positions of this model: "
                f"give it the last {self.block_size}, or choose a larger block_size"
            )
        return self.token_embedding(idx) + self.position_embedding.weight[start:end]
