"""Measure the cost of crash safety: the time that a run spends on checkpoints, on run.json and on keeping its losses.

    python benchmarks/survival.py

Every round trains the bigram of the README for 3,000 steps in a fresh process, with a clock around each of these; the
table shows medians, with the wall time of the whole command and of its training loop alone.
"""

import argparse
import json
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
# train.py as it is, with clocks; what they say comes last.
CLOCKED = f"""
import json, runpy, sys, time
sys.path.insert(0, {str(TRAIN.parent)!r})
from charlm.callbacks import Checkpoint
from charlm.callbacks.loss_files import Losses
from charlm.run.record import Run
spent = {{}}
def clocked(kind, name, what):
    original = getattr(kind, name)
    def run(self, *arguments):
        start = time.perf_counter()
        try:
            return original(self, *arguments)
        finally:
            spent[what] = spent.get(what, 0) + time.perf_counter() - start
    setattr(kind, name, run)
clocked(Checkpoint, "save", "checkpoints")
for name in ("__enter__", "tell", "__exit__"):
    clocked(Run, name, "run.json")
for name in ("open", "end_step"):
    clocked(Losses, name, "losses")
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
print()
print(json.dumps(spent))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a text file; default: Tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    corpus = args.corpus or load_corpus("tinyshakespeare").source
    console = Console()
    rounds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, as runs are
        for number in track(range(args.rounds), "rounds", console=console, transient=True):
            run_dir = Path(folder, str(number))
            settings = ["data=text", f"data.path={corpus}", "trainer.max_steps=3000", f"hydra.run.dir={run_dir}"]
            command = [sys.executable, "-c", CLOCKED, *settings, "trainer.accelerator=cpu"]
            start = time.perf_counter()
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            wall = time.perf_counter() - start
            loop = json.loads((run_dir / "results.json").read_text())["train/seconds"]
            spent = json.loads(said.splitlines()[-1])
            rounds.append(spent | {"all three": sum(spent.values()), "training loop": loop, "whole command": wall})
    table = Table("", "milliseconds, median", "fastest", "slowest", "of the command", "of the loop")
    for name in rounds[0]:
        times = [1000 * one[name] for one in rounds]
        shares = (
            statistics.median(one[name] / one[whole] for one in rounds) for whole in ("whole command", "training loop")
        )
        told = (f"{value:,.1f}" for value in (statistics.median(times), min(times), max(times)))
        table.add_row(name, *told, *(f"{share:.2%}" for share in shares))
    console.print(table)


if __name__ == "__main__":
    main()
