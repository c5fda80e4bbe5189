"""charlm from Python, without Hydra: what the README shows, and what Lightning's documentation promises."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import charlm
from charlm import Bigram, CharDataModule, LanguageModel
from charlm.errors import InputError
from charlm.speed import GroupedSteps
from charlm.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent
TEXTS = {
    "english": "the quick brown fox jumps over the lazy dog\n" * 60,
    "chinese": "天地玄黃宇宙洪荒" * 300,
    "code": "x = [1]\n" * 300,
}
SLOW = pytest.mark.slow


def trainer_of(**settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(accelerator="cpu", **(quiet | {"enable_checkpointing": False} | settings))


@pytest.fixture
def data(text_file):
    return CharDataModule(path=str(text_file))


@pytest.mark.parametrize("kind", ["english", pytest.param("chinese", marks=SLOW), pytest.param("code", marks=SLOW)])
def test_the_example_of_the_readme_works_as_it_stands(tmp_path, kind):
    (tmp_path / "my.txt").write_text(TEXTS[kind], encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = (block for block in blocks if "fit(" in block)
    code = code.replace("max_steps=3000", "max_steps=600, accelerator='cpu'").replace("ROMEO:", TEXTS[kind][:3])
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert TEXTS[kind][:3] in ended.stdout
    assert "Score(loss=" in ended.stdout
    assert "train/loss" in ended.stdout  # on Lightning's own bar


def test_what_is_public_is_there():
    assert all(getattr(charlm, name).__name__ == name for name in charlm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        charlm.Transformer  # noqa: B018


def test_epochs_end_and_validate_as_lightning_says(data):
    module, epochs = LanguageModel(Bigram(data.vocab_size)), Epochs()
    data.batches_per_epoch = 20
    trainer = trainer_of(max_epochs=3, callbacks=[epochs])
    trainer.fit(module, data)
    assert (trainer.global_step, trainer.current_epoch) == (60, 3)
    assert epochs.validated == [20, 40, 60]


class Epochs(L.Callback):
    """Notes when the validations of training are."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


def test_validate_and_test_return_the_exact_loss(text_file):
    data = CharDataModule(path=str(text_file), test_fraction=0.1)
    module, trainer = LanguageModel(Bigram(data.vocab_size)), trainer_of()
    for split, [found] in (("val", trainer.validate(module, data)), ("test", trainer.test(module, data))):
        exact = module.evaluate(data, split)
        assert found[f"{split}/loss"] == pytest.approx(exact.loss, rel=1e-6)
        assert found[f"{split}/bits_per_char"] == pytest.approx(exact.bits_per_char, rel=1e-6)


@pytest.mark.parametrize("flags", [{"limit_val_batches": 0.5}, {"limit_val_batches": 1}])
def test_a_part_of_a_validation_is_the_mean_of_what_was_scored(data, flags):
    data.tokens_at_once = 64
    module = LanguageModel(Bigram(data.vocab_size))
    trainer = trainer_of(**flags)
    [found] = trainer.validate(module, data)
    batches = [batch for _, batch in zip(range(int(trainer.num_val_batches[0])), data.windows("val"), strict=False)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = torch.nn.functional.cross_entropy(module(x).flatten(0, 1), y.flatten()).item()
    assert found["val_partial/loss"] == pytest.approx(expected, rel=1e-5)
    assert "val/loss" not in found  # of a logger; callbacks that monitor it have it
    assert trainer.callback_metrics["val/loss"] == found["val_partial/loss"]


def test_predictions_are_logits(data):
    module = LanguageModel(Bigram(data.vocab_size))
    idx = torch.zeros(6, 8, dtype=torch.long)
    batches: Any = trainer_of().predict(module, DataLoader(TensorDataset(idx), batch_size=3))
    assert [tuple(logits.shape) for logits in batches] == [(3, 8, data.vocab_size)] * 2


@pytest.mark.filterwarnings("ignore:You defined a", "ignore:.*does not have many workers")
def test_a_loader_of_ones_own_trains_a_batch_a_step(data):
    x, y = torch.randint(5, (2, 40, 8), generator=torch.Generator().manual_seed(0))
    bigram = Bigram(5)
    module = LanguageModel(bigram, lambda model: torch.optim.SGD(model.parameters(), lr=0.5))
    before = bigram.token_embedding_table.weight.detach().clone()
    trainer = trainer_of(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=10))
    assert trainer.global_step == 8
    table = before.requires_grad_()
    for i in [*range(0, 40, 10)] * 2:
        loss = torch.nn.functional.cross_entropy(table[x[i : i + 10]].flatten(0, 1), y[i : i + 10].flatten())
        (gradient,) = torch.autograd.grad(loss, table)
        table = (table - 0.5 * gradient).detach().requires_grad_()
    torch.testing.assert_close(bigram.token_embedding_table.weight, table)
    with pytest.raises(InputError, match="give one, generate"):
        module.generate("a", 3)
    assert len(module.generate("a", 3, tokenizer=CharTokenizer.from_text("abcde"))) == 4


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.SGD,
        lambda model: lambda of: torch.optim.SGD(of.parameters(), lr=1e-3),
        lambda model: torch.optim.SGD(model.parameters(), lr=1e-3),
    ],
    ids=["a class", "a function of the model", "an optimizer"],
)
def test_an_optimizer_may_be_given_as_lightning_users_do(data, optimizer):
    model = Bigram(data.vocab_size)
    module = LanguageModel(model, optimizer(model))
    trainer_of(max_steps=2, limit_val_batches=0).fit(module, data)
    assert type(module.trainer.optimizers[0]) is torch.optim.SGD


def test_a_schedule_that_follows_the_loss_is_stepped_by_lightning(data):
    def plateau(optimizer: Any, budget: Any) -> dict[str, Any]:
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10)
        return {"scheduler": schedule, "monitor": "val/loss", "interval": "epoch"}

    data.batches_per_epoch = 5
    module = LanguageModel(Bigram(data.vocab_size), scheduler=plateau)
    trainer_of(max_epochs=3).fit(module, data)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)  # a tenth after each epoch


def test_frozen_parameters_stay_as_they_are(data):
    model = charlm.GPT(data.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8)
    model.position_embedding.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    trainer_of(max_steps=3, limit_val_batches=0).fit(LanguageModel(model), data)
    moved = {name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    assert "position_embedding.weight" not in moved
    assert len(moved) == len(before) - 1


def test_weights_are_averaged_by_lightning(data):
    """An epoch that never ended left Lightning's StochasticWeightAveraging with the first weights."""
    data.batches_per_epoch = 5
    bigram = Bigram(data.vocab_size)
    module, first = LanguageModel(bigram), bigram.token_embedding_table.weight.detach().clone()
    average = L.pytorch.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    trainer_of(max_epochs=4, limit_val_batches=0, callbacks=[average]).fit(module, data)
    assert not torch.equal(bigram.token_embedding_table.weight, first)


@pytest.mark.parametrize("callbacks", [[], [GroupedSteps()]], ids=["one by one", "in groups"])
def test_a_loss_that_is_not_finite_ends_training_in_one_line(data, callbacks):
    model = Bigram(data.vocab_size)
    module = LanguageModel(model)
    torch.nn.init.constant_(model.token_embedding_table.weight, math.nan)
    with pytest.raises(InputError, match=r"^training diverged: the loss of step 10 is infinite or not a number; try"):
        trainer_of(max_steps=30, log_every_n_steps=10, limit_val_batches=0, callbacks=callbacks).fit(module, data)


def test_the_losses_of_a_validation_are_finite_numbers(data):
    score = LanguageModel(Bigram(data.vocab_size)).evaluate(data)
    assert math.isfinite(score.loss)
    assert math.isfinite(score.loss_se)
