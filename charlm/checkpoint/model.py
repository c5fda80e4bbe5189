"""The model of a checkpoint: built from its name and arguments, and never larger than its weights."""

import json
import pkgutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from charlm.checkpoint import archive
from charlm.checkpoint.content import weights_of
from charlm.checkpoint.counts import use_counts
from charlm.checkpoint.file import BEST, LAST, PREVIOUS, read_newest
from charlm.errors import InputError, out_of_memory, printable
from charlm.files import write_atomically
from charlm.schema import check_node
from charlm.tokenizer import TOKENIZERS, Tokenizer

if TYPE_CHECKING:  # generating text does not need Lightning, which is slow to import
    pass


LARGEST_VOCABULARY = 0x110000  # characters in Unicode


COMPUTED = 2**28  # limit in bytes on buffers that a model computes from its settings


TOO_LARGE = "it names a larger model than it has weights for; use another checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model with its trained weights, its tokenizer, config and corpus."""

    path: Path
    step: int
    model: nn.Module
    tokenizer: Tokenizer
    config: dict[str, Any]
    corpus: dict[str, Any]


def load(run_or_file: str | Path, device: str | torch.device = "cpu", trust: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint and build its model, in evaluation mode, on `device`.

    Args:
        trust: packages outside of charlm whose models may be built.

    Raises:
        InputError: if the file is missing, truncated, of another kind or not charlm's.
    """
    path, content, _ = read_newest(run_or_file)
    kept, tokenizer = content["charlm"], tokenizer_of(path, content)
    assert tokenizer is not None
    model = model_of(path, content, tokenizer, trust).to(device, dtype_of(content)).eval()
    return Checkpoint(path, content["global_step"], model, tokenizer, kept["config"], kept["corpus"])


def dtype_of(content: dict[str, Any]) -> torch.dtype:
    """Return the type of the weights in training, in which the model is also evaluated."""
    trainer = content["charlm"]["config"].get("trainer")
    precision = str(trainer.get("precision")) if isinstance(trainer, dict) else ""
    types = {"64-true": torch.float64, "32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    floating = [weight.dtype for weight in weights_of(content).values() if weight.is_floating_point()]
    return types.get(precision, torch.float32 if "mixed" in precision else (floating or [torch.float32])[0])


def tokenizer_of(path: Path, content: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint, if it has one.

    Raises:
        InputError: if it is invalid.
    """
    kept = content["charlm"].get("tokenizer")
    with readable(path):
        return TOKENIZERS[kept["name"]].from_state_dict(kept) if kept else None


def model_of(
    path: Path, content: dict[str, Any], tokenizer: Tokenizer | None, trust: Collection[str] = ()
) -> nn.Module:
    """Return the model of a checkpoint, with its weights, on the CPU.

    Raises:
        InputError: if the model is neither charlm's nor trusted, or has other weights.
    """
    node = content["charlm"]["config"]["model"]
    with readable(path):
        model = trained(node, tokenizer.vocab_size if tokenizer else None, weights_of(content), trust)
    use_counts(model, path)
    return model


def check_weights(path: Path, content: dict[str, Any]) -> None:
    """Check the weights of a checkpoint against the model that it names.

    Raises:
        InputError: if their names or shapes do not match.
    """
    tokenizer = tokenizer_of(path, content)
    with readable(path):
        sketch(content["charlm"]["config"]["model"], tokenizer.vocab_size if tokenizer else None, weights_of(content))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise InputError for any error in a checkpoint's model, weights or tokenizer."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} is not used: {one_line(error)}") from error
    except Exception as error:  # the file decides which model is built
        if out_of_memory(error):
            raise
        raise InputError(
            f"{path} is damaged or of another version: {one_line(error)}; train again, or use its backup"
        ) from error


def one_line(error: Exception) -> str:
    """Return the first line of an error, which may quote the file."""
    lines = str(error).splitlines()[:1] or [""]
    return printable(lines[0], 300) or type(error).__name__


def trained(
    node: dict[str, Any], vocab_size: int | None, weights: dict[str, Tensor], trust: Collection[str] = ()
) -> nn.Module:
    """Build the model that a config names and load `weights`; refuse a model larger than these."""
    sketch(node, vocab_size, weights, trust)  # before memory is taken
    model = build(node, vocab_size, trust)
    model.load_state_dict(weights)
    return model


def sketch(
    node: dict[str, Any], vocab_size: int | None, weights: dict[str, Tensor], trust: Collection[str] = ()
) -> None:
    """Build the model that a config names on the meta device, and check `weights` against it.

    Raises:
        InputError: if the model is larger than its weights.
        RuntimeError: if names or shapes of the weights differ from those of the model.
    """
    storages = [weight.untyped_storage() for weight in weights.values()]
    stored = {id(storage): storage.nbytes() for storage in storages}  # once, even if strides or names repeat it
    if sum(weight.nbytes for weight in weights.values()) > 2 * sum(stored.values()):  # a tied weight has two names
        raise InputError(TOO_LARGE)
    left = 2 * len(weights)  # a tied parameter is registered in both places

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(TOO_LARGE)

    try:
        with register_module_parameter_registration_hook(count), torch.device("meta"):
            empty = build(node, vocab_size, trust)
    except RuntimeError as error:  # the meta device takes no memory, but a size may overflow
        if out_of_memory(error):
            raise InputError(TOO_LARGE) from error
        raise
    if sum(buffer.nbytes for buffer in empty.buffers()) > COMPUTED:
        raise InputError(TOO_LARGE)
    empty.load_state_dict(weights, assign=True)


def build(node: dict[str, Any], vocab_size: int | None, trust: Collection[str] = ()) -> nn.Module:
    """Build the model that a config names.

    Args:
        vocab_size: that of the tokenizer; None: the config has it.
        trust: packages outside of charlm whose models may be built.

    Raises:
        InputError: if the class is neither charlm's nor trusted, cannot be imported, or does not take the settings.
    """
    target = node["_target_"] if isinstance(node["_target_"], str) else "no name"
    package = target.partition(".")[0]
    own, trusted = target.startswith("charlm.model."), package in trust and package != "charlm"
    try:
        found = pkgutil.resolve_name(target) if own or trusted else None
    except ModuleNotFoundError as error:
        if own:
            raise
        raise InputError(
            f"{printable(target, 100)} is its model, and cannot be imported ({one_line(error)}): install the package "
            f"{printable(package, 50)}, or name the folder that holds it in PYTHONPATH"
        ) from error
    is_model = isinstance(found, type) and issubclass(found, nn.Module)
    if not isinstance(found, type) or not is_model or (own and not found.__module__.startswith("charlm.model.")):
        raise InputError(
            f"the checkpoint names {printable(target, 100)} as its model, which is not one of charlm.model: if you "
            f"trust its package, add --trust {printable(package, 50)}, or in Python "
            f"load_from_checkpoint(PATH, model=...)"
        )
    settings = {k: v for k, v in node.items() if not k.startswith("_")}
    named = settings.pop("vocab_size", vocab_size)
    if type(named) is not int or not 1 <= named <= LARGEST_VOCABULARY or vocab_size not in (None, named):
        raise InputError(f"the checkpoint gives model.vocab_size={printable(str(named), 40)}, which cannot be")
    for key, value in settings.items():
        if own and not isinstance(value, str | int | float | None):  # a list might have no end
            raise InputError(f"the checkpoint gives model.{key} more than one value, which no model of charlm takes")
    check_node("model", settings | {"_target_": target})
    model: nn.Module = found(vocab_size=named, **settings)
    return model


def describe(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Summarize a checkpoint for people and programs; `content` may have tensors on the meta device."""
    kept, weights = content["charlm"], weights_of(content)
    return {
        "checkpoint": str(path),
        "generation": {LAST: "last", PREVIOUS: "previous", BEST: "best"}.get(path.name),
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
    """Write the weights for other tools, as safetensors with config, tokenizer and corpus as metadata.

    Raises:
        InputError: if the file name does not end with .safetensors.
        OSError: if it cannot be written.
    """
    from safetensors.torch import save

    if file.suffix != ".safetensors":
        raise InputError(f"--export {file}: give a name that ends with .safetensors")
    described = {"step": loaded.step, "model": loaded.config["model"], "corpus": loaded.corpus}
    described["tokenizer"] = loaded.tokenizer.state_dict()
    weights = {name: weight.cpu().contiguous().clone() for name, weight in loaded.model.state_dict().items()}
    metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in described.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda opened: opened.write(save(weights, metadata)))
