from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from charlm.errors import InputError
from charlm.generate import continuation, generate, sample, sample_text
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer.from_text("abcde\n")
LOGITS = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=12, unique=True)


def model() -> Bigram:
    torch.manual_seed(0)
    return Bigram(TOKENIZER.vocab_size)


def text(**settings) -> str:
    return continuation(model(), TOKENIZER, 60, **settings)


def test_the_same_seed_gives_the_same_text_and_another_one_another():
    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)


def test_sampling_takes_nothing_from_the_global_generator():
    untrained = model()
    state = torch.get_rng_state()
    continuation(untrained, TOKENIZER, 20)
    assert torch.equal(state, torch.get_rng_state())


def test_samples_of_a_batch_differ_and_continue_the_same_prompt():
    rows = ["".join(row) for row in zip(*sample_text(model(), TOKENIZER, 40, "ab", num_samples=3), strict=True)]
    assert len(set(rows)) == 3
    assert all(len(row) == 40 for row in rows)


def test_temperature_zero_takes_the_likeliest():
    table = model()
    ids = TOKENIZER.encode("a").long()
    expected = []
    for _ in range(60):
        ids = table(ids).argmax(-1)
        expected.append(int(ids[0]))
    assert text(prompt="a", temperature=0) == TOKENIZER.decode(torch.tensor(expected))


@given(LOGITS, st.integers(1, 14))
def test_top_k_never_leaves_the_k_likeliest(values, k):
    logits = torch.tensor([values]).expand(200, -1)
    kept = set(torch.tensor(values).topk(min(k, len(values))).indices.tolist())
    assert set(sample(logits, torch.Generator().manual_seed(0), top_k=k).tolist()) <= kept


@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(values, p):
    ordered = torch.tensor(values).sort(descending=True)
    needed = int((ordered.values.softmax(0).cumsum(0) < p + 1e-6).sum()) + 1
    kept = set(ordered.indices[:needed].tolist())
    drawn = sample(torch.tensor([values]).expand(300, -1), torch.Generator().manual_seed(0), top_p=p)
    assert set(drawn.tolist()) <= kept


def test_a_draw_is_that_of_torchs_multinomial():
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(1))
    expected = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    assert torch.equal(sample(logits, torch.Generator().manual_seed(0)), expected)


def test_without_limits_frequencies_are_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = sample(logits.expand(60_000, -1), torch.Generator().manual_seed(0))
    assert torch.bincount(drawn).div(60_000).tolist() == pytest.approx(logits.softmax(1)[0].tolist(), abs=0.01)


class Table(nn.Module):
    """A model with fixed successors that counts the characters of each call."""

    def __init__(self, block_size: int | None):
        super().__init__()
        self.block_size = block_size
        self.table = nn.Embedding(5, 5)
        self.given: list[int] = []

    def forward(self, idx):
        self.given.append(idx.shape[1])
        return self.table(idx)


class Decoding(Table):
    """The same, and it can go on after what it has seen; its state is how much that is."""

    def decode(self, idx, state):
        self.given.append(idx.shape[1])
        seen = (state or 0) + idx.shape[1]
        assert self.block_size is None or seen <= self.block_size
        return self.table(idx)[:, -1], seen


def lengths_given(model: Table, prompt: int, length: int, use_cache: bool = True) -> list[int]:
    assert len([*generate(model, torch.zeros(1, prompt, dtype=torch.long), length, use_cache=use_cache)]) == length
    return model.given


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_decode_a_model_is_given_the_last_block_size_characters(use_cache):
    assert lengths_given(Table(4), 2, 6, use_cache) == [2, 3, 4, 4, 4, 4]
    assert lengths_given(Table(4), 9, 3, use_cache) == [4, 4, 4]


def test_with_decode_a_character_is_given_once_and_the_newer_half_of_a_full_window_once_more():
    assert lengths_given(Decoding(6), 4, 10) == [4, 1, 1, 3, 1, 1, 1, 3, 1, 1]
    assert lengths_given(Decoding(6), 9, 6) == [6, 3, 1, 1, 1, 3]
    assert lengths_given(Decoding(1), 3, 4) == [1, 1]  # its size, and all of its probabilities at once


def test_without_the_cache_the_windows_are_the_same():
    assert lengths_given(Decoding(6), 4, 10, use_cache=False) == [4, 5, 6, 3, 4, 5, 6, 3, 4, 5]
    assert lengths_given(Decoding(6), 9, 6, use_cache=False) == [6, 3, 4, 5, 6, 3]


def test_without_a_block_size_nothing_is_forgotten():
    assert lengths_given(Decoding(None), 3, 5) == [3, 1, 1, 1, 1]
    assert lengths_given(Decoding(None), 3, 5, use_cache=False) == [3, 4, 5, 6, 7]
    assert lengths_given(Table(None), 3, 5) == [3, 4, 5, 6, 7]


def test_rows_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    gpt = GPT(5, block_size=6, n_layer=1, n_head=1, n_embd=8).double()
    nn.init.normal_(gpt.token_embedding.weight)
    prompts = torch.tensor([[0, 1], [2, 3], [4, 0]])
    together = torch.stack([*generate(gpt, prompts, 30, temperature=0)], dim=1)
    alone = [torch.stack([*generate(gpt, row[None], 30, temperature=0)], dim=1) for row in prompts]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(map(tuple, together.tolist()))) == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_its_mode_even_where_reading_stops_early(training):
    gpt = GPT(5, block_size=6, n_layer=1, n_head=1, n_embd=8, dropout=0.5).train(training)
    stream: Any = generate(gpt, torch.zeros(1, 1, dtype=torch.long), 30)
    next(stream)
    assert not gpt.training
    stream.close()
    assert gpt.training == training


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="prompt is empty"):
        text(prompt="")
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(model(), torch.zeros(1, 0, dtype=torch.long), 1))


def test_text_comes_as_it_is_written():
    stream = sample_text(model(), TOKENIZER, 10_000_000)
    assert len(next(stream)) == 1  # did not wait for the rest
