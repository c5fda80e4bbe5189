"""Atomic writes, and careful reads of files from other people."""

import json
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from charlm.errors import InputError

T = TypeVar("T")

DEEPEST = 20  # levels of nested JSON
PARTIAL = ".partial-"  # prefix of incomplete files
# No link is followed, and no FIFO waited for. Windows has neither flag.
CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
WANDB = "wandb"  # a folder of Weights & Biases, which keeps links of its own there; charlm opens none of its files


def open_regular(path: Path, within: Path | None = None) -> IO[bytes]:
    """Open a regular file for reading; links are refused.

    Args:
        within: a parent folder; no folder between the two may be a link.

    Raises:
        InputError: if it is a link, a FIFO, a device or a folder, or lies outside of `within`.
        OSError: if it is missing or cannot be read.
    """
    check_kind(path)
    if within and os.path.realpath(path) != os.path.join(os.path.realpath(within), path.relative_to(within)):
        raise InputError(f"{path} is reached by a symbolic link: {WHY_REGULAR}")
    descriptor = os.open(path, os.O_RDONLY | CAREFULLY)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced since it was checked
        file.close()
        raise InputError(f"{path} is not a regular file: {WHY_REGULAR}")
    return file


def read_regular(path: Path, largest: int, within: Path | None = None) -> bytes:
    """Return the content of a regular file.

    Raises:
        InputError: as `open_regular`, or if it has more than `largest` bytes.
        OSError: if it is missing or cannot be read.
    """
    with open_regular(path, within) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise InputError(f"{path} is larger than {largest:,} bytes: charlm writes no such file")
    return content


def is_regular(path: Path) -> bool:
    """Return whether there is a regular file, and not just a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def stamp(file: Path) -> list[int]:
    """Return what changes whenever the content of a file does: size, times and inode."""
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


WHY_REGULAR = "charlm opens only regular files in a run folder; put the file itself there, or remove it"


def check_kind(path: Path, folder: bool = False) -> None:
    """Check that a path, if there is anything, is a regular file, or a folder where that is allowed.

    Raises:
        InputError: if it is a link, a FIFO, a device, or a folder where a file is expected.
    """
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except OSError:
        return
    if kind != stat.S_IFREG and not (folder and kind == stat.S_IFDIR):
        raise InputError(f"{path} is {KINDS.get(kind, 'not a file')}: {WHY_REGULAR}")


def check_tree(folder: Path) -> None:
    """Check that a folder holds only regular files and folders, at any depth, so that writing there stays there.

    Raises:
        InputError: if there is a link, a FIFO or a device.
    """
    for path in contents(folder):
        check_kind(path, folder=True)


def contents(folder: Path) -> Iterator[Path]:
    """Yield everything in a folder, at any depth; links are not followed."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in sorted([*folders, *files]))
        folders[:] = sorted(name for name in folders if name != WANDB)


def unshare(folder: Path) -> None:
    """Replace hard links in a folder by copies, because charlm appends to files and the other name may be outside of
    the folder. Checkpoints stay, because they are replaced and never appended to.
    """
    for path in contents(folder):
        if path.suffix != ".ckpt" and is_regular(path) and path.stat().st_nlink > 1:
            write_atomically(path, partial(copy_into, path))


def copy_into(path: Path, file: IO[bytes]) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, file)


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object], previous: Path | None = None) -> None:
    """Write a file atomically: into a temporary file in the same folder, flushed to disk, then renamed.

    The old file is renamed to `previous`, if given, once the new one is in place.

    Raises:
        OSError: if it cannot be written; what stood there before is then untouched.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
    spare = temporary + ".before"
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        keep = previous is not None and path.exists()
        if keep:
            link(path, spare)
        replace(temporary, path)
        if previous and keep:
            replace(spare, previous)
    except BaseException:
        for left in (temporary, spare):
            Path(left).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed have left half-written in a folder, but not in the folders below it."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if is_regular(leftover):
            leftover.unlink(missing_ok=True)


def replace(source: str, target: Path) -> None:
    """Rename a file over another. Windows refuses while another process reads that, so try again for a second."""
    for _ in range(20):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.05)
    os.replace(source, target)


def link(file: Path, name: str) -> None:
    """Create a hard link, or a copy if the file system has no hard links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def as_json(content: Any) -> bytes:
    """Return readable JSON."""
    return (json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, lambda file: file.write(as_json(content)))


def read_json(file: Path, kind: type[T], largest: int, format: int | None = None) -> T:
    """Read a file of `write_json` and validate it as `kind`; nothing in it is trusted.

    Raises:
        InputError: if it is no regular file, too large, damaged or of another version.
        FileNotFoundError: if there is none.
    """
    try:
        content: Any = json.loads(read_regular(file, largest), parse_constant=refuse_constant)
        for _ in everything(file, content):  # which looks for what is nested too deep
            pass
        TypeAdapter(kind).validate_python(content, strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged, or of another version") from None
    if format is not None and content["format"] != format:
        raise InputError(f"{file} has format {content['format']}, and this charlm reads format {format}")
    found: T = content
    return found


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which are not JSON; `as_json` writes null instead."""
    raise ValueError(name)


def plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def everything(source: Path, node: Any) -> Iterator[tuple[str, Any]]:
    """Yield all values of nested dictionaries and lists with their dotted names.

    Raises:
        InputError: if they are nested deeper than anything that charlm records.
    """
    left: list[tuple[str, Any, int]] = [("", node, 0)]
    while left:
        place, value, depth = left.pop()
        if depth > DEEPEST:
            raise InputError(f"{source} is damaged: it is nested too deep")
        yield place, value
        if isinstance(value, dict):
            left += [(f"{place}.{key}".lstrip("."), child, depth + 1) for key, child in value.items()]
        elif isinstance(value, list):
            left += [(place, child, depth + 1) for child in value]
