"""Text from a model, token by token."""

import codecs
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from charlm.errors import InputError
from charlm.model import device_of
from charlm.tokenizer import Tokenizer

BYTES_OF_CHARACTER = 4  # that UTF-8 has at most
MOST_SYMBOLS_AT_ONCE = 1000  # symbols of a model whose probabilities are computed all at once
MULTITHREADED = 1e8  # weights times samples: with fewer, a step is too little work for several threads


class Step(NamedTuple):
    """One step of a generation, for each sample of a batch."""

    last_idx: Tensor  # (B,) int64: the token before
    logits: Tensor  # (B, V) float32, of the model: before temperature, top_k and top_p
    next_idx: Tensor  # (B,) int64: the token that was drawn


class Piece(NamedTuple):
    """A step and the text that it adds to each sample; no text within a character of several bytes."""

    texts: list[str]  # B of them
    step: Step


def use_threads(models: Iterable[nn.Module], num_samples: int = 1) -> None:
    """Let PyTorch compute with one thread if a step of each model is too little work for several."""
    if num_samples * max(sum(p.numel() for p in model.parameters()) for model in models) < MULTITHREADED:
        torch.set_num_threads(1)


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
    """Yield the next ids, (B,) int64, `length` times, so that text can be shown as it comes; see `steps`."""
    with closing(steps(model, idx, length, generator, temperature, top_k, top_p, use_cache)) as taken:
        for step in taken:
            yield step.next_idx


def steps(
    model: nn.Module,
    idx: Tensor,
    length: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
) -> Generator[Step, None, None]:
    """Generate `length` tokens per sample, and yield each step.

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
    last_idx = idx[:, -1]
    state: Any = None
    model.eval()
    try:
        if (
            decode
            and most == 1
            and temperature > 0
            and (V := int(model(seen[:1, -1:]).shape[-1])) <= MOST_SYMBOLS_AT_ONCE
        ):
            yield from steps_of_table(decode, last_idx, V, length, generator, temperature, top_k, top_p)
            return
        for _ in range(length):
            # Entering inference mode takes as long as a step of a small model, so it is entered only if necessary.
            with nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode():
                if decode:
                    logits, state = decode(new, state)  # (B, V)
                else:
                    logits = model(seen)[:, -1]
                logits = logits.float()
                next_idx = sample(logits, generator, temperature, top_k, top_p)  # (B,)
                new = next_idx[:, None]
                if most == 1 or (decode and model.block_size is None):  # earlier characters are not needed again
                    seen, state = new, None if most == 1 else state
                else:
                    seen = torch.cat((seen, new), dim=1)
                if seen.shape[1] > most:
                    seen = new = seen[:, -kept:]
                    state = None
            yield Step(last_idx, logits, next_idx)
            last_idx = next_idx
    finally:
        model.train(was_training)


def steps_of_table(
    decode: Callable[..., tuple[Tensor, Any]],
    last_idx: Tensor,
    V: int,
    length: int,
    generator: torch.Generator | None,
    *settings: Any,
) -> Iterator[Step]:
    """Yield the steps of a model that sees one token: its probabilities are a table, which is computed once."""
    with torch.inference_mode():
        logits = decode(torch.arange(V, device=last_idx.device)[:, None], None)[0].float()  # (V, V)
        p = probabilities(logits, *settings)
    for _ in range(length):
        next_idx = draw(p.index_select(0, last_idx), generator)
        yield Step(last_idx, logits.index_select(0, last_idx), next_idx)
        last_idx = next_idx


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
    return draw(probabilities(logits, temperature, top_k, top_p), generator)


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities by which `sample` draws, for a temperature above 0: logits (B, V) -> (B, V)."""
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
    return logits.softmax(-1)


def draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One id per row of probabilities (B, V): (B,) int64."""
    # The smallest of exponential variables has the probability of its rate: torch.multinomial without its checks.
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def sample_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    length: int,
    prompt: str | None = None,
    seed: int = 1337,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[list[str]]:
    """Yield what follows in each of `num_samples` samples, until each has `length` characters; see `sample_pieces`."""
    pieces = sample_pieces(model, tokenizer, length, prompt, seed, num_samples, temperature, top_k, top_p)
    with closing(pieces):
        for piece in pieces:
            yield piece.texts


def sample_pieces(
    model: nn.Module,
    tokenizer: Tokenizer,
    length: int,
    prompt: str | None = None,
    seed: int = 1337,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Generator[Piece, None, None]:
    """Generate `num_samples` samples until each has `length` characters, and yield each step with its text.

    Bytes that are not UTF-8, which a model of bytes may produce, appear as U+FFFD.

    Args:
        prompt: what to continue; None starts as a new line does, or with the first token of the vocabulary.

    Raises:
        InputError: if the prompt is empty or has a character that the model does not know.
    """
    tokens = tokenizer.tokens
    if prompt == "":
        raise InputError("the prompt is empty: give at least one character, or no prompt at all")
    device = device_of(model)
    first = [tokens.index(b"\n") if b"\n" in tokens else 0]
    start = torch.tensor(first) if prompt is None else tokenizer.encode(prompt)
    idx = start.to(device).long().expand(num_samples, -1)  # (B, T)
    generator = torch.Generator(device).manual_seed(seed)
    texts = [text_of(token) for token in tokens]
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    left = [length] * num_samples
    partial = None in texts
    most = length * BYTES_OF_CHARACTER if partial else length
    with closing(steps(model, idx, most, generator, temperature, top_k, top_p)) as taken:
        for step in taken:
            found = []
            for b, i in enumerate(step.next_idx.tolist()):
                whole = decoders[b].decode(tokens[i]) if partial else str(texts[i])
                found.append(whole[: left[b]])
                left[b] -= len(found[-1])
            yield Piece(found, step)
            if not any(left):
                return


def text_of(token: bytes) -> str | None:
    """Return the text of a token; None if it is not of whole characters."""
    try:
        return token.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None


def continuation(
    model: nn.Module, tokenizer: Tokenizer, length: int, prompt: str | None = None, **settings: Any
) -> str:
    """Return what follows a prompt, `length` characters, as `sample_text` yields it.

    Args:
        settings: other arguments of `sample_text`, for one sample.
    """
    return "".join(new for [new] in sample_text(model, tokenizer, length, prompt, **settings))
