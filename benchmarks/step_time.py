"""Microseconds per training step: the loop as one learns it, a tuned raw PyTorch loop, and charlm.

    python benchmarks/step_time.py                              the bigram, on 32 chunks of 8 characters
    python benchmarks/step_time.py --model gpt --threads 2      the GPT of nanoGPT's CPU recipe, on 12 chunks of 64

All train the same model without validation. charlm is `python train.py` with its default logging, progress and
checkpoints. On shared cores one process may find its neighbours busier than the next: so the loops run inside of
charlm's process, and all take turns, a stretch of some steps each. A round is a fresh process, and its figures are
medians over the stretches, the first few left out. Two rows train by `Trainer.fit` instead of train.py, with nothing
but a TensorBoard logger: charlm's LanguageModel, and stock Lightning, a module with automatic optimization as its
documentation shows one, on the same batches.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from charlm.callbacks import AtSteps
from charlm.data import CharDataModule
from charlm.data.corpora import load_corpus
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.module import LanguageModel
from charlm.optimizer.adamw import adamw

CHARACTERS = 200_000  # of the text: what follows a run's last step, and is not timed, then takes less long
WARMUP = 3  # stretches
ALL_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # as PyTorch comes
TRAIN = Path(__file__).parent.parent / "train.py"


@dataclass(frozen=True)
class Task:
    """The model and settings that both sides train."""

    model: Callable[[int], nn.Module]
    batch_size: int
    block_size: int
    steps: int
    stretch: int
    lr: float
    clip: float | None
    settings: tuple[str, ...]
    variants: tuple[str, ...]  # more settings of charlm, each on its own


STOCK, ORDINARY = "stock Lightning", "LanguageModel, with no callbacks of charlm"
OBSERVED = (
    "+callbacks.rates._target_=lightning.pytorch.callbacks.LearningRateMonitor "
    "+callbacks.kept._target_=lightning.pytorch.callbacks.ModelCheckpoint +callbacks.kept.dirpath=kept "
    "trainer.enable_progress_bar=true"
)
SHOWN = {OBSERVED: "charlm, LearningRateMonitor, ModelCheckpoint and Lightning's bar", STOCK: STOCK, ORDINARY: ORDINARY}

TASKS = {
    "bigram": Task(Bigram, 32, 8, 3000, 100, 1e-2, None, (), ("speed=off", STOCK, ORDINARY, OBSERVED, "compile=true")),
    "gpt": Task(
        lambda vocab_size: GPT(vocab_size, block_size=64, n_layer=4, n_head=4, n_embd=128),
        12,
        64,
        100,
        5,
        1e-3,
        1.0,
        ("experiment=nanogpt_cpu", "scheduler.warmup_steps=10"),
        ("compile=true", "trainer.precision=bf16-mixed", "compile=true trainer.precision=bf16-mixed"),
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


class Turns(AtSteps):
    """After every stretch of charlm's steps, each loop takes as many, in the same process.

    Args:
        task: a name among TASKS.
        path: a file for the seconds of all stretches, by loop.
    """

    def __init__(self, task: str, path: str):
        self.task, self.path = TASKS[task], path
        self.every_n_steps = self.task.stretch
        self.seconds: dict[str, list[float]] = {name: [] for name in ("charlm", *LOOPS)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        device: Any = pl_module.device
        ids = data.splits["train"].to(device).long()
        self.loops = {
            name: loop(self.task, self.task.model(data.tokenizer.vocab_size).to(device), ids)
            for name, loop in LOOPS.items()
        }
        self.began = now(device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *output_batch_number: Any) -> None:
        if trainer.global_step % self.task.stretch:
            return
        device: Any = pl_module.device
        self.seconds["charlm"].append(now(device) - self.began)
        for name, step in self.loops.items():
            began = now(device)
            with sdpa_kernel(ALL_KERNELS):
                for _ in range(self.task.stretch):
                    step()
            self.seconds[name].append(now(device) - began)
        self.began = now(device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Path(self.path).write_text(json.dumps(self.seconds))


class Stock(L.LightningModule):
    """Lightning as its documentation shows it."""

    def __init__(self, task: Task, vocab_size: int):
        super().__init__()
        self.task, self.model = task, task.model(vocab_size)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.task.lr, fused=True)


def train_without_hydra(kind: str, task_name: str, corpus: str, path: str, threads: int) -> None:
    """Train by Lightning alone in this process, taking turns with the loops."""
    torch.set_num_threads(threads)
    task = TASKS[task_name]
    data = CharDataModule("text", task.block_size, task.batch_size, path=corpus)
    data.setup()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=task.steps,
        limit_val_batches=0,
        gradient_clip_val=task.clip,
        logger=TensorBoardLogger(Path(path).parent),
        callbacks=[Turns(task_name, path)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module: L.LightningModule = Stock(task, data.vocab_size)
    if kind == ORDINARY:
        module = LanguageModel(task.model(data.vocab_size), partial(adamw, lr=task.lr))
    trainer.fit(module, data)


def now(device: torch.device) -> float:
    """Seconds, once all that was begun is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def race(task_name: str, variant: str, corpus: Path, threads: int, accelerator: str) -> dict[str, float]:
    """Return microseconds per step of charlm under the settings of `variant`, and of the other loops."""
    task = TASKS[task_name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seconds.json")
        settings = {
            "data": "text",
            "data.path": corpus,
            "data.batch_size": task.batch_size,
            "data.block_size": task.block_size,
            "optimizer.lr": task.lr,
            "trainer.accelerator": accelerator,
            "trainer.max_steps": task.steps,
            "trainer.val_check_interval": task.steps + 1,
            "threads": threads,
            "evaluate": "[val]",
            "hydra.run.dir": Path(folder, "run"),
            "+callbacks.turns._target_": "step_time.Turns",
            "+callbacks.turns.task": task_name,
            "+callbacks.turns.path": path,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, str(TRAIN), *task.settings, *overrides, *variant.split()]
        if variant in (STOCK, ORDINARY):
            command = [sys.executable, __file__, "--fit", variant, str(corpus), str(path), "--model", task_name]
            command += ["--threads", str(threads)]
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        seconds = json.loads(path.read_text())
    # Compilers, caches and allocators need a while to get warm.
    return {name: statistics.median(values[WARMUP:]) / task.stretch * 1e6 for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TASKS, default="bigram")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--corpus", help="a text file; default: Tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fit", nargs=3, help="module, corpus and result of one run here: for the script itself")
    args = parser.parse_args()
    if args.fit:
        kind, corpus_file, result_file = args.fit
        train_without_hydra(kind, args.model, corpus_file, result_file, args.threads)
        return
    task, console = TASKS[args.model], Console()
    variants = ("", *task.variants, *(["speed.cuda_graph=true"] if args.accelerator == "gpu" else []))
    text = load_corpus("text", args.corpus).text if args.corpus else load_corpus("tinyshakespeare").text
    races: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "text.txt")
        corpus.write_text(text[:CHARACTERS], encoding="utf-8")
        for _ in track(range(args.rounds), "rounds", console=console, transient=True):
            for variant in variants:
                races[variant].append(race(args.model, variant, corpus, args.threads, args.accelerator))
    table = Table("loop", "us/step", *(f"against {loop}" for loop in LOOPS))
    for loop in LOOPS:
        table.add_row(loop, f"{statistics.median(r[loop] for rs in races.values() for r in rs):.0f}")
    for variant, rounds in races.items():
        ratios = [sorted(r["charlm"] / r[loop] for r in rounds) for loop in LOOPS]
        shown = (f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios)
        table.add_row(
            SHOWN.get(variant, f"charlm {variant}"), f"{statistics.median(r['charlm'] for r in rounds):.0f}", *shown
        )
    size = f"B={task.batch_size} T={task.block_size}, {args.threads} thread{'s' * (args.threads > 1)}"
    console.print(
        f"{args.model}, {size}, {task.steps} steps of each, {args.rounds} rounds; medians (lowest to highest)"
    )
    console.print(table)


if __name__ == "__main__":
    main()
