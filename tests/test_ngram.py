"""charlm.model.ngram: against an implementation that counts one by one, known figures, and the commands."""

import json
import math
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import checkpoint
from charlm.counts import discounts
from charlm.data import CharDataModule
from charlm.evaluate import evaluate
from charlm.model.ngram import NGram, Smoothing

V = 4
TEXTS = st.lists(st.integers(0, V - 1), min_size=2, max_size=50)
SMOOTHINGS: list[Smoothing] = ["kneser_ney", "witten_bell", "backoff"]


def reference(text: list[int], context: list[int], order: int, smoothing: str) -> list[float]:
    """P(symbol | context) as Chen and Goodman write it, with dictionaries."""
    p = [1 / V] * V
    for n in range(min(order - 1, len(context), len(text) - 1) + 1):
        occurs: Counter[tuple[int, ...]] = Counter()
        before: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for t in range(max(n, 1), len(text)):
            gram = tuple(text[t - n : t + 1])
            occurs[gram] += 1
            if t - n - 1 >= 0:
                before[gram].add(text[t - n - 1])
        longest = n == min(order - 1, len(text) - 1)
        counts = dict(occurs)
        if smoothing == "kneser_ney" and not longest:
            counts = {gram: max(1, len(before[gram])) for gram in occurs}
        here = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == tuple(context[len(context) - n :])}
        if not here:
            continue
        total = sum(here.values())
        if smoothing == "witten_bell":
            kinds = len(here)
            p = [(here.get(s, 0) + kinds * p[s]) / (total + kinds) for s in range(V)]
        else:
            d = discounts(torch.tensor([*counts.values()])).tolist()
            left = sum(d[min(c, 3)] for c in here.values())
            p = [(here.get(s, 0) - d[min(here.get(s, 0), 3)] + left * p[s]) / total for s in range(V)]
    return p


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(text=TEXTS, order=st.integers(1, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_probabilities_are_those_of_counting_one_by_one(smoothing, text, order, data):
    context = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
    model = NGram(V, order, smoothing)
    model.count(torch.tensor(text))
    idx = torch.tensor([context])
    p = model(idx).exp()[0]
    assert p.sum(-1).tolist() == pytest.approx([1.0] * len(context), abs=1e-5)
    for t in range(len(context)):
        assert p[t].tolist() == pytest.approx(reference(text, context[: t + 1], order, smoothing), abs=1e-5)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(text=TEXTS, chunk=st.lists(st.integers(0, V - 1), min_size=2, max_size=12))
@settings(max_examples=30, deadline=None)
def test_a_loss_is_that_of_the_probabilities(smoothing, text, chunk):
    model = NGram(V, 4, smoothing)
    model.count(torch.tensor(text))
    idx = torch.tensor([chunk])
    x, y = idx[:, :-1], idx[:, 1:].clone()
    expected = -model(x).gather(-1, y[..., None])[..., 0]
    assert torch.allclose(model.loss(x, y), expected, atol=1e-5)
    y[0, 0] = -100
    assert model.loss(x, y)[0, 0] == 0


def test_with_nothing_counted_all_symbols_are_equal():
    model = NGram(V)
    x = torch.zeros(2, 3, dtype=torch.long)
    assert model(x).softmax(-1).flatten().tolist() == pytest.approx([1 / V] * 24)
    assert model.loss(x, x).flatten().tolist() == pytest.approx([math.log(V)] * 6)


@pytest.mark.parametrize(
    ("order", "smoothing", "block_size", "min_context", "known"),
    [
        (3, "witten_bell", 128, 64, 2.049),
        (4, "witten_bell", 128, 64, 1.774),
        (5, "witten_bell", 128, 64, 1.669),
        (6, "witten_bell", 128, 64, 1.698),
        (7, "kneser_ney", 128, 1, 1.5429),
        (7, "kneser_ney", 256, 1, 1.5296),
        (5, "backoff", 256, 1, 1.6652),
    ],
)
def test_tiny_shakespeare_has_the_known_losses(shakespeare, order, smoothing, block_size, min_context, known):
    data = CharDataModule("tinyshakespeare", block_size=block_size, min_context=min_context)
    data.setup()
    model = NGram(data.vocab_size, order, smoothing)
    model.count(data.splits["train"])
    assert evaluate(model, data.windows("val")).loss == pytest.approx(known, abs=0.001)


def results(run: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def test_the_usual_commands_do_for_ngrams_what_they_do_for_any_model(train, call, text_file, tmp_path):
    ended = train("data=text", "data.path=prose.txt", "model=ngram", "model.order=4", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert "training  none: what it knows is counted" in ended.out
    assert "trained on" not in ended.out
    found = results(tmp_path / "run")
    assert found["steps"] == 0
    assert found["val/loss"] < found["baselines"]["val"]["bigram"]
    again = json.loads(call("evaluate", "run", "--json").out)
    assert again["val/loss"] == found["val/loss"]
    assert call("generate", "run", "--length", "20").code == 0
    assert json.loads(call("reproduce", "run", "--json").out)["equal"]
    ended = train("rerun=run", "model.smoothing=witten_bell", "hydra.run.dir=other")
    assert ended.code == 0, ended.err
    assert results(tmp_path / "other")["val/loss"] != found["val/loss"]
    ended = train("resume=run")
    assert ended.code == 0
    assert "is at its end" in ended.out
    assert call("report", "run", "other").code == 0


def test_a_sweep_of_ngrams_is_a_sweep(train, text_file, tmp_path):
    ended = train("-m", "data=text", "data.path=prose.txt", "model=ngram", "model.order=2,3", "hydra.sweep.dir=sweep")
    assert ended.code == 0, ended.err
    losses = [results(tmp_path / "sweep" / f"order={order}")["val/loss"] for order in (2, 3)]
    assert losses[1] < losses[0]


def test_a_checkpoint_keeps_the_counted_text():
    model = NGram(V, 3)
    model.count(torch.tensor([0, 1, 2, 3, 0, 1, 3, 3]))
    node = {"_target_": "charlm.model.ngram.NGram", "order": 3, "smoothing": "kneser_ney"}
    again = checkpoint.trained(node, V, model.state_dict())
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(again(idx), model(idx))


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_several_processes_have_nothing_to_share_in_counting(check, text_file, trainer):
    ended = check("data=text", "data.path=prose.txt", "model=ngram", f"trainer={trainer}", "trainer.devices=2")
    assert ended.code == 2
    assert "model=ngram only counts, in one process; leave out trainer=ddp or fsdp" in ended.err


@pytest.mark.parametrize("symbols", [255, 256, 257])
def test_a_model_of_as_many_symbols_as_a_byte_has_is_loaded(symbols):
    model, again = NGram(symbols, 3), NGram(symbols, 3)
    model.count(torch.arange(symbols))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.text, model.text)
