"""charlm from Python, without Hydra: what the README shows, and what Lightning's documentation promises."""

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import nbclient
import nbformat
import pytest
import torch
from filelock import FileLock
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore:.*platformdirs:DeprecationWarning")
@pytest.mark.parametrize("kind", ["english", pytest.param("chinese", marks=SLOW), pytest.param("code", marks=SLOW)])
def test_the_example_of_the_readme_works_in_a_notebook(tmp_path, tmp_path_factory, monkeypatch, kind):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "my.txt").write_text(TEXTS[kind], encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = (block for block in blocks if "fit(" in block)
    # A bar writes at each step, and ZeroMQ drops what a slow reader leaves beyond a thousand messages.
    code = code.replace("max_steps=3000", "max_steps=100, accelerator='cpu'").replace("ROMEO:", TEXTS[kind][:3])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    place = {"metadata": {"path": str(tmp_path)}}
    with FileLock(tmp_path_factory.getbasetemp().parent / "kernel.lock"):  # the ports of two kernels at once may clash
        nbclient.NotebookClient(notebook, timeout=120, iopub_timeout=60, resources=place).execute()
    outputs = notebook.cells[0].outputs
    printed = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    assert TEXTS[kind][:3] in printed
    assert "Score(loss=" in printed
    assert "train/loss" in str(notebook.metadata.widgets)  # on Lightning's own bar


def test_what_is_public_is_there():
    assert all(getattr(charlm, name).__name__ == name for name in charlm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        charlm.Transformer  # noqa: B018


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


MODELS = [
    lambda v: charlm.Bigram(v),
    lambda v: charlm.GPT(v, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1),
    lambda v: charlm.TransformerPP(v, block_size=8, n_layer=1, n_head=2, n_embd=8, mlp="swiglu"),
    lambda v: charlm.MLP(v, block_size=8, n_embd=4, n_hidden=8),
    lambda v: charlm.LSTM(v, n_layer=1, n_embd=8),
    lambda v: charlm.GRU(v, n_layer=1, n_embd=8),
]


def saved(folder: Path, module: LanguageModel, data: Any, **flags: Any) -> Path:
    """A file of Lightning's own `save_checkpoint`, after a few steps."""
    trainer = trainer_of(max_steps=3, limit_val_batches=0, **flags)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


@pytest.mark.parametrize("make", MODELS)
def test_what_a_trainer_saved_is_loaded_from_name_and_arguments(tmp_path, data, make):
    module = LanguageModel(make(data.vocab_size), seed=7)
    file = saved(tmp_path, module, data)
    for again in (charlm.load(file), LanguageModel.load_from_checkpoint(file)):
        assert type(again.model) is type(module.model)
        assert again.model.arguments == module.model.arguments
        assert (again.seed, again.hparams["seed"]) == (7, 7)
        assert again.generate("the", 20, seed=3) == module.generate("the", 20, seed=3)
        assert again.evaluate(data) == module.evaluate(data)
    assert not charlm.load(file).training


def test_each_model_has_a_row_above():
    assert {type(make(5)).__name__ for make in MODELS} | {"Mixture"} == {*charlm.__all__} - {
        "CharDataModule",
        "LanguageModel",
        "load",
    }


def test_the_commands_read_what_a_trainer_saved(tmp_path, data, call):
    module = LanguageModel(charlm.GPT(data.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8))
    file = saved(tmp_path, module, data)
    assert json.loads(call("checkpoint", str(file), "--json").out)["model"]["n_embd"] == 8
    shown = call("checkpoint", str(file))
    assert (shown.code, "none, as Lightning wrote it" in shown.out) == (0, True)
    told = json.loads(call("evaluate", str(file), "--split", "val", "--json").out)
    assert told["val/loss"] == pytest.approx(module.evaluate(data).loss, rel=1e-6)
    [text] = json.loads(call("generate", str(file), "--prompt", "the", "--length", "9", "--json").out)["samples"]
    assert text == module.generate("the", 9, seed=1337)


def test_a_run_is_loaded_by_its_folder(trained, text_file):
    module, data = charlm.load(trained), CharDataModule(path=str(text_file))
    figures = json.loads((trained / "results.json").read_text())
    assert module.evaluate(data).loss == pytest.approx(figures["val/loss"], rel=1e-6)
    assert len(module.generate("the", 5)) == 8
    newest = trained / "checkpoints" / "last.ckpt"
    assert torch.equal(*(next(m.parameters()) for m in (module, LanguageModel.load_from_checkpoint(newest))))


class Uniform(torch.nn.Module):
    """A model of a user's own."""

    block_size = 8

    def __init__(self, vocab_size: int):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(vocab_size))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*idx.shape, -1)


def weight_of(module: LanguageModel) -> torch.Tensor:
    return next(module.model.parameters())


def test_another_model_is_passed(tmp_path, data, call):
    module = LanguageModel(Uniform(data.vocab_size))
    file = saved(tmp_path, module, data)
    with pytest.raises(InputError, match=r"saved.ckpt is not used: .*Uniform as its model, .*_checkpoint.*model="):
        LanguageModel.load_from_checkpoint(file)
    again = LanguageModel.load_from_checkpoint(file, model=Uniform(data.vocab_size))
    assert torch.equal(weight_of(again), weight_of(module))
    assert len(again.generate("the", 3)) == 6
    with pytest.raises(InputError, match=r"saved.ckpt has the weights of another model: .*"):
        LanguageModel.load_from_checkpoint(file, model=Bigram(data.vocab_size))
    ended = call("generate", str(file))
    assert (ended.code, ended.err.count("\n")) == (2, 1)


@pytest.mark.filterwarnings("ignore:You defined a", "ignore:.*does not have many workers")
def test_without_a_text_a_checkpoint_has_weights_only(tmp_path, call):
    idx = torch.zeros(6, 8, dtype=torch.long)
    module = LanguageModel(Bigram(5))
    file = saved(tmp_path, module, DataLoader(TensorDataset(idx, idx), batch_size=3))
    for either in (module, charlm.load(file)):
        assert len(either.generate("a", 3, tokenizer=CharTokenizer.from_text("abcde"))) == 4
        with pytest.raises(InputError, match="give one, generate"):
            either.generate("a", 3)
    assert call("checkpoint", str(file)).code == 0
    for command in ("generate", "evaluate"):
        ended = call(command, str(file))
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "has no tokenizer and no text" in ended.err


def test_a_fit_goes_on_from_what_a_trainer_saved(tmp_path, data):
    file = saved(tmp_path, LanguageModel(Bigram(data.vocab_size)), data)
    ends = []
    for path in (file, None):
        torch.manual_seed(0)
        torch.nn.init.normal_((bigram := Bigram(data.vocab_size)).token_embedding_table.weight)
        if path is None:
            bigram.load_state_dict(torch.load(file, weights_only=True)["state_dict"], strict=False)
        trainer = trainer_of(max_steps=6, limit_val_batches=0)
        trainer.fit(LanguageModel(bigram), data, ckpt_path=path, weights_only=True)
        ends.append(trainer.global_step)
    assert ends == [6, 6]


def claim_more_than_the_file_has(content: dict[str, Any]) -> None:
    """A large model, all of whose weights are one number: strides of 0 repeat it."""
    node = content["charlm"]["config"]["model"]
    node.update(n_embd=20_000, n_layer=2)
    with torch.device("meta"):
        model = charlm.GPT(**{name: value for name, value in node.items() if name != "_target_"})
    shapes = {f"model.{name}": weight.shape for name, weight in model.state_dict().items()}
    content["state_dict"] = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def damaged_files(file: Path) -> Any:
    """Files of Lightning's that are cut off, or that claim something else."""
    raw = file.read_bytes()
    yield from (raw[: len(raw) // 2], raw[:10], b"PK", b"")
    for change in (
        lambda c: c["charlm"]["config"]["model"].update(_target_="os.system"),
        lambda c: c["charlm"]["config"]["model"].update(_target_=3),
        lambda c: c["charlm"]["config"]["model"].update(vocab_size=10**12),
        lambda c: c["charlm"]["config"]["model"].update(vocab_size="9"),
        lambda c: c["charlm"]["config"]["model"].update(n_layer=10**9),
        lambda c: c["charlm"]["config"]["model"].update(n_embd=[8]),
        lambda c: c["charlm"].update(format=1),
        lambda c: c["charlm"].update(tokenizer={"name": "other"}),
        lambda c: c["charlm"].update(tokenizer=[]),
        lambda c: c["charlm"].pop("corpus"),
        lambda c: c.pop("charlm"),
        lambda c: c.update(charlm=[]),
        lambda c: c.update(state_dict={}),
        lambda c: c.update(state_dict={"model.x": torch.eye(2).to_sparse()}),
        lambda c: c.update(state_dict={3: torch.eye(2)}),
        lambda c: c.update(global_step="3"),
        claim_more_than_the_file_has,
        lambda c: c.update(hyper_parameters=[], charlm=None),
    ):
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file.with_name("changed"))
        yield file.with_name("changed").read_bytes()
    with zipfile.ZipFile(file.with_name("zipped"), "w") as archive:
        archive.writestr("a", "b")
    yield file.with_name("zipped").read_bytes()


def test_a_damaged_file_of_a_trainer_is_refused_in_one_line(tmp_path, data, call):
    module = LanguageModel(charlm.GPT(data.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8))
    file, seen = saved(tmp_path, module, data), 0
    for raw in damaged_files(file):
        (tmp_path / "x.ckpt").write_bytes(raw)
        with pytest.raises(InputError) as refusal:
            charlm.load(tmp_path / "x.ckpt")
        assert "\n" not in str(refusal.value)
        ended = call("generate", str(tmp_path / "x.ckpt"))
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
        seen += 1
    assert seen == 23
