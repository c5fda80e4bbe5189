"""Corpora with names: texts of the field with pinned content and splits, and the one that Python carries."""

import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NamedTuple

from charlm.data.blend import Blend
from charlm.data.corpus import Corpus, read_all, text
from charlm.data.download import fetch, remember, remembered
from charlm.data.held_out import hold_out
from charlm.errors import CorpusUnavailable, DiskError, InputError
from charlm.files import write_atomically
from charlm.home import cache as cache_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Its plays, and the character with which the first speech of each begins. The last one breaks off in its second act.
PLAYS = {
    "Coriolanus": 0,
    "Richard III": 154_470,
    "Richard II": 317_027,
    "Romeo and Juliet": 442_994,
    "Henry VI, Part 3": 576_460,
    "The Winter's Tale": 710_427,
    "Measure for Measure": 846_171,
    "The Taming of the Shrew": 966_133,
    "The Tempest": 1_080_739,
}
BLOCK = 2**20  # bytes that are unpacked at a time


class Published(NamedTuple):
    """A result that others have published."""

    name: str
    bits_per_byte: float
    split: str = "test"

    @property
    def comparable(self) -> bool:
        """Whether it is of text that no model was trained on."""
        return self.split != "whole"


@dataclass(frozen=True)
class Archive:
    """A corpus in an archive on the internet, with its content and its split pinned."""

    url: str
    digest: str  # of the text in a zip file, or of a tar file with several, as "md5:..."
    split: tuple[int, int]  # bytes after which train and val end
    download: bool = True  # False: its licence does not allow it


HUTTER = (90_000_000, 95_000_000)  # as Mikolov et al. (2012) and all after them cut these 10^8 bytes
ARCHIVES = {
    "enwik8": Archive(
        "https://mattmahoney.net/dc/enwik8.zip",
        "sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        HUTTER,
    ),
    "text8": Archive("https://mattmahoney.net/dc/text8.zip", "md5:3bea1919949baf155f99411df5fada7e", HUTTER),
    "ptb_char": Archive(
        "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        "md5:30177ea32e27c525793142b6bf2c8e2d",
        (0, 0),
        download=False,
    ),
}
# What to hold one's own results against, as their authors state them.
PUBLISHED = {
    "tinyshakespeare": (
        Published("bz2, given train", 2.398, "val"),
        Published("modified Kneser-Ney 7-gram, windows of 256 (model=ngram)", 2.2068, "val"),
        Published("nanoGPT's GPU recipe, 10.7 M parameters", 2.1203, "val"),
        Published("lowest claim, one seed (nanoGPT, pull request 254)", 2.0981, "val"),
    ),
    "enwik8": (
        Published("Transformer-XL, 41 M (Dai et al. 2019)", 1.06),
        Published("Transformer, 44 M (Al-Rfou et al. 2019)", 1.11),
        Published("AWD-LSTM, 47 M (Merity et al. 2018)", 1.232),
        Published("cmix 21, compressing the whole file", 1.170, "whole"),
        Published("paq8px, compressing the whole file", 1.268, "whole"),
        Published("xz, compressing the whole file", 1.976, "whole"),
    ),
    "text8": (
        Published("Transformer, 44 M (Al-Rfou et al. 2019)", 1.18),
        Published("multiplicative LSTM, 45 M (Krause et al. 2016)", 1.27),
    ),
    "ptb_char": (Published("AWD-LSTM, 13.8 M (Merity et al. 2018)", 1.175),),
}


def tinyshakespeare(path: str | None = None) -> Corpus:
    """Tiny Shakespeare (Karpathy, char-rnn, 2015): 1,115,394 characters, 65 symbols.

    Looked for in `$CHARLM_DATA/tinyshakespeare/input.txt`, then in the user's cache folder, then downloaded.
    A file with another hash is refused; a download is cached only when complete. Its documents are PLAYS.
    """
    no_path("tinyshakespeare", path)
    folder = os.environ.get("CHARLM_DATA")
    local = Path(folder, "tinyshakespeare", "input.txt") if folder else None
    if local is not None and local.is_file():
        raw = local.read_bytes()
        if (found := hashlib.sha256(raw).hexdigest()) != SHAKESPEARE_SHA256:
            raise InputError(
                f"{local} is not Tiny Shakespeare: its sha256 begins {found[:12]} and not {SHAKESPEARE_SHA256[:12]}; "
                f"replace it, or read it under its own name with corpus=text path={local}"
            )
        return of_plays(raw.decode(), str(local))
    try:
        fetched = fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256, Path("tinyshakespeare", "input.txt"))
    except CorpusUnavailable as error:
        raise CorpusUnavailable(
            f"Tiny Shakespeare could not be had ({error}): connect to the internet, or put the file at "
            f"$CHARLM_DATA/tinyshakespeare/input.txt, or train on the text that Python carries with data=pydoc"
        ) from error
    return of_plays(fetched.read_bytes().decode(), str(fetched))


def of_plays(text: str, source: str) -> Corpus:
    """Return Tiny Shakespeare, with its plays as documents."""

    def documents() -> Sequence[Corpus]:
        ends = [*[*PLAYS.values()][1:], len(text)]
        return [Corpus.of(p, text[a:b], source) for (p, a), b in zip(PLAYS.items(), ends, strict=True)]

    return replace(Corpus.of("tinyshakespeare", text, source), documents=documents)


def pydoc(path: str | None = None) -> Corpus:
    """The language reference that every CPython carries for `help()`: English prose, with no download."""
    no_path("pydoc", path)
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return Corpus.of("pydoc", text, "pydoc_data.topics")


def enwik8(path: str | None = None) -> Corpus:
    """The first 10^8 bytes of the English Wikipedia of March 2006, with its markup (Mahoney; the Hutter prize)."""
    return zipped("enwik8", path)


def text8(path: str | None = None) -> Corpus:
    """The same Wikipedia as 10^8 letters and spaces, in lower case (Mahoney)."""
    return zipped("text8", path)


def ptb_char(path: str | None = None) -> Corpus:
    """Penn Treebank as characters (Mikolov et al. 2012): 50 symbols, a sentence on each line, in its given split."""
    no_path("ptb_char", path)
    archive = ARCHIVES["ptb_char"]
    folder = cache_folder() / "ptb_char"
    parts = [folder / f"{part}.txt" for part in ("train", "valid", "test")]
    if not all(remembered(part, archive.digest) for part in parts):
        with archive_of("ptb_char").open("rb") as file:
            check_digest("ptb_char", file, archive.digest)
            file.seek(0)
            with unpacking("ptb_char"), tarfile.open(fileobj=file, mode="r:gz") as members:
                found = {member.name.rpartition("/")[2]: member for member in members if member.isfile()}
                for part in parts:
                    content = members.extractfile(found[f"ptb.char.{part.stem}.txt"])
                    assert content
                    # A space stands between any two characters, and _ for a space.
                    plain = content.read().replace(b" ", b"").replace(b"_", b" ")
                    write_atomically(part, partial(write_whole, plain))
        for part in parts:
            remember(part, archive.digest)
    sizes = [part.stat().st_size for part in parts]
    split = (sizes[0], sizes[0] + sizes[1])
    return Corpus("ptb_char", str(folder), partial(read_all, parts, ""), False, parts, split=split)


def zipped(name: str, path: str | None) -> Corpus:
    """The corpus `name` of ARCHIVES, whose archive is a zip file with one text."""
    no_path(name, path)
    archive = ARCHIVES[name]
    folders = [Path(folder) for folder in [os.environ.get("CHARLM_DATA")] if folder]
    local = next((folder / name / name for folder in folders if (folder / name / name).is_file()), None)
    file = local or cache_folder() / name / name
    if not remembered(file, archive.digest):
        if local is None:
            packed = archive_of(name)
            with unpacking(name), zipfile.ZipFile(packed) as members, members.open(members.namelist()[0]) as content:
                write_atomically(file, partial(copy_checked, name, content, archive.digest))
        else:
            with local.open("rb") as content:
                check_digest(name, content, archive.digest)
        remember(file, archive.digest)
    return Corpus(name, str(file), partial(read_all, [file], "", cut=True), False, [file], split=archive.split)


def no_path(name: str, path: str | None) -> None:
    if path is not None:
        raise InputError(f"path={path}: the corpus {name} needs no path; for your own text give corpus=text")


def archive_of(name: str) -> Path:
    """Return the archive of a corpus: from $CHARLM_DATA, from the user's cache, or else from the internet.

    Raises:
        CorpusUnavailable: if it cannot be had.
    """
    archive = ARCHIVES[name]
    place = Path(name, archive.url.rpartition("/")[2])
    data = os.environ.get("CHARLM_DATA")
    for folder in [*([Path(data)] if data else []), cache_folder()]:
        if (folder / place).is_file():
            return folder / place
    where = f"put {archive.url} at {cache_folder() / place} or $CHARLM_DATA/{place}"
    if not archive.download:
        raise CorpusUnavailable(
            f"{name} is not downloaded, as its licence does not allow that: if you have it, {where}"
        )
    try:
        return fetch(archive.url, None, place)
    except CorpusUnavailable as error:
        raise CorpusUnavailable(f"{name} could not be had ({error}): connect to the internet, or {where}") from error


@contextmanager
def unpacking(name: str) -> Iterator[None]:
    """Raise one line for an archive that is damaged, and for a disk that is full.

    Raises:
        CorpusUnavailable, DiskError: for these.
    """
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError) as error:
        raise CorpusUnavailable(f"the archive of {name} is damaged ({error}): remove it, and try again") from error
    except OSError as error:
        raise DiskError(f"{name} cannot be unpacked in {cache_folder()}: {error.strerror or error}") from error


def copy_checked(name: str, content: IO[bytes], expected: str, target: IO[bytes]) -> None:
    """Copy a text to a file, and compare its hash."""
    digest = hashlib.new(expected.partition(":")[0])
    while block := content.read(BLOCK):
        digest.update(block)
        target.write(block)
    compare(name, digest.hexdigest(), expected)


def check_digest(name: str, content: BufferedReader, expected: str) -> None:
    """Compare the hash of a file."""
    compare(name, hashlib.file_digest(content, expected.partition(":")[0]).hexdigest(), expected)


def compare(name: str, found: str, expected: str) -> None:
    kind, _, wanted = expected.partition(":")
    if found != wanted:
        raise CorpusUnavailable(
            f"this is not {name}: its {kind} begins {found[:12]} and not {wanted[:12]}; remove the file, or read it "
            f"under its own name with data=text"
        )


def write_whole(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def blend(paths: Sequence[str], field: str = "text") -> Corpus:
    """Several corpora as one, which the data module draws from by weights.

    Args:
        paths: of each, what `text` takes, or the name of a corpus.
    """
    if len(paths) < 2:
        raise InputError("corpus=blend needs several texts: say paths=[ONE,OTHER]")
    named = CORPORA.keys() - {"text", "blend"}
    return Blend.of_parts([load_corpus(path) if path in named else text(path, field) for path in paths])


CORPORA: dict[str, Callable[..., Corpus]] = {
    f.__name__: f for f in (tinyshakespeare, enwik8, text8, ptb_char, pydoc, text, blend)
}


@cache  # a command checks its corpus before it writes anything, and then uses it: read once
def load_corpus(
    name: str,
    path: str | None = None,
    field: str = "text",
    paths: tuple[str, ...] | None = None,
    fold: int | None = None,
) -> Corpus:
    """The corpus called `name`.

    Args:
        path, field: of `text`.
        paths: of `blend`.
        fold: number of the document that is held out, from 1; None: the text as it stands.

    Raises:
        InputError: if the name is unknown, the text cannot be read, or there is no such document.
        CorpusUnavailable: if it cannot be downloaded.
    """
    if fold is not None:
        return hold_out(load_corpus(name, path, field, paths), fold)
    if name not in CORPORA:
        raise InputError(f"corpus={name} is unknown: choose one of {', '.join(CORPORA)}")
    if name == "blend":
        return blend(paths or (), field)
    return text(path, field) if name == "text" else CORPORA[name](path)


def corpus_of(settings: Mapping[str, Any]) -> Corpus:
    """The corpus that the `data` settings of a run name. Raises as `load_corpus` does."""
    paths = settings.get("paths")
    paths = tuple(paths) if paths else None
    return load_corpus(settings["corpus"], settings["path"], settings["field"], paths, settings.get("fold"))
