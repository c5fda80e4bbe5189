"""A final loss in plain words: where it lies, whether the run overfits, and what would probably help most."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from charlm.data.corpora import PUBLISHED
from charlm.errors import InputError
from charlm.files import open_regular
from charlm.run.results import LOSSES, read_validations

RISEN, FALLEN = 0.01, 0.005  # nats by which val must rise from its lowest, or fall between two looks, to be called so
LAST = 100  # steps whose losses are averaged
GAP = 0.05  # part of the val loss by which the loss of train may be lower without a word
NEAR = 0.01  # nats per character from the counted bigram that no table can improve on
USUAL = 0.1  # part of a text that is val
LARGER = {"n_layer", "n_embd", "n_hidden"}  # settings by which a model grows

NOTHING: Mapping[str, float] = {}
Validations = Sequence[tuple[int, float, float]]  # step, seconds of training, loss


def meaning(
    results: dict[str, Any], config: dict[str, Any], run_dir: Path, others: Mapping[str, float] = NOTHING
) -> list[str]:
    """Return a few plain lines about a finished run.

    Args:
        results: its final figures.
        config: its settings.
        others: losses on the same text, nats per character, by what reaches them, next to `references`.
    """
    lines, losses = [where(results, {**references(results, config), **others})], read_validations(run_dir)
    if losses and results["val/share"] == 1 and losses[-1][0] < results["steps"]:
        losses = [*losses, (results["steps"], results["train/seconds"], results["val/loss"])]
    if results["steps"]:
        kept = (run_dir / "checkpoints" / "best.ckpt").is_file()
        lines.append(overfitting(results, losses, kept) or what_next(results, losses, config, last_loss(run_dir)))
    return lines


def last_loss(run_dir: Path) -> float | None:
    """Return the mean loss of the last steps of a run, if its file can be read."""
    try:
        with open_regular(run_dir / LOSSES) as file:
            found = np.frombuffer(file.read(), "<f4")[-LAST:]
    except (OSError, ValueError, InputError):
        return None
    return float(found.mean()) if len(found) else None


def references(results: dict[str, Any], config: dict[str, Any]) -> dict[str, float]:
    """Losses on the val split of a run, nats per character, by what reaches them: counting, and what is published."""
    per_char = results["val/targets"] / results["val/characters"]  # baselines are per token
    counted = results["baselines"]["val"]
    known = {
        "guessing": counted["uniform"] * per_char,
        "counting characters": counted["unigram"] * per_char,
        "counting pairs": counted["bigram"] * per_char,
    }
    usual = config["data"].get("val_fraction") in (None, USUAL) and config["data"].get("fold") is None
    if usual:  # else it is not the text of the published
        nats = math.log(2) * results["val/bytes"] / results["val/characters"]
        known |= {one.name: one.bits_per_byte * nats for one in PUBLISHED.get(results["corpus"], ()) if one.comparable}
    return known


def where(results: dict[str, Any], known: Mapping[str, float]) -> str:
    """Say between which known losses the val loss lies."""
    loss = results["val/nats_per_char"]
    above = min((item for item in known.items() if item[1] >= loss), key=lambda item: item[1], default=None)
    below = max((item for item in known.items() if item[1] < loss), key=lambda item: item[1], default=None)
    figure = f"{loss:.4f} nats per character"
    if above is None:
        return f"{figure} is worse than guessing among all symbols ({known['guessing']:.4f})."
    if below is None:
        return f"{figure} is better than {above[0]} ({above[1]:.4f})."
    return f"{figure} lies between {above[0]} ({above[1]:.4f}) and {below[0]} ({below[1]:.4f})."


def overfitting(results: dict[str, Any], losses: Validations, kept: bool) -> str | None:
    """Say since when val has been rising, if it has.

    Args:
        kept: whether the checkpoint of its lowest is there.
    """
    step, _, lowest = min(losses, key=lambda one: one[2], default=(0, 0.0, math.inf))
    if not losses or losses[-1][2] - lowest <= RISEN or losses[-1][0] <= step:
        return None
    where = "checkpoints/best.ckpt has" if kept else "callbacks=[default,best] keeps"
    return (
        f"It overfits: val was lowest at step {step:,} ({lowest:.4f}) and has risen since. {where} that state; more "
        f"text, dropout or a smaller model would help."
    )


def what_next(results: dict[str, Any], losses: Validations, config: dict[str, Any], train_loss: float | None) -> str:
    """Say which of more steps, more text and a larger model would probably help most."""
    loss = results["val/loss"]
    if results["model"] == "bigram" and loss - results["baselines"]["val"]["bigram"] < NEAR:
        return "No table of pairs can do better: a model that sees more characters would, such as model=gpt."
    falling = len(losses) < 2 or losses[-2][2] - losses[-1][2] > FALLEN
    if train_loss is not None and loss - train_loss > GAP * loss and not falling:
        return "Train is much lower than val: more text would probably help most, or dropout."
    if falling:
        limit = {"steps": "trainer.max_steps", "tokens": "max_tokens", "time": "trainer.max_time"}
        setting = limit.get(results["stopped_by"], "trainer.max_steps")
        return f"Val was still falling: more steps would probably help most, a larger {setting}."
    grows = sorted(LARGER & config["model"].keys())
    how = f"a larger model.{grows[0]}" if grows else "model=gpt"
    return f"Val has stopped falling, and train is not far below: a larger model would probably help most, {how}."
