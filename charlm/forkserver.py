"""The process that the jobs of a sweep are forked from: it pays for their imports once.

It is forked itself, from the sweep's own process when that has imported all and begun nothing: what a sweep has by the
time that its jobs start, such as threads, handlers of signals, CUDA and the state of Hydra, no job finds.
"""

import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from charlm.errors import InputError
from charlm.run import surroundings

server: socket.socket | None = None  # where the sweep's process reaches it


def start() -> None:
    """Fork the server off this process, as it is now. It ends with this process, however that ends."""
    global server
    server, sweep = socket.socketpair()
    if os.fork():
        sweep.close()
        return
    try:
        server.close()
        os.setsid()  # Ctrl-C is for the sweep
        serve(sweep)
    finally:
        os._exit(0)


def serve(sweep: socket.socket) -> None:
    """Fork a process for each line that the sweep sends, until there is no sweep any more."""
    import charlm.sweep  # noqa: F401, as all jobs do

    surroundings()  # likewise: they run the code that is loaded here
    running: dict[Any, tuple[Any, socket.socket]] = {}  # by what tells of the end
    while True:
        for ready in wait([sweep, *running]):
            if ready in running:
                ended, line = running.pop(ready)
                ended.join()
                tell(line, ended.exitcode)
                line.close()
                continue
            _, descriptors, *_ = socket.recv_fds(sweep, 1, 1)
            if not descriptors:
                return
            line = socket.socket(fileno=descriptors[0])
            with line.makefile("rb") as file:
                target, arguments = pickle.load(file)
            process: Any = get_context("fork").Process(target=target, args=(line, *arguments))
            process.start()
            tell(line, process.pid)
            running[process.sentinel] = process, line


class Forked:
    """A process that the server has forked, as the sweep's process sees it.

    Args:
        target: called there with the other end of a line, which is cut when the sweep ends, and with `arguments`.

    Raises:
        InputError: if the server is no more.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any):
        assert server is not None, "forkserver.start() comes first"
        self.line, theirs = socket.socketpair()
        try:
            socket.send_fds(server, [b"+"], [theirs.fileno()])
            theirs.close()
            with self.line.makefile("wb") as file:
                pickle.dump((target, arguments), file)
            pid = told(self.line)
        except OSError:
            pid = None
        if pid is None:
            raise InputError("the process that jobs are forked from was ended: the same command goes on")
        self.pid, self.alive = pid, True
        self.exitcode: int | None = None  # also for one that has outlived the server

    def is_alive(self) -> bool:
        if self.alive and wait([self.line], 0):
            self.alive, self.exitcode = False, told(self.line)
        return self.alive


def tell(line: socket.socket, number: int) -> None:
    line.send(number.to_bytes(4, "big", signed=True))


def told(line: socket.socket) -> int | None:
    """A number, or None if nobody is there to tell one."""
    said = line.recv(4)
    return int.from_bytes(said, "big", signed=True) if said else None
