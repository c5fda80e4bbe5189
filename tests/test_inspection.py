"""Learned or copied: spans and n-grams against a search by hand, and means that add up to the loss."""

import io
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from charlm import checkpoint
from charlm.callbacks.attention import attention
from charlm.data import CharDataModule
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.study import inspection
from charlm.study.inspection import by_class, longest_copy, novel, points
from charlm.study.systems import by_place, losses_of

TEXTS = st.text("abc", min_size=1, max_size=60)


@given(TEXTS, TEXTS)
def test_the_longest_copy_is_that_of_a_search_by_hand(train, text):
    longest = max(
        (j - i for i in range(len(text)) for j in range(i + 1, len(text) + 1) if text[i:j] in train), default=0
    )
    n, at = longest_copy(points(train), points(text))
    assert n == longest
    assert text[at : at + n] in train


@given(TEXTS, TEXTS, st.integers(1, 5))
def test_novel_ngrams_are_those_that_train_does_not_have(train, text, n):
    there = [text[i : i + n] for i in range(len(text) - n + 1)]
    expected = sum(gram not in train for gram in there) / len(there) if there else None
    assert novel(points(train), points(text), n) == pytest.approx(expected) if there else expected is None


@pytest.mark.parametrize(("block_size", "min_context"), [(16, 1), (16, 8), (16, 16), (7, 3)])
def test_losses_by_place_are_those_of_a_loop_over_windows(text_file, block_size, min_context):
    data = CharDataModule(path=str(text_file), block_size=block_size, min_context=min_context)
    data.setup()
    model = Bigram(data.vocab_size)
    by_hand: dict[int, list[float]] = {}
    with torch.inference_mode():
        for x, y in data.windows("val", stride=block_size - min_context + 1):
            logs = model(x).log_softmax(-1)
            for row, targets in zip(logs, y.tolist(), strict=True):
                for t, target in enumerate(targets):
                    if target >= 0:
                        by_hand.setdefault((t).bit_length(), []).append(-float(row[t, target]))
    rows = by_place(losses_of(model, data, "val", min_context, lambda *_: None))
    assert [row["n"] for row in rows] == [len(by_hand[i]) for i in sorted(by_hand)]
    for row, i in zip(rows, sorted(by_hand), strict=True):
        assert (row["from"], row["to"]) == (2**i // 2 + 1, min(2**i, block_size))
        assert row["nats"] == pytest.approx(sum(by_hand[i]) / len(by_hand[i]))


def test_classes_add_up_to_the_loss(text_file):
    data = CharDataModule(path=str(text_file))
    data.setup()
    targets = data.splits["val"][1:].long()
    bits = torch.rand(len(targets), dtype=torch.float64)
    rows = by_class(bits, targets, data)
    assert sum(row["n"] * row["bits"] for row in rows) == pytest.approx(float(bits.sum()))
    kinds = {"other letters", "capital letters", "spaces", "line ends", "punctuation"}
    assert kinds <= {row["class"] for row in rows}


def test_the_command_shows_it_and_writes_a_page_without_requests(trained, call, tmp_path):
    found = json.loads(call("inspect", str(trained), "--length", "300", "--json").out)
    results = json.loads((trained / "results.json").read_text())
    assert len(found["sample"]) == 300
    assert found["copied"]["text"] in found["sample"]
    total = sum(row["n"] * row["bits"] for row in found["by_position"])
    assert total / sum(row["n"] for row in found["by_position"]) == pytest.approx(results["val/loss"] / math.log(2))
    ended = call("inspect", str(trained), "--length", "300", "--html", "page.html")
    assert ended.code == 0, ended.err
    assert "by kind of character" in ended.out
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "http" not in page.split("<pre>")[0]


def test_text_in_a_page_stays_text():
    found = {"surprise": [{"text": "<script>alert(1)</script>", "bits": 3.0}]}
    page = inspection.page(found, "<b>a run</b>")
    assert "<script>" not in page
    assert "<b>" not in page


@torch.inference_mode()
def test_attention_is_what_the_model_computes_with():
    torch.manual_seed(0)
    model = GPT(7, 8, 2, 2, 12).eval()
    idx = torch.randint(7, (1, 8))
    maps = attention(model, idx)
    assert maps is not None
    assert maps.shape == (2, 2, 8, 8)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 2, 8))
    assert (maps.triu(1) == 0).all()
    block: Any = model.blocks[0]
    x = block.norm1(model.embed(idx, 0))
    v = block.attention.qkv(x).view(8, 3, 2, 6)[:, 2].permute(1, 0, 2)  # (nh, T, hs)
    mixed = (maps[0] @ v).permute(1, 0, 2).reshape(1, 8, 12)
    assert torch.allclose(block.attention.proj(mixed), block.attention(x), atol=1e-5)
    assert attention(Bigram(7), idx) is None


def test_pictures_are_pictures(text_file):
    data = CharDataModule(path=str(text_file), block_size=8)
    data.setup()
    model = GPT(data.vocab_size, 8, 1, 2, 12).eval()
    loaded = checkpoint.Checkpoint(text_file, 0, model, data.tokenizer, {}, {})
    drawn = inspection.pictures(loaded, data)
    assert len(drawn) == 2
    for picture in drawn.values():
        with Image.open(io.BytesIO(picture)) as opened:
            assert min(opened.size) > 200
    assert inspection.page({"surprise": []}, "a", drawn).count("data:image/png;base64,") == 2
