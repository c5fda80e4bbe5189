"""Training, by Lightning one step at a time or in groups: each step is that of a plain PyTorch loop."""

import csv
import json
import shutil
from collections.abc import Callable
from itertools import product
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from torch import nn
from torch.nn import functional as F

from charlm.callbacks import AtSteps
from charlm.checkpoint import archive
from charlm.data.chunks import RandomChunks
from charlm.data.datamodule import CharDataModule
from charlm.evaluate import evaluate
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.model.lstm import LSTM
from charlm.module import LanguageModel
from charlm.optimizer.adamw import adamw
from charlm.optimizer.muon import muon
from charlm.scheduler import constant, linear, warmup_cosine
from charlm.speed import GroupedSteps
from charlm.speed.grouped_steps import Steps
from charlm.speed.table_gradient import table_gradient

LR, STEPS = 1e-2, 40


def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return adamw(model, lr=LR, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)


def small_gpt(vocab_size: int, dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=dropout)


@pytest.fixture
def data(text_file):
    made = CharDataModule("text", path=str(text_file), block_size=8, batch_size=4, seed=1)
    made.setup()
    return made


@pytest.fixture
def fit(data):
    """Train a small GPT in this process. Returns the module."""

    def run(
        callbacks: list[L.Callback] | None = None,
        steps_per_execution: int | None = 64,
        module: LanguageModel | None = None,
        **settings: Any,
    ) -> LanguageModel:
        module = module or LanguageModel(small_gpt(data.tokenizer.vocab_size), make_adamw)
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": Log()}
        quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0}
        rhythm: dict[str, Any] = {"val_check_interval": 15, "check_val_every_n_epoch": None, "max_steps": STEPS}
        speed = [GroupedSteps(steps_per_execution)] if steps_per_execution else []
        given = quiet | rhythm | settings
        L.Trainer(accelerator="cpu", callbacks=[*(callbacks or []), *speed], **given).fit(module, data)
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


@pytest.mark.parametrize("steps_per_execution", [None, 1, 7, 64])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, None), (1, 0.1), (2, 0.1)])
def test_training_is_the_plain_loop_to_the_bit(fit, data, steps_per_execution, accumulate, clip):
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    module = fit(steps_per_execution=steps_per_execution, **settings)
    assert module.trainer.global_step == STEPS
    assert torch.equal(weights(module.model), weights(plain_loop(data, accumulate, clip)))


class Log(L.pytorch.loggers.Logger):
    """Keeps all logged metrics."""

    name, version = "log", ""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.told.append((step, metrics))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "bigram": Bigram,
    "gpt": small_gpt,
    "gpt with dropout": lambda v: small_gpt(v, dropout=0.3),
    "lstm": lambda v: LSTM(v, n_layer=1, n_embd=16),
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": make_adamw,
    "muon": lambda m: muon(m, LR, LR, 0.95, True, "match_rms_adamw", [0.9, 0.99], 1e-8, 0.1),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9),
}
SCHEDULES: dict[str, Any] = {
    "constant": constant,
    "linear": lambda o, b: linear(o, b, warmup_steps=5, min_lr_ratio=0.1),
    "cosine": lambda o, b: warmup_cosine(o, b, warmup_steps=5, min_lr_ratio=0.0),
    "every epoch": lambda o, b: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "epoch"},
}
FLAGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "accumulating": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "clipping values": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "both": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
}
PRECISIONS = ["32-true", "bf16-mixed", "64-true", "bf16-true"]
EVERY = [*product(MODELS, OPTIMIZERS, SCHEDULES, FLAGS, PRECISIONS)]


def pairwise() -> list[tuple[str, ...]]:
    """Combinations in which every two choices meet, few enough for the default tests."""
    chosen: list[tuple[str, ...]] = []

    def pairs(case: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
        return {(i, case[i], j, case[j]) for i in range(len(case)) for j in range(i)}

    missing = set().union(*(pairs(case) for case in EVERY))
    while missing:
        chosen.append(max(EVERY, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


PAIRWISE = pairwise()


def both_ways(fit: Any, data: CharDataModule, case: tuple[str, ...]) -> list[list[Any]]:
    """Train one step at a time and in groups. Returns weights, states, and everything that was logged."""
    model, optimizer, schedule, flags, precision = case
    found = []
    data.batches_per_epoch = 13
    for steps in (None, 64):
        torch.manual_seed(0)
        module = LanguageModel(
            MODELS[model](data.tokenizer.vocab_size), OPTIMIZERS[optimizer], SCHEDULES[schedule], seed=3
        )
        log, monitor = Log(), LearningRateMonitor()
        settings = FLAGS[flags] | {"precision": precision, "logger": log, "log_every_n_steps": 7}
        fit([monitor, Timer()], steps, module, check_val_every_n_epoch=1, val_check_interval=1.0, **settings)
        trainer: Any = module.trainer
        state = trainer.optimizers[0].state_dict()
        loops = trainer.fit_loop.state_dict()
        found.append([weights(module.model), state, loops, log.told, dict(trainer.callback_metrics)])
    return found


def check_equal(found: list[list[Any]]) -> None:
    assert equal(*found)


def equal(one: Any, other: Any) -> bool:
    """Whether nested containers hold the same numbers, to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize("case", PAIRWISE, ids=", ".join)
def test_grouped_steps_are_those_of_lightning_to_the_bit(fit, data, case):
    check_equal(both_ways(fit, data, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EVERY[::4] if case not in PAIRWISE], ids=", ".join)
def test_more_grouped_steps_are_those_of_lightning_to_the_bit(fit, data, case):
    check_equal(both_ways(fit, data, case))


@pytest.mark.parametrize("flags", ["as it is", "clipping", "clipping values"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gradient_of_a_table_needs_no_autograd(fit, data, monkeypatch, optimizer, flags):
    monkeypatch.setattr(Steps, "autograd", None)
    check_equal(both_ways(fit, data, ("bigram", optimizer, "cosine", flags, "32-true")))


@pytest.mark.parametrize("case", ["hook", "frozen", "subclass", "loss of its own", "anomalies", "half", "accumulating"])
def test_autograd_is_left_out_only_where_nobody_could_tell(fit, data, case):
    class Subclass(Bigram):
        pass

    model = (Subclass if case == "subclass" else Bigram)(data.vocab_size)
    table = model.token_embedding_table.weight
    gradients: list[torch.Tensor] = []
    if case == "hook":
        table.register_hook(gradients.append)
    if case == "loss of its own":
        vars(model)["loss"] = model.loss  # as a user may replace it
    table.requires_grad_(case != "frozen")
    module = LanguageModel(model, make_adamw if case != "frozen" else lambda m: torch.optim.SGD([table], lr=LR))
    settings: dict[str, Any] = {"accumulate_grad_batches": 2 if case == "accumulating" else 1}
    settings |= {"precision": "bf16-true"} if case == "half" else {}
    module.trainer = trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)
    with torch.autograd.set_detect_anomaly(case == "anomalies"):
        assert table_gradient(trainer, module, 32) is None
    if case == "hook":
        fit(module=module)
        assert len(gradients) == STEPS


def test_steps_are_grouped_where_nothing_is_due(fit):
    """Counted by the calls of training_step, which grouped steps do without."""
    grouped = Counting()
    fit(module=None, callbacks=[grouped])
    assert grouped.at == [15, 30, 40]  # two validations and the end
    alone = Counting()
    fit([alone], None)
    assert alone.at == [*range(1, STEPS + 1)]


class Counting(AtSteps):
    """Records the steps of its calls."""

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.at: list[int] = []
        self.every_n_steps = every_n_steps
        self.losses: list[float] = []

    def after_steps(self, trainer: Any, pl_module: Any, losses: Any) -> None:
        self.losses += [float(loss) for loss in losses]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.at.append(trainer.global_step)
        self.losses.append(float(outputs["loss"]))


def test_a_callback_may_say_at_which_steps_it_must_be_called(fit):
    seven, any_step = Counting(7), Counting()
    fit([seven, any_step])
    assert seven.at == any_step.at == [7, 14, 15, 21, 28, 30, 35, 40]
    alone = Counting()
    fit([alone], None)
    assert seven.losses == alone.losses  # and it receives the losses of all steps between


class EveryBatch(L.Callback):
    """A callback of a stranger's, with an attribute that means something else."""

    every_n_steps = 7

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert [part.shape for part in batch] == [(4, 8), (4, 8)]
        self.seen.append((batch_idx, trainer.global_step))


class OfAtSteps(Counting):
    """It derives from a class that needs some steps only, and may need more itself."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.at.append(trainer.global_step)


@pytest.mark.parametrize("make", [EveryBatch, OfAtSteps])
def test_a_callback_that_looks_at_batches_sees_every_step(fit, data, make):
    watch = make()
    module = fit([watch])
    steps = [*range(1, STEPS + 1)]
    assert getattr(watch, "at", None) == steps or watch.seen == [(step - 1, step) for step in steps]
    assert torch.equal(weights(module.model), weights(plain_loop(data)))
    told = GroupedSteps().describe(module.trainer, module, 32)
    assert told == f"1 step at a time: {make.__name__} has on_train_batch_end, and so needs every batch"


@pytest.mark.parametrize(
    "callback",
    [
        lambda path: LearningRateMonitor(),
        lambda path: ModelCheckpoint(path, every_n_train_steps=20),
        lambda path: ModelCheckpoint(path, monitor="val/loss"),
        lambda path: EarlyStopping("val/loss"),
        lambda path: Timer(),
        lambda path: DeviceStatsMonitor(cpu_stats=False),
        lambda path: TQDMProgressBar(),
        lambda path: RichProgressBar(),
    ],
    ids=["rates", "checkpoints by steps", "checkpoints by loss", "early stopping", "timer", "device", "tqdm", "rich"],
)
def test_callbacks_of_lightning_leave_steps_in_groups(fit, data, tmp_path, callback):
    watch, log = Counting(), Log()
    made = callback(tmp_path / "checkpoints")
    shown = isinstance(made, ProgressBar)
    settings = {"enable_checkpointing": isinstance(made, ModelCheckpoint), "enable_progress_bar": shown}
    module = fit([made, watch], logger=log, log_every_n_steps=20, **settings)
    if isinstance(made, TQDMProgressBar):
        assert made.train_progress_bar.n == STEPS
    assert {20, 40} <= set(watch.at) <= {15, 20, 30, 40}
    assert torch.equal(weights(module.model), weights(plain_loop(data)))


def test_validation_falls_on_its_batches(fit):
    class Validated(L.Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.at.append(trainer.global_step)

    for accumulate, expected in ((1, [15, 30]), (5, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39])):
        for steps in (None, 64):
            watch = Validated()
            fit([watch], steps, accumulate_grad_batches=accumulate)
            assert watch.at == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_are_called_in_the_order_of_lightning(fit, data, accumulate):
    calls: list[str] = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            calls.append("zero_grad")

        def on_before_backward(self, *_: Any) -> None:
            calls.append("backward")

        def on_after_backward(self, *_: Any) -> None:
            calls.append("after")

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            calls.append("step")

    module = fit([Watch()], accumulate_grad_batches=accumulate)
    rest = ["backward", "after"] * (accumulate - 1)
    assert calls == ["zero_grad", "backward", "after", *rest, "step"] * STEPS
    assert torch.equal(weights(module.model), weights(plain_loop(data, accumulate)))


def test_gradients_are_clipped_after_callbacks_have_seen_them(fit):
    class Watch(L.Callback):
        largest = 0.0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad.abs().max() for p in pl_module.parameters()]
            self.largest = max(self.largest, *map(float, gradients))

    loose, tight = Watch(), Watch()
    fit([loose])
    fit([tight], gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert loose.largest > 2e-3
    assert tight.largest > 2e-3


def test_a_subclass_is_trained_by_its_own_step(fit, data):
    class Half(LanguageModel):
        """Half the loss, as one would try it."""

        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            x, y = batch
            assert x.shape == y.shape == (4, 8)
            return F.cross_entropy(self(x).flatten(0, 1), y.flatten()) / 2

    module = Half(small_gpt(data.tokenizer.vocab_size), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    fit(module=module)
    assert module.calls == STEPS
    model = small_gpt(data.tokenizer.vocab_size)
    optimizer, chunks = torch.optim.SGD(model.parameters(), lr=0.1), RandomChunks(data.splits["train"], 8, 4, seed=1)
    for step in range(STEPS):
        x, y = chunks.batch(step)
        (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(module.model), weights(model))
    assert GroupedSteps().describe(module.trainer, module, 32) == "1 step at a time: Half has training_step of its own"


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start",
        "on_train_batch_end",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "optimizer_step",
        "optimizer_zero_grad",
        "configure_gradient_clipping",
        "lr_scheduler_step",
        "backward",
    ],
)
def test_hooks_of_a_subclass_are_called_at_each_step(fit, data, hook):
    calls = 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return getattr(super(Own, self), hook)(*args, **kwargs)

    class Own(LanguageModel):
        """With one hook of its own."""

    setattr(Own, hook, counted)
    module = Own(small_gpt(data.tokenizer.vocab_size), make_adamw, SCHEDULES["linear"])
    fit(module=module, gradient_clip_val=1.0)
    assert calls == STEPS


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
    for name, speed in {"off": ["speed=off"], "1": ["speed.steps_per_execution=1"], "100": ["speed=auto"]}.items():
        ended = train(*settings, *speed, f"hydra.run.dir={name}")
        assert (ended.code, ended.err) == (0, "")
        folder = tmp_path / name
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
    # Lightning numbers steps from 0, and validates after batches.
    assert [int(row["step"]) for row in rows[0] if row["train/loss"]] == [9, 19, 29, 39, 49]
    assert [int(row["step"]) for row in rows[0] if row["val/loss"]] == [7, 14, 22, 29, 37, 44, 49]


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
