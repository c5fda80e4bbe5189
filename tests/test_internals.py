"""Private names of other libraries are in one room, and do what charlm relies on: an upgrade fails here first."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from charlm.internals import hydra, lightning
from charlm.internals import optuna as optuna_internals
from charlm.internals import torch as torch_internals
from tests.conftest import ROOT

FILES = [*(ROOT / "charlm").rglob("*.py"), *(ROOT / "hydra_plugins").glob("*.py"), ROOT / "train.py"]
OUTSIDE = [file for file in FILES if file.parent.name != "internals"]
DOCUMENTED = {"_exit", "_replace", "_asdict", "_generate_state_key", "_target_"}  # private by their look only


def private(tree: ast.AST) -> set[str]:
    """Return the private names in a program that belong to another library."""
    own: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            used |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in used - own - DOCUMENTED if re.match("_[a-z]|_[A-Z]", name)}


@pytest.mark.parametrize("file", OUTSIDE, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_room_uses_a_private_name(file):
    assert private(ast.parse(file.read_text())) == set()


def test_a_private_name_is_found():
    program = "from a._internal import b\nimport c._d\nself._e = 1\nself._e\nf._g()\nos._exit(0)"
    assert private(ast.parse(program)) == {"_internal", "_d", "_g"}


class Probe(L.LightningModule):
    """Records what the internals return at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), list[tuple[Any, ...]]()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).sum()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        self.seen.append(
            (
                lightning.is_accumulating(trainer),
                lightning.logged_steps(trainer),
                lightning.validates_this_epoch(trainer),
                lightning.skips_backward(trainer),
                sorted(lightning.metrics_to_log(trainer)),
            )
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(6.0)[:, None]))


def trainer_of(tmp_path: Path, **settings: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"max_epochs": 1, "logger": False, "accelerator": "cpu", **quiet, **settings}
    return L.Trainer(default_root_dir=tmp_path, **settings)


@pytest.mark.filterwarnings("ignore")
def test_lightnings_loop_tells_of_steps_and_logs(tmp_path):
    module = Probe()
    trainer_of(tmp_path, accumulate_grad_batches=2, log_every_n_steps=1).fit(module, loader())
    assert [seen[0] for seen in module.seen] == [True, False] * 3
    assert [seen[1] for seen in module.seen] == [0, 0, 1, 1, 2, 2]  # counted after the hooks
    assert [seen[3] for seen in module.seen] == [False] * 6
    assert module.seen[-1][4] == ["loss"]


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_without_a_validation_is_known(tmp_path):
    module = Probe()
    trainer = trainer_of(tmp_path, check_val_every_n_epoch=2, max_epochs=2, limit_train_batches=1)
    trainer.fit(module, loader(), loader())
    assert [seen[2] for seen in module.seen] == [False, True]


@pytest.mark.filterwarnings("ignore")
def test_steps_are_counted_as_lightning_counts_its_own(tmp_path):
    module = Probe()
    trainer = trainer_of(tmp_path)
    trainer.fit(module, loader())
    assert (trainer.global_step, lightning.logged_steps(trainer)) == (6, 6)
    lightning.count_steps(trainer, 2, 4, 0)
    assert (trainer.global_step, lightning.logged_steps(trainer)) == (8, 8)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == 10


@pytest.mark.filterwarnings("ignore")
def test_batches_come_from_inside_the_fetcher(tmp_path):
    taken: list[Any] = []

    class Taker(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                taken.append((batch, next(lightning.batches_of(trainer.fit_loop._data_fetcher))))

    trainer_of(tmp_path, callbacks=[Taker()], max_steps=1).fit(Probe(), loader())
    [(first, later)] = taken
    assert float(later[0]) > float(first[0])


def test_a_checkpoint_interval_is_read():
    assert lightning.checkpoint_interval(ModelCheckpoint(every_n_train_steps=7)) == 7
    assert lightning.checkpoint_interval(ModelCheckpoint(every_n_epochs=1)) == 0


def test_a_logger_that_has_written_is_known(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    assert not lightning.has_written(logger)
    logger.log_metrics({"loss": 1.0}, 0)
    assert lightning.has_written(logger)


def test_functions_that_restore_are_there():
    import importlib

    for module, function in lightning.RESTORING.items():
        source = Path(str(importlib.import_module(module).__file__)).read_text()
        assert re.search(rf"def \w*{function}", source)


def test_hydras_parser_reports_a_mistake_to_its_caller():
    def refuse(message: str) -> Any:
        raise ValueError(message)

    parser = hydra.argument_parser(refuse)
    assert parser.parse_args(["-m", "seed=1"]).overrides == ["seed=1"]
    with pytest.raises(ValueError, match="expected one argument"):
        parser.parse_args(["--config-dir"])


def test_hydras_name_of_overrides_and_its_callbacks():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["seed=3", "optimizer.lr=0.1"], return_hydra_config=True)
        overrides = OverridesParser.create().parse_overrides(["seed=3", "optimizer.lr=0.1"])
        naming = cfg.hydra.job.config.override_dirname
        assert hydra.override_dirname(overrides, naming) == "optimizer.lr=0.1,seed=3"
        hydra.job_callbacks(cfg).on_run_start(config=cfg, config_name="train")


def test_kernels_of_pytorch_equal_its_public_operations():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, requires_grad=True)
    gradient = torch.randn(5, 7, generator=generator)
    log_p = logits.log_softmax(-1)
    log_p.backward(gradient)
    assert torch.equal(torch_internals.log_softmax_backward(gradient, log_p.detach(), torch.float32), logits.grad)  # type: ignore[arg-type]
    one, other = [torch.zeros(3)], [torch.ones(3)]
    torch_internals.lerp_all(one, other, 0.25)
    torch_internals.add_to_all(one, 1)
    assert one[0].tolist() == [1.25] * 3


def test_the_fused_kernel_is_that_of_the_optimizer():
    theirs, ours = nn.Parameter(torch.ones(3)), torch.ones(3)
    optimizer = torch.optim.AdamW([theirs], lr=0.1, fused=True)
    theirs.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    averages, squares, step = [torch.zeros(3)], [torch.zeros(3)], [torch.ones(())]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    flags = {"amsgrad": False, "maximize": False}
    torch_internals.fused_adamw([ours], [theirs.grad], averages, squares, [], step, **settings, **flags)
    assert torch.equal(ours, theirs.detach())


def test_hooks_of_a_tensor_are_seen():
    for observe in (lambda t: t.register_hook(print), lambda t: t.register_post_accumulate_grad_hook(print)):
        tensor = torch.zeros(1, requires_grad=True)
        assert not torch_internals.is_observed(tensor)
        observe(tensor)
        assert torch_internals.is_observed(tensor)


def test_a_compiler_is_looked_for(monkeypatch):
    assert isinstance(torch_internals.has_cpp_compiler(), bool)


def test_a_running_trial_of_optuna_is_continued():
    study = optuna.create_study()
    begun = study.ask({"lr": optuna.distributions.FloatDistribution(0, 1)})
    [recorded] = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    again = optuna_internals.reopen(study, recorded)
    assert again.params == begun.params
    again.report(1.0, step=3)
    study.tell(again, 1.0)
    assert study.trials[0].intermediate_values == {3: 1.0}


def test_lightning_is_imported_without_scipy_signal_and_scipy_signal_works_afterwards():
    code = """
import sys
{}
print("scipy.signal" in sys.modules)
import scipy
print(scipy.signal.windows.hann(3)[1])
import lightning
"""
    for importing, there in (("import lightning", "True"), (LEAN, "False")):  # the first: why this is worth a file
        ended = subprocess.run(
            [sys.executable, "-c", code.format(importing)], capture_output=True, text=True, check=True
        )
        assert ended.stdout.split() == [there, "1.0"]


LEAN = "from charlm.internals.torchmetrics import import_lightning\nimport_lightning()"
