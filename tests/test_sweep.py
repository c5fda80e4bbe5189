"""`python train.py -m ...`: every job an ordinary run in a folder with a readable name, one table at the end."""

import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from charlm import checkpoint, terminal
from charlm.errors import InputError
from charlm.preflight import settings
from charlm.preflight.configs import resolved
from charlm.run.table import runs_table
from charlm.sweep import Job, Pool, names
from charlm.sweep.checks import check_runs
from charlm.sweep.composition import composed
from charlm.sweep.ledger import Ledger
from tests.conftest import ROOT
from tests.test_forkserver import WAITS, below, gone, server_of, until
from tests.test_resume import same

GRID = ["data.block_size=4,16", "data.batch_size=8,32", "optimizer.lr=1e-3,1e-1"]
FOLDERS = {f"block_size={t},batch_size={b},lr={lr}" for t in (4, 16) for b in (8, 32) for lr in ("0.001", "0.1")}


@pytest.fixture
def sweep(train, text_file):
    def run(*overrides: str, **env: str):
        steps = [] if any(o.startswith("trainer.max_steps") for o in overrides) else ["trainer.max_steps=40"]
        fixed = ["data=text", f"data.path={text_file}", *steps, "hydra.sweep.dir=s"]
        return train("-m", *overrides, *fixed, timeout=280, **env)

    return run


def test_eight_jobs_make_eight_runs_and_one_table(sweep, tmp_path, train, text_file):
    ended = sweep(*GRID)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    folders = {f.name for f in (tmp_path / "s").iterdir() if f.is_dir()}
    assert folders == FOLDERS
    losses = {name: json.loads((tmp_path / "s" / name / "results.json").read_text())["val/loss"] for name in folders}
    assert len(set(losses.values())) == 8
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert [float(row["val/loss"]) for row in rows] == sorted(losses.values())
    table = ended.out.split("8 runs, by val loss")[1]
    places = [table.index(f"{loss:.4f}") for loss in sorted(losses.values())]
    assert places == sorted(places)
    # A job is what the same command alone would be, bit for bit.
    alone = [
        "data.block_size=16",
        "data.batch_size=8",
        "data.min_context=2",
        "optimizer.lr=1e-1",
        "trainer.max_steps=40",
        "hydra.run.dir=one",
    ]
    assert train("data=text", f"data.path={text_file}", *alone).code == 0
    found = json.loads((tmp_path / "one" / "results.json").read_text())["val/loss"]
    assert found == losses["block_size=16,batch_size=8,lr=0.1"]


def test_a_job_that_fails_costs_only_itself(sweep, tmp_path, faulty):
    """No check can know that a part has a defect."""
    ended = sweep(*faulty, "callbacks.fault.kind=raise,none", "trainer.max_steps=120", PYTHONPATH=str(ROOT))
    assert ended.code == 1
    assert ended.err.startswith("charlm: 1 of 2 jobs failed; see terminal.log in their folders under s")
    assert ended.err.count("\n") == 1
    assert "failed: kind=raise: " in ended.out
    failed = tmp_path / "s" / "kind=raise"
    assert "RuntimeError: a defect" in (failed / "terminal.log").read_text()
    assert "RuntimeError: a defect" in (failed / "train.log").read_text()
    assert not (failed / "results.json").exists()
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert [row["status"][:7] for row in rows] == ["failed:", "finishe"]


@pytest.mark.parametrize("setting", ["n_jobs=0", "n_jobs=many", "jobs_per_gpu=0", "timeout=-1"])
def test_a_launcher_that_cannot_be_is_refused(check, tmp_path, text_file, setting):
    ended = check(
        "-m", "data=text", f"data.path={text_file}", "seed=1,2", "hydra.sweep.dir=s", f"hydra.launcher.{setting}"
    )
    assert ended.code == 2
    assert ended.err.startswith(f"charlm: hydra.launcher.{setting} is not possible: give ")
    assert not (tmp_path / "s").exists()


def test_compositions_that_share_files_are_what_hydra_makes_of_each():
    files = [[], ["model=gpt", "callbacks=[default,ema]"], ["experiment=lecture_bigram"], ["~callbacks.samples"]]
    values = [["seed=1", "optimizer.lr=1e-3"], ["seed=2", "data.block_size=16", "hydra.job.chdir=false"]]
    jobs = [[*a, *b, "+trainer.fast_dev_run=true"] for a in files for b in values]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):

        def alone(given: Sequence[str]) -> DictConfig:
            return compose("train", list(given), return_hydra_config=True)

        found = list(composed(jobs, alone))
        assert [OmegaConf.to_yaml(cfg) for cfg in found] == [OmegaConf.to_yaml(alone(job)) for job in jobs]
        with pytest.raises(HydraException, match=r"Could not override 'data.blok_size'"):
            next(composed([["data.blok_size=8"]], alone))


@pytest.mark.parametrize("devices", ["[1]", "'0,1'"])
def test_gpus_are_given_by_the_sweep_and_not_by_name(monkeypatch, devices):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = resolved(compose("train", [f"trainer.devices={devices}", "data=pydoc", "trainer=cpu"]))
    assert check_runs([run | {"trainer": run["trainer"] | {"devices": 1}}], elsewhere=False, texts=False).gpus == 0
    monkeypatch.setattr(settings, "check_settings", lambda run, elsewhere: None)  # the machine has no GPUs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("charlm.devices.cuda_problem", lambda: None)
    run["trainer"]["accelerator"] = "auto"
    with pytest.raises(InputError, match=r"names GPUs, and a sweep gives them out itself: say how many"):
        check_runs([run], elsewhere=False, texts=False)
    assert check_runs([run], elsewhere=True, texts=False).gpus == 4


def test_names_are_the_settings_that_vary():
    jobs = [["data.block_size=8", "optimizer.lr=1e-3", "seed=1"], ["data.block_size=8", "optimizer.lr=1e-2", "seed=1"]]
    assert names(jobs) == ["lr=1e-3", "lr=1e-2"]


def test_names_that_would_be_equal_are_told_apart():
    assert names([["a.lr=1", "b.lr=2"], ["a.lr=2", "b.lr=1"]]) == ["a.lr=1,b.lr=2", "a.lr=2,b.lr=1"]
    assert len(set(names([["seed=1"], ["seed=1"]]))) == 2
    assert len(set(names([["data.path=a/b"], ["data.path=a:b"]]))) == 2
    assert all("/" not in name for name in names([["data.path=a/b"], ["data.path=c"]]))


def test_long_values_make_names_that_a_file_system_takes():
    assert all(len(name) < 255 for name in names([[f"data.path={'x' * 500}"], [f"data.path={'y' * 500}"]]))


def test_a_swept_list_stands_in_the_table_as_it_was_typed():
    row = {"status": "failed: see [log]", "val/loss": None}
    rows = [row | {"callbacks": value} for value in ("[default]", "[default,early_stopping]")]
    console = Console(width=100)
    with console.capture() as told:
        console.print(runs_table(rows, ["callbacks"], "2 runs", console))
    for word in ("[default]", "[default,early_stopping]", "failed"):
        assert word in told.get()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_terminal_has_less_to_read_and_no_torn_words(width):
    figures = {"val/loss": 2.5, "val/loss_se": 0.0044, "val/bits_per_char": 3.6, "val/perplexity": 12.2}
    row = {"status": "finished", "train/seconds": 1.5, "data.block_size": 8, "optimizer.lr": "0.003"} | figures
    console = Console(width=width)
    with console.capture() as told:
        console.print(runs_table([row], ["data.block_size", "optimizer.lr"], "1 run", console))
    head, line = (one.split() for one in told.get().splitlines() if "status" in one or "finished" in one)
    assert line[:5] == ["8", "0.003", "2.5000", "±", "0.0044"]
    assert head[:4] == ["block_size", "lr", "val", "loss"]
    assert ("perplexity" in head) == (width >= 100)
    assert "bits/char" in head


def test_a_terminal_shows_the_jobs_at_work(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(terminal, "console", console)
    np.full(250, 2.5, "<f4").tofile(tmp_path / "losses.f32")
    begun = time.monotonic()
    with terminal.sweep_at_work(4) as sight:
        sight.look([("lr=1", tmp_path, 1000, begun - 1000), ("lr=2", tmp_path / "not_yet", -1, begun)])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    # Three quarters of the steps are left after 1,000 seconds.
    for word in ("lr=1", "250", "2.5000", "3,00", "lr=2", "0 ended, 2 at work, 2 waiting"):
        assert word in shown


class Fault(L.Callback):
    """Ends a job in one of several ways, once: the same command resumes it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        done = Path(trainer.default_root_dir, "faulted")
        if self.kind == "none" or trainer.global_step < 100 or done.exists():
            return
        done.touch()
        if self.kind == "raise":
            raise RuntimeError("a defect")
        if self.kind == "memory":
            torch.empty(10**15)
        while self.kind == "hang":
            time.sleep(1)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[self.kind])


KINDS = {
    "raise": "failed: RuntimeError: a defect",
    "kill": "failed: killed by SIGKILL",
    "term": "failed: stopped by SIGTERM",
    "memory": "failed: out of memory",
    "hang": "failed: no end within 0.5 minutes",
}


@pytest.fixture
def faulty(tmp_path: Path) -> list[str]:
    """The settings of a sweep in which jobs fail as `callbacks.fault.kind` says."""
    place = tmp_path / "conf" / "callbacks"
    place.mkdir(parents=True)
    (place / "fault.yaml").write_text("fault:\n  _target_: tests.test_sweep.Fault\n  kind: none\n")
    return [f"--config-dir={tmp_path / 'conf'}", "callbacks=[default,fault]"]


@pytest.mark.slow
def test_five_ways_to_fail_cost_five_jobs_which_the_same_command_then_finishes(sweep, tmp_path, faulty):
    command = [*faulty, "hydra.launcher.timeout=0.5", "trainer.max_steps=300", "trainer=cpu"]
    command.append(f"callbacks.fault.kind=none,{','.join(KINDS)}")
    command.append("seed=1,2")
    ended = sweep(*command, PYTHONPATH=str(ROOT))
    assert ended.code == 1
    assert "10 of 12 jobs failed" in ended.err
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    for row in rows:
        assert row["status"].startswith(KINDS.get(row["callbacks.fault.kind"], "finished"))
    ledger = json.loads((tmp_path / "s" / "sweep.json").read_text())["jobs"]
    assert sum(entry["state"] == "done" for entry in ledger.values()) == 2
    before = {name: (tmp_path / "s" / name / "results.json").stat().st_mtime_ns for name in ("kind=none,seed=1",)}
    again = sweep(*command, PYTHONPATH=str(ROOT))
    assert again.code == 0, again.err
    assert "2 of these jobs done: 10 to go" in again.out
    assert before == {name: (tmp_path / "s" / name / "results.json").stat().st_mtime_ns for name in before}
    # Every job ends as it would have without the interruption.
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert len({(row["seed"], row["val/loss"]) for row in rows}) == 2


@pytest.mark.slow
def test_a_grown_grid_runs_only_what_is_new(sweep, train, tmp_path):
    assert sweep("seed=1,2").code == 0
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "s").glob("*/results.json")}
    ended = train("resume=s", "seed=1,2,3", "optimizer.lr=1e-2,1e-1")
    assert ended.code == 0, ended.err
    assert "s has 2 of these jobs done: 4 to go" in ended.out
    assert before.items() <= {f: f.stat().st_mtime_ns for f in (tmp_path / "s").glob("*/results.json")}.items()
    assert len(list((tmp_path / "s").glob("*/results.json"))) == 6
    assert len({entry["fingerprint"] for entry in ledger_of(tmp_path / "s").values()}) == 6
    assert train("resume=s").code == 0  # and then there is nothing to do
    assert {f.stat().st_mtime_ns for f in before} == set(before.values())


def test_block_sizes_are_compared_after_equally_much_of_the_text(sweep, train, tmp_path):
    assert sweep("data.block_size=8,32", "logger=none").code == 0
    found = {t: json.loads((tmp_path / "s" / f"block_size={t}" / "results.json").read_text()) for t in (8, 32)}
    assert {one["min_context"] for one in found.values()} == {4}
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert {row["min_context"] for row in rows} == {"4"}
    ended = train("resume=s", "data.block_size=8,64,2")  # done ones stay, and a smaller one would need other windows
    assert ended.code == 2
    told = "compares its jobs after 4 characters or more, which data.block_size=2 cannot show: give that a sweep of its"
    assert told in ended.err
    assert ended.err.count("\n") == 1
    assert train("resume=s", "data.block_size=8,64").code == 0
    assert json.loads((tmp_path / "s" / "block_size=64" / "results.json").read_text())["min_context"] == 4


@pytest.mark.slow
def test_block_sizes_are_compared_as_the_command_says(sweep, tmp_path):
    assert sweep("data.block_size=8,32", "data.min_context=8", "logger=none", "trainer.max_steps=2").code == 0
    found = [json.loads(file.read_text())["min_context"] for file in (tmp_path / "s").glob("*/results.json")]
    assert found == [8, 8]


def test_a_study_is_many_runs_by_itself(train, tmp_path, text_file):
    place = tmp_path / "conf" / "sweep"
    place.mkdir(parents=True)
    (place / "mine.yaml").write_text("# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n")
    common = ["--config-dir=conf", "sweep=mine", "data=text", f"data.path={text_file}", "trainer.max_steps=5"]
    ended = train(*common, "evaluate=[val]", "hydra.sweep.dir=s")
    assert ended.code == 0, ended.err
    assert {file.parent.name for file in (tmp_path / "s").glob("*/results.json")} == {"seed=1", "seed=2"}


@pytest.mark.slow
def test_a_study_is_many_runs_by_itself_also_of_several_processes(train, tmp_path, text_file):
    place = tmp_path / "conf" / "sweep"
    place.mkdir(parents=True)
    (place / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      trainer.devices: 1,2\n"
    )
    common = ["data=text", f"data.path={text_file}", "trainer.max_steps=40", "trainer=ddp", "trainer.accelerator=cpu"]
    common += ["data.batch_size=4", "evaluate=[val]"]
    ended = train("--config-dir=conf", "sweep=mine", *common, "hydra.sweep.dir=s")
    assert ended.code == 0, ended.err
    found = {place.parent.name: json.loads(place.read_text()) for place in (tmp_path / "s").glob("*/results.json")}
    tokens = {name: one["train/tokens"] for name, one in found.items()}
    assert tokens == {"devices=1": 40 * 4 * 8, "devices=2": 40 * 4 * 8 * 2}
    assert train("--config-dir=conf", "resume=s").code == 0
    assert train(*common, "trainer.devices=2", "hydra.run.dir=alone").code == 0
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert alone["val/loss"] == found["devices=2"]["val/loss"]


@pytest.mark.parametrize("study", sorted(file.stem for file in (ROOT / "conf" / "sweep").glob("*.yaml")))
def test_every_study_is_possible(study, check):
    ended = check(f"sweep={study}", "--cfg=job")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("name", ["", ".", "..", "../else", "a/b", "/tmp/else"])
def test_a_ledger_whose_jobs_lie_elsewhere_is_refused(tmp_path, name):
    made = Ledger(tmp_path)
    made.add(name, ["seed=1"], "0", "waiting")
    made.write()
    with pytest.raises(InputError, match="has a job outside of its folder: not run"):
        Ledger(tmp_path)


def ledger_of(folder: Path) -> dict[str, Any]:
    jobs: dict[str, Any] = json.loads((folder / "sweep.json").read_text())["jobs"]
    return jobs


def test_the_same_command_goes_on_with_the_sweep_that_it_has_begun(train, tmp_path, text_file, faulty):
    command = ["-m", *faulty, "data=text", f"data.path={text_file}", "trainer.max_steps=150", "trainer=cpu"]
    command.append("callbacks.fault.kind=none,raise")
    for expected, code in (("2 runs", 1), ("Going on with", 0), ("2 runs", 0), ("2 runs", 1)):
        ended = train(*command, PYTHONPATH=str(ROOT))
        assert (ended.code, expected in ended.out) == (code, True), ended.out + ended.err
        if expected == "Going on with":  # as if killed between its last job and its table
            [table] = (tmp_path / "outputs").glob("*/results.csv")
            table.unlink()
    assert table.exists()
    assert len(list((tmp_path / "outputs").iterdir())) == 2  # once all are done, it begins another


def test_a_strangers_sweep_runs_no_code(sweep, check, tmp_path):
    assert sweep("seed=1,2").code == 0
    ledger = json.loads((tmp_path / "s" / "sweep.json").read_text())
    for evil in ("+callbacks.evil={_target_: os.system, command: touch evil}", "hydra.searchpath=[file:///evil]", "-h"):
        (tmp_path / "s" / "sweep.json").write_text(json.dumps(ledger | {"command": [*ledger["command"], evil]}))
        ended = check("resume=s")
        assert ended.code == 2
        assert ended.err.endswith(": not run\n"), ended.err
    (tmp_path / "s" / "sweep.json").write_text("{")
    assert "is damaged" in check("resume=s").err
    assert not (tmp_path / "evil").exists()


def test_a_sweep_that_was_killed_ahead_of_its_first_job_begins_again(sweep, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "multirun.yaml").touch()
    assert sweep("seed=1,2").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("swept", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_a_signal_that_hydra_catches_ends_the_command_nevertheless(tmp_path, text_file, number, swept):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"""
import signal
from hydra._internal.hydra import Hydra

def get_mode(self, **_):
    try:
        signal.raise_signal({number})
    except BaseException:
        return None  # as the real one does with what OmegaConf makes of an interrupt

Hydra.get_mode = get_mode
""")
    command = [sys.executable, str(ROOT / "train.py"), *swept, "data=text", f"data.path={text_file}"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    told = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM before the end"
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "", f"charlm: {told}\n")
    records = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/*/run.json")]
    assert [record["reason"] for record in records] == ([] if swept else [number.name])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_ended_ahead_of_its_first_job_leaves_no_process_and_no_folder(tmp_path, text_file, number):
    command = [sys.executable, str(ROOT / "train.py"), "-m", "data=text", f"data.path={text_file}", "seed=1,2"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: server_of(process.pid), "the process that jobs are forked from")
        if number != signal.SIGKILL:  # which would leave the folder, made while that process still imports
            until(lambda: [*(tmp_path / "outputs").glob("*sweep/.lock")], "the folder")
        everything = below(process.pid)
        process.send_signal(number)
        process.wait(WAITS)
        until(lambda: gone(everything), "the end of all processes")
        told = process.stderr.read() if process.stderr else ""
    assert {file.name for file in tmp_path.iterdir()} == {text_file.name}
    expected = {
        signal.SIGINT: (130, "charlm: interrupted\n"),
        signal.SIGTERM: (143, "charlm: stopped by SIGTERM before the end\n"),
        signal.SIGKILL: (-9, ""),
    }
    assert (process.returncode, told) == expected[number]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_whose_parent_is_killed_leaves_no_process_and_loses_nothing(tmp_path, text_file):
    common = ["-m", "data=text", f"data.path={text_file}", "seed=1,2,3,4", "trainer.max_steps=2000", "trainer=cpu"]
    common += ["evaluate=[val]", "sample_length=1"]

    def run(folder: str, kill_after: float | None) -> int | None:
        command = [sys.executable, str(ROOT / "train.py"), *common, f"hydra.sweep.dir={tmp_path / folder}"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
            try:
                return process.wait(kill_after)
            except subprocess.TimeoutExpired:
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        until = time.monotonic() + 10
        while at_work(tmp_path):
            assert time.monotonic() < until, "a process is left"
        return None

    rng = random.Random(4)
    assert run("undisturbed", None) == 0
    kills = 0
    while kills < 20:
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        for _ in range(4):
            kills += 1
            if run("s", rng.uniform(1, 12)) == 0:
                break
        assert run("s", None) == 0
        for seed in range(1, 5):
            files = [tmp_path / s / f"seed={seed}" / "checkpoints" / "last.ckpt" for s in ("s", "undisturbed")]
            weights = [checkpoint.read(file)["state_dict"] for file in files]
            assert same(*weights)


def at_work(folder: Path) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            command = (file.parent / "cmdline").read_text() + os.readlink(file.parent / "cwd")
            found += [command] if str(folder) in command else []
    return found


def job(processes: int = 1, on_gpu: bool = False) -> Job:
    return Job([], Path("x"), "x", processes, on_gpu)


def test_as_many_jobs_run_as_the_machine_holds():
    pool = Pool("auto", 1, None, 0)
    pool.cores, pool.gpus = 4, [0, 1, 2, 3]
    assert pool.at_once(job(), 9) == 4
    assert pool.at_once(job(), 2) == 2
    assert pool.at_once(job(2), 9) == 2
    assert pool.at_once(job(8), 1) == 1
    pool.gpus = [0, 1]
    assert pool.at_once(job(on_gpu=True), 9) == 2
    assert pool.at_once(job(2, on_gpu=True), 9) == 1
    pool.gpus = [0, 1, 0, 1]  # two jobs may share one
    assert pool.take(2) == [0, 1]
    assert pool.take(1) == [0]
    assert not pool.running
    assert pool.take(1) == [1]
    pool.gpus = [1, 1, 0]
    assert pool.take(2) == [1, 0]
    two = Pool(2, 3, None, 0)
    assert two.at_once(job(2), 9) == 2
    assert two.at_once(job(), 1) == 1
