"""Windows and macOS, as far as Linux can stand in for them: charlm without the names that only POSIX or Linux has."""

import ast
import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from charlm.files import write_atomically
from tests.conftest import ROOT, Ended
from tests.elsewhere.sitecustomize import MODULES, WINDOWS
from tests.test_forkserver import WAITS, below, gone, states, sweeping, training, until

PLATFORMS = ["windows", "macos"]
TRAIN = str(ROOT / "train.py")

# Where charlm may use what Windows lacks, and why that is never reached there.
GUARDED = {
    "charlm/system/posix.py": {
        "SIGKILL",
        "SIG_BLOCK",
        "SIG_SETMASK",
        "SIG_UNBLOCK",
        "killpg",
        "pthread_sigmask",
        "resource",
    }
    | {"sched_getaffinity", "setsid", "sysconf"},  # the only place that checks for them
    "charlm/sweep/processes.py": {"SIGKILL"},  # used by the fork server
    "charlm/sweep/engine.py": {"getuid"},  # for Slurm
}


def posix_names(tree: ast.AST) -> Iterator[str]:
    """The names in a program that Windows lacks. hasattr and getattr take text, not a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module in WINDOWS:
            yield from (alias.name for alias in node.names if alias.name in WINDOWS[node.module])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in WINDOWS:
            yield from {node.attr} & WINDOWS[node.value.id]


def test_names_that_only_posix_has_are_used_where_they_are_guarded_and_nowhere_else():
    assert {*posix_names(ast.parse("import os, fcntl\nfrom signal import alarm\nos.fork()\nos.getpid()"))} == {
        *("fcntl", "alarm", "fork")
    }
    files = [*ROOT.glob("charlm/**/*.py"), *ROOT.glob("hydra_plugins/*.py"), ROOT / "train.py"]
    used = {file.relative_to(ROOT).as_posix(): {*posix_names(ast.parse(file.read_text()))} for file in files}
    assert {name: names for name, names in used.items() if names} == GUARDED


def environment(platform: str) -> dict[str, str]:
    """The environment in which each Python lacks what `platform` lacks."""
    places = os.pathsep.join([str(ROOT / "tests" / "elsewhere"), str(ROOT)])
    return os.environ | {"ELSEWHERE": platform, "PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": "", "CHARLM_DATA": ""}


def python(platform: str, folder: Path, *arguments: str, timeout: float = WAITS) -> Ended:
    """Run a real Python, with warnings as errors."""
    command = [sys.executable, "-W", "error", *arguments]
    options = {"capture_output": True, "text": True, "check": False, "timeout": timeout}
    told = subprocess.run(command, cwd=folder, env=environment(platform), **options)  # type: ignore[call-overload]
    return Ended(told.returncode, told.stdout, told.stderr)


def settings(text: Path, *others: str) -> list[str]:
    return ["data=text", f"data.path={text}", "trainer=cpu", "evaluate=[val]", "sample_length=1", *others]


@pytest.mark.parametrize("statement", ["import os; os.fork()", "import signal; signal.SIGHUP", "import fcntl"])
def test_what_windows_lacks_is_missing_here(tmp_path, statement):
    ended = python("windows", tmp_path, "-c", f"exec({statement!r}, {{'__name__': 'charlm.x'}})")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith(("AttributeError", "ModuleNotFoundError"))


@pytest.mark.slow
def test_a_run_and_its_text_need_nothing_that_only_posix_has(tmp_path, text_file):
    ended = python("windows", tmp_path, TRAIN, *settings(text_file, "trainer.max_steps=20", "hydra.run.dir=run"))
    assert (ended.code, ended.err) == (0, "")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    ended = python("windows", tmp_path, "-m", "charlm", "generate", "run", "--length", "9", "--device", "cpu")
    assert (ended.code, ended.err, len(ended.out)) == (0, "", 10)


@pytest.mark.slow
def test_a_sweep_spawns_its_jobs_where_there_is_no_fork(tmp_path, text_file):
    for name in ("random", "lightning", "multiprocessing", "charlm"):  # a folder's own files are no modules
        (tmp_path / f"{name}.py").write_text("open('code_was_run', 'w')\nraise SystemExit(70)")
    ended = python(
        "windows", tmp_path, TRAIN, "-m", *settings(text_file, "trainer.max_steps=20", "seed=1,2", "hydra.sweep.dir=s")
    )
    assert (ended.code, ended.err) == (0, "")
    assert "2 runs, by val loss" in ended.out
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert {*states(tmp_path)} == {"done"}
    for seed in (1, 2):
        log = (tmp_path / "s" / f"seed={seed}" / "terminal.log").read_text()
        assert "loss, nats per character" in log
    assert not (tmp_path / "code_was_run").exists()


def test_a_file_is_replaced_as_soon_as_nobody_reads_it(tmp_path, monkeypatch):
    rename, refusals = os.replace, [PermissionError(), PermissionError()]  # as of Windows

    def refusing(source: str, target: Path) -> None:
        if refusals:
            raise refusals.pop()
        rename(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not refusals


ASKING = """import os
from charlm import errors, schema
from charlm.sweep import processes
if __name__ == "__main__":
    print(processes.ask(os.path.join, "a", "b"), processes.ask(os.getcwd), processes.ask(os.getenv, "PYTHONSAFEPATH"))
    print(processes.ask(os.getppid) == os.getpid())
    for question in [(schema.check, {"lrr": 1}), (os._exit, 3)]:
        try:
            processes.ask(*question)
        except errors.InputError as error:
            print(error)
"""


@pytest.mark.parametrize("platform", ["windows", pytest.param("macos", marks=pytest.mark.slow)])
def test_a_question_is_answered_by_a_spawned_process(tmp_path, platform):
    (tmp_path / "asking.py").write_text(ASKING)
    ended = python(platform, tmp_path, "asking.py")
    assert (ended.code, ended.err) == (0, "")
    answers, own, mistake, nothing = ended.out.splitlines()
    assert (answers, own) == (f"a/b {tmp_path} None", "True")
    assert mistake.startswith("there is no setting lrr")
    assert nothing == "_exit has no answer: its process failed or was killed"


@pytest.mark.slow
def test_resuming_repeating_and_reading_runs_need_nothing_that_only_posix_has(tmp_path, text_file):
    common = settings(text_file, "trainer.max_steps=20")
    charlm = ["-m", "charlm"]
    for command in (
        [TRAIN, *common, "stop_at=10", "hydra.run.dir=run"],
        [TRAIN, "resume=run"],
        [TRAIN, "rerun=run", "seed=2", "hydra.run.dir=again"],
        [*charlm, "evaluate", "run", "--device", "cpu"],
        [*charlm, "checkpoint", "run", "--export", "w.safetensors"],
        [*charlm, "reproduce", "run"],
        [*charlm, "report", "."],
        [TRAIN, "-m", *common, "seed=1", "hydra.sweep.dir=s"],
        [TRAIN, "resume=s", "seed=1,2"],
    ):
        ended = python("windows", tmp_path, *command)
        assert ended.code == 0, (command, ended.err)
    assert {*states(tmp_path)} == {"done"}
    assert len(states(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_mistake_in_a_sweep_is_one_line_hydra_errors_and_nothing_is_written(tmp_path, text_file, platform):
    ended = python(platform, tmp_path, TRAIN, "-m", *settings(text_file, "optimizer.lr=1,-1", "hydra.sweep.dir=s"))
    assert ended.code == 2
    assert ended.err.startswith("charlm: optimizer.lr=-1 is not possible")
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_spawned_job_that_fails_costs_only_itself(tmp_path, text_file, platform):
    place = tmp_path / "conf" / "callbacks"
    place.mkdir(parents=True)
    (place / "fault.yaml").write_text("fault:\n  _target_: tests.test_sweep.Fault\n  kind: none\n")
    command = ["-m", f"--config-dir={tmp_path / 'conf'}", "callbacks=[default,fault]", "hydra.launcher.timeout=0.5"]
    kinds = {
        "none": "finished",
        "raise": "failed: RuntimeError: a defect",
        "kill": "failed: killed by SIGKILL",
        "term": "failed: stopped by SIGTERM",
        "hang": "failed: no end within 0.5 minutes",
    }
    command += [f"callbacks.fault.kind={','.join(kinds)}", "trainer.max_steps=300", "hydra.sweep.dir=s"]
    ended = python(platform, tmp_path, TRAIN, *command, *settings(text_file), timeout=280)
    assert ended.code == 1
    assert ended.err.startswith("charlm: 4 of 5 jobs failed")
    assert ended.err.count("\n") == 1
    rows = csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())
    assert {row["callbacks.fault.kind"]: row["status"].partition(";")[0] for row in rows} == kinds
    assert "RuntimeError: a defect" in (tmp_path / "s" / "kind=raise" / "terminal.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_spawned_jobs_save_and_end_with_their_sweep(tmp_path, text_file, platform, number):
    with sweeping(tmp_path, text_file, env=environment(platform)) as sweep:
        until(lambda: training(tmp_path), "training")
        everything = below(sweep.pid)
        sweep.send_signal(number)
        if number == signal.SIGKILL:
            sweep.wait()
        else:
            _, err = sweep.communicate(timeout=WAITS)
            assert (sweep.returncode, err.count("\n")) == (128 + number, 1), err
            assert "stopped with 0 of 3 jobs done" in err
            assert {*states(tmp_path)} == {"waiting"}
        until(lambda: gone(everything), "the end of all processes")
    records = [json.loads(file.read_text()) for file in (tmp_path / "s").glob("*/run.json")]
    assert {(record["status"], record["reason"]) for record in records} == {("stopped", "SIGTERM")}
