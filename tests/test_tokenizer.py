import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.errors import InputError
from charlm.tokenizer import TOKENIZERS, CharTokenizer

# Every code point there is, lone surrogates and NUL among them.
ANY_TEXT = st.text(st.characters(codec=None), min_size=1)


@given(ANY_TEXT)
def test_any_text_comes_back_exactly(text: str):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ANY_TEXT)
def test_ids_are_places_in_the_sorted_set_of_characters(text: str):
    tokenizer = CharTokenizer.from_text(text)
    alphabet = sorted(set(text))
    assert [*tokenizer.chars] == alphabet
    assert tokenizer.encode(text).tolist() == [alphabet.index(character) for character in text]


@given(ANY_TEXT)
def test_a_saved_tokenizer_gives_the_same_ids(text: str):
    tokenizer = CharTokenizer.from_text(text)
    state = tokenizer.state_dict()
    again = TOKENIZERS[state["name"]].from_state_dict(state)
    assert torch.equal(again.encode(text), tokenizer.encode(text))


@given(st.text("abc", min_size=1), st.text(st.characters(exclude_characters="abc"), min_size=1))
def test_an_unknown_character_is_named_with_its_place(known: str, unknown: str):
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(InputError) as error:
        tokenizer.encode(known + unknown + known)
    assert f"{unknown[0]!r} (U+{ord(unknown[0]):04X}) at position {len(known)} " in str(error.value)


def test_no_text_makes_no_tokenizer():
    with pytest.raises(InputError, match="at least one character"):
        CharTokenizer.from_text("")


def test_the_empty_text_has_no_ids():
    tokenizer = CharTokenizer.from_text("ab")
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode(torch.empty(0, dtype=torch.long)) == ""


def test_an_id_outside_the_vocabulary_is_an_error():
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match="from 0 to 2"):
            CharTokenizer.from_text("abc").decode(torch.tensor([0, wrong]))


def seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def test_no_loop_over_characters_is_hidden_in_it(prose: str):
    """benchmarks/tokenizer.py measures over 20 times; a third of that does not fail on a busy machine."""
    text = prose * 50
    tokenizer = CharTokenizer.from_text(text)
    stoi = {character: i for i, character in enumerate(tokenizer.chars)}
    ids = tokenizer.encode(text)
    listed = ids.tolist()
    assert seconds(lambda: [stoi[c] for c in text]) > 7 * seconds(lambda: tokenizer.encode(text))
    assert seconds(lambda: "".join([tokenizer.chars[i] for i in listed])) > 7 * seconds(lambda: tokenizer.decode(ids))
