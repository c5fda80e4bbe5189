"""Compressors as baselines, against the programs of the same names."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from charlm.data import CharDataModule
from charlm.data.compressors import COMPRESSORS, compressed
from charlm.tokenizer import ByteTokenizer

REFERENCES = {
    "gzip": lambda raw: gzip.compress(raw, 9),
    "bz2": lambda raw: bz2.compress(raw, 9),
    "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
}


def test_sizes_are_those_of_the_whole_text_compressed_at_once(text_file: Path):
    raw = text_file.read_bytes()
    data = CharDataModule(path=str(text_file), tokenizer=ByteTokenizer.from_corpus)
    found = {one.compressor: one for one in compressed(data)}
    assert found.keys() == COMPRESSORS.keys()
    cut = len(data.splits["train"])
    assert cut == len(raw.decode()[:18_000].encode())
    for name, compress in REFERENCES.items():
        assert found[name].cold_start == 8 * len(compress(raw[cut:])) / (len(raw) - cut)
        given = len(compress(raw)) - len(compress(raw[:cut]))
        assert found[name].given_train == 8 * given / (len(raw) - cut)
    assert all(1 < one.given_train < one.cold_start < 8 for one in found.values())


def test_tiny_shakespeare_has_the_known_figures(shakespeare):
    data = CharDataModule("tinyshakespeare", tokenizer=ByteTokenizer.from_corpus)
    found = {one.compressor: one.given_train for one in compressed(data)}
    assert found["gzip"] == pytest.approx(3.096, abs=0.001)
    assert found["bz2"] == pytest.approx(2.398, abs=0.001)


def test_the_command_shows_them(call, text_file):
    ended = call("data", "prose.txt", "--compress", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["compressed"]
    assert [one["compressor"] for one in found] == [*COMPRESSORS]
    shown = call("data", "prose.txt", "--compress")
    assert "compressed alone (cold start)" in shown.out
    assert f"{found[0]['given_train']:.4f}" in shown.out
