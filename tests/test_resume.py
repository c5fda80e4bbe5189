"""A run that is ended anywhere and resumed is the run that was not."""

import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from charlm import checkpoint
from charlm.sweep.jobs import PRELOAD
from tests.conftest import ROOT

SETTINGS = [
    *("model=gpt", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.dropout=0.2"),
    *("trainer=cpu", "threads=1", "data=text", "data.batch_size=2", "data.block_size=8"),
    *("scheduler=warmup_cosine", "scheduler.warmup_steps=5", "trainer.gradient_clip_val=0.5"),
    *("trainer.max_steps=40", "trainer.val_check_interval=15", "trainer.log_every_n_steps=5"),
    *("trainer.accumulate_grad_batches=2", "callbacks=[default,ema,best]", "callbacks.checkpoint.every_n_steps=7"),
    *("callbacks.samples.length=20", "sample_length=20", "evaluate=[val]"),
]
ENDS: dict[str, signal.Signals | None] = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
    "raise": None,
}
# Where a run can be ended: a function that is called there, and how often it is in a run.
PLACES = {
    "step": ("charlm.module", "forward_backward", 80),
    "validation": ("charlm.module", "window_losses", 6),
    "write": ("os", "fsync", 24),
    "rename": ("os", "replace", 12),
}


def become(argv: list[str], log: str, place: str | None, number: int, end: str) -> None:
    """In a fresh process: be `python train.py ...`, and end it at the `number`-th call of `place`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if place:
        module, name, _ = PLACES[place]
        original, calls = getattr(sys.modules[module], name), iter(range(1, 1_000_000))

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                sent = ENDS[end]
                if sent is None:
                    raise RuntimeError("a defect")
                os.kill(os.getpid(), sent)
            return original(*args, **kwargs)

        setattr(sys.modules[module], name, counted)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., int]:
    """Start a run in a process of its own. Returns its exit code, negative for a signal that killed it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tests.test_resume"])

    def run(*overrides: str, place: str | None = None, number: int = 0, end: str = "kill") -> int:
        arguments = ([str(ROOT / "train.py"), *overrides], str(tmp_path / "log"), place, number, end)
        process = context.Process(target=become, args=arguments)
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            pytest.fail(f"{overrides} hangs")
        assert process.exitcode is not None
        return process.exitcode

    return run


def story(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for what the clock says."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = board.Tags()
    told = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"] if "per_second" not in tag}
    texts = {
        t: [(e.step, e.tensor_proto.string_val[0]) for e in board.Tensors(t)] for t in tags["tensors"] if "sample" in t
    }
    results = {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if "second" not in k}
    state = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    best = checkpoint.read(folder / "checkpoints" / "best.ckpt")
    kept = [state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ema")]
    return {"told": told, "texts": texts, "results": results, "state": kept, "best": best["state_dict"]}


def same(a: Any, b: Any) -> bool:
    """To the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def end_and_resume(start: Callable[..., int], folder: Path, text: Path, rng: random.Random, ends: int) -> int:
    """End a run `ends` times, each time at a place drawn at random, and go on with it. Returns how often it did end."""
    common = [f"data.path={text}", f"hydra.run.dir={folder}"]
    ended = 0
    for _ in range(ends):
        place, end = rng.choice(list(PLACES)), rng.choice(list(ENDS))
        number = rng.randint(1, PLACES[place][2])
        begun = (folder / "checkpoints" / "last.ckpt").exists()
        code = start(*([f"resume={folder}"] if begun else [*SETTINGS, *common]), place=place, number=number, end=end)
        if code == 0:
            break
        sent = ENDS[end]
        expected = {1} if sent is None else {-sent} if sent == signal.SIGKILL else {-sent, 128 + sent}
        assert code in expected, (place, number, end, code)
        ended += 1
    else:
        begun = (folder / "checkpoints" / "last.ckpt").exists()
        assert start(*([f"resume={folder}"] if begun else [*SETTINGS, *common])) == 0
    return ended


@pytest.fixture
def unbroken(start, tmp_path, text_file):
    assert start(*SETTINGS, f"data.path={text_file}", f"hydra.run.dir={tmp_path / 'unbroken'}") == 0
    return story(tmp_path / "unbroken")


def check(start, unbroken, tmp_path, text_file, runs, seed):
    rng, ended = random.Random(seed), 0
    for number in range(runs):
        folder = tmp_path / str(number)
        ended += end_and_resume(start, folder, text_file, rng, ends=3)
        found = story(folder)
        for part, wanted in unbroken.items():
            assert same(found[part], wanted), (number, part)
    return ended


def test_a_run_ended_anywhere_and_resumed_equals_the_unbroken_run(start, unbroken, tmp_path, text_file):
    assert check(start, unbroken, tmp_path, text_file, runs=4, seed=1) >= 4


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_ends_leave_no_trace(start, unbroken, tmp_path, text_file):
    assert check(start, unbroken, tmp_path, text_file, runs=50, seed=2) >= 100
