"""The process that the jobs of a sweep are forked from: multiprocessing's fork server, which imports once for all jobs.

A sweep's own process needs neither PyTorch nor Lightning. It starts the server first, and composes its jobs while the
server imports the modules that jobs need. Jobs inherit nothing else from the sweep: no threads, signal handlers, CUDA
context or Hydra state.

Jobs end with the server and with the sweep. A server that multiprocessing would start again after its death counts as
dead: it has imported nothing, and what is forked from it ends at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from charlm.errors import InputError

PRELOAD = "charlm.sweep.preload"  # the module that the server imports
ROOT = Path(__file__).parent.parent
SECONDS_BETWEEN_LOOKS = 0.5  # a job checks this often that its sweep and its server are alive
SECONDS_FOR_A_CODE = 2.0  # in which the server reports how a process ended
PATIENCE = 40.0  # seconds that a job leaves its sweep to stop it, after the server died; longer than the sweep takes
GRACE = 5.0  # seconds to save in, for a job whose sweep is gone
# Signals for the sweep: it stops its jobs by itself. Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

context = get_context("forkserver")
server: "Server | None" = None


class ServerDied(InputError):
    """The fork server was killed, or ran out of memory."""

    code = 1

    def __init__(self) -> None:
        super().__init__("the fork server died, so all jobs were stopped: run the same command again to continue")


class Server:
    """The fork server, from its start to its end, and a child of it that only its death ends early.

    Raises:
        ServerDied: if the server is dead when a method needs it.
    """

    def __init__(self) -> None:
        context.set_forkserver_preload([PRELOAD])
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # The server is `python -c`: it must find this charlm, and no module among the files of the current folder.
        with environment(PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1"):
            resource_tracker.ensure_running()  # or the server would start it, which unblocks signals
            # The mask is inherited, so that Ctrl-C and the like reach the sweep alone. Children unblock them first.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                forkserver.ensure_running()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        context.set_forkserver_preload([])  # so that `begin` recognises a restarted server
        self.guard: Child | None = None
        self.start = threading.Thread(target=self.start_guard, daemon=True)  # it waits for the end of the imports
        self.start.start()

    def start_guard(self) -> None:
        with suppress(ServerDied):
            self.guard = Child(None, idle)

    def ready(self) -> "Child":
        """Wait until all is imported. Returns the guard, whose parent is the server."""
        self.start.join()
        if self.guard is None or self.died():
            raise ServerDied
        return self.guard

    def died(self) -> bool:
        return self.guard is not None and bool(wait([self.guard.process.sentinel], 0))

    def stop(self) -> None:
        """End the server, also where it is stopped itself. While it still imports, it ends with this process."""
        if self.guard is not None and not self.died():
            os.kill(self.guard.parent, signal.SIGKILL)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables of the environment for a while."""
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
    """A process that is forked from the server, as the sweep sees it.

    Args:
        server: None for the guard.
        target: called in that process with one end of a pipe, whose other end is `connection`, and with `arguments`.

    Raises:
        ServerDied: if the server is dead, or was started again.
    """

    def __init__(self, server: Server | None, target: Callable[..., None], *arguments: Any, daemon: bool = True):
        if server:
            server.ready()
        self.connection, theirs = context.Pipe()
        given = (theirs, dict(os.environ), target, arguments)
        self.process = context.Process(target=begin, args=given, daemon=daemon)
        try:
            self.process.start()
            theirs.close()  # the process now holds the only copy, so that its end closes the pipe
            self.parent: int = self.connection.recv()
        except (EOFError, OSError):
            raise ServerDied from None
        finally:
            theirs.close()
        self.server, self.alive = server, True
        self.exitcode: int | None = None  # None also if the server cannot report it

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def is_alive(self) -> bool:
        """Return whether the process runs, also if its server is stopped or dead."""
        dead = self.server is None or self.server.died()
        if self.alive and wait([self.connection, *([] if dead else [self.process.sentinel])], 0):
            self.alive = False
            if not dead:
                self.process.join(SECONDS_FOR_A_CODE)
                self.exitcode = self.process.exitcode
        return self.alive


def start() -> Server:
    """Start the server, if there is none yet."""
    global server
    server = server or Server()
    return server


def stop() -> None:
    """End the server, if there is one."""
    global server
    if server:
        server.stop()
    server = None


def wait_for(children: Sequence[Child], seconds: float) -> None:
    """Wait until one of the processes ends, or so long.

    Raises:
        ServerDied: as soon as the server is dead.
    """
    guard = start().ready()
    wait([guard.process.sentinel, *(child.connection for child in children)], seconds)
    if start().died():
        raise ServerDied


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns where all is imported, in a process of its own.

    Raises:
        InputError: that the function raises, or if its process dies.
        ServerDied: if the server does.
    """
    child = Child(start(), answer, function, *arguments)
    guard = start().ready()
    while not child.connection.poll():
        wait([child.connection, guard.process.sentinel])
        if start().died():
            raise ServerDied
    try:
        returned, error = child.connection.recv()
    except (EOFError, OSError):
        raise InputError(f"{function.__name__} has no answer: its process failed or was killed") from None
    if error:
        raise error
    return returned


# In processes that the server has forked


def begin(
    connection: Connection, variables: dict[str, str], target: Callable[..., None], arguments: Sequence[Any]
) -> None:
    """Be a process of its own, with the environment of the sweep, which ends with the server and with the sweep."""
    if PRELOAD not in sys.modules:  # multiprocessing has started the server again, without the signals blocked
        os._exit(1)
    os.environ.clear()
    os.environ.update(variables)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()  # a group of its own: what it starts ends with it, and Ctrl-C is for the sweep
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    send(connection, os.getppid())
    target(connection, *arguments)


def send(connection: Connection, what: Any) -> None:
    """Send something to the sweep, or end without a word if there is no sweep any more."""
    try:
        connection.send(what)
    except OSError:
        os._exit(1)


def follow(server: int) -> None:
    """End this process and what it started, once the sweep or the server is gone."""
    sweep = parent_process()
    assert sweep is not None
    while os.getppid() == server and sweep.is_alive():
        sweep.join(SECONDS_BETWEEN_LOOKS)
    os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    while sweep.is_alive() and time.monotonic() < until:
        sweep.join(SECONDS_BETWEEN_LOOKS)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def idle(connection: Connection) -> None:
    """Wait for the end of the sweep."""
    with suppress(EOFError, OSError):
        connection.recv()


def answer(connection: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    """Send what a function returns, or the mistake that it finds."""
    returned, mistake = None, None
    try:
        returned = function(*arguments)
    except InputError as error:
        mistake = error
    send(connection, (returned, mistake))
