"""Planted cheaters: each is caught by the check that is for it, and honest models pass."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm import checkpoint
from charlm.certify import CACHE, CAUSAL, COUNTED, ORDER, SUMS, TOTALS, certify
from charlm.checkpoint.archive import load as read_archive
from charlm.data import CharDataModule
from charlm.model.gpt import GPT
from charlm.model.ngram import NGram


@pytest.fixture
def data(text_file: Path) -> CharDataModule:
    data = CharDataModule(path=str(text_file), block_size=16)
    data.setup()
    return data


class Table(nn.Module):
    """An honest bigram."""

    block_size = 1

    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        found: Tensor = self.table(idx)
        return found


class LooksAhead(Table):
    def forward(self, idx: Tensor) -> Tensor:
        ahead = F.pad(idx[:, 1:], (0, 1))
        return super().forward(idx) + 5 * F.one_hot(ahead, self.table.num_embeddings)


class SumsTo102(Table):
    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(idx).mT, targets, reduction="none") - 0.0198  # exp(0.0198) is 1.02


class KnowsTargets(Table):
    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        later = F.pad(targets[:, 1:], (0, 1))  # which the loss of a character must not depend on
        return F.cross_entropy(self(idx).mT, targets, reduction="none") * (1 + 0.1 * (later % 2))


class LearnsOnTheWay(Table):
    def forward(self, idx: Tensor) -> Tensor:
        self.table.weight.data[idx[:, :-1].flatten(), idx[:, 1:].flatten()] += 0.5
        return super().forward(idx)


class DecodesOtherwise(Table):
    def decode(self, idx: Tensor, state: Any) -> tuple[Tensor, None]:
        return self(idx)[:, -1] + torch.arange(self.table.num_embeddings), None


def failed(model: nn.Module, data: CharDataModule) -> list[str]:
    return [check.name for check in certify(model.eval(), data) if check.failure]


def test_honest_models_pass(data):
    V = data.vocab_size
    assert failed(Table(V), data) == []
    assert failed(GPT(V, 16, 1, 2, 8), data) == []
    ngram = NGram(V, 4)
    ngram.count(data.splits["train"])
    assert failed(ngram, data) == []
    assert {check.name for check in certify(ngram, data)} == {SUMS, CAUSAL, ORDER, TOTALS, COUNTED}
    assert CACHE in {check.name for check in certify(GPT(V, 16, 1, 2, 8).eval(), data)}


@pytest.mark.parametrize(
    ("cheater", "check"),
    [(LooksAhead, CAUSAL), (SumsTo102, SUMS), (KnowsTargets, CAUSAL), (DecodesOtherwise, CACHE)],
)
def test_a_cheater_is_caught_by_the_check_that_is_for_it(data, cheater, check):
    torch.manual_seed(0)
    assert check in failed(cheater(data.vocab_size), data)


def test_a_model_that_learns_while_it_is_evaluated_is_caught(data):
    torch.manual_seed(0)
    assert ORDER in failed(LearnsOnTheWay(data.vocab_size), data)


def test_a_model_that_has_counted_val_is_caught(data):
    model = NGram(data.vocab_size, 4)
    model.count(data.encoded.ids)
    assert failed(model, data) == [COUNTED]


def test_a_tokenizer_that_loses_bytes_is_caught(data, monkeypatch):
    monkeypatch.setattr(type(data.tokenizer), "tokens", [b"x"] * (data.vocab_size - 1) + [b""])
    [check] = [check for check in certify(Table(data.vocab_size).eval(), data) if check.failure]
    assert check.name == TOTALS


def test_the_command_certifies_and_refuses(train, call, text_file, tmp_path):
    ended = train("data=text", "data.path=prose.txt", "model=ngram", "model.order=3", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    ended = call("evaluate", "run", "--certify", "--json")
    assert ended.code == 0, ended.err
    assert COUNTED in json.loads(ended.out)["certified"]
    assert f"certified: {SUMS}, {CAUSAL}" in call("evaluate", "run", "--certify").out.replace("\n", " ")
    assert COUNTED in json.loads((tmp_path / "run" / "results.json").read_text())["certified"].split("; ")
    assert f"certified: {SUMS}, {CAUSAL}" in call("report", "run").out.replace("\n", " ")
    place = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = read_archive(place)
    tokenizer = checkpoint.load("run").tokenizer
    content["state_dict"]["model.text"] = tokenizer.encode(text_file.read_text()).to(torch.uint8)
    checkpoint.write(content, place)
    ended = call("evaluate", "run", "--certify")
    assert ended.code == 1
    assert f"is not certified: {COUNTED}: it has counted 20,000 tokens that are not the 18,000" in ended.err
    assert "certified" not in json.loads((tmp_path / "run" / "results.json").read_text())


def test_any_other_text_can_be_scored(trained, call, tmp_path, prose):
    (tmp_path / "new.txt").write_text(prose[5_000:6_000])
    found = json.loads(call("evaluate", str(trained), "--text", "new.txt", "--json").out)
    assert found["text/targets"] == 999
    assert 2 < found["text/loss"] < 6
    shown = call("evaluate", str(trained), "--text", "new.txt")
    assert f"{found['text/loss']:.4f}" in shown.out
    (tmp_path / "new.txt").write_text("日本語" * 50)
    assert "is not among the" in call("evaluate", str(trained), "--text", "new.txt").err


def test_the_loss_of_each_target_is_written(trained, call, tmp_path):
    ended = call("evaluate", str(trained), "--split", "val", "--losses", "losses.npz", "--json")
    assert ended.code == 0, ended.err
    found = np.load(tmp_path / "losses.npz")
    assert found["val.nats"].mean() == pytest.approx(json.loads(ended.out)["val/loss"], abs=1e-6)
    assert found["val.position"].tolist() == [*range(1, len(found["val.nats"]) + 1)]
    assert "is no folder" in call("evaluate", str(trained), "--losses", "none/losses.npz").err
