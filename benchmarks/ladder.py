"""Measure loss against seconds: counting, nanoGPT's CPU recipe and charlm's, start to end, on one machine in one run.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/ladder.py --nanogpt nanoGPT
    python benchmarks/ladder.py --nanogpt nanoGPT --recipes nanogpt_cpu cpu_90s cpu_10min --seeds 1 2 3 --png ladder.png

All losses are of every character of val, in windows of each model's block size, one after the other and, of models that
learn, at a stride of half their size. nanoGPT runs as its README says for a CPU, in a copy of its folder, and is the
clock; its weights are then scored by charlm. A recipe NAME is `python train.py experiment=NAME seed=N`.
"""

import argparse
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from charlm import checkpoint
from charlm.data import CharDataModule
from charlm.data.chunks import Windows
from charlm.data.corpora import load_corpus
from charlm.evaluate import evaluate
from charlm.model.gpt import GPT
from charlm.model.mixture import Mixture
from charlm.run.results import read_validations

TRAIN = Path(__file__).parent.parent / "train.py"
FLAGS = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
FLAGS += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"

QUOTED = 1.4697  # nats per character; its README, from random batches
LONGEST = 8  # characters of context that are counted


@dataclass
class Rung:
    """One line of the table, and of the picture one point and perhaps the way to it."""

    name: str
    seconds: list[float]  # seconds from start to end for each seed
    losses: list[float]  # exact loss on val for each seed
    half_stride: list[float] = field(default_factory=list)  # the same where every window begins within the last
    parameters: int | None = None
    tokens: list[int] = field(default_factory=list)  # that it trained on
    way: list[tuple[float, float]] = field(default_factory=list)  # seconds, and the loss that was logged by then


def counted(data: CharDataModule) -> list[Rung]:
    """Contexts of up to 1, 2, ... characters, counted on train and backed off; nothing is learned."""
    found = []
    for n_context in range(1, LONGEST + 1):
        start = time.perf_counter()
        model = Mixture(data.tokenizer.vocab_size, block_size=128, n_layer=0, n_head=1, n_embd=2, n_context=n_context)
        model.count(data.splits["train"])
        loss = evaluate(model, data.windows("val")).loss
        found.append(Rung(f"counted {n_context + 1}-gram", [time.perf_counter() - start], [loss]))
    return found


def nanogpt(clone: Path, data: CharDataModule) -> Rung:
    """Its recipe, with its own estimates of the loss on the way."""
    start = time.perf_counter()
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *FLAGS.split()]
    with subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        told = (re.match(r"step \d+: .*val loss ([\d.]+)", line) for line in process.stdout or ())
        way = [(time.perf_counter() - start, float(estimate[1])) for estimate in told if estimate]
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"nanoGPT failed: run {' '.join(command)} in {clone}")
    weights = torch.load(clone / "out-shakespeare-char" / "ckpt.pt", weights_only=True)["model"]
    model = as_charlm(weights, data.tokenizer.vocab_size)
    n_parameters = sum(p.numel() for p in model.parameters())
    loss, half = evaluate(model, data.windows("val")).loss, at_half_stride(model, 64, data)
    return Rung("nanoGPT's recipe for a CPU", [seconds], [loss], [half], n_parameters, [2000 * 12 * 64], way)


def recipe(name: str, seeds: list[int], corpus: str, data: CharDataModule, folder: Path) -> Rung:
    """charlm's own: `python train.py experiment=NAME`, for each seed."""
    rung = Rung(f"experiment={name}", [], [])
    settings = [f"experiment={name}", "data=text", f"data.path={corpus}", "trainer.accelerator=cpu"]
    for seed in seeds:
        run = folder / f"{name}_{seed}"
        start = time.perf_counter()
        command = [sys.executable, str(TRAIN), *settings, f"seed={seed}", f"hydra.run.dir={run}"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        rung.seconds.append(time.perf_counter() - start)
        found = json.loads((run / "results.json").read_text())
        rung.losses.append(found["val/loss"])
        loaded = checkpoint.load(run, "cpu")
        rung.half_stride.append(at_half_stride(loaded.model, loaded.config["data"]["block_size"], data))
        rung.tokens.append(found["train/tokens"])
        rung.parameters = found["parameters"]
        if seed == seeds[0]:
            before = rung.seconds[0] - found["train/seconds"]  # mostly start-up
            rung.way = [(before + seconds, loss) for _, seconds, loss in read_validations(run)]
    return rung


def at_half_stride(model: nn.Module, block_size: int, data: CharDataModule) -> float:
    """The loss over val where every character has at least half a window before it."""
    return evaluate(model, Windows(data.splits["val"], block_size, block_size // 2)).loss


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{deviation}"


def draw(rungs: list[Rung], file: Path) -> None:
    """Loss against seconds, with what nanoGPT is known for as a line."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    counts = [rung for rung in rungs if rung.parameters is None]
    axes.plot(
        [r.seconds[0] for r in counts], [r.losses[0] for r in counts], "o", ms=3, c="gray", label="counted n-grams"
    )
    for n, rung in enumerate(counts, 2):
        place = rung.seconds[0], rung.losses[0]
        axes.annotate(str(n), place, (0, 4), textcoords="offset points", fontsize=8, color="gray", ha="center")
    for number, rung in enumerate(r for r in rungs if r.parameters):
        color = f"C{number}"
        end = statistics.fmean(rung.seconds), statistics.fmean(rung.losses)
        axes.plot(*zip(*rung.way, end, strict=True), "-", lw=1, c=color, alpha=0.6)
        error = statistics.stdev(rung.losses) if len(rung.losses) > 1 else None
        axes.errorbar(*end, yerr=error, fmt="o", c=color, capsize=3, label=f"{rung.name}: {end[1]:.3f}")
    axes.axhline(QUOTED, ls="--", lw=1, c="black", label=f"nanoGPT's for an A100, as it quotes: {QUOTED}")
    axes.set(xscale="log", ylim=(1.35, 2.6), xlabel="seconds from start to end", ylabel="val loss, nats per character")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def prepare(folder: Path, data: CharDataModule) -> None:
    """The files of nanoGPT's data/shakespeare_char/prepare.py, which would download the text."""
    place = folder / "data" / "shakespeare_char"
    for split in ("train", "val"):
        data.splits[split].numpy().astype(np.uint16).tofile(place / f"{split}.bin")
    characters = {i: token.decode() for i, token in enumerate(data.tokenizer.tokens)}
    meta = {"vocab_size": len(characters), "itos": characters, "stoi": {c: i for i, c in characters.items()}}
    (place / "meta.pkl").write_bytes(pickle.dumps(meta))


def as_charlm(weights: dict[str, torch.Tensor], vocab_size: int) -> GPT:
    """nanoGPT's weights in charlm's GPT, which is the same function."""
    model = GPT(vocab_size, block_size=64, n_layer=4, n_head=4, n_embd=128)
    renamed: dict[str, Any] = {}
    for name, weight in weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = weight
    del renamed["lm_head.weight"]  # tied
    model.load_state_dict(renamed)
    return model


NAMES = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position_embedding",
    "transformer.ln_f": "norm",
    "transformer.h.": "blocks.",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.proj",
    "mlp.c_fc": "mlp.fc",
    "mlp.c_proj": "mlp.proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="the folder of a clone")
    parser.add_argument("--corpus", help="a text file; default: Tiny Shakespeare")
    parser.add_argument("--recipes", nargs="*", default=["nanogpt_cpu"], help="names in conf/experiment")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of each recipe")
    parser.add_argument("--png", type=Path, help="a file for the picture")
    args = parser.parse_args()
    corpus = args.corpus or load_corpus("tinyshakespeare").source
    data = CharDataModule("text", path=corpus, block_size=64, batch_size=12)
    data.setup()
    rungs = counted(data)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "nanogpt")
        shutil.copytree(args.nanogpt, clone, ignore=shutil.ignore_patterns(".git"))
        prepare(clone, data)
        rungs.append(nanogpt(clone, data))
        rungs += [recipe(name, args.seeds, corpus, data, Path(folder)) for name in args.recipes]
    table = Table("", "val loss", "at half stride", "parameters", "tokens", "seconds, from start to end")
    for rung in rungs:
        size = f"{rung.parameters:,}" if rung.parameters else ""
        losses = spread(rung.losses, 4), spread(rung.half_stride, 4)
        table.add_row(rung.name, *losses, size, spread(rung.tokens, 0), spread(rung.seconds, 1))
    Console().print(table)
    if args.png:
        draw(rungs, args.png)


if __name__ == "__main__":
    main()
