"""A corpus: a text that is read in pieces, of any size; and how a file, a folder or a glob becomes one."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from glob import glob, has_magic
from pathlib import Path
from typing import IO

from charlm.data.reader import BLOCK, PACKED, Piece, at_work, pieces_of, plain_name, read
from charlm.data.survey import Survey, survey
from charlm.errors import DiskError, InputError
from charlm.files import PARTIAL, read_json, stamp, write_json
from charlm.home import cache as cache_folder

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")
SMALL = 2**24  # bytes; a text of this size is read and tokenized in a fraction of a second, and kept in memory
SURVEY = 2  # version of what `Survey` holds
RACY = 2 * 10**9  # nanoseconds: the coarsest clock of a file system
LARGEST_SURVEY = 2**25  # bytes of a file that describes a text: an alphabet can be large


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text, which is read in pieces, and the name it goes by in logs and dashboards.

    Args:
        source: its place: a path, or the name of a module.
        read: returns the text from its beginning.
        small: whether it is held in memory. Ids of any other text are kept in a store.
        files: those that a large text is read from.
        field: as `charlm.data.reader.read` takes it.
        split: after how many bytes train and val end in its published split, if there is one; test is the rest.
        documents: returns the documents that it consists of, each of which can be held out; none if it has no such.
    """

    name: str
    source: str
    read: Callable[[], Iterator[Piece]]
    small: bool = True
    files: Sequence[Path] = ()
    field: str = ""
    split: tuple[int, ...] = ()
    documents: Callable[[], Sequence["Corpus"]] = tuple

    @classmethod
    def of(cls, name: str, text: str, source: str) -> "Corpus":
        """A corpus of a text that is at hand."""
        return cls(name, source, partial(pieces_of, text.encode()))

    @property
    def text(self) -> str:
        """The whole text."""
        return b"".join(piece.raw for piece in self.read()).decode()

    @cached_property
    def survey(self) -> Survey:
        """Length, hash and alphabet: found in one pass, and remembered as long as the files of a large text stay."""
        if self.small:
            return survey(self.read(), self.split)
        stamps = self.surveyed
        name = hashlib.sha256(json.dumps([SURVEY, self.field, self.split, stamps]).encode()).hexdigest()[:32]
        remembered = cache_folder() / "surveys" / f"{name}.json"
        try:
            return Survey(**read_json(remembered, dict, LARGEST_SURVEY))
        except (OSError, TypeError, InputError):
            packed = any(file.suffix in PACKED for file in self.files)
            total = None if packed else sum(size for _, (size, *_) in stamps)
            found = survey(at_work(self.read(), f"reading {self.name}", total), self.split)
        write_survey(
            remembered, found, [moment for _, (_, changed, status, _) in stamps for moment in (changed, status)]
        )
        return found

    @cached_property
    def surveyed(self) -> list[tuple[str, list[int]]]:
        """The stamps of the files when they were surveyed."""
        return self.stamps()

    def stamps(self) -> list[tuple[str, list[int]]]:
        """Return what changes when the content of the files does."""
        return [(os.path.abspath(file), stamp(file)) for file in self.files]

    def card(self) -> dict[str, str | int]:
        """Return the description of the corpus for checkpoints and results.json; plain types."""
        found = self.survey
        return {
            "name": self.name, "source": self.source, "sha256": found.sha256, "characters": found.characters,
            "bytes": found.bytes
        }  # fmt: skip

    def cautions(self) -> Iterator[str]:
        """Warn of characters that are seldom meant as text, in a line for each kind."""
        return self.survey.cautions(self.name)


def text(path: str | None = None, field: str = "text") -> Corpus:
    """Any UTF-8 text: a file, a folder (its .txt, .text, .md, .rst and .jsonl files) or a glob; each also packed.

    Several files are read in the order of their names, each ending in a newline.

    Args:
        field: the field of a line of JSON that holds a document.
    """
    if not path:
        raise InputError("corpus=text needs a path: say path=FILE, path=FOLDER or path='GLOB'")
    files = find_text(path)
    name, source = Path(path).name or str(path), os.path.abspath(path)
    corpus = Corpus(
        name, source, partial(read_all, files, field), False, files, field, (), partial(each_file, files, field)
    )
    if is_large(files):
        return corpus
    held: list[Piece] = []
    size = 0
    for piece in corpus.read():
        held.append(piece)
        size += len(piece.raw)
        if size > SMALL:  # packed files
            return corpus
    if not held:
        raise InputError(f"{path} is empty: a corpus needs text in it")
    return replace(
        corpus, read=lambda: iter(held), small=True, files=(), documents=partial(each_file, files, field, True)
    )


def each_file(files: Sequence[Path], field: str, small: bool = False) -> Sequence[Corpus]:
    """Return each of several files as a corpus; of a single file, none."""
    several = files if len(files) > 1 else ()
    return [Corpus(f.name, str(f), partial(read_all, [f], field, ends_lines=True), small, [f], field) for f in several]


def spool(stream: IO[bytes]) -> Path:
    """Keep what standard input holds as a file in the user's cache, named by its hash, so that it can be read again.

    Raises:
        InputError: if the cache cannot be written.
    """
    folder = cache_folder() / "texts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PARTIAL, delete=False) as file:
            digest = hashlib.sha256()
            while block := stream.read(BLOCK):
                digest.update(block)
                file.write(block)
        target = folder / f"stdin-{digest.hexdigest()[:16]}.txt"
        os.replace(file.name, target)
    except OSError as error:
        raise DiskError(f"standard input cannot be kept in {folder}: {error.strerror}") from error
    return target


def is_large(files: Sequence[Path]) -> bool:
    """Return whether files hold a large text, as far as their sizes tell."""
    try:
        return sum(os.path.getsize(file) for file in files) > SMALL
    except OSError:  # `read` reports it
        return False


def read_all(files: Sequence[Path], field: str, cut: bool = False, ends_lines: bool = False) -> Iterator[Piece]:
    """Yield the text of several files, each ending in a newline; see `charlm.data.reader.read`.

    Args:
        ends_lines: whether a single file ends in one, too.
    """
    for file in files:
        ends_line = True
        for piece in read(file, field, cut):
            yield piece
            ends_line = piece.raw.endswith(b"\n")
        if (len(files) > 1 or ends_lines) and not ends_line:
            yield Piece(b"\n", False)


def write_survey(file: Path, found: Survey, changed: Sequence[int]) -> None:
    """Remember a survey, unless the text changed so lately that its times may not tell another change.

    Args:
        changed: when its files changed, in nanoseconds.
    """
    if time.time_ns() - max(changed) < RACY:
        return
    with suppress(OSError):  # only the next start would use it
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(found))


def find_text(path: str) -> list[Path]:
    """The text files that a path names, sorted."""
    place = Path(path).expanduser()
    # os.path, unlike pathlib, says no where a name is too long to be one: a text given in place of its file.
    if os.path.isfile(place):
        return [place]
    if os.path.isdir(place):
        files = [f for f in place.rglob("*") if f.is_file() and plain_name(f).endswith(TEXT_SUFFIXES)]
        if not files:
            kinds = " ".join(TEXT_SUFFIXES)
            raise InputError(
                f"no text in the folder {path}: looked for {kinds} (also .gz and .zst), in it and below; "
                f"name other files by a glob, such as path='{place / '**' / '*.py'}'"
            )
    elif has_magic(str(path)):
        files = [Path(f) for f in glob(str(place), recursive=True) if os.path.isfile(f)]
        if not files:
            raise InputError(f"path={path} matches no file: check the pattern, ** stands for any folders")
    else:
        raise InputError(f"path={path} does not exist: give a file, a folder or a glob (looked in {os.getcwd()})")
    return sorted(files)
