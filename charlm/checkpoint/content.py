"""The content of a checkpoint: required keys and their types."""

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from charlm.checkpoint.archive import FORMAT
from charlm.errors import InputError
from charlm.schema import STRICT
from charlm.tokenizer import Tokenizer

if TYPE_CHECKING:  # generating text does not need Lightning, which is slow to import
    from charlm.data.datamodule import CharDataModule


Count = Annotated[
    int, Ge(0), Le(2**48)
]  # a number of steps, bytes, ...; larger ones would overflow in sums and products


# Required keys of every checkpoint, and their types.
MODEL: dict[str, Any] = {
    "global_step": Count,
    "state_dict": dict[str, Tensor],
    "charlm.format": Annotated[int, Ge(FORMAT), Le(FORMAT)],
    "charlm.config.model": dict[str, Any],
}


# Also required if a `CharDataModule` served the batches.
TEXT: dict[str, Any] = {
    "charlm.config.data": dict[str, Any],
    "charlm.config.evaluate": Literal["auto"] | list[str],
    "charlm.tokenizer": dict[str, str | list[Annotated[int, Ge(0), Le(0x10FFFF)]] | list[str]],
    "charlm.tokenizer.name": str,
    "charlm.corpus.name": str,
    "charlm.corpus.source": str,
    "charlm.corpus.sha256": str,
}


# Required to resume; `charlm.checkpoint.restore` checks the rest against the new trainer.
TRAINING: dict[str, Any] = {
    "validated_at": Annotated[int, Ge(-1), Le(2**48)],
    "loops.fit_loop": dict[str, Any],
    "callbacks": dict[str, dict[str, Any]],
    "callbacks.Checkpoint.logged": dict[str, Count],
    "optimizer_states": list[dict[str, Any]],
    "lr_schedulers": list[dict[str, Any]],
}


AVERAGES: dict[str, Any] = {"ema.raw": dict[str, Tensor], "ema.updates": Count, "ema.updated_at": Count}


def record(config: dict[str, Any], tokenizer: Tokenizer, corpus: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that a checkpoint stores with weights and training state; plain types only."""
    return {"format": FORMAT, "config": config, "tokenizer": tokenizer.state_dict(), "corpus": corpus}


def record_of(model: nn.Module, data: "CharDataModule | None") -> dict[str, Any]:
    """Return the same metadata without a Hydra config: taken from the model and its data.

    Args:
        data: None where it is trained on batches of the user's own, of whose text and tokenizer nothing is known.
    """
    kind = type(model)
    node = {"_target_": f"{kind.__module__}.{kind.__qualname__}"} | getattr(model, "arguments", {})
    if data is None:
        return {"format": FORMAT, "config": {"model": node}}
    config = {"model": node, "data": data.settings(), "evaluate": [*data.splits]}
    return record(config, data.tokenizer, data.corpus.card())


def check_training(path: Path, content: dict[str, Any]) -> None:
    """Check the parts of a checkpoint that a resumed run needs.

    Raises:
        InputError: if one is missing or has another type.
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


def check_content(path: Path, content: dict[str, Any], needs_text: bool) -> dict[str, Any]:
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
