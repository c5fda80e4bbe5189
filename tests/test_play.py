"""The page of `charlm play`: the text of `charlm generate`, for this machine only, whatever is sent to it."""

import http.client
import json
import math
import random
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import charlm.play
from benchmarks.play import Browser, browser, generated, programs, until
from charlm.checkpoint import Checkpoint
from charlm.data import CharDataModule
from charlm.data.corpora import load_corpus
from charlm.errors import InputError
from charlm.generate import continuation
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.model.ngram import NGram
from charlm.play import server
from charlm.play.copies import SHORTEST, Copies, Spans
from charlm.play.generation import LONGEST, LONGEST_PROMPT, Settings, characters
from charlm.play.player import Player, Text, label, load
from charlm.study.inspection import points
from charlm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from tests.conftest import ROOT, Process

VISITORS = 20


def player_of(model: nn.Module, tokenizer: Tokenizer) -> Player:
    """A checkpoint whose training text is not at hand."""
    loaded = Checkpoint(Path("none"), 0, model.eval(), tokenizer, {}, {"name": "no text"})
    return Player("a model", loaded, [label(token) for token in tokenizer.tokens], None, "no text")


@contextmanager
def serving(players: Sequence[Player], most: int = server.MOST_AT_ONCE) -> Iterator[int]:
    """The server, in a thread; its port."""
    with server.listen(0) as listener:
        port: int = listener.getsockname()[1]
        served = server.server(server.application(players, port, most))
        thread = threading.Thread(target=served.run, args=([listener],))
        thread.start()
        try:
            until(lambda: served.started)
            yield port
        finally:
            served.should_exit = True
            thread.join()


def ask(port: int, method: str = "POST", path: str = "/generate", body: Any = None, **headers: str) -> tuple[int, str]:
    """Send a request and return status and content of the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    named = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, content, named)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def read(port: int, **settings: Any) -> list[dict[str, Any]]:
    """Generate, and return the characters of the stream, which has to be complete."""
    status, content = ask(port, body=settings)
    assert status == 200, content
    *events, end, rest = (event for event in content.split("\r\n\r\n") if not event.startswith(":"))  # no pings
    assert (end, rest) == ("event: end\r\ndata: ", "")
    return [found for event in events for found in json.loads(event.removeprefix("data: "))]


def text(found: list[dict[str, Any]]) -> str:
    return "".join(one["text"] for one in found)


@pytest.fixture(scope="module")
def player(trained: Path) -> Player:
    return load(trained, "cpu")


@pytest.fixture(scope="module")
def port(player: Player) -> Iterator[int]:
    with serving([player]) as its:
        yield its


SETTINGS: list[dict[str, Any]] = [
    {},
    {"seed": 5, "length": 40},
    {"prompt": "def ", "temperature": 0.7, "top_k": 5},
    {"prompt": "a\nb", "top_p": 0.6, "seed": 2**62},
    {"prompt": "T", "temperature": 0, "length": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_text_is_that_of_charlm_generate(port, trained, call, settings):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    ended = call("generate", str(trained), "--json", *options)
    [expected] = json.loads(ended.out)["samples"]
    assert settings.get("prompt", "") + text(read(port, **settings)) == expected


def test_a_text_goes_on_from_any_of_its_characters_as_charlm_generate_does(port, player):
    begun = "T" + text(read(port, prompt="T", length=30))
    for place in (1, 12, 31):
        expected = continuation(player.loaded.model, player.loaded.tokenizer, 25, begun[:place], seed=3)
        assert text(read(port, prompt=begun[:place], length=25, seed=3)) == expected


def test_surprise_and_alternatives_are_the_models_own_next_to_what_was_counted(port, player, prose):
    train, tokenizer = prose[: int(0.9 * len(prose))], player.loaded.tokenizer
    found = read(port, prompt="e", temperature=0.3, top_k=2, length=60)
    pairs, firsts = Counter(pairwise(train)), Counter(train[:-1])
    before = "e"
    for one in found:
        logits = player.loaded.model(tokenizer.encode(before).long()[None])[0, -1]
        p = dict(zip(tokenizer.decode(torch.arange(tokenizer.vocab_size)), logits.softmax(0).tolist(), strict=True))
        assert one["bits"] == pytest.approx(-math.log2(p[one["text"]]), abs=1e-3)
        labels = [name for name, *_ in one["next"]]
        assert one["text"] in labels
        assert set(sorted(p, key=lambda name: -p[name])[:8]) <= set(labels)
        for name, its, counted in one["next"]:
            assert its == pytest.approx(p[name], abs=1e-4)
            assert counted == pytest.approx(pairs[before, name] / firsts[before], abs=1e-4)
        assert [row[1] for row in one["next"]] == sorted((row[1] for row in one["next"]), reverse=True)
        before = one["text"]


PIECES = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 60)), min_size=1, max_size=6)


@given(st.text("ab", min_size=40, max_size=150), PIECES)
def test_a_copied_span_is_one_of_train_and_none_is_missed(train, pieces):
    written = "c".join(train[start : start + length] for start, length in pieces)
    copies = Copies(Spans(points(train)))
    for end in range(1, len(written) + 1):
        length = copies.add(written[end - 1])
        assert written[end - length : end] in train
        assert length == 0 or length >= SHORTEST
        if end >= SHORTEST and written[end - SHORTEST : end] in train:
            assert length


def test_a_text_shorter_than_a_span_has_none():
    copies = Copies(Spans(points("short")), "short")
    assert copies.add("short" * 10) == 0


def test_what_a_model_of_long_contexts_writes_is_copied(text_file):
    data = CharDataModule(path=str(text_file))
    data.setup()
    model = NGram(data.vocab_size, 12)
    model.count(data.splits["train"])
    train = Text(data.pairs("train"), Spans(points(data.tokenizer.decode(data.splits["train"]))))
    known = replace(player_of(model, data.tokenizer), text=train)
    written = list(characters(known, Settings(length=300, temperature=0.0)))
    source = text_file.read_text()
    whole = text(written)
    assert any(one["copied"] for one in written)
    for end, one in enumerate(written, 1):
        assert whole[max(0, end - one["copied"]) : end] in source


def test_a_character_of_several_tokens_comes_once():
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    of_bytes = player_of(Bigram(256), tokenizer)
    found = list(characters(of_bytes, Settings(length=200, prompt="é")))
    assert text(found) == continuation(of_bytes.loaded.model, tokenizer, 200, "é")
    assert all(one["text"] for one in found)
    assert any(name.startswith("0x") for one in found for name, *_ in one["next"])


def test_without_its_text_a_checkpoint_still_plays(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    load_corpus.cache_clear()
    other = trained.parent / "prose.txt"
    hidden = other.rename(other.with_suffix(".hidden"))
    try:
        known = load(run, "cpu")
    finally:
        hidden.rename(other)
        load_corpus.cache_clear()
    assert known.text is None
    assert "prose.txt" in str(known.card()["missing"])
    found = list(characters(known, Settings(length=20)))
    assert text(found) == continuation(known.loaded.model, known.loaded.tokenizer, 20)
    assert all(row[2] is None for one in found for row in one["next"])


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"9" * 10_000, "is no JSON"),
        (b"[]", "no JSON object"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "\u20ac"}, "U+20AC"),
        ({"prompt": "\ud800"}, "U+D800"),
        ({"prompt": "a" * (LONGEST_PROMPT + 1)}, "give at most 20,000"),
        ({"prompt": 3}, "prompt=3 is not possible: give a text or null"),
        ({"length": 0}, "length=0 is not possible"),
        ({"length": LONGEST + 1}, "of at most 5000"),
        ({"temperature": -1}, "temperature=-1 is not possible"),
        (b'{"temperature": NaN}', "temperature=nan is not possible"),
        ({"top_p": 0}, "top_p=0 is not possible: give a number above 0 and of at most 1 or null"),
        ({"top_k": True}, "top_k=True is not possible"),
        ({"seed": 2**63}, "seed="),
        ({"seed": "1" * 10_000}, "seed has a value that is too long"),
        ({"modle": 0}, "modle is no setting: choose among model, prompt, length"),
        ({"model": 1}, "model=1 is not there: give a number below 1"),
    ],
    ids=repr,
)
def test_a_wrong_setting_is_one_line(port, body, line):
    status, content = ask(port, body=body)
    assert status == 400
    assert line in content
    assert content.count("\n") == 1
    assert len(content) < 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "example.org"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Host": "localhost.example.org:{port}"},
        {"Origin": "http://example.org"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://localhost:{port}"},  # another origin to a browser than 127.0.0.1
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused(port, headers):
    filled = {name: value.format(port=port) for name, value in headers.items()}
    status, content = ask(port, body={"length": 1}, **filled)
    assert status == 403
    assert content.startswith("refused: ")
    assert content.count("\n") == 1
    if "Sec_Fetch_Mode" not in headers:  # a link may lead to the page
        assert ask(port, "GET", "/", **filled)[0] == 403


def test_the_page_itself_is_served_and_heard(port):
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert ask(port, "GET", "/", Host=host, Sec_Fetch_Site="none")[0] == 200
        assert ask(port, body={"length": 1}, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200


def test_other_addresses_and_methods_are_one_line(port):
    for method, path, status in (
        *(("GET", "/nothing", 404), ("GET", "/../../etc/passwd", 404), ("GET", "/generate/", 404)),
        *(("GET", "/generate", 405), ("POST", "/", 405), ("DELETE", "/", 405), ("OPTIONS", "/generate", 405)),
    ):
        found, content = ask(port, method, path)
        assert (found, content.count("\n")) == (status, 1)
    assert ask(port, Content_Type="text/plain")[0] == 415


def test_it_listens_on_this_machine_only(port):
    with server.listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def raw(port: int, content: bytes, end: str = "half") -> bytes:
    """Send bytes as they are, then close one half of the connection, or all of it, or nothing; return the answer."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, suppress(ConnectionError):
        connection.sendall(content)
        if end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return found
        if end == "half":
            with suppress(OSError):  # the server has closed it already
                connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            found += part
    return found


def request(port: int, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = ["POST /generate HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_a_request_is_bounded_in_size_and_time(port, monkeypatch):
    answer = raw(port, request(port, b"{", length=10**9), end="open")
    assert answer.startswith(b"HTTP/1.1 413")
    chunk = b"%x\r\n%s\r\n" % (10**6, b"x" * 10**6)
    chunked = request(port, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + chunk
    assert raw(port, chunked)[:12] in (b"HTTP/1.1 413", b"")  # the connection may be closed before all is sent
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    answer = raw(port, request(port, b"{", length=100), end="open")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"not complete after 0.2 seconds" in answer


class Slow(nn.Module):
    """A model that counts its steps, each of a millisecond."""

    block_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 3)
        self.steps = 0

    def forward(self, idx):
        time.sleep(0.001)
        self.steps += 1
        return self.table(idx)


@pytest.mark.parametrize("end", ["close", "reset", "half"])
def test_generation_stops_when_the_visitor_leaves(end):
    model = Slow()
    with serving([player_of(model, CharTokenizer("abc"))]) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(request(port, b'{"length": 5000}'))
            seen = b""
            while seen.count(b"data: ") < 3:
                seen += connection.recv(65536)
            if end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif end == "half":
                connection.shutdown(socket.SHUT_WR)
        until(lambda: still(model), seconds=10)
        assert model.steps < 4000


def still(model: Slow) -> bool:
    """Whether no step is taken any more."""
    before = model.steps
    time.sleep(0.2)
    return model.steps == before


def test_a_visitor_who_does_not_read_loses_the_place_and_others_are_told_when_all_are_taken(monkeypatch):
    monkeypatch.setattr(server, "SEND_SECONDS", 0.5)
    torch.manual_seed(0)
    known = player_of(Bigram(200), CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 200)))))
    with serving([known], most=1) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", port))
        connection.sendall(request(port, b'{"length": 5000}'))
        assert connection.recv(10)
        status, content = ask(port, body={"length": 3})
        assert (status, content) == (503, "1 texts are being generated already: try again in a moment\n")
        until(lambda: ask(port, body={"length": 3})[0] == 200, seconds=20)


def test_a_model_that_fails_ends_its_own_stream_only(capfd):
    class Failing(Slow):
        """Fails at its fifth step."""

        def forward(self, idx):
            if self.steps == 4:
                raise RuntimeError("first line\nsecond line")
            return super().forward(idx)

    with serving([player_of(Failing(), CharTokenizer("abc")), player_of(Slow(), CharTokenizer("abc"))]) as port:
        status, content = ask(port, body={"length": 50})
        assert (status, content.split("\r\n\r\n")[-2]) == (200, 'event: failed\r\ndata: "first line; second line"')
        assert ask(port, body={"length": 50})[0] == 500  # before its first character
        assert len(read(port, model=1, length=50)) == 50
    assert capfd.readouterr().err == "charlm: a request failed: RuntimeError: first line; second line\n"


def visit(port: int, players: Sequence[Player], seconds: float, number: int) -> int:
    """Generate again and again, each time with another seed, and compare; return how many texts came."""
    end, count = time.monotonic() + seconds, 0
    model = number % len(players)
    known = players[model]
    while not count or time.monotonic() < end:
        seed, length = 1000 * number + count, 60 + number
        expected = continuation(known.loaded.model, known.loaded.tokenizer, length, "e", seed=seed)
        assert text(read(port, model=model, seed=seed, length=length, prompt="e")) == expected
        count += 1
    return count


def crowd(player: Player, seconds: float) -> None:
    """Serve visitors, half of them with a model that keeps a cache of what it has seen."""
    torch.manual_seed(0)
    tokenizer = player.loaded.tokenizer
    players = [player, player_of(GPT(tokenizer.vocab_size, 32, 2, 2, 32), tokenizer)]
    with serving(players) as port, ThreadPoolExecutor(VISITORS) as pool:
        counts = [*pool.map(lambda number: visit(port, players, seconds, number), range(VISITORS))]
    assert min(counts) >= 1


def test_twenty_visitors_get_their_own_texts(player):
    crowd(player, seconds=1)


@pytest.mark.slow
def test_twenty_visitors_for_a_minute(player, capfd):
    crowd(player, seconds=60)
    assert capfd.readouterr().err == ""


def hostile(port: int, luck: random.Random) -> tuple[bytes, str]:
    """A request that no browser sends for the page, and how its connection ends."""
    body = luck.choice(
        [
            b"[" * luck.randrange(1, 150_000),
            b'{"prompt": "' + b"\\ud800" * luck.randrange(1, 20_000) + b'"}',
            b'{"seed": ' + b"9" * luck.randrange(1, 6000) + b"}",
            b'{"temperature": 1e-300, "length": 50}',
            b'{"temperature": -Infinity}',
            b'{"length": 1e9}',
            b'{"length": 5000}',
            json.dumps({luck.choice(["prompt", "top_k", "model", "__class__"]): [{}]}).encode(),
            luck.randbytes(luck.randrange(3000)),
            b"",
        ]
    )
    whole = request(port, body)
    others = {
        "binary": luck.randbytes(luck.randrange(1, 5000)),
        "huge header": b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX: " % port + b"y" * luck.randrange(10**6),
        "many headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * luck.randrange(20_000) + b"\r\n",
        "huge body": request(port, b"z" * luck.randrange(10**6)),
        "long promise": request(port, body, length=10 ** luck.randrange(3, 30)),
        "no number": request(port, body).replace(b"Content-Length: ", b"Content-Length: -"),
        "chunks": request(port, b"zz\r\nnot hexadecimal\r\n", "Transfer-Encoding: chunked"),
        "origin": request(port, b"{}", f"Origin: {luck.choice(['null', 'http://a.example', '', 'http://[', '%00'])}"),
        "host": whole.replace(b"127.0.0.1", luck.choice([b"evil.example", b"", b"127.0.0.1@evil", b"\xff"])),
        "two hosts": request(port, b"{}", "Host: evil.example"),
        "upgrade": b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n" % port,
        "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + luck.randbytes(50),
        "old": b"GET /\r\n\r\n",
        "method": b"%s / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n"
        % (luck.choice([b"TRACE", b"CONNECT", b"PUT", b"G\x00T", b"A" * 5000]), port),
        "path": b"GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n"
        % (luck.choice([b"//", b"/%00", b"/%ff%fe", b"http://evil/", b"*", b"/?" + b"a" * 5000]), port),
        "pipeline": whole * luck.randrange(2, 20),
        "cut": whole[: luck.randrange(len(whole))],
        "whole": whole,
    }
    return luck.choice([*others.values()]), luck.choice(["half", "half", "reset"])


def attack(begun: Process, count: int) -> None:
    port = int(begun.line("open ").split(":")[2].split("/")[0])

    def send(number: int) -> bytes:
        content, end = hostile(port, random.Random(number))
        return raw(port, content, end)

    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(send, range(count))]
    assert not [answer for answer in answers if b"Traceback" in answer or b"HTTP/1.1 500" in answer]
    statuses = {answer[9:12] for answer in answers}
    assert {b"400", b"403"} <= statuses
    assert statuses <= {b"", b"200", b"400", b"403", b"404", b"405", b"413", b"415", b"503"}
    assert ask(port, "GET", "/")[0] == 200
    assert len(read(port, length=50)) == 50
    begun.send_signal(signal.SIGINT)
    ended = begun.end()
    assert (ended.code, ended.err) == (0, "")


@pytest.fixture
def played(trained: Path, tmp_path: Path) -> Iterator[Process]:
    begun = Process(["charlm", "play", str(trained), "--port", "0"], tmp_path, {"CUDA_VISIBLE_DEVICES": ""})
    yield begun
    begun.kill()


def test_hostile_requests_leave_the_server_well_and_silent(played):
    attack(played, 60)


@pytest.mark.slow
def test_five_hundred_hostile_requests(played):
    attack(played, 500)


@pytest.mark.parametrize(
    ("number", "code", "err"),
    [
        (signal.SIGINT, 0, ""),
        (signal.SIGTERM, 143, "charlm: stopped by SIGTERM before the end\n"),
        (signal.SIGHUP, 129, "charlm: stopped by SIGHUP before the end\n"),
    ],
)
def test_a_signal_ends_it_in_a_line_while_a_text_is_generated_and_ctrl_c_quietly(played, number, code, err):
    port = int(played.line("open ").split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request(port, b'{"length": 5000}'))
        assert connection.recv(100)
        played.send_signal(number)
        ended = played.end(30)
    assert (ended.code, ended.err) == (code, err)
    assert ended.out == f"open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends it\n"


def test_a_port_in_use_and_a_missing_run_and_package_are_one_line(call, trained, monkeypatch):
    with server.listen(0) as taken:
        port = taken.getsockname()[1]
        ended = call("play", str(trained), "--port", str(port))
    assert ended.code == 2
    assert ended.err == (
        f"charlm: --port {port} cannot be used (Address already in use): choose another one, or --port 0 for one "
        f"that is free\n"
    )
    ended = call("play", "nowhere", "--port", "0")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert call("play", str(trained), "--port", "70000").code == 2
    monkeypatch.delattr(charlm.play, "server")
    monkeypatch.delitem(sys.modules, "charlm.play.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ended = call("play", str(trained))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "charlm: charlm play needs packages that are not there (uvicorn): pip install 'charlm[play]'\n"


def test_a_browser_is_opened_only_if_asked_for(call, trained, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(server, "serve", lambda players, listener: None)
    assert call("play", str(trained), "--port", "0").code == 0
    assert not opened
    shown = call("play", str(trained), str(trained), "--port", "0", "--open").out
    assert shown == f"open {opened[0]} in a browser; Ctrl-C ends it\n"


def test_the_page_is_one_file_that_asks_for_nothing_else_and_wheels_carry_it(port):
    status, content = ask(port, "GET", "/")
    assert status == 200
    assert "://" not in content
    assert "@import" not in content
    assert 'src="' not in content
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    carried = {ROOT / package.replace(".", "/") / name for package, names in tools.items() for name in names}
    others = [file for file in (ROOT / "charlm").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert set(others) == carried


def test_a_name_in_the_page_stays_text(player):
    named = Player("</script><b>&", player.loaded, player.labels, None, "<img>")
    content = bytes(server.page([named]).body).decode()
    assert "</script><b>" not in content
    assert "<img>" not in content


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if None in programs():
        pytest.skip("no browser: needs chromium and chromedriver, such as from apt-get install chromium-driver")
    with browser() as started:
        yield started


TEXT = "return [...document.querySelectorAll('.text')].map(text => text.textContent)"
FOCUS = "return +document.activeElement.dataset.place"


def test_a_browser_generates_inspects_stops_and_continues(chromium, player, trained):
    model, tokenizer = player.loaded.model, player.loaded.tokenizer
    with serving([player, load(trained, "cpu")]) as port:
        chromium.emulate(1280, 900)
        chromium.go(f"http://127.0.0.1:{port}/")
        for name, value in {"prompt": "The ", "seed": "7", "top_p": "0.9", "length": "80"}.items():
            chromium.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)
        chromium.click("#generate")
        generated(chromium)
        expected = "The " + continuation(model, tokenizer, 80, "The ", seed=7, top_p=0.9)
        assert chromium.run(TEXT) == [expected] * 2
        # Colours are there, and a character of the prompt has none.
        heat = "return [0, 10].map(i => document.querySelectorAll('.text span')[i].style.getPropertyValue('--heat'))"
        given, its = chromium.run(heat)
        assert given == ""
        assert 0 <= float(its) <= 1
        # Hovering shows what could have come.
        [ninth] = chromium.run("return [document.querySelectorAll('.text span')[8]]")
        move = [{"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": ninth}]
        chromium.ask("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": move}])
        rows = "return [...document.querySelectorAll('#panel tbody tr')].map(row => row.textContent)"
        assert len(chromium.run(rows)) >= 8
        # With keys alone: along the text, choose, continue.
        chromium.run("document.querySelector('.text span').focus()")
        chromium.press(*["\ue014"] * 5)  # right
        assert chromium.run(FOCUS) == 5
        chromium.press("\ue012")  # left
        assert chromium.run(FOCUS) == 4
        aloud = chromium.run("return document.getElementById('live').textContent")
        assert "bits" in aloud
        assert "counted" in aloud
        assert chromium.run("return document.querySelectorAll('.text span[tabindex=\"0\"]').length") == 2
        chromium.press("\ue007")  # Enter offers to continue
        assert chromium.run("return document.activeElement.id") == "continue"
        chromium.press("\ue007")
        generated(chromium)
        again = expected[:5] + continuation(model, tokenizer, 80, expected[:5], seed=7, top_p=0.9)
        assert chromium.run(TEXT) == [again, expected]
        # A mistake is one line.
        chromium.run("document.getElementById('prompt').value = '\u20ac'")
        chromium.click("#generate")
        generated(chromium)
        assert "U+20AC" in chromium.run("return document.querySelector('.status').textContent")
        others = "return performance.getEntriesByType('resource').map(one => one.name)"
        assert set(chromium.run(others)) == {f"http://127.0.0.1:{port}/generate"}
        complaints = [line for line in chromium.complaints() if "400 (Bad Request)" not in line]
        assert complaints == []


def test_the_stop_button_and_leaving_the_page_stop_the_model(chromium):
    model = Slow()
    with serving([player_of(model, CharTokenizer("abc"))]) as port:
        for leave in (lambda: chromium.click("#stop"), lambda: chromium.go("about:blank")):
            chromium.go(f"http://127.0.0.1:{port}/")
            chromium.run("document.getElementById('length').value = 5000")
            chromium.click("#generate")
            until(lambda: len(chromium.run(TEXT)[0]) > 20)
            before = model.steps
            leave()
            until(lambda: still(model), seconds=20)
            assert model.steps < before + 3000


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_fits_a_phone_and_has_every_text_and_label_in_both_languages(chromium, port, language):
    chromium.emulate(360, 740, dark=True)
    chromium.go(f"http://127.0.0.1:{port}/")
    chromium.click(f"[data-language={language}]")
    chromium.run("document.getElementById('length').value = 200")
    chromium.click("#generate")
    generated(chromium)
    assert chromium.run("return document.documentElement.scrollWidth") <= 360
    assert chromium.run("return document.documentElement.lang.slice(0, 2)") == language
    assert chromium.run("return Object.keys(TEXTS.en).join() === Object.keys(TEXTS.zh).join()")
    unnamed = """return [...document.querySelectorAll('button, input, textarea, summary, [role=listbox]')].filter(one =>
      !one.textContent.trim() && !one.labels?.[0]?.textContent.trim() && !one.getAttribute('aria-label')).length"""
    assert chromium.run(unnamed) == 0
    assert "undefined" not in chromium.run("return document.body.innerText")
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert chromium.run(paper) == "rgb(22, 23, 24)"
    chromium.emulate(360, 740)
    assert chromium.run(paper) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_the_contrast_of_wcag_also_on_the_strongest_surprise(chromium, port, dark):
    chromium.emulate(1280, 900, dark)
    chromium.go(f"http://127.0.0.1:{port}/")
    colour = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"

    def rgb(name: str) -> list[float]:
        found = chromium.run(colour, name)
        if found.startswith("#"):
            digits = found[1:] if len(found) == 7 else "".join(2 * digit for digit in found[1:])
            return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        return [float(part) / 255 for part in found.split(",")]

    def luminance(mixed: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in mixed]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: list[float], other: list[float]) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    strongest = float(chromium.run("return STRONGEST"))
    hot = [strongest * h + (1 - strongest) * p for h, p in zip(rgb("--hot"), rgb("--paper"), strict=True)]
    assert contrast(rgb("--ink"), hot) >= 4.5
    for back in ("--paper", "--card"):
        for name in ("--ink", "--pale", "--loud"):
            assert contrast(rgb(name), rgb(back)) >= 4.5
        assert contrast(rgb("--line"), rgb(back)) >= 3
    assert contrast(rgb("--on-accent"), rgb("--accent")) >= 4.5


def test_settings_are_those_of_the_command():
    with pytest.raises(InputError, match="no JSON"):
        Settings.read(b"null")
    assert Settings.read(b"{}") == Settings()
