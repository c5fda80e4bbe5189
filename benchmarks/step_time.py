"""Microseconds per training step: the loop as one learns it, a tuned raw PyTorch loop, and charlm.

    python benchmarks/step_time.py                   the bigram, on 32 chunks of 8 characters
    python benchmarks/step_time.py --model gpt       the GPT of nanoGPT's CPU recipe, on 12 chunks of 64

All train the same model without validation. charlm is `python train.py` with its default logging, progress and
checkpoints. The eager bigram is timed from the first step to the last. Compilers and the GPT need a while to get warm:
there, the figure is the median over stretches of some steps, the first two left out. Every round runs each contestant
once, in a fresh process; the table shows medians over the rounds.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from charlm.data.corpus import load_corpus
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.tokenizer import CharTokenizer

CHARACTERS = 200_000  # of the text: what follows a run's last step, and is not timed, then takes less long
TRAIN = Path(__file__).parent.parent / "train.py"


@dataclass(frozen=True)
class Task:
    """What is trained, in the words of both sides."""

    model: Callable[[int], nn.Module]
    batch_size: int
    block_size: int
    steps: int
    stretch: int
    lr: float
    clip: float | None
    settings: tuple[str, ...]


TASKS = {
    "bigram": Task(Bigram, 32, 8, 3000, 50, 1e-2, None, ()),
    "gpt": Task(
        lambda vocab_size: GPT(vocab_size, block_size=64, n_layer=4, n_head=4, n_embd=128),
        12,
        64,
        75,
        15,
        1e-3,
        1.0,
        ("experiment=nanogpt_cpu", "scheduler.warmup_steps=10"),
    ),
}


def plain_step(task: Task, model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """As the lecture and nanoGPT write it: slices stacked one by one, PyTorch's default AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)

    def step() -> None:
        starts = torch.randint(len(ids) - task.block_size, (task.batch_size,))
        x = torch.stack([ids[i : i + task.block_size] for i in starts])
        y = torch.stack([ids[i + 1 : i + task.block_size + 1] for i in starts])
        logits = model(x)
        b, t, c = logits.shape
        loss = F.cross_entropy(logits.view(b * t, c), y.view(b * t))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()

    return step


def raw_step(task: Task, model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """The least that plain PyTorch needs: one gather for the batch, a fused optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, fused=True)
    chunks = ids.unfold(0, task.block_size + 1, 1)

    def step() -> None:
        batch = chunks[torch.randint(len(chunks), (task.batch_size,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


LOOPS = {"plain": plain_step, "raw": raw_step}
CHARLM = {"charlm": "compile=false", "charlm, compile=true": "compile=true"}


def time_loop(name: str, task: Task, corpus: str) -> float:
    """Microseconds per step of a plain loop, in this process."""
    text = load_corpus("text", corpus).text
    tokenizer = CharTokenizer.from_text(text)
    step = LOOPS[name](task, task.model(tokenizer.vocab_size), tokenizer.encode(text).long())
    times = [time.perf_counter()]
    for _ in range(task.steps // task.stretch):
        for _ in range(task.stretch):
            step()
        times.append(time.perf_counter())
    if task is TASKS["gpt"]:
        return statistics.median(b - a for a, b in itertools.pairwise(times[2:])) / task.stretch * 1e6
    return (times[-1] - times[0]) / task.steps * 1e6


def in_fresh_process(name: str, task_name: str, corpus: str, threads: int) -> float:
    """Microseconds per step of one contestant."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if name in LOOPS:
        command = [sys.executable, __file__, "--contestant", name, "--model", task_name, "--corpus", corpus]
        return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    task = TASKS[task_name]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        settings = {
            "data": "text",
            "data.path": corpus,
            "data.batch_size": task.batch_size,
            "data.block_size": task.block_size,
            "optimizer.lr": task.lr,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": task.steps,
            "trainer.val_check_interval": task.steps + 1,
            "trainer.log_every_n_steps": task.stretch,
            "threads": threads,
            "evaluate": "[val]",
            "hydra.run.dir": run,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, str(TRAIN), *task.settings, *overrides, CHARLM[name]]
        subprocess.run(command, env=env, check=True, capture_output=True)
        results = json.loads((run / "results.json").read_text())
        if task_name == "gpt" or CHARLM[name] == "compile=true":
            speeds = [event.value for event in EventAccumulator(str(run)).Reload().Scalars("train/tokens_per_second")]
            return task.batch_size * task.block_size / statistics.median(speeds[2:]) * 1e6
    return float(results["train/seconds"]) / task.steps * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TASKS, default="bigram")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--corpus", help="a text file; default: Tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestant", choices=LOOPS, help="time this one here and print it: for the script itself")
    args = parser.parse_args()
    task = TASKS[args.model]
    if args.contestant:
        print(time_loop(args.contestant, task, args.corpus))
        return
    names = [*LOOPS, *CHARLM]
    console = Console()
    text = load_corpus("text", args.corpus).text if args.corpus else load_corpus("tinyshakespeare").text
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "text.txt")
        corpus.write_text(text[:CHARACTERS], encoding="utf-8")
        rounds = [
            {name: in_fresh_process(name, args.model, str(corpus), args.threads) for name in names}
            for _ in track(range(args.rounds), "rounds", console=console, transient=True)
        ]
    medians = {name: statistics.median(r[name] for r in rounds) for name in names}
    table = Table("loop", "us/step, median", "fastest", "slowest", *(f"against {name}" for name in LOOPS))
    for name in names:
        times = [r[name] for r in rounds]
        shown = (f"{value:.0f}" for value in (medians[name], min(times), max(times)))
        table.add_row(name, *shown, *(f"{medians[name] / medians[loop]:.2f}" for loop in LOOPS))
    size = f"B={task.batch_size} T={task.block_size}, {args.threads} thread{'s' * (args.threads > 1)}"
    console.print(f"{args.model}, {size}, {task.steps} steps, {args.rounds} rounds")
    console.print(table)


if __name__ == "__main__":
    main()
