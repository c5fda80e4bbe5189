"""Microseconds per training step of the bigram: the lecture's loop, a tuned raw PyTorch loop, and charlm.

    python benchmarks/step_time.py

All three train the same table, on one thread, on 32 chunks of 8 characters a step, without validation, and are timed
from the first step to the last. charlm is `python train.py` with its default logging, progress and checkpoints. Every
round runs each of them once, in a fresh process; the table shows medians over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from charlm.data.corpus import load_corpus
from charlm.model.bigram import Bigram
from charlm.tokenizer import CharTokenizer

BATCH_SIZE, BLOCK_SIZE, LR = 32, 8, 1e-2
TRAIN = Path(__file__).parent.parent / "train.py"


def lecture_step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """As the lecture writes it: slices stacked one by one, PyTorch's default AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step() -> None:
        starts = torch.randint(len(ids) - BLOCK_SIZE, (BATCH_SIZE,))
        x = torch.stack([ids[i : i + BLOCK_SIZE] for i in starts])
        y = torch.stack([ids[i + 1 : i + BLOCK_SIZE + 1] for i in starts])
        logits = model(x)
        b, t, c = logits.shape
        loss = F.cross_entropy(logits.view(b * t, c), y.view(b * t))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def raw_step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """The least that plain PyTorch needs: one gather for the batch, a fused optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    chunks = ids.unfold(0, BLOCK_SIZE + 1, 1)

    def step() -> None:
        batch = chunks[torch.randint(len(chunks), (BATCH_SIZE,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


LOOPS = {"lecture": lecture_step, "raw": raw_step}


def time_loop(name: str, corpus: str, steps: int) -> float:
    """Microseconds per step of a plain loop, in this process."""
    text = load_corpus("text", corpus).text
    tokenizer = CharTokenizer.from_text(text)
    step = LOOPS[name](Bigram(tokenizer.vocab_size), tokenizer.encode(text).long())
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps * 1e6


def in_fresh_process(name: str, corpus: str, steps: int) -> float:
    """Microseconds per step of one contestant, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if name in LOOPS:
        command = [sys.executable, __file__, "--contestant", name, "--corpus", corpus, "--steps", str(steps)]
        return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        settings = {
            "data": "text",
            "data.path": corpus,
            "data.batch_size": BATCH_SIZE,
            "data.block_size": BLOCK_SIZE,
            "optimizer.lr": LR,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": steps,
            "trainer.val_check_interval": steps + 1,
            "hydra.run.dir": run,
        }
        command = [sys.executable, str(TRAIN), *(f"{key}={value}" for key, value in settings.items())]
        subprocess.run(command, env=env, check=True, capture_output=True)
        results = json.loads((run / "results.json").read_text())
    return float(results["train/seconds"]) / steps * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a text file; default: Tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--contestant", choices=LOOPS, help="time this one here and print it: for the script itself")
    args = parser.parse_args()
    corpus = args.corpus or load_corpus("tinyshakespeare").source
    if args.contestant:
        print(time_loop(args.contestant, corpus, args.steps))
        return
    names = [*LOOPS, "charlm"]
    console = Console()
    rounds = [
        {name: in_fresh_process(name, corpus, args.steps) for name in names}
        for _ in track(range(args.rounds), "rounds", console=console, transient=True)
    ]
    medians = {name: statistics.median(r[name] for r in rounds) for name in names}
    table = Table("loop", "us/step, median", "fastest", "slowest", "against raw", "against the lecture's")
    for name in names:
        times = [r[name] for r in rounds]
        shown = (f"{value:.0f}" for value in (medians[name], min(times), max(times)))
        table.add_row(
            name, *shown, f"{medians[name] / medians['raw']:.2f}", f"{medians[name] / medians['lecture']:.2f}"
        )
    console.print(f"bigram, B={BATCH_SIZE} T={BLOCK_SIZE}, 1 thread, {args.steps} steps, {args.rounds} rounds")
    console.print(table)


if __name__ == "__main__":
    main()
