"""Packed sweeps: jobs that train together in one process are bitwise what they are alone."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from charlm import checkpoint
from charlm.run.results import read_validations
from tests.conftest import ROOT, Process, no_corpus
from tests.test_resume import same

# Validations, logs, checkpoints and the epochs of Lightning's loop (of 500 steps) end at different steps.
SETTINGS = [
    "trainer.max_steps=730",
    "trainer.val_check_interval=90",
    "trainer.log_every_n_steps=40",
    "callbacks.checkpoint.every_n_steps=150",
    "sample_length=20",
]
JOBS = ["seed=1,2", "optimizer.lr=1e-3,1e-1", "scheduler=constant,warmup_cosine"]


@pytest.fixture
def sweep(train, text_file):
    def run(folder: str, *overrides: str, pack: int | str = "auto", **env: str):
        fixed = ["data=text", f"data.path={text_file}", f"hydra.launcher.pack={pack}", f"hydra.sweep.dir={folder}"]
        return train("-m", *fixed, *SETTINGS, *overrides, timeout=280, **env)

    return run


def story(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for what the clock says and for names of files."""
    sizes = {"scalars": 0, "tensors": 0, "images": 0}
    board = EventAccumulator(str(folder), size_guidance=sizes).Reload()
    tags = board.Tags()
    scalars = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"] if "per_sec" not in tag}
    tensors = {tag: [(e.step, str(e.tensor_proto)) for e in board.Tensors(tag)] for tag in tags["tensors"]}
    images = {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in tags["images"]}
    state = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    state["callbacks"].pop("Recorder")  # its clock
    state["callbacks"]["Checkpoint"].pop("logged")  # files by the time
    state["charlm"] = {**state["charlm"], "config": None}  # its folders
    record = json.loads((folder / "run.json").read_text())
    results = {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if "second" not in k}
    return {
        "scalars": scalars,
        "tensors": tensors,
        "images": images,
        "state": state,
        "results": results,
        "record": [record["status"], record["reason"], record["step"], record["environment"], record["seed"]],
        "losses": (folder / "losses.f32").read_bytes(),
        "blocks": (folder / "val_blocks.csv").read_bytes(),
        "validations": [(step, loss) for step, _, loss in read_validations(folder)],
        "files": sorted(f.name for f in folder.rglob("*") if "tfevents" not in f.name),
    }


def jobs_of(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir())


def process_of(folder: Path) -> int:
    return int(json.loads((folder / "run.json").read_text())["process"]["pid"])


def check_equal(one: Path, other: Path) -> None:
    assert [f.name for f in jobs_of(one)] == [f.name for f in jobs_of(other)]
    for a, b in zip(jobs_of(one), jobs_of(other), strict=True):
        found, wanted = story(a), story(b)
        for part, value in wanted.items():
            assert same(found[part], value), (a.name, part)


def test_a_packed_sweep_leaves_what_its_jobs_leave_alone(sweep, tmp_path):
    packed, alone = sweep("packed", *JOBS), sweep("alone", *JOBS, pack=1)
    assert packed.code == alone.code == 0, packed.err + alone.err
    processes = [process_of(job) for job in jobs_of(tmp_path / "packed")]
    assert len(processes) == 8
    assert len(set(processes)) < 8
    assert len({process_of(job) for job in jobs_of(tmp_path / "alone")}) == 8
    check_equal(tmp_path / "packed", tmp_path / "alone")
    for job in jobs_of(tmp_path / "packed"):
        log = (job / "terminal.log").read_text()
        assert log.count("What to type next") == 1
        assert f"seed {json.loads((job / 'run.json').read_text())['seed']}" in log
        assert not (job / "train.log").read_text().count("Error")
