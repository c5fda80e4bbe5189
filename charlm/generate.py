"""Text from a model, one character at a time."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from charlm.errors import InputError
from charlm.tokenizer import CharTokenizer


def generate(
    model: nn.Module,
    idx: Tensor,
    length: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next ids, (B,) int64, `length` times, so that text can be shown as it comes.

    The model sees the whole text so far if its `block_size` is None; otherwise its last block_size characters,
    where it has no `decode`. One that has both goes on from the newer half whenever block_size characters are full, so
    that a window is computed anew once in half a window and not for every character; each character is then
    predicted from block_size // 2 to block_size others, where a sliding window would give it block_size.

    Args:
        model: forward(idx) -> logits, with a `block_size`, and perhaps a `decode` (see `charlm.model`).
        idx: the prompt, (B, T) int64 with T >= 1, on the model's device.
        generator: the randomness, on the model's device; sampling takes nothing from the global one if given.
        temperature: divides the logits; 0 takes the most likely character.
        top_k: sample among the k most likely characters only.
        top_p: sample among the fewest characters whose probability reaches p ("nucleus", Holtzman 2020).
        use_cache: False computes all that is seen anew for each character, by `forward`: slower, and the same text
            under the same seed, but for what rounding may decide.

    Raises:
        ValueError: if the prompt is empty.
    """
    if idx.shape[1] == 0:
        raise ValueError("the prompt is empty: generation continues at least one character")
    was_training, decode = model.training, getattr(model, "decode", None) if use_cache else None
    most: int = model.block_size or idx.shape[1] + length  # type: ignore[assignment]
    kept = max(1, most // 2) if hasattr(model, "decode") else most
    seen = new = idx[:, -most:]  # (B, T)
    state: Any = None
    model.eval()
    try:
        for _ in range(length):
            # Entering inference mode takes as long as a step of a small model, so it is entered only if necessary.
            with nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode():
                if decode:
                    logits, state = decode(new, state)  # (B, V)
                else:
                    logits = model(seen)[:, -1]
                next_idx = sample(logits.float(), generator, temperature, top_k, top_p)  # (B,)
                new = next_idx[:, None]
                if most == 1 or (decode and model.block_size is None):  # earlier characters are not needed again
                    seen, state = new, None if most == 1 else state
                else:
                    seen = torch.cat((seen, new), dim=1)
                if seen.shape[1] > most:
                    seen = new = seen[:, -kept:]
                    state = None
            yield next_idx
    finally:
        model.train(was_training)


def sample(
    logits: Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One id per row of logits (B, V): (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)  # (B, V)
        p = ordered.softmax(-1)
        # On the CPU, because the sum on a GPU is not deterministic, and PyTorch may refuse it.
        before = p.cpu().cumsum(-1).to(p.device) - p  # probability of all likelier characters
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    # The smallest of exponential variables has the probability of its rate: torch.multinomial without its checks.
    race = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / race).argmax(-1)


def sample_text(
    model: nn.Module,
    tokenizer: CharTokenizer,
    length: int,
    prompt: str | None = None,
    seed: int = 1337,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[str]:
    """Yield the next character of each sample, `length` times: strings of `num_samples` characters.

    Args:
        prompt: what to continue; None starts as a new line does, or with the first character of the alphabet.

    Raises:
        InputError: if the prompt is empty or has a character that the model does not know.
    """
    if prompt is None:
        prompt = "\n" if "\n" in tokenizer.chars else tokenizer.chars[0]
    if not prompt:
        raise InputError("the prompt is empty: give at least one character, or no prompt at all")
    device = next(model.parameters()).device
    idx = tokenizer.encode(prompt).to(device).long().expand(num_samples, -1)  # (B, T)
    generator = torch.Generator(device).manual_seed(seed)
    chars = tokenizer.chars
    for next_idx in generate(model, idx, length, generator, temperature, top_k, top_p):
        yield "".join(chars[i] for i in next_idx.tolist())
