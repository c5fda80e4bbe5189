"""Measure loss against seconds: compressors, counting, nanoGPT's CPU recipe and charlm's, start to end, on one machine.

    python benchmarks/ladder.py                                     # compressors and counts alone: a minute
    python benchmarks/ladder.py --split plays                       # the same over nine held-out plays: ten minutes
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/ladder.py --nanogpt nanoGPT --recipes nanogpt_cpu cpu_90s cpu_10min --seeds 1 2 3 --png ladder.png

All losses are of every character of val, one after the other in windows of WINDOW characters. A network that was
trained on shorter chunks, such as nanoGPT's, has windows of its own block size; the table names each. Models that learn
are scored at a stride of half their window, too. Compressors see all of train and val before. nanoGPT runs as its
README says for a CPU, in a copy of its folder, and is the clock; its weights are then scored by charlm. A recipe NAME
is `python train.py experiment=NAME seed=N`.

With --split plays everything is repeated for each held-out play (data.fold), and losses are means over plays with their
standard error; else they are means over seeds with their standard deviation.
"""

import argparse
import json
import math
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from charlm import checkpoint
from charlm.data import CharDataModule
from charlm.data.chunks import Windows
from charlm.data.compressors import bytes_per_character, compressed
from charlm.data.corpora import PLAYS
from charlm.evaluate import evaluate
from charlm.model.gpt import GPT
from charlm.model.ngram import NGram, Smoothing
from charlm.run.results import read_validations
from charlm.tokenizer import ByteTokenizer

TRAIN = Path(__file__).parent.parent / "train.py"
FLAGS = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
FLAGS += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"

QUOTED = 1.4697  # nats per character; its README, from random batches
WINDOW = 256  # characters
ORDERS = range(2, 9)  # of n-grams that are counted
SMOOTHINGS: dict[str, Smoothing] = {"counted": "backoff", "Kneser-Ney": "kneser_ney"}


@dataclass
class Rung:
    """One line of the table, and of the picture one point and perhaps the way to it."""

    name: str
    window: int | None  # characters of a window; None: there are none
    seconds: list[float]  # seconds from start to end for each seed
    losses: list[float]  # exact loss on val for each seed
    half_stride: list[float] = field(default_factory=list)  # the same where every window begins within the last
    parameters: int | None = None
    tokens: list[int] = field(default_factory=list)  # that it trained on
    way: list[tuple[float, float]] = field(default_factory=list)  # seconds, and the loss that was logged by then


def text_of(args: argparse.Namespace, fold: int | None, **settings: Any) -> CharDataModule:
    """Return the text to measure on."""
    data = CharDataModule(path=args.corpus or "tinyshakespeare", fold=fold, **settings)
    data.setup()
    return data


def squeezed(args: argparse.Namespace, fold: int | None) -> list[Rung]:
    """General compressors, given train."""
    data, found = text_of(args, fold, tokenizer=ByteTokenizer.from_corpus), []
    per_char, start = math.log(2) * bytes_per_character(data), time.perf_counter()
    for one in compressed(data):
        seconds, start = time.perf_counter() - start, time.perf_counter()
        found.append(Rung(f"{one.compressor}, given train", None, [seconds], [one.given_train * per_char]))
    return found


def counted(args: argparse.Namespace, fold: int | None) -> list[Rung]:
    """N-grams, counted on train; nothing is learned."""
    data, found = text_of(args, fold, block_size=WINDOW), []
    for title, smoothing in SMOOTHINGS.items():
        for order in ORDERS:
            start = time.perf_counter()
            model = NGram(data.tokenizer.vocab_size, order, smoothing)
            model.count(data.splits["train"])
            loss = evaluate(model, data.windows("val")).loss
            found.append(Rung(f"{title} {order}-gram", WINDOW, [time.perf_counter() - start], [loss]))
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
    return Rung("nanoGPT's recipe for a CPU", 64, [seconds], [loss], [half], n_parameters, [2000 * 12 * 64], way)


def recipe(name: str, args: argparse.Namespace, fold: int | None, folder: Path) -> Rung:
    """charlm's own: `python train.py experiment=NAME`, for each seed."""
    rung = Rung(f"experiment={name}", None, [], [])
    text = ["data=text", f"data.path={Path(args.corpus).absolute()}"] if args.corpus else []
    settings = [f"experiment={name}", *text, *([f"data.fold={fold}"] if fold else []), "trainer.accelerator=cpu"]
    for seed in args.seeds:
        run = folder / f"{name}_{seed}"
        start = time.perf_counter()
        command = [sys.executable, str(TRAIN), *settings, f"seed={seed}", f"hydra.run.dir={run}"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        rung.seconds.append(time.perf_counter() - start)
        found = json.loads((run / "results.json").read_text())
        loaded = checkpoint.load(run, "cpu")
        rung.window = min(WINDOW, loaded.config["data"]["block_size"])
        data = text_of(args, fold, block_size=rung.window)
        rung.losses.append(evaluate(loaded.model, data.windows("val")).loss)
        rung.half_stride.append(at_half_stride(loaded.model, rung.window, data))
        rung.tokens.append(found["train/tokens"])
        rung.parameters = found["parameters"]
        if seed == args.seeds[0]:
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
    """Draw loss against seconds, with what nanoGPT is known for as a line."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for title, mark in zip(SMOOTHINGS, "os", strict=True):
        counts = [rung for rung in rungs if rung.name.startswith(title)]
        seconds, losses = [r.seconds[0] for r in counts], [r.losses[0] for r in counts]
        axes.plot(seconds, losses, mark, ms=3, c="gray", label=f"{title} n-grams")
        for n, place in zip(ORDERS, zip(seconds, losses, strict=True), strict=True):
            axes.annotate(str(n), place, (0, 4), textcoords="offset points", fontsize=8, color="gray", ha="center")
    for number, rung in enumerate(r for r in rungs if r.parameters):
        color = f"C{number}"
        end = statistics.fmean(rung.seconds), statistics.fmean(rung.losses)
        axes.plot(*zip(*rung.way, end, strict=True), "-", lw=1, c=color, alpha=0.6)
        error = statistics.stdev(rung.losses) if len(rung.losses) > 1 else None
        axes.errorbar(*end, yerr=error, fmt="o", c=color, capsize=3, label=f"{rung.name}: {end[1]:.3f}")
    axes.axhline(QUOTED, ls="--", lw=1, c="black", label=f"nanoGPT's for an A100, as it quotes: {QUOTED}")
    axes.set(xscale="log", ylim=(1.3, 2.6), xlabel="seconds from start to end", ylabel="val loss, nats per character")
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


def measure(args: argparse.Namespace, fold: int | None) -> list[Rung]:
    """Measure all rungs on one text."""
    rungs = [*squeezed(args, fold), *counted(args, fold)]
    with tempfile.TemporaryDirectory() as folder:
        if args.nanogpt:
            data = text_of(args, fold, block_size=64, batch_size=12)
            clone = Path(folder, "nanogpt")
            shutil.copytree(args.nanogpt, clone, ignore=shutil.ignore_patterns(".git"))
            prepare(clone, data)
            rungs.append(nanogpt(clone, data))
        rungs += [recipe(name, args, fold, Path(folder)) for name in args.recipes]
    return rungs


def over_folds(values: Sequence[float], digits: int = 4) -> str:
    """Mean and its standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}" if values else ""


def table_of(rungs: Sequence[Sequence[Rung]], joined: Callable[[Sequence[float], int], str]) -> Table:
    """Return the table: a line for each rung.

    Args:
        rungs: of each fold, or of the one text.
        joined: formats the losses.
    """
    table = Table("", "windows", "val loss", "at half stride", "parameters", "tokens", "seconds, from start to end")
    for same in zip(*rungs, strict=True):
        first, several = same[0], len(same) > 1
        losses, half = ([getattr(one, name) for one in same] for name in ("losses", "half_stride"))
        each = [[*map(statistics.fmean, filter(None, v))] if several else v[0] for v in (losses, half)]
        seconds = [value for one in same for value in one.seconds]
        size, tokens = f"{first.parameters:,}" if first.parameters else "", [n for one in same for n in one.tokens]
        window = str(first.window or "none")
        table.add_row(first.name, window, *(joined(v, 4) for v in each), size, spread(tokens, 0), spread(seconds, 1))
    return table


def by_play(rungs: Sequence[Sequence[Rung]], folds: Sequence[int]) -> Table:
    """Return the table of the losses on each play, by the numbers of data.fold."""
    table = Table("", *(f"{fold}" for fold in folds))
    for same in zip(*rungs, strict=True):
        table.add_row(same[0].name, *(f"{statistics.fmean(one.losses):.3f}" for one in same))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="the folder of a clone; without it, its recipe is left out")
    parser.add_argument("--corpus", help="a text file; default: Tiny Shakespeare")
    parser.add_argument("--split", choices=["tail", "plays"], default="tail", help="val: the last tenth, or each play")
    parser.add_argument("--folds", nargs="+", type=int, help="plays to hold out; default: all")
    parser.add_argument("--recipes", nargs="*", default=[], help="names in conf/experiment")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of each recipe")
    parser.add_argument("--png", type=Path, help="a file for the picture")
    args = parser.parse_args()
    if args.split == "tail":
        rungs = measure(args, None)
        Console(width=max(140, Console().width)).print(table_of([rungs], spread))
        if args.png:
            draw(rungs, args.png)
        return
    if args.png:
        parser.error("--png draws one text: leave out --split plays")
    folds = args.folds or [*range(1, len(PLAYS) + 1)]
    found = [measure(args, fold) for fold in track(folds, "plays", console=Console(stderr=True))]
    Console(width=max(140, Console().width)).print(table_of(found, over_folds), by_play(found, folds))


if __name__ == "__main__":
    main()
