"""Where text comes from: files as they stand, downloads only whole and true, and another corpus never unnoticed."""

import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.data import CharDataModule, corpora, corpus, download
from charlm.data.corpora import load_corpus
from charlm.data.reader import blocks
from charlm.errors import CorpusUnavailable, InputError
from charlm.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

ROOT = Path(__file__).parent.parent
# A proxy that refuses every connection at once, as a machine without internet does.
NO_NETWORK = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9") | {"no_proxy": "", "NO_PROXY": ""}


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    """A command reads its corpus once; each test is a command of its own."""
    load_corpus.cache_clear()
    yield
    load_corpus.cache_clear()


def decode(file: Path, raw: bytes) -> str:
    """The text of a file with this content."""
    return b"".join(piece.raw for piece in blocks(file, io.BytesIO(raw))).decode()


# Files


def test_a_file_is_read_as_it_stands(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("Zoë\r\nsaid\rso\n\ttwice  ".encode())
    found = load_corpus("text", str(file))
    assert found.text == "Zoë\r\nsaid\rso\n\ttwice  "
    assert found.name == "a.txt"
    assert found.source == str(file)


def test_a_file_may_have_any_name(tmp_path):
    (tmp_path / "source.py").write_text("print()\n")
    (tmp_path / "odd [1].txt").write_text("brackets\n")
    assert load_corpus("text", str(tmp_path / "source.py")).text == "print()\n"
    assert load_corpus("text", str(tmp_path / "odd [1].txt")).text == "brackets\n"


def test_a_relative_path_remembers_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert load_corpus("text", "a.txt").source == str(tmp_path / "a.txt")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("at home")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_corpus("text", "~/a.txt").text == "at home"


def test_a_byte_order_mark_at_the_start_is_no_text_and_one_inside_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo\n".encode())
    assert load_corpus("text", str(tmp_path / "a.txt")).text == "one\n\ufefftwo\n"


def test_every_file_of_a_folder_loses_its_byte_order_mark(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(f"\ufeff{name}\n".encode())
    assert load_corpus("text", str(tmp_path)).text == "a.txt\nb.txt\n"


LETTERS = st.text(st.characters(max_codepoint=0x24F, exclude_categories=["C"]), min_size=2)
ALPHABETS = ["abcdefghij", "éàçüñ abc", "жизнь и судьба", "αβγδε ζ", "\U0001f600 ok", "日本語 か\n"]
TEXTS = st.lists(st.sampled_from([*ALPHABETS, "word", "\n", ", "]) | LETTERS, min_size=3, max_size=20).map(" ".join)
WIDE = ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"]


@given(text=TEXTS, name=st.sampled_from(WIDE))
def test_a_wide_encoding_is_named_by_its_byte_order_mark_and_utf8_is_read(text, name):
    with pytest.raises(UnicodeError, match=f"is {name}.* iconv -f {name} -t UTF-8 'a b.txt' > NEW"):
        decode(Path("a b.txt"), ("\ufeff" + text).encode(name))
    for encoding in ("utf-8", "utf-8-sig"):
        assert decode(Path("a.txt"), text.encode(encoding)) == text


@given(
    text=st.text(st.characters(max_codepoint=0xFF, exclude_categories=["C"]), min_size=4), name=st.sampled_from(WIDE)
)
def test_a_wide_encoding_of_latin_letters_is_named_without_a_mark(text, name):
    with pytest.raises(UnicodeError, match=f"iconv -f {name} "):
        decode(Path("a.txt"), text.encode(name))


@pytest.mark.parametrize("name", WIDE)
def test_a_wide_encoding_of_other_alphabets_is_named_without_a_mark(name):
    for text in ("жизнь и судьба\n" * 9, "αβγδε ζ\n" * 9, "שלום עולם\n" * 9):
        with pytest.raises(UnicodeError, match=f"iconv -f {name} "):
            decode(Path("a.txt"), text.encode(name))


@pytest.mark.parametrize(
    ("raw", "advice"),
    [
        ("Le café où l'on mange déjà\n".encode("latin-1") * 9, "may be LATIN1, .*iconv -f LATIN1 -t UTF-8 a.txt > NEW"),
        ("“Quoted” text – with dashes\n".encode("cp1252") * 9, "may be WINDOWS-1252, .*iconv -f WINDOWS-1252"),
        ("жизнь и судьба\n".encode("koi8-r") * 9, "find its encoding, .*iconv -f ENCODING"),
        ("こんにちは世界\n".encode("shift-jis") * 9, "find its encoding, .*iconv -f ENCODING"),
        ("déjà vu où\n".encode() * 9 + b"\xe9", "some of its bytes are damaged, .*iconv -c -f UTF-8 -t UTF-8 a.txt"),
        (zlib.compress(bytes(range(256)) * 20), "binary"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "binary"),
        (b"\x7fELF\2\1\1" + bytes(99) + b"\xff\xfe", "binary"),
    ],
)
def test_what_is_not_utf8_is_refused_with_what_to_do(raw, advice):
    with pytest.raises(UnicodeError, match=f"a.txt is not UTF-8: byte 0x.. at offset \\d+; .*{advice}"):
        decode(Path("a.txt"), raw)


def test_the_conversion_of_a_packed_file_unpacks_it():
    with pytest.raises(UnicodeError, match=r"gunzip -c a.txt.gz \| iconv -f LATIN1 -t UTF-8 > NEW"):
        decode(Path("a.txt.gz"), "déjà vu, again and again".encode("latin-1"))


@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1", "cp1252"])
def test_the_command_that_is_suggested_converts_the_file(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    text = "Le café où l'on mange déjà" + " “à toute heure”" * (encoding != "latin-1")
    Path("it's old.txt").write_bytes(text.encode(encoding))
    with pytest.raises(InputError) as refusal:
        load_corpus("text", "it's old.txt")
    subprocess.run(["sh", "-c", str(refusal.value).rpartition("with ")[2]], check=True)
    assert load_corpus("text", "NEW").text == text


def test_nuls_and_windows_line_ends_are_text_but_pointed_out_once(train, tmp_path, prose):
    (tmp_path / "odd.txt").write_text(prose[:2000].replace("\n", "\r\n") + "\0", newline="")
    settings = ["trainer=cpu", "data=text", "data.path=odd.txt", "trainer.max_steps=2", "evaluate=[val]"]
    ended = train(*settings, "hydra.run.dir=run")
    assert ended.code == 0
    nuls, ends = ended.err.splitlines()
    assert nuls.startswith("charlm: odd.txt contains 1 NUL characters, ")
    assert nuls.endswith(r"tr -d '\000' < FILE > NEW")
    assert ends.startswith(f"charlm: odd.txt has {prose[:2000].count(chr(10))} line ends of Windows (\\r\\n), ")
    assert ends.endswith(r"tr -d '\r' < FILE > NEW")
    log = (tmp_path / "run" / "train.log").read_text()
    assert all(log.count(line.removeprefix("charlm: ")) == 1 for line in (nuls, ends))
    ended = train("-m", *settings, "seed=1,2", "hydra.sweep.dir=sweep")
    assert (ended.code, ended.err.splitlines()) == (0, [nuls, ends])


def test_plain_text_is_not_pointed_out():
    assert [*corpus.Corpus.of("a", "one\ntwo\rthree\t\n", "a").cautions()] == []


def test_gz_is_unpacked(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("packed, Zoë\r\n".encode()))
    (tmp_path / "b.txt").write_text("plain\n")
    assert load_corpus("text", str(tmp_path / "a.txt.gz")).text == "packed, Zoë\r\n"
    assert load_corpus("text", str(tmp_path)).text == "packed, Zoë\r\nplain\n"


def test_a_folder_gives_its_texts_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("c.md", "a.txt", "b.rst", "deep/er/d.text", "z.text.gz"):
        raw = f"{name}\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    for name in ("image.png", "main.py", "txt", "a.txt~"):
        (tmp_path / name).write_bytes(b"\xff not text")
    assert load_corpus("text", str(tmp_path)).text == "a.txt\nb.rst\nc.md\ndeep/er/d.text\nz.text.gz\n"


def test_a_glob_gives_what_it_matches_in_the_order_of_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.py", "a.py", "c.txt", "deep/d.py"):
        (tmp_path / name).write_text(f"{name}\n")
    assert load_corpus("text", str(tmp_path / "*.py")).text == "a.py\nb.py\n"
    assert load_corpus("text", str(tmp_path / "**" / "*.py")).text == "a.py\nb.py\ndeep/d.py\n"
    assert load_corpus("text", str(tmp_path / "[bc].*")).text == "b.py\nc.txt\n"


def test_joined_files_end_in_a_newline_and_empty_ones_add_nothing(tmp_path):
    for name, content in {"a.txt": "no end", "b.txt": "", "c.txt": "end\n", "d.txt": "crlf\r\n"}.items():
        (tmp_path / name).write_bytes(content.encode())
    assert load_corpus("text", str(tmp_path)).text == "no end\nend\ncrlf\r\n"
    assert load_corpus("text", str(tmp_path / "a.txt")).text == "no end"


def test_a_corpus_knows_its_hash(tmp_path):
    (tmp_path / "a.txt").write_text("Zoë", encoding="utf-8")
    card = load_corpus("text", str(tmp_path / "a.txt")).card()
    assert card["sha256"] == hashlib.sha256("Zoë".encode()).hexdigest()
    assert card["characters"] == 3


def test_a_file_is_read_once_in_a_command(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first = load_corpus("text", str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").unlink()
    assert load_corpus("text", str(tmp_path / "a.txt")) is first


def test_pydoc_needs_no_download_and_is_always_the_same():
    found = load_corpus("pydoc")
    load_corpus.cache_clear()
    assert found.text == load_corpus("pydoc").text
    assert found.name == "pydoc"
    assert len(found.text) > 300_000
    assert "The Python" in found.text


# Tiny Shakespeare

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 200


@dataclass
class Server:
    """Answers every request with `body` or the part that is asked for, and perhaps cuts it off."""

    url: str = ""
    body: bytes = PLAY
    status: int = 200
    cut_after: int | None = None
    gives_parts: bool = True
    asked: list[str | None] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.asked)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.gives_parts else 0
            status = state.status if state.status != 200 else 206 if start else 200
            self.send_response(416 if start >= len(state.body) else status)
            self.send_header("Content-Length", str(len(state.body) - start))
            self.end_headers()
            self.wfile.write(state.body[start : state.cut_after])

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{listening.server_address[1]}/input.txt"
    thread = Thread(target=listening.serve_forever, args=(0.05,))
    thread.start()
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Path:
    """Where the download of a stand-in for Tiny Shakespeare belongs, on a machine where it is not yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CHARLM_DATA", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    monkeypatch.setattr(download, "NETWORK_TIMEOUT", (0.5, 0.5))
    monkeypatch.setattr(download, "BLOCK", 1024)
    return tmp_path / "cache" / "charlm" / "tinyshakespeare" / "input.txt"


def files(folder: Path) -> list[Path]:
    return [place for place in folder.rglob("*") if place.is_file() and ".command" not in place.parts]


def test_a_download_reaches_the_cache_and_is_not_repeated(cached, server):
    assert load_corpus("tinyshakespeare").text == PLAY.decode()
    assert cached.read_bytes() == PLAY
    load_corpus.cache_clear()
    found = load_corpus("tinyshakespeare")
    assert (found.name, found.text, found.source) == ("tinyshakespeare", PLAY.decode(), str(cached))
    assert server.requests == 1


def test_a_good_file_in_the_cache_needs_no_network(cached, server):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(PLAY)
    assert load_corpus("tinyshakespeare").text == PLAY.decode()
    assert server.requests == 0


def test_a_damaged_file_in_the_cache_is_replaced(cached, server):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(PLAY[:-1])
    assert load_corpus("tinyshakespeare").text == PLAY.decode()
    assert cached.read_bytes() == PLAY


def test_a_damaged_file_in_the_cache_is_not_used_where_no_other_is_to_be_had(cached, server):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(PLAY[:-1])
    server.status = 503
    with pytest.raises(CorpusUnavailable, match="503"):
        load_corpus("tinyshakespeare")


def test_a_download_of_another_hash_is_refused_and_leaves_no_file(cached, server, tmp_path):
    server.body = b"<html>Please log in to this network</html>"
    with pytest.raises(CorpusUnavailable, match="another sha256"):
        load_corpus("tinyshakespeare")
    assert files(tmp_path) == []


def test_a_download_goes_on_where_it_was_cut_off(cached, server, tmp_path):
    server.cut_after = 4096
    with pytest.raises(CorpusUnavailable, match="connection"):
        load_corpus("tinyshakespeare")
    assert not cached.exists()
    server.cut_after = None
    assert load_corpus("tinyshakespeare").text == PLAY.decode()
    assert server.asked == [None, "bytes=4096-"]


def test_a_server_that_gives_no_parts_is_asked_for_the_whole(cached, server, tmp_path):
    server.cut_after, server.gives_parts = 4096, False
    with pytest.raises(CorpusUnavailable, match="connection"):
        load_corpus("tinyshakespeare")
    server.cut_after = None
    assert load_corpus("tinyshakespeare").text == PLAY.decode()


def test_a_file_that_was_whole_when_the_command_ended_is_taken(cached, server):
    cached.parent.mkdir(parents=True)
    cached.with_name("input.txt.part").write_bytes(PLAY)
    assert load_corpus("tinyshakespeare").text == PLAY.decode()
    assert server.asked == [f"bytes={len(PLAY)}-"]


def test_an_error_of_the_server_is_told(cached, server, tmp_path):
    server.status = 404
    with pytest.raises(CorpusUnavailable, match="404"):
        load_corpus("tinyshakespeare")
    assert files(tmp_path) == []


def test_a_refused_connection_is_told(cached, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", f"http://127.0.0.1:{closed}/input.txt")
    with pytest.raises(CorpusUnavailable, match="no connection") as told:
        load_corpus("tinyshakespeare")
    assert "\n" not in str(told.value)
    assert "data=pydoc" in str(told.value)
    assert files(tmp_path) == []


def test_a_server_that_never_answers_is_given_up(cached, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(corpora, "SHAKESPEARE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/input.txt")
        start = time.monotonic()
        with pytest.raises(CorpusUnavailable, match="no answer"):
            load_corpus("tinyshakespeare")
        assert time.monotonic() - start < 5
    assert files(tmp_path) == []


def test_nobody_waits_long_for_a_network_that_is_not_there():
    to_connect, to_answer = download.NETWORK_TIMEOUT
    assert to_connect <= 5
    assert to_answer <= 10


def test_a_cache_that_cannot_be_written_is_told(cached, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(CorpusUnavailable, match="could not be had"):
        load_corpus("tinyshakespeare")


def test_the_data_folder_comes_before_cache_and_network(cached, server, tmp_path, monkeypatch):
    file = tmp_path / "data" / "tinyshakespeare" / "input.txt"
    file.parent.mkdir(parents=True)
    file.write_bytes(PLAY)
    monkeypatch.setenv("CHARLM_DATA", str(tmp_path / "data"))
    found = load_corpus("tinyshakespeare")
    assert (found.name, found.text, found.source) == ("tinyshakespeare", PLAY.decode(), str(file))
    assert server.requests == 0
    assert not cached.exists()


def test_a_data_folder_without_the_file_leads_to_the_cache(cached, server, tmp_path, monkeypatch):
    monkeypatch.setenv("CHARLM_DATA", str(tmp_path))
    assert load_corpus("tinyshakespeare").source == str(cached)


def test_another_text_in_the_data_folder_is_not_taken_for_tiny_shakespeare(cached, server, tmp_path, monkeypatch):
    file = tmp_path / "data" / "tinyshakespeare" / "input.txt"
    file.parent.mkdir(parents=True)
    file.write_bytes(PLAY.replace(b"\n", b"\r\n"))
    monkeypatch.setenv("CHARLM_DATA", str(tmp_path / "data"))
    with pytest.raises(InputError, match="is not Tiny Shakespeare") as told:
        load_corpus("tinyshakespeare")
    assert not isinstance(told.value, CorpusUnavailable)
    assert server.requests == 0


def test_tiny_shakespeare_is_the_one_of_the_lecture(shakespeare):
    found = load_corpus("tinyshakespeare")
    assert found.text == shakespeare
    assert len(found.text) == 1_115_394
    assert len(set(found.text)) == 65
    assert found.survey.sha256 == corpora.SHAKESPEARE_SHA256


# Corpora of the field


WIKI = ("[[Zoë]] is a town in Ænglish text.\n" * 3000).encode()


def archive(kind: str) -> bytes:
    """A zip file or a tar file in the shape of the real ones."""
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as members:
            members.writestr("enwik8", WIKI[:-2])  # ends within no character; cut off as the real one is
        return packed.getvalue()
    with tarfile.open(fileobj=packed, mode="w:gz") as members:
        for part, text in {"train": b"a b _ c \n" * 100, "valid": b"b _ a \n" * 40, "test": b"c _ c \n" * 50}.items():
            entry = tarfile.TarInfo(f"./simple-examples/data/ptb.char.{part}.txt")
            entry.size = len(text)
            members.addfile(entry, io.BytesIO(text))
    return packed.getvalue()


@pytest.fixture
def wiki(cached, server, monkeypatch) -> Path:
    """Where a stand-in for enwik8 belongs, on a machine where it is not yet; the split falls into a character."""
    server.body = archive("zip")
    split = (WIKI.index("ë".encode(), 60_000) + 1, WIKI.index(b"text", 80_000))
    known = corpora.Archive(server.url, f"sha256:{hashlib.sha256(WIKI[:-2]).hexdigest()}", split)
    monkeypatch.setitem(corpora.ARCHIVES, "enwik8", known)
    return cached.parent.parent / "enwik8" / "enwik8"


def test_enwik8_is_downloaded_once_and_cut_at_its_published_bytes(wiki, server):
    for _ in range(2):
        load_corpus.cache_clear()
        data = CharDataModule("enwik8", val_fraction=None, tokenizer=ByteTokenizer.from_corpus)
        data.setup()
        split = corpora.ARCHIVES["enwik8"].split
        sizes = [len(data.splits[name]) for name in ("train", "val", "test")]
        assert sizes == [split[0] - 1, split[1] - split[0] + 1, len(WIKI) - 2 - split[1]]  # between two characters
        assert bytes(data.splits["test"]) == WIKI[split[1] : -2]
    assert server.requests == 1
    assert wiki.read_bytes() == WIKI[:-2]


def test_each_tokenizer_cuts_enwik8_at_the_same_character(wiki):
    texts = []
    for tokenizer in (ByteTokenizer, CharTokenizer, BPETokenizer):
        data = CharDataModule("enwik8", val_fraction=None, tokenizer=tokenizer.from_corpus)
        data.setup()
        texts.append([data.tokenizer.decode(part) for part in data.splits.values()])
    assert texts[0] == texts[1] == texts[2]
    assert "".join(texts[0]).encode() == WIKI[:-2]


def test_enwik8_may_be_cut_at_any_other_place(wiki):
    data = CharDataModule("enwik8", val_fraction=0.1, tokenizer=ByteTokenizer.from_corpus)
    data.setup()
    assert [*data.splits] == ["train", "val"]


def test_another_file_is_not_taken_for_enwik8(wiki, tmp_path, monkeypatch):
    load_corpus("enwik8")
    wiki.write_bytes(WIKI[:-3])
    load_corpus.cache_clear()
    assert b"".join(piece.raw for piece in load_corpus("enwik8").read()) == WIKI[:-2]  # unpacked again
    other = tmp_path / "data" / "enwik8" / "enwik8"
    other.parent.mkdir(parents=True)
    other.write_bytes(WIKI)
    monkeypatch.setenv("CHARLM_DATA", str(tmp_path / "data"))
    load_corpus.cache_clear()
    with pytest.raises(CorpusUnavailable, match="this is not enwik8: its sha256 begins"):
        load_corpus("enwik8")


def test_a_damaged_archive_is_told(wiki, server):
    server.body = b"<html>Please log in to this network</html>"
    with pytest.raises(CorpusUnavailable, match="the archive of enwik8 is damaged"):
        load_corpus("enwik8")
    assert not wiki.exists()


def test_offline_one_is_told_where_to_put_the_file(wiki, server):
    server.status = 404
    with pytest.raises(
        CorpusUnavailable, match=r"could not be had \(404.*put http.* at .*/enwik8/input.txt or \$CHARLM"
    ):
        load_corpus("enwik8")


def test_penn_treebank_is_not_downloaded_and_read_where_it_is(cached, monkeypatch):
    content = archive("tar")
    known = corpora.Archive("http://x/simple.tgz", f"md5:{hashlib.md5(content).hexdigest()}", (0, 0), download=False)
    monkeypatch.setitem(corpora.ARCHIVES, "ptb_char", known)
    with pytest.raises(
        CorpusUnavailable, match=r"licence does not allow that: if you have it, put http://x/simple.tgz"
    ):
        load_corpus("ptb_char")
    place = cached.parent.parent / "ptb_char" / "simple.tgz"
    place.parent.mkdir(parents=True)
    place.write_bytes(content[:-1])
    with pytest.raises(CorpusUnavailable, match="this is not ptb_char: its md5 begins"):
        load_corpus("ptb_char")
    place.write_bytes(content)
    for _ in range(2):
        load_corpus.cache_clear()
        data = CharDataModule("ptb_char", val_fraction=None)
        data.setup()
        assert data.tokenizer.decode(data.splits["train"]) == "ab c\n" * 100
        assert data.tokenizer.decode(data.splits["val"]) == "b a\n" * 40
        assert data.tokenizer.decode(data.splits["test"]) == "c c\n" * 50
        place.unlink(missing_ok=True)  # it is unpacked by now


def test_a_text_without_a_published_split_needs_a_fraction(text_file):
    data = CharDataModule(path=str(text_file), val_fraction=None)
    with pytest.raises(InputError, match=r"published split, and prose\.txt has none: give a number"):
        data.setup()


# Where it cannot be had


def hparams(run: Path) -> dict[str, str]:
    """The texts among the settings in the HPARAMS tab of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(run)).Reload()
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(start).session_start_info.hparams
    return {name: value.string_value for name, value in values.items()}


def test_without_network_a_run_trains_on_pydoc_and_all_of_it_says_so(train, tmp_path):
    from charlm import checkpoint

    ended = train("trainer.max_steps=20", "evaluate=[val]", **NO_NETWORK)
    assert ended.code == 0, ended.err
    assert ended.out.count("ANOTHER CORPUS") == 1
    assert "NOT tinyshakespeare: this run trains on the pydoc corpus instead." in ended.out
    assert ended.out.index("ANOTHER CORPUS") < ended.out.index("corpus    pydoc")
    [run] = (tmp_path / "outputs").iterdir()
    assert run.name.endswith("_pydoc_bigram")
    assert "pydoc: " in (run / "train.log").read_text()
    assert json.loads((run / "results.json").read_text())["corpus"] == "pydoc"
    kept = checkpoint.load(run)
    assert kept.corpus["name"] == kept.config["data"]["corpus"] == "pydoc"
    assert kept.corpus["sha256"] == load_corpus("pydoc").survey.sha256
    assert hparams(run)["data"] == "pydoc"
    for record in (run / ".hydra").iterdir():
        assert "corpus: tinyshakespeare" not in record.read_text()


def test_in_a_sweep_the_notice_is_shown_once_and_every_job_says_pydoc(train, tmp_path):
    quick = ["trainer.max_steps=2", "callbacks=none", "logger=none", "evaluate=[val]"]
    ended = train("-m", "optimizer.lr=1e-3,1e-2", *quick, **NO_NETWORK)
    assert ended.code == 0, ended.err
    assert ended.out.count("ANOTHER CORPUS") == 1
    jobs = sorted(place.parent for place in (tmp_path / "outputs").glob("*_sweep/*/results.json"))
    assert len(jobs) == 2
    for job in jobs:
        assert json.loads((job / "results.json").read_text())["corpus"] == "pydoc"
        assert "corpus    pydoc: " in (job / "terminal.log").read_text()
        assert "ANOTHER CORPUS" not in (job / "terminal.log").read_text()


def test_a_mistake_goes_before_another_corpus(check):
    for command in (["optimizer.lr=abc"], ["-m", "optimizer.lr=1e-3,abc"]):
        ended = check(*command, **NO_NETWORK)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("charlm: optimizer.lr=abc is not possible")


@pytest.mark.parametrize("override", ["data.fallback=null", "experiment=lecture_bigram"])
def test_without_a_fallback_a_missing_corpus_is_an_error_and_nothing_is_written(check, tmp_path, override):
    ended = check(override, **NO_NETWORK)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("charlm: Tiny Shakespeare could not be had (no connection to the proxy)")
    assert ended.err.count("\n") == 1
    assert files(tmp_path) == []
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("recipe", sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_a_recipe_never_falls_back_to_another_corpus(recipe):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("train", [f"experiment={recipe}"]).data.fallback is None
