"""Failed allocations: how Python, NumPy and PyTorch report them, and the limit that they met."""

import errno
import re
from contextlib import suppress
from pathlib import Path

from charlm.system import posix

# PyTorch's allocators raise plain RuntimeErrors, and NumPy a ValueError: only their text tells them apart.
REFUSED = re.compile(
    "can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed|std::bad_alloc"
    "|CUBLAS_STATUS_ALLOC_FAILED|array is too big"
)
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def refused(error: BaseException) -> bool:
    """Return whether an error is a failed allocation."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, without importing it
        return True
    return isinstance(error, RuntimeError | ValueError) and bool(REFUSED.search(str(error)))


def describe(error: BaseException) -> str:
    """Name the requested size, if it is known, and the limit: "7.3 TiB requested, this machine has 62.8 GiB"."""
    message = str(error)
    parts = []
    if found := re.search(r"allocate (\d+) bytes", message):
        parts.append(f"{size(int(found[1]))} requested")
    elif found := re.search(r"allocate ([\d.]+?)\.?( [KMGTPE]?i?B)", message):
        parts.append(f"{found[1]}{found[2]} requested")
    elif re.search("overflowed|array is too big", message):
        parts.append("more than 8 EiB requested")
    if found := re.search(r"total capacity of ([\d.]+ \w+)", message):
        parts.append(f"the GPU has {found[1]}")
    elif "CUDA" not in message and (known := limit()):
        parts.append(f"{known[1]} {size(known[0])}")
    return ", ".join(parts)


def limit() -> tuple[int, str] | None:
    """Return the bytes that this process may use, and the words for what limits them; None if that is unknown."""
    return min([*posix.memory(), *((allowed, "the cgroup allows") for allowed in cgroup_limits())], default=None)


def cgroup_limits() -> list[int]:
    """Return the limits of this process's control groups, which containers and batch systems set."""
    found = []
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
            if controllers and "memory" not in controllers.split(","):
                continue
            group = Path(path.lstrip("/"))
            for place in (group, *group.parents):
                with suppress(OSError, ValueError):  # "max" is no limit
                    found.append(int((root / place / name).read_text()))
    return found


def size(number: int) -> str:
    """Format a number of bytes."""
    value, units = float(number), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"
