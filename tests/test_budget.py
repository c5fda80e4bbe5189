"""Limits of a run: steps, tokens or time; schedules and the terminal know which."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from rich.console import Console

from charlm.callbacks import progress
from tests.conftest import Ended


@pytest.fixture
def run(train, tmp_path, text_file):
    """Train into `a`. Returns how it ended, its results, and each column of metrics.csv as values at steps."""

    def run(*overrides: str) -> tuple[Ended, dict[str, Any], dict[str, dict[int, float]]]:
        common = ["data=text", f"data.path={text_file}", "trainer=cpu", "logger=csv", "hydra.run.dir=a"]
        ended = train(*common, *overrides)
        assert (ended.code, ended.err) == (0, ""), ended.err + ended.out
        return ended, json.loads((tmp_path / "a" / "results.json").read_text()), columns(tmp_path / "a")

    return run


def columns(folder: Path) -> dict[str, dict[int, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in rows[0]}


def test_time_ends_a_run_with_its_schedule_at_the_end_and_with_exact_figures(run, call):
    budget = ["trainer.max_time=00:00:00:03", "trainer.max_steps=-1", "scheduler=linear", "scheduler.warmup_steps=10"]
    pace = ["trainer.log_every_n_steps=5", "callbacks.progress.seconds_between_lines=0.3"]
    ended, found, curves = run(*budget, *pace)
    assert found["stopped_by"] == "time"
    assert 1 < found["train/seconds"] < 60
    assert "0:00:03 of time, in steps of 256 tokens" in ended.out
    lines = [line for line in ended.out.splitlines() if line.startswith("step ")]
    assert all(re.match(r"step [\d,]+  (loss \d|validating: )", line) for line in lines)
    assert any(line.endswith(("  2 s left", "  1 s left")) for line in lines)
    lr = curves["train/lr"]
    assert lr[4] == pytest.approx(0.01 * 5 / 11)
    assert max(lr.values()) > 0.005
    falling = [rate for step, rate in lr.items() if step > 10]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.002
    last = found["steps"] - 1  # Lightning numbers steps from 0
    assert max(curves["val/loss"]) == last  # a validation, and no second telling of it
    assert curves["val/loss"][last] == pytest.approx(found["val/loss"], rel=1e-6)
    again = json.loads(call("evaluate", "a", "--split", "val", "--json").out)
    assert again["val/loss"] == found["val/loss"]


@pytest.mark.parametrize(
    ("settings", "steps", "stopped_by"),
    [
        (["max_tokens=10000"], 40, "tokens"),
        (["max_tokens=10000", "trainer.max_steps=-1"], 40, "tokens"),
        (["max_tokens=41000", "data.batch_size=1", "callbacks=none"], 5125, "tokens"),  # beyond the default number
        (["max_tokens=10240", "trainer.max_steps=41", "trainer.max_time=01:00:00:00"], 40, "tokens"),
        (["max_tokens=10241", "trainer.max_steps=40"], 40, "steps"),
        (["max_tokens=10000", "trainer.accumulate_grad_batches=3"], 14, "tokens"),
    ],
)
def test_tokens_end_a_run_unless_steps_do(run, settings, steps, stopped_by):
    schedule = ["scheduler=linear", "scheduler.warmup_steps=4", f"trainer.log_every_n_steps={steps}"]
    ended, found, curves = run(*settings, *schedule, "logger=csv")
    assert (found["steps"], found["stopped_by"]) == (steps, stopped_by)
    assert f"{steps:,} steps of " in ended.out
    assert curves["train/lr"][steps - 1] == pytest.approx(0.01 / (steps - 4))  # the last one above zero


@pytest.fixture
def terminal(monkeypatch):
    """A terminal for the bar."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", console)


@pytest.mark.parametrize(("max_steps", "seconds", "expected"), [(100, None, 0.4), (-1, 60, 0.75), (100, 60, 0.75)])
def test_the_bar_shows_the_part_of_the_budget_that_is_spent(terminal, max_steps, seconds, expected):
    timer = Timer({"seconds": seconds}) if seconds else None
    trainer: Any = SimpleNamespace(
        max_steps=max_steps,
        global_step=0,
        is_global_zero=True,
        world_size=1,
        max_epochs=-1,
        accumulate_grad_batches=1,
        callback_metrics={},
        val_dataloaders=None,
        callbacks=[timer] if timer else [],
    )
    observer: Any = progress.Progress()
    observer.on_train_start(trainer, None)
    assert observer.bar
    (task,) = observer.bar.tasks
    assert (task.completed, task.total) == (0, 1)
    trainer.global_step, observer.newest = 40, (torch.tensor(1.0), 256)
    if timer:
        timer.load_state_dict({"time_elapsed": {"train": 45.0}})
    observer.show(trainer)
    assert task.percentage == pytest.approx(100 * expected)
    trainer.global_step = 100
    if timer:
        timer.load_state_dict({"time_elapsed": {"train": 61.0}})
    observer.on_train_end(trainer, None)
    assert task.finished
    assert task.fields["clock"] == "in all"
