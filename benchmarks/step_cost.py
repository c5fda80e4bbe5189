"""Memory and time of a training step of the GPT against block_size and n_layer, as a table and a picture.

    pip install -e '.[dev]'
    python benchmarks/step_cost.py                   12 chunks, 4 heads of 32 channels, as in experiment=nanogpt_cpu

Every point is a fresh process, whose memory is the most that it takes, less what it took before there was a model.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from charlm.evaluate import mean_loss
from charlm.model.gpt import GPT
from charlm.optimizer.adamw import adamw

VOCAB_SIZE, BATCH_SIZE, N_HEAD, N_EMBD = 65, 12, 4, 128
BLOCK_SIZES, N_LAYERS = (16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16)
BLOCK_SIZE, N_LAYER = 64, 4  # the recipe's value, while the other setting varies
PICTURE = Path(__file__).with_suffix(".png")


def measure(block_size: int, n_layer: int, device: str) -> tuple[float, float]:
    """Milliseconds (median) and mebibytes of a training step, in this process."""
    on_gpu = device == "cuda"
    before = resident()
    model = GPT(VOCAB_SIZE, block_size, n_layer, N_HEAD, N_EMBD).to(device)
    optimizer = adamw(model, lr=1e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1)
    x, y = torch.randint(VOCAB_SIZE, (2, BATCH_SIZE, block_size), device=device)
    times = []
    for _ in range(13):
        start = time.perf_counter()
        mean_loss(model, x, y).backward()
        optimizer.step()
        model.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    taken = torch.cuda.max_memory_allocated() if on_gpu else resident() - before
    return statistics.median(times[3:]) * 1e3, taken / 2**20


def resident() -> int:
    """The most memory that this process has ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(block_size: int, n_layer: int, device: str, threads: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--point", str(block_size), str(n_layer), "--device", device]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    milliseconds, mebibytes = json.loads(ended.stdout)
    return milliseconds, mebibytes


def draw(points: dict[tuple[int, int], tuple[float, float]], title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    figure.suptitle(title)
    columns = {
        f"block_size (n_layer {N_LAYER})": [(t, points[t, N_LAYER]) for t in BLOCK_SIZES],
        f"n_layer (block_size {BLOCK_SIZE})": [(n, points[BLOCK_SIZE, n]) for n in N_LAYERS],
    }
    for column, (name, line) in enumerate(columns.items()):
        sizes = [size for size, _ in line]
        for row, what in enumerate(("milliseconds a step", "MiB at the most")):
            axis = axes[row][column]
            axis.plot(sizes, [values[row] for _, values in line], marker="o")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.yaxis.set_major_formatter("{x:.0f}")
            axis.set_xticks(sizes)
            axis.grid(alpha=0.3)
            axis.set_ylabel(what)
        axes[1][column].set_xlabel(name)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--point", nargs=2, type=int, help="measure this one here and print it: for the script itself")
    args = parser.parse_args()
    if args.point:
        block_size, n_layer = args.point
        print(json.dumps(measure(block_size, n_layer, args.device)))
        return
    wanted = sorted({(t, N_LAYER) for t in BLOCK_SIZES} | {(BLOCK_SIZE, n) for n in N_LAYERS})
    console = Console()
    points = {
        point: in_fresh_process(*point, args.device, args.threads)
        for point in track(wanted, "points", console=console, transient=True)
    }
    table = Table("block_size", "n_layer", "ms a step", "MiB")
    for (block_size, n_layer), (milliseconds, mebibytes) in points.items():
        table.add_row(str(block_size), str(n_layer), f"{milliseconds:.1f}", f"{mebibytes:.0f}")
    console.print(table)
    where = f"{args.threads} thread{'s' * (args.threads > 1)} of a CPU" if args.device == "cpu" else "a GPU"
    draw(points, f"A training step of the GPT: {BATCH_SIZE} chunks, {N_EMBD} channels, {where}")
    console.print(f"The picture: {PICTURE}")


if __name__ == "__main__":
    main()
