"""The folder of a run or a sweep: checks, and the lock of the process that writes to it."""

import contextlib
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from charlm.errors import InputError
from charlm.files import check_kind, check_tree, unshare

LOCK = ".lock"
SWEEP_JSON = "sweep.json"  # in the folder of a sweep


def held(folder: Path) -> str | None:
    """Return what a folder already holds: a run, a sweep or neither."""
    if any(any(folder.glob(trace)) for trace in ("results.json", "checkpoints/*.ckpt")):
        return "run"
    # Hydra writes multirun.yaml before the first job; a sweep killed in between has left nothing.
    begun = (folder / "multirun.yaml").exists() and any(place.is_dir() for place in folder.iterdir())
    return "sweep" if begun else None


def own_folder(folder: Path, setting: str = "hydra.run.dir", new: bool = False, begun: bool = False) -> Path:
    """Return a folder that no other process writes to, locked for this process.

    Args:
        new: if the folder is taken, use one of the same name with a number.
        begun: the folder holds the run to resume.

    Raises:
        InputError: if it is taken, or holds links or devices, through which a write would leave the folder.
    """
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        check_tree(place)
        if claim(place) and (begun or not held(place)):
            unshare(place)
            return place
        if not new:
            raise InputError(f"{folder} is another process's just now: wait for its end, or choose another {setting}")
    raise AssertionError


def check_folder(folder: Path, setting: str = "hydra.run.dir", new: bool = False) -> None:
    """Check that a run can have a folder; with `new`, the folder may be taken.

    Raises:
        InputError: if there is a run in it already, or if it cannot be made.
    """
    try:
        left = held(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): choose another {setting}") from error
    if left and not new:
        onwards = f" (or say resume={folder})" if left == "run" else ""
        raise InputError(f"{folder} already holds a {left}: choose another {setting}, or move that one away{onwards}")
    missing = [place for place in (folder.absolute(), *folder.absolute().parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another {setting}") from error
    finally:  # other checks follow: a mistake must leave nothing behind
        for place in missing:
            if place.is_dir():
                place.rmdir()


claimed: dict[Path, tuple[FileLock, list[Path]]] = {}  # the locks, and the folders that were created for them


def is_first() -> bool:
    """Return whether this is the only or the first process, started by torchrun, Lightning or Slurm."""
    if "lightning" not in sys.modules:  # the process of a sweep, which is alone, and does without
        return True
    from lightning.pytorch.utilities import rank_zero_only

    known: Any = rank_zero_only  # each launcher sets its rank
    return bool(known.rank == 0)


def claim(folder: Path) -> bool:
    """Create `folder` and lock it until this process ends. Returns False if another process has locked it.

    Raises:
        InputError: if its lock is a link or no file.
    """
    folder = Path(os.path.realpath(folder))  # a lock file has no second name
    if folder in claimed:
        return True
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    check_kind(folder / LOCK)  # which would be emptied
    lock = FileLock(folder / LOCK)
    claimed[folder] = lock, made  # before creating anything, so that `abandon` removes it
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        del claimed[folder]
        return False
    return True


def abandon() -> None:
    """Remove folders that were created for the lock and are still empty."""
    for folder, (lock, made) in claimed.items():
        if folder in made and folder.is_dir() and {*folder.iterdir()} <= {folder / LOCK}:
            try:
                (folder / LOCK).unlink(missing_ok=True)
            except PermissionError:  # Windows removes no open file, and filelock itself removes a released one there
                lock.release()
            for place in made:
                with contextlib.suppress(OSError):  # another process may have come to use it
                    place.rmdir()
