"""A checkpoint file -> model, tokenizer, configuration. Loads without running any code that is in the file.

Read are charlm's own files (`charlm.archive`), and those that Lightning's `trainer.save_checkpoint` writes.
"""

import json
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from charlm import archive
from charlm.archive import FORMAT
from charlm.config import STRICT, check_node
from charlm.disk import PARTIAL, check_kind, write_atomically
from charlm.errors import InputError, out_of_memory, printable, warn
from charlm.tokenizer import TOKENIZERS, CharTokenizer

if TYPE_CHECKING:  # to generate text takes no Lightning, and so not the seconds of its import
    from charlm.data.datamodule import CharDataModule

NAME, PREVIOUS = "last.ckpt", "previous.ckpt"  # two generations: damage to one file costs the steps between them
BEST = "best.ckpt"
LARGEST_VOCABULARY = 0x110000  # characters in Unicode
COMPUTED = 2**28  # bytes, at most, of what a model computes from its settings and keeps beside its weights
TOO_LARGE = "it names a larger model than it has weights for; use another checkpoint"
Count = Annotated[int, Ge(0), Le(2**48)]  # of steps, bytes and the like: more would overflow in sums and products
# What every checkpoint holds, beside what a run needs to go on: each place in the file, and its type.
MODEL: dict[str, Any] = {
    "global_step": Count,
    "state_dict": dict[str, Tensor],
    "charlm.format": Annotated[int, Ge(FORMAT), Le(FORMAT)],
    "charlm.config.model": dict[str, Any],
}
# And what it holds where a `CharDataModule` served the batches.
TEXT: dict[str, Any] = {
    "charlm.config.data": dict[str, Any],
    "charlm.config.evaluate": list[str],
    "charlm.tokenizer": dict[str, str | list[Annotated[int, Ge(0), Le(0x10FFFF)]]],
    "charlm.tokenizer.name": str,
    "charlm.corpus.name": str,
    "charlm.corpus.source": str,
    "charlm.corpus.sha256": str,
}
# What a run needs to go on; `charlm.restore` holds the rest of it against the trainer that goes on.
TRAINING: dict[str, Any] = {
    "validated_at": Annotated[int, Ge(-1), Le(2**48)],
    "loops.fit_loop": dict[str, Any],
    "callbacks": dict[str, dict[str, Any]],
    "callbacks.Checkpoint.logged": dict[str, Count],
    "optimizer_states": list[dict[str, Any]],
    "lr_schedulers": list[dict[str, Any]],
}
AVERAGES: dict[str, Any] = {"ema.raw": dict[str, Tensor], "ema.updates": Count, "ema.updated_at": Count}


@dataclass(frozen=True)
class Checkpoint:
    """What a run left behind: the model with its trained weights, and all that its text and figures depend on."""

    path: Path
    step: int
    model: nn.Module
    tokenizer: CharTokenizer
    config: dict[str, Any]
    corpus: dict[str, Any]


class Newest(NamedTuple):
    """The newest checkpoint that is whole, its content, and a line for each newer one that is not."""

    path: Path
    content: dict[str, Any]
    damaged: list[str]


def record(config: dict[str, Any], tokenizer: CharTokenizer, corpus: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside weights and training state; plain types only."""
    return {"format": FORMAT, "config": config, "tokenizer": tokenizer.state_dict(), "corpus": corpus}


def record_of(model: nn.Module, data: "CharDataModule | None") -> dict[str, Any]:
    """Return the same without a configuration of Hydra: from the model, and what it is trained on.

    Args:
        data: None where it is trained on batches of the user's own, of whose text and tokenizer nothing is known.
    """
    kind = type(model)
    node = {"_target_": f"{kind.__module__}.{kind.__qualname__}"} | getattr(model, "arguments", {})
    if data is None:
        return {"format": FORMAT, "config": {"model": node}}
    config = {"model": node, "data": data.settings(), "evaluate": [*data.splits]}
    return record(config, data.tokenizer, data.corpus.card())


def generations(run_or_file: str | Path) -> list[Path]:
    """The checkpoints that a run folder or a file name means, newest first.

    Raises:
        InputError: if there is none.
    """
    place = Path(run_or_file).expanduser()
    if os.path.isdir(place):  # os.path, unlike pathlib, says no where a name is too long to be one
        check_kind(place / "checkpoints", folder=True)
        for folder in (place / "checkpoints", place):
            if found := [folder / name for name in (NAME, PREVIOUS) if os.path.lexists(folder / name)]:
                return found
        raise InputError(
            f"{place} holds no checkpoint: give a run folder, one with checkpoints/{NAME} in it, or a file"
        )
    if not os.path.exists(place):
        raise InputError(f"{place} does not exist: give a run folder (they are under outputs/) or a checkpoint file")
    return [Path(os.path.realpath(place)) if place.is_symlink() else place]  # a link that was typed is meant


def newest(run_or_file: str | Path, reader: Callable[[Path], dict[str, Any]] | None = None) -> Newest:
    """The newest whole checkpoint of a run folder, or a file. `reader`: `read`, the default, or `outline`.

    Raises:
        InputError: if there is none, or none that can be read.
    """
    damaged: list[str] = []
    for path in generations(run_or_file):
        try:
            return Newest(path, (reader or read)(path), damaged)
        except InputError as error:
            damaged.append(str(error))
    raise InputError(f"{', and '.join(damaged)}: use another checkpoint, or train again, rerun=RUN")


def found(run_or_file: str | Path, reader: Callable[[Path], dict[str, Any]] | None = None) -> Newest:
    """`newest`, which says on standard error which newer checkpoints it passed over.

    Raises:
        InputError: as `newest`.
    """
    whole = newest(run_or_file, reader)
    for line in whole.damaged:
        warn(f"{line}: using {whole.path}, the one before")
    return whole


def load(run_or_file: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint and build its model, in evaluation mode, on `device`.

    Raises:
        InputError: for a file that is missing, cut off, of another kind or not charlm's.
    """
    path, content, _ = found(run_or_file)
    kept, tokenizer = content["charlm"], tokenizer_of(path, content)
    assert tokenizer is not None
    model = model_of(path, content, tokenizer)
    return Checkpoint(path, content["global_step"], model.to(device).eval(), tokenizer, kept["config"], kept["corpus"])


def tokenizer_of(path: Path, content: dict[str, Any]) -> CharTokenizer | None:
    """Return the tokenizer of a checkpoint, if it has one.

    Raises:
        InputError: for one that cannot be.
    """
    kept = content["charlm"].get("tokenizer")
    with readable(path):
        return TOKENIZERS[kept["name"]].from_state_dict(kept) if kept else None


def model_of(path: Path, content: dict[str, Any], tokenizer: CharTokenizer | None) -> nn.Module:
    """Return the model of a checkpoint, with its weights, on the CPU.

    Raises:
        InputError: for a model that is not charlm's, or that has other weights.
    """
    node = content["charlm"]["config"]["model"]
    with readable(path):
        return trained(node, tokenizer.vocab_size if tokenizer else None, weights_of(content))


def check_weights(path: Path, content: dict[str, Any]) -> None:
    """Hold the weights of a checkpoint against the model that it names.

    Raises:
        InputError: if their names or shapes are of another model.
    """
    tokenizer = tokenizer_of(path, content)
    with readable(path):
        sketch(content["charlm"]["config"]["model"], tokenizer.vocab_size if tokenizer else None, weights_of(content))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise InputError for whatever is wrong with a checkpoint's model, weights or tokenizer."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} is not used: {one_line(error)}") from error
    except Exception as error:  # a model is built from whatever the file says
        if out_of_memory(error):
            raise
        raise InputError(
            f"{path} is damaged or of another version: {one_line(error)}; train again, or use its backup"
        ) from error


def one_line(error: Exception) -> str:
    """Return the first line of an error, which may quote the file."""
    said = str(error).splitlines()[:1] or [""]
    return printable(said[0], 300) or type(error).__name__


def read(path: Path, needs_text: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, as plain types and tensors on the CPU.

    Args:
        needs_text: whether to refuse one that has no tokenizer and no text.

    Raises:
        InputError: if it is missing, damaged, of another kind or version; what to do is for the caller to say.
    """
    return checked(path, archive.load_either(path), needs_text)


def outline(path: Path) -> dict[str, Any]:
    """As `read`, with tensors on the meta device: of any checkpoint, in little time and memory.

    Raises:
        InputError: as `read`.
    """
    content = archive.load_lightning(path, "meta") if archive.is_zip(path) else archive.outline(path)
    return checked(path, content, needs_text=False)


def checked(path: Path, content: dict[str, Any], needs_text: bool) -> dict[str, Any]:
    """Content that is of charlm, of this format and of the right types."""
    kept = content.get("charlm")
    if not isinstance(kept, dict) or not isinstance(content.get("state_dict"), dict):
        raise InputError(
            f"{path} is a checkpoint of another program, and charlm reads those of train.py and of LanguageModel"
        )
    check_parts(path, content, MODEL)
    if "tokenizer" in kept or "corpus" in kept:
        check_parts(path, content, TEXT)
    elif needs_text:
        raise InputError(
            f"{path} has no tokenizer and no text, as no CharDataModule served its batches: load it in Python, "
            f"charlm.load(PATH).generate(prompt, length, tokenizer=...)"
        )
    return content


def check_training(path: Path, content: dict[str, Any]) -> None:
    """Check the parts of a checkpoint from which its run goes on.

    Raises:
        InputError: for the first that is missing or of another type.
    """
    check_parts(path, content, TRAINING | (AVERAGES if "ema" in content else {}))


def check_parts(path: Path, content: dict[str, Any], parts: dict[str, Any]) -> None:
    for place, hint in parts.items():
        try:
            part = reduce(lambda node, name: node[name], place.split("."), content)
            TypeAdapter(hint, config=STRICT).validate_python(part)
        except (LookupError, TypeError):
            raise InputError(f"{path} is damaged or of another version: it has no {place}") from None
        except ValidationError as error:
            what = error.errors(include_url=False, include_input=False)[0]["msg"]
            raise InputError(f"{path} is damaged or of another version: {place}: {what}") from None


def weights_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the model, named as in the model."""
    return {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}


def trained(node: dict[str, Any], vocab_size: int | None, weights: dict[str, Tensor]) -> nn.Module:
    """The model that a configuration names, with these weights, for which it must not be too large."""
    sketch(node, vocab_size, weights)  # before memory is taken
    model = build(node, vocab_size)
    model.load_state_dict(weights)
    return model


def sketch(node: dict[str, Any], vocab_size: int | None, weights: dict[str, Tensor]) -> None:
    """Make the model that a configuration names without memory for its numbers, and hold `weights` against it.

    Raises:
        InputError: if the model is larger than its weights.
        RuntimeError: if names or shapes of the weights differ from those of the model.
    """
    storages = [weight.untyped_storage() for weight in weights.values()]
    stored = {id(storage): storage.nbytes() for storage in storages}  # once, though strides and names may repeat it
    if sum(weight.nbytes for weight in weights.values()) > 2 * sum(stored.values()):  # a tied weight has two names
        raise InputError(TOO_LARGE)
    left = 2 * len(weights)  # a parameter that stands in two places is registered in both

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(TOO_LARGE)

    try:
        with register_module_parameter_registration_hook(count), torch.device("meta"):
            empty = build(node, vocab_size)
    except RuntimeError as error:  # no memory is taken yet, but a size may have no address
        if out_of_memory(error):
            raise InputError(TOO_LARGE) from error
        raise
    if sum(buffer.nbytes for buffer in empty.buffers()) > COMPUTED:
        raise InputError(TOO_LARGE)
    empty.load_state_dict(weights, assign=True)


def build(node: dict[str, Any], vocab_size: int | None) -> nn.Module:
    """The model that a configuration names, among charlm's own: a checkpoint of a stranger must not name others.

    Args:
        vocab_size: of its tokenizer; None: the configuration has it.
    """
    target = node["_target_"] if isinstance(node["_target_"], str) else "no name"
    found = pkgutil.resolve_name(target) if target.startswith("charlm.model.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("charlm.model.")):
        raise InputError(
            f"the checkpoint names {target} as its model, which is not one of charlm.model: "
            f"load it in Python, LanguageModel.load_from_checkpoint(PATH, model=...)"
        )
    settings = {k: v for k, v in node.items() if not k.startswith("_")}
    named = settings.pop("vocab_size", vocab_size)
    if type(named) is not int or not 1 <= named <= LARGEST_VOCABULARY or vocab_size not in (None, named):
        raise InputError(f"the checkpoint gives model.vocab_size={printable(str(named), 40)}, which cannot be")
    for key, value in settings.items():
        if not isinstance(value, str | int | float | None):  # which might name something of its own, or have no end
            raise InputError(f"the checkpoint gives model.{key} more than one value, which no model of charlm takes")
    check_node("model", settings | {"_target_": target})
    return found(vocab_size=named, **settings)


def describe(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What is in a checkpoint, for people and programs; `content` may be an outline."""
    kept, weights = content["charlm"], weights_of(content)
    return {
        "checkpoint": str(path),
        "generation": {NAME: "last", PREVIOUS: "previous", BEST: "best"}.get(path.name),
        "bytes": path.stat().st_size,
        "sha256": None if archive.is_zip(path) else archive.stored_hash(path),
        "format": kept["format"],
        "step": content["global_step"],
        "model": kept["config"]["model"],
        "parameters": sum(weight.numel() for weight in weights.values() if weight.is_floating_point()),
        "tensors": {
            name: {"shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch.")} for name, w in weights.items()
        },
        "optimizer_state": bool(content.get("optimizer_states")),
        "tokenizer": kept["tokenizer"]["name"] if "tokenizer" in kept else None,
        "corpus": kept.get("corpus"),
    }


def export(loaded: Checkpoint, file: Path) -> None:
    """Write the weights for other tools, as safetensors with what they belong to as metadata.

    Raises:
        InputError: for a file of another name than *.safetensors, which may be something else.
        OSError: if it cannot be written.
    """
    from safetensors.torch import save

    if file.suffix != ".safetensors":
        raise InputError(f"--export {file}: give a name that ends with .safetensors")
    told = {"step": loaded.step, "model": loaded.config["model"], "corpus": loaded.corpus}
    told["tokenizer"] = loaded.tokenizer.state_dict()
    weights = {name: weight.cpu().contiguous().clone() for name, weight in loaded.model.state_dict().items()}
    metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in told.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda opened: opened.write(save(weights, metadata)))


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; the last one that stands there becomes the previous one.

    Raises:
        OSError: if it cannot be written; what stood there before is then untouched.
    """
    path.parent.mkdir(exist_ok=True)  # but not the run's folder, if somebody has removed that
    for stray in path.parent.glob(f"{PARTIAL}*"):  # of a process that was killed while it wrote
        stray.unlink(missing_ok=True)
    previous = path.with_name(PREVIOUS) if path.name == NAME else None
    write_atomically(path, partial(archive.dump, content), previous)
