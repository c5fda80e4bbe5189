"""Standard output and error may be closed, full, gone or of a narrow encoding: no run is lost by it."""

import fcntl
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from charlm import checkpoint, terminal
from charlm.errors import one_line_errors
from charlm.run.folder import SWEEP_JSON
from charlm.run.results import LOSSES, RESULTS, read_results
from charlm.sweep import ledger
from charlm.system import streams
from tests.conftest import PRELOAD, ROOT, become

TRAIN = str(ROOT / "train.py")
TINY = ["trainer=cpu", "threads=1", "data=text", "trainer.max_steps=40", "evaluate=[val]", "sample_length=20"]
# So many lines that a pipe of one page cannot hold them: a run that nobody reads waits.
TALKATIVE = ["trainer.max_steps=1500", "speed.steps_per_execution=10", "callbacks.progress.seconds_between_lines=1e-9"]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def finished(folder: Path) -> bool:
    return record(folder)["status"] == "finished" and read_results(folder) is not None


@contextmanager
def started(argv: list[str], cwd: Path, out: str | Connection) -> Iterator[Any]:
    """A command as a process, with its standard error in the file `err`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    env = {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    process = context.Process(target=become, args=(argv, str(cwd), env, out, str(cwd / "err")))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def end_of(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, "the process did not end"
    code: int = process.exitcode
    return code


@contextmanager
def read_in_part(argv: list[str], cwd: Path, until: str) -> Iterator[Any]:
    """A command whose output is read as far as a line that begins with `until`, as by `| head`."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    with started(argv, cwd, writer) as process:
        writer.close()
        with open(reader.fileno(), closefd=False) as lines:
            assert any(line.startswith(until) for line in lines), (cwd / "err").read_text()
        reader.close()
        yield process


@pytest.mark.parametrize("out", ["/dev/full", pytest.param("closed", marks=pytest.mark.slow)])
def test_a_run_finishes_whatever_becomes_of_its_output(tmp_path, text_file, out):
    argv = [TRAIN, *TINY, f"data.path={text_file}", "hydra.run.dir=run"]
    if out == "closed":
        shell = 'exec "$@" <&- >&- 2>&-'
        assert (
            subprocess.run(["sh", "-c", shell, "sh", sys.executable, *argv], cwd=tmp_path, check=False).returncode == 0
        )
    else:
        with started(argv, tmp_path, out) as process:
            assert end_of(process) == 0
        assert (tmp_path / "err").read_text() == ""
    assert finished(tmp_path / "run")


def test_a_terminal_that_vanishes_does_not_end_a_run(tmp_path, text_file):
    main, terminal = os.openpty()
    argv = [TRAIN, *TINY, *TALKATIVE, f"data.path={text_file}", "hydra.run.dir=run"]
    with started(argv, tmp_path, os.ttyname(terminal)) as process:
        wait([main, process.sentinel], 60)
        os.close(terminal)
        os.close(main)
        assert end_of(process) == 0
    assert finished(tmp_path / "run")


def test_a_pipe_that_closes_during_training_stops_the_run_and_resume_gives_the_undisturbed_one(
    tmp_path, train, text_file
):
    settings = [*TINY, *TALKATIVE, f"data.path={text_file}"]
    with read_in_part([TRAIN, *settings, "hydra.run.dir=cut"], tmp_path, "step") as process:
        assert end_of(process) == 141
    found = record(tmp_path / "cut")
    assert (found["status"], found["reason"]) == ("stopped", "SIGPIPE")
    assert 0 < found["step"] < 1500
    said = (tmp_path / "err").read_text()
    step = f"{found['step']:,}"
    assert said == f"charlm: stopped by a closed pipe after step {step}; go on with:\n  python train.py resume=cut\n"
    assert train("resume=cut").code == train(*settings, "hydra.run.dir=whole").code == 0
    kept, whole = (tmp_path / name for name in ("cut", "whole"))
    assert (kept / LOSSES).read_bytes() == (whole / LOSSES).read_bytes()
    weights = [checkpoint.read(place / "checkpoints" / "last.ckpt")["state_dict"] for place in (kept, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])
    results = [json.loads((place / RESULTS).read_text()) for place in (kept, whole)]
    exact = [{name: figure for name, figure in found.items() if "second" not in name} for found in results]
    assert exact[0] == exact[1]


def test_a_pipe_that_closes_after_training_leaves_a_finished_run(tmp_path, text_file):
    argv = [TRAIN, *TINY, f"data.path={text_file}", "hydra.run.dir=run"]
    with read_in_part(argv, tmp_path, "step 40/40") as process:
        assert end_of(process) == 141
    assert (tmp_path / "err").read_text() == ""
    assert finished(tmp_path / "run")


@pytest.mark.slow
def test_a_sweep_whose_pipe_closes_stops_and_resume_finishes_it(tmp_path, train, text_file):
    reader, writer = multiprocessing.Pipe(duplex=False)
    os.set_blocking(writer.fileno(), False)
    for size in (4096, 1):  # the sweep waits with its first line until somebody reads, or nobody does any more
        while True:
            try:
                os.write(writer.fileno(), b"." * size)
            except BlockingIOError:
                break
    os.set_blocking(writer.fileno(), True)
    jobs = ["seed=1,2,3", "hydra.launcher.n_jobs=1", "hydra.launcher.pack=1", "hydra.sweep.dir=sweep"]
    with started([TRAIN, "-m", *TINY, f"data.path={text_file}", *jobs], tmp_path, writer) as process:
        writer.close()
        first = tmp_path / "sweep" / "seed=1" / RESULTS
        while not first.exists():
            process.join(0.05)
            assert process.is_alive(), (tmp_path / "err").read_text()
        reader.close()
        assert end_of(process) == 141
    said = (tmp_path / "err").read_text()
    assert said == "charlm: stopped with 1 of 3 jobs done; the rest: python train.py resume=sweep\n"
    states = ledger.read(tmp_path / "sweep" / SWEEP_JSON)["jobs"]
    assert [states[f"seed={n}"]["state"] for n in (1, 2, 3)] == ["done", "waiting", "waiting"]
    assert (tmp_path / "sweep" / ledger.TABLE).is_file()
    ended = train("resume=sweep")
    assert ended.code == 0, ended.err
    assert all(finished(tmp_path / "sweep" / f"seed={n}") for n in (1, 2, 3))


@pytest.mark.parametrize(
    "command",
    [
        ["charlm", "generate", "RUN", "--length", "100000000"],
        ["charlm", "generate", "RUN", "--length", "1"],
        ["charlm", "evaluate", "RUN"],
        ["charlm", "checkpoint", "RUN", "--json"],
        ["charlm", "report", "RUN", "--html", "page.html"],
        ["charlm", "--help"],
        [TRAIN, "--cfg", "job"],
        [TRAIN, "resume=RUN"],
    ],
    ids=" ".join,
)
def test_a_command_that_nobody_reads_ends_like_one_that_sigpipe_ends(trained, tmp_path, command):
    reader, writer = multiprocessing.Pipe(duplex=False)
    reader.close()
    with started(
        [str(trained) if a == "RUN" else a.replace("RUN", str(trained)) for a in command], tmp_path, writer
    ) as process:
        writer.close()
        assert end_of(process) == 141
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.slow
def test_a_run_trains_and_reports_where_the_encoding_is_ascii_and_output_has_no_buffer(tmp_path, text_file):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "120"}
    argv = [sys.executable, "-u", TRAIN, *TINY, f"data.path={text_file}", "hydra.run.dir=run"]
    ended = subprocess.run(argv, cwd=tmp_path, env=os.environ | ascii_only, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b" +- " in ended.stdout.replace(b"\n", b"")
    assert finished(tmp_path / "run")
    assert " ± " in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


def test_characters_that_an_encoding_lacks_are_spelled_in_others():
    streams.prepare()
    for encoding in ("ascii", "latin-1", "cp1252"):
        raw = io.BytesIO()
        with io.TextIOWrapper(raw, encoding=encoding, errors=streams.HANDLER) as stream:
            stream.write("1 ± 2 ≈ 3… ─━┐│ 語\ud800.")
            stream.flush()
            told = raw.getvalue().decode(encoding)
        spelled = told if encoding == "ascii" else told.replace("±", "+-").replace("…", "...")
        assert spelled == "1 +- 2 ~ 3... ---| ??."
    assert "a lone surrogate \ud800".encode("utf-8", streams.HANDLER) == b"a lone surrogate ?"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", streams.HANDLER)


def test_a_full_pipe_that_is_non_blocking_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    size = 2 * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    if os.fork() == 0:
        os.close(reader)
        with streams.Unfailing(writer, "w") as raw, io.BufferedWriter(raw) as stream:
            stream.write(b"." * size)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        assert len(stream.read()) == size
    os.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_any_program_with_one_line(number, code, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        signal.raise_signal(number)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"charlm: stopped by {number.name} before the end\n"
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_line_errors():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_long_work_tells_in_a_pipe_how_far_it_is(capsys, monkeypatch):
    times = iter([0.0, 6.0, 7.0, 12.0, 18.0, 20.0])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with terminal.tracked("evaluating") as report:
        for done in (1, 2, 3, 3, 4):  # no line without progress
            report(done, 4)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["evaluating: 25%, 18 s left", "evaluating: 75%, 4 s left"]
