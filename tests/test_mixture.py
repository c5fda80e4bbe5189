"""charlm.model.mixture: its counts against a reference that counts one by one, and what becomes of them."""

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from charlm import checkpoint
from charlm.counts import Counts, Table, discounts, hashes
from charlm.generate import generate
from charlm.model.mixture import Mixture, recent

V, K, PARTS = 5, 4, 3
NODE = {"_target_": "charlm.model.mixture.Mixture", "block_size": 12, "n_context": K, "n_recent": 3, "n_folds": PARTS}
NODE |= {"n_networks": 2, "n_layer": 1, "n_head": 2, "n_embd": 8, "mlp": "relu2", "dropout": 0.0}


def a_text(n: int = 300, seed: int = 0) -> Tensor:
    """Symbols that follow each other with habits, and nowhere twice the same."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]), n, replacement=True, generator=generator)
    return (torch.cumsum(steps, 0) + torch.arange(n) // 7) % V


def a_model(text: Tensor | None = None) -> Mixture:
    torch.manual_seed(0)
    model: Any = checkpoint.build(NODE, V)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.count(a_text() if text is None else text)
    return model


def reference(text: list[int], context: list[int], without: range | None, n_context: int = K) -> list[float]:
    """P(symbol | context) by Kneser and Ney, counting one by one, without what is predicted at the places `without`."""
    places = [i for i in range(1, len(text)) if without is None or i - 1 not in without]
    alone = Counter(text[i] for i in places)
    p = [(alone[s] + 0.1) / (len(places) + 0.1 * V) for s in range(V)]
    longest = min(n_context, len(text) - 1)
    for n in range(1, min(longest, len(context)) + 1):
        seen = {gram[-1]: c for gram, c in grams(text, places, n, longest).items() if gram[:-1] == tuple(context[-n:])}
        total = sum(seen.values())
        if not total:
            continue
        # discounts are of the whole text
        discount = discounts(torch.tensor([*grams(text, [*range(1, len(text))], n, longest).values()])).tolist()
        left = sum(discount[min(c, 3)] for c in seen.values())
        p = [(seen.get(s, 0) - discount[min(seen.get(s, 0), 3)] + left * p[s]) / total for s in range(V)]
    return p


def grams(text: list[int], places: list[int], n: int, longest: int) -> dict[tuple[int, ...], int]:
    """How often each n characters and the next occur; where longer contexts follow, after how many symbols."""
    before = defaultdict(list)
    for i in places:
        if i >= n:
            before[tuple(text[i - n : i + 1])].append(text[i - n - 1] if i > n else None)  # None: nothing
    return {gram: len(found if n == longest else set(found)) for gram, found in before.items()}


def reference_in_window(window: list[int], p: list[float], n_recent: int) -> list[float]:
    """P(symbol) where those that followed the same contexts in the window raise its probability `p`."""
    for n in range(1, n_recent + 1):
        ends = [i for i in range(n, len(window)) if window[i - n : i] == window[len(window) - n :]]
        seen, prior = Counter(window[i] for i in ends), {1: 512, 2: 32}.get(n, 8)
        p = [(seen[s] + prior * p[s]) / (len(ends) + prior) for s in range(V)]
    return p


@given(st.lists(st.integers(0, V - 1), min_size=2, max_size=60), st.integers(2, PARTS))
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_counting_one_by_one(symbols, n_folds):
    text = torch.tensor(symbols)
    counts = Counts(text, V, K, n_folds)
    idx = text[None, : min(len(text), 20)]
    rows, alone = counts.rows(idx)
    found = counts.look_up(rows.flatten(1), alone.flatten()).log_p().exp()
    for t in range(idx.shape[1]):
        assert found[t].tolist() == pytest.approx(reference(symbols, symbols[: t + 1], None), abs=1e-4)


@given(st.lists(st.integers(0, V - 1), min_size=4, max_size=60), st.integers(2, PARTS))
@settings(max_examples=30, deadline=None)
def test_in_and_out_of_folds_probabilities_sum_to_one(symbols, n_folds):
    text = torch.tensor(symbols)
    counts = Counts(text, V, K, n_folds)
    T = min(len(text) - 1, 10)
    for rows, alone in (counts.rows(text[None, :T]), counts.rows_elsewhere(text[:-1].unfold(0, T, 1))):
        p = counts.look_up(rows.flatten(1), alone.flatten()).log_p().exp()
        assert p.sum(1).tolist() == pytest.approx([1.0] * len(p), abs=1e-5)


def test_without_the_last_fold_counts_are_those_of_the_text_before_it(monkeypatch):
    monkeypatch.setattr("charlm.counts.discounts", lambda _: torch.tensor([0.0, 0.5, 0.7, 0.9]))  # else of all folds
    text = a_text()
    counts = Counts(text, V, K, PARTS)
    start = int((counts.fold == PARTS).nonzero()[0])
    before = Counts(text[: start + 1], V, K, PARTS)  # what the last fold predicts comes after
    chunks = text[start:-1].unfold(0, 10, 1)
    rows, alone = counts.rows_elsewhere(chunks)
    expected_rows, expected_alone = before.rows(chunks)
    found = counts.look_up(rows.flatten(1), alone.flatten()).log_p()
    expected = before.look_up(expected_rows.flatten(1), expected_alone.flatten()).log_p()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_in_each_part_of_the_text_only_the_others_count():
    text, T = a_text(), 10
    counts = Counts(text, V, K, PARTS)
    chunks = text.unfold(0, T, 1)[:-1]
    for start in range(0, len(chunks), 13):
        rows, alone = counts.rows_elsewhere(chunks[start, None])
        found = counts.look_up(rows.flatten(1), alone.flatten()).log_p().exp()
        for t in range(T):
            part = int(counts.fold[start + t])
            inside = (counts.fold == part).nonzero().flatten()
            expected = reference(
                text.tolist(), text[start : start + t + 1].tolist(), range(int(inside[0]), int(inside[-1]) + 1)
            )
            assert found[t].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_chunk_that_is_not_of_the_text_meets_all_counts():
    model = a_model().train()
    strange = torch.zeros(2, 12, dtype=torch.long)
    assert torch.equal(model(strange), model.eval()(strange))
    chunk = a_text()[None, 40:52]
    assert not torch.equal(model.train()(chunk), model.eval()(chunk))


@pytest.mark.parametrize("training", [True, False])
def test_no_context_reaches_beyond_the_chunk_nor_ahead(training):
    text = a_text()
    model = a_model(text).train(training)
    chunk = text[None, 100:112]
    rows, _ = (model.counted or made(model)).rows(chunk)
    for n in range(1, K + 1):
        assert (rows[n - 1, 0, : n - 1] == 0).all()
        assert (rows[n - 1, 0, n - 1 :] > 0).all()
    longer, shorter = model.eval()(chunk), model.eval()(chunk[:, :7])
    assert torch.allclose(longer[:, :7], shorter, atol=1e-5)


def made(model: Mixture) -> Table:
    model(torch.zeros(1, 1, dtype=torch.long))
    assert model.counted is not None
    return model.counted


def test_it_begins_as_the_counts_are():
    model: Any = checkpoint.build(NODE, V)
    idx = a_text()[None, 50:62]
    assert model(idx).detach().softmax(-1).flatten().tolist() == pytest.approx([1 / V] * 12 * V)
    model.count(a_text())
    p = model.eval()(idx).softmax(-1)[0, -1]
    counted = reference(a_text().tolist(), idx[0].tolist(), None)
    expected = reference_in_window(idx[0].tolist(), counted, 3)
    assert expected != pytest.approx(counted, abs=1e-3)
    assert p.tolist() == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=30), st.integers(0, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_what_a_window_repeats_is_counted_one_by_one(symbols, n_recent, data):
    last = data.draw(st.integers(1, len(symbols)))
    p = torch.rand(1, last, V, generator=torch.Generator().manual_seed(len(symbols))).softmax(-1)
    change, seen = recent(torch.tensor([symbols]), last, n_recent, p)
    assert seen.shape == (last, 2 * n_recent)
    found = (p[0].log() + change.sum(0)).exp()
    for i in range(last):
        window = symbols[: len(symbols) - last + i + 1]
        assert found[i].tolist() == pytest.approx(reference_in_window(window, p[0, i].tolist(), n_recent), abs=1e-5)


def test_decoding_with_counts_is_the_forward_pass():
    model = a_model().eval()
    idx = a_text(12, seed=3)[None].repeat(2, 1)
    idx[1] = (idx[1] + 1) % V
    state, whole = None, model(idx)
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 9), (9, 12)):
        logits, state = model.decode(idx[:, start:end], state)
        assert torch.allclose(logits, whole[:, end - 1], atol=1e-5)


def test_networks_learn_alone_and_are_averaged():
    model: Any = a_model()
    idx, targets = a_text()[None, 20:32], a_text()[None, 21:33]
    each = [logits.softmax(-1) for logits in model.eval().each(idx)]
    assert not torch.allclose(each[0], each[1], atol=0.01)
    mean = torch.stack(each).mean(0)
    assert torch.allclose(model(idx).softmax(-1), mean, atol=1e-6)
    expected = -mean.gather(-1, targets[..., None])[..., 0].log()
    assert torch.allclose(model.loss(idx, targets), expected, atol=1e-5)
    model.train().loss(idx, targets).mean().backward()
    for network, logits in zip(model.networks, model.each(idx), strict=True):
        alone = torch.autograd.grad(F.cross_entropy(logits.mT, targets) / 2, list(network.parameters()))
        for parameter, gradient in zip(network.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_text_is_written_with_what_was_counted():
    text = torch.arange(400) % V  # a counted symbol is almost certain
    model: Any = checkpoint.build(NODE, V)
    model.count(text)
    written = generate(model.eval(), torch.tensor([[0]]), 30, temperature=0.0)
    assert torch.cat([*written]).flatten().tolist() == [(i + 1) % V for i in range(30)]


def test_a_checkpoint_keeps_the_counted_text():
    model = a_model().eval()
    weights = model.state_dict()
    again = checkpoint.trained(NODE, V, weights).eval()
    idx = a_text()[None, 5:17]
    assert torch.equal(again(idx), model(idx))
    for wrong in (torch.full((9,), V, dtype=torch.uint8), torch.zeros(3, 3, dtype=torch.uint8), torch.zeros(4)):
        with pytest.raises(ValueError, match="is not one of its symbols"):
            checkpoint.trained(NODE, V, weights | {"text": wrong})


def test_weights_that_learned_from_counts_by_another_rule_are_refused():
    weights = a_model().state_dict()
    older = {name: value for name, value in weights.items() if name != "rule"}
    for wrong, rule in ((older, 1), (weights | {"rule": torch.tensor(3)}, 3)):
        with pytest.raises(ValueError, match=f"trained on counts by rule {rule}, and this version counts by rule 2"):
            checkpoint.trained(NODE, V, wrong)


def test_contexts_have_numbers_of_their_own():
    idx = torch.randint(65, (1, 100_000), generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 3, 8):
        windows = {tuple(row.tolist()) for row in idx[0].unfold(0, n, 1)}
        assert len(hashes(idx, n)[0, n - 1 :].unique()) == len(windows)


def test_counts_are_worth_more_than_a_table_of_pairs():
    text, val = a_text(20_000), a_text(2_000, seed=1)
    counts = Counts(text, V, K, PARTS)
    rows, alone = counts.rows(val[None, :-1])
    log_p = counts.look_up(rows.flatten(1), alone.flatten())
    by_length = (log_p.alone + log_p.change.cumsum(0)).gather(2, val[None, 1:, None].expand(K, -1, 1)).mean((1, 2))
    assert float(-by_length[0]) < math.log(V)


SETTINGS = ["model=mixture", "data.block_size=16", "model.n_layer=1", "model.n_head=2", "model.n_embd=8"]
SETTINGS += ["model.n_context=4", "data=text", "data.path=prose.txt", "trainer.max_steps=4", "logger=none"]


@pytest.fixture
def mixture_run(train, text_file, tmp_path) -> Path:
    ended = train(*SETTINGS, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert "counting the contexts of 18,000 tokens" in ended.out
    return tmp_path / "run"


def never(*_: Any) -> None:
    raise AssertionError("the text was counted again")


def test_a_run_keeps_its_counts_so_that_nobody_counts_again(mixture_run, monkeypatch):
    idx = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    file = mixture_run / "checkpoints" / "counts.safetensors"
    content = file.read_bytes()
    file.unlink()
    expected = checkpoint.load(mixture_run).model(idx)
    file.write_bytes(content)
    monkeypatch.setattr(Counts, "count", never)
    assert torch.equal(checkpoint.load(mixture_run).model(idx), expected)


def test_counts_of_another_text_or_another_form_are_not_used(mixture_run, capsys):
    file = mixture_run / "checkpoints" / "counts.safetensors"
    good, idx = load_file(file), torch.arange(16)[None]
    expected = checkpoint.load(mixture_run).model(idx)
    card = write_card(mixture_run)
    wrong: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        (good, card | {"text": "0"}, "they are of another text"),
        (good, card | {"version": "0"}, "they are of another text"),
        (good | {"symbols": good["symbols"] + 200}, card, "counts of other symbols"),
        (good | {"starts": good["starts"].flip(0)}, card, "not the counts of a text"),
        (good | {"keys.2": good["keys.2"].flip(0)}, card, "not the counts of a text"),
        (good | {"seen": good["seen"][:, :2].contiguous()}, card, "not the counts of a text"),
        ({name: tensor for name, tensor in good.items() if name != "other"}, card, "'other'"),
    ]
    capsys.readouterr()
    for tensors, metadata, words in wrong:
        save_file(tensors, file, metadata)
        assert torch.equal(checkpoint.load(mixture_run).model(idx), expected)
        told = capsys.readouterr().err
        assert words in told
        assert "the text is counted again" in told
    file.write_bytes(b"x" * 50)
    assert torch.equal(checkpoint.load(mixture_run).model(idx), expected)


def write_card(run: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(run / "checkpoints" / "counts.safetensors", "pt") as file:
        return dict(file.metadata())


def test_a_text_whose_counts_do_not_fit_is_refused_before_counting(check, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Counts, "count", never)
    monkeypatch.setattr("charlm.system.memory.limit", lambda: (8_000_000, "this machine has"))
    ended = check(*SETTINGS, "hydra.run.dir=run")
    assert ended.code == 2
    assert "counting 18,000 tokens may take 8.6 MiB, and this machine has 7.6 MiB" in ended.err
    assert not (tmp_path / "run").exists()
