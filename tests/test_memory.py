"""A failed allocation is one line on the terminal: how much was requested, what the limit is, what to change."""

import errno
import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from charlm.errors import InputError, OutOfMemory, memory_errors, one_line_errors, out_of_memory
from charlm.run import record
from charlm.system import memory
from tests.conftest import PRELOAD, ROOT, Ended, become

TINY = ["trainer=cpu", "threads=1", "data=text", "trainer.max_steps=2", "evaluate=[val]", "sample_length=1"]
HEADROOM = 2**31  # bytes that a command may take on top of its imports


def become_limited(headroom: int, *arguments: object) -> None:
    """In the command's own process: take its place, with an end to its memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + headroom
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    become(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def limited(tmp_path: Path) -> Callable[..., Ended]:
    """Run a command in the test's folder, with `HEADROOM` bytes of memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def run_limited(*argv: str) -> Ended:
        out, err = tmp_path / "out", tmp_path / "err"
        for file in (out, err):
            file.unlink(missing_ok=True)
        env = {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "CHARLM_CACHE": str(tmp_path / "cache")}
        arguments = (HEADROOM, [*argv], str(tmp_path), env, str(out), str(err))
        process = context.Process(target=become_limited, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return Ended(process.exitcode, out.read_text(), err.read_text())

    return run_limited


def one_line(ended: Ended) -> str:
    """Return the only line on standard error, which is about memory."""
    assert ended.code == 1, ended.err
    assert ended.err.startswith("charlm: out of memory")
    assert ended.err.count("\n") == 1
    return ended.err


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A text of 2 GiB, which takes no room on the disk."""
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2**31)
    return tmp_path / "huge.txt"


def test_a_run_without_enough_memory_ends_with_one_line_and_keeps_the_traceback_in_its_log(
    limited, tmp_path, text_file
):
    settings = [*TINY, f"data.path={text_file}", "hydra.run.dir=run", "data.batch_size=1_100_000"]
    line = one_line(limited(str(ROOT / "train.py"), *settings))
    assert "iB requested, ulimit -v allows " in line
    assert "lower data.batch_size, data.block_size or the size of the model" in line
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], f"charlm: {record['reason']}\n") == ("failed", line)
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


SWEEP = pytest.param(["-m", "seed=1,2", "hydra.sweep.dir=sweep"], marks=pytest.mark.slow)


@pytest.mark.parametrize("sweep", [[], SWEEP], ids=["run", "sweep"])
def test_a_text_that_does_not_fit_is_found_before_anything_is_written(limited, tmp_path, huge, sweep):
    ended = limited(str(ROOT / "train.py"), *sweep[:1], *TINY, f"data.path={huge}", *sweep[1:], "hydra.run.dir=run")
    assert "ulimit -v allows" in one_line(ended)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_a_model_with_more_weights_than_addresses_is_refused(train, text_file, sweep):
    settings = ["model=gpt", "model.n_embd=10_000_000_000_000", "model.n_head=1"]
    assert "requested" in one_line(train(*sweep[:1], *TINY, f"data.path={text_file}", *sweep[1:], *settings))


def test_a_command_without_enough_memory_ends_with_one_line(limited, trained):
    line = one_line(limited("charlm", "generate", str(trained), "--num-samples", "1_000_000_000"))
    assert "ask for fewer samples" in line


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (10,) and data type int64"), "7.28 TiB"),
        (MemoryError("Unable to allocate 572. GiB for an array with shape (10,)"), "572 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."),
            "4.0 GiB",
        ),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), "more than 8 EiB"),
        (ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger than possible."), "more than 8 EiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total"), "20.00 GiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
)
def test_every_failed_allocation_is_told_with_what_was_requested(error, requested, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyError("what a library made of it") from error
    assert ended.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("charlm: out of memory")
    assert line.count("\n") == 1
    assert (f"({requested} requested" in line) if requested else ("requested" not in line)
    assert record.how(error) == ("failed", line.removeprefix("charlm: ").strip())


def test_the_memory_of_the_gpu_is_its_limit():
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which"
    assert memory.describe(torch.OutOfMemoryError(message)) == "2.00 GiB requested, the GPU has 79.10 GiB"


def test_what_libraries_raise_is_what_is_recognised():
    for allocate in (
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: torch.empty(2**40, 2**40, device="meta"),
        lambda: np.empty(2**60, np.uint8),
        lambda: np.empty((2**40, 2**40)),
        lambda: bytes(2**62),
    ):
        with pytest.raises(OutOfMemory), memory_errors():
            allocate()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), OSError(errno.ENOENT, "no file")])
def test_other_errors_are_not_about_memory(error):
    assert out_of_memory(error) is None
    with pytest.raises(type(error)), memory_errors():
        raise error


def test_a_mistake_that_names_memory_keeps_its_own_words(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise InputError("this model would be out of memory")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "charlm: this model would be out of memory\n"


def test_the_limit_is_the_smallest_of_all(monkeypatch, tmp_path):
    physical = memory.limit()
    assert physical is not None
    monkeypatch.setattr(memory, "cgroup_limits", lambda: [2**20, 2**62])
    assert memory.limit() == (2**20, "the cgroup allows")


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/a/b", "a/memory.max"), ("4:cpu,memory:/a/b", "memory/a/memory.limit_in_bytes"), ("0::/", "memory.max")],
)
def test_limits_of_control_groups_are_found_in_both_versions_and_in_parents(monkeypatch, tmp_path, line, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1048576\n")
    (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    (tmp_path / "proc").write_text(f"1:name=systemd:/\n{line}\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "proc")
    assert memory.cgroup_limits() == [2**20]


def test_sizes_are_told_in_units_that_one_reads():
    assert [memory.size(n) for n in (0, 1023, 1024, 3 * 2**29, 2**80)] == [
        *("0 bytes", "1,023 bytes", "1.0 KiB", "1.5 GiB"),
        "1,048,576.0 EiB",
    ]
