"""`-m hydra/launcher=slurm` and `=ray`: the same ledger and table, whatever an engine does to the jobs."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from charlm.callbacks import Checkpoint
from charlm.errors import InputError
from tests.conftest import ROOT, check_command
from tests.one_machine_slurm import missing, slurm
from tests.test_sweep import at_work, ledger_of

PLUGINS = {name: importlib.util.find_spec(f"hydra_plugins.hydra_{name}_launcher") for name in ("submitit", "ray")}
needs_slurm = pytest.mark.skipif(
    bool(missing()) or not PLUGINS["submitit"],
    reason=f"not installed: {', '.join(missing()) or 'hydra-submitit-launcher'}",
)
needs_ray = pytest.mark.skipif(not PLUGINS["ray"], reason="not installed: hydra-ray-launcher")
SHORT = ["trainer=cpu", "trainer.max_steps=40", "evaluate=[val]", "sample_length=1"]
# Half a minute of light work.
SLOW = ["trainer.max_steps=300", "evaluate=[val]", "sample_length=1", "trainer.val_check_interval=100"]


class Slow(L.Callback):
    """Makes steps take time."""

    every_n_steps = 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Slurm with two nodes, and the environment that finds it."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm(Path(folder)) as env:
        yield env


@pytest.fixture
def text(text_file: Path) -> list[str]:
    return ["data=text", f"data.path={text_file}"]


@pytest.fixture
def slow(tmp_path: Path) -> list[str]:
    place = tmp_path / "conf" / "callbacks"
    place.mkdir(parents=True)
    (place / "slow.yaml").write_text("slow:\n  _target_: tests.test_cluster.Slow\n")
    return [f"--config-dir={tmp_path / 'conf'}", "callbacks=[default,slow]", *SLOW]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`python train.py ...` at work, killed if it is so after the test."""
    processes = []

    def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes))  # type: ignore[call-overload]
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def sittings(folder: Path) -> list[str]:
    """How each process in a run's folder ended."""
    record = json.loads((folder / "run.json").read_text())
    return [f"{one['status']} {one['reason']}" for one in [*record["earlier"], record]]


def until(condition: Callable[[], object], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def trained(folder: Path, steps: int, process: subprocess.Popen[str]) -> Callable[[], bool]:
    """Has a run made so many steps, of those that `process` has begun?"""
    losses = folder / "losses.f32"

    def enough() -> bool:
        assert process.poll() is None, process.communicate()
        return losses.exists() and losses.stat().st_size >= 4 * steps

    return enough


def equal(one: Path, other: Path) -> None:
    """To the bit, at every step and at the end."""
    assert results(one)["val/loss"] == results(other)["val/loss"]
    assert (one / "losses.f32").read_bytes() == (other / "losses.f32").read_bytes()


def check_sweep(train, tmp_path: Path, text: list[str], engine: str, **env: str) -> None:
    """Of three jobs one fails; the others are what they would be alone, and are not made again."""
    launcher = f"hydra/launcher={engine}"
    ended = train("-m", launcher, *text, *SHORT, "data.batch_size=8,16,10000000000000", "hydra.sweep.dir=s", **env)
    assert ended.code == 1, ended.err
    assert ended.err.startswith("charlm: 1 of 3 jobs failed; see terminal.log in their folders under s"), ended.err
    assert ended.err.endswith(f"the rest: python train.py resume=s {launcher}\n")
    assert ended.err.count("\n") == 1
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert [row["status"].partition(":")[0] for row in rows] == ["failed", "finished", "finished"]
    assert "emory" in rows[0]["status"]
    assert [row["data.batch_size"] for row in rows[1:]] == ["16", "8"]
    states = {name: entry["state"] for name, entry in ledger_of(tmp_path / "s").items()}
    assert states == {"batch_size=8": "done", "batch_size=16": "done", "batch_size=10000000000000": "failed"}
    assert train(*text, *SHORT, "data.batch_size=8", "hydra.run.dir=alone").code == 0
    equal(tmp_path / "alone", tmp_path / "s" / "batch_size=8")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").glob("*/results.json")}
    refused = train("resume=s", "data.batch_size=8,16", **env)
    assert refused.err.startswith(f"charlm: s ran with {launcher}: repeat that with its settings"), refused.err
    again = train("resume=s", "data.batch_size=8,16", launcher, **env)
    assert again.code == 0, again.err
    assert {file: file.stat().st_mtime_ns for file in before} == before


@needs_slurm
def test_slurm_runs_a_sweep(train, tmp_path, text, cluster):
    check_sweep(train, tmp_path, text, "slurm", **cluster)


@needs_slurm
def test_jobs_that_slurm_does_not_take_are_told_in_its_words(train, text, cluster):
    ended = train("-m", "hydra/launcher=slurm", *text, *SHORT, "seed=1,2", "hydra.launcher.partition=no", **cluster)
    assert ended.code == 2
    assert "charlm: Slurm does not take the jobs: sbatch: error: " in ended.err
    assert "invalid partition specified: no" in ended.err
    assert ended.out == ""


def hurry(cluster: dict[str, str]) -> None:
    """Slurm waits for two minutes before it requeues a job."""
    env = os.environ | cluster
    told = subprocess.run(
        ["squeue", "--noheader", "--format=%i %r"], env=env, capture_output=True, text=True, check=True
    )
    for job, _, reason in (line.partition(" ") for line in told.stdout.splitlines()):
        if reason == "BeginTime":
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=env, check=False)


def finish(process: subprocess.Popen[str], cluster: dict[str, str]) -> tuple[int, str]:
    """Return a command's exit code and its standard error."""

    def ended() -> bool:
        hurry(cluster)
        return process.poll() is not None

    until(ended, 240)
    return process.returncode, process.communicate()[1]


@needs_slurm
@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_becomes_what_it_would_have_been(
    started, train, tmp_path, text, slow, cluster
):
    """Slurm looks every half minute whose time is up, and grants a minute at least."""
    limits = ["timeout_min=1", "signal_delay_s=10"]
    longer = [*SLOW, "trainer.max_steps=600"]
    command = ["-m", *slow, *longer, "hydra/launcher=slurm", *text, "trainer=cpu", "seed=1,2", "hydra.sweep.dir=s"]
    process = started(*command, *(f"hydra.launcher.{limit}" for limit in limits), **cluster)
    assert finish(process, cluster) == (0, "")
    for seed in (1, 2):
        folder = tmp_path / "s" / f"seed={seed}"
        *before, last = sittings(folder)
        assert before
        assert set(before) == {"stopped SIGUSR2"}
        assert last == "finished None"
        assert train(*text, *longer, "trainer=cpu", f"seed={seed}", f"hydra.run.dir=alone{seed}").code == 0
        equal(folder, tmp_path / f"alone{seed}")


@needs_slurm
@pytest.mark.slow
def test_a_job_whose_time_is_up_for_good_has_failed_and_is_gone_on_with(started, tmp_path, text, slow, cluster):
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=10", "hydra.launcher.max_num_timeout=0"]
    common = [*slow, "trainer.max_steps=600", "hydra/launcher=slurm", *text, "trainer=cpu", "hydra.sweep.dir=s"]
    code, told = finish(started("-m", *common, *limits, **cluster), cluster)
    assert (code, told.count("\n")) == (1, 1), told
    assert ledger_of(tmp_path / "s")["job_0"]["reason"] == "failed: stopped by SIGUSR2"
    assert finish(started("-m", *common, **cluster), cluster) == (0, "")
    assert sittings(tmp_path / "s" / "job_0") == ["stopped SIGUSR2", "finished None"]


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("place", ["trainer.devices=2", "trainer.num_nodes=2"])
def test_two_tasks_train_one_model_also_after_a_requeue(started, train, tmp_path, text, slow, cluster, place):
    """One on each of two nodes, or both on one."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", place]
    process = started("-m", *slow, "hydra/launcher=slurm", *text, *ddp, "hydra.sweep.dir=s", **cluster)
    folder = tmp_path / "s" / "job_0"
    until(trained(folder, 100, process))
    told = subprocess.run(["squeue", "--noheader", "--format=%i %D"], env=os.environ | cluster, capture_output=True)
    job, nodes = told.stdout.decode().split()
    assert nodes == ("2" if "num_nodes" in place else "1")
    subprocess.run(["scontrol", "requeue", job], env=os.environ | cluster, check=True)
    assert finish(process, cluster) == (0, "")
    assert sittings(folder) == ["stopped SIGTERM", "finished None"]
    alone = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    assert train(*text, *SLOW, *alone, "hydra.run.dir=alone").code == 0
    equal(folder, tmp_path / "alone")


@needs_slurm
@pytest.mark.slow
def test_a_job_that_is_killed_costs_only_itself(started, train, tmp_path, text, slow, cluster):
    command = ["-m", *slow, "hydra/launcher=slurm", *text, "trainer=cpu", "seed=1,2", "hydra.sweep.dir=s"]
    command.append("callbacks.checkpoint.every_n_steps=50")
    process = started(*command, **cluster)
    folder = tmp_path / "s" / "seed=1"
    until(trained(folder, 100, process))
    os.kill(json.loads((folder / "run.json").read_text())["process"]["pid"], signal.SIGKILL)
    code, told = finish(process, cluster)
    assert code == 1
    assert "1 of 2 jobs failed" in told
    assert ledger_of(tmp_path / "s")["seed=1"]["reason"] == "failed: killed"
    assert finish(started(*command, **cluster), cluster) == (0, "")
    assert sittings(folder) == ["killed None", "finished None"]
    assert train(*text, *SLOW, "trainer=cpu", "seed=1", "hydra.run.dir=alone").code == 0
    equal(folder, tmp_path / "alone")


@needs_slurm
@pytest.mark.slow
def test_a_sweep_that_is_stopped_leaves_the_queue_and_one_that_is_killed_stays_there(
    started, tmp_path, text, slow, cluster
):
    def queue() -> str:
        return subprocess.run(
            ["squeue", "--noheader"], env=os.environ | cluster, capture_output=True, text=True, check=True
        ).stdout

    command = ["-m", *slow, "hydra/launcher=slurm", *text, "trainer=cpu", "seed=1,2", "hydra.sweep.dir=s"]
    process = started(*command, **cluster)
    until(lambda: all(trained(tmp_path / "s" / f"seed={seed}", 50, process)() for seed in (1, 2)))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "stopped with 0 of 2 jobs done" in process.communicate()[1]
    assert queue() == ""
    for seed in (1, 2):
        assert sittings(tmp_path / "s" / f"seed={seed}") == ["stopped SIGTERM"]
    process = started(*command, **cluster)
    until(lambda: all(trained(tmp_path / "s" / f"seed={seed}", 150, process)() for seed in (1, 2)))
    process.kill()
    process = started(*command, **cluster)
    code, told = finish(process, cluster)
    assert (code, "still in Slurm's queue" in told) == (2, True), told
    until(lambda: queue() == "")
    assert finish(started(*command, **cluster), cluster) == (0, "")
    for seed in (1, 2):  # resumed from checkpoints of the killed sweep
        assert sittings(tmp_path / "s" / f"seed={seed}") == ["stopped SIGTERM", "finished None"]


@needs_slurm
@pytest.mark.slow
def test_a_sweep_in_one_allocation_is_the_machines_own(tmp_path, text, cluster):
    """As those who are given a whole machine run it: Slurm has started one process, and its jobs start two each."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.max_steps=40", "hydra.sweep.dir=s"]
    command = ["srun", "--ntasks=1", "--cpus-per-task=2", sys.executable, str(ROOT / "train.py"), "-m", *text, *ddp]
    ended = subprocess.run(
        [*command, "seed=1,2"], cwd=tmp_path, env=os.environ | cluster, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert [results(tmp_path / "s" / f"seed={seed}")["train/tokens"] for seed in (1, 2)] == [40 * 2 * 32 * 8] * 2


@needs_ray
@pytest.mark.slow
def test_ray_runs_a_sweep(train, tmp_path, text):
    check_sweep(train, tmp_path, text, "ray")
    until(lambda: not at_work(tmp_path), 10)


@needs_ray
@pytest.mark.slow
def test_ray_goes_on_with_a_job_that_is_killed(started, train, tmp_path, text, slow):
    command = ["-m", *slow, "hydra/launcher=ray", *text, "trainer=cpu", "seed=1,2", "hydra.sweep.dir=s"]
    process = started(*command, "callbacks.checkpoint.every_n_steps=50")
    folder = tmp_path / "s" / "seed=1"
    until(trained(folder, 100, process))
    os.kill(json.loads((folder / "run.json").read_text())["process"]["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, ""), out
    assert sittings(folder) == ["killed None", "finished None"]
    assert train(*text, *SLOW, "trainer=cpu", "seed=1", "hydra.run.dir=alone").code == 0
    equal(folder, tmp_path / "alone")
    until(lambda: not at_work(tmp_path), 10)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_by_ray_that_is_ended_leaves_no_process_and_goes_on(started, tmp_path, text, slow, number):
    command = ["-m", *slow, "hydra/launcher=ray", *text, "trainer=ddp", "trainer.accelerator=cpu", "hydra.sweep.dir=s"]
    command.append("callbacks.checkpoint.every_n_steps=50")
    process = started(*command)
    until(trained(tmp_path / "s" / "job_0", 100, process))
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    # Of one that is killed, Ray's own agents take a while to give up.
    until(lambda: not [name for name in at_work(tmp_path) if not (number == signal.SIGKILL and "Agent" in name)], 30)
    process = started(*command)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, ""), out
    first = "killed None" if number == signal.SIGKILL else "stopped SIGTERM"
    assert sittings(tmp_path / "s" / "job_0") == [first, "finished None"]


@pytest.mark.parametrize(("engine", "package"), [("slurm", "hydra-submitit-launcher"), ("ray", "hydra-ray-launcher")])
def test_an_engine_that_is_not_installed_is_told_with_what_to_install(monkeypatch, engine, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"needs a package that is not there: pip install {package}$"):
        check_command(["train.py", "-m", f"hydra/launcher={engine}", "seed=1,2"], ROOT / "conf")


def test_processes_that_found_different_states_do_not_train_together(tmp_path):
    """As on two machines that do not share a disk."""
    trainer = SimpleNamespace(global_step=100, loggers=[], strategy=SimpleNamespace(root_device="cpu"))
    trainer.strategy.all_gather = lambda step: torch.stack([step, torch.tensor(0)])
    with pytest.raises(InputError, match=r"different steps, .100, 0.: is .* on a disk that all machines share"):
        Checkpoint(str(tmp_path / "checkpoints")).on_train_start(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["-m", "hydra/launcher=ray", "trainer=ddp", "trainer.num_nodes=2"], "ray has each job on one machine"),
        (["-m", "hydra/launcher=ray", "trainer=ddp", "trainer.devices=auto"], "trainer.devices=auto tells too little"),
        (["-m", "hydra/launcher=slurm"], "slurm needs sbatch, which is not here: run it on the cluster"),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm runs the jobs of -m: add that, also for a single job"),
        (["trainer=ddp", "trainer.num_nodes=2"], "trainer.num_nodes=2 needs a process started on each: by torchrun"),
    ],
)
def test_what_no_engine_can_do_is_told(monkeypatch, tmp_path, settings, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=words):
        check_command(["train.py", *settings, "data=pydoc", "seed=1"], ROOT / "conf")
