"""The weights that a new run begins from: those of another run, or of a GPT-2 in the format of Hugging Face."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charlm.checkpoint import huggingface
from charlm.checkpoint.content import weights_of
from charlm.checkpoint.file import read_newest
from charlm.checkpoint.model import readable, tokenizer_of
from charlm.errors import InputError, one_line
from charlm.schema import name_of, resolve
from charlm.tokenizer import TOKENIZERS, Tokenizer

FREE = ("dropout", "checkpointing")  # settings of a model that do not belong to its weights
EMBEDDING = "token_embedding.weight"


@dataclass(frozen=True, eq=False)
class Initial:
    """Weights, what they belong to, and the tokenizer for which they were trained, if it is known."""

    place: str
    model: dict[str, Any]  # the config of the model
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None

    @property
    def sha256(self) -> str:
        """Of the weights."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            weight = self.weights[name].contiguous()
            digest.update(f"{name} {weight.dtype} {[*weight.shape]}".encode())
            digest.update(weight.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check(self, config: dict[str, Any]) -> None:
        """Check the settings of a new run against those that the weights belong to.

        Raises:
            InputError: if they differ; says which settings to give.
        """
        node, own = config["model"], self.model
        if node["_target_"] != own["_target_"]:
            raise InputError(f"init_from={self.place} holds another model: say model={name_of(own)}")
        other = {k: v for k, v in own.items() if k not in (*FREE, "block_size", "_target_") and node.get(k, v) != v}
        if other:
            say = " ".join(f"model.{name}={value}" for name, value in other.items()).lower()
            raise InputError(f"init_from={self.place} holds a model with other settings: say {say}")
        maker = getattr(resolve("tokenizer", config["tokenizer"]["_target_"]), "__self__", None)
        if self.tokenizer and getattr(maker, "name", self.tokenizer.name) != self.tokenizer.name:
            raise InputError(f"init_from={self.place} has other tokens: say tokenizer={self.tokenizer.name}")

    def load(self, model: nn.Module, tokenizer: Tokenizer, assign: bool = False) -> None:
        """Give a model these weights.

        Args:
            assign: not copies of them; as a model on the meta device needs.

        Raises:
            InputError: if they are not of its shape.
        """
        V, weights = tokenizer.vocab_size, self.weights
        if self.tokenizer is None and len(weights[EMBEDDING]) == V + 1:  # GPT-2's last token ends a text
            weights = weights | {EMBEDDING: weights[EMBEDDING][:V]}
        try:
            model.load_state_dict(weights, assign=assign)
        except RuntimeError as error:
            block_size = self.model.get("block_size")
            if block_size and block_size != model.block_size:
                raise InputError(
                    f"init_from={self.place} sees {block_size} tokens: say data.block_size={block_size}"
                ) from error
            if self.tokenizer is None:
                V_there = len(weights[EMBEDDING])
                raise InputError(
                    f"init_from={self.place} has {V_there:,} tokens, and tokenizer={tokenizer.name} {V:,}: for GPT-2, "
                    f"say tokenizer=tiktoken"
                ) from error
            raise InputError(f"init_from={self.place} has the weights of another model: {one_line(error)}") from error


@cache  # a command checks a run before it starts one
def initial(place: str) -> Initial:
    """Read the weights that `init_from` names; no code from there runs.

    Raises:
        InputError: if there are none, or none that can be read.
    """
    folder = Path(place).expanduser()
    if huggingface.is_huggingface(folder):
        node, weights, state = huggingface.read(folder)
        with readable(folder):
            return Initial(place, node, weights, TOKENIZERS[state["name"]].from_state_dict(state) if state else None)
    try:
        path, content, _ = read_newest(folder)
        return Initial(place, content["charlm"]["config"]["model"], weights_of(content), tokenizer_of(path, content))
    except InputError as error:
        raise InputError(f"init_from={place} cannot be used: {error}") from error
