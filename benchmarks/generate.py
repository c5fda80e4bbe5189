"""Milliseconds per character of generated text: nanoGPT, and charlm without and with its cache.

    python benchmarks/generate.py --nanogpt FOLDER_OF_A_CLONE

The same weights, of nanoGPT's recipe for CPUs (0.80 M parameters, block_size 64), in one process, by turns; the table
shows medians over the rounds. First it makes sure that both give the same text at temperature 0 while it fits into a
window: beyond, nanoGPT slides its window by one character and charlm by half, so the texts may differ.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from charlm.generate import generate
from charlm.model.gpt import GPT

VOCAB, BLOCK_SIZE, N_LAYER, N_HEAD, N_EMBD = 65, 64, 4, 4, 128
TEMPERATURE, TOP_K = 0.8, 200  # nanoGPT's
NAMES = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position_embedding",
    "transformer.h": "blocks",
    "transformer.ln_f": "norm",
    "ln_": "norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.proj",
    "mlp.c_fc": "mlp.fc",
    "mlp.c_proj": "mlp.proj",
}


def load_nanogpt(folder: Path) -> Any:
    """nanoGPT's model from its own file, with the weights that it begins with."""
    spec = importlib.util.spec_from_file_location("nanogpt", folder / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(1337)
    config = module.GPTConfig(BLOCK_SIZE, VOCAB, N_LAYER, N_HEAD, N_EMBD, dropout=0.0, bias=False)
    return module.GPT(config).eval()


def copy_of(theirs: Any) -> GPT:
    """The same function of the same weights, in charlm."""
    ours = GPT(VOCAB, BLOCK_SIZE, N_LAYER, N_HEAD, N_EMBD)
    weights = {}
    for name, weight in theirs.state_dict().items():
        if name != "lm_head.weight":  # the token embedding
            for its, mine in NAMES.items():
                name = name.replace(its, mine)
            weights[name] = weight
    ours.load_state_dict(weights)
    return ours.eval()


def contestants(theirs: Any, ours: GPT, prompt: Tensor, length: int) -> dict[str, Callable[[], object]]:
    def charlm(use_cache: bool) -> Callable[[], object]:
        return lambda: [*generate(ours, prompt, length, None, TEMPERATURE, TOP_K, use_cache=use_cache)]

    return {
        "nanoGPT": lambda: theirs.generate(prompt, length, TEMPERATURE, TOP_K),
        "charlm, use_cache=False": charlm(use_cache=False),
        "charlm": charlm(use_cache=True),
    }


def check_same_text(theirs: Any, ours: GPT) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.long)
    length = BLOCK_SIZE - 1
    expected = theirs.generate(prompt, length, top_k=1)[0, 1:].tolist()  # its temperature cannot be 0
    for use_cache in (True, False):
        written = torch.cat([*generate(ours, prompt, length, temperature=0, use_cache=use_cache)]).tolist()
        if written != expected:
            raise SystemExit(f"the texts differ (use_cache={use_cache}):\n{written}\n{expected}")


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="the folder of a clone of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    theirs = load_nanogpt(args.nanogpt)
    ours = copy_of(theirs)
    check_same_text(theirs, ours)
    console = Console()
    table = Table("threads", "batch", "generator", "ms/character, median", "fastest", "slowest", "times as fast")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in (1, 8):
            work = contestants(theirs, ours, torch.zeros(batch, 1, dtype=torch.long), args.length)
            rounds = [
                {name: milliseconds(job) / args.length for name, job in work.items()}
                for _ in track(range(args.rounds), f"{threads=} {batch=}", console=console, transient=True)
            ]
            medians = {name: statistics.median(r[name] for r in rounds) for name in work}
            for name in work:
                times = [r[name] for r in rounds]
                shown = (f"{value:.2f}" for value in (medians[name], min(times), max(times)))
                table.add_row(str(threads), str(batch), name, *shown, f"{medians['nanoGPT'] / medians[name]:.1f}")
            table.add_section()
    console.print(f"GPT of 0.80 M parameters, {args.length} characters, {args.rounds} rounds, the same text at first")
    console.print(table)


if __name__ == "__main__":
    main()
