"""nanoGPT's CPU recipe, by nanoGPT and by charlm, on the same machine in one run: seconds, and the exact loss of both.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt.py --nanogpt nanoGPT

nanoGPT runs as its README says for a CPU, in a copy of its folder; its weights are then scored by charlm, over every
character of val in the same windows. charlm is `python train.py experiment=nanogpt_cpu`.
"""

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from charlm.data import CharDataModule
from charlm.data.corpus import load_corpus
from charlm.evaluate import evaluate
from charlm.model.gpt import GPT

TRAIN = Path(__file__).parent.parent / "train.py"
FLAGS = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
FLAGS += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"


def timed(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def prepare(folder: Path, data: CharDataModule) -> None:
    """The files of nanoGPT's data/shakespeare_char/prepare.py, which would download the text."""
    place = folder / "data" / "shakespeare_char"
    for split in ("train", "val"):
        data.splits[split].numpy().astype(np.uint16).tofile(place / f"{split}.bin")
    characters = dict(enumerate(data.tokenizer.chars))
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
    args = parser.parse_args()
    corpus = args.corpus or load_corpus("tinyshakespeare").source
    data = CharDataModule("text", path=corpus, block_size=64, batch_size=12)
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        clone, run = Path(folder, "nanogpt"), Path(folder, "run")
        shutil.copytree(args.nanogpt, clone, ignore=shutil.ignore_patterns(".git"))
        prepare(clone, data)
        theirs = timed([sys.executable, "train.py", "config/train_shakespeare_char.py", *FLAGS.split()], clone)
        kept = torch.load(clone / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
        their_loss = evaluate(as_charlm(kept["model"], data.tokenizer.vocab_size), data.windows("val"))
        settings = ["data=text", f"data.path={corpus}", "trainer.accelerator=cpu", f"hydra.run.dir={run}"]
        ours = timed([sys.executable, str(TRAIN), "experiment=nanogpt_cpu", *settings], Path(folder))
        found = json.loads((run / "results.json").read_text())
    table = Table("", "seconds, from start to end", "exact val loss, nats per character", "its own estimate")
    table.add_row("nanoGPT", f"{theirs:.1f}", f"{their_loss.loss:.4f}", f"{float(kept['best_val_loss']):.4f}")
    table.add_row("charlm", f"{ours:.1f}", f"{found['val/loss']:.4f}", "")
    table.add_row("charlm / nanoGPT", f"{ours / theirs:.2f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
