"""One generation: its settings, and the characters with their surprise as they come."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple, get_type_hints

from annotated_types import Ge, Gt, Le

from charlm.errors import InputError, printable
from charlm.generate import Step, sample_pieces
from charlm.play.copies import SHORTEST, Copies
from charlm.play.player import Player
from charlm.schema import check_value

LONGEST_PROMPT = 20_000  # characters
LONGEST = 5_000  # characters that one request generates at most
LIKELIEST, LIKELIEST_COUNTED = 8, 4  # tokens that are shown of the model, and of the counted bigram
AT_ONCE = 0.01  # seconds after which what was generated is sent
CONTEXT = 2 * SHORTEST  # characters of a prompt in which a copied span may begin
LAYOUT = "\n\t"


@dataclass(frozen=True)
class Settings:
    """The settings of a request: names and defaults of `charlm generate`, with limits on lengths.

    Args:
        model: the number of the checkpoint, as typed in the command.
        prompt: what to continue; None starts as a new line does.
    """

    model: Annotated[int, Ge(0)] = 0
    prompt: str | None = None
    length: Annotated[int, Ge(1), Le(LONGEST)] = 500
    temperature: Annotated[float, Ge(0), Le(100)] = 1.0
    top_k: Annotated[int, Ge(1), Le(2**31)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 1337

    @classmethod
    def read(cls, raw: bytes) -> "Settings":
        """Read them from JSON.

        Raises:
            InputError: if it is no JSON, or names an unknown setting, or one has a value that is not allowed.
        """
        try:
            given = json.loads(raw)
        except (ValueError, RecursionError):
            raise InputError("the request is no JSON: send an object with settings, such as {}") from None
        if not isinstance(given, dict):
            raise InputError("the request is no JSON object: send one with settings, such as {}")
        hints, known = get_type_hints(cls, include_extras=True), [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in hints:
                raise InputError(f"{printable(name, 50)} is no setting: choose among {', '.join(known)}")
            try:
                check_value(name, value, hints[name])
            except InputError as error:
                raise InputError(
                    str(error) if len(repr(value)) < 100 else f"{name} has a value that is too long"
                ) from None
        prompt = given.get("prompt") or ""
        if len(prompt) > LONGEST_PROMPT:
            raise InputError(f"the prompt has {len(prompt):,} characters: give at most {LONGEST_PROMPT:,}")
        return cls(**given)


class Shown(NamedTuple):
    """A token that may come next.

    Args:
        label: its text.
        p: its probability by the model.
        counted: that by the counted bigram; None where nothing was counted.
    """

    label: str
    p: float
    counted: float | None


def characters(player: Player, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield each character: its text, surprise, likeliest alternatives, and the length of the copy that ends there.

    Surprise and probabilities are those of the model itself, before temperature, top-k and top-p. A character of
    several tokens comes once, with the bits of them all, and the probabilities at its last one.

    Raises:
        InputError: if the prompt is empty or has a character that the model does not know.
    """
    model, tokenizer, prompt = player.loaded.model, player.loaded.tokenizer, settings.prompt
    sampling = (settings.temperature, settings.top_k, settings.top_p)
    copies = Copies(player.text.spans, (prompt or "")[-CONTEXT:]) if player.text else None
    pending = 0.0  # bits of the tokens of a character that is not complete
    for piece in sample_pieces(model, tokenizer, settings.length, prompt, settings.seed, 1, *sampling):
        bits, likeliest = look(player, piece.step)
        pending += bits
        [text] = piece.texts
        if not text:
            continue
        shown = printable(text, keep=LAYOUT)
        yield {
            "text": text,
            "bits": round(pending, 3) if math.isfinite(pending) else None,
            "next": likeliest,
            "copied": copies.add(text) if copies else 0,
        } | ({"shown": shown} if shown != text else {})
        pending = 0.0


def look(player: Player, step: Step) -> tuple[float, list[Shown]]:
    """Return the surprise at the token of a step, in bits, and the likeliest tokens at its place, with this one."""
    log_p = step.logits[0].log_softmax(-1).cpu()  # (V,)
    drawn, counted = int(step.next_idx[0]), player.following(int(step.last_idx[0]))
    chosen = {drawn, *log_p.topk(min(LIKELIEST, len(log_p))).indices.tolist()}
    if counted is not None:
        often = counted.topk(min(LIKELIEST_COUNTED, len(counted)))
        chosen |= {i for i, p in zip(often.indices.tolist(), often.values.tolist(), strict=True) if p > 0}
    ids = sorted(chosen)
    p = log_p[ids].exp().nan_to_num(0.0).tolist()
    q = [None] * len(ids) if counted is None else counted[ids].tolist()
    rows = [
        Shown(player.labels[i], round(model, 5), None if bigram is None else round(bigram, 5))
        for i, model, bigram in zip(ids, p, q, strict=True)
    ]
    return -float(log_p[drawn]) / math.log(2), sorted(rows, key=lambda row: -row.p)


class Generation:
    """A generation that goes on whenever `more` is called, by one thread at a time."""

    def __init__(self, player: Player, settings: Settings):
        self.characters = characters(player, settings)
        self.begun = self.left = False

    def more(self) -> list[Mapping[str, Any]]:
        """Generate for a short while and return the characters: the first one alone; none at the end."""
        until = time.perf_counter() + AT_ONCE * self.begun
        self.begun = True
        found: list[Mapping[str, Any]] = []
        while not self.left and (not found or time.perf_counter() < until):
            character = next(self.characters, None)
            if character is None:
                break
            found.append(character)
        return found

    def leave(self) -> None:
        """End it, as nobody reads it any more; a thread that works on it stops after its step."""
        self.left = True
