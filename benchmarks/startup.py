"""Measure the seconds from `python train.py` to the end of its first step, and those of its imports alone.

    python benchmarks/startup.py

Every round starts each of them once, in a fresh process that ends without cleaning up; the table shows medians.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from charlm.data.corpora import load_corpus

TRAIN = Path(__file__).parent.parent / "train.py"
IMPORTS = "import os, torch, lightning, hydra; os._exit(0)"
# train.py as it is, stopped after the first call of the training step.
FIRST_STEP = f"""
import os, runpy, sys
sys.path.insert(0, {str(TRAIN.parent)!r})
import charlm.module
step = charlm.module.LanguageModel.training_step
def step_and_stop(self, dataloader_iter):
    step(self, dataloader_iter)
    os._exit(0)
charlm.module.LanguageModel.training_step = step_and_stop
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def seconds(code: str, *arguments: str) -> float:
    """How long a fresh Python takes for it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a text file; default: Tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    corpus = args.corpus or load_corpus("tinyshakespeare").source
    console = Console()
    imports, first_step = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in track(range(args.rounds), "rounds", console=console, transient=True):
            imports.append(seconds(IMPORTS))
            settings = ["data=text", f"data.path={corpus}", "trainer.max_steps=1", f"hydra.run.dir={folder}/{number}"]
            first_step.append(seconds(FIRST_STEP, *settings))
    floor = statistics.median(imports)
    table = Table("until", "seconds, median", "fastest", "slowest", "against the imports")
    for name, times in {
        "torch, lightning and hydra are imported": imports,
        "the first step is done": first_step,
    }.items():
        median = statistics.median(times)
        table.add_row(name, *(f"{value:.2f}" for value in (median, min(times), max(times))), f"{median / floor:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
