"""Runs, rows of sweeps and checkpoints -> systems to compare: what differs, and their losses on one text."""

import math
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from charlm import checkpoint
from charlm.data import CharDataModule
from charlm.data.chunks import IGNORE
from charlm.data.compressors import bytes_per_character, compressed
from charlm.data.corpora import corpus_of
from charlm.errors import InputError
from charlm.evaluate import Blocks, evaluate, token_losses
from charlm.model import device_of
from charlm.run.overrides import typed
from charlm.run.record import RUN_JSON
from charlm.schema import check_node
from charlm.study.comparison import System, over_folds
from charlm.study.notes import Note, budget, environment
from charlm.study.runs import FOLD, Run, parsed, read_runs
from charlm.study.study import Study, study_of
from charlm.tokenizer import ByteTokenizer

ROW = "@"  # before the settings of a row: SWEEP@optimizer.lr=0.01,model=gpt


@dataclass(frozen=True)
class Chosen:
    """What a command names: runs that differ in their seed only, or also in the document that they hold out; or one
    checkpoint.

    Args:
        name: as it was typed.
        checkpoints: what to load.
        runs: what is known of them; empty for a checkpoint that lies in no run.
    """

    name: str
    checkpoints: list[Path]
    runs: list[Run]


def choose(name: str) -> Chosen:
    """Find what a name stands for: a checkpoint, a folder with one or more runs, or a row of a sweep.

    Raises:
        InputError: if it stands for nothing, or for runs that differ in more than their seed.
    """
    folder, _, row = name.partition(ROW) if not os.path.exists(name) else (name, "", "")
    if os.path.isfile(folder):
        return Chosen(name, [Path(folder)], [])
    runs, damaged = read_runs([Path(folder)])
    runs = [run for run in runs if run.state == "finished"]
    for setting in row.split(",") if row else ():
        key, _, value = setting.partition("=")
        values = [{"seed": run.seed, FOLD: run.fold}.get(key, run.settings.get(key, ...)) for run in runs]
        kept = [run for run, there in zip(runs, values, strict=True) if there == parsed(value)]
        if not kept:
            known = sorted({typed(there) for there in values if there is not ...})
            raise InputError(f"{name}: no finished run has {setting}: {key} is {', '.join(known) or 'no setting'}")
        runs = kept
    if not runs:
        raise InputError(f"{name} holds no finished run" + (f" ({damaged[0]})" if damaged else ""))
    if swept := study_of(runs).swept:
        first = runs[0].fold if swept[0] == FOLD else runs[0].settings.get(swept[0])
        example = f"{folder}{ROW}{swept[0]}={typed(first)}"
        raise InputError(f"{name} holds runs that differ in {', '.join(swept)}: name one of its rows, {example}")
    runs = sorted(runs, key=lambda run: run.record["started"] if run.record else "")
    newest = {(run.fold or 0, run.seed or 0): run for run in runs}
    kept = [newest[place] for place in sorted(newest)]
    return Chosen(name, [Path(run.folder) for run in kept], kept)


def folds_of(several: Sequence[checkpoint.Checkpoint]) -> list[int | None]:
    """Return the document that each checkpoint holds out, if it does."""
    return [one.config["data"].get("fold") for one in several]


def incomparable(systems: Sequence[Sequence[checkpoint.Checkpoint]]) -> list[str]:
    """Return why losses of the checkpoints of systems do not compare: other texts, other splits. Empty: they do."""
    loaded, reasons = [one for several in systems for one in several], []
    first, folds = loaded[0], {*folds_of(systems[0])}
    for several in systems[1:]:
        if (theirs := {*folds_of(several)}) != folds:
            each = [", ".join(sorted(map(typed, found))) for found in (folds, theirs)]
            reasons.append(f"other splits: {FOLD} is {each[0]} and {each[1]}")
    for other in loaded[1:]:
        if other.corpus["sha256"] != first.corpus["sha256"]:
            reasons.append(f"trained and evaluated on other texts, {first.corpus['name']} and {other.corpus['name']}")
        for name in ("val_fraction", "test_fraction"):
            mine, theirs = first.config["data"].get(name), other.config["data"].get(name)
            if mine != theirs:
                reasons.append(f"other splits: data.{name} is {typed(mine)} and {typed(theirs)}")
    return list(dict.fromkeys(reasons))


def context_for_all(loaded: Sequence[checkpoint.Checkpoint]) -> int:
    """Return the least context that every target gets: the runs' own if it is one, else half of the shortest window."""
    data = [one.config["data"] for one in loaded]
    own = {(one["block_size"], one["min_context"]) for one in data}
    return own.pop()[1] if len(own) == 1 else max(1, min(one["block_size"] for one in data) // 2)


class Losses(NamedTuple):
    """The losses of a model on a split."""

    nats: Tensor  # (N,): of each target
    position: Tensor  # (N,): number of characters of the split that begin before it
    place: Tensor  # (N,): number of tokens of its window that it is predicted from
    characters: int  # of the split


def losses_of(
    model: nn.Module, data: CharDataModule, split: str, min_context: int, report: Callable[[int, int], None]
) -> Losses:
    """Evaluate a model on each target of a split, after `min_context` characters at least."""
    windows = data.windows(split, device_of(model), stride=data.block_size - min_context + 1)
    nats, targets, places = [], [], []
    with torch.inference_mode():
        for j, (x, y) in enumerate(windows):
            counted = y != IGNORE
            nats.append(token_losses(model, x, y)[counted].double().cpu())
            targets.append(y[counted].cpu())
            places.append(counted.nonzero()[:, 1].cpu() + 1)
            report(j + 1, len(windows))
    ids = torch.cat(targets)
    lengths = torch.ones_like(ids) if data.sizes is None else data.sizes[ids, 0]
    first = 1 if data.sizes is None else int(data.sizes[int(data.splits[split][0]), 0])
    ends = first + lengths.cumsum(0)
    return Losses(torch.cat(nats), ends - lengths, torch.cat(places), int(ends[-1]))


def by_place(losses: Losses) -> list[dict[str, Any]]:
    """Return the mean loss in nats of targets that are predicted from 1, 2, 3 to 4, 5 to 8, ... tokens, with counts."""
    group = torch.ceil(torch.log2(losses.place.double())).long()  # exact for powers of two
    n, total = torch.bincount(group), torch.bincount(group, losses.nats)
    longest = int(losses.place.max())
    return [
        {"from": 2**i // 2 + 1, "to": min(2**i, longest), "nats": float(total[i] / n[i]), "n": int(n[i])}
        for i in range(len(n))
        if n[i]
    ]


def system_of(
    name: str, seeds: Sequence[int], folds: Sequence[int | None], found: Sequence[tuple[Tensor, Tensor]]
) -> System:
    """Join runs of one recipe, given the seed, the held-out document, and characters and nats of the blocks of each."""
    numbers = sorted({fold for fold in folds if fold is not None})
    if len(numbers) > 1:
        losses = np.array([float(nats.sum() / characters.sum()) for characters, nats in found])
        means = [float(losses[np.array(folds) == number].mean()) for number in numbers]
        return over_folds(name, seeds, numbers, means)
    return System(name, tuple(seeds), np.stack([nats.numpy() for _, nats in found]), found[0][0].numpy())


def data_of(one: checkpoint.Checkpoint, run: Path, **changes: Any) -> CharDataModule:
    """The text of a checkpoint with its tokenizer.

    Args:
        run: as it was typed.
        changes: arguments of the data module that are not as the checkpoint has them.

    Raises:
        InputError: if its settings are none of a data module, or the text has changed since.
    """
    settings = checked(one.config["data"], one.corpus["sha256"], one.path, run)
    data = CharDataModule(**(settings | changes), tokenizer=lambda *_: one.tokenizer)
    data.setup()
    return data


def checked(data: Mapping[str, Any], sha256: str, file: Path, run: Path | str) -> dict[str, Any]:
    """Return the arguments of a data module from the settings of a run.

    Args:
        data, sha256: settings and hash of the text, as `file` has them.
        run: as it was typed.

    Raises:
        InputError: if they are none of a data module, or the text has changed since.
    """
    settings = {k: v for k, v in data.items() if not k.startswith("_")}
    try:
        check_node("data", settings | {"_target_": "charlm.data.CharDataModule"})
    except InputError as error:
        raise InputError(f"{file} is not used: {error}") from error
    corpus = corpus_of(settings)
    if corpus.survey.sha256 != sha256:
        raise InputError(f"{corpus.source} has changed since {run} was trained on it: put the old text back")
    return settings


def compressed_val(study: Study) -> dict[str, float]:
    """Return what general compressors make of the val split of a study's runs, nats per character, mean over folds.

    Raises:
        InputError: if there is no such text, or it has changed.
    """
    found: dict[str, list[float]] = {}
    for run in {run.fold: run for run in study.rows[0].runs}.values() if study.rows and study.comparable else ():
        if not run.record or not run.record["corpus"]:
            continue
        sha256 = str(run.record["corpus"].get("sha256"))
        settings = checked(run.record["config"].get("data") or {}, sha256, Path(run.folder, RUN_JSON), run.name)
        data = CharDataModule(**settings, tokenizer=ByteTokenizer.from_corpus)
        per_char = math.log(2) * bytes_per_character(data)
        for one in compressed(data):
            found.setdefault(f"{one.compressor}, given train", []).append(one.given_train * per_char)
    if not found:
        raise InputError("--compress needs finished runs on one text")
    return {name: statistics.fmean(losses) for name, losses in found.items()}


def measure(
    chosen: Sequence[Chosen],
    split: str,
    device: str,
    trust: Collection[str],
    tracked: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> tuple[list[System], list[str], int]:
    """Evaluate all that was chosen on one text, at one context.

    Args:
        tracked: shows the progress of what it is given the title of.

    Returns:
        The systems, or none and the reasons why they do not compare; and the least context of a target.
    """
    loaded = [[checkpoint.load(path, device, trust) for path in one.checkpoints] for one in chosen]
    if reasons := incomparable(loaded):
        return [], reasons, 0
    context, systems = context_for_all([one for several in loaded for one in several]), []
    for one, several in zip(chosen, loaded, strict=True):
        found = []
        for number, kept in enumerate(several, 1):
            of = f" {number} of {len(several)}" if len(several) > 1 else ""
            with tracked(f"evaluating {one.name}{of}") as report:
                data = data_of(kept, kept.path)
                windows = data.windows(split, device_of(kept.model), stride=data.block_size - context + 1)
                blocks = Blocks(data.splits[split], data.sizes)
                evaluate(kept.model, windows, report, blocks)
                found.append(blocks.summed())
        seeds = [int(kept.config.get("seed", number)) for number, kept in enumerate(several)]
        systems.append(system_of(one.name, seeds, folds_of(several), found))
    return systems, [], context


def differences(chosen: Sequence[Chosen]) -> tuple[list[dict[str, Any]], list[Note]]:
    """Return the settings in which the chosen runs differ, and notes on their budgets, code and machines."""
    runs = [run for one in chosen for run in one.runs]
    if not all(one.runs for one in chosen):
        return [], []
    study = study_of(runs)
    # Not on windows, which are the same here.
    notes = [*budget(runs), *environment(runs)]
    settings = [
        {"setting": name, "values": [study.formatted[name].get(one.runs[0].settings.get(name), "-") for one in chosen]}
        for name in study.swept
    ]
    return settings, notes
