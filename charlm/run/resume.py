"""Beginning from a run: going on with it, in its folder and from its newest state, or again with its settings."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from charlm.data.corpora import corpus_of
from charlm.errors import InputError
from charlm.run.overrides import changes
from charlm.run.record import previous, read_record
from charlm.run.results import BLOCKS, RESULTS, whole_results
from charlm.schema import is_default, leaves, unknown_key

if TYPE_CHECKING:  # torch is imported only to read a checkpoint
    from charlm.checkpoint import Newest

BUDGET = ("trainer.max_steps", "trainer.max_time", "max_tokens")
# Settings of devices and speed: the batches stay the same, and figures up to rounding.
MACHINE = ("trainer.accelerator", "trainer.devices", "threads", "speed.steps_per_execution", "speed.cuda_graph")
MAY_CHANGE = (*BUDGET, *MACHINE, "stop_at", "evaluate", "sample_length")
CONSTANT = "charlm.scheduler.constant"


def prepare_run(cfg: DictConfig, overrides: Sequence[str]) -> "tuple[DictConfig, Newest | None]":
    """The settings to train with, and the state to begin from: those of a run to resume or to rerun, if one is named.

    Raises:
        InputError: as `resumed` and `rerun`.
    """
    if cfg.resume:
        from charlm.checkpoint import read_newest

        run_dir = Path(cfg.resume)
        state = read_newest(run_dir)
        return resumed(run_dir, state.content, changes(overrides)), state
    return (rerun(Path(cfg.rerun), changes(overrides), cfg.run_dir) if cfg.rerun else cfg), None


def resumed(run_dir: Path, content: Mapping[str, Any], changes: Mapping[str, Any]) -> DictConfig:
    """The configuration of the run in `run_dir`, with a longer budget or other devices if `changes` ask for them.

    Args:
        content: content of its newest checkpoint.

    Raises:
        InputError: if a change would have altered steps already made, or the text has changed.
    """
    step, config = content["global_step"], content["charlm"]["config"]
    schedule = config["scheduler"]["_target_"]
    known = OmegaConf.create(config)
    for key, value in changes.items():
        if key == "trust":
            continue
        if key not in leaves(config):
            raise InputError(unrecorded(key, config, run_dir))
        old = OmegaConf.select(known, key)
        if value == old:
            continue
        if key not in MAY_CHANGE:
            raise InputError(
                f"{key}={value} is not how {run_dir} was trained, with {old}: leave it out to go on as before, or "
                f"start a new run, rerun={run_dir} {key}={value}"
            )
        if key == "trainer.devices" and (not number_of(value) or number_of(value) != number_of(old)):
            raise InputError(
                f"trainer.devices={value} would change the batches, since {run_dir} was trained with "
                f"trainer.devices={old} and each process has its own: name as many devices, or start a new run, "
                f"rerun={run_dir} {key}={value}"
            )
        if key in BUDGET and schedule != CONSTANT:
            raise InputError(
                f"{key}={value} would change the learning rates of steps already made, as "
                f"scheduler={schedule.rpartition('.')[2]} follows the budget: start a new run, "
                f"rerun={run_dir} {key}={value}"
            )
        if key in ("trainer.max_steps", "stop_at") and value is not None and 0 < value < step:
            raise InputError(f"{key}={value} is already past: {run_dir} has made {step:,} steps")
    data, wanted = config["data"], content["charlm"]["corpus"]
    corpus = corpus_of(data)
    if corpus.survey.sha256 != wanted["sha256"]:
        raise InputError(
            f"{corpus.source} is no longer the text that {run_dir} was trained on: put that back, or start a new run, "
            f"rerun={run_dir}"
        )
    return changed(
        moved(config, config["run_dir"], str(run_dir.absolute())), {"stop_at": None, **changes, "trust": None}
    )


def number_of(devices: Any) -> int | None:
    """Return how many devices a value of trainer.devices means; None where only the machine knows."""
    if isinstance(devices, int) and devices > 0:
        return devices
    return len(devices) if isinstance(devices, list) else None


def unrecorded(key: str, config: dict[str, Any], run_dir: Path) -> str:
    """The one line for a setting that a recorded run does not have."""
    if is_default(key, config):
        return f"{key} is not among the settings that {run_dir} records: write a command without it, or a new run"
    return unknown_key(key, leaves(config))


def rerun(run_dir: Path, changes: Mapping[str, Any], new_dir: str) -> DictConfig:
    """The configuration of the run in `run_dir`, with `changes`, for a new run in `new_dir`.

    Raises:
        InputError: if there is no record of a run, or for a setting that it does not have.
    """
    record = read_record(run_dir)
    config, follows = record["config"], record["follows"]
    for key, value in {**follows, **changes}.items():
        if key != "trust" and key not in leaves(config):
            raise InputError(unrecorded(key, config, run_dir))
        if isinstance(OmegaConf.select(OmegaConf.create(config), key), DictConfig):
            raise InputError(
                f"{key}={value} chooses another part, and rerun= takes over all parts with their values: say which "
                f"values are others, or write a command without rerun"
            )
    begins = {"run_dir": new_dir, "stop_at": None, "resume": None, "rerun": None, "trust": None}
    return changed(moved(config, config["run_dir"], new_dir), {**follows, **begins, **changes, "trust": None})


def changed(config: dict[str, Any], changes: Mapping[str, Any]) -> DictConfig:
    """Return a recorded configuration with `changes`."""
    cfg = OmegaConf.create(config)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def moved(node: Any, old: str, new: str) -> Any:
    """Return a configuration with all paths below `old` moved to `new`."""
    if isinstance(node, dict):
        return {key: moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [moved(value, old, new) for value in node]
    inside = isinstance(node, str) and (node == old or node.startswith(f"{old}{os.sep}"))
    return new + node.removeprefix(old) if inside and old else node


def remove_results(run_dir: Path) -> None:
    """Remove the results of a run that continues beyond its end."""
    for name in (RESULTS, BLOCKS):
        (run_dir / name).unlink(missing_ok=True)


def finished(run_dir: Path, content: Mapping[str, Any], cfg: DictConfig) -> bool:
    """Return whether the run has reached the end that `cfg` sets."""
    record = previous(run_dir)
    if whole_results(run_dir) is None or record is None or record["status"] != "finished":
        return False
    recorded = OmegaConf.create(content["charlm"]["config"])
    return all(OmegaConf.select(recorded, key) == OmegaConf.select(cfg, key) for key in BUDGET)
