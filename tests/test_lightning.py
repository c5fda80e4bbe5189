"""Ordinary Lightning code does the same with charlm's module as with one that is written as its documentation shows."""

import csv
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from charlm import GPT, Bigram, CharDataModule, LanguageModel, checkpoint
from charlm.callbacks import Best
from charlm.data.chunks import IGNORE
from charlm.errors import InputError
from charlm.preflight.command import check_command
from charlm.preflight.flags import REFUSED, TESTED
from charlm.scheduler import constant
from charlm.speed import GroupedSteps
from tests.conftest import ROOT

LR = 1e-2
HOOKS = [
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end"
]  # fmt: skip
Make = Callable[..., Any]


class Plain(L.LightningModule):
    """A module as Lightning's documentation shows it."""

    def __init__(self, model: torch.nn.Module, optimizer: Make, scheduler: Make | None = None):
        super().__init__()
        self.model, self.make_optimizer, self.make_scheduler = model, optimizer, scheduler

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        assert x.shape == y.shape == (4, 8)
        loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.total, self.n = 0.0, 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.model(x).flatten(0, 1)
        self.total += F.cross_entropy(logits, y.flatten(), reduction="sum", ignore_index=IGNORE).item()
        self.n += int((y != IGNORE).sum())

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.total / max(1, self.n))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.model)
        schedule = self.make_scheduler(optimizer, None) if self.make_scheduler else None
        return {"optimizer": optimizer, "lr_scheduler": schedule} if schedule else optimizer


class Recorder(L.Callback):
    """Notes each call of a hook, and the size of the gradients before each step."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.largest: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls.append("on_before_optimizer_step")
        self.largest.append(max(float(p.grad.abs().max()) for p in pl_module.parameters() if p.grad is not None))


def note(hook: str) -> Any:
    def call(self: Any, trainer: Any, *_: Any) -> None:
        self.calls.append((hook, trainer.global_step, trainer.sanity_checking))

    return call


for hook in HOOKS:
    if hook not in vars(Recorder):
        setattr(Recorder, hook, note(hook))


class EveryTenth(L.Callback):
    """Acts on every tenth batch, and has an attribute that another class gives a meaning to."""

    every_n_steps = 7

    def __init__(self) -> None:
        self.at: list[int] = []
        self.calls = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls += 1
        if batch_idx % 10 == 0:
            self.at.append(trainer.global_step)


class Log(L.pytorch.loggers.Logger):
    """Keeps all logged metrics."""

    name, version = "log", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, str, float]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name.startswith(("train/loss", "val")) and not name.endswith(("per_char", "perplexity")):
                self.rows.append((step, name.replace("val_partial/", "val/"), value))


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.9)


def own_loader(data: CharDataModule) -> DataLoader[Any]:
    ids = torch.arange(24 * 8).view(24, 8) % data.vocab_size
    return DataLoader(TensorDataset(ids, (ids + 1) % data.vocab_size), batch_size=4)


@dataclass(frozen=True)
class Row:
    """Ordinary Lightning code: flags of the trainer, callbacks, an optimizer, a schedule, batches."""

    name: str
    flags: dict[str, Any] = field(default_factory=lambda: {"max_steps": 12})
    callbacks: Callable[[], Sequence[L.Callback]] = lambda: []
    optimizer: Make = sgd
    scheduler: Make = lambda optimizer, budget: None
    loader: Make | None = None
    frozen: bool = False
    slow: bool = False


def by(interval: str, frequency: int = 1) -> Make:
    def make(optimizer: Any, budget: Any) -> dict[str, Any]:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
        return {"scheduler": schedule, "interval": interval, "frequency": frequency}

    return make


def plateau(optimizer: Any, budget: Any) -> dict[str, Any]:
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10)
    return {"scheduler": schedule, "monitor": "val/loss", "interval": "epoch"}


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR)


EPOCHS = {"max_epochs": 3}
TABLE = [
    Row("limit_train_batches", {"limit_train_batches": 3, "max_epochs": 4}),
    Row("a fraction of the training batches", {"limit_train_batches": 0.5, "max_epochs": 2}, slow=True),
    Row("a loader of one's own", {"max_epochs": 2}, loader=own_loader),
    Row("max_epochs, validated after each", EPOCHS | {"check_val_every_n_epoch": 1}),
    Row("validated after every second epoch", {"max_epochs": 4, "check_val_every_n_epoch": 2}, slow=True),
    Row("val_check_interval", EPOCHS | {"val_check_interval": 3}),
    Row("limit_val_batches of a part", EPOCHS | {"limit_val_batches": 0.5}),
    Row("limit_val_batches of one", EPOCHS | {"limit_val_batches": 1}, slow=True),
    Row("fast_dev_run", {"fast_dev_run": 3}),
    Row("overfit_batches", EPOCHS | {"overfit_batches": 2}),
    Row("a sanity check", {"max_steps": 6, "num_sanity_val_steps": 2}),
    Row("accumulate_grad_batches", {"max_steps": 12, "accumulate_grad_batches": 3}),
    Row("clipping by norm", {"max_steps": 12, "gradient_clip_val": 1e-2}),
    Row(
        "clipping by value", {"max_steps": 12, "gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}, slow=True
    ),
    Row("detect_anomaly", {"max_steps": 6, "detect_anomaly": True}),
    Row("min_steps after max_epochs", {"max_epochs": 2, "min_steps": 25}, slow=True),
    Row("reload_dataloaders_every_n_epochs", EPOCHS | {"reload_dataloaders_every_n_epochs": 1}, slow=True),
    Row("a profiler", {"max_steps": 6, "profiler": "simple"}, slow=True),
    Row("max_time", {"max_steps": 12, "max_time": "00:00:10:00"}, slow=True),
    Row("AdamW of torch", optimizer=adam, slow=True),
    Row("a frozen part", optimizer=sgd, frozen=True),
    Row("a schedule by steps", scheduler=by("step")),
    Row("a schedule by every third step", scheduler=by("step", 3), slow=True),
    Row("a schedule by epochs", EPOCHS, scheduler=by("epoch")),
    Row("ReduceLROnPlateau", EPOCHS, scheduler=plateau),
    Row("StochasticWeightAveraging", {"max_epochs": 4}, lambda: [of_lightning.StochasticWeightAveraging(1e-2, 1)]),
    Row("GradientAccumulationScheduler", EPOCHS, lambda: [of_lightning.GradientAccumulationScheduler({0: 1, 1: 2})]),
    Row("EarlyStopping", {"max_epochs": 9}, lambda: [of_lightning.EarlyStopping("val/loss", 9.0, patience=1)]),
    Row("LearningRateMonitor", callbacks=lambda: [of_lightning.LearningRateMonitor()]),
    Row("Timer", callbacks=lambda: [of_lightning.Timer()], slow=True),
    Row("DeviceStatsMonitor", callbacks=lambda: [of_lightning.DeviceStatsMonitor(cpu_stats=False)], slow=True),
    Row("every tenth batch", {"max_steps": 50}, lambda: [EveryTenth()]),
    Row("64-true", {"max_steps": 6, "precision": "64-true"}),
]


@pytest.fixture
def data(text_file):
    return CharDataModule(path=str(text_file), block_size=8, batch_size=4, batches_per_epoch=10, seed=1)


def fitted(row: Row, kind: str, data: CharDataModule, recorder: Recorder | None) -> tuple[Any, list[Any], Any]:
    """Train a module of a kind. Returns it, what was logged, and the callbacks."""
    torch.manual_seed(0)
    model = GPT(data.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8)
    model.position_embedding.requires_grad_(not row.frozen)
    make = Plain if kind == "plain" else LanguageModel
    module = make(model, row.optimizer, row.scheduler)
    log, watched = Log(), [*row.callbacks()]
    more = [*([GroupedSteps()] if kind == "grouped" else []), *([recorder] if recorder else [])]
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    flags = quiet | {"num_sanity_val_steps": 0, "log_every_n_steps": 2, "logger": log} | row.flags
    trainer = L.Trainer(accelerator="cpu", callbacks=[*watched, *more], **flags)
    if row.loader:
        trainer.fit(module, row.loader(data))
    else:
        trainer.fit(module, data)
    return module, log.rows, watched


NOTICES = pytest.mark.filterwarnings(
    "ignore:You defined a", "ignore:.*does not have many workers", "ignore:.*anomaly", "ignore:You are overfitting"
)


@NOTICES
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.slow) for row in TABLE])
def test_ordinary_code_does_what_it_does_with_an_ordinary_module(data, row):
    data.tokens_at_once = 256  # several batches in a validation
    reference = Recorder()
    plain, rows, watched = fitted(row, "plain", data, reference)
    for kind in ("language model", "grouped"):
        recorder = Recorder() if kind == "language model" else None
        module, found, seen = fitted(row, kind, data, recorder)
        ours, theirs = (dict(m.model.named_parameters()) for m in (module, plain))
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
        for counted in ("global_step", "current_epoch"):
            assert getattr(module.trainer, counted) == getattr(plain.trainer, counted)
        assert [logged[:2] for logged in found] == [logged[:2] for logged in rows]
        assert [logged[2] for logged in found] == pytest.approx([logged[2] for logged in rows], rel=1e-5)
        metrics = [float(m.trainer.callback_metrics.get("val/loss", 0)) for m in (module, plain)]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
        for ours_seen, theirs_seen in zip(seen, watched, strict=True):
            if isinstance(theirs_seen, EveryTenth):
                assert (
                    (ours_seen.at, ours_seen.calls) == (theirs_seen.at, theirs_seen.calls) == ([1, 11, 21, 31, 41], 50)
                )
        if recorder:
            assert recorder.calls == reference.calls
            assert recorder.largest == reference.largest


def trainer_of(*callbacks: L.Callback, **flags: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": False, "num_sanity_val_steps": 0, "log_every_n_steps": 2, "max_steps": 12}
    return L.Trainer(accelerator="cpu", callbacks=[*callbacks], **(quiet | flags))


def small(data: CharDataModule, **settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(GPT(data.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8), sgd, **settings)


class Sizes(L.Callback):
    """Notes the shapes of training batches."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.add(tuple(batch[0].shape))


def test_a_found_batch_size_is_the_one_that_trains(data):
    finder, sizes = of_lightning.BatchSizeFinder("power", steps_per_trial=1, init_val=4, max_trials=2), Sizes()
    trainer_of(finder, sizes, max_steps=3).fit(small(data), data)
    assert data.batch_size == finder.optimal_batch_size != 4
    assert (data.batch_size, 8) in sizes.seen


def test_a_found_learning_rate_is_the_one_that_trains(data):
    found = []
    for scheduler in (constant, lambda optimizer, budget: None):
        finder = of_lightning.LearningRateFinder(1e-4, 1e-1, num_training_steps=15, early_stop_threshold=None)
        module = small(data, scheduler=scheduler)
        trainer_of(finder, max_steps=3).fit(module, data)
        assert module.trainer.optimizers[0].param_groups[0]["lr"] == module.lr
        assert finder.optimal_lr
        assert finder.optimal_lr.suggestion() == module.lr
        found.append(module.lr)
    assert found[0] == found[1] != LR


@pytest.mark.parametrize(
    ("callback", "arguments", "setting"),
    [
        ("BatchSizeFinder", [], "data.batch_size"),
        ("LearningRateFinder", [], "optimizer.lr"),
        ("GradientAccumulationScheduler", ["+callbacks.own.scheduling={1:2}"], "trainer.accumulate_grad_batches"),
    ],
)
def test_run_json_records_what_trains_so_what_changes_it_is_refused(callback, arguments, setting):
    arguments = [f"+callbacks.own._target_=lightning.pytorch.callbacks.{callback}", *arguments]
    with pytest.raises(InputError, match=f"{callback} changes a setting that run.json records.*give it as {setting}"):
        check_command(["train.py", "data=pydoc", *arguments], ROOT / "conf")


def test_accumulation_that_changes_takes_one_step_of_a_bigram_at_a_time(data):
    """The gradient of a table is chosen once, for as many batches as a step then has."""
    found = []
    for speed in ([], [GroupedSteps()]):
        torch.manual_seed(0)
        module = LanguageModel(Bigram(data.vocab_size))
        schedule = of_lightning.GradientAccumulationScheduler({0: 1, 1: 2})
        trainer_of(schedule, *speed, max_epochs=3, max_steps=-1).fit(module, data)
        found.append((module.trainer.global_step, *module.state_dict().values()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    told = GroupedSteps().describe(module.trainer, module, 32)
    assert told == "1 step at a time: GradientAccumulationScheduler changes how many batches make a step"


def test_two_loggers_have_the_same_rows(data, tmp_path):
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "board", "")]
    trainer_of(GroupedSteps(), logger=loggers, val_check_interval=6).fit(small(data), data)
    rows = [*csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines())]
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("train/loss", "train/lr", "val/loss"):
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected] != []
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])


@pytest.mark.parametrize("speed", [[], [GroupedSteps()]], ids=["one by one", "grouped"])
def test_a_bar_shows_all_steps_and_the_loss(data, speed, capsys):
    bar = of_lightning.TQDMProgressBar()
    trainer_of(bar, *speed, max_epochs=1, max_steps=-1, enable_progress_bar=True).fit(small(data), data)
    shown = bar.train_progress_bar
    assert (shown.n, shown.total) == (10, 10)
    assert "train/loss=" in shown.postfix


def test_nothing_in_a_module_grows_with_its_steps(data):
    def sizes(module: LanguageModel) -> dict[str, int]:
        kept = {name: value for name, value in vars(module).items() if hasattr(value, "__len__")}
        return {name: len(value) for name, value in kept.items()}

    few, many = small(data), small(data)
    trainer_of(max_steps=10).fit(few, data)
    trainer_of(max_steps=80).fit(many, data)
    assert sizes(few) == sizes(many)


def test_a_sanity_check_is_no_validation(data, tmp_path):
    class Judged(L.Callback):
        judged: tuple[Any, ...] = ()

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.judged = (kept.best_model_score, early.best_score.item(), [*best.path.parent.glob("*")])

    kept = of_lightning.ModelCheckpoint(tmp_path / "kept", monitor="val/loss")
    early, best, judged = of_lightning.EarlyStopping("val/loss"), Best(str(tmp_path / "best")), Judged()
    flags: dict[str, Any] = {"num_sanity_val_steps": 2, "enable_checkpointing": True, "val_check_interval": 5}
    trainer_of(kept, early, best, judged, **flags).fit(small(data), data)
    assert judged.judged == (None, torch.inf, [])
    assert kept.best_model_score is not None
    assert [*best.path.parent.glob("*")] != []


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")
def test_a_monitor_of_throughput_counts_each_batch(data):
    rows = []
    for make in (lambda: Plain(small(data).model, sgd), lambda: small(data)):
        log = Numbers()
        monitor = of_lightning.ThroughputMonitor(
            lambda batch: len(batch[0]), lambda batch: batch[0].numel(), window_size=4
        )
        trainer_of(monitor, GroupedSteps(), logger=log).fit(make(), data)
        rows.append(
            [(step, {k: v for k, v in row.items() if k.endswith(("samples", "batches"))}) for step, row in log.whole]
        )
    assert rows[0] == rows[1]
    assert any(row for _, row in rows[0])


class Numbers(Log):
    """Keeps rows as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.whole.append((step, metrics))


class Nosy(of_lightning.LearningRateMonitor):
    """A subclass that looks at batches."""

    def on_train_batch_end(self, *_: Any) -> None: ...


def test_a_subclass_of_a_known_callback_is_not_known(data):
    module, speed = small(data), GroupedSteps()
    trainer_of(Nosy(), speed, logger=Log()).fit(module, data)
    told = speed.describe(module.trainer, module, 32)
    assert told.startswith("1 step at a time: Nosy has on_train_batch_")
    assert told.endswith(", and so needs every batch")


DDP = """
import warnings, torch
from tests.test_lightning import *
warnings.simplefilter("ignore")
data = CharDataModule(path="text.txt", block_size=8, batch_size=4, batches_per_epoch=10, seed=1)
data.tokens_at_once = 32
for make in (lambda: Plain(small(data).model, sgd), lambda: small(data)):
    module = make()
    trainer = trainer_of(max_steps=12, val_check_interval=6, strategy="ddp", devices=2)
    trainer.fit(module, data)
    if trainer.is_global_zero:
        torch.save([dict(module.model.named_parameters()), trainer.callback_metrics], type(module).__name__)
"""


@pytest.mark.slow
def test_two_processes_train_as_they_do_an_ordinary_module(tmp_path, prose):
    (tmp_path / "text.txt").write_text(prose, encoding="utf-8")
    (tmp_path / "script.py").write_text(DDP)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    theirs, ours = (torch.load(tmp_path / name, weights_only=False) for name in ("Plain", "LanguageModel"))
    assert all(torch.equal(ours[0][name], weight) for name, weight in theirs[0].items())
    assert ours[1]["train/loss"] == theirs[1]["train/loss"]


# Flags of the trainer


def test_each_flag_of_lightning_is_tested_or_refused_with_a_reason():
    """A version of Lightning that brings another flag fails here: test what it does to a run, or refuse it."""
    assert {*inspect.signature(L.Trainer).parameters} == TESTED | REFUSED.keys()
    assert not TESTED & REFUSED.keys()


GIVEN = {
    "accelerator": "cpu", "accumulate_grad_batches": 2, "benchmark": True, "check_val_every_n_epoch": 2,
    "detect_anomaly": True, "deterministic": True, "devices": 1,
    "enable_model_summary": True, "enable_progress_bar": True, "gradient_clip_algorithm": "value",
    "gradient_clip_val": 0.5, "inference_mode": False, "limit_train_batches": 6, "log_every_n_steps": 2,
    "max_epochs": 4, "max_steps": 100, "max_time": "00:01:00:00", "min_epochs": 3, "min_steps": 2, "num_nodes": 1,
    "num_sanity_val_steps": 1, "precision": "64-true", "profiler": "simple", "reload_dataloaders_every_n_epochs": 1,
    "strategy": "auto", "val_check_interval": 6
}  # fmt: skip


def test_each_tested_flag_has_its_effect_on_a_run(train, tmp_path, text_file):
    assert GIVEN.keys() == TESTED
    flags = [f"++trainer.{flag}={value}" for flag, value in GIVEN.items()]
    ended = train(*flags, "data=text", f"data.path={text_file}", "logger=csv", "hydra.run.dir=run", "threads=1")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert GIVEN.items() <= record["config"]["trainer"].items()
    assert "limit_train_batches=6 limits or repeats batches" in record["environment"]["steps"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["steps"], results["stopped_by"]) == (12, "epochs")  # 4 epochs of 6 batches, 2 in a step
    rows = [*csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines())]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 3, 5, 7, 9, 11]
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [5, 11]  # after epochs 2 and 4
    state = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert {weight.dtype for weight in state.values()} == {torch.float64}
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Profiler Report" in log
    assert "Total params" in ended.out + log


@pytest.mark.parametrize(("flag", "enabled"), [("deterministic", True), ("benchmark", True), ("inference_mode", False)])
def test_flags_of_torch_reach_torch(data, flag, enabled):
    class Modes(L.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            self.inference = torch.is_inference_mode_enabled()

    modes, before = Modes(), (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    try:
        trainer_of(modes, val_check_interval=5, max_steps=5, **{flag: enabled}).fit(small(data), data)
        found = {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "inference_mode": modes.inference,
        }
        assert found[flag] == enabled
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_a_refused_flag_says_why(flag):
    value = {"fast_dev_run": "true", "barebones": "true", "sync_batchnorm": "true", "overfit_batches": "0.5"}.get(flag)
    value = value or {"use_distributed_sampler": "true", "enable_autolog_hparams": "false"}.get(flag, "0.5")
    with pytest.raises(InputError) as refusal:
        check_command(["train.py", "data=pydoc", f"++trainer.{flag}={value}"], ROOT / "conf")
    assert REFUSED[flag][1] in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("trainer.strategy=ddp_spawn", "processes that it starts cannot hand back"),
        ("trainer.strategy=deepspeed_stage_2", "DeepSpeed is a package"),
        ("trainer.strategy=fsdp", "it is FSDP1"),
        ("trainer.strategy=nonsense", "choose auto, or trainer=ddp or fsdp"),
        ("trainer.precision=16", "say 16-mixed"),
        ("trainer.accelerator=tpu", "never tested on a TPU"),
        ("trainer.deterministic=warn", "say true or false"),
        ("trainer.benchmark=true", "add a plus, +trainer.benchmark=true"),
        ("trainer.fast_dev_run=true", "it keeps nothing of a run"),
        ("trainer.fast_dev_runs=true", "there is no setting trainer.fast_dev_runs"),
    ],
)
def test_a_value_that_a_run_cannot_have_is_refused_with_the_reason(given, reason):
    with pytest.raises(InputError, match=re.escape(reason)):
        check_command(["train.py", "data=pydoc", given], ROOT / "conf")
