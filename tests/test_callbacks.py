"""Observers that one adds: an average of the weights, the best state, an early end. None changes how a run trains."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from charlm import checkpoint
from charlm.callbacks import EMA, AtomicCheckpointIO, AtSteps, Best, Checkpoint, Progress
from charlm.callbacks.ema import wide
from charlm.checkpoint import archive
from charlm.data import CharDataModule
from charlm.model.bigram import Bigram
from charlm.module import LanguageModel
from charlm.optimizer.adamw import adamw
from charlm.scheduler import constant
from charlm.speed import GroupedSteps
from tests.test_budget import columns

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}


@pytest.fixture
def fit(text_file):
    """Train the bigram here; returns its module."""

    def fit(callbacks: Sequence[L.Callback], steps: int, ckpt_path: Any = None, **settings: Any) -> LanguageModel:
        L.seed_everything(1, verbose=False)
        data = CharDataModule("text", path=str(text_file), block_size=8, batch_size=4, seed=1)
        data.setup()
        optimizer = partial(adamw, **SETTINGS)
        module = LanguageModel(Bigram(data.tokenizer.vocab_size), optimizer, constant)
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        quiet |= {"num_sanity_val_steps": 0, "use_distributed_sampler": False}
        quiet |= {"check_val_every_n_epoch": None, "val_check_interval": 1000, "max_epochs": -1}
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        given = (
            quiet | {"max_steps": steps, "enable_checkpointing": saves, "plugins": [AtomicCheckpointIO()]} | settings
        )
        L.Trainer(accelerator="cpu", callbacks=[*callbacks, GroupedSteps(100)], **given).fit(
            module, data, ckpt_path=ckpt_path, weights_only=True
        )
        return module

    return fit


class Recorder(AtSteps):
    """Notes the weights at the start, after every step, and those that a validation and its observers see."""

    def __init__(self, every_n_steps: int | None = 1) -> None:
        self.every_n_steps = every_n_steps
        self.start = torch.empty(0)
        self.trained: dict[int, Tensor] = {}
        self.judged: dict[int, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = flat(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.trained[trainer.global_step] = flat(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.judged[trainer.global_step] = flat(pl_module)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def averaged(trained: dict[int, Tensor], decay: float, every: int) -> dict[int, Tensor]:
    """The average after each update, written out, in double precision."""
    found: dict[int, Tensor] = {}
    average = torch.empty(0)
    for n, step in enumerate(range(every, max(trained) + 1, every)):
        kept = min(decay**every, n / (n + 9))
        average = kept * average + (1 - kept) * trained[step].double() if n else trained[step].double()
        found[step] = average
    return found


@pytest.mark.parametrize(("decay", "every"), [(0.999, 1), (0.9, 1), (0.9, 7)])
def test_observers_of_any_place_see_the_average_and_training_goes_on_without_it(fit, decay, every):
    first, last, alone = Recorder(), Recorder(), Recorder()
    ended = flat(fit([first, EMA(decay, every), last], 60, val_check_interval=25))
    fit([alone], 60)
    for recorder in (first, last):
        assert list(recorder.trained) == list(range(1, 61))
        assert all(torch.equal(recorder.trained[step], alone.trained[step]) for step in alone.trained)
    expected = averaged(alone.trained, decay, every)
    for step, newest in ((25, 25 - 25 % every), (50, 50 - 50 % every)):
        for recorder in (first, last):
            assert torch.allclose(recorder.judged[step].double(), expected[newest], atol=1e-6)
            assert not torch.equal(recorder.judged[step], alone.trained[step])
    assert torch.allclose(ended.double(), expected[max(expected)], atol=1e-6)


def test_a_run_too_short_for_an_average_is_judged_by_its_own_weights(fit):
    assert torch.equal(flat(fit([EMA(every_n_steps=10)], 9)), flat(fit([], 9)))


def test_the_average_of_half_precision_is_kept_in_single():
    assert wide(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
    assert wide(torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("saved", [20, 25], ids=["at an update", "between two"])
def test_a_checkpoint_holds_the_average_and_beside_it_what_training_needs(fit, tmp_path, saved):
    """Also where it is written, at the same step, by an observer before the one that averages."""
    recorder, average = Recorder(), EMA(0.9, 10)
    fit([Checkpoint(str(tmp_path), saved), recorder, average], saved, val_check_interval=saved)
    content = archive.load(tmp_path / "last.ckpt")
    (shown,), (raw,) = content["state_dict"].values(), content["ema"]["raw"].values()
    assert torch.allclose(shown.flatten().double(), averaged(recorder.trained, 0.9, 10)[20], atol=1e-6)
    assert torch.equal(raw.flatten(), recorder.trained[saved])
    again, resumed = Recorder(), EMA(0.9, 10)
    fit([Checkpoint(str(tmp_path), 100), again, resumed], 45, tmp_path / "last.ckpt")
    assert torch.equal(again.start, recorder.trained[saved])
    assert min(again.trained) == saved + 1
    whole = recorder.trained | again.trained
    assert (resumed.updates, resumed.updated_at) == (4, 40)
    expected = averaged(whole, 0.9, 10)[40]
    assert torch.allclose(torch.cat([a.flatten() for a in resumed.average]).double(), expected, atol=1e-6)


def test_an_average_may_begin_in_a_resumed_run(fit, tmp_path):
    fit([Checkpoint(str(tmp_path), 20)], 20)
    recorder, average = Recorder(), EMA(0.9, 10)
    fit([Checkpoint(str(tmp_path), 100), recorder, average], 40, tmp_path / "last.ckpt")
    expected = recorder.trained[30].double() * 0.1 + recorder.trained[40].double() * 0.9
    assert torch.allclose(torch.cat([a.flatten() for a in average.average]).double(), expected, atol=1e-6)


def test_figures_and_checkpoint_of_a_run_are_those_of_the_average(train, call, tmp_path, text_file):
    common = ["data=text", f"data.path={text_file}", "trainer=cpu", "trainer.max_steps=60", "logger=csv"]
    common += ["trainer.val_check_interval=30", "evaluate=[val]"]
    for name, callbacks in {"plain": "callbacks=default", "ema": "callbacks=[default,ema]"}.items():
        ended = train(*common, callbacks, f"hydra.run.dir={name}")
        assert (ended.code, ended.err) == (0, "")
    found = json.loads((tmp_path / "ema" / "results.json").read_text())
    assert found["val/loss"] != json.loads((tmp_path / "plain" / "results.json").read_text())["val/loss"]
    assert json.loads(call("evaluate", "ema", "--split", "val", "--json").out)["val/loss"] == found["val/loss"]
    assert columns(tmp_path / "ema")["val/loss"][59] == pytest.approx(found["val/loss"], rel=1e-6)
    assert call("generate", "ema", "--length", "20").code == 0
    plain, ema = (archive.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("plain", "ema"))
    for name, weight in plain["state_dict"].items():
        assert torch.equal(ema["ema"]["raw"][name], weight)
    for mine, its in zip(flatten(plain["optimizer_states"]), flatten(ema["optimizer_states"]), strict=True):
        assert torch.equal(mine, its)


def flatten(node: Any) -> list[Tensor]:
    """All tensors in plain containers, in order."""
    if isinstance(node, Tensor):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else []
    return [tensor for child in children for tensor in flatten(child)]


@pytest.mark.slow
def test_two_processes_average_follow_the_clock_together_and_count_tokens_together(train, call, tmp_path, text_file):
    command = ["data=text", f"data.path={text_file}", "hydra.run.dir=a"]
    command += ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "callbacks=[default,ema,best]"]
    command += [f"max_tokens={30 * 2 * 256 - 1}", "trainer.max_time=00:01:00:00", "trainer.max_steps=-1"]
    command += ["scheduler=linear", "scheduler.warmup_steps=5", "trainer.val_check_interval=15"]
    ended = train(*command, timeout=200)
    assert (ended.code, ended.err) == (0, ""), ended.err + ended.out
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (found["steps"], found["stopped_by"]) == (30, "tokens")
    for file in ("last.ckpt", "best.ckpt"):
        again = json.loads(call("evaluate", f"a/checkpoints/{file}", "--split", "val", "--json").out)
        assert again["val/loss"] == found["val/loss"]
    assert archive.load(tmp_path / "a" / "checkpoints" / "last.ckpt")["ema"]["updates"] == 3


def test_an_early_end_is_an_end(train, tmp_path, text_file):
    common = ["data=text", f"data.path={text_file}", "trainer=cpu", "trainer.val_check_interval=5", "logger=csv"]
    stop = ["callbacks=[default,early_stopping]", "callbacks.early_stopping.min_delta=10"]
    ended = train(*common, *stop, "callbacks.early_stopping.patience=2", "hydra.run.dir=a")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (found["status"], found["stopped_by"], found["steps"]) == ("finished", "early stopping", 15)
    assert columns(tmp_path / "a")["val/loss"][14] == pytest.approx(found["val/loss"], rel=1e-6)


def test_the_best_state_is_that_of_the_lowest_validation(train, call, tmp_path, text_file):
    common = ["data=text", f"data.path={text_file}", "trainer=cpu", "trainer.val_check_interval=20", "logger=csv"]
    wild = ["optimizer.lr=1", "data.batch_size=1", "trainer.max_steps=400", "callbacks=[default,best]"]
    ended = train(*common, *wild, "hydra.run.dir=a")
    assert (ended.code, ended.err) == (0, "")
    assert "evaluate a/checkpoints/best.ckpt" in ended.out
    curve = {step + 1: loss for step, loss in columns(tmp_path / "a")["val/loss"].items()}
    best = min(curve, key=lambda step: curve[step])
    assert best < 400
    told = json.loads(call("evaluate", "a/checkpoints/best.ckpt", "--split", "val", "--json").out)
    assert told["step"] == best
    assert told["val/loss"] == pytest.approx(curve[best], rel=1e-6)
    assert call("generate", "a/checkpoints/best.ckpt", "--length", "20").code == 0
    kept = checkpoint.read(tmp_path / "a" / "checkpoints" / "best.ckpt")["callbacks"]["Best"]
    assert kept == {"loss": curve[best], "step": best}


def test_nan_is_never_the_best_and_what_was_best_is_remembered():
    best: Any = Best("folder")
    saved = []
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, 2.5, 2.0, 1.0]):
        metrics = {"val/loss": torch.tensor(loss)}
        alone = SimpleNamespace(broadcast=lambda value: value)
        trainer: Any = SimpleNamespace(
            global_step=step,
            callback_metrics=metrics,
            save_checkpoint=lambda path: (),
            strategy=alone,
        )
        trainer.sanity_checking = False
        before = best.step
        best.on_validation_end(trainer, None)
        if best.step != before:
            saved.append(step)
        if step == 4:
            again = Best("folder")
            again.load_state_dict(best.state_dict())
            best = again
    assert saved == [1, 3, 6]
    assert best.state_dict() == {"loss": 1.0, "step": 6}


class AtStart(AtSteps):
    """Notes whether there is a checkpoint when training starts."""

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = self.file.exists()


@pytest.mark.parametrize("large", [True, False])
def test_large_weights_are_not_saved_before_they_have_learned_anything(fit, tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr("charlm.callbacks.checkpoint.SMALL", 100)
    at_start = AtStart(tmp_path / "last.ckpt")
    fit([Checkpoint(str(tmp_path)), at_start], 3)
    assert at_start.found != large
    assert at_start.file.exists()


def test_a_long_validation_tells_how_far_it_is_and_of_how_much(fit, capsys, monkeypatch):
    monkeypatch.setattr(CharDataModule, "val_dataloader", lambda self: self.windows("val", most=500))
    progress = Progress(seconds_between_lines=1e-9)
    fit([progress], 4, val_check_interval=2)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 2/4  validating: ") for line in lines)
    assert any("val (25% of it) " in line for line in lines)
