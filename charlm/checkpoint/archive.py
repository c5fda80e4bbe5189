"""Checkpoint files: one safetensors file, intact or refused, read without trust in its author. No pickle.

Layout of format 2, which every reader of safetensors understands:

    8 bytes      length of the header, little-endian
    header       {"__metadata__": {"charlm_format": "2", "sha256": "<64 digits>", "format": "pt", "content": "<JSON>"},
                  "<name>": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}, padded with spaces
    tensors      without gaps, wide types first, so that each is aligned

The weights have their names in the model. All other tensors are named by their place, such as
`optimizer_states/0/state/3/exp_avg`. The SHA-256 is that of the whole file without the 64 digits of the hash itself.

`content` holds the rest of what Lightning saves. For what JSON lacks, it has objects with one key: {"$tensor": name},
{"$tuple": [...]}, {"$dict": [[key, value], ...]} for keys that are not text, {"$float": "<8 bytes, hex>"} for infinity
and NaN, and {"$int": "0x..."} for integers of more than 64 bits.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from charlm.errors import InputError, out_of_memory, printable
from charlm.files import open_regular

FORMAT = 4
BEGIN = b'{"__metadata__":{"charlm_format":"'
PREFIX = BEGIN + b'%d","sha256":"' % FORMAT
HASH_AT, HASH_SIZE = 8 + len(PREFIX), 64  # bytes
LARGEST_HEADER = 2**24  # bytes; parsed JSON takes many times its size in memory
DEEPEST = 64  # levels of nested containers
CHUNK = 2**20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ZIP, OLD_HASH = b"PK", re.compile(rb"sha256:[0-9a-f]{64}\Z")
EARLIER = "was written by an earlier charlm, in a format that this one does not read"
TORCH_SAVE = (
    "is a zip as torch.save writes it, by Lightning itself or an earlier charlm, and no checkpoint of this charlm"
)


class Refused(Exception):
    """The reason why a file is not used; it follows the file's name in a sentence."""


class Encoder:
    """Turns nested plain data into JSON values and collects the tensors by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[Any, str] = {}  # names of tensors by memory address, so that tied weights are stored once

    def encode(self, node: Any, path: tuple[Any, ...] = ()) -> Any:
        """Return the JSON value of what stands at `path`.

        Raises:
            InputError: if data has another type; names the callback that it belongs to.
        """
        kind = type(node)
        if len(path) > DEEPEST:
            raise refusal(path[:3], f"containers nested deeper than {DEEPEST} levels")
        if node is None or kind in (bool, str):
            return node
        if kind is int:
            return node if abs(node) < 2**63 else {"$int": hex(node)}
        if kind is float:
            return node if math.isfinite(node) else {"$float": struct.pack(">d", node).hex()}
        if isinstance(node, Tensor):
            return {"$tensor": self.store(node, path)}
        if kind is list:
            return [self.encode(item, (*path, number)) for number, item in enumerate(node)]
        if kind is tuple:
            return {"$tuple": [self.encode(item, (*path, number)) for number, item in enumerate(node)]}
        if isinstance(node, dict):
            return self.encode_dict(node, path)
        raise refusal(path, f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."))

    def encode_dict(self, node: dict[Any, Any], path: tuple[Any, ...]) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in node):
            return {key: self.encode(value, (*path, key)) for key, value in node.items()}
        if any(isinstance(key, Tensor) for key in node):
            raise refusal(path, "a tensor as a key")
        return {"$dict": [[self.encode(x, (*path, key)) for x in (key, value)] for key, value in node.items()]}

    def store(self, tensor: Tensor, path: tuple[Any, ...]) -> str:
        """Return the name under which the file holds a tensor."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise refusal(path, f"a {type(tensor).__name__} without plain numbers")
        if tensor.dtype not in NAMES:
            raise refusal(path, f"a tensor of type {tensor.dtype}")
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if place not in self.names or not tensor.nbytes:
            self.names[place] = name = self.unused(name_of(path))
            self.tensors[name] = tensor
        return self.names[place]

    def unused(self, name: str) -> str:
        while name in self.tensors or name == "__metadata__":
            name += "_"
        return name


def name_of(path: tuple[Any, ...]) -> str:
    """Return a name for the tensor at `path`; that of a weight is its name in the model."""
    if len(path) == 2 and path[0] == "state_dict":
        path = (str(path[1]).removeprefix("model."),)
    return "/".join(map(str, path)).encode("utf-8", "backslashreplace").decode()


def refusal(path: tuple[Any, ...], what: str) -> InputError:
    """Return the error for something that no checkpoint can hold."""
    first, *rest = [printable(str(part), 200) for part in path] or ["content"]
    owner, place = (rest[0], rest[1:]) if first == "callbacks" and rest else ("", [first, *rest])
    where = f"the state of the callback {owner}" * bool(owner) or "the checkpoint"
    at = f" at {'.'.join(place)}" * bool(place)
    return InputError(
        f"{where} holds {what}{at}: charlm saves tensors, numbers, text, None, lists, tuples and dicts; convert it in "
        f"state_dict()"
    )


def dump(content: dict[str, Any], file: IO[bytes]) -> None:
    """Write a checkpoint to an empty file, tensor by tensor.

    Raises:
        InputError: if `content` holds anything but plain data and tensors.
        OSError: if the file cannot be written.
    """
    encoder = Encoder()
    tree = encoder.encode(content)
    tensors = sorted(encoder.tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"charlm_format": str(FORMAT), "sha256": "0" * HASH_SIZE, "format": "pt"}}
    header["__metadata__"]["content"] = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise InputError(
            f"the checkpoint holds {len(text):,} bytes besides its tensors, and {LARGEST_HEADER:,} are possible: keep "
            f"long lists of numbers as tensors in state_dict()"
        )
    text = len(text).to_bytes(8, "little") + text
    sha256 = hashlib.sha256(text[:HASH_AT] + text[HASH_AT + HASH_SIZE :])
    file.write(text)
    for _, tensor in tensors:
        raw = bytes_of(tensor)
        sha256.update(raw)
        file.write(raw)
    file.seek(HASH_AT)
    file.write(sha256.hexdigest().encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor in row-major order; a copy only if they are elsewhere or in another order."""
    raw: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def load(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises:
        InputError: if it is missing, damaged or of another kind.
    """
    # The library returns views of the file, which another process may overwrite later.
    return read(path, lambda tensors, name: tensors.get_tensor(name).clone())


def outline(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint with tensors on the meta device, which take no memory.

    Raises:
        InputError: as for `load`.
    """

    def empty(tensors: Any, name: str) -> Tensor:
        found = tensors.get_slice(name)
        return torch.empty(found.get_shape(), dtype=DTYPES[found.get_dtype()], device="meta")

    return read(path, empty)


def read(path: Path, make: Callable[[Any, str], Tensor]) -> dict[str, Any]:
    """Return the content of a checkpoint, whose tensors `make` takes from the library's reader by their names."""
    with opened(path) as file:
        if stored(file) != digest(file):
            raise Refused("is damaged or cut off: its content does not match its SHA-256")
        with safe_open(path, "pt") as tensors:  # checks the header: names, sizes and gaps
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise Refused("was replaced while it was read: try again")
            made = {name: make(tensors, name) for name in tensors.keys()}  # noqa: SIM118
            text = tensors.metadata()["content"]
        content = decode(json.loads(text, parse_constant=no_constant), made)
        if type(content) is not dict:
            raise Refused(f"holds a {type(content).__name__}, not a checkpoint")
    return content


def decode(node: Any, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return the data of a JSON value that `Encoder.encode` made."""
    if depth > DEEPEST:
        raise Refused(f"is damaged: it is nested deeper than {DEEPEST} levels")
    if type(node) is list:
        return [decode(item, tensors, depth + 1) for item in node]
    if type(node) is not dict:
        return node
    if len(node) != 1 or not (kind := next(iter(node))).startswith("$"):
        return {key: decode(item, tensors, depth + 1) for key, item in node.items()}
    value: Any = node[kind]
    if kind == "$tensor":
        return tensors[value]
    if kind == "$tuple":
        return tuple(decode(value, tensors, depth))
    if kind == "$dict":
        return {decode(key, tensors, depth + 1): decode(item, tensors, depth + 1) for key, item in value}
    if kind == "$float":
        return struct.unpack(">d", bytes.fromhex(value))[0]
    if kind == "$int":
        return int(value, 16)
    raise Refused(f"is damaged or of another version: it holds {printable(kind, 80)}")


def no_constant(word: str) -> None:
    raise Refused(f"is damaged: {word} is no JSON")


def stored_hash(path: Path) -> str:
    """Return the SHA-256 that a checkpoint carries.

    Raises:
        InputError: as for `load`.
    """
    with opened(path) as file:
        return stored(file)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; any error becomes one line with its name."""
    try:
        with open_regular(path) as file:
            yield file
    except InputError:
        raise
    except Refused as reason:
        raise InputError(f"{path} {reason}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged or foreign file fails in json, safetensors or torch in any way it likes
        if out_of_memory(error):
            raise
        raise InputError(f"{path} is not a checkpoint of charlm, or is damaged") from error


def stored(file: IO[bytes]) -> str:
    """Return the SHA-256 that a file carries at its beginning.

    Raises:
        Refused: if it is no checkpoint of this format.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(HASH_AT + HASH_SIZE)
    if start.startswith(ZIP):
        file.seek(max(0, size - 71))
        raise Refused(EARLIER if OLD_HASH.match(file.read()) else TORCH_SAVE)
    header, text = int.from_bytes(start[:8], "little"), start[8:]
    if found := re.match(re.escape(BEGIN) + rb'(\d{1,9})"', text):
        if int(found[1]) != FORMAT:
            raise Refused(f"has format {int(found[1])}, and this charlm reads format {FORMAT}: use another charlm")
    elif not text or not BEGIN.startswith(text[: len(BEGIN)]):
        raise Refused("is not a checkpoint: it is no file that python train.py wrote")
    if len(start) < HASH_AT + HASH_SIZE or not HASH_SIZE < header <= min(LARGEST_HEADER, size - 8):
        raise Refused("is cut off or damaged: it begins as a checkpoint and has no end")
    return start[HASH_AT:].decode("ascii", "replace")


def digest(file: IO[bytes]) -> str:
    """Return the SHA-256 of a file without the digits of its own hash."""
    file.seek(0)
    sha256, chunk = hashlib.sha256(file.read(HASH_AT)), memoryview(bytearray(CHUNK))
    file.seek(HASH_SIZE, os.SEEK_CUR)
    while n := file.readinto(chunk):  # type: ignore[attr-defined]
        sha256.update(chunk[:n])
    return sha256.hexdigest()


def load_lightning(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Return the content of a file that Lightning's own `trainer.save_checkpoint` wrote.

    torch reads it without running its code. Before that, the zip must be one that torch writes: uncompressed, no
    record twice, no more in it than the size of the file.

    Raises:
        InputError: if it is missing, damaged, of another kind, or from an earlier charlm.
    """
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
        stored_only = all(r.compress_type == zipfile.ZIP_STORED and r.file_size == r.compress_size for r in records)
        once = len({r.filename.lower() for r in records}) == len(records)  # torch finds records in any case
        if not (records and stored_only and once and sum(r.file_size for r in records) <= size):
            raise Refused("is not a checkpoint: its records are not as torch.save writes them")
        file.seek(0)
        content = torch.load(file, map_location=device, weights_only=True)
        if type(content) is not dict or not isinstance(content.get("state_dict"), dict):
            raise Refused("is not a checkpoint of Lightning: it has no state_dict")
        for name, weight in content["state_dict"].items():
            plain = type(weight) is Tensor and weight.layout == torch.strided and weight.dtype in NAMES
            if type(name) is not str or not plain:
                raise Refused(f"is not a checkpoint of charlm: {printable(str(name), 80)} is no plain tensor")
        record = content.get("charlm")
        if isinstance(record, dict) and record.get("format") != FORMAT:
            raise Refused(EARLIER)
    return content


def is_zip(path: Path) -> bool:
    """Return whether a file begins as those of torch.save do."""
    with opened(path) as file:
        return file.read(len(ZIP)) == ZIP
