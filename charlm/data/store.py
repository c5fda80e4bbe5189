"""The ids of a large text on disk, made once and memory-mapped by all who train on it.

A store is a folder in the user's cache, named by the hash of the text and by the tokenizer. It holds
- ids.bin: the ids of the whole text, of the smallest integer type;
- documents.npy: the starts of the documents, in ids;
- store.json: what else there is to know, written last. It records size, times and inode of the others: if any of
  them has changed since, the store is made anew.
"""

import errno
import hashlib
import json
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import TypedDict  # as pydantic takes it, until Python 3.12

from charlm.data.reader import Piece, at_work
from charlm.data.segments import cut_at, segments
from charlm.errors import DiskError, InputError
from charlm.files import read_json, stamp, write_json
from charlm.home import cache
from charlm.system import memory

if TYPE_CHECKING:
    from charlm.data.corpus import Corpus
    from charlm.tokenizer import Tokenizer

FORMAT = 1
IDS, DOCUMENTS, MANIFEST = "ids.bin", "documents.npy", "store.json"
LARGEST_MANIFEST = 2**20


class Manifest(TypedDict):
    """store.json."""

    format: int
    corpus: str  # its name, for those who look into the cache
    source: str
    tokenizer: str
    dtype: str
    n: int  # ids
    bounds: list[int]  # ids before each cut
    files: dict[str, list[int]]  # the `stamp` of each other file


@dataclass(frozen=True)
class Encoded:
    """A text as ids.

    Args:
        ids: (N,), of the smallest integer type.
        scattered: the same, to be read at random places. The system then reads only the pages that are needed.
        documents: starts of the documents, in ids, (n,) int64.
        bounds: number of ids before each cut.
        folder: of the store; None: they are in memory.
    """

    ids: Tensor
    scattered: Tensor
    documents: np.ndarray
    bounds: list[int]
    folder: Path | None


def encode(corpus: "Corpus", tokenizer: "Tokenizer", cuts: Sequence[int]) -> Encoded:
    """Return the ids of a text: a small one in memory, a large one from its store, which is made if there is none.

    Args:
        cuts: numbers of characters, in ascending order, where splits end: no token reaches across.

    Raises:
        InputError: if the text changes meanwhile, or the cache has no room.
    """
    if corpus.small:
        parts: list[np.ndarray] = []
        documents, bounds = write(corpus.read(), tokenizer, cuts, parts.append)
        ids = torch.from_numpy(parts[0].copy() if len(parts) == 1 else np.concatenate(parts))
        return Encoded(ids, ids, documents, bounds, None)
    if tokenizer.by_character:  # one store serves all cuts
        whole = stored(corpus, tokenizer, [])
        return replace(whole, bounds=[*cuts])
    return stored(corpus, tokenizer, cuts)


class Kept(NamedTuple):
    """A store in the cache, or what an interruption has left of one."""

    folder: Path
    corpus: str
    source: str
    tokenizer: str
    size: int  # bytes


def kept() -> list[Kept]:
    """Return all stores in the cache, the largest first."""
    found = []
    for folder in (cache() / "store").glob("*/"):
        if not folder.is_dir():  # a lock
            continue
        size = sum(file.stat().st_size for file in folder.iterdir())
        try:
            manifest = read_json(folder / MANIFEST, Manifest, LARGEST_MANIFEST, FORMAT)
            names = manifest["corpus"], manifest["source"], manifest["tokenizer"]
        except (OSError, InputError):
            names = "unfinished", "", ""
        found.append(Kept(folder, *names, size))
    return sorted(found, key=lambda one: -one.size)


def prune() -> int:
    """Remove all stores that no process makes at the moment, and the memory of surveys. Returns the bytes freed.

    A process that has mapped a store keeps it until it ends.
    """
    freed = 0
    for one in kept():
        lock = FileLock(one.folder.with_suffix(".lock"))
        try:
            with lock.acquire(blocking=False):
                shutil.rmtree(one.folder)
        except Timeout:
            continue
        freed += one.size
    shutil.rmtree(cache() / "surveys", ignore_errors=True)
    return freed


def stored(corpus: "Corpus", tokenizer: "Tokenizer", cuts: Sequence[int]) -> Encoded:
    """Return the ids of a large text from its store."""
    folder = folder_of(corpus, tokenizer, cuts)
    return opened(folder) or made(folder, corpus, tokenizer, cuts)


def write(
    pieces: Iterable[Piece], tokenizer: "Tokenizer", cuts: Sequence[int], sink: Callable[[np.ndarray], object]
) -> tuple[np.ndarray, list[int]]:
    """Encode a text piece by piece. Returns where documents begin, and the number of ids before each cut."""
    n, documents, bounds = 0, [], []
    sizes = np.array([len(token) for token in tokenizer.tokens])
    parts: Iterator[tuple[bytes, bool, bool]] = cut_at(pieces, cuts)
    if not tokenizer.context_free:
        parts = ((text.encode(), begins, is_cut) for text, begins, is_cut in segments(pieces, cuts))
    for raw, begins, is_cut in parts:
        if begins:
            documents.append(n)
        ids = tokenizer.encode_utf8(raw)
        # Losses per byte would be wrong otherwise. One byte each is what nearly all text of characters has.
        one_each = len(ids) == len(raw) and raw.isascii() and tokenizer.by_character
        assert one_each or sizes[ids].sum() == len(raw), f"tokenizer={tokenizer.name} lost or added bytes"
        sink(ids)
        n += len(ids)
        if is_cut:
            bounds.append(n)
    return np.array(documents, np.int64), [*bounds, *[n] * (len(cuts) - len(bounds))]


def folder_of(corpus: "Corpus", tokenizer: "Tokenizer", cuts: Sequence[int]) -> Path:
    """Return the folder of a store: named by all that its ids depend on."""
    depends = [FORMAT, corpus.survey.sha256, corpus.survey.layout, tokenizer.state_dict(), *cuts]
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return cache() / "store" / name


def opened(folder: Path) -> Encoded | None:
    """Open a store; None if there is none, or none that is whole and as it was made."""
    try:
        manifest = read_json(folder / MANIFEST, Manifest, LARGEST_MANIFEST, FORMAT)
        dtype = np.dtype(manifest["dtype"])
        if manifest["files"] != {name: stamp(folder / name) for name in (IDS, DOCUMENTS)}:
            return None
        documents = np.load(folder / DOCUMENTS)
        ids = mapped(folder / IDS, dtype)
        return Encoded(ids, mapped(folder / IDS, dtype, scattered=True), documents, manifest["bounds"], folder)
    except (OSError, ValueError, TypeError, EOFError) as error:  # InputError is a ValueError
        if memory.refused(error):
            raise
        return None


def mapped(file: Path, dtype: np.dtype, scattered: bool = False) -> Tensor:
    """Map a file of ids into memory, read-only: all processes share one copy."""
    with file.open("rb") as opened_file:
        view = mmap.mmap(opened_file.fileno(), 0, access=mmap.ACCESS_READ)
    if scattered and hasattr(view, "madvise"):
        view.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nobody writes
        return torch.from_numpy(np.frombuffer(view, dtype))


def made(folder: Path, corpus: "Corpus", tokenizer: "Tokenizer", cuts: Sequence[int]) -> Encoded:
    """Make a store, or wait for another process that makes it."""
    partial = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if found := opened(folder):  # another process has just made it
                return found
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                fill(partial, corpus, tokenizer, cuts)
                shutil.rmtree(folder, ignore_errors=True)  # damaged, if there
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if memory.refused(error):
            raise
        raise DiskError(
            f"the ids of {corpus.name} cannot be kept in {folder.parent}: {error.strerror}; make room, or name another "
            f"folder in the environment variable CHARLM_CACHE"
        ) from error
    store = opened(folder)
    assert store
    return store


def rehearse(file: Path, size: int) -> None:
    """Map a file of `size` bytes, with nothing in it, so that a limit on addresses shows before any work is done.

    Raises:
        OSError: if it cannot be mapped.
    """
    os.truncate(file, size)
    mapped(file, np.dtype(np.uint8))
    os.truncate(file, 0)


def fill(folder: Path, corpus: "Corpus", tokenizer: "Tokenizer", cuts: Sequence[int]) -> None:
    """Write the files of a store.

    Raises:
        OSError: if there is no room for them.
        InputError: if the text is no longer what was surveyed.
    """
    survey, dtype = corpus.survey, tokenizer.dtype
    need = dtype.itemsize * (survey.characters if tokenizer.by_character else survey.bytes)
    if shutil.disk_usage(folder).free < need:
        raise OSError(errno.ENOSPC, f"{memory.size(need)} do not fit")
    with (folder / IDS).open("wb", buffering=0) as file:
        rehearse(folder / IDS, need)
        n = 0

        def sink(ids: np.ndarray) -> None:
            nonlocal n
            view = memoryview(np.ascontiguousarray(ids, dtype).view(np.uint8))  # type: ignore[arg-type]
            while view:  # a full disk takes a part
                view = view[file.write(view) :]
            n += len(ids)

        pieces = at_work(corpus.read(), f"tokenizing {corpus.name}", survey.bytes)
        try:
            documents, bounds = write(pieces, tokenizer, cuts, sink)
        finally:  # also where it has other characters by now
            if corpus.stamps() != corpus.surveyed:
                raise InputError(f"{corpus.source} changed while it was read: run the command again once it is at rest")
        os.fsync(file.fileno())
    with (folder / DOCUMENTS).open("wb") as other:
        np.save(other, documents)
        os.fsync(other.fileno())
    manifest: Manifest = {
        "format": FORMAT,
        "corpus": corpus.name,
        "source": corpus.source,
        "tokenizer": tokenizer.name,
        "dtype": dtype.str,
        "n": n,
        "bounds": bounds,
        "files": {name: stamp(folder / name) for name in (IDS, DOCUMENTS)},
    }
    write_json(folder / MANIFEST, manifest)
