"""Commands as real processes, and small texts to train on."""

import itertools
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Neither a busy machine nor chance is a reason to fail: no deadline, and the same examples each time.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# Tests run in parallel: a thread each, also for the commands that they start.
os.environ["OMP_NUM_THREADS"] = "1"
# The width of the terminal, here and in all commands.
os.environ["COLUMNS"] = "120"
# Matplotlib lists all fonts once, which takes seconds, and not again in each process whose caches a test moves.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))

# A shell that starts pytest in the background has it ignore Ctrl-C, nohup has it ignore SIGHUP, and processes inherit
# what is ignored. Tests begin with what a terminal would give them.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_DFL)

ROOT = Path(__file__).parent.parent

# Tests hide GPUs, so that they are the same on every machine; those of tests/test_gpu.py ask for one.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ends", type=int, default=100, help="how often the fault harness ends runs (default 100)")
    parser.addoption("--speed", choices=["auto", "off"], default="auto", help="how runs of the tests take their steps")


def pytest_configure(config: pytest.Config) -> None:
    global speed
    speed = config.getoption("--speed")


speed = "auto"


def with_speed(argv: list[str]) -> list[str]:
    """A command of train.py with the `--speed` of the test session; one that goes on has its own."""
    of_its_own = ("speed", "resume=", "rerun=", "--")
    asked = speed != "auto" and argv[0].endswith("train.py") and not any(a.startswith(of_its_own) for a in argv)
    return [*argv, f"speed={speed}"] if asked else argv


# The fork server pays for these imports once, so that each command costs a fresh process but not its start-up.
PRELOAD = [
    *("pytest", "hypothesis", "tensorboard.backend.event_processing.event_accumulator"),  # which its functions import
    *("charlm.sweep.preload", "charlm.cli"),  # what jobs are forked with, and so what commands need
]


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def become(
    argv: list[str], cwd: str, env: dict[str, str], out: str | Connection, err: str, server: str | None = None
) -> None:
    """In the command's own process: take its place.

    Args:
        out: a file, or the end of a pipe.
        server: the address of the tests' fork server, which also forks the jobs of sweeps.
    """
    if server:
        use_server(server)
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


def use_server(address: str) -> None:
    """Let a sweep in this process fork its jobs from the tests' server, which has imported what these need.

    A sweep's own server, which takes seconds of imports, is tested with sweeps as real commands.
    """
    from charlm.sweep import processes

    module: Any = multiprocessing.forkserver
    module.ensure_running = module._forkserver.ensure_running = lambda: None
    module._forkserver._forkserver_address = address
    processes.Server.stop = lambda self: None  # type: ignore[method-assign]


class Process:
    """A command at work in a process of its own, with its output in files."""

    number = itertools.count()

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        logs = cwd / ".command" / str(next(self.number))
        logs.mkdir(parents=True)
        self.command, self.out, self.err = " ".join(argv), logs / "out", logs / "err"
        multiprocessing.forkserver.ensure_running()
        server = multiprocessing.forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
        arguments = (argv, str(cwd), env, str(self.out), str(self.err), server)
        self.process = context.Process(target=become, args=arguments)
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    def printed(self, file: Path) -> str:
        return file.read_text() if file.exists() else ""

    def line(self, start: str, timeout: float = 120) -> str:
        """Wait for a whole line of standard output that begins with `start`."""
        until = time.monotonic() + timeout
        while True:
            at_work = self.process.is_alive()
            for line in self.printed(self.out).splitlines(keepends=True):
                if line.startswith(start) and line.endswith("\n"):
                    return line
            if not at_work or time.monotonic() > until:
                pytest.fail(f"no line {start!r} from {self}")
            time.sleep(0.02)

    def end(self, timeout: float = 120) -> Ended:
        """Wait for its end."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            pytest.fail(f"no end within {timeout} s of {self}")
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, self.printed(self.out), self.printed(self.err))

    def __str__(self) -> str:
        return f"{self.command}\n{self.printed(self.out)}\n{self.printed(self.err)}"

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_command(argv: list[str], cwd: Path, env: dict[str, str], timeout: float) -> Ended:
    return Process(with_speed(argv), cwd, env).end(timeout)


Command = Callable[..., Ended]


def no_corpus(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine without corpora and GPUs."""
    cache = str(tmp_path / "cache")
    return {"CHARLM_DATA": "", "XDG_CACHE_HOME": cache, "CHARLM_CACHE": "", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def train(tmp_path: Path) -> Command:
    """`python train.py ...` in a folder of the test's own, on a machine without corpora and GPUs."""

    def run(*overrides: str, timeout: float = 120, **env: str) -> Ended:
        return run_command([str(ROOT / "train.py"), *overrides], tmp_path, no_corpus(tmp_path) | env, timeout)

    return run


@pytest.fixture
def charlm(tmp_path: Path) -> Command:
    """`charlm ...` in the test's own folder."""

    def run(*arguments: str, timeout: float = 120, **env: str) -> Ended:
        return run_command(["charlm", *arguments], tmp_path, env, timeout)

    return run


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """Call the function behind a command in the test's own process and folder, and restore what it changes."""
    import torch
    from hydra.core.hydra_config import HydraConfig

    from charlm.checkpoint import initial
    from charlm.data.corpora import load_corpus
    from charlm.errors import one_line_errors
    from charlm.run import folder

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(folder, "claimed", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)

    def run(function: Callable[[], object], argv: list[str], **env: str) -> Ended:
        for name, value in {"HYDRA_FULL_ERROR": "1", **env}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", argv)
        load_corpus.cache_clear()  # its key is a path, and each test has other files
        initial.cache_clear()
        capfd.readouterr()
        code: int | str | None = 0
        try:
            with one_line_errors():
                function()
        except SystemExit as ended:
            code = ended.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, *capfd.readouterr())

    yield run
    logger.setLevel(level)


def check_command(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Check the command line of a run or of a sweep, as train.py does."""
    from charlm.preflight.command import check_command
    from charlm.sweep import plan

    return (plan.check_command if plan.is_sweep(argv) else check_command)(argv, config_dir)


@pytest.fixture
def check(in_process: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The checks of `python train.py ...` without a process, for commands that end there."""
    from charlm.preflight.command import check_command
    from charlm.sweep import processes
    from charlm.sweep.command import sweep
    from charlm.sweep.plan import is_sweep

    # A sweep runs its last checks in another process, and Hydra configures the logging of this one.
    monkeypatch.setattr(processes, "ask", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(processes, "start", lambda: None)
    monkeypatch.setattr("hydra._internal.hydra.configure_log", lambda *_: None)

    def run(*overrides: str, timeout: float = 0, **env: str) -> Ended:
        argv = ["train.py", *overrides]
        begin = sweep if is_sweep(argv) else check_command
        return in_process(lambda: begin(argv, ROOT / "conf"), argv, **no_corpus(tmp_path), **env)

    return run


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """A running `python train.py ...`."""
    begun: list[Process] = []

    def run(*overrides: str, **env: str) -> Process:
        begun.append(Process([str(ROOT / "train.py"), *overrides], tmp_path, no_corpus(tmp_path) | env))
        return begun[-1]

    yield run
    for process in begun:
        process.kill()


@pytest.fixture
def call(in_process: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`charlm ...` without a process of its own, for commands that change nothing in theirs."""
    from charlm.cli import main
    from charlm.errors import InputError
    from charlm.run import reproduce

    def train(command: list[str], *_: object) -> None:
        """Stand in for the function that starts a new Python, whose imports take longer than a small run."""
        ended = run_command(command[1:], tmp_path, {}, 120)
        if ended.code:
            raise InputError(ended.err)

    monkeypatch.setattr(reproduce, "train", train)

    def run(*arguments: str, timeout: float = 0, **env: str) -> Ended:
        return in_process(main, ["charlm", *arguments], **env)

    return run


@pytest.fixture(scope="session")
def prose() -> str:
    """Twenty thousand characters of English, from the text that Python carries."""
    from charlm.data.corpora import load_corpus

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
    settings.append("evaluate=[train,val]")
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
