"""Going on with a run: its own configuration and text, from its newest state, in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from charlm.checkpoint import PARTIAL, newest
from charlm.config import leaves, unknown_key
from charlm.data.corpus import load_corpus
from charlm.errors import InputError
from charlm.report import RESULTS, read_results

BUDGET = ("trainer.max_steps", "trainer.max_time", "max_tokens")
AFTERWARDS = ("evaluate", "sample_length")  # of no weight in training
MAY_CHANGE = (*BUDGET, *AFTERWARDS)
CONSTANT = "charlm.scheduler.constant"


def changes(overrides: Sequence[str]) -> dict[str, Any]:
    """What a command line sets, beside the run to resume.

    Raises:
        InputError: for what is not a setting with a value.
    """
    given = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        line, key = override.input_line, override.get_key_element()
        if override.is_delete() or override.is_add() or override.is_sweep_override():
            raise InputError(f"{line} cannot be asked of a run that is resumed: only {', '.join(MAY_CHANGE)} can")
        if key != "resume":
            given[key] = override.value()
    return given


def resumed(run_dir: Path, changes: Mapping[str, Any]) -> DictConfig:
    """The configuration of the run in `run_dir`, with a longer budget if `changes` ask for one.

    Raises:
        InputError: if there is no run, or for a change after which the steps already made would have been others.
    """
    if not run_dir.is_dir():
        raise InputError(f"resume={run_dir} is no folder: give one that python train.py made, as outputs/RUN")
    content = newest(run_dir).content
    step, config = content["global_step"], content["charlm"]["config"]
    old_dir, schedule = config["run_dir"], config["scheduler"]["_target_"]
    known = list(leaves(config))
    for key, value in changes.items():
        if key not in known:
            raise InputError(unknown_key(key, known))
        old = OmegaConf.select(OmegaConf.create(config), key)
        if value == old:
            continue
        if key not in MAY_CHANGE:
            raise InputError(
                f"{key}={value} is not how {run_dir} was trained, with {old}: leave it out to go on as before, or "
                f"start a new run without resume"
            )
        if key in BUDGET and schedule != CONSTANT:
            raise InputError(
                f"{key}={value} would change the learning rates of steps already made, as "
                f"scheduler={schedule.rpartition('.')[2]} follows the budget: start a new run without resume"
            )
        if key == "trainer.max_steps" and 0 < value < step:
            raise InputError(f"{key}={value} is already past: {run_dir} has made {step:,} steps")
    corpus, wanted = load_corpus(config["data"]["corpus"], config["data"]["path"]), content["charlm"]["corpus"]
    if corpus.sha256 != wanted["sha256"]:
        raise InputError(
            f"{corpus.source} is no longer the text that {run_dir} was trained on: put that back, or start a new run"
        )
    cfg = OmegaConf.create(moved(config, old_dir, str(run_dir.absolute())))
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def moved(node: Any, old: str, new: str) -> Any:
    """A configuration whose places are under another run folder."""
    if isinstance(node, dict):
        return {key: moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [moved(value, old, new) for value in node]
    return new + node.removeprefix(old) if isinstance(node, str) and node.startswith(old) else node


def tidy(run_dir: Path) -> None:
    """Remove what a kill left half-written, and the results of a run that goes on behind its end."""
    for leftover in run_dir.rglob(f"{PARTIAL}*"):
        leftover.unlink()
    (run_dir / RESULTS).unlink(missing_ok=True)


def finished(run_dir: Path, cfg: DictConfig) -> bool:
    """Has the run come to the end that `cfg` sets it?"""
    results = read_results(run_dir)
    if results is None or results["status"] != "finished":
        return False
    recorded = newest(run_dir).content["charlm"]["config"]
    return all(OmegaConf.select(OmegaConf.create(recorded), key) == OmegaConf.select(cfg, key) for key in BUDGET)
