"""Files from the internet: whole, with the hash that is expected, and only once."""

from pathlib import Path

from charlm.errors import CorpusUnavailable
from charlm.home import cache

# Seconds for the server to accept the connection, and then between two packets.
NETWORK_TIMEOUT = (4.0, 8.0)


def fetch(url: str, sha256: str, place: Path) -> Path:
    """Return the path of a file in the user's cache; download it first if it is not there.

    Args:
        place: the file's path in the cache.

    Raises:
        CorpusUnavailable: with a few words, if the network does not give the file, or gives another one.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # an error is reported below, in one line
    try:
        return Path(
            pooch.retrieve(
                url,
                known_hash=f"sha256:{sha256}",
                fname=place.name,
                path=cache() / place.parent,
                downloader=pooch.HTTPDownloader(progressbar=True, timeout=NETWORK_TIMEOUT),
            )
        )
    except OSError as error:  # those of requests are OSErrors
        raise CorpusUnavailable(describe(error)) from error
    except ValueError as error:
        raise CorpusUnavailable("the file there has another sha256") from error


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
