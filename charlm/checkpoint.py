"""A checkpoint file -> model, tokenizer, configuration. Loads without running any code that is in the file."""

import os
import pkgutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from charlm.errors import InputError
from charlm.tokenizer import TOKENIZERS, CharTokenizer

# The layout of `record`; raised when an older reader could not understand it.
FORMAT = 1
NAME = "last.ckpt"
BEST = "best.ckpt"
PARTIAL = ".partial-"  # what files are called until they are whole


@dataclass(frozen=True)
class Checkpoint:
    """What a run left behind: the model with its trained weights, and all that its text and figures depend on."""

    path: Path
    step: int
    model: nn.Module
    tokenizer: CharTokenizer
    config: dict[str, Any]
    corpus: dict[str, Any]


def record(config: dict[str, Any], tokenizer: CharTokenizer, corpus: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside weights and training state; plain types only."""
    return {"format": FORMAT, "config": config, "tokenizer": tokenizer.state_dict(), "corpus": corpus}


def find(run_or_file: str | Path) -> Path:
    """The checkpoint that a run folder or a file name means.

    Raises:
        InputError: if there is none.
    """
    place = Path(run_or_file).expanduser()
    if os.path.isdir(place):  # os.path, unlike pathlib, says no where a name is too long to be one
        for file in (place / "checkpoints" / NAME, place / NAME):
            if file.is_file():
                return file
        raise InputError(
            f"{place} holds no checkpoint: give a run folder, one with checkpoints/{NAME} in it, or a file"
        )
    if not os.path.exists(place):
        raise InputError(f"{place} does not exist: give a run folder (they are under outputs/) or a checkpoint file")
    return place


def load(run_or_file: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint and build its model, in evaluation mode, on `device`.

    Raises:
        InputError: for a file that is missing, cut off, of another kind or not charlm's.
    """
    path = find(run_or_file)
    content = read(path)
    kept = content.get("charlm")
    if not isinstance(kept, dict) or not isinstance(content.get("state_dict"), dict):
        raise InputError(f"{path} is a checkpoint of another program: charlm reads those that python train.py writes")
    if kept.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {kept.get('format')}, and this charlm reads format {FORMAT}: update charlm"
        )
    try:
        tokenizer = TOKENIZERS[kept["tokenizer"]["name"]].from_state_dict(kept["tokenizer"])
        model = build(kept["config"]["model"], tokenizer.vocab_size)
        weights = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
        model.load_state_dict(weights)
        return Checkpoint(
            path, content["global_step"], model.to(device).eval(), tokenizer, kept["config"], kept["corpus"]
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is damaged or of another version: {detail}; train again, or use its backup"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file as plain types and tensors."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start != b"PK":
            raise InputError(f"{path} is not a checkpoint: give a run folder or a file that python train.py wrote")
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} is cut off: it begins as a checkpoint and has no end; use another checkpoint")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged or foreign file fails in the unpickler in any way it likes
        raise InputError(f"{path} is not a checkpoint of charlm, or is damaged: use another checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint: give a run folder or its file")
    return content


def build(node: dict[str, Any], vocab_size: int) -> nn.Module:
    """The model that a configuration names, among charlm's own: a checkpoint of a stranger must not name others."""
    target = str(node["_target_"])
    found = pkgutil.resolve_name(target) if target.startswith("charlm.model.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("charlm.model.")):
        raise InputError(f"the checkpoint names {target} as its model, which is not one of charlm.model: not loaded")
    return found(vocab_size=vocab_size, **{k: v for k, v in node.items() if not k.startswith("_")})


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that its name only ever stands for a whole one: beside it, to the disk, then renamed.

    Raises:
        OSError: if it cannot be written; what stood there before is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
