"""Train a run again from its record and compare the two bit for bit."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from charlm import checkpoint
from charlm.errors import InputError
from charlm.files import open_regular
from charlm.home import CONF, TRAIN
from charlm.run.overrides import quoted
from charlm.run.record import differences, read_record
from charlm.run.results import LOSSES, read_results
from charlm.run.resume import CONSTANT
from charlm.run.trust import check_run

TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "ema")  # keys of a checkpoint that training changes
# Figures that depend on the machine, like all times, or that `charlm evaluate --certify` adds later.
ELSEWHERE = ("results.stopped_by", "results.device", "results.certified")


def reproduce(run_dir: Path, report: Callable[[int, int], None], trust: Sequence[str] = ()) -> dict[str, Any]:
    """Train the run in `run_dir` again, elsewhere, as far as its newest state, and compare.

    Args:
        report: called with steps made and steps in all, now and then.
        trust: packages outside of charlm whose recorded parts may run.

    Returns:
        equal: whether all is, to the bit.
        steps: that both made.
        first_step: first step whose loss differs, or None.
        losses: then and now, at that step.
        differs: the names of what else does: weights, states, final figures.
        environment: what is not as it was, by name, then and now.
        clock: whether the learning rate followed it, which no repetition can.
        timed: whether the clock ended the run. The repetition then makes as many steps.

    Raises:
        InputError: if there is no such run, if it has saved no step, or if it cannot be trained here.
    """
    record, state, results = read_record(run_dir), checkpoint.read_newest(run_dir).content, read_results(run_dir)
    check_run(run_dir, record["config"], [CONF], {"trust": trust})
    step = state["global_step"]
    constant = record["config"]["scheduler"]["_target_"] == CONSTANT
    counts_only = results is not None and results["steps"] == 0
    if step == 0 and not counts_only:
        raise InputError(f"{run_dir} has saved no step that could be compared")
    before = read_losses(run_dir, step)
    with tempfile.TemporaryDirectory(prefix="charlm-") as folder:
        again = Path(folder, "run")
        command = [sys.executable, str(TRAIN), f"rerun={quoted(run_dir.absolute())}", f"hydra.run.dir={again}"]
        command += [f"trust=[{','.join(trust)}]"] if trust else []
        timed = results is not None and results["stopped_by"] == "time"
        if results is None or timed:
            command += [f"stop_at={step}", *(["trainer.max_time=null"] if constant or timed else [])]
        if timed and not constant:  # without the clock, the schedule needs another end
            command += [f"trainer.max_steps={max(step, record['config']['scheduler'].get('warmup_steps', 0) + 1)}"]
        train(command, again / LOSSES, step, report)
        losses = [before, read_losses(again, step)]
        other, other_results = checkpoint.read_newest(again, quiet=True).content, read_results(again)
        differs = [name for part in TRAINED for name in unlike(state.get(part), other.get(part), part)]
        if results and other_results:
            differs += [name for name in unlike(results, other_results, "results") if exact(name)]
        environment = differences(record, read_record(again))
    unequal = np.flatnonzero(losses[0].view("<u4") != losses[1].view("<u4")).tolist()
    return {
        "equal": not unequal and not differs,
        "steps": step,
        "first_step": unequal[0] + 1 if unequal else None,
        "losses": [float(values[unequal[0]]) for values in losses] if unequal else None,
        "differs": differs,
        "environment": environment,
        "clock": record["config"]["trainer"]["max_time"] is not None and not constant,
        "timed": timed,
    }


def read_losses(run_dir: Path, steps: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return the loss of each of the first `steps` steps of a run, (steps,).

    Raises:
        InputError: if some are missing.
    """
    path = run_dir / LOSSES
    if not steps:
        return np.empty(0, "<f4")
    try:
        with open_regular(path) as file:
            losses = np.frombuffer(file.read(4 * steps), "<f4")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if len(losses) < steps:
        raise InputError(
            f"{path} holds {len(losses):,} losses, and the checkpoint is of step {steps:,}: cannot compare"
        )
    return losses


def train(command: list[str], losses: Path, steps: int, report: Callable[[int, int], None]) -> None:
    """Run a training command and report its progress.

    Raises:
        InputError: with the command's own last words, if it fails.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                report(losses.stat().st_size // 4 if losses.exists() else 0, steps)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            process.terminate()
            process.wait()
        output.seek(0)
        last = output.read().decode(errors="replace").strip().rpartition("\n")[2].removeprefix("charlm: ")
    if process.returncode:
        raise InputError(f"it cannot be trained again here: {last}")


def exact(figure: str) -> bool:
    return figure not in ELSEWHERE and "second" not in figure


def unlike(then: Any, now: Any, place: str) -> Iterator[str]:
    """Yield the names, below `place`, of all values that are not bitwise equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in then | now:
            yield from unlike(then.get(key), now.get(key), f"{place}.{key}")
    elif isinstance(then, list | tuple) and isinstance(now, list | tuple) and len(then) == len(now):
        for number, pair in enumerate(zip(then, now, strict=True)):
            yield from unlike(*pair, f"{place}.{number}")
    elif not (torch.equal(then, now) if torch.is_tensor(then) and torch.is_tensor(now) else then == now):
        yield place
