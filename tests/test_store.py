"""A large text becomes ids on disk, once: the same ids as in memory, and never a wrong or a partial store."""

import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.data import CharDataModule, corpus, reader, store
from charlm.data.corpora import load_corpus
from charlm.data.corpus import Corpus
from charlm.data.pairs import Pairs
from charlm.data.reader import Piece, blocks, pieces_of
from charlm.data.survey import survey
from charlm.errors import DiskError, InputError
from charlm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, MakeTokenizer
from tests.conftest import PRELOAD, ROOT

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT = "Was it?\nżółw, 日本語 – and 😀 😀\nIt was the best of times.\n" * 40
CHAR, BYTE, BPE = CharTokenizer.from_corpus, ByteTokenizer.from_corpus, BPETokenizer.from_corpus


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, and a text that is taken for a large one, read in small blocks."""
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "SMALL", 100)
    monkeypatch.setattr(corpus, "RACY", 0)
    monkeypatch.setattr(reader, "BLOCK", 50)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8", newline="")
    load_corpus.cache_clear()
    yield tmp_path
    load_corpus.cache_clear()


def prepared(folder: Path, tokenizer: MakeTokenizer = CHAR, **settings: Any) -> CharDataModule:
    """The data of the text in a folder, as a new process would have it."""
    load_corpus.cache_clear()
    data = CharDataModule(path=str(folder / "text.txt"), tokenizer=tokenizer, **settings)
    data.setup()
    return data


def stored(folder: Path) -> Path:
    [found] = (folder / "cache" / "store").glob("*/ids.bin")
    return found


@pytest.mark.parametrize("tokenizer", [CHAR, BYTE, BPE])
def test_a_store_serves_what_memory_serves(place, monkeypatch, tokenizer):
    settings: Any = {"block_size": 16, "batch_size": 4, "val_fraction": 0.3, "test_fraction": 0.1}
    data = prepared(place, tokenizer, **settings)
    assert data.encoded.folder
    monkeypatch.setattr(corpus, "SMALL", 10**6)
    small = prepared(place, tokenizer, **settings)
    assert small.encoded.folder is None
    assert small.corpus.card() == data.corpus.card()
    assert {*small.splits} == {*data.splits} == {"train", "val", "test"}
    for split, ids in small.splits.items():
        assert ids.dtype == data.splits[split].dtype
        assert torch.equal(ids, data.splits[split])
        assert all(torch.equal(a, b) for a, b in zip(small.pairs(split), data.pairs(split), strict=True))
        for ours, theirs in zip(small.windows(split), data.windows(split), strict=True):
            assert all(map(torch.equal, ours, theirs))
    for k in (0, 1, 999):
        assert all(map(torch.equal, small.train_dataloader().batch(k), data.train_dataloader().batch(k)))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.9])
def test_every_tokenizer_cuts_the_splits_at_the_same_character(place, fraction):
    settings: Any = {"val_fraction": fraction, "test_fraction": 0.05, "block_size": 2}
    by_char, *others = (prepared(place, tokenizer, **settings) for tokenizer in (CHAR, BYTE, BPE))
    for split in by_char.splits:
        texts = {data.tokenizer.decode(data.splits[split]) for data in (by_char, *others)}
        assert len(texts) == 1
    assert "".join(by_char.tokenizer.decode(ids) for ids in by_char.splits.values()) == TEXT


def test_the_second_start_reads_no_text(place, monkeypatch):
    first = prepared(place)

    def read(*_: object) -> Iterator[Piece]:
        raise AssertionError("the text was read")

    monkeypatch.setattr(corpus, "read", read)
    again = prepared(place, val_fraction=0.5)  # one store of characters serves all splits
    assert again.encoded.folder == first.encoded.folder
    assert torch.equal(again.encoded.ids, first.encoded.ids)


def test_a_text_that_changes_has_another_store(place):
    before = prepared(place).encoded.folder
    (place / "text.txt").write_text("B" + TEXT[1:], encoding="utf-8", newline="")  # of the same size
    data = prepared(place)
    assert data.encoded.folder != before
    assert data.tokenizer.decode(data.encoded.ids[:7]) == "Bas it?"


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    before = file.stat()
    if how == "gone":
        file.unlink()
    elif how == "altered":
        with file.open("r+b") as opened:
            opened.seek(100)
            opened.write(bytes([content[100] ^ 1]))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nobody had been there
    else:
        file.write_bytes(content[: {"truncated": -7, "empty": len(content)}[how]] if how != "empty" else b"")


@pytest.mark.parametrize("how", ["gone", "altered", "truncated", "empty"])
@pytest.mark.parametrize("name", ["ids.bin", "store.json", "documents.npy"])
def test_a_damaged_store_is_made_anew(place, name, how):
    whole = prepared(place).encoded
    expected, file = whole.ids.clone(), stored(place).with_name(name)
    damage(file, how)
    again = prepared(place).encoded
    assert torch.equal(again.ids, expected)
    assert [*again.documents] == [0]


def test_a_survey_that_is_damaged_is_made_anew(place):
    card = prepared(place).corpus.card()
    [file] = (place / "cache" / "surveys").iterdir()
    for content in ("{", "[]", json.dumps({"sha256": "0"})):
        file.write_text(content)
        assert prepared(place).corpus.card() == card
    assert json.loads(file.read_text())["characters"] == len(TEXT)


def test_a_file_that_is_written_just_now_is_not_remembered(place, monkeypatch):
    monkeypatch.setattr(corpus, "RACY", 10**12)  # within the resolution of its times, another change would not show
    prepared(place)
    assert not (place / "cache" / "surveys").exists()


def test_a_text_that_changes_while_it_is_read_is_refused_and_leaves_nothing(place, monkeypatch):
    whole = store.write

    def write(*arguments: Any) -> Any:
        (place / "text.txt").write_text("x" + TEXT)
        return whole(*arguments)

    monkeypatch.setattr(store, "write", write)
    with pytest.raises(InputError, match="changed while it was read"):
        prepared(place)
    assert not [*(place / "cache" / "store").glob("*/")]


def test_without_room_nothing_is_written(place, monkeypatch):
    free = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(DiskError, match=r"cannot be kept in .*: .* KiB do not fit; make room, or name .* CHARLM_CACHE"):
        prepared(place)
    assert not [*(place / "cache" / "store").glob("*/")]


def test_a_disk_that_becomes_full_leaves_nothing(place, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"cannot be kept in .*: No space left on device; make room"):
        prepared(place)
    assert not [*(place / "cache" / "store").glob("*/")]


def test_a_cache_that_cannot_be_written_is_named(place, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("CHARLM_CACHE", str(place / "file"))
    with pytest.raises(DiskError, match=r"cannot be kept in .*file/store: .*CHARLM_CACHE"):
        prepared(place)


BUILD = """
import sys
from charlm.data import CharDataModule, corpus, reader
corpus.SMALL, reader.BLOCK = 100, 50
data = CharDataModule(path=sys.argv[1])
print("begins", flush=True)
data.setup()
print(data.tokenizer.decode(data.encoded.ids).encode().hex())
"""


def builder(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(folder / "text.txt")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_that_make_a_store_at_once_make_one(place):
    (place / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    both = [builder(place), builder(place)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert bytes.fromhex(out.split()[1]).decode() == TEXT * 20, err
    assert stored(place).is_file()


def build(text: str, cache: str) -> None:
    """Prepare the data in a process of its own."""
    os.environ["CHARLM_CACHE"] = cache
    corpus.SMALL, reader.BLOCK = 100, 50
    CharDataModule(path=text).setup()


def test_a_store_that_is_killed_while_it_is_made_is_never_used(place):
    (place / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    rng = np.random.default_rng(0)
    interrupted = 0
    for _ in range(30):
        process = context.Process(target=build, args=(str(place / "text.txt"), str(place / "cache")))
        process.start()
        process.join(rng.uniform(0, 0.3))
        interrupted += process.is_alive()
        os.kill(process.pid or 0, rng.choice([signal.SIGKILL, signal.SIGTERM])) if process.is_alive() else None
        process.join()
        for manifest in (place / "cache" / "store").glob("*/store.json"):
            if manifest.parent.suffix != ".partial":
                assert json.loads(manifest.read_text())["n"] == len(TEXT) * 100
                shutil.rmtree(manifest.parent)
    assert interrupted > 3
    data = prepared(place)
    assert data.tokenizer.decode(data.encoded.ids) == TEXT * 100
    assert not [*(place / "cache" / "store").glob("*.partial")]


# Reading


@given(text=st.text(st.characters(exclude_categories=["Cs"])), size=st.integers(4, 40))
def test_pieces_are_whole_characters_whatever_their_size(text, size):
    before, reader.BLOCK = reader.BLOCK, size
    try:
        whole = [*blocks(Path("a"), io.BytesIO(text.encode()))]
        again = [*pieces_of(text.encode())]
    finally:
        reader.BLOCK = before
    for pieces in (whole, again):
        assert "".join(piece.raw.decode() for piece in pieces).removeprefix("\ufeff") == text.removeprefix("\ufeff")
        assert all(0 < len(piece.raw) <= size + 3 for piece in pieces)
        assert [piece.begins for piece in pieces] == [True, *[False] * (len(pieces) - 1)][: len(pieces)]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_a_survey_tells_what_there_is(texts):
    text = "".join(texts)
    found = survey(Piece(part.encode(), number % 2 == 0) for number, part in enumerate(texts))
    assert found.characters == len(text)
    assert found.bytes == len(text.encode())
    assert found.alphabet == "".join(sorted({*text}))
    assert (found.documents, found.nuls, found.crlfs) == (-(-len(texts) // 2), text.count("\0"), text.count("\r\n"))


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress])
def test_a_packed_file_is_unpacked(place, pack):
    suffix = ".gz" if pack is gzip.compress else ".zst"
    (place / f"more.txt{suffix}").write_bytes(pack(TEXT.encode()))
    data = CharDataModule(path=str(place / f"more.txt{suffix}"))
    data.setup()
    assert data.tokenizer.decode(data.encoded.ids) == TEXT
    (place / f"more.txt{suffix}").write_bytes(pack(TEXT.encode())[:-20])
    load_corpus.cache_clear()
    with pytest.raises(InputError, match="cannot be unpacked"):
        CharDataModule(path=str(place / f"more.txt{suffix}")).setup()


def test_lines_of_json_are_documents(place):
    texts = ["one", "two\n", "", "three\nand four", "ő" * 200]
    lines = [json.dumps({"id": number, "body": text}) for number, text in enumerate(texts)]
    (place / "many.jsonl").write_text("\n".join(lines) + "\n\n")
    data = CharDataModule(path=str(place / "many.jsonl"), field="body", block_size=2)
    data.setup()
    assert data.tokenizer.decode(data.encoded.ids) == "one\ntwo\nthree\nand four\n" + "ő" * 200 + "\n"
    assert [*data.encoded.documents] == [0, 4, 8, 23]
    assert data.corpus.survey.documents == 4


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "it must be a JSON object with text"),
        ('{"text": 3}', "it must be a JSON object with text"),
        ("[1]", "it must be a JSON object with text"),
        ('{"a": "b", "c": "d"}', "it has a, c"),
    ],
)
def test_a_line_that_is_no_document_is_named(place, line, why):
    (place / "bad.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(InputError, match=rf"line 2 of .*bad.jsonl has no text in the field 'text' \({why}\): name"):
        CharDataModule(path=str(place / "bad.jsonl")).setup()


def test_each_file_of_a_folder_is_a_document(place):
    folder = place / "many"
    folder.mkdir()
    for name, text in {"a.txt": "one", "b.md": "", "c.txt": "two\n", "d.txt": "three" * 30}.items():
        (folder / name).write_text(text)
    data = CharDataModule(path=str(folder), block_size=2)
    data.setup()
    assert data.tokenizer.decode(data.encoded.ids) == "one\ntwo\n" + "three" * 30 + "\n"
    assert [*data.encoded.documents] == [0, 4, 8]


# Pairs


@given(ids=st.lists(st.integers(0, 299), min_size=2, max_size=300), size=st.integers(1, 40), dense=st.booleans())
def test_pairs_are_counted_in_blocks_as_at_once(ids, size, dense):
    import charlm.data.pairs as module

    before = module.BLOCK, module.DENSE
    module.BLOCK, module.DENSE = size, 10**9 if dense else size
    try:
        found = Pairs.of(torch.tensor(ids * (1000 if dense else 1), dtype=torch.int32), 300)
    finally:
        module.BLOCK, module.DENSE = before
    every = np.array(ids * (1000 if dense else 1))
    codes, counts = np.unique(every[:-1] * 300 + every[1:], return_counts=True)
    assert found.codes.tolist() == codes.tolist()
    assert found.counts.tolist() == counts.tolist()


def test_a_corpus_of_a_text_is_that_text():
    assert Corpus.of("a", TEXT, "here").text == TEXT
