"""Runs that begin from other weights: those of a run, or of GPT-2 in the format of Hugging Face, and the way back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from charlm import checkpoint
from charlm.checkpoint import huggingface, initial
from charlm.errors import InputError
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.run.record import read_record
from charlm.tokenizer import ByteTokenizer, CharTokenizer

GPT_SETTINGS: dict[str, Any] = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 12}
OTHER_TEXT = "the law of the land is that of the language\n" * 40


def loaded(**settings: Any) -> checkpoint.Checkpoint:
    """A small GPT with random weights, all of them different from zero."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer.from_text("abcdefg\n")
    model = GPT(tokenizer.vocab_size, **(GPT_SETTINGS | settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    corpus = {"name": "a", "source": "here", "sha256": "0"}
    return checkpoint.Checkpoint(Path("x.ckpt"), 7, model, tokenizer, {}, corpus)


SMALL = ["model=gpt", "model.n_layer=1", "model.n_head=2", "model.n_embd=8", "data.block_size=16"]


@pytest.fixture
def gpt_run(train, text_file) -> Path:
    ended = train("data=text", "data.path=prose.txt", *SMALL, "trainer.max_steps=3", "hydra.run.dir=first")
    assert ended.code == 0, ended.err
    return text_file.parent / "first"


def test_a_run_begins_from_the_weights_of_another_on_other_text(train, gpt_run, tmp_path):
    (tmp_path / "other.txt").write_text(OTHER_TEXT)
    other = ["data=text", "data.path=other.txt", "init_from=first", *SMALL, "trainer.max_steps=3"]
    ended = train(
        *other, "hydra.run.dir=second", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "data.val_fraction=0.3"
    )
    assert ended.code == 0, ended.err
    first, second = checkpoint.load(gpt_run), checkpoint.load(tmp_path / "second")
    assert second.tokenizer.state_dict() == first.tokenizer.state_dict()  # though the text has fewer characters
    assert first.tokenizer.vocab_size > len(set(OTHER_TEXT))
    for name, weight in first.model.state_dict().items():
        assert torch.allclose(weight, second.model.state_dict()[name], rtol=0, atol=1e-7), name
    known = read_record(tmp_path / "second")
    assert known["environment"]["initial_weights"] == initial(str(gpt_run)).sha256
    assert known["config"]["init_from"] == str(gpt_run)


def test_a_run_that_began_from_another_goes_on_without_it(train, gpt_run, tmp_path):
    text = ["data=text", "data.path=prose.txt", "init_from=first", *SMALL]
    for folder, steps in (("half", 4), ("whole", 8)):
        ended = train(*text, f"trainer.max_steps={steps}", f"hydra.run.dir={folder}")
        assert ended.code == 0, ended.err
    gpt_run.rename(tmp_path / "gone")
    ended = train("resume=half", "trainer.max_steps=8")
    assert ended.code == 0, ended.err
    assert "was" not in ended.err
    half, whole = (checkpoint.load(tmp_path / name).model.state_dict() for name in ("half", "whole"))
    assert all(torch.equal(half[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["model=bigram"], "init_from=first holds another model: say model=gpt"),
        (["model.n_head=4"], "init_from=first holds a model with other settings: say model.n_head=2"),
        (["model.n_layer=2", "model.bias=true"], "say model.n_layer=1 model.bias=false"),
        (["data.block_size=8"], "init_from=first sees 16 tokens: say data.block_size=16"),
        (["tokenizer=byte"], "init_from=first has other tokens: say tokenizer=char"),
        (["init_from=none"], "init_from=none cannot be used: none does not exist"),
        (["data.path=chinese.txt"], "'中' (U+4E2D) at position 0 is not among"),
    ],
)
def test_what_does_not_suit_the_weights_is_told_before_anything_is_written(check, gpt_run, tmp_path, given, words):
    (tmp_path / "chinese.txt").write_text("中文" * 500)
    model = [] if "model=bigram" in given else SMALL
    ended = check("data=text", "data.path=prose.txt", "init_from=first", *model, *given, "hydra.run.dir=second")
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"bias": True, "activation": "gelu_tanh", "dropout": 0.2}])
def test_a_folder_for_huggingface_comes_back_as_it_was(tmp_path, settings):
    before = loaded(**settings)
    huggingface.write(before, tmp_path)
    found = initial(str(tmp_path))
    assert found.tokenizer is not None
    assert found.tokenizer.state_dict() == before.tokenizer.state_dict()
    node = {k: v for k, v in found.model.items() if k != "_target_"}
    again = GPT(8, **node).eval()
    found.load(again, found.tokenizer)
    idx = torch.randint(8, (3, 16))
    assert torch.equal(again(idx), before.model(idx))
    kept = {k: v for k, v in settings.items() if k != "dropout"}  # which does not belong to the weights
    assert node == {"bias": False, "activation": "gelu", **GPT_SETTINGS, **kept}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"bias": True, "activation": "gelu_tanh"}])
def test_transformers_computes_the_same_logits(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    before = loaded(**settings)
    huggingface.write(before, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = torch.randint(8, (3, 16))
    torch.testing.assert_close(theirs(idx).logits, before.model(idx), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_gpt2_of_transformers_is_read_with_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=257, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    found = initial(str(tmp_path))
    assert found.tokenizer is None
    model = GPT(256, **{k: v for k, v in found.model.items() if k != "_target_"}).eval()
    found.load(model, ByteTokenizer())  # without GPT-2's last token, which ends a text
    idx = torch.randint(256, (3, 16))
    torch.testing.assert_close(theirs(idx).logits[..., :256], model(idx), rtol=1e-5, atol=1e-5)


def damage(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "has model_type=llama, and model=gpt computes only gpt2"),
        ({"n_inner": 3}, "has n_inner=3"),
        ({"activation_function": "relu"}, "activation_function that model=gpt lacks"),
        ({"n_layer": 10**9}, "holds no GPT-2 that charlm can read"),
        ({"n_layer": 3}, "holds no GPT-2 that charlm can read"),
        ({"n_layer": "two"}, "holds no GPT-2 that charlm can read"),
    ],
)
def test_a_folder_that_model_gpt_cannot_compute_is_refused(tmp_path, change, words):
    huggingface.write(loaded(), tmp_path)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=words):
        initial(str(tmp_path))


def test_files_that_are_missing_or_damaged_are_told(tmp_path):
    huggingface.write(loaded(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "ln_f" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"KeyError: 'ln_f\.weight'"):
        initial(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="holds no GPT-2 that charlm can read"):
        initial(str(tmp_path / "."))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        initial(f"{tmp_path}/")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        initial(f"{tmp_path}//")


def test_other_tokens_than_those_of_the_folder_are_told(tmp_path):
    huggingface.write(loaded(), tmp_path)
    (tmp_path / "charlm.json").unlink()
    found = initial(str(tmp_path))
    model = GPT(256, **GPT_SETTINGS)
    with pytest.raises(InputError, match="has 8 tokens, and tokenizer=byte 256: for GPT-2, say tokenizer=tiktoken"):
        found.load(model, ByteTokenizer())


def test_the_command_exports_a_gpt_and_nothing_else(call, gpt_run, trained, tmp_path):
    ended = call("checkpoint", str(gpt_run), "--export", "folder", "--format", "huggingface", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["exported"] == "folder"
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "charlm.json",
    }
    again = call("checkpoint", str(gpt_run), "--export", "folder", "--format", "huggingface")
    assert again.code == 2
    assert "--export folder is there already" in again.err
    other = call("checkpoint", str(trained), "--export", "other", "--format", "huggingface")
    assert other.code == 2
    assert "--format huggingface is for model=gpt, which is GPT-2" in other.err
    assert other.err.strip().endswith(f"holds a {Bigram.__name__}")
    assert not (tmp_path / "other").exists()
