"""From a text on disk to the first batch: CPU seconds and memory, for texts of several sizes.

    python benchmarks/data_path.py                # 1, 10, 100 MB and 1 GB, ASCII and mixed text
    python benchmarks/data_path.py --sizes 10000  # in MB

For each text, in a process of its own and in this order:
- first: read, survey and tokenize it, and count its pairs, with an empty cache;
- second: the same with the store of the first, until the first batch;
- batches: batches of 64 chunks of 256 characters from the store, once warm.

Figures are medians of three such starts.

Memory is what the process holds by itself (RssAnon) above what it held after its imports, at its highest. Mapped
files are shared, and belong to the system.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

MEGABYTE = 10**6
ALPHABETS = {
    "ascii": ("the quick brown fox ", "Was it? ", "\nIt is. "),
    "mixed": ("жизнь и ", "日本語 か", "hello 😀 ", "\n"),
}
ROUNDS = 3
PIECES = 4096  # different groups of words; a text repeats them in random order


def write_text(file: Path, kind: str, size: int) -> None:
    """Write a text of `size` bytes, about."""
    rng = random.Random(0)
    pieces = ["".join(rng.choices(ALPHABETS[kind], k=50)).encode() for _ in range(PIECES)]
    with file.open("wb") as out:
        written = 0
        while written < size:
            written += out.write(b"".join(rng.choices(pieces, k=1000)))
        out.truncate(size if kind == "ascii" else written)


def anonymous() -> int:
    """Return the bytes that this process holds by itself."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def watched(most: list[int], done: threading.Event) -> None:
    while not done.wait(0.05):
        most[0] = max(most[0], anonymous())


def measure(path: str, pairs: bool) -> dict[str, float]:
    """Measure one start, in this process."""
    from charlm.data import CharDataModule

    before, most, done = anonymous(), [0], threading.Event()
    watcher = threading.Thread(target=watched, args=(most, done))
    watcher.start()
    wall, cpu = time.perf_counter(), time.thread_time()  # without the watcher's
    data = CharDataModule(path=path, block_size=256, batch_size=64)
    data.setup()
    if pairs:
        data.pairs("train"), data.pairs("val")
    loader = data.train_dataloader()
    loader.batch(0)
    found = {"cpu": time.thread_time() - cpu, "wall": time.perf_counter() - wall}
    done.set()
    watcher.join()
    found["memory"] = max(0, max(most[0], anonymous()) - before)
    for _ in range(2):  # the second time, the pages are warm
        start = time.perf_counter()
        for k in range(500):
            loader.batch(k)
        found["batches"] = 500 / (time.perf_counter() - start)
    return found


def starts(path: Path, cache: Path) -> Iterator[dict[str, float]]:
    """Yield the measurements of a first and of a second start."""
    for pairs in ("pairs", ""):
        command = [sys.executable, __file__, "--start", str(path), pairs]
        ended = subprocess.run(command, env=os.environ | {"CHARLM_CACHE": str(cache)}, capture_output=True, check=True)
        yield json.loads(ended.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="MB")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(measure(args.start[0], bool(args.start[1]))))
        return
    heads = "first: MB per CPU-s", "memory MB", "second: s", "memory MB", "batches/s"
    print(f"{'text':<8}{'MB':>7}  " + "  ".join(heads))
    for kind in ALPHABETS:
        for size in args.sizes:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "text.txt")
                write_text(file, kind, size * MEGABYTE)
                os.utime(file, ns=(0, 0))
                time.sleep(2.1)  # a file that was written just now is surveyed again
                rounds = [[*starts(file, Path(folder, f"cache{number}"))] for number in range(ROUNDS)]
            first, second = (
                {name: statistics.median(found[name] for found in column) for name in column[0]}
                for column in zip(*rounds, strict=True)
            )
            print(
                f"{kind:<8}{size:>7,}  {size / first['cpu']:>19,.0f}  {first['memory'] / MEGABYTE:>9,.0f}  "
                f"{second['wall']:>9.3f}  {second['memory'] / MEGABYTE:>9,.0f}  {second['batches']:>9,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
