"""A training state that is not as its trainer would have saved it is refused in one line, before the first step."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from charlm import checkpoint
from charlm.callbacks import EMA, AtomicCheckpointIO, Best, Checkpoint
from charlm.callbacks.dashboard import DashboardCallback
from charlm.checkpoint import archive
from charlm.checkpoint import content as parts_of_content
from charlm.checkpoint.restore import compare, slots
from charlm.data import CharDataModule
from charlm.errors import Diverged, InputError
from charlm.model.gpt import GPT
from charlm.module import LanguageModel
from charlm.optimizer.muon import muon
from charlm.scheduler import warmup_cosine
from tests.hostile import ESCAPE, write_checkpoint

STEPS = 4
STRANGE: list[Any] = [None, True, -1, 0.5, 10**30, float("nan"), "x", ESCAPE, [], [1], {}, {"a": 1}, {0: {}}, (1, 2)]
STRANGE += [torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(())]


class Shown(DashboardCallback):
    """A dashboard callback that shows nothing."""

    def show(self, *_: Any) -> None:
        pass


class Fragile(L.Callback):
    """A callback of a user's, whose state may be anything."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"numbers": {"a": 1}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict["numbers"]["a"] += 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, prose: str) -> CharDataModule:
    file = tmp_path_factory.mktemp("data") / "prose.txt"
    file.write_text(prose[:2000], encoding="utf-8")
    made = CharDataModule("text", 8, 2, path=str(file))
    made.setup()
    return made


def fit(data: CharDataModule, folder: Path, steps: int, resume: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    model = GPT(data.tokenizer.vocab_size, 8, 1, 2, 8)

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return muon(module, 0.02, 1e-3, 0.9, True, "original", [0.9, 0.99], 1e-8, 0.1)

    def schedule(optimizer: Any, budget: Any) -> Any:
        return warmup_cosine(optimizer, budget, 2, 0.1)

    module = LanguageModel(model, optimizer, schedule, {"format": archive.FORMAT})
    stopping = EarlyStopping("val/loss", patience=100)
    callbacks = [EMA(0.9, 1), Best(str(folder)), stopping, Shown(), Fragile(), Checkpoint(str(folder))]
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1, "log_every_n_steps": 2}
    trainer = L.Trainer(
        callbacks=callbacks, max_steps=steps, plugins=[AtomicCheckpointIO()], val_check_interval=2, **settings
    )
    path = folder / "last.ckpt" if resume else None
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return module


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    fit(data, folder, STEPS)
    return folder


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all parts of nested containers."""
    children: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [*([path] if path else []), *(place for key, child in children for place in places(child, (*path, key)))]


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    node = content
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return content


def resume(data: CharDataModule, folder: Path, found: Any) -> None:
    """Go on from `found`, with the checks that train.py makes before there is a trainer."""
    write_checkpoint(found, folder / "last.ckpt")
    parts = {"global_step": parts_of_content.Count} | parts_of_content.TRAINING | parts_of_content.AVERAGES
    parts_of_content.check_parts(folder / "last.ckpt", found, parts)
    fit(data, folder, 2 * STEPS, resume=True)


def outcome(data: CharDataModule, folder: Path, content: Any) -> str:
    """`refused` in one line, or `trained` to the end."""
    told = ""
    try:
        resume(data, folder, content)
    except InputError as error:
        told = str(error)
    assert told.isprintable()
    assert "last.ckpt" in told or told.startswith(Diverged.words) or not told
    return "refused" if told else "trained"


def test_a_whole_state_is_resumed(data, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    resumed = fit(data, tmp_path / "run", 2 * STEPS, resume=True)
    whole = fit(data, tmp_path, 2 * STEPS)
    assert resumed.trainer.global_step == 2 * STEPS
    # The schedule of the first part was that of a shorter run, but the state must fit.
    assert resumed.model.state_dict().keys() == whole.model.state_dict().keys()


TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "ema", "validated_at", "epoch", "global_step")


def wrong_states(content: dict[str, Any]) -> list[tuple[tuple[Any, ...], Any]]:
    found = []
    for path in places({key: content[key] for key in TRAINING if key in content}):
        if path[0] == "loops" and path[1:2] not in ((), ("fit_loop",)):
            continue  # those of validation alone are not restored
        found += [(path, value) for value in (KeyError, *STRANGE)]
    return found


def test_no_malformed_state_ends_in_a_traceback(data, saved, tmp_path):
    """Each place in the state, with a value drawn from those that it should not have."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    content = archive.load(saved / "last.ckpt")
    wrong = wrong_states(content)
    chosen = wrong[:: max(1, len(wrong) // 150)]
    assert len(chosen) >= 100
    for path, value in chosen:
        outcome(data, folder, changed(content, path, value))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_malformed_state_whatever_ends_in_a_traceback(data, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    content = archive.load(saved / "last.ckpt")
    for path, value in wrong_states(content):
        outcome(data, folder, changed(content, path, value))


FIT = ("loops", "fit_loop")
OPTIMIZER = ("optimizer_states", 0)
STEP = (*FIT, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step")
MALFORMED: list[tuple[tuple[Any, ...], Any, str]] = [
    (("optimizer_states",), KeyError, "no optimizer_states"),
    (("optimizer_states",), [], "optimizer_states has 0 parts where 1"),
    (OPTIMIZER, {}, "optimizer_states.0.state is missing"),
    ((*OPTIMIZER, "state"), [], "optimizer_states.0.state is not of type dict"),
    ((*OPTIMIZER, "state"), {}, "optimizer_states.0.state is empty"),
    ((*OPTIMIZER, "state", 99), {}, "is for parameter 99, which does not exist"),
    ((*OPTIMIZER, "state", 0), {}, "optimizer_states.0.state.0.momentum_buffer is missing"),
    ((*OPTIMIZER, "state", 0, "momentum_buffer"), torch.zeros(2), r"is not a tensor of shape \[24, 8\]"),
    ((*OPTIMIZER, "state", 0, ESCAPE), 1, "is nothing that this optimizer keeps"),
    ((*OPTIMIZER, "param_groups"), [], "param_groups has 0 parts where 3"),
    ((*OPTIMIZER, "param_groups", 0, "lr"), "x", "lr is not a number"),
    ((*OPTIMIZER, "param_groups", 0, "lr"), KeyError, "lr is missing"),
    ((*OPTIMIZER, "param_groups", 0, "params"), [0, 1, 2, 4], "names other parameters"),
    ((*OPTIMIZER, "state", 4, "step"), torch.zeros(7), r"step is not a tensor of shape \[\]"),
    ((*OPTIMIZER, "param_groups", 1, "betas"), 0.9, "betas is not of type tuple"),
    (("lr_schedulers",), {}, "lr_schedulers"),
    (("lr_schedulers",), [], "lr_schedulers has 0 parts where 1"),
    (("lr_schedulers", 0, "base_lrs"), [0.1, 0.1], "base_lrs has 2 parts where 3"),
    (("lr_schedulers", 0, "last_epoch"), "x", "last_epoch is not a number"),
    (("loops",), KeyError, "no loops"),
    (FIT, [], "loops.fit_loop"),
    ((*FIT, "state_dict", "combined_loader"), 5, "TypeError"),
    ((*FIT, "state_dict", "combined_loader"), ESCAPE, "stateful loaders"),
    ((*STEP, "total", "completed"), 3, "count 3 steps, and not 4"),
    ((*OPTIMIZER, "param_groups", 0, "ns_steps"), 0.5, "ns_steps is not 5"),
    ((*OPTIMIZER, "param_groups", 0, "momentum"), float("nan"), "momentum is not a number"),
    ((*FIT, "epoch_loop.batch_progress", "total", "ready"), -1, "ready is out of range"),
    ((*FIT, "epoch_loop.batch_progress", "total", "ready"), 1.5, "ready is not a number of type int"),
    ((*FIT, "epoch_loop.batch_progress", "current"), KeyError, "current is missing"),
    ((*FIT, "epoch_loop.batch_progress", "is_last_batch"), 1, "is_last_batch is not of type bool"),
    (("callbacks",), [], "callbacks"),
    (("callbacks", "Best"), {"loss": "x", "step": 1}, "callbacks.Best.loss is not a number"),
    (("callbacks", "Checkpoint", "logged"), {"a": -1}, "callbacks.Checkpoint.logged"),
    (("callbacks", "Fragile"), {"a": 1}, "KeyError: 'numbers'"),
    (("callbacks", "Fragile", "numbers", "a"), f"\n{ESCAPE}", "TypeError"),
    (("ema", "raw"), {}, "Missing key"),
    (("ema", "updates"), "x", "ema.updates"),
    (("validated_at",), "x", "validated_at"),
]


@pytest.mark.parametrize(("path", "value", "words"), MALFORMED)
def test_a_malformed_state_is_refused_with_the_place_in_it(data, saved, tmp_path, path, value, words):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    content = changed(archive.load(saved / "last.ckpt"), path, value)
    with pytest.raises(InputError, match=words) as told:
        resume(data, folder, content)
    assert "last.ckpt" in str(told.value)
    assert str(told.value).isprintable()


@pytest.mark.parametrize("place", ["optimizer_states", "loops", "callbacks", "lr_schedulers"])
def test_the_command_tells_a_malformed_state_in_one_line(train, trained, tmp_path, place):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = checkpoint.read(path)
    change: Any = {"optimizer_states": {"state": {0: ESCAPE}}, "loops": {"fit_loop": {ESCAPE: 1}}}.get(place, ESCAPE)
    content[place] = [change] if place == "optimizer_states" else change
    write_checkpoint(content, path)
    before = json.loads((tmp_path / "run" / "run.json").read_text())["status"]
    ended = train("resume=run", "trainer.max_steps=22")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert "\x1b" not in ended.err
    assert "last.ckpt" in ended.err
    assert before == "finished"


def test_a_defect_elsewhere_is_no_damage_of_the_state(data, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")

    def broken(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(Fragile, "on_train_start", broken)
    with pytest.raises(KeyError, match="a defect"):
        fit(data, tmp_path / "run", 2 * STEPS, resume=True)


def test_an_optimizer_that_needs_a_closure_is_not_tried():
    weight = nn.Parameter(torch.ones(3, 4))
    assert slots(torch.optim.LBFGS([weight]), 0, weight) is None


@pytest.mark.parametrize("kind", ["Adagrad", "Adam", "Adafactor", "NAdam", "RMSprop", "Rprop", "SGD"])
def test_what_an_optimizer_keeps_is_found_out_without_changing_it(kind):
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = getattr(torch.optim, kind)([weight], lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    found = slots(optimizer, 0, weight)
    assert found is not None
    torch.testing.assert_close(optimizer.state_dict(), before)
    assert torch.equal(weight, torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    compare(found, optimizer.state_dict()["state"].get(0, {}), "state")
    assert found.keys() == optimizer.state[weight].keys()
