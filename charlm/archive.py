"""Files of plain types and tensors: whole or refused, and read without trusting who wrote them.

A file is what `torch.save` writes, a zip, with the SHA-256 of just that as the comment of the zip, which other readers
pass over. Before any memory is taken for its tensors, a file is held against its hash and against its own size.
"""

import contextlib
import hashlib
import io
import os
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler
from torch.storage import TypedStorage, UntypedStorage

from charlm.disk import open_regular
from charlm.errors import InputError, out_of_memory

LABEL = b"sha256:"
COMMENT = len(LABEL) + 64  # bytes
LENGTH = COMMENT.to_bytes(2, "little")
SIGNATURE, END = b"PK\5\6", 22  # the first bytes of the last record of a zip, and all of its bytes before a comment
CHUNK = 2**20
PLAIN = {Tensor, dict, OrderedDict, list, tuple, set, str, int, float, bool, type(None)}
# All that a pickle of plain types and tensors names. torch allows some more, which could ask for any memory.
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
NAMES |= {
    f"torch {kind}Storage"
    for kind in ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
}


class Refused(Exception):
    """Why a file is not used, to follow its name in a sentence."""


class Memo(dict[int, Any]):
    """What an unpickler has made and may take again.

    Tuples of tuples that are taken twice at each of many levels would take forever to hash, as a key of a dict.
    """

    def __getitem__(self, place: int) -> Any:
        made = super().__getitem__(place)
        if type(made) is tuple and any(type(item) is tuple for item in made):
            raise Refused("takes a tuple of tuples twice, which no checkpoint needs: not loaded")
        return made


class Hashed:
    """A file to write to, which hashes what it is given.

    An error waits for `check`: torch's writer, in C++, would go on after it and hide it behind one of its own.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            if not self.error:
                self.file.write(data)
                self.sha256.update(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """The file is flushed by who opened it."""

    def check(self) -> None:
        if self.error:
            raise self.error


def dump(content: dict[str, Any], file: IO[bytes]) -> None:
    """Write `content`, and its hash behind it.

    Raises:
        OSError: if there is no room for it, for example.
    """
    hashed = Hashed(file)
    torch.save(content, hashed)  # type: ignore[arg-type]
    hashed.check()
    file.seek(-2, os.SEEK_END)  # the length of the comment, zero until now
    file.write(LENGTH + LABEL + hashed.sha256.hexdigest().encode())


def load(path: Path) -> dict[str, Any]:
    """The content of a file, on the CPU.

    Raises:
        InputError: if it is missing, damaged, of another kind, or holds more than plain types and tensors.
    """
    with opened(path) as file:
        verify(file)
        sketch(file)
        file.seek(0)  # of the same open file, which another process may have replaced meanwhile
        return torch.load(file, map_location="cpu", weights_only=True)


def outline(path: Path) -> dict[str, Any]:
    """The content of a file, with tensors on the meta device: all but their numbers.

    Raises:
        InputError: as for `load`.
    """
    with opened(path) as file:
        verify(file)
        return sketch(file)


def stored_hash(path: Path) -> str | None:
    """The SHA-256 that a file carries; None for those of charlm's first versions, which carry none.

    Raises:
        InputError: as for `load`.
    """
    with opened(path) as file:
        return find_hash(file)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read; whatever is wrong with it becomes one line with its name."""
    try:
        with open_regular(path) as file:
            yield file
    except InputError:
        raise
    except Refused as reason:
        raise InputError(f"{path} {reason}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged or foreign file fails in zip, pickle or torch in any way it likes
        if out_of_memory(error):
            raise
        raise InputError(f"{path} is not a checkpoint of charlm, or is damaged") from error


def verify(file: IO[bytes]) -> None:
    """Hold a file against the hash that it carries, if it carries one."""
    sha256 = find_hash(file)
    if sha256 and sha256 != digest(file, file.seek(0, os.SEEK_END) - COMMENT - 2):
        raise Refused("is damaged: its content is not what its hash says")


def find_hash(file: IO[bytes]) -> str | None:
    """What stands behind the end of the zip, which must be the end of the file."""
    file.seek(0)
    if file.read(2) != b"PK":
        raise Refused("is not a checkpoint: it is no file that python train.py wrote")
    if not zipfile.is_zipfile(file):
        raise Refused("is cut off: it begins as a checkpoint and has no end")
    file.seek(max(0, file.seek(0, os.SEEK_END) - END - COMMENT))
    tail = file.read()
    if tail[-END:].startswith(SIGNATURE) and tail.endswith(b"\0\0"):
        return None
    if not (tail.startswith(SIGNATURE) and tail[:END].endswith(LENGTH) and tail[END:].startswith(LABEL)):
        raise Refused("is cut off or damaged: it does not end with its hash")
    return tail[END + len(LABEL) :].decode("ascii")


def digest(file: IO[bytes], length: int) -> str:
    """Of the first `length` bytes and the two zeros that `torch.save` wrote next."""
    sha256, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK))
    file.seek(0)
    while length > 0 and (n := file.readinto(chunk[: min(CHUNK, length)])):  # type: ignore[attr-defined]
        sha256.update(chunk[:n])
        length -= n
    sha256.update(b"\0\0")
    return sha256.hexdigest()


def sketch(file: IO[bytes]) -> dict[str, Any]:
    """The content with tensors on the meta device. Whatever a file claims, this takes no more memory than its size."""
    with zipfile.ZipFile(file) as archive:
        sizes = record_sizes(archive, file.seek(0, os.SEEK_END))
        root = next(iter(sizes)).partition("/")[0]
        pickled = archive.read(f"{root}/data.pkl")
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and argument not in NAMES:
            raise Refused(f"names {ascii(argument)[1:80].replace(' ', '.')}, which no checkpoint needs: not loaded")
        if operation.name == "PROTO" and argument != 2:
            raise Refused("is of another pickle protocol than torch.save's")
    storages: dict[str, UntypedStorage] = {}

    def storage(pid: tuple[Any, ...]) -> TypedStorage:
        _, kind, key, _, n = pid
        if type(n) is not int or type(key) is not str:
            raise Refused("is damaged: it claims a storage without a name or a size")
        nbytes = sizes[f"{root}/data/{key}"]
        if n * kind.dtype.itemsize != nbytes:
            raise Refused(f"is damaged: it claims {n} numbers where {nbytes} bytes are")
        untyped = storages.setdefault(key, UntypedStorage(nbytes, device="meta"))
        return TypedStorage(wrap_storage=untyped, dtype=kind.dtype, _internal=True)

    unpickler = Unpickler(io.BytesIO(pickled), encoding="utf-8")
    unpickler.memo = Memo()
    unpickler.persistent_load = storage  # type: ignore[method-assign]
    content = unpickler.load()
    check_plain(content)
    # A tensor that reaches beyond its storage makes torch enlarge it, which on the meta device is only a number.
    if any(untyped.nbytes() != sizes[f"{root}/data/{key}"] for key, untyped in storages.items()):
        raise Refused("is damaged: it claims tensors that are larger than what it holds")
    if type(content) is not dict:
        raise Refused(f"holds a {type(content).__name__}, not a checkpoint")
    return content


def record_sizes(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Bytes of each record by its name, of an archive that every reader of zips understands alike."""
    records = archive.infolist()
    plain = all(
        r.compress_type == zipfile.ZIP_STORED and r.file_size == r.compress_size and r.filename == r.orig_filename
        for r in records
    )
    alone = len({r.filename.lower() for r in records}) == len(records)  # torch finds records in any case
    if not records or not plain or not alone or records[0].header_offset:
        raise Refused("is not a checkpoint: its records are not as torch.save writes them")
    if sum(r.file_size for r in records) > size:
        raise Refused("is damaged: it claims to hold more than its own size")
    return {r.filename: r.file_size for r in records}


def check_plain(content: Any) -> None:
    """Look at everything in nested containers once, whatever holds itself or is held many times.

    Raises:
        Refused: for what is neither a tensor nor of a plain type.
    """
    seen, left = set(), [content]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if type(node) not in PLAIN:
            raise Refused(f"holds a {type(node).__name__}, and a checkpoint holds plain types and tensors only")
        if isinstance(node, dict):
            left += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set):
            left += node
