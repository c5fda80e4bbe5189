"""The fork server of sweeps: whatever kills or stops it or the sweep, nothing hangs and no process is left."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT

WAITS = 90.0  # seconds for what takes two on a quiet machine


def until(true: Callable[[], object], what: str, seconds: float = WAITS) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} does not come"
        time.sleep(0.02)


def parents() -> dict[int, int]:
    """The parent of each process that is not a zombie."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = file.read_text().rpartition(")")[2].split()
            if state != "Z":
                found[int(file.parent.name)] = int(parent)
    return found


def below(pid: int) -> list[int]:
    """The processes that a process has started, at any depth."""
    found, known = [pid], parents()
    for one in found:
        found += [child for child, parent in known.items() if parent == one]
    return found[1:]


def server_of(sweep: int) -> int | None:
    """The fork server that a sweep has started."""
    for child in [child for child, parent in parents().items() if parent == sweep]:
        with suppress(OSError):
            if b"multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return None


@contextmanager
def sweeping(folder: Path, text: Path, *given: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A sweep of long jobs, as a real process."""
    common = ["data=text", f"data.path={text}", "trainer=cpu", "hydra.sweep.dir=s", "logger=none", "seed=1,2,3"]
    common += ["callbacks.checkpoint.every_n_steps=200"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *common, *(given or ["trainer.max_steps=1000000"])]
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    with subprocess.Popen(command, cwd=folder, **kept) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            left = below(process.pid)
            for pid in [process.pid, *left]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def training(folder: Path, jobs: int = 2) -> bool:
    """Have so many jobs saved a state, and made steps after it?"""
    sizes = [file.stat().st_size for file in folder.glob("s/*/losses.f32")]
    return sum(size > 4 * 250 for size in sizes) >= jobs


def gone(pids: list[int]) -> bool:
    return not {*pids} & {*parents()}


def states(folder: Path) -> list[str]:
    return [entry["state"] for entry in json.loads((folder / "s" / "sweep.json").read_text())["jobs"].values()]


def test_a_server_that_is_killed_ends_the_sweep_at_once_and_the_same_command_continues(tmp_path, text_file):
    with sweeping(tmp_path, text_file) as sweep:
        until(lambda: training(tmp_path), "training")
        server = server_of(sweep.pid)
        assert server
        everything = below(sweep.pid)
        os.kill(server, signal.SIGKILL)
        start = time.monotonic()
        out, err = sweep.communicate(timeout=WAITS)
        assert time.monotonic() - start < 30
        assert sweep.returncode == 1
        assert err.splitlines()[-1].startswith("charlm: the fork server died, so all jobs were stopped: run the same")
        assert "stopped with 0 of 3 jobs done; the rest: python train.py resume=s" in err
        until(lambda: gone(everything), "the end of all processes")
    assert "3 runs, by val loss" in out
    assert len([*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]) == 3
    assert {*states(tmp_path)} == {"waiting"}
    records = [json.loads(file.read_text()) for file in (tmp_path / "s").glob("*/run.json")]
    assert {(record["status"], record["reason"]) for record in records} == {("stopped", "SIGTERM")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_sweep_with_a_server_that_hangs_still_ends_when_it_is_told(tmp_path, text_file, number):
    with sweeping(tmp_path, text_file) as sweep:
        until(lambda: training(tmp_path), "training")
        server = server_of(sweep.pid)
        assert server
        everything = below(sweep.pid)
        os.kill(server, signal.SIGSTOP)
        start = time.monotonic()
        sweep.send_signal(number)
        _, err = sweep.communicate(timeout=WAITS)
        assert time.monotonic() - start < 30
        assert (sweep.returncode, err.count("\n")) == (128 + number, 1), err
        assert "stopped with 0 of 3 jobs done" in err
        until(lambda: gone(everything), "the end of all processes")
    assert {*states(tmp_path)} == {"waiting"}
    assert (tmp_path / "s" / "results.csv").exists()


@pytest.mark.slow
def test_a_sweep_whose_terminal_closes_saves_and_can_be_continued(tmp_path, text_file, train):
    for name in ("random", "lightning", "multiprocessing", "charlm"):  # a folder's own files are no modules
        (tmp_path / f"{name}.py").write_text("open('code_was_run', 'w')\nraise SystemExit(70)")
    with sweeping(tmp_path, text_file, "trainer.max_steps=6000") as sweep:
        until(lambda: training(tmp_path), "training")
        everything = below(sweep.pid)
        os.kill(sweep.pid, signal.SIGHUP)
        os.kill(sweep.pid, signal.SIGHUP)  # the shell and the system send one each
        sweep.communicate(timeout=WAITS)
        assert sweep.returncode == 129
        until(lambda: gone(everything), "the end of all processes")
    stopped = [json.loads(file.read_text())["step"] for file in (tmp_path / "s").glob("*/run.json")]
    assert (len(stopped), min(stopped) > 200) == (3, True)  # they train together
    ended = train("resume=s")
    assert ended.code == 0, ended.err
    assert {*states(tmp_path)} == {"done"}
    assert not (tmp_path / "code_was_run").exists()
    earlier = [json.loads(file.read_text())["earlier"] for file in (tmp_path / "s").glob("*/run.json")]
    assert sorted(reason for sessions in earlier for reason in {one["reason"] for one in sessions}) == ["SIGTERM"] * 3


@pytest.mark.slow
def test_a_hangup_that_was_ignored_stays_ignored(tmp_path, text_file):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sweeping(tmp_path, text_file, "trainer.max_steps=300") as sweep:
            until(lambda: (tmp_path / "s" / "sweep.json").exists(), "the ledger")
            os.kill(sweep.pid, signal.SIGHUP)
            _, err = sweep.communicate(timeout=WAITS)
            assert (sweep.returncode, err) == (0, "")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_jobs_end_with_a_sweep_that_is_killed(tmp_path, text_file):
    with sweeping(tmp_path, text_file) as sweep:
        until(lambda: training(tmp_path), "training")
        everything = below(sweep.pid)
        assert len(everything) > 3  # the server, two jobs, and what watches over them
        sweep.kill()
        sweep.wait()
        until(lambda: gone(everything), "the end of all processes")
    records = [json.loads(file.read_text()) for file in (tmp_path / "s").glob("*/run.json")]
    assert {(record["status"], record["reason"]) for record in records} == {("stopped", "SIGTERM")}


def test_a_server_that_dies_while_it_imports_is_told(tmp_path, text_file):
    with sweeping(tmp_path, text_file) as sweep:
        until(lambda: server_of(sweep.pid), "the server")
        server = server_of(sweep.pid)
        assert server
        os.kill(server, signal.SIGKILL)
        _, err = sweep.communicate(timeout=WAITS)
        assert sweep.returncode == 1
        assert err.startswith("charlm: the fork server died")
        assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_sweep_without_any_descriptor_and_with_warnings_as_errors_runs_its_jobs(tmp_path, text_file):
    common = f"-m data=text data.path={text_file} trainer=cpu trainer.max_steps=5 seed=1,2 hydra.sweep.dir=s"
    command = f"exec {sys.executable} -W error {ROOT / 'train.py'} {common}"
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=tmp_path, check=False).returncode == 0
    assert len([*(tmp_path / "s").glob("*/results.json")]) == 2
    told = subprocess.run(["sh", "-c", command.replace("=s", "=t")], cwd=tmp_path, check=False, capture_output=True)
    assert (told.returncode, told.stderr) == (0, b"")


ASKING = """import os
from charlm import errors, schema
from charlm.sweep import processes
if __name__ == "__main__":
    try:
        print([processes.ask(os.path.join, "a", str(n)) for n in range(20)][-1])
        print(processes.ask(os.getppid) != os.getpid())
        for question in [(schema.check, {"lrr": 1}), (os._exit, 3)]:
            try:
                processes.ask(*question)
            except errors.InputError as error:
                print(error)
        os.kill(processes.ask(os.getppid), 9)
        with errors.one_line_errors():
            processes.ask(os.getpid)
    finally:
        processes.stop()
"""


@pytest.mark.slow
def test_a_question_has_its_answer_or_its_mistake_or_an_error_that_says_why_not(tmp_path):
    (tmp_path / "asking.py").write_text(ASKING)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "asking.py"], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
    )
    assert told.returncode == 1
    assert told.stderr.startswith("charlm: the fork server died")
    joined, other, mistake, nothing = told.stdout.splitlines()
    assert (joined, other) == ("a/19", "True")
    assert mistake.startswith("there is no setting lrr")
    assert nothing == "_exit has no answer: its process failed or was killed"
