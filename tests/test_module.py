"""The training step: however many steps Lightning takes for one, each is the step of a plain PyTorch loop."""

import csv
import json
import shutil
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from charlm import archive
from charlm.data.chunks import RandomChunks
from charlm.data.datamodule import CharDataModule
from charlm.evaluate import evaluate
from charlm.model.gpt import GPT
from charlm.module import LanguageModel
from charlm.optimizer.adamw import adamw
from charlm.scheduler import constant

LR, STEPS = 1e-2, 40


def make_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return adamw(model, lr=LR, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)


def small_gpt(vocab_size: int) -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def data(text_file):
    made = CharDataModule("text", path=str(text_file), block_size=8, batch_size=4, seed=1)
    made.setup()
    return made


@pytest.fixture
def fit(data):
    """Train a small GPT in this process. Returns the module."""

    def run(callbacks: list[L.Callback] | None = None, steps_per_execution: int = 64, **settings: Any) -> LanguageModel:
        module = LanguageModel(small_gpt(data.tokenizer.vocab_size), make_adamw, constant, {}, steps_per_execution)
        quiet: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
        quiet |= {"enable_checkpointing": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
        rhythm: dict[str, Any] = {"val_check_interval": 15, "check_val_every_n_epoch": None, "max_steps": STEPS}
        L.Trainer(accelerator="cpu", callbacks=callbacks, **(quiet | rhythm | settings)).fit(module, data)
        return module

    return run


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def plain_loop(data: CharDataModule, accumulate: int = 1, clip: float | None = None) -> nn.Module:
    """The same training as one writes it without any framework."""
    model = small_gpt(data.tokenizer.vocab_size)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    chunks = RandomChunks(data.splits["train"], 8, 4, seed=1)
    for step in range(STEPS):
        for i in range(accumulate):
            x, y = chunks.batch(step * accumulate + i)
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            (loss / accumulate if accumulate > 1 else loss).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("steps_per_execution", [1, 7, 64])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, None), (1, 0.1), (2, 0.1)])
def test_training_is_the_plain_loop_to_the_bit(fit, data, steps_per_execution, accumulate, clip):
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    module = fit(steps_per_execution=steps_per_execution, **settings)
    assert module.trainer.global_step == STEPS
    assert torch.equal(weights(module.model), weights(plain_loop(data, accumulate, clip)))


def test_clipping_by_value_clips_each_part_of_the_gradient(fit):
    class Watch(L.Callback):
        largest = 0.0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad.abs().max() for p in pl_module.parameters()]
            self.largest = max(self.largest, *map(float, gradients))

    loose, tight = Watch(), Watch()
    fit([loose])
    fit([tight], gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert loose.largest > 2e-3
    assert tight.largest == pytest.approx(1e-3)


class Every(L.Callback):
    """A callback of a stranger's, which does not know of executions of several steps."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.global_step)


class EverySeven(Every):
    every_n_steps = 7


class Unhurried(Every):
    every_n_steps = None


def test_a_callback_that_looks_at_batches_sees_every_step(fit, data):
    watch = Every()
    module = fit([watch])
    assert watch.seen == list(range(1, STEPS + 1))
    assert torch.equal(weights(module.model), weights(plain_loop(data)))


def test_a_callback_may_say_at_which_steps_it_must_be_called(fit):
    seven, unhurried = EverySeven(), Unhurried()
    fit([seven, unhurried])
    assert {7, 14, 21, 28, 35} <= set(seven.seen)
    assert seven.seen == unhurried.seen  # steps end together
    # Seven, a validation every 15, the end: and nothing between.
    assert unhurried.seen == [7, 14, 15, 21, 28, 30, 35, 40]


def test_validation_falls_on_its_steps(fit):
    class Validated(L.Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.at.append(trainer.global_step)

    for accumulate in (1, 4):
        watch = Validated()
        fit([watch], accumulate_grad_batches=accumulate)
        assert watch.at == [15, 30]


def test_callbacks_that_look_at_single_passes_are_called_at_each(fit, data):
    calls: list[str] = []

    class Watch(L.Callback):
        def on_before_backward(self, *_: Any) -> None:
            calls.append("backward")

        def on_after_backward(self, *_: Any) -> None:
            calls.append("after")

        def on_before_optimizer_step(self, *_: Any) -> None:
            calls.append("step")

    module = fit([Watch()], accumulate_grad_batches=2)
    assert calls == ["backward", "after", "backward", "after", "step"] * STEPS
    assert torch.equal(weights(module.model), weights(plain_loop(data, accumulate=2)))


def test_mixed_precision_keeps_weights_and_loss_in_full(fit, data):
    mixed, full, untrained = fit(precision="bf16-mixed").model, plain_loop(data), small_gpt(data.tokenizer.vocab_size)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert not torch.equal(weights(mixed), weights(full))
    losses = [evaluate(model, data.windows("val")).loss for model in (mixed, full, untrained)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02 * (losses[2] - losses[1]))


def test_several_steps_at_once_leave_the_same_files(train, tmp_path, text_file):
    """Dropout, accumulation, clipping, validation, logging and checkpoints, each at its own rhythm."""
    settings = ["model=gpt", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.dropout=0.2", "threads=1"]
    settings += ["data=text", f"data.path={text_file}", "data.batch_size=2", "data.block_size=8", "logger=csv"]
    settings += ["trainer.max_steps=50", "trainer.val_check_interval=15", "trainer.log_every_n_steps=10"]
    settings += ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5"]
    settings += ["callbacks.checkpoint.every_n_steps=7"]
    kept, rows, results = [], [], []
    for steps in (1, 100):
        ended = train(*settings, f"steps_per_execution={steps}", f"hydra.run.dir={steps}")
        assert (ended.code, ended.err) == (0, "")
        folder = tmp_path / str(steps)
        kept.append(archive.load(folder / "checkpoints" / "last.ckpt"))
        lines = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        rows.append([{k: v for k, v in line.items() if k != "train/tokens_per_second"} for line in lines])
        found = json.loads((folder / "results.json").read_text())
        results.append({k: v for k, v in found.items() if k not in ("train/seconds", "train/tokens_per_second")})
    for checkpoint, row, result in zip(kept[1:], rows[1:], results[1:], strict=True):
        assert checkpoint["state_dict"].keys() == kept[0]["state_dict"].keys()
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops"):
            torch.testing.assert_close(checkpoint[part], kept[0][part], rtol=0, atol=0)
        assert row == rows[0]
        assert result == results[0]
    assert [int(row["step"]) for row in rows[0] if row["train/loss"]] == [10, 20, 30, 40, 50]
    assert [int(row["step"]) for row in rows[0] if row["val/loss"]] == [15, 30, 45, 50]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize(("trainer", "model"), [("cpu", "bigram"), ("cpu", "gpt"), ("ddp", "gpt")])
def test_compiled_training_is_the_same_up_to_rounding(train, tmp_path, text_file, model, trainer):
    settings = ["data=text", f"data.path={text_file}", "data.batch_size=4", "data.block_size=8", f"trainer={trainer}"]
    settings += ["trainer.max_steps=10", "optimizer.lr=1e-3", "trainer.accelerator=cpu", "trainer.devices=1"]
    settings += ["trainer.accumulate_grad_batches=2", "threads=1", f"model={model}"]
    if model == "gpt":
        settings += ["model.n_layer=1", "model.n_embd=32", "model.n_head=2"]
    states = []
    for name, compiled in {"eager": "false", "compiled": "true"}.items():
        ended = train(*settings, f"compile={compiled}", f"hydra.run.dir={name}", timeout=280)
        assert (ended.code, ended.err) == (0, "")
        states.append(archive.load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"])
    assert states[0].keys() == states[1].keys()
    # Ten steps move a weight by up to 1e-2. Where its gradient is next to zero, Adam makes much of a rounding error.
    difference = torch.cat([(states[1][key] - states[0][key]).abs().flatten() for key in states[0]])
    assert difference.max() < 1e-3
    assert difference.mean() < 1e-6
