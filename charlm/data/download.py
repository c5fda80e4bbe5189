"""Files from the internet: whole, with the hash that is expected, and only once."""

import hashlib
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from charlm.errors import CorpusUnavailable
from charlm.files import stamp
from charlm.home import cache

# Seconds for the server to accept the connection, and then between two packets.
NETWORK_TIMEOUT = (4.0, 8.0)
BLOCK = 2**16  # bytes


def fetch(url: str, sha256: str | None, place: Path) -> Path:
    """Return the path of a file in the user's cache; download it first if it is not there.

    A download that is cut off goes on where it ended.

    Args:
        sha256: None: the caller checks the content.
        place: the file's path in the cache.

    Raises:
        CorpusUnavailable: with a few words, if the network does not give the file, or gives another one.
    """
    import pooch

    part = cache() / place.with_name(f"{place.name}.part")
    pooch.get_logger().setLevel("ERROR")  # an error is reported below, in one line
    try:
        return Path(
            pooch.retrieve(
                url,
                known_hash=f"sha256:{sha256}" if sha256 else None,
                fname=place.name,
                path=cache() / place.parent,
                downloader=partial(download, part),
            )
        )
    except OSError as error:  # those of requests are OSErrors
        with suppress(OSError):
            os.unlink(f"{part}.lock")
            if not os.path.getsize(part):
                os.unlink(part)
        raise CorpusUnavailable(describe(error)) from error
    except ValueError as error:
        raise CorpusUnavailable("the file there has another sha256") from error


def download(part: Path, url: str, output_file: str, pooch: object) -> None:
    """Download a file, after what `part` has of it, as `pooch.retrieve` asks for it."""
    import requests

    lock = FileLock(f"{part}.lock")
    with lock, part.open("ab") as file:
        there = file.tell()
        headers = {"Range": f"bytes={there}-"} if there else {}
        with requests.get(url, headers=headers, stream=True, timeout=NETWORK_TIMEOUT) as answer:
            if answer.status_code != requests.codes.range_not_satisfiable:  # then it is whole
                answer.raise_for_status()
                if answer.status_code != requests.codes.partial_content:  # the server begins again
                    file.truncate(there := 0)
                total = there + int(answer.headers.get("Content-Length", 0))
                with tqdm(
                    desc=part.stem, initial=there, total=total or None, unit="B", unit_scale=True, disable=None
                ) as bar:
                    for block in answer.iter_content(BLOCK):
                        file.write(block)
                        bar.update(len(block))
    os.replace(part, output_file)
    with suppress(OSError):
        os.unlink(lock.lock_file)


def remembered(file: Path, digest: str) -> bool:
    """Return whether a file has been found to have this hash, and has not changed since."""
    try:
        return reminder(file, digest).exists()
    except OSError:
        return False


def remember(file: Path, digest: str) -> None:
    """Remember that a file has this hash."""
    with suppress(OSError):  # only the next start would use it
        place = reminder(file, digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


def reminder(file: Path, digest: str) -> Path:
    """Return a path that changes with the hash and with the file."""
    name = hashlib.sha256(repr([str(file.absolute()), stamp(file), digest]).encode()).hexdigest()[:32]
    return cache() / "surveys" / f"{name}.checked"


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
    return next((few for kind, few in words.items() if isinstance(error, kind)), type(error).__name__)
