import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from charlm.data.chunks import IGNORE, Windows
from charlm.data.corpus import Corpus
from charlm.data.datamodule import CharDataModule
from charlm.data.pairs import Pairs
from charlm.errors import InputError
from charlm.evaluate import FINE, Blocks, Score, baselines, evaluate, figures
from charlm.model.bigram import Bigram
from charlm.tokenizer import CharTokenizer


class CountsItsContext(nn.Module):
    """Logits that depend on all characters so far, so that a window with another start gives another loss."""

    block_size = 1_000_000

    def __init__(self, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, vocab_size))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return F.one_hot(idx, len(self.weight)).float().cumsum(1) @ self.weight


def test_the_loss_is_the_mean_over_all_targets_in_tiled_windows():
    ids = torch.randint(0, 5, (103,))
    model = CountsItsContext(5)
    losses = []
    for start in range(0, 102, 10):
        x = ids[start : start + 10][None]
        y = ids[start + 1 : start + 11]
        x = x[:, : len(y)]
        losses += F.cross_entropy(model(x)[0], y, reduction="none").tolist()
    # The last window is moved back to stay whole, so that its two targets have more context: scored apart.
    x, y = ids[92:102][None], ids[93:103]
    losses[-2:] = F.cross_entropy(model(x)[0], y, reduction="none").tolist()[-2:]
    score = evaluate(model, Windows(ids, 10, tokens_per_batch=30))
    assert score.n_targets == 102
    assert score.loss == pytest.approx(np.mean(losses), rel=1e-6)


@given(st.integers(20, 200), st.integers(1, 10), st.integers(1, 100))
def test_a_bigram_has_one_loss_whatever_the_windows(n, block_size, tokens_per_batch):
    ids = torch.randint(0, 7, (n,))
    torch.manual_seed(0)
    model = Bigram(7)
    exact = F.cross_entropy(model(ids[:-1]), ids[1:]).item()
    assert evaluate(model, Windows(ids, block_size, None, tokens_per_batch)).loss == pytest.approx(exact, rel=1e-5)


def test_evaluation_leaves_the_model_as_it_came():
    model = nn.Sequential(Bigram(4), nn.Dropout(0.5)).train()
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    one, two = (
        evaluate(model, Windows(torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0)), 5)).loss
        for _ in range(2)
    )
    assert one == two  # no dropout
    assert model.training
    assert model[1].training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_the_units_belong_together():
    score = Score(loss=math.log(8), loss_se=0.01, n_targets=100, characters=200, bytes=300)
    assert score.nats_per_char == pytest.approx(math.log(8) / 2)
    assert score.bits_per_char == pytest.approx(1.5)
    assert score.bits_per_byte == pytest.approx(1)
    assert score.perplexity == pytest.approx(8)
    found = score.figures("val")
    assert found["val/nats_per_char_se"] == pytest.approx(0.01 / 2)
    assert found["val/bits_per_char_se"] == pytest.approx(0.01 / 2 / math.log(2))
    assert found["val/bits_per_byte_se"] == pytest.approx(0.01 / 3 / math.log(2))
    assert found["val/perplexity_se"] == pytest.approx(0.08)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_standard_error_covers_the_truth_also_for_dependent_losses(correlation):
    """Among 400 texts the true mean is within 1.96 errors in about 95%; independence assumed, 0.9 would give 35%."""
    rng = np.random.default_rng(0)
    n, texts, inside = 20_000, 400, 0
    losses = rng.standard_normal((n, texts))
    losses[1:] *= math.sqrt(1 - correlation**2)
    for i in range(1, n):
        losses[i] += correlation * losses[i - 1]
    for windows in torch.from_numpy(losses).view(-1, 10, texts).sum(1).T:
        score = Score.of(windows, torch.full((n // 10,), 10))
        inside += abs(score.loss) < 1.96 * score.loss_se
    assert 0.88 < inside / texts < 0.99


def test_one_block_gives_no_error():
    assert math.isnan(Score.of(torch.tensor([3.0]), torch.tensor([2])).loss_se)


@given(st.lists(st.integers(0, 4), min_size=12, max_size=80), st.integers(3, 9))
def test_references_are_those_of_counting_by_hand(ids, cut):
    train, val = ids[:cut], ids[cut:]
    found = baselines(Pairs.of(torch.tensor(train), 5), Pairs.of(torch.tensor(val), 5), 5, smoothing=1.0)
    after, pairs, rows = Counter(train[1:]), Counter(itertools.pairwise(train)), Counter(train[:-1])
    unigram = [-math.log((after[c] + 1) / (len(train) - 1 + 5)) for c in val[1:]]
    bigram = [-math.log((pairs[a, b] + 1) / (rows[a] + 5)) for a, b in itertools.pairwise(val)]
    assert found["uniform"] == pytest.approx(math.log(5))
    assert found["unigram"] == pytest.approx(np.mean(unigram))
    assert found["bigram"] == pytest.approx(np.mean(bigram))


@given(st.lists(st.integers(0, 4), min_size=5, max_size=100))
def test_no_table_beats_the_counts_on_train(ids):
    tensor = torch.tensor(ids)
    floor = baselines(Pairs.of(tensor, 5), Pairs.of(tensor, 5), 5, smoothing=0.0)["bigram"]
    torch.manual_seed(0)
    model = Bigram(5)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tensor[:-1]), tensor[1:])
        loss.backward()
        return loss

    optimizer.step(closure)
    reached = evaluate(model, Windows(tensor, 4)).loss
    assert reached >= floor - 1e-6
    assert reached == pytest.approx(floor, abs=0.05)


def test_figures_of_tiny_shakespeare_are_the_known_ones(shakespeare, monkeypatch):
    data = CharDataModule("tinyshakespeare", block_size=8, batch_size=1)
    corpus = Corpus.of("tinyshakespeare", shakespeare, "here")
    monkeypatch.setattr("charlm.data.datamodule.load_corpus", lambda *_: corpus)
    data.setup()
    assert (len(data.splits["train"]), len(data.splits["val"])) == (1_003_854, 111_540)
    counted = Bigram(65)
    ids = data.splits["train"].long()
    counts = torch.bincount(ids[:-1] * 65 + ids[1:], minlength=65 * 65).view(65, 65)
    counted.token_embedding_table.weight.data = (counts + 1).float().log()
    found = figures(counted, data, ["train", "val"])
    assert found["val/targets"] == 111_539
    assert found["baselines"]["val"] == pytest.approx(
        {"uniform": 4.174387, "unigram": 3.347305, "bigram": 2.481889}, abs=1e-6
    )
    assert found["baselines"]["train"]["bigram"] == pytest.approx(2.451914, abs=2e-6)
    # The model that is the counts has the loss of the counts, by a road that shares no line with them.
    assert found["val/loss"] == pytest.approx(found["baselines"]["val"]["bigram"], abs=1e-6)
    assert found["train/loss"] >= found["baselines"]["train"]["bigram"]


def test_a_text_with_a_large_alphabet_needs_no_table_of_its_square():
    text = "".join(chr(0x4E00 + i % 15_000) for i in range(60_000))
    tokenizer = CharTokenizer.from_text(text)
    ids, v = tokenizer.encode(text), tokenizer.vocab_size
    assert baselines(Pairs.of(ids[:50_000], v), Pairs.of(ids[50_000:], v), v, 1.0)["bigram"] > 0


class LooksBackFour(nn.Module):
    """A function of the last four characters, which windows of any block_size may show or not."""

    block_size = 1_000_000

    def __init__(self, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, vocab_size, vocab_size))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        seen = F.pad(F.one_hot(idx, self.weight.shape[1]).float(), (0, 0, 3, 0))  # (B, 3 + T, V)
        return torch.stack([seen[:, k : k + idx.shape[1]] @ self.weight[k] for k in range(4)]).sum(0)  # (B, T, V)


def test_one_model_has_one_loss_at_every_block_size_that_shows_it_as_much():
    torch.manual_seed(0)
    data = {t: {m: CharDataModule("pydoc", t, 1, min_context=m) for m in (1, 4)} for t in (8, 256)}
    losses = {}
    for t, modules in data.items():
        for m, module in modules.items():
            module.setup()
            torch.manual_seed(0)
            losses[t, m] = evaluate(LooksBackFour(module.tokenizer.vocab_size), module.windows("val")).loss
    assert losses[8, 4] == pytest.approx(losses[256, 4], rel=1e-6)
    assert abs(losses[8, 1] - losses[256, 1]) > 0.01


def test_a_window_cannot_show_more_than_it_holds():
    with pytest.raises(InputError, match=r"^min_context=9 is more than block_size=8 characters can show"):
        CharDataModule("pydoc", 8, 1, min_context=9).setup()


def test_published_results_are_shown_next_to_ones_own(call, trained, monkeypatch):
    from charlm.data import corpora

    published = (corpora.Published("a giant", 0.5), corpora.Published("a dwarf", 50.0, "val"))
    monkeypatch.setitem(corpora.PUBLISHED, "prose.txt", published)
    found = json.loads(call("evaluate", str(trained), "--split", "val", "--json").out)
    assert [one["name"] for one in found["published"]] == ["a giant", "a dwarf"]
    lines = call("evaluate", str(trained), "--split", "val").out.split("known results")[1].splitlines()
    rows = [line.split() for line in lines if "0" in line]
    assert [row[:2] for row in rows] == [["a", "giant"], ["bigram", "at"], ["a", "dwarf"]]
    assert rows[1][-1] == f"{found['val/bits_per_byte']:.4f}"


def test_a_least_context_is_a_stride(call, trained):
    by_context = json.loads(call("evaluate", str(trained), "--split", "val", "--context", "4", "--json").out)
    by_stride = json.loads(call("evaluate", str(trained), "--split", "val", "--stride", "5", "--json").out)
    assert by_context == by_stride
    assert by_context["min_context"] == 4
    assert call("evaluate", str(trained), "--context", "9").err.endswith("give 1 to block_size (8)\n")
    assert "give one of them" in call("evaluate", str(trained), "--context", "2", "--stride", "2").err


@given(st.lists(st.integers(0, 4), min_size=2, max_size=3000), st.integers(1, 50), st.booleans())
def test_blocks_hold_all_targets_in_the_order_of_the_text(ids, width, of_bytes):
    sizes = torch.tensor([[1, 1], [2, 2], [3, 4], [0, 1], [1, 2]]) if of_bytes else None
    tokens = torch.tensor([0, *ids])
    blocks = Blocks(tokens, sizes)
    lengths = torch.ones_like(tokens) if sizes is None else sizes[tokens, 0]
    for start in range(1, len(tokens), width):
        y = tokens[start : start + width][None]
        padded = torch.cat([torch.full((1, 2), IGNORE), y], 1)
        blocks.add(torch.where(padded == IGNORE, 0.0, 0.5), padded)
    characters, nats = blocks.summed()
    assert float(nats.sum()) == pytest.approx(0.5 * (len(tokens) - 1))
    assert int(characters.sum()) == int(lengths[1:].sum())
    size = int(characters[0]) + 1
    assert size == FINE or size <= max(1000, int(lengths.sum()) // 10)
    begins = lengths.cumsum(0) - lengths
    first = begins[1:] // size == 0 if len(characters) > 1 else torch.ones(len(tokens) - 1, dtype=torch.bool)
    assert float(nats[0]) == pytest.approx(0.5 * int(first.sum()))


def test_losses_by_position_add_up_to_the_loss(trained, call):
    found = json.loads(call("evaluate", str(trained), "--by-position", "--json").out)
    rows = found["by_position"]["val"]
    assert [(row["from"], row["to"]) for row in rows] == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert sum(row["n"] for row in rows) == found["val/targets"]
    assert sum(row["n"] * row["nats"] for row in rows) / found["val/targets"] == pytest.approx(found["val/loss"])
    after_four = json.loads(call("evaluate", str(trained), "--by-position", "--context", "5", "--json").out)
    of_first_window = after_four["by_position"]["val"][:-1]
    assert [row["n"] for row in of_first_window] == [1, 1, 2]
    shown = call("evaluate", str(trained), "--split", "val", "--by-position").out
    assert re.search(rf"5 to 8 +{rows[-1]['nats']:.4f} +{rows[-1]['n']:,}", shown)
