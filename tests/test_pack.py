"""Packed sweeps: jobs that train together in one process are bitwise what they are alone."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Trainer
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from charlm import checkpoint
from charlm.evaluate import mean_loss
from charlm.model.gpt import GPT
from charlm.module import LanguageModel
from charlm.run.results import read_validations
from charlm.speed.pack import CALLBACKS, LOGGERS
from charlm.speed.stacked_gpt import StackedGradient
from charlm.sweep import Job
from charlm.sweep.packing import OBSERVERS, kind_of, packed, share
from charlm.system import posix
from tests.conftest import ROOT, Process
from tests.test_forkserver import until
from tests.test_resume import same

# Validations, logs, checkpoints and the epochs of Lightning's loop (of 500 steps) end at different steps.
SETTINGS = [
    "trainer.max_steps=730",
    "trainer.val_check_interval=90",
    "trainer.log_every_n_steps=40",
    "callbacks.checkpoint.every_n_steps=150",
    "sample_length=20",
]
TINY = ["model=gpt", "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "data.block_size=8"]
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
    tensors = {
        tag: [(e.step, str(e.tensor_proto)) for e in board.Tensors(tag)] for tag in tags["tensors"] if "sample" in tag
    }
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


def check_near(one: Path, other: Path, tolerance: float) -> None:
    """Compare two runs that may differ by rounding, which grows from step to step."""
    losses = [np.fromfile(job / "losses.f32", np.float32) for job in (one, other)]
    np.testing.assert_allclose(losses[0], losses[1], atol=tolerance)
    assert losses[0][-10:].mean() < losses[0][:10].mean() - 0.3
    found, wanted = story(one), story(other)
    assert found["files"] == wanted["files"]
    assert [step for step, _ in found["validations"]] == [step for step, _ in wanted["validations"]]
    for name, value in wanted["results"].items():
        near = pytest.approx(value, rel=tolerance) if isinstance(value, float) else value
        assert found["results"][name] == near, name
    for tag, points in wanted["scalars"].items():
        np.testing.assert_allclose(found["scalars"][tag], points, rtol=tolerance, atol=tolerance, err_msg=tag)


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


def test_gpts_in_a_pack_are_what_they_are_alone_but_for_rounding(sweep, tmp_path):
    settings = ["trainer.max_steps=130", "trainer.gradient_clip_val=0.5", "scheduler=warmup_cosine", "model.bias=true"]
    jobs = [*TINY, *settings, "seed=1,2", "optimizer.lr=3e-3,1e9", "optimizer.weight_decay=0.1"]
    packed, alone = sweep("packed", *jobs, "hydra.launcher.n_jobs=1", pack=4), sweep("alone", *jobs, pack=1)
    assert packed.code == alone.code == 1  # lr=1e9 diverges
    together, apart = jobs_of(tmp_path / "packed"), jobs_of(tmp_path / "alone")
    assert len({process_of(job) for job in together}) == 1
    assert len({process_of(job) for job in apart}) == 4
    for one, other in zip(together, apart, strict=True):
        records = [json.loads((job / "run.json").read_text()) for job in (one, other)]
        if one.name.endswith("=1000000000.0"):
            assert [record["status"] for record in records] == ["failed"] * 2
            assert [record["reason"].partition(":")[0] for record in records] == ["training diverged"] * 2
            continue
        assert [record["status"] for record in records] == ["finished"] * 2
        check_near(one, other, tolerance=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"activation": "gelu_tanh", "n_layer": 3}])
def test_a_stacked_gpt_is_each_of_its_gpts(settings, precision):
    torch.manual_seed(1)
    models = [
        GPT(**{"vocab_size": 11, "block_size": 7, "n_layer": 1, "n_head": 2, "n_embd": 6} | settings) for _ in "abc"
    ]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)  # gains and biases too
    weights = {
        name: torch.stack([dict(m.named_parameters())[name].data for m in models])
        for name, _ in models[0].named_parameters()
    }
    trainer = Trainer(accelerator="cpu", precision=precision, gradient_clip_val=3.0, logger=False)
    x, y = torch.randint(11, (2, 3, 4, 5))  # (R, B, T) each
    gradients, losses = StackedGradient(trainer, LanguageModel(models[0]), weights)(x, y)
    for r, model in enumerate(models):
        with trainer.precision_plugin.train_step_context():
            loss = mean_loss(model, x[r], y[r])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        assert norm > 3
        rtol, atol = (1e-4, 1e-5) if precision == "32-true" else (0.05, 0.02)
        torch.testing.assert_close(losses[r], loss.detach(), rtol=rtol, atol=atol)
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert parameter.grad is not None
            assert torch.allclose(gradient[r], parameter.grad, rtol, atol), name
            assert gradient.is_contiguous()  # the fused kernel of AdamW would take its numbers in another order


def test_a_job_that_diverges_harms_no_other(sweep, tmp_path):
    ended = sweep("s", "seed=1,2", "optimizer.lr=1e-2,1e9")
    assert ended.code == 1
    assert sweep("alone", "seed=1,2", "optimizer.lr=1e-2,1e-3", pack=1).code == 0
    failed = [f for f in jobs_of(tmp_path / "s") if f.name.endswith("=1000000000.0")]
    assert len(failed) == 2
    for job in failed:
        record = json.loads((job / "run.json").read_text())
        assert record["status"] == "failed"
        assert record["reason"].startswith("training diverged: the loss of step")
        assert "try a lower optimizer.lr" in (job / "terminal.log").read_text()
        assert f"{job.name}  failed: " in ended.out
        shutil.rmtree(job)
    for job in jobs_of(tmp_path / "alone"):
        if job.name.endswith("=0.001"):
            shutil.rmtree(job)
    check_equal(tmp_path / "s", tmp_path / "alone")


@pytest.mark.parametrize("model", ["bigram", pytest.param("gpt", marks=pytest.mark.slow)])
def test_a_job_of_a_stopped_pack_resumes_alone(model, sweep, begin, train, tmp_path, text_file):
    """SIGTERM makes every job save where it logs next, or one log later if it comes while others log."""
    jobs = [*(TINY if model == "gpt" else []), "seed=1,2,3", "trainer.max_steps=6000", "hydra.launcher.n_jobs=1"]
    assert sweep("whole", *jobs, pack=3).code == 0
    fixed = ["data=text", f"data.path={text_file}", *SETTINGS, "hydra.launcher.pack=3"]
    process = begin("-m", *fixed, *jobs, "hydra.sweep.dir=s")
    until(lambda: (tmp_path / "s" / "seed=3" / "losses.f32").exists(), "training")
    process.send_signal(signal.SIGTERM)
    assert process.end(120).code == 143
    records = [json.loads((job / "run.json").read_text()) for job in jobs_of(tmp_path / "s")]
    assert [record["status"] for record in records] == ["stopped"] * 3
    steps = [record["step"] for record in records]
    assert max(steps) - min(steps) <= 40
    assert max(steps) < 6000
    for seed in (1, 2, 3):
        assert train(f"resume='s/seed={seed}'").code == 0
    if model == "bigram":
        check_equal(tmp_path / "s", tmp_path / "whole")
        return
    for one, other in zip(jobs_of(tmp_path / "s"), jobs_of(tmp_path / "whole"), strict=True):
        check_near(one, other, tolerance=0.01)


def kill_and_resume(
    begin: Callable[..., Process], train, tmp_path: Path, text_file: Path, kills: int, seed: int
) -> None:
    """Kill packed sweeps at random moments, resume each, and compare it with an undisturbed one."""
    rng = random.Random(seed)
    fixed = ["data=text", f"data.path={text_file}", *SETTINGS, "hydra.launcher.pack=auto", "seed=1,2,3,4"]
    start = time.monotonic()
    assert train("-m", *fixed, "hydra.sweep.dir=whole", timeout=280).code == 0
    seconds = time.monotonic() - start
    for number in range(kills):
        folder = f"s{number}"
        process = begin("-m", *fixed, f"hydra.sweep.dir={folder}")
        time.sleep(rng.uniform(0, seconds))
        pids = (
            {process_of(job) for job in jobs_of(tmp_path / folder) if (job / "run.json").exists()}
            if (tmp_path / folder).exists()
            else set()
        )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if rng.random() < 0.5:
            process.kill()
        process.end(280)
        assert train("-m", *fixed, f"hydra.sweep.dir={folder}", timeout=280).code == 0
        check_equal(tmp_path / folder, tmp_path / "whole")


def test_a_killed_pack_ends_like_an_undisturbed_one(begin, train, tmp_path, text_file):
    kill_and_resume(begin, train, tmp_path, text_file, kills=2, seed=1)


@pytest.mark.slow
def test_twenty_kills_of_packs_leave_no_trace(begin, train, tmp_path, text_file):
    kill_and_resume(begin, train, tmp_path, text_file, kills=20, seed=2)


@pytest.mark.parametrize(
    ("overrides", "packs"),
    [
        ([], True),
        (["logger=[tensorboard,csv]", "scheduler=linear"], True),
        (["model=gpt"], False),
        (["optimizer=muon"], False),
        (["speed=off"], False),
        (["callbacks=[default,ema]"], False),
        (["callbacks=[default,early_stopping]"], False),
        (["+callbacks.own._target_=mylab.Own"], False),
        (["trainer.max_time=00:00:01:00"], False),
        (["trainer.gradient_clip_val=1.0"], False),
        (["compile=true"], False),
        (["stop_at=10"], False),
        (["threads=2"], False),
        (["trainer.devices=2"], False),
    ],
)
def test_only_what_a_pack_knows_trains_together(overrides, packs, tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*overrides, f"run_dir={tmp_path}"])
        other = compose("train", [*overrides, "run_dir=elsewhere", "seed=2", "optimizer.lr=0.5"])
    plain: list[Any] = [OmegaConf.to_container(c, resolve=True) for c in (cfg, other)]
    kinds = [kind_of(run, on_gpu=False, chdir=False, rounding=False) for run in plain]
    assert [kind is not None for kind in kinds] == [packs, packs]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    ("overrides", "packs"),
    [
        ([], True),
        (["trainer.gradient_clip_val=1.0", "data.block_size=16"], True),
        (["trainer.precision=bf16-mixed"], True),
        (["trainer.precision=16-mixed"], False),
        (["model.dropout=0.1"], False),
        (["model.checkpointing=true"], False),
        (["model=transformerpp"], False),
        (["compile=true"], False),
    ],
)
def test_gpts_train_together_where_rounding_may_differ(overrides, packs, tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["model=gpt", *overrides, f"run_dir={tmp_path}"])
    run: Any = OmegaConf.to_container(cfg, resolve=True)
    kinds = [kind_of(run, on_gpu, chdir=False, rounding=True) for on_gpu in (False, True)]
    assert [kind is not None for kind in kinds] == [packs, packs]
    assert kind_of(run, on_gpu=True, chdir=False, rounding=False) is None


def test_jobs_are_shared_out_evenly(tmp_path):
    def job(number: int, kind: str | None) -> Job:
        return Job([], tmp_path / str(number), "", kind=kind)

    jobs = [job(i, "a") for i in range(5)] + [job(5, None)] + [job(i, "b") for i in range(6, 8)]
    found = [[first.name, *(other.name for other in first.others)] for first in packed(jobs, "auto", 2)]
    assert found == [["0", "1", "2", "3"], ["4"], ["5"], ["6", "7"]]
    assert [len(first.others) for first in packed(jobs, 1, 2)] == [0] * 8
    (tmp_path / "1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "1" / "checkpoints" / "last.ckpt").touch()
    found = [[first.name, *(other.name for other in first.others)] for first in packed(jobs, 3, 2)]
    assert found == [["0", "2", "3"], ["4"], ["1"], ["5"], ["6", "7"]]


def test_the_sweep_and_the_pack_know_the_same_callbacks_and_loggers():
    """The process of a sweep names them, since it does without PyTorch; that of a job has the classes."""
    assert {known.__name__ for known in CALLBACKS | LOGGERS} == {*OBSERVERS, "Recorder", "GroupedSteps"}


def test_two_packs_share_a_core_if_there_are_jobs_enough(monkeypatch):
    monkeypatch.setattr(posix, "cores", lambda: 2)
    assert [share(jobs, "auto") for jobs in (1, 4, 14, 16, 48)] == [1, 2, 7, 4, 12]
    assert [share(jobs, 2) for jobs in (1, 4, 14, 16, 48)] == [1, 2, 7, 8, 24]
