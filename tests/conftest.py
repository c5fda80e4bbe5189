"""Commands as real processes, and small texts to train on."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import settings

# A machine that is busy with other tests is no reason to fail.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# Tests run beside one another: a thread each, also for the commands that they start.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ends", type=int, default=100, help="how often the fault harness ends runs (default 100)")


# The fork server pays for these imports once, so that each command costs a fresh process but not its start-up.
PRELOAD = ["lightning", "charlm.callbacks", "charlm.cli", "charlm.evaluate", "charlm.logger", "charlm.preflight"]


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def become(argv: list[str], cwd: str, env: dict[str, str], out: str | Connection, err: str) -> None:
    """In the command's own process: take its place. `out`: a file, or the end of a pipe."""
    for place, descriptor in ((out, 1), (err, 2)):
        opened = os.open(place, os.O_WRONLY | os.O_CREAT) if isinstance(place, str) else os.dup(place.fileno())
        os.dup2(opened, descriptor)
        os.close(opened)
    if not isinstance(out, str):
        out.close()
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = argv
    if argv[0] == "charlm":
        from charlm.cli import main

        main()
    else:
        sys.path.insert(0, str(Path(argv[0]).parent))  # as Python does for a script
        runpy.run_path(argv[0], run_name="__main__")


def run_command(argv: list[str], cwd: Path, env: dict[str, str], timeout: float) -> Ended:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    logs = cwd / ".command"
    logs.mkdir(exist_ok=True)
    out, err = logs / "out", logs / "err"
    for log in (out, err):
        log.unlink(missing_ok=True)
    process = context.Process(target=become, args=(argv, str(cwd), env, str(out), str(err)))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail(f"{' '.join(argv)} did not end within {timeout} s:\n{out.read_text()}\n{err.read_text()}")
    assert process.exitcode is not None
    return Ended(process.exitcode, out.read_text(), err.read_text())


Command = Callable[..., Ended]


@pytest.fixture
def train(tmp_path: Path) -> Command:
    """`python train.py ...` in a folder of the test's own, on a machine where no corpus lies about."""

    def run(*overrides: str, timeout: float = 120, **env: str) -> Ended:
        alone = {
            "CHARLM_DATA": "",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "120",
        }
        return run_command([str(ROOT / "train.py"), *overrides], tmp_path, alone | env, timeout)

    return run


@pytest.fixture
def charlm(tmp_path: Path) -> Command:
    """`charlm ...` in the test's own folder."""

    def run(*arguments: str, timeout: float = 120, **env: str) -> Ended:
        return run_command(["charlm", *arguments], tmp_path, {"COLUMNS": "120"} | env, timeout)

    return run


@pytest.fixture(scope="session")
def prose() -> str:
    """Twenty thousand characters of English, from the text that Python carries."""
    from charlm.data.corpus import load_corpus

    return load_corpus("pydoc").text[:20_000]


@pytest.fixture
def text_file(tmp_path: Path, prose: str) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text(prose, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    """The folder of a short run that has ended, for tests that only read it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prose.txt").write_text(prose, encoding="utf-8")
    settings = ["data=text", f"data.path={folder / 'prose.txt'}", "trainer.max_steps=20", "hydra.run.dir=run"]
    ended = run_command([str(ROOT / "train.py"), *settings, "trainer=cpu"], folder, {}, timeout=120)
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """Tiny Shakespeare, where it is at hand: no test goes to the network."""
    folder = os.environ.get("CHARLM_DATA")
    file = Path(folder, "tinyshakespeare", "input.txt") if folder else None
    if file is None or not file.is_file():
        pytest.skip("Tiny Shakespeare is not at hand: set CHARLM_DATA to a folder with tinyshakespeare/input.txt")
    return file.read_text(encoding="utf-8")
