"""Several processes: each draws chunks of its own, and together they train as one process with all their batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from charlm import checkpoint
from charlm.data.chunks import RandomChunks
from charlm.data.datamodule import CharDataModule
from tests.test_budget import columns

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "train.py")
MODELS = sorted(f.stem for f in (ROOT / "charlm" / "model").glob("*.py") if f.stem != "__init__")
STEPS, ACCUMULATE, LIMIT = 12, 2, 0.5


@pytest.fixture
def two_processes(train, tmp_path, text_file):
    """`python train.py trainer=... ...`, where the second process must find its way by itself."""

    def run(name: str, *overrides: str) -> Path:
        common = ["data=text", f"data.path={text_file}", f"hydra.run.dir={name}"]
        ended = train(*common, "trainer.devices=2", "trainer.accelerator=cpu", *overrides, timeout=200)
        assert (ended.code, ended.err) == (0, ""), ended.err + ended.out
        return tmp_path / name

    return run


def test_two_processes_draw_other_chunks(prose):
    ids = torch.arange(len(prose))
    first, second = RandomChunks(ids, 8, 32, seed=1337, rank=0), RandomChunks(ids, 8, 32, seed=1337, rank=1)
    assert not any(torch.equal(first.batch(k)[0], second.batch(k)[0]) for k in range(100))


def one_process(folder: Path, path: Path) -> Any:
    """The same training, written out: the mean gradient over both processes and all batches of a step."""
    loaded = checkpoint.load(folder)
    settings, optimizer_settings = loaded.config["data"], loaded.config["optimizer"]
    data = CharDataModule("text", settings["block_size"], settings["batch_size"], path=str(path), seed=1337)
    data.setup()
    ranks = [RandomChunks(data.splits["train"], data.block_size, data.batch_size, 1337, rank) for rank in (0, 1)]
    torch.manual_seed(1337)
    model: Any = checkpoint.build(loaded.config["model"], data.tokenizer.vocab_size)
    if hasattr(model, "count"):
        model.count(data.splits["train"])
    parameters = list(model.parameters())
    decay = optimizer_settings["weight_decay"]
    groups = [{"params": [p], "weight_decay": decay if p.dim() >= 2 else 0.0} for p in parameters]
    optimizer = torch.optim.AdamW(groups, lr=optimizer_settings["lr"], betas=tuple(optimizer_settings["betas"]))
    for k in range(STEPS):
        batches = [chunks.batch(k * ACCUMULATE + i) for i in range(ACCUMULATE) for chunks in ranks]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, LIMIT)
        optimizer.step()
        optimizer.zero_grad()
    return model


def check_equals_one_process(two_processes, call, text_file, model: str, trainer: str) -> None:
    settings = [f"model={model}", "data.batch_size=4", "data.block_size=8", "optimizer.lr=1e-3", "threads=1"]
    settings += [f"trainer.max_steps={STEPS}", f"trainer.accumulate_grad_batches={ACCUMULATE}", "logger=csv"]
    settings += [f"trainer.gradient_clip_val={LIMIT}", "evaluate=[val]", "sample_length=1"]
    folder = two_processes("a", f"trainer={trainer}", *settings, f"trainer.val_check_interval={STEPS * ACCUMULATE}")
    for one, two in zip(
        one_process(folder, text_file).parameters(), checkpoint.load(folder).model.parameters(), strict=True
    ):
        # Sums in another order: each of the 12 steps moves a weight by about 1e-3, and agrees to a part in a hundred.
        assert torch.allclose(one, two, atol=1e-5)
    found = json.loads((folder / "results.json").read_text())
    assert found["train/tokens"] == STEPS * ACCUMULATE * 2 * 4 * 8
    again = json.loads(call("evaluate", str(folder), "--json", "--split", "val").out)
    assert again["val/loss"] == found["val/loss"]
    # The validation during training was shared between both, on the same weights as the final one.
    [shared] = columns(folder)["val/loss"].values()
    assert shared == pytest.approx(found["val/loss"], rel=1e-6)


@pytest.mark.parametrize(("model", "trainer"), [("bigram", "ddp"), pytest.param("gpt", "fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_and_report_as_one_with_all_their_batches(two_processes, call, text_file, model, trainer):
    check_equals_one_process(two_processes, call, text_file, model, trainer)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", [model for model in MODELS if model != "ngram"])  # which only counts
def test_two_processes_train_any_model_as_one(two_processes, call, text_file, model, trainer):
    check_equals_one_process(two_processes, call, text_file, model, trainer)


@pytest.mark.slow
def test_torchrun_starts_a_process_on_each_of_two_addresses(tmp_path, text_file):
    """The torchrun command of docs/runs.md, once for each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["data=text", f"data.path={text_file}", "trainer.max_steps=20", "trainer.accelerator=cpu"]
    settings += ["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=1", "hydra.run.dir=a"]
    processes = []
    for rank in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += [f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command += [f"--local-addr=127.0.0.{rank + 1}", TRAIN, *settings]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ, text=True, **pipes))  # type: ignore[call-overload]
    ends = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert "on each of 2 processes" in ends[0][0]
    assert ends[1][0] == ""  # one process speaks for all
    assert json.loads((tmp_path / "a" / "results.json").read_text())["train/tokens"] == 20 * 2 * 32 * 8


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_run_is_resumed_to_the_bit(two_processes, train, tmp_path, optimizer):
    settings = ["trainer=fsdp", "model=gpt", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "threads=1"]
    settings += ["data.batch_size=2", "data.block_size=8", "logger=none", f"optimizer={optimizer}"]
    whole = two_processes("whole", *settings, "trainer.max_steps=12")
    part = two_processes("part", *settings, "trainer.max_steps=6")
    ended = train("resume=part", "trainer.max_steps=12", timeout=200)
    assert (ended.code, ended.err) == (0, ""), ended.err
    one, other = (checkpoint.read(folder / "checkpoints" / "last.ckpt") for folder in (whole, part))
    for name in ("state_dict", "global_step"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    for a, b in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
