"""Corpora: a named text, or any file, folder or glob, with its hash."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from glob import glob, has_magic
from pathlib import Path

from charlm.data.encoding import decode
from charlm.errors import CorpusUnavailable, InputError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Seconds for the server to accept the connection, and then between two packets.
NETWORK_TIMEOUT = (4.0, 8.0)


@dataclass(frozen=True)
class Corpus:
    """A text, the name it goes by in logs and dashboards, and where it was read."""

    name: str
    text: str
    source: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    def card(self) -> dict[str, str | int]:
        """Return the description of the corpus for checkpoints and results.json; plain types."""
        return {"name": self.name, "source": self.source, "sha256": self.sha256, "characters": len(self.text)}

    def cautions(self) -> Iterator[str]:
        """Warn of characters that the model learns but that are seldom meant as text, in a line for each kind."""
        if nuls := self.text.count("\0"):
            yield (
                f"{self.name} contains {nuls:,} NUL characters, which the model learns as text: if the file is not "
                f"meant to have them, remove them with tr -d '\\000' < FILE > NEW"
            )
        if ends := self.text.count("\r\n"):
            yield (
                f"{self.name} has {ends:,} line ends of Windows (\\r\\n), and the model learns \\r as a character: "
                f"remove it with dos2unix FILE, or tr -d '\\r' < FILE > NEW"
            )


def tinyshakespeare(path: str | None = None) -> Corpus:
    """Tiny Shakespeare (Karpathy, char-rnn, 2015): 1,115,394 characters, 65 symbols.

    Looked for in `$CHARLM_DATA/tinyshakespeare/input.txt`, then in the user's cache folder, then downloaded.
    A file with another hash is refused; a download is cached only when complete.
    """
    if path is not None:
        raise InputError(f"path={path}: Tiny Shakespeare needs no path; for your own text give corpus=text")
    folder = os.environ.get("CHARLM_DATA")
    local = Path(folder, "tinyshakespeare", "input.txt") if folder else None
    if local is not None and local.is_file():
        raw = local.read_bytes()
        if (found := hashlib.sha256(raw).hexdigest()) != SHAKESPEARE_SHA256:
            raise InputError(
                f"{local} is not Tiny Shakespeare: its sha256 begins {found[:12]} and not {SHAKESPEARE_SHA256[:12]}; "
                f"replace it, or read it under its own name with corpus=text path={local}"
            )
        return Corpus("tinyshakespeare", raw.decode(), str(local))
    fetched = download_shakespeare()
    return Corpus("tinyshakespeare", fetched.read_bytes().decode(), str(fetched))


def download_shakespeare() -> Path:
    """Return the path of the cached file; download it first if necessary.

    Raises:
        CorpusUnavailable: if the network does not give the file, or gives another one.
    """
    import pooch

    cache_dir = Path(pooch.os_cache("charlm")) / "tinyshakespeare"
    pooch.get_logger().setLevel("ERROR")  # an error is reported below, in one line
    try:
        return Path(
            pooch.retrieve(
                SHAKESPEARE_URL,
                known_hash=f"sha256:{SHAKESPEARE_SHA256}",
                fname="input.txt",
                path=cache_dir,
                downloader=pooch.HTTPDownloader(progressbar=True, timeout=NETWORK_TIMEOUT),
            )
        )
    except (OSError, ValueError) as error:  # those of requests are OSErrors; ValueError is pooch's for a wrong hash
        reason = describe(error) if isinstance(error, OSError) else "the file there has another sha256"
        raise CorpusUnavailable(
            f"Tiny Shakespeare could not be had ({reason}): connect to the internet, or put the file at "
            f"$CHARLM_DATA/tinyshakespeare/input.txt, or train on the text that Python carries with data=pydoc"
        ) from error


def describe(error: OSError) -> str:
    """Return a network or file error in a few words; the messages of requests are long and nested."""
    import requests

    if error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, requests.HTTPError):
        return str(error)
    words = {
        requests.Timeout: "no answer",
        requests.exceptions.ProxyError: "no connection to the proxy",
        requests.ConnectionError: "no connection",
        requests.exceptions.ChunkedEncodingError: "the connection was cut",
    }
    return next((said for kind, said in words.items() if isinstance(error, kind)), type(error).__name__)


def pydoc(path: str | None = None) -> Corpus:
    """The language reference that every CPython carries for `help()`: English prose, with no download."""
    if path is not None:
        raise InputError(f"path={path}: the pydoc corpus needs no path; for your own text give corpus=text")
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return Corpus("pydoc", text, "pydoc_data.topics")


def text(path: str | None = None) -> Corpus:
    """Any UTF-8 text: a file, a folder (its .txt, .text, .md and .rst files) or a glob; each also as .gz.

    Several files are read in the order of their names, each ending in a newline.
    """
    if not path:
        raise InputError("corpus=text needs a path: say path=FILE, path=FOLDER or path='GLOB'")
    files = find_text(path)
    parts = [read_text(file) for file in files]
    if not any(parts):
        raise InputError(f"{path} is empty: a corpus needs text in it")
    joined = parts[0] if len(parts) == 1 else "".join(p if p.endswith("\n") else p + "\n" for p in parts if p)
    return Corpus(Path(path).name or str(path), joined, os.path.abspath(path))


def find_text(path: str) -> list[Path]:
    """The text files that a path names, sorted."""
    place = Path(path).expanduser()
    # os.path, unlike pathlib, says no where a name is too long to be one: a text given in place of its file.
    if os.path.isfile(place):
        return [place]
    if os.path.isdir(place):
        files = [f for f in place.rglob("*") if f.is_file() and f.name.removesuffix(".gz").endswith(TEXT_SUFFIXES)]
        if not files:
            kinds = " ".join(TEXT_SUFFIXES)
            raise InputError(
                f"no text in the folder {path}: looked for {kinds} (also .gz), in it and below; "
                f"name other files by a glob, such as path='{place / '**' / '*.py'}'"
            )
    elif has_magic(str(path)):
        files = [Path(f) for f in glob(str(place), recursive=True) if os.path.isfile(f)]
        if not files:
            raise InputError(f"path={path} matches no file: check the pattern, ** stands for any folders")
    else:
        raise InputError(f"path={path} does not exist: give a file, a folder or a glob (looked in {os.getcwd()})")
    return sorted(files)


def read_text(file: Path) -> str:
    """One file, UTF-8 with or without a byte order mark, gunzipped if its name ends in .gz."""
    try:
        raw = file.read_bytes()
        if file.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be gunzipped ({error}): unpack it by hand, or give another file") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    try:
        return decode(file, raw)
    except UnicodeError as error:
        raise InputError(str(error)) from error


CORPORA: dict[str, Callable[[str | None], Corpus]] = {f.__name__: f for f in (tinyshakespeare, pydoc, text)}


@cache  # a command checks its corpus before it writes anything, and then uses it: read once
def load_corpus(name: str, path: str | None = None) -> Corpus:
    """The corpus called `name`.

    Raises:
        InputError: if the name is unknown or the text cannot be read.
        CorpusUnavailable: if it cannot be downloaded.
    """
    if name not in CORPORA:
        raise InputError(f"corpus={name} is unknown: choose one of {', '.join(CORPORA)}")
    return CORPORA[name](path)
