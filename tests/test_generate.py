import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from charlm.errors import InputError
from charlm.generate import generate, sample, write
from charlm.model.bigram import Bigram
from charlm.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer.from_text("abcde\n")
LOGITS = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=12, unique=True)


def model() -> Bigram:
    torch.manual_seed(0)
    return Bigram(TOKENIZER.vocab_size)


def text(**settings) -> str:
    return "".join(write(model(), TOKENIZER, 60, **settings))


def test_the_same_seed_gives_the_same_text_and_another_one_another():
    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)


def test_sampling_takes_nothing_from_the_global_generator():
    untrained = model()
    state = torch.get_rng_state()
    "".join(write(untrained, TOKENIZER, 20))
    assert torch.equal(state, torch.get_rng_state())


def test_samples_of_a_batch_differ_and_continue_the_same_prompt():
    rows = ["".join(row) for row in zip(*write(model(), TOKENIZER, 40, "ab", num_samples=3), strict=True)]
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


def test_a_model_is_given_no_more_than_it_can_look_back_over():
    class Short(nn.Module):
        block_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 5)
            self.seen: list[int] = []

        def forward(self, idx):
            self.seen.append(idx.shape[1])
            return self.table(idx)

    short = Short()
    assert len([*generate(short, torch.zeros(1, 2, dtype=torch.long), 6)]) == 6
    assert short.seen == [2, 3, 4, 4, 4, 4]


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="prompt is empty"):
        text(prompt="")
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(model(), torch.zeros(1, 0, dtype=torch.long), 1))


def test_text_comes_as_it_is_written():
    stream = write(model(), TOKENIZER, 10_000_000)
    assert len(next(stream)) == 1  # did not wait for the rest
