"""What a model has counted, in a file next to its checkpoints: mapped into memory, so that it is at hand at once."""

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from charlm.errors import warn
from charlm.files import is_regular, write_atomically

COUNTS = "counts.safetensors"
VERSION = "2"  # of the counting; a table that was made by other rules would be wrong


def write_counts(model: Any, folder: Path) -> None:
    """Write the counts of a model to a folder of checkpoints.

    Raises:
        OSError: if there is no room for them.
    """
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in model.counts().items()}
    folder.mkdir(exist_ok=True)
    write_atomically(folder / COUNTS, lambda file: file.write(save(tensors, card(model.text))))


def use_counts(model: nn.Module, checkpoint: Path) -> None:
    """Give a model that was read from a checkpoint the counts that lie next to it, if these are of the same text."""
    file = checkpoint.with_name(COUNTS)
    if not hasattr(model, "use_counts") or not is_regular(file):
        return
    from safetensors import SafetensorError, safe_open

    model_: Any = model
    try:
        with safe_open(file, "pt") as opened:
            if opened.metadata() != card(model_.text):
                raise ValueError("they are of another text")
            model_.use_counts({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, IndexError) as error:
        warn(f"the counts in {file} are not used ({error}): the text is counted again")


def card(text: Tensor) -> dict[str, str]:
    """Return what counts depend on, besides the settings of their model."""
    digest = hashlib.sha256(text.cpu().numpy().tobytes()).hexdigest()
    return {"text": digest, "version": VERSION}
