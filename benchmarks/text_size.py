"""Measure up to which size of text counting pays: n-grams, Transformers and the mixture of both, in equal seconds.

    python benchmarks/text_size.py TEXT --sizes 500_000 2_000_000 8_000_000 --png text_size.png

TEXT is a file, or one of the corpora text8 and enwik8. Its last characters are test, those before are val, and the
last N before those are train, for each of the sizes N: all systems are judged on the same text. Each has the same
seconds, which begin with counting and end with the last step of training; evaluation is not in them. An n-gram is ready
once it has counted; its order is the one that is best on val. Losses are exact, in bits per byte of test.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from charlm.counts import Counting
from charlm.data.corpora import CORPORA, load_corpus
from charlm.model.mixture import Mixture
from charlm.model.ngram import NGram
from charlm.tokenizer import ByteTokenizer, CharTokenizer

Losses = dict[str, tuple[float, float]]  # of each system: bits per byte of test, and seconds

TRAIN = Path(__file__).parent.parent / "train.py"
COUNTED, MIXTURE = "Kneser-Ney n-gram", "mixture"
ORDERS = (5, 6, 7, 8)  # of n-grams that are tried
LEARNED = {  # settings of what learns, beside those of experiment=cpu_90s
    "Transformer, 2 layers of 128": ["model=transformerpp"],
    "Transformer, 4 layers of 192": ["model=transformerpp", "model.n_layer=4", "model.n_embd=192", "model.n_head=6"],
    MIXTURE: [],
}


def text_of(name: str) -> str:
    """Return the characters of a file or a corpus."""
    return (load_corpus(name) if name in CORPORA else load_corpus("text", name)).text


def seconds_to_count(model: Counting, ids: Tensor) -> float:
    """Return how long a model takes to count a text."""
    start = time.perf_counter()
    model.count(ids)
    return time.perf_counter() - start


def run(text: Sequence[str], folder: Path, *settings: str) -> dict[str, Any]:
    """Train one system, and return its figures."""
    which = ["evaluate=[val,test]", "trainer.accelerator=cpu", "logger=none", f"hydra.run.dir={folder}"]
    command = [sys.executable, str(TRAIN), *settings, *text, "data.block_size=256", *which]
    subprocess.run(command, check=True, capture_output=True)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def systems(text: str, n: int, args: argparse.Namespace, place: Path) -> Losses:
    """Return the loss on test and the seconds of each system, for a train split of n characters."""
    file, held_out = place / f"{n}.txt", (len(text) - n) / 2 / len(text)
    file.write_text(text, encoding="utf-8", newline="")
    settings = [f"data.path={file}", f"data.val_fraction={held_out}", f"data.test_fraction={held_out}"]
    settings += ["data=text", f"tokenizer={args.tokenizer}"]
    tokenizer = CharTokenizer.from_text(text) if args.tokenizer == "char" else ByteTokenizer()
    ids, V = tokenizer.encode(text[:n]), tokenizer.vocab_size
    counted = [run(settings, place / f"{n}_{order}", "model=ngram", f"model.order={order}") for order in ORDERS]
    order, best = min(zip(ORDERS, counted, strict=True), key=lambda one: one[1]["val/loss"])
    found = {COUNTED: (best["test/bits_per_byte"], seconds_to_count(NGram(V, order, "kneser_ney"), ids))}
    for name, own in LEARNED.items():
        before = seconds_to_count(Mixture(V, 256, n_layer=1, n_head=1, n_embd=2), ids) if name == MIXTURE else 0.0
        if before >= args.seconds:
            continue  # no time to learn
        minutes, rest = divmod(round(args.seconds - before), 60)
        recipe = ["experiment=cpu_90s", *own, f"trainer.max_time=00:00:{minutes:02}:{rest:02}", f"seed={args.seed}"]
        one = run(settings, place / f"{n}_{len(found)}", *recipe)
        found[name] = one["test/bits_per_byte"], before + one["train/seconds"]
    return found


def draw(losses: dict[int, Losses], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in (COUNTED, *LEARNED):
        points = [(n, found[name][0]) for n, found in losses.items() if name in found]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xscale="log", xlabel="characters of train", ylabel="bits per byte of test")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a file, or the name of a corpus")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500_000, 2_000_000, 8_000_000], help="of train")
    parser.add_argument("--held-out", type=int, default=200_000, help="characters of val, and of test")
    parser.add_argument("--seconds", type=float, default=90.0, help="of each system")
    parser.add_argument("--tokenizer", choices=["char", "byte"], default="char", help="byte: for large alphabets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--png", type=Path, help="a file for the picture")
    args = parser.parse_args()
    text, console = text_of(args.text), Console()
    sizes = sorted(n for n in args.sizes if n + 2 * args.held_out <= len(text))
    if not sizes:
        parser.error(f"{args.text} has {len(text):,} characters: give smaller --sizes or --held-out")
    losses: dict[int, Losses] = {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        for n in progress.track(sizes, description="sizes"):
            part = text[len(text) - n - 2 * args.held_out :]
            losses[n] = systems(part, n, args, Path(folder))
    table = Table("characters of train", COUNTED, *LEARNED)
    for n, found in losses.items():
        cells = [
            f"{found[name][0]:.4f} ({found[name][1]:.0f} s)" if name in found else "" for name in (COUNTED, *LEARNED)
        ]
        table.add_row(f"{n:,}", *cells)
    console.print(table)
    if args.png:
        draw(losses, args.png)


if __name__ == "__main__":
    main()
