"""Several corpora as one: their splits, their weights, and a state that nobody has to save."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.data import CharDataModule, corpus
from charlm.data.chunks import BLOCK, RandomChunks, apportion
from charlm.data.corpora import load_corpus
from charlm.errors import InputError
from charlm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

TEXTS = {"a.txt": "ab" * 500, "b.txt": "cédé" * 300, "c.txt": "xyz" * 200}


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    load_corpus.cache_clear()
    return tmp_path


def blend(**settings: Any) -> CharDataModule:
    data = CharDataModule(paths=[*TEXTS], **({"block_size": 4} | settings))
    data.setup()
    return data


FEW_PAIRS = partial(BPETokenizer.from_corpus, vocab_size=258)


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_corpus, ByteTokenizer.from_corpus, FEW_PAIRS])
@pytest.mark.parametrize("large", [True, False])
def test_each_text_is_cut_into_splits_of_its_own(texts, tokenizer, large, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "SMALL", 100 if large else 10**9)
    data = blend(test_fraction=0.2, block_size=2, tokenizer=tokenizer)
    assert (data.encoded.folder is not None) == large
    expected = {"train": (0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1)}
    for split, (start, end) in expected.items():
        whole = "".join(text[round(start * len(text)) : round(end * len(text))] for text in TEXTS.values())
        assert data.tokenizer.decode(data.splits[split]) == whole
    assert data.corpus.card()["characters"] == sum(map(len, TEXTS.values()))
    assert len(data.encoded.documents) == 9


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_chunks_come_from_each_text_as_often_as_its_weight_says(texts, order):
    data = blend(order=order, weights=[5.0, 2.0, 1.0], batch_size=64)
    decoded = [data.tokenizer.decode(x) for k in range(BLOCK // 16) for x in data.train_dataloader().batch(k)[0]]
    assert all(any(set(chunk) <= set(text) for text in TEXTS.values()) for chunk in decoded)  # none crosses
    shares = [sum(chunk[0] in text for chunk in decoded) / len(decoded) for text in TEXTS.values()]
    assert shares == pytest.approx([5 / 8, 2 / 8, 1 / 8], abs=0.02 if order == "random" else 1 / BLOCK)


def test_without_weights_every_place_is_equally_likely(texts):
    chunks = blend(batch_size=64).train_dataloader()
    places = [part.n for part in chunks.parts]
    assert chunks.shares.tolist() == pytest.approx([n / sum(places) for n in places])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_in_each_epoch_of_a_text_each_of_its_chunks_comes_once(world_size):
    ids, ends = torch.arange(700, dtype=torch.int32), [500, 700]
    ranks = [
        RandomChunks(ids, 5, 8, 3, rank, order="epoch", world_size=world_size, parts=ends, weights=[1.0, 3.0])
        for rank in range(world_size)
    ]
    starts = np.concatenate([chunks.starts(k).numpy() for k in range(1600 // world_size) for chunks in ranks])
    for first, last, n in ((0, 500, 99), (500, 700, 39)):
        here = starts[(starts >= first) & (starts < last)]
        # The order within a block of chunks is random, so an epoch may begin before the one before has quite ended.
        times = np.bincount((here - first) // 5, minlength=n)
        assert len(times) == n
        assert times.max() - times.min() <= 1 + BLOCK // n
    one = RandomChunks(ids, 5, 8 * world_size, 3, order="epoch", parts=ends, weights=[1.0, 3.0])
    all_together = np.concatenate([one.starts(k).numpy() for k in range(1600 // world_size)])
    assert np.array_equal(starts, all_together)


def test_a_batch_depends_on_nothing_that_came_before(texts):
    for order in ("random", "epoch"):
        chunks = [blend(order=order, weights=[1.0, 1.0, 7.0], seed=5).train_dataloader() for _ in range(2)]
        for k in (0, 1, 300, 7):
            assert all(map(torch.equal, chunks[0].batch(k), chunks[1].batch(k)))


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_seats_are_given_out_by_shares(weights):
    shares = np.array(weights) / sum(weights)
    seats = apportion(shares, BLOCK)
    assert seats.sum() == BLOCK
    assert seats.min() >= 1
    assert np.abs(seats - shares * BLOCK).max() <= 1 + len(weights)


def test_what_cannot_be_blended_is_told(texts):
    (texts / "short.txt").write_text("abc")
    with pytest.raises(InputError, match="shortest split has 2 characters"):
        CharDataModule(paths=["a.txt", "short.txt"], block_size=4).setup()
    with pytest.raises(InputError, match="needs several texts"):
        CharDataModule(paths=["a.txt"], block_size=4).setup()
    with pytest.raises(InputError, match=r"weights=\[1.0\] are 1, and the texts are 3: give one weight for each"):
        blend(weights=[1.0]).train_dataloader()


def test_the_command_trains_on_a_blend_resumes_and_evaluates(train, texts):
    (texts / "elsewhere").mkdir()
    command = ["data=blend", "data.paths=[a.txt,b.txt,pydoc]", "data.weights=[3,1,1]", "trainer.max_steps=6"]
    ended = train(*command, "hydra.run.dir=whole", "data.order=epoch")
    assert ended.code == 0, ended.err
    ended = train(*command, "hydra.run.dir=half", "data.order=epoch", "stop_at=3")
    assert ended.code == 0, ended.err
    ended = train("resume=half")
    assert ended.code == 0, ended.err
    results = [json.loads((texts / name / "results.json").read_text()) for name in ("whole", "half")]
    assert results[0]["corpus"] == "a.txt+b.txt+pydoc"
    assert results[0]["val/loss"] == results[1]["val/loss"]
    record = json.loads((texts / "whole" / "run.json").read_text())
    assert record["config"]["data"]["paths"] == [str(texts / "a.txt"), str(texts / "b.txt"), "pydoc"]


def test_weights_are_checked_before_anything_is_written(check, texts):
    command = ["data=blend", "data.paths=[a.txt,b.txt]", "data.weights=[3]", "data.block_size=4"]
    ended = check(*command, "hydra.run.dir=run")
    assert ended.code == 2
    assert "weights=[3] are 1, and the texts are 2: give one weight for each" in ended.err
    assert not (texts / "run").exists()
