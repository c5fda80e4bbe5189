"""Transformer++: the Transformer with what the years since GPT-2 have brought.

The name is from Gu and Dao, "Mamba" (2023), the recipe from Touvron et al., "LLaMA" (2023): rotary positions (Su et
al., 2021), RMSNorm (Zhang and Sennrich, 2019), gated units (Shazeer, 2020), no biases. From others: queries and keys of
equal length (Henry et al., 2020), squared ReLU (So et al., 2021), and blocks that begin as the identity (as in ReZero,
Bachlechner et al., 2020).
"""

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
    parts: list[list[Tensor]]  # per block: its parameters


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension. It learns no gain: the linear map that follows can hold one."""
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of x (..., T, hs) with channel i + hs/2 by the angle of its position; cos, sin (T, hs/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def activate(x: Tensor, mlp: Literal["relu2", "swiglu"]) -> Tensor:
    """Squared ReLU; or SwiGLU, where one half of the channels gates the other."""
    if mlp == "relu2":
        return F.relu(x).square()
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


class Attention(nn.Module):
    """Each position gathers from those up to itself; nh heads of hs = C / nh channels."""

    def __init__(self, n_embd: int, n_head: int, dropout: float):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        # Queries and keys have fixed length, so only this scale can sharpen the attention of a head.
        self.qk_scale = nn.Parameter(torch.ones(n_head, 1, 1))
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C) at the positions of cos and sin (T, hs/2) -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k = rotate(norm(qkv[:2]), cos, sin).unbind()  # (B, nh, T, hs) each
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q * self.qk_scale, k, qkv[2], dropout_p=dropout, is_causal=True)
        x = x.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return F.dropout(self.proj(x), self.dropout, self.training)


class FeedForward(nn.Module):
    """The MLP of each position. SwiGLU has three matrices instead of two, so it is 2/3 as wide."""

    def __init__(self, n_embd: int, dropout: float, mlp: Literal["relu2", "swiglu"]):
        super().__init__()
        self.mlp, self.dropout = mlp, dropout
        # 8/3 C to the nearest multiple of 8, which matrix units like.
        hidden = 4 * n_embd if mlp == "relu2" else max(8, round(n_embd / 3) * 8)
        self.fc = nn.Linear(n_embd, hidden if mlp == "relu2" else 2 * hidden, bias=False)
        self.proj = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = activate(self.fc(x), self.mlp)  # (B, T, hidden)
        return F.dropout(self.proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream; both add zero at initialization."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, mlp: Literal["relu2", "swiglu"]):
        super().__init__()
        self.attention = Attention(n_embd, n_head, dropout)
        self.mlp = FeedForward(n_embd, dropout, mlp)
        nn.init.zeros_(self.attention.proj.weight)
        nn.init.zeros_(self.mlp.proj.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(norm(x), cos, sin)
        return x + self.mlp(norm(x))

    def parts(self) -> list[Tensor]:
        """Return the parameters in the order in which `forward` uses them."""
        attention, mlp = self.attention, self.mlp
        return [attention.qkv.weight, attention.qk_scale, attention.proj.weight, mlp.fc.weight, mlp.proj.weight]


@keeps_arguments
class TransformerPP(nn.Module):
    """Its head begins at zero and is not tied to the embedding, so that the first loss is log V exactly.

    Tied, each character would begin by predicting itself, since nothing but itself passes through the blocks.

    Args:
        vocab_size: V, the number of symbols.
        block_size: longest context in characters: the number of positions.
        n_layer: number of Transformer blocks.
        n_head: attention heads per block.
        n_embd: C, width of the embedding: an even multiple of n_head.
        mlp: feed-forward layer: relu2 (squared ReLU) or swiglu, with as many parameters.
        dropout: probability of dropout in the embedding, attention and residual branches.
        checkpointing: recompute each block in the backward pass: less memory, a third more time, the same bits.

    Raises:
        ValueError: if n_embd is not an even multiple of n_head.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: Annotated[int, Ge(1)],
        n_layer: Annotated[int, Ge(1)],
        n_head: Annotated[int, Ge(1)],
        n_embd: Annotated[int, Ge(1)],
        mlp: Literal["relu2", "swiglu"] = "relu2",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        if n_embd % (2 * n_head):
            raise ValueError(
                f"n_embd={n_embd} cannot be shared out to n_head={n_head} heads of pairs of channels: "
                f"choose a multiple of {2 * n_head} as n_embd, or another n_head"
            )
        self.block_size, self.dropout, self.mlp, self.checkpointing = block_size, dropout, mlp, checkpointing
        self.heads = n_head, n_embd // n_head
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, mlp) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        hs = n_embd // n_head
        speed = 10_000.0 ** (-torch.arange(0, hs, 2) / hs)  # radians per position, as in the first Transformer
        angle = torch.outer(torch.arange(block_size), speed)  # (block_size, hs/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 with T of at most block_size -> logits (B, T, V)."""
        return self.head(self.trunk(*self.embed(idx, 0)))  # (B, T, V)

    def trunk(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), cos and sin (T, hs/2), as `embed` makes them -> (B, T, C), as the head takes it."""
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return norm(x)

    @torch.no_grad()
    def decode(self, idx: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        """idx (B, T) int64 -> logits (B, V) of its last position; the state is filled in place."""
        x, state = self.decode_trunk(*self.embed(idx, state.length if state else 0), state)
        return self.head(x), state

    def decode_trunk(self, x: Tensor, cos: Tensor, sin: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        """As `trunk`, after what `state` has seen, for the last position only: (B, C).

        Computes the blocks without calling their modules, since these calls double the time of a single character.
        """
        (B, T, _), (nh, hs) = x.shape, self.heads
        if state is None:
            kv = self.head.weight.new_empty(2, len(self.blocks), B, nh, self.block_size, hs)
            state = Cache(kv, 0, [cast(Block, block).parts() for block in self.blocks])
        kv, start, end = state.kv, state.length, state.length + T
        x = x.flatten(0, 1)  # (B * T, C)
        mask = x.new_ones(T, end, dtype=torch.bool).tril(start) if start and T > 1 else None
        # All layers: slots of new keys and values, (B, nh, T, hs), and all of them, (B, nh, end, hs).
        (new_keys, new_values), (keys, values) = kv[..., start:end, :].unbind(), kv[..., :end, :].unbind()
        layers = zip(state.parts, new_keys, new_values, keys, values, strict=True)
        for (qkv, qk_scale, proj, fc, out), new_k, new_v, k, v in layers:
            y = F.linear(norm(x), qkv).view(B, T, 3, nh, hs).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
            turned = rotate(norm(y[:2]), cos, sin)  # (2, B, nh, T, hs)
            new_k.copy_(turned[1])
            new_v.copy_(y[2])
            y = F.scaled_dot_product_attention(turned[0] * qk_scale, k, v, mask, is_causal=T > 1 and not start)
            x = F.linear(y.transpose(1, 2).reshape(x.shape), proj, x)  # in one operation with the sum
            x = F.linear(activate(F.linear(norm(x), fc), self.mlp), out, x)
        return norm(x[T - 1 :: T]), Cache(kv, end, state.parts)

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """idx (B, T), whose first token has position `start` -> x (B, T, C), cos and sin (T, hs/2)."""
        end = start + idx.shape[1]
        if end > self.block_size:
            raise ValueError(
                f"{end} characters are more than the {self.block_size} positions of this model: "
                f"give it the last {self.block_size}, or choose a larger block_size"
            )
        return self.token_embedding(idx), self.cos[start:end], self.sin[start:end]
