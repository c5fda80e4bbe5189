"""Names that only POSIX has, with what charlm does on Windows instead. No other module uses them."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

# A process group reaches a job together with the processes that it started.
GROUPS = hasattr(os, "setsid") and hasattr(os, "killpg")


def signals(*names: str) -> list[signal.Signals]:
    """Return those of the named signals that this platform has. Windows lacks SIGHUP, SIGUSR1, SIGUSR2 and SIGKILL."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextmanager
def blocked(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Block signals for a moment. Processes that start meanwhile inherit the mask, and unblock them with `unblock`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker  # not needed by a single run

    resource_tracker.ensure_running()  # or multiprocessing would start it, which unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock(numbers: Sequence[signal.Signals]) -> None:
    """Unblock signals that the parent blocked."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def lead_group() -> None:
    """Make this process the leader of a new group, which Ctrl-C in the terminal does not reach.

    Without groups, Ctrl-C is ignored: it is for the parent.
    """
    if GROUPS:
        os.setsid()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def terminate_group(leader: int = 0) -> None:
    """Send SIGTERM to a group of processes, by default this process's own. Without groups, only to this process."""
    if GROUPS:
        os.killpg(leader, signal.SIGTERM)
    else:  # os.kill of Windows would end the process without its handlers
        signal.raise_signal(signal.SIGTERM)


def kill_group(leader: int = 0) -> None:
    """End a group of processes at once, by default this process's own. Without groups, only this process."""
    if GROUPS:
        os.killpg(leader, signal.SIGKILL)
    else:
        os._exit(1)


def cores() -> int:
    """Return how many cores this process may use; without affinities, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> list[tuple[int, str]]:
    """Return the limits of this process's memory in bytes, each with the words for what sets it."""
    found = []
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        found.append((os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine has"))
    with suppress(ImportError):
        import resource

        if (soft := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            found.append((soft, "ulimit -v allows"))
    return found
