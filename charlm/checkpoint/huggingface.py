"""GPT-2 in the format of Hugging Face: a folder with config.json and model.safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm.checkpoint.model import Checkpoint
from charlm.errors import InputError
from charlm.files import write_atomically

CONFIG, WEIGHTS, ORIGIN = "config.json", "model.safetensors", "charlm.json"
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
LARGEST = 2**26  # bytes of a JSON file
# Settings of GPT2Config that change the function, and the only value of each that charlm's GPT computes.
FIXED = {
    "model_type": "gpt2",
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
# Names in a block. The linear layers of GPT-2 are transposed: (in, out).
IN_BLOCK = {"norm1": "ln_1", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj", "norm2": "ln_2"} | {
    "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"
}  # fmt: skip
MASKS = ("attn.bias", "attn.masked_bias")  # which older files keep with the weights


def is_huggingface(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def names(n_layer: int) -> dict[str, tuple[str, bool]]:
    """Return the name that each weight of charlm's GPT has there, and whether it is transposed."""
    found = {"token_embedding.weight": ("wte.weight", False), "position_embedding.weight": ("wpe.weight", False)}
    for layer in range(n_layer):
        for own, theirs in IN_BLOCK.items():
            for part in ("weight", "bias"):
                turned = part == "weight" and "norm" not in own
                found[f"blocks.{layer}.{own}.{part}"] = f"h.{layer}.{theirs}.{part}", turned
    return found | {f"norm.{part}": (f"ln_f.{part}", False) for part in ("weight", "bias")}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Return the settings of `model=gpt`, its weights, and the state of the tokenizer if charlm has written the folder.

    Nothing in the folder is run.

    Raises:
        InputError: if a file is missing or damaged, or the model is one that charlm's GPT cannot compute.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_settings(folder / CONFIG)
    for name, value in FIXED.items():
        if config.get(name, value) != value and (name, config[name]) != ("n_inner", 4 * config.get("n_embd", 0)):
            raise InputError(f"{folder / CONFIG} has {name}={config[name]}, and model=gpt computes only {value}")
    activation = ACTIVATIONS.get(config.get("activation_function", "gelu_new"))
    if activation is None:
        raise InputError(f"{folder / CONFIG} has an activation_function that model=gpt lacks: it has gelu and gelu_new")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}: charlm reads GPT-2 from a single file of safetensors")
    try:
        there = {name.removeprefix("transformer."): w for name, w in load_file(folder / WEIGHTS).items()}
        block_size, C = there["wpe.weight"].shape
        if not 1 <= config["n_layer"] <= len(there):
            raise ValueError(f"n_layer={config['n_layer']}")
        settings = {"block_size": block_size, "n_layer": config["n_layer"], "n_head": config["n_head"], "n_embd": C}
        weights = {
            own: (there[theirs].t().contiguous() if turned else there[theirs]).float()
            for own, (theirs, turned) in names(config["n_layer"]).items()
        }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no GPT-2 that charlm can read ({type(error).__name__}: {error})") from error
    if not any(bool(w.any()) for name, w in weights.items() if name.endswith("bias")):
        weights = {name: w for name, w in weights.items() if not name.endswith("bias")}
    bias = any(name.endswith("bias") for name in weights)
    node = {"_target_": "charlm.model.gpt.GPT", **settings, "bias": bias, "activation": activation}
    origin = folder / ORIGIN
    return node, weights, read_settings(origin)["tokenizer"] if origin.is_file() else None


def read_settings(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LARGEST:
            raise InputError(f"{file} is too large for what it should hold")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} cannot be read: it is no JSON object")
    return found


def write(loaded: Checkpoint, folder: Path) -> None:
    """Write a GPT as a folder that `transformers.GPT2LMHeadModel.from_pretrained` reads, with the same logits.

    The tokenizer is in charlm.json, from which `init_from` reads it.

    Raises:
        InputError: for any other model.
        OSError: if it cannot be written.
    """
    from safetensors.torch import save

    from charlm.model.gpt import GPT

    model = loaded.model
    if not isinstance(model, GPT):
        kind = type(model).__name__
        raise InputError(f"--format huggingface is for model=gpt, which is GPT-2, and {loaded.path} holds a {kind}")
    node: dict[str, Any] = model.arguments  # type: ignore[assignment]
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": node["vocab_size"],
        "n_positions": node["block_size"],
        "n_embd": node["n_embd"],
        "n_layer": node["n_layer"],
        "n_head": node["n_head"],
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[node["activation"]],
        **{f"{part}_pdrop": node["dropout"] for part in ("embd", "attn", "resid")},
        **FIXED,
        # No id has a special meaning.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    own, weights = model.state_dict(), {}
    for name, (theirs, turned) in names(node["n_layer"]).items():
        if name in own:
            weight = own[name].cpu()
            weights[f"transformer.{theirs}"] = (weight.t() if turned else weight).contiguous().clone()
        else:  # without biases, as they are zero
            weights[f"transformer.{theirs}"] = torch.zeros(len(own[name.replace("bias", "weight")]))
    origin = {"step": loaded.step, "corpus": loaded.corpus, "tokenizer": loaded.tokenizer.state_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, lambda file: file.write(save(weights, {"format": "pt"})))
    write_atomically(folder / ORIGIN, lambda file: file.write(json.dumps(origin).encode()))
    write_atomically(folder / CONFIG, lambda file: file.write(json.dumps(settings, indent=2).encode()))
