"""The character tokenizer against a Python loop over characters, on Tiny Shakespeare and on a large alphabet.

    python benchmarks/tokenizer.py

Medians of interleaved rounds, in one process.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from charlm.data.corpora import load_corpus
from charlm.tokenizer import CharTokenizer


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def contestants(text: str) -> dict[str, Callable[[], object]]:
    """Both directions, each by the loop that everybody writes and by charlm."""
    tokenizer = CharTokenizer.from_text(text)
    stoi = {character: i for i, character in enumerate(tokenizer.chars)}
    itos = dict(enumerate(tokenizer.chars))
    ids = tokenizer.encode(text)
    listed = ids.tolist()
    return {
        "encode, loop": lambda: [stoi[character] for character in text],
        "encode, charlm": lambda: tokenizer.encode(text),
        "decode, loop": lambda: "".join([itos[i] for i in listed]),
        "decode, charlm": lambda: tokenizer.decode(ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    shakespeare = load_corpus("tinyshakespeare").text
    ideographs = "".join(random.Random(0).choices([chr(0x4E00 + i) for i in range(4000)], k=len(shakespeare)))
    table = Table("text", "direction", "loop, ms", "charlm, ms", "times as fast")
    for name, text in {"Tiny Shakespeare": shakespeare, "4,000 ideographs": ideographs}.items():
        work = contestants(text)
        times = [{key: milliseconds(job) for key, job in work.items()} for _ in range(rounds)]
        for way in ("encode", "decode"):
            loop, ours = (statistics.median(t[f"{way}, {who}"] for t in times) for who in ("loop", "charlm"))
            table.add_row(name, way, f"{loop:.1f}", f"{ours:.2f}", f"{loop / ours:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
