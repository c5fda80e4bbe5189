"""Tests that need a GPU; skipped where there is none."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from charlm.checkpoint import archive
from tests.conftest import GPUS

LISTED = ["nvidia-smi", "-L"]
HAS_GPU = bool(shutil.which(LISTED[0])) and b"GPU 0" in subprocess.run(LISTED, capture_output=True, check=False).stdout
pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU")


@pytest.fixture
def on_gpu(train, tmp_path, text_file):
    """Train on one GPU into the folder `name`; returns what it left there."""

    def run(name: str, *overrides: str) -> Path:
        settings = ["data=text", f"data.path={text_file}", "trainer=gpu", "trainer.max_steps=60"]
        settings += ["trainer.val_check_interval=25", f"hydra.run.dir={name}", *overrides]
        ended = train(*settings, timeout=280, CUDA_VISIBLE_DEVICES=GPUS)
        assert (ended.code, ended.err) == (0, "")
        return tmp_path / name

    return run


def state(folder: Path) -> dict[str, torch.Tensor]:
    kept = archive.load(folder / "checkpoints" / "last.ckpt")
    return kept["state_dict"]


def largest_difference(one: Path, other: Path) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(state(one).values(), state(other).values(), strict=True))


def test_the_same_seed_gives_the_same_bits(on_gpu):
    assert largest_difference(on_gpu("a", "model=gpt"), on_gpu("b", "model=gpt")) == 0


def test_precision_is_chosen_and_told(on_gpu):
    log = (on_gpu("a") / "train.log").read_text()
    assert "bf16-mixed" in log or "32-true" in log


@pytest.mark.parametrize("model", ["bigram", "gpt"])
def test_a_step_as_a_cuda_graph_is_the_same_step(on_gpu, model):
    """Also with a schedule, which changes a number that the graph reads, with accumulation and with clipping."""
    settings = [f"model={model}", "scheduler=linear", "scheduler.warmup_steps=5", "trainer.precision=32-true"]
    settings += ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5", "optimizer.lr=1e-3"]
    assert largest_difference(on_gpu("a", *settings), on_gpu("b", *settings, "speed.cuda_graph=true")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bigram", "gpt", "transformerpp", "mixture"])
def test_compiled_training_reaches_the_same_loss(on_gpu, model):
    settings = [f"model={model}", "trainer.precision=32-true", "optimizer.lr=1e-3"]
    ways = {"eager": [], "compiled": ["compile=true"], "graph": ["compile=true", "speed.cuda_graph=true"]}
    if model == "mixture":
        del ways["graph"]
    folders = [on_gpu(name, *settings, *way) for name, way in ways.items()]
    losses = [json.loads((folder / "results.json").read_text())["val/loss"] for folder in folders]
    assert losses[1:] == pytest.approx([losses[0]] * (len(ways) - 1), abs=1e-3)


def test_gpts_train_together_on_a_gpu(train, tmp_path, text_file):
    fixed = ["data=text", f"data.path={text_file}", "trainer=gpu", "trainer.precision=32-true", "trainer.max_steps=60"]
    shape = ["model=gpt", "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "data.block_size=8", "seed=1,2,3"]
    for size in (1, 3):
        place = [f"hydra.launcher.pack={size}", f"hydra.sweep.dir={size}"]
        assert train("-m", *fixed, *shape, *place, timeout=280, CUDA_VISIBLE_DEVICES=GPUS).code == 0
    records = [json.loads((tmp_path / "3" / f"seed={seed}" / "run.json").read_text()) for seed in (1, 2, 3)]
    assert len({record["process"]["pid"] for record in records}) == 1
    for seed in (1, 2, 3):
        assert largest_difference(tmp_path / "1" / f"seed={seed}", tmp_path / "3" / f"seed={seed}") < 1e-3


def test_text_written_on_a_gpu_is_repeatable(on_gpu, charlm):
    folder = on_gpu("a", "model=gpt")
    texts = [
        charlm("generate", str(folder), "--device", "cuda", "--length", "200", CUDA_VISIBLE_DEVICES=GPUS).out
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 201
