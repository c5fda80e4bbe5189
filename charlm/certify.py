"""Checks that the loss of a model is what it seems: of text that it has not seen, by probabilities that are such.

Each check is for a mistake that makes a loss too low, and that a loss alone does not show.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from charlm.data import CharDataModule
from charlm.data.chunks import IGNORE
from charlm.evaluate import token_losses
from charlm.model import device_of

SUMS = "probabilities sum to one"
CAUSAL = "future characters change nothing"
ORDER = "the order of windows changes nothing"
COUNTED = "what is counted is the train split"
TOTALS = "targets and bytes add up"
CACHE = "cached decoding equals the forward pass"
CHUNKS = 4  # windows that are looked at
TOLERANCE = 1e-3  # nats, and a part of a probability: rounding is a hundred times smaller
TOO_LARGE = 4096  # symbols of which all are tried


class Check(NamedTuple):
    """A check of a model; `failure` says in which way it failed."""

    name: str
    failure: str | None


@torch.inference_mode()
def certify(model: nn.Module, data: CharDataModule, split: str = "val") -> list[Check]:
    """Check a model, in evaluation mode, on a split of its text."""
    windows = data.windows(split, device_of(model))
    x, y = windows.batch(0)
    x, y = x[:CHUNKS], y[:CHUNKS].clamp_min(0)
    checks: dict[str, Callable[[], str | None]] = {
        SUMS: lambda: sums(model, x, data.vocab_size),
        CAUSAL: lambda: causal(model, x, y, data.vocab_size),
        ORDER: lambda: any_order(model, data, split),
        TOTALS: lambda: totals(data, split),
    }
    if hasattr(model, "text"):
        checks[COUNTED] = lambda: counted(model, data, x)
    if hasattr(model, "decode"):
        checks[CACHE] = lambda: decoding(model, x)
    return [Check(name, check()) for name, check in checks.items()]


def sums(model: nn.Module, x: Tensor, vocab_size: int) -> str | None:
    """The probabilities of all symbols, as the loss claims them, at a few positions."""
    positions = sorted({0, x.shape[1] // 2, x.shape[1] - 1})
    if vocab_size > TOO_LARGE:  # the softmax of logits sums to one, if the loss is that
        expected = torch.log_softmax(model(x).float(), -1)
        found = -token_losses(model, x, x)
        gap = float((expected.gather(-1, x[..., None])[..., 0] - found).abs().max())
        return f"a loss differs from its logits by {gap:.3g} nats" if gap > TOLERANCE else None
    total = torch.zeros(len(x), len(positions), device=x.device, dtype=torch.float64)
    for symbol in range(vocab_size):
        total += token_losses(model, x, torch.full_like(x, symbol))[:, positions].double().neg().exp()
    worst = float(total.flatten()[(total - 1).abs().argmax()])
    return f"they sum to {worst:.4f}" if abs(worst - 1) > TOLERANCE else None


def causal(model: nn.Module, x: Tensor, y: Tensor, vocab_size: int) -> str | None:
    """Losses up to a position, with other characters after it, among the inputs and among the targets."""
    before = token_losses(model, x, y)
    T = x.shape[1]
    for cut in sorted({1, T // 2, T - 1} - {0, T}):
        other_x, other_y = x.clone(), y.clone()
        # The input at `cut` is the target before it: predicting it must not depend on what it is.
        other_x[:, cut:] = (x[:, cut:] + 1 + torch.arange(T - cut, device=x.device)) % vocab_size
        other_y[:, cut:] = (y[:, cut:] + 1) % vocab_size
        gap = float((token_losses(model, other_x, other_y) - before)[:, :cut].abs().max())
        if not gap <= TOLERANCE:
            return f"they change the loss of a character before them by {gap:.3g} nats"
    return None


def any_order(model: nn.Module, data: CharDataModule, split: str) -> str | None:
    """Losses of the same windows, in the given order and backwards, in other batches."""
    windows = data.windows(split, device_of(model))
    x, y = (
        torch.cat(parts) for parts in zip(*(windows.batch(j) for j in range(min(2, windows.n_batches))), strict=True)
    )
    x, y = x[: 4 * CHUNKS], y[: 4 * CHUNKS]
    forwards = torch.cat([token_losses(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    backwards = token_losses(model, x.flip(0), y.flip(0)).flip(0)
    gap = float((forwards - backwards).abs().max())
    return f"it changes a loss by {gap:.3g} nats" if not gap <= TOLERANCE else None


def totals(data: CharDataModule, split: str) -> str | None:
    """Each target once, and the bytes of all tokens, against the text itself."""
    windows = data.windows(split)
    n = int(windows.counts().sum())
    if n != len(data.splits[split]) - 1:
        return f"{n:,} of {len(data.splits[split]) - 1:,} targets are scored"
    per_batch = [int((windows.batch(j)[1] != IGNORE).sum()) for j in (0, windows.n_batches - 1)]
    if min(per_batch) < 1:
        return "a batch scores nothing"
    lengths = torch.tensor([len(token) for token in data.tokenizer.tokens])
    there = sum(int(lengths[part.long()].sum()) for ids in data.splits.values() for part in ids.split(2**20))
    text = data.corpus.survey.bytes
    return f"tokens have {there:,} bytes, and the text {text:,}" if there != text else None


def counted(model: Any, data: CharDataModule, x: Tensor) -> str | None:
    """The text that a model has counted, and the counts that lie next to its checkpoint."""
    train = data.splits["train"]
    text = model.text.cpu()
    if len(text) != len(train) or not all(
        torch.equal(part.long(), other.long())
        for part, other in zip(text.split(2**20), train.split(2**20), strict=True)
    ):
        return f"it has counted {len(text):,} tokens that are not the {len(train):,} of the train split"
    stored = model(x)
    model.count(train)
    gap = float((model(x) - stored).abs().max())
    return f"counting again changes a logit by {gap:.3g}" if not gap <= TOLERANCE else None


def decoding(model: Any, x: Tensor) -> str | None:
    """Logits of the last position, in one pass and in pieces that go on from a state."""
    T = x.shape[1] if model.block_size is None else min(x.shape[1], model.block_size)
    whole, state, worst = model(x[:, :T]).float(), None, 0.0
    for start in range(0, T, 3):
        end = min(start + 3, T)
        logits, state = model.decode(x[:, start:end], state)
        worst = max(worst, float((logits.float() - whole[:, end - 1]).abs().max()))
    return f"a logit differs by {worst:.3g}" if not worst <= TOLERANCE else None
