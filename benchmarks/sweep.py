"""Measure a sweep of twelve bigrams, evaluated exactly and logged, against the lecture's script for one.

    git clone https://github.com/karpathy/ng-video-lecture
    python benchmarks/sweep.py --lecture ng-video-lecture

In every round each of these starts afresh and ends, one after the other: the lecture's bigram.py (3,000 steps, an
estimate of 400 batches every 300, 500 characters of text); the sweep with one job per core;
the same one job at a time. Apart from its training loop, a job spends time on its exact evaluation, dashboard,
checkpoints, samples and record; the launcher adds the time in which a worker has no job. The text is the clone's.

    python benchmarks/sweep.py --packs

The 48 default bigrams that differ in their seed, of 5,000 steps each: trained together in one process per core
(hydra.launcher.pack=auto), and each in a process of its own. With --pack and overrides, other jobs, as in

    python benchmarks/sweep.py --packs --pack 16 model=gpt model.n_layer=2 model.n_embd=64 trainer=gpu
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

TRAIN = Path(__file__).parent.parent / "train.py"
GRID = ["data.block_size=8,32", "data.batch_size=16,64", "optimizer.lr=1e-3,3e-3,1e-2", "trainer.max_steps=3000"]
LECTURE, SWEEP, ONE = "the lecture's script, one run", "the sweep, 12 runs", "the sweep, one job at a time"


def timed(command: list[str], folder: Path | None = None) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def of_jobs(sweep_dir: Path) -> tuple[float, float, float]:
    """Over all jobs: seconds from where a job has its folder to its end, of its training loop, and of all together."""
    ends = {file.parent: file.stat().st_mtime for file in sweep_dir.glob("*/results.json")}
    begins = {folder: (folder / ".hydra" / "config.yaml").stat().st_mtime for folder in ends}
    rows = csv.DictReader((sweep_dir / "results.csv").read_text().splitlines())
    at_work = sum(end - begins[folder] for folder, end in ends.items())
    return at_work, sum(float(row["train/seconds"]) for row in rows), max(ends.values()) - min(begins.values())


class Memory(threading.Thread):
    """Samples how much memory all other processes of this session take together, shared pages once (PSS; Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()
        self.session = os.getsid(0)

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.most = max(self.most, sum(map(self.pss, Path("/proc").glob("[0-9]*"))))

    def pss(self, process: Path) -> int:
        """Return the bytes of a process of this session, and 0 for all others."""
        try:
            if os.getsid(int(process.name)) != self.session or int(process.name) == os.getpid():
                return 0
            return 1024 * int((process / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
        except (OSError, IndexError):
            return 0  # it has ended


def packs(rounds: int, console: Console, jobs: int, size: str, overrides: list[str]) -> None:
    """Compare packed sweeps with sweeps of one job per process."""
    seconds: dict[str, list[float]] = {"1": [], size: []}
    losses: dict[str, dict[str, float]] = {}
    memory: dict[str, int] = {"1": 0, size: 0}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for number in track(range(rounds), "rounds", console=console, transient=True):
            for pack, times in seconds.items():
                sweep_dir = Path(folder, f"{number}_{pack}")
                command = [sys.executable, str(TRAIN), "-m", f"seed=range(1,{jobs + 1})", *overrides]
                watch = Memory()
                watch.start()
                times.append(timed([*command, f"hydra.launcher.pack={pack}", f"hydra.sweep.dir={sweep_dir}"]))
                watch.ended.set()
                memory[pack] = max(memory[pack], watch.most)
                rows = csv.DictReader((sweep_dir / "results.csv").read_text().splitlines())
                losses[pack] = {row["seed"]: float(row["val/loss"]) for row in rows}
    table = Table("", "seconds, median", "fastest", "slowest", "jobs per minute", "memory of all, MB")
    for pack, times in seconds.items():
        median = statistics.median(times)
        told = [f"{value:.1f}" for value in (median, min(times), max(times), 60 * jobs / median)]
        table.add_row(f"pack={pack}", *told, f"{memory[pack] / 1e6:,.0f}")
    console.print(table)
    ratios = [alone / packed for alone, packed in zip(seconds["1"], seconds[size], strict=True)]
    differences = [abs(loss - losses[size][seed]) for seed, loss in losses["1"].items()]
    console.print(
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as many jobs per minute"
    )
    console.print(f"largest difference of two losses: {max(differences):g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--lecture", type=Path, help="the folder of a clone")
    what.add_argument("--packs", action="store_true", help="compare packed sweeps with others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=48, help="of --packs")
    parser.add_argument("--pack", default="auto", help="hydra.launcher.pack of the packed sweep")
    parser.add_argument("overrides", nargs="*", default=["trainer=cpu"], help="of both sweeps of --packs")
    args = parser.parse_args()
    if args.packs:
        packs(args.rounds, Console(), args.jobs, args.pack, args.overrides)
        return
    corpus, console = (args.lecture / "input.txt").absolute(), Console()
    n_jobs = {SWEEP: len(os.sched_getaffinity(0)), ONE: 1}
    seconds: dict[str, list[float]] = {LECTURE: [], SWEEP: [], ONE: []}
    beside: dict[str, list[tuple[float, float]]] = {
        SWEEP: [],
        ONE: [],
    }  # seconds per job: launcher, and job outside its loop
    together: dict[str, list[float]] = {
        SWEEP: [],
        ONE: [],
    }  # seconds between the first job's start and the last one's end
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, as runs are
        for number in track(range(args.rounds), "rounds", console=console, transient=True):
            seconds[LECTURE].append(timed([sys.executable, "bigram.py"], args.lecture))
            for name, at_once in n_jobs.items():
                sweep_dir = Path(folder, f"{number}_{at_once}")
                places = ["data=text", f"data.path={corpus}", f"hydra.sweep.dir={sweep_dir}", "trainer=cpu"]
                command = [sys.executable, str(TRAIN), "-m", *GRID, *places, f"hydra.launcher.n_jobs={at_once}"]
                seconds[name].append(timed(command))
                at_work, training, all_jobs = of_jobs(sweep_dir)
                together[name].append(all_jobs)
                beside[name].append((seconds[name][-1] / 12 - at_work / at_once / 12, (at_work - training) / 12))
    table = Table("", "seconds, median", "fastest", "slowest", "launcher, a job", "in a job beside its loop")
    for name, times in seconds.items():
        told = [f"{value:.1f}" for value in (statistics.median(times), min(times), max(times))]
        of_job = [f"{statistics.median(one):.2f}" for one in zip(*beside.get(name, []), strict=True)]
        table.add_row(name, *told, *of_job)
    console.print(table)
    for ones, others, claim in (
        (seconds[SWEEP], seconds[LECTURE], "of the script's time"),
        (seconds[ONE], seconds[SWEEP], "the throughput of one at a time, from command to end"),
        (together[ONE], together[SWEEP], "the throughput of one at a time, while jobs are at work"),
    ):
        ratios = [a / b for a, b in zip(ones, others, strict=True)]
        console.print(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) {claim}")


if __name__ == "__main__":
    main()
