"""The process that the jobs of a sweep are forked from: it pays for their imports once, while the sweep goes on.

A sweep's own process needs neither PyTorch nor Lightning. It forks the server off when it has begun nothing yet, and
composes its jobs while that imports what jobs are made of: what a sweep has by the time that its jobs start, such as
threads, handlers of signals, CUDA and the state of Hydra, no job finds.
"""

import os
import pickle
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from charlm.errors import InputError
from charlm.run import surroundings

ENDED = "the process that jobs are forked from was ended: the same command goes on"
SECONDS_BETWEEN_LOOKS = 0.5  # for a sweep that ends while its server still imports

server: socket.socket | None = None  # in the sweep's process: where the server is reached
sweep: socket.socket | None = None  # in the server: where it is told what to do
imported = threading.Event()
watch: threading.Thread


def start() -> bool:
    """Fork the server off this process, as it is now. False: this is the server, which imports, and then `serve`s."""
    global server, sweep, watch
    server, sweep = socket.socketpair()
    parent = os.getpid()
    if os.fork():
        sweep.close()
        return True
    server.close()
    os.setsid()  # Ctrl-C is for the sweep
    watch = threading.Thread(target=follow, args=(parent,), daemon=True)
    watch.start()
    return False


def follow(parent: int) -> None:
    """End with the sweep, however that ends, as long as nothing else waits for it."""
    while not imported.wait(SECONDS_BETWEEN_LOOKS):
        if os.getppid() != parent:
            os._exit(0)


def serve() -> None:
    """Fork a process for each line that the sweep sends, until there is no sweep any more."""
    assert sweep is not None
    surroundings()  # of all jobs, as they run the code that is loaded here
    imported.set()
    watch.join()  # what is forked has no threads
    running: dict[Any, tuple[Any, socket.socket]] = {}  # by what tells of the end
    while True:
        for ready in wait([sweep, *running]):
            if ready in running:
                ended, line = running.pop(ready)
                ended.join()
                tell(line, ended.exitcode)
                line.close()
                continue
            _, descriptors, *_ = socket.recv_fds(sweep, 1, 2)
            if not descriptors:
                os._exit(0)
            line = socket.socket(fileno=descriptors[0])
            with open(descriptors[1], "rb") as file:
                target, arguments = pickle.load(file)
            process: Any = get_context("fork").Process(target=target, args=(line, *arguments))
            process.start()
            tell(line, process.pid)
            running[process.sentinel] = process, line


def send(target: Callable[..., None], *arguments: Any) -> socket.socket:
    """Have the server call `target` in a process of its own. Returns a line, whose other end is its first argument.

    The server need not listen yet.
    """
    assert server is not None, "forkserver.start() comes first"
    line, theirs = socket.socketpair()
    with theirs, tempfile.TemporaryFile() as file:
        pickle.dump((target, arguments), file)
        file.seek(0)
        try:
            socket.send_fds(server, [b"+"], [theirs.fileno(), file.fileno()])
        except OSError:
            raise InputError(ENDED) from None
    return line


class Forked:
    """A process that the server has forked, as the sweep's process sees it.

    Args:
        target: called there with the other end of a line, which is cut when the sweep ends, and with `arguments`.

    Raises:
        InputError: if the server is no more.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any):
        self.line = send(target, *arguments)
        pid = told(self.line)
        if pid is None:
            raise InputError(ENDED)
        self.pid, self.alive = pid, True
        self.exitcode: int | None = None  # also for one that has outlived the server

    def is_alive(self) -> bool:
        if self.alive and wait([self.line], 0):
            self.alive, self.exitcode = False, told(self.line)
        return self.alive


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns where all is imported, in a process of its own.

    Raises:
        InputError: that it raised, or if it has no answer.
    """
    with send(answer, function, *arguments) as line, line.makefile("rb") as file:
        if len(file.read(4)) < 4:  # the number of its process
            raise InputError(ENDED)
        try:
            returned, error = pickle.load(file)
        except (EOFError, pickle.UnpicklingError):
            raise InputError(f"{function.__name__} has no answer: its process failed or was ended") from None
    if error:
        raise error
    return returned


def answer(line: socket.socket, function: Callable[..., Any], *arguments: Any) -> None:
    """In the process of a question."""
    returned, raised = None, None
    try:
        returned = function(*arguments)
    except InputError as error:
        raised = error
    with line.makefile("wb") as file:
        pickle.dump((returned, raised), file)


def tell(line: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # where nobody listens any more
        line.send(number.to_bytes(4, "big", signed=True))


def told(line: socket.socket) -> int | None:
    """A number, or None if nobody is there to tell one."""
    said = line.recv(4)
    return int.from_bytes(said, "big", signed=True) if said else None
