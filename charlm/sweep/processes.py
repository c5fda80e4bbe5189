"""The processes of a sweep: its jobs, and the checks that need PyTorch, which the sweep itself does without.

On Linux, multiprocessing's fork server imports once for all jobs. The sweep starts the server first, and composes its
jobs while the server imports. Jobs end with the server and with the sweep. A server that multiprocessing would start
again after its death counts as dead: it has imported nothing, and what is forked from it ends at once.

Where there is no fork server (Windows), or multiprocessing itself prefers to spawn (macOS), each job is a new Python
that imports for itself. Either way a job inherits environment and working directory from the sweep and nothing else: no
threads, signal handlers, CUDA context or Hydra state.

Windows has no process groups and no signals between processes, so there
- a request to save and end goes through the job's pipe. Only the job itself receives it, and its main thread handles it
  between two Python instructions;
- processes that a job started outlive a job that is killed;
- Ctrl-C in the terminal also interrupts a job in its first second, before it runs `begin`, and what a job started.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from charlm.errors import InputError
from charlm.home import PACKAGE
from charlm.system import posix

PRELOAD = "charlm.sweep.preload"  # the module that the server imports
SWEEP = "CHARLM_SWEEP"  # variable with the process ID of the server's sweep
ROOT = PACKAGE.parent  # what a job puts on its path
SECONDS_BETWEEN_LOOKS = 0.5  # a job checks this often that its sweep and its server are alive
SECONDS_FOR_A_CODE = 2.0  # in which the server reports how a process ended
PATIENCE = 40.0  # seconds that a job leaves its sweep to stop it, after the server died; longer than the sweep takes
GRACE = 5.0  # seconds to save in, for a job whose sweep is gone
SIGNALS = posix.signals("SIGINT", "SIGTERM", "SIGHUP")  # for the sweep: it stops its jobs by itself
METHODS = get_all_start_methods()  # the first is the default, which is to spawn on macOS, where forks can crash
FORKS = "forkserver" in METHODS and METHODS[0] != "spawn"

context: Any = get_context("forkserver" if FORKS else "spawn")
server: "Server | Spawner | None" = None


class ServerDied(InputError):
    """The fork server was killed, or ran out of memory."""

    code = 1

    def __init__(self) -> None:
        super().__init__("the fork server died, so all jobs were stopped: run the same command again to continue")


class Server:
    """The fork server, and a child of it whose early death shows that the server died.

    Raises:
        ServerDied: if the server is dead when a method needs it.
    """

    def __init__(self) -> None:
        from multiprocessing import forkserver

        context.set_forkserver_preload([PRELOAD])
        with starting():
            forkserver.ensure_running()
        context.set_forkserver_preload([])  # so that `begin` recognises a restarted server
        self.guard: Child | None = None
        self.start = threading.Thread(target=self.start_guard, daemon=True)  # it waits for the end of the imports
        self.start.start()

    def start_guard(self) -> None:
        with suppress(ServerDied):
            self.guard = Child(self, idle)

    def sentinels(self) -> list[int]:
        """Wait until all is imported. Returns what becomes ready when the server dies, for `wait`."""
        self.start.join()
        if self.guard is None or self.died():
            raise ServerDied
        return [self.guard.process.sentinel]

    def launch(self, process: Any, connection: Connection, theirs: Connection) -> None:
        """Start a process, and wait until it leads a group of its own."""
        try:
            process.start()
            theirs.close()  # so that its end is an EOFError
            self.pid: int = connection.recv()
        except (EOFError, OSError):
            raise ServerDied from None

    def died(self) -> bool:
        return self.guard is not None and bool(wait([self.guard.process.sentinel], 0))

    def stop(self) -> None:
        """End the server, also where it is stopped itself. While it still imports, it ends with this process."""
        if self.guard is not None and not self.died():
            os.kill(self.pid, signal.SIGKILL)


class Spawner:
    """Starts jobs by spawning, where there is no fork server."""

    def sentinels(self) -> list[int]:
        return []

    def launch(self, process: Any, *_: Connection) -> None:
        """Start a process without what multiprocessing does first: importing the main module, which takes seconds."""
        main = vars(sys.modules["__main__"])
        file = main.pop("__file__", None)
        try:
            with starting():
                process.start()
        finally:
            if file is not None:
                main["__file__"] = file

    def died(self) -> bool:
        return False

    def stop(self) -> None:
        pass


@contextmanager
def starting() -> Iterator[None]:
    """Set what a new Python inherits: the path of charlm, and blocked signals, which `begin` unblocks.

    That Python is `python -c`: it must find this charlm, and no module among the files of the current folder. Signals
    such as Ctrl-C are for the sweep alone.
    """
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    inherited = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", SWEEP: str(os.getpid())}
    with environment(**inherited), posix.blocked(SIGNALS):
        yield


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables temporarily."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Child:
    """A process that the sweep started.

    Args:
        target: called in that process with one end of a pipe, whose other end is `connection`, and with `arguments`.

    Raises:
        ServerDied: if the server is dead, or was started again.
    """

    def __init__(self, server: Server | Spawner, target: Callable[..., None], *arguments: Any, daemon: bool = True):
        self.connection, theirs = context.Pipe()
        given = (theirs, dict(os.environ), target, arguments)
        self.process = context.Process(target=begin, args=given, daemon=daemon)
        try:
            server.launch(self.process, self.connection, theirs)
        finally:
            theirs.close()  # the process now holds the only copy, so that its end closes the pipe
        self.server, self.alive = server, True
        self.exitcode: int | None = None  # None also if the server cannot report it

    def is_alive(self) -> bool:
        """Return whether the process runs, also if its server is stopped or dead."""
        dead = self.server.died()
        if self.alive and wait([self.connection, *([] if dead else [self.process.sentinel])], 0):
            self.alive = False
            if not dead:
                self.process.join(SECONDS_FOR_A_CODE)
                self.exitcode = self.process.exitcode
        return self.alive

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def terminate(self) -> None:
        """Make the process and its children save and exit."""
        if posix.GROUPS:
            self.end(posix.terminate_group, self.process.terminate)
        else:
            with suppress(OSError):  # it has ended
                self.connection.send(None)  # which `follow` receives

    def kill(self) -> None:
        """Kill the process and its children."""
        self.end(posix.kill_group, self.process.kill)

    def end(self, group: Callable[[int], None], alone: Callable[[], None]) -> None:
        if posix.GROUPS:
            with suppress(ProcessLookupError, PermissionError):  # macOS forbids to end zombies
                return group(self.pid)
        if not FORKS:  # a spawned process leads no group before it runs `begin`
            alone()


def start() -> Server | Spawner:
    """Start the server, if there is none yet."""
    global server
    server = server or (Server() if FORKS else Spawner())
    return server


def stop() -> None:
    """End the server, if there is one."""
    global server
    if server:
        server.stop()
    server = None


def launch(target: Callable[..., None], *arguments: Any, daemon: bool = True) -> Child:
    """Start a process, as soon as the server has imported all.

    Raises:
        ServerDied: if the server is dead.
    """
    start().sentinels()
    return Child(start(), target, *arguments, daemon=daemon)


def wait_for(children: Sequence[Child], seconds: float) -> None:
    """Wait until one of the processes ends, or for a number of seconds.

    Raises:
        ServerDied: as soon as the server is dead.
    """
    wait([*start().sentinels(), *(child.connection for child in children)], seconds)
    if start().died():
        raise ServerDied


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that may import PyTorch, and return its result.

    Raises:
        InputError: that the function raises, or if its process dies.
        ServerDied: if the server does.
    """
    child = launch(answer, function, *arguments)
    wait([child.connection, child.process.sentinel, *start().sentinels()])
    if start().died():
        raise ServerDied
    try:
        if not child.connection.poll():
            raise EOFError
        returned, error = child.connection.recv()
    except (EOFError, OSError):
        raise InputError(f"{function.__name__} has no answer: its process failed or was killed") from None
    if error:
        raise error
    return returned


# In the processes


def begin(
    connection: Connection, variables: dict[str, str], target: Callable[..., None], arguments: Sequence[Any]
) -> None:
    """Run a target in this process, with the environment of the sweep; it ends with the server and with the sweep."""
    if FORKS and PRELOAD not in sys.modules:  # multiprocessing has started the server again
        os._exit(1)
    os.environ.clear()
    os.environ.update(variables)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    posix.lead_group()  # what it starts ends with it, and Ctrl-C is for the sweep
    posix.unblock(SIGNALS)
    threading.Thread(target=follow, args=(os.getppid(), connection), daemon=True).start()
    if FORKS:
        send(connection, os.getppid())
    target(connection, *arguments)


def send(connection: Connection, what: Any) -> None:
    """Send something to the sweep; exit silently if the sweep is gone."""
    try:
        connection.send(what)
    except OSError:
        os._exit(1)


def follow(parent: int, connection: Connection) -> None:
    """End this process and what it started, once the sweep or the server is gone, or when the sweep requests it."""
    sweep = parent_process()
    assert sweep is not None
    sources: list[Any] = [sweep.sentinel] if posix.GROUPS else [sweep.sentinel, connection]
    while os.getppid() == parent and sweep.is_alive():
        if connection in wait(sources, SECONDS_BETWEEN_LOOKS):
            sources.remove(connection)  # there is one request at most
            with suppress(EOFError, OSError):
                connection.recv()
                posix.terminate_group()
    posix.terminate_group()
    until = time.monotonic() + PATIENCE
    while sweep.is_alive() and time.monotonic() < until:
        sweep.join(SECONDS_BETWEEN_LOOKS)
    time.sleep(GRACE)
    posix.kill_group()


def idle(connection: Connection) -> None:
    """Wait for the end of the sweep."""
    with suppress(EOFError, OSError):
        connection.recv()


def answer(connection: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    """Send the result of a function, or its InputError."""
    returned, mistake = None, None
    try:
        returned = function(*arguments)
    except InputError as error:
        mistake = error
    send(connection, (returned, mistake))
