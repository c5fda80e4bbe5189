"""Checkpoint files in a run folder: list them, read one, read the newest intact one, write."""

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from charlm.checkpoint import archive
from charlm.checkpoint.content import check_content
from charlm.errors import InputError, warn
from charlm.files import check_kind, remove_partial, write_atomically

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"  # two generations: damage to one file costs the steps between them
BEST = "best.ckpt"


class Newest(NamedTuple):
    """The newest intact checkpoint, its content, and one line for each newer checkpoint that is damaged."""

    path: Path
    content: dict[str, Any]
    damaged: list[str]


def generations(run_or_file: str | Path) -> list[Path]:
    """Return the checkpoints that a run folder or a file name stands for, newest first.

    Raises:
        InputError: if there is none.
    """
    place = Path(run_or_file).expanduser()
    if os.path.isdir(place):  # unlike pathlib's is_dir, it returns False for a name that is too long
        check_kind(place / "checkpoints", folder=True)
        for folder in (place / "checkpoints", place):
            if found := [folder / name for name in (LAST, PREVIOUS) if os.path.lexists(folder / name)]:
                return found
        raise InputError(
            f"{place} holds no checkpoint: give a run folder, one with checkpoints/{LAST} in it, or a file"
        )
    if not os.path.exists(place):
        raise InputError(f"{place} does not exist: give a run folder (they are under outputs/) or a checkpoint file")
    # A link that the user typed is followed; links inside a run folder are refused.
    return [Path(os.path.realpath(place)) if place.is_symlink() else place]


def read(path: Path, device: str = "cpu", needs_text: bool = True) -> dict[str, Any]:
    """Return the content of one checkpoint file as plain types and tensors; no code from the file runs.

    Args:
        path: a checkpoint of charlm, or a file of Lightning's `trainer.save_checkpoint`.
        device: "cpu", or "meta" to read names and shapes only, in little time and memory.
        needs_text: refuse a checkpoint without tokenizer and corpus.

    Raises:
        InputError: if the file is missing, damaged, or of another kind or version.
    """
    if archive.is_zip(path):
        content = archive.load_lightning(path, device)
    else:
        content = archive.outline(path) if device == "meta" else archive.load(path)
    return check_content(path, content, needs_text)


def read_newest(run_or_file: str | Path, device: str = "cpu", needs_text: bool = True, quiet: bool = False) -> Newest:
    """Read the newest intact checkpoint of a run folder, or one file.

    Args:
        device, needs_text: see `read`.
        quiet: do not warn of newer checkpoints that are damaged.

    Raises:
        InputError: if there is none, or none that can be read.
    """
    damaged: list[str] = []
    for path in generations(run_or_file):
        try:
            content = read(path, device, needs_text)
        except InputError as error:
            damaged.append(str(error))
            continue
        for line in [] if quiet else damaged:
            warn(f"{line}: using {path}, the one before")
        return Newest(path, content, damaged)
    raise InputError(f"{', and '.join(damaged)}: use another checkpoint, or train again, rerun=RUN")


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically. A `last.ckpt` that it replaces becomes `previous.ckpt`.

    Raises:
        OSError: if it cannot be written; the old file is then untouched.
    """
    path.parent.mkdir(exist_ok=True)  # not its parents: fail if the user has removed the run folder
    remove_partial(path.parent)
    previous = path.with_name(PREVIOUS) if path.name == LAST else None
    write_atomically(path, partial(archive.dump, content), previous)
