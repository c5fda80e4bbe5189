"""Files that are whole or refused, whoever wrote them and whatever the disk did; two generations; the command."""

import copy
import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from charlm import checkpoint
from charlm.callbacks import AtomicCheckpointIO, AtSteps, Checkpoint
from charlm.checkpoint import archive
from charlm.errors import DiskError, InputError
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.tokenizer import CharTokenizer
from tests.conftest import ROOT
from tests.test_callbacks import fit, flat  # noqa: F401
from tests.test_model import MODELS, recipe

GPT_NODE = {"_target_": "charlm.model.gpt.GPT", "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}


def content_of(model: str = "bigram", step: int = 3) -> dict[str, Any]:
    """A checkpoint of a small model."""
    torch.manual_seed(step)
    tokenizer = CharTokenizer("abcdefghij")
    node = GPT_NODE if model == "gpt" else {"_target_": "charlm.model.bigram.Bigram"}
    made = GPT(10, 8, 1, 1, 4) if model == "gpt" else Bigram(10)
    config = {"model": dict(node), "data": {"path": None}, "evaluate": ["val"]}
    record = checkpoint.record(config, tokenizer, {"name": "a", "source": "a.txt", "sha256": "0" * 64})
    weights = OrderedDict((f"model.{name}", weight) for name, weight in made.state_dict().items())
    return {"global_step": step, "state_dict": weights, "optimizer_states": [{"state": {}}], "charlm": record}


def write(folder: Path, step: int) -> Path:
    path = folder / checkpoint.LAST
    checkpoint.write(content_of(step=step), path)
    return path


def flip(path: Path, place: int = -500) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_file_is_one_that_every_reader_of_safetensors_understands(tmp_path):
    content = content_of("gpt")
    path = write(tmp_path, 3)
    checkpoint.write(content, path)
    weights = load_file(path)
    wanted = {name.removeprefix("model."): weight for name, weight in content["state_dict"].items()}
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in wanted.items())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    raw = path.read_bytes()
    assert metadata["charlm_format"] == str(archive.FORMAT)
    assert json.loads(metadata["content"])["charlm"] == content["charlm"]
    assert metadata["sha256"] == archive.stored_hash(path)
    assert metadata["sha256"] == hashlib.sha256(raw.replace(metadata["sha256"].encode(), b"")).hexdigest()
    assert checkpoint.load(path).step == 3


@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_of_an_earlier_version_is_refused_with_what_to_do(tmp_path, hashed):
    """Later versions had a SHA-256 as the comment of the zip."""
    old = content_of()
    old["charlm"]["format"] = 1
    path = tmp_path / "old.ckpt"
    torch.save(old, path)
    if hashed:
        raw = path.read_bytes()
        path.write_bytes(raw[:-2] + b"\x47\0sha256:" + hashlib.sha256(raw).hexdigest().encode())
    for reader in (checkpoint.load, archive.stored_hash, archive.outline):
        with pytest.raises(InputError, match=r"old\.ckpt .*an earlier charlm") as told:
            reader(path)
        assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="train again, rerun=RUN"):
        checkpoint.load(path)
    with pytest.raises(InputError, match="an earlier charlm"):
        archive.load_lightning(path)


def test_a_file_of_a_later_version_is_refused(tmp_path):
    raw = dumped(content_of()).replace(b'"charlm_format":"4"', b'"charlm_format":"5"', 1)
    (tmp_path / "x.ckpt").write_bytes(sealed(raw))
    with pytest.raises(InputError, match="has format 5, and this charlm reads format 4"):
        checkpoint.load(tmp_path / "x.ckpt")


def test_a_file_of_lightning_itself_is_read_where_it_is_asked_for(tmp_path):
    content, path = content_of(), tmp_path / "lightning.ckpt"
    torch.save(content, path)
    for reader in (archive.load_lightning, AtomicCheckpointIO().load_checkpoint):
        assert same(reader(path), content)
    for damage in (b"", b"PK", path.read_bytes()[:-100], path.read_bytes()[:900] + bytes(99)):
        (tmp_path / "damaged.ckpt").write_bytes(damage)
        with pytest.raises(InputError, match=r"damaged\.ckpt "):
            archive.load_lightning(tmp_path / "damaged.ckpt")
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as after:
        for record in before.infolist():
            after.writestr(record.filename, before.read(record))
    with pytest.raises(InputError, match="its records are not as"):
        archive.load_lightning(tmp_path / "bomb")


def same(one: Any, other: Any) -> bool:
    """Are types and values the same, to the bit?"""
    if isinstance(one, torch.Tensor):
        raw = [archive.bytes_of(t).tobytes() for t in (one, other)]
        return (one.dtype, one.shape, raw[0]) == (other.dtype, other.shape, raw[1])
    if isinstance(one, dict):
        keys = zip(one, other, strict=True)
        return isinstance(other, dict) and all(same(*key) for key in keys) and same([*one.values()], [*other.values()])
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(struct.pack(">d", one) == struct.pack(">d", other)) if type(one) is float else bool(one == other)


KEYS: Any = st.one_of(
    st.text(max_size=8), st.sampled_from(["$tensor", "$", "", "\ud800"]), st.integers(), st.floats(), st.none()
)
KEYS |= st.tuples(st.integers(), st.text(max_size=3))
TENSORS: Any = st.builds(
    lambda dtype, shape, turned: (
        torch.arange(12).to(dtype).reshape(shape).mT if turned else torch.ones(shape).to(dtype)
    ),
    st.sampled_from([*archive.NAMES]),
    st.sampled_from([(3, 4), (12, 1), (2, 6)]),
    st.booleans(),
)
TENSORS |= st.sampled_from([torch.tensor(-0.0), torch.zeros(0, 3), torch.tensor([float("nan"), float("inf")])])
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**4000), 2**4000) | st.floats() | st.text() | TENSORS
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200)
@given(st.dictionaries(KEYS, PLAIN, max_size=4))
def test_what_is_written_is_read_again_to_the_bit(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.ckpt")
        path.write_bytes(dumped(content))
        assert same(archive.load(path), content)
        outline = archive.outline(path)
        assert repr(outline.keys()) == repr(content.keys())


def test_tied_weights_are_stored_once_under_all_of_their_names(tmp_path):
    weight = torch.randn(1000)
    content = {"state_dict": {"model.a": weight, "model.b": weight.view(1000), "model.c": weight[:10]}}
    path = tmp_path / "x.ckpt"
    path.write_bytes(dumped(content))
    assert path.stat().st_size < 5000
    found = archive.load(path)["state_dict"]
    assert found["model.a"] is found["model.b"]
    assert same(found, content["state_dict"])


class Keeper(L.Callback):
    """Keeps something for itself."""

    def __init__(self, state: dict[Any, Any]):
        self.state = state

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        self.state = state_dict


class Strange:
    """An object with unknown content."""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros(2), "numpy.ndarray"),
        (np.float64(1), "numpy.float64"),
        (Strange(), "test_checkpoint.Strange"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(2, device="meta"), "Tensor without plain numbers"),
        (torch.eye(2).to_sparse(), "Tensor without plain numbers"),
    ],
)
def test_the_state_of_a_callback_that_no_file_can_hold_ends_training_at_its_start(fit, tmp_path, value, words):  # noqa: F811
    with pytest.raises(
        InputError, match=rf"the state of the callback Keeper holds .*{re.escape(words)} at a\.1\.2"
    ) as told:
        fit([Checkpoint(str(tmp_path)), Keeper({"a": [1, {2: value}]})], 9)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "last.ckpt").exists()


def test_the_state_of_a_callback_may_be_any_plain_data(fit, tmp_path):  # noqa: F811
    state = {"inf": [float("inf"), -0.0], 3: (torch.eye(2), None, {"deep": {5: 2**100}}), "text": "\x1b"}

    fit([Checkpoint(str(tmp_path)), Keeper(state)], 9)
    again = Keeper({})
    fit([Checkpoint(str(tmp_path)), again], 12, tmp_path / "last.ckpt")
    assert same(again.state, state)


def test_a_state_that_holds_itself_is_refused():
    with pytest.raises(InputError, match="nested deeper than 64 levels"):
        dumped({"callbacks": {"a": circular()}})


def test_any_bit_of_a_file_that_is_flipped_is_noticed(tmp_path):
    path = write(tmp_path, 3)
    raw = path.read_bytes()
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            archive.load(path)


def test_damage_to_the_last_generation_costs_the_steps_since_the_one_before(tmp_path, capsys):
    for step in (1, 2, 3):
        path = write(tmp_path, step)
    assert checkpoint.load(tmp_path).step == 3
    assert capsys.readouterr().err == ""
    flip(path)
    found = checkpoint.read_newest(tmp_path, quiet=True)
    assert (found.path.name, found.content["global_step"]) == ("previous.ckpt", 2)
    assert [line.split(" is damaged")[0] for line in found.damaged] == [str(path)]
    assert checkpoint.load(tmp_path).step == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{path} is damaged" in told
    assert "using " + str(tmp_path / "previous.ckpt") in told
    path.unlink()
    assert checkpoint.load(tmp_path).step == 2
    flip(tmp_path / "previous.ckpt")
    flip(write(tmp_path, 4))
    with pytest.raises(InputError, match=r"last\.ckpt is damaged.* and .*previous\.ckpt is damaged") as told_twice:
        checkpoint.load(tmp_path)
    assert "\n" not in str(told_twice.value)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
@pytest.mark.parametrize("damaged", [None, "last.ckpt", "previous.ckpt"])
def test_at_every_instant_of_writing_a_whole_generation_stands(tmp_path, monkeypatch, links, damaged):
    """A kill leaves the folder as it is between two calls of the system: each such state is copied and read."""
    run = tmp_path / "run"
    states: list[Path] = []
    run.mkdir()
    for step in (1, 2):
        write(run, step)
    if damaged:
        flip(run / damaged)

    def copy_of_now() -> Path:
        folder = tmp_path / str(len(states))
        folder.mkdir()
        for path in run.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    def watched(name):
        real = getattr(os, name)

        def call(*arguments, **settings):
            if name == "link" and not links:
                raise OSError(errno.EPERM, "no links here")
            states.append(copy_of_now())
            result = real(*arguments, **settings)
            states.append(copy_of_now())
            return result

        return call

    with monkeypatch.context() as patched:
        for name in ("link", "replace", "fsync", "chmod"):
            patched.setattr(os, name, watched(name))
        write(run, 3)
    assert len(states) >= 8
    before = 1 if damaged == "last.ckpt" else 2
    steps = [checkpoint.read_newest(state).content["global_step"] for state in states]
    assert steps == sorted(steps)
    assert {*steps} == {before, 3}
    if damaged != "last.ckpt":
        assert all((state / "last.ckpt").is_file() for state in states)
    assert sorted(p.name for p in run.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_what_a_killed_writer_left_half_is_cleared_away_by_the_next(tmp_path):
    (tmp_path / ".partial-abc123").write_bytes(b"half")
    write(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def save(folder: Path, step: int) -> None:
    AtomicCheckpointIO().save_checkpoint(content_of(step=step), folder / checkpoint.LAST)


def test_a_full_disk_loses_no_generation_wherever_it_becomes_full(tmp_path):
    """A limit on the size of files ends a write in the middle, as a full disk and a quota do."""
    write(tmp_path, 1)
    size = write(tmp_path, 2).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lost = 0
    for limit in [0, 1, *range(100, size - 1, size // 40), size - 72, size - 71, size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DiskError) as told:
                save(tmp_path, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "File too large" in str(told.value)
        assert "the previous one is intact" in str(told.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
        lost += checkpoint.load(tmp_path).step != 2 or checkpoint.load(tmp_path / "previous.ckpt").step != 1
    assert lost == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a file system")
def test_a_small_disk_that_is_full_keeps_what_it_has(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        for step in (1, 2):
            write(disk, step)
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2**20))
        for room in range(0, 24):
            with filler.open("r+b") as file:
                file.truncate(max(0, filler.stat().st_size - (512 * room) % 4096))
            kept = {path.name: path.read_bytes() for path in disk.glob("*.ckpt")}
            with pytest.raises(DiskError, match=r"No space left on device.*the previous one is intact"):
                save(disk, 3)
            assert {path.name: path.read_bytes() for path in disk.glob("*.ckpt")} == kept
            assert sorted(p.name for p in disk.iterdir()) == ["filler", "last.ckpt", "previous.ckpt"]
            checkpoint.load(disk)
            with pytest.raises(OSError, match="No space left"), filler.open("ab") as file:
                file.write(bytes(2**20))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_takes_no_file_is_told_with_what_to_do(tmp_path):
    (tmp_path / "a_file").touch()
    with pytest.raises(DiskError, match=r"a_file/last\.ckpt could not be .*there is none from before.*hydra\.run\.dir"):
        save(tmp_path / "a_file", 1)


def test_a_folder_that_vanishes_while_saving_is_told(tmp_path, monkeypatch):
    def gone(*_: object) -> None:
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(os, "fsync", gone)
    with pytest.raises(DiskError, match="No such file or directory"):
        save(tmp_path / "run", 1)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_whose_disk_becomes_full_ends_with_one_line(tmp_path, text_file, devices):
    settings = ["data=text", f"data.path={text_file}", "logger=none", "hydra.run.dir=run", "trainer.max_steps=40"]
    settings += ["callbacks.checkpoint.every_n_steps=10"]
    settings += ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"] if devices == 2 else ["trainer=cpu"]
    # Limit on the size of a file in kilobytes; a coverage measurement would need more.
    limited = (
        f"unset COVERAGE_PROCESS_START; ulimit -f 20; exec {sys.executable} {ROOT / 'train.py'} {' '.join(settings)}"
    )
    ended = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr + ended.stdout
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "run/checkpoints/last.ckpt could not be written (File too large)" in ended.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert "Traceback" not in (tmp_path / "run" / "train.log").read_text()


def test_a_clock_saves_beside_the_steps_and_changes_no_bit(fit, tmp_path):  # noqa: F811
    saved: dict[str, list[int]] = {}

    class Noted(Checkpoint, AtSteps):
        """Notes when it saves."""

        def save(self, trainer: Any) -> None:
            saved.setdefault(self.path.parent.name, []).append(trainer.global_step)
            super().save(trainer)

    often, seldom = Noted(str(tmp_path / "often"), 1000, 1e-9), Noted(str(tmp_path / "seldom"), 1000, 1e9)
    with_clock = flat(fit([often], 60, log_every_n_steps=20))
    assert torch.equal(with_clock, flat(fit([seldom], 60, log_every_n_steps=20)))
    assert saved == {"often": [0, 20, 40, 60], "seldom": [0, 60]}
    contents = [archive.load(tmp_path / name / "last.ckpt") for name in ("often", "seldom")]
    for part in ("state_dict", "optimizer_states", "global_step"):
        torch.testing.assert_close(contents[0][part], contents[1][part], rtol=0, atol=0)


# Files of strangers


class Command:
    """A pickle of this makes a folder when it is loaded by a reader that trusts it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("code_was_run",)


def sealed(raw: bytes) -> bytes:
    """The same with the hash that a forger would put in it."""
    begin, end = raw[: archive.HASH_AT], raw[archive.HASH_AT + archive.HASH_SIZE :]
    return begin + hashlib.sha256(begin + end).hexdigest().encode() + end


def dumped(content: Any) -> bytes:
    file = io.BytesIO()
    archive.dump(content, file)
    return file.getvalue()


def taken_apart(raw: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def put_together(header: bytes, data: bytes) -> bytes:
    return sealed(len(header).to_bytes(8, "little") + header + data)


def forged(raw: bytes, change: Any) -> bytes:
    """The same file after `change` of its header and its content, with a hash that is right."""
    header, data = taken_apart(raw)
    content = json.loads(header["__metadata__"]["content"])
    change(header, content)
    header["__metadata__"]["content"] = json.dumps(content)
    return put_together(json.dumps(header, separators=(",", ":")).encode(), data)


def random_damage(raw: bytes, draw: random.Random) -> bytes:
    """One of the things that disks, copies and hands do to a file. Its hash stays."""
    damaged, place = bytearray(raw), draw.randrange(len(raw))
    kind = draw.choice(["cut", "flip", "zeros", "noise", "insert", "swap", "append"])
    if kind == "cut":
        return raw[:place]
    if kind == "flip":
        damaged[place] ^= 1 << draw.randrange(8)
    elif kind in ("zeros", "noise"):
        n = min(draw.choice([1, 16, 512]), len(raw) - place)
        damaged[place : place + n] = bytes(n) if kind == "zeros" else draw.randbytes(n)
    elif kind == "insert":
        damaged[place:place] = draw.randbytes(draw.choice([1, 100]))
    elif kind == "swap":
        size = min(64, place, len(raw) - place)
        damaged[place - size : place], damaged[place : place + size] = (
            raw[place : place + size],
            raw[place - size : place],
        )
    else:
        damaged += draw.randbytes(draw.choice([1, 22, 93]))
    return bytes(damaged)


def forged_noise(raw: bytes, draw: random.Random) -> bytes:
    """Damage to the header, the content or the numbers, under a hash that is right."""
    if draw.random() < 0.3:  # most of it is no JSON
        damaged = bytearray(raw)
        for _ in range(draw.choice([1, 1, 3])):
            damaged[draw.randrange(archive.HASH_AT + archive.HASH_SIZE, len(raw))] = draw.randrange(256)
        return sealed(bytes(damaged))

    def change(header: dict[str, Any], content: dict[str, Any]) -> None:
        node: Any = draw.choice([header, content, content])
        while True:
            children = [*node] if isinstance(node, dict) else [*range(len(node))]
            children = [key for key in children if key not in ("__metadata__", "sha256", "charlm_format")]
            if not children:
                return
            key = draw.choice(children)
            if not isinstance(node[key], dict | list) or draw.random() < 0.3:
                break
            node = node[key]
        if draw.random() < 0.2:
            del node[key]
        else:
            node[key] = draw.choice([*NOISE, *(node[other] for other in children)])

    return forged(raw, change)


NOISE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**40,
    2**64,
    1e308,
    "",
    "F32",
    "F64",
    "\x1b[1m",
    [],
    {},
    [0],
    [2**62, 2**62],
    [-1, 4],
]
NOISE += [{"$tensor": "head.weight"}, {"$tensor": []}, {"$tuple": 5}, {"$dict": [[[], 1]]}, {"$dict": 3}, {"$int": "x"}]
NOISE += [{"$int": "f" * 10**5}, {"$float": "00"}, {"$float": "7ff0000000000000"}, {"$what": 1}, {"$tuple": [1, 2]}]


def outcome(path: Path, raw: bytes) -> str:
    """`refused` in one line, or `loaded`; anything else fails the test."""
    path.write_bytes(raw)
    told = ""
    try:
        checkpoint.load(path)
    except InputError as error:
        told = str(error)
    assert told.isprintable()
    assert str(path) in told or not told
    return "refused" if told else "loaded"


def peak() -> int:
    """Bytes of memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_no_damage_and_no_forgery_ends_in_anything_but_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bases = [dumped(content_of("bigram")), dumped(content_of("gpt"))]
    path, draw = tmp_path / "x.ckpt", random.Random(1)
    assert [outcome(path, raw) for raw in bases] == ["loaded"] * 2
    before, slowest = peak(), 0.0
    found: dict[str, list[Any]] = {"damaged": [], "forged": []}
    for trial in range(1200):
        raw = bases[trial % 2]
        kind = ("damaged", "forged", "forged")[trial % 3]
        mutated = random_damage(raw, draw) if kind == "damaged" else forged_noise(raw, draw)
        start = time.process_time()
        found[kind].append(mutated != raw and outcome(path, mutated))
        slowest = max(slowest, time.process_time() - start)
    assert {*found["damaged"]} <= {"refused", False}
    assert {*found["forged"]} <= {"refused", "loaded", False}
    assert not (tmp_path / "code_was_run").exists()
    assert peak() - before < 2e8
    assert slowest < 5


def with_part(place: str, value: Any, model: str = "bigram") -> bytes:
    content = copy.deepcopy(content_of(model))
    *path, last = place.split("/")
    node: Any = content
    for name in path:
        node = node[name]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return dumped(content)


def circular() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


PLACES = ["global_step", "state_dict", "charlm", "charlm/format", "charlm/config", "charlm/tokenizer", "charlm/corpus"]
PLACES += ["charlm/config/model", "charlm/config/data", "charlm/config/evaluate", "charlm/tokenizer/name"]
PLACES += ["charlm/tokenizer/points", "charlm/corpus/sha256", "charlm/config/model/_target_"]
PLACES += ["state_dict/model.token_embedding_table.weight"]
WRONG = [KeyError, None, float("nan"), -1, True, torch.zeros(2), "\x1b[1m\n", [None], {"a": 1}]


@pytest.mark.parametrize("place", PLACES)
def test_a_part_that_is_missing_or_of_another_type_is_refused(tmp_path, place):
    may: dict[str, list[Any]] = {"charlm/config/data": [{"a": 1}], "charlm/corpus/sha256": ["\x1b[1m\n"]}
    for number, value in enumerate(WRONG):
        if not any(value is one or value == one for one in may.get(place, [])):
            assert outcome(tmp_path / "x.ckpt", with_part(place, value)) == "refused", number


TARGETS = ["os.system", "torch.nn.Linear", "charlm.model.gpt.nn.Linear", "charlm.model.gpt.Block", "charlm.cli.main"]
TARGETS += ["charlm.model.gpt.os", "charlm.model..", "charlm.model.bigram:Bigram.load_state_dict", "antigravity.fly"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_names_no_other_model_than_those_of_charlm(tmp_path, target):
    assert outcome(tmp_path / "x.ckpt", with_part("charlm/config/model/_target_", target)) == "refused"
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("setting", ["n_layer", "n_embd", "block_size", "n_head", "dropout", "bias", "nosuch"])
@pytest.mark.parametrize("value", [10**9, 10**18, -1, "8", 0.5, None, {"_target_": "os.getcwd"}])
def test_settings_that_do_not_suit_the_weights_are_refused_before_memory_is_taken(tmp_path, setting, value):
    if setting == "dropout" and value == 0.5:
        return
    before, start = peak(), time.process_time()
    assert outcome(tmp_path / "x.ckpt", with_part(f"charlm/config/model/{setting}", value, "gpt")) == "refused"
    assert peak() - before < 1e8
    assert time.process_time() - start < 5


@pytest.mark.parametrize("read", [checkpoint.load, archive.load_lightning, AtomicCheckpointIO().load_checkpoint])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_run(tmp_path, monkeypatch, read, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(content_of() | {"extra": Command()}, "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"x\.ckpt "):
        read(Path("x.ckpt"))
    assert not (tmp_path / "code_was_run").exists()


WEIGHT = "token_embedding_table.weight"


def weight(**changes: Any) -> Any:
    return lambda header, content: header[WEIGHT].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        weight(shape=[2**31, 2**31]),
        weight(shape=[2**62, 2**62]),
        weight(shape=[-10, -10]),
        weight(shape=[10, 10, 10**9, 0]),
        weight(shape=[True, 100]),
        weight(shape=None),
        weight(dtype="F64"),
        weight(dtype="F4"),
        weight(dtype="O"),
        weight(data_offsets=[0, 2**60]),
        weight(data_offsets=[-4, 396]),
        weight(data_offsets=[400, 0]),
        weight(data_offsets=[4, 404]),
        lambda header, content: header.update(other=header[WEIGHT]),
        lambda header, content: header.pop(WEIGHT),
        lambda header, content: content["state_dict"].update({f"model.{WEIGHT}": {"$tensor": "another"}}),
        lambda header, content: content.update(more={"$tensor": {}}),
        lambda header, content: content.clear(),
        lambda header, content: header["__metadata__"].update(more=5),
    ],
)
def test_a_claim_that_the_file_does_not_keep_is_refused_before_memory_is_taken(tmp_path, change):
    raw, before = dumped(content_of()), peak()
    for changed in (forged(raw, change), forged(raw, change) + bytes(2**16)):
        assert outcome(tmp_path / "x.ckpt", changed) == "refused"
    assert peak() - before < 5e7


@pytest.mark.parametrize("claim", [0, 1, 64, 2**20, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused_before_memory_is_taken(tmp_path, claim):
    raw, before = dumped(content_of()), peak()
    for data in (raw[8:], raw[8:] + bytes(2**21)):
        assert outcome(tmp_path / "x.ckpt", sealed(claim.to_bytes(8, "little") + data)) == "refused"
    assert peak() - before < 5e7


@pytest.mark.parametrize(
    "content", ["[" * 10**5, "[" * 500 + "]" * 500, "[]", "1", "", "{", "NaN", '{"a":Infinity}', "9" * 10**6]
)
def test_content_that_is_no_checkpoint_is_refused(tmp_path, content):
    header, data = taken_apart(dumped(content_of()))
    header["__metadata__"]["content"] = content
    raw = put_together(json.dumps(header, separators=(",", ":")).encode(), data)
    assert outcome(tmp_path / "x.ckpt", raw) == "refused"


def test_many_names_of_one_weight_make_no_large_model(tmp_path):
    content = content_of("gpt")
    content["charlm"]["config"]["model"]["n_layer"] = 400
    weights = {
        name.replace("blocks.0", f"blocks.{i}"): w for i in range(400) for name, w in content["state_dict"].items()
    }
    before = peak()
    assert outcome(tmp_path / "x.ckpt", dumped(content | {"state_dict": weights})) == "refused"
    assert peak() - before < 1e8


def test_a_header_of_nothing_but_tensors_takes_little_memory(tmp_path):
    header, data = taken_apart(dumped(content_of()))
    header |= {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]} for i in range(10**5)}
    before = peak()
    assert (
        outcome(tmp_path / "x.ckpt", put_together(json.dumps(header, separators=(",", ":")).encode(), data)) == "loaded"
    )
    assert peak() - before < 2e8


def test_more_beside_the_tensors_than_a_reader_takes_is_not_written():
    with pytest.raises(InputError, match="keep long lists of numbers as tensors"):
        dumped({"callbacks": {"a": [0.1] * 5_000_000}})


# The command


def test_the_command_shows_what_is_inside_for_people_and_programs(trained, call):
    ended = call("checkpoint", str(trained))
    assert (ended.code, ended.err) == (0, "")
    for word in (
        "bigram",
        "step",
        "20",
        "prose.txt",
        "token_embedding_table.weight",
        "float32",
        "which its content has",
    ):
        assert word in ended.out
    found = json.loads(call("checkpoint", str(trained / "checkpoints" / "last.ckpt"), "--json").out)
    loaded = checkpoint.load(trained)
    assert (found["step"], found["generation"], found["optimizer_state"]) == (20, "last", True)
    assert found["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    shape = list(loaded.model.state_dict()["token_embedding_table.weight"].shape)
    assert found["tensors"] == {"token_embedding_table.weight": {"shape": shape, "dtype": "float32"}}
    assert found["corpus"] == loaded.corpus
    assert found["sha256"] == archive.stored_hash(loaded.path)
    assert found["bytes"] == loaded.path.stat().st_size


def test_an_outline_takes_no_memory_for_weights(tmp_path):
    content = content_of()
    content["more"] = torch.zeros(2**24)
    path = tmp_path / "large.ckpt"
    checkpoint.write(content, path)
    found = checkpoint.read(path, "meta", needs_text=False)
    assert found["more"].is_meta
    assert found["more"].shape == (2**24,)


def test_weights_are_exported_for_other_tools_whole_and_over_nothing(trained, call, tmp_path):
    ended = call("checkpoint", str(trained), "--export", "w.safetensors")
    assert (ended.code, ended.err) == (0, "")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    loaded = checkpoint.load(trained)
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weights.pop(name), weight)
    assert weights == {}
    assert json.loads(metadata["step"]) == 20
    assert json.loads(metadata["model"]) == loaded.config["model"]
    assert json.loads(metadata["corpus"]) == loaded.corpus
    again = call("checkpoint", str(trained), "--export", "w.safetensors")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "--force" in again.err
    assert call("checkpoint", str(trained), "--export", "w.safetensors", "--force", "--json").code == 0
    other = call("checkpoint", str(trained), "--export", "w.bin")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert ".safetensors" in other.err
    assert sorted(p.name for p in tmp_path.glob("*w.*")) == ["w.safetensors"]


def test_the_command_says_which_file_is_damaged_and_shows_the_one_before(tmp_path, call):
    folder = tmp_path / "run" / "checkpoints"
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        path = write(folder, step)
    flip(path)
    ended = call("checkpoint", "run", "--json")
    assert (ended.code, ended.err.count("\n")) == (0, 1)
    assert "last.ckpt is damaged" in ended.err
    assert (json.loads(ended.out)["step"], json.loads(ended.out)["generation"]) == (1, "previous")
    alone = call("checkpoint", "run/checkpoints/last.ckpt")
    assert (alone.code, alone.out, alone.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_comes_back_from_its_file_as_it_was(tmp_path, name):
    node = recipe(name)
    content = content_of()
    model = checkpoint.build(node, 10).eval()
    content["charlm"]["config"]["model"] = node
    content["state_dict"] = OrderedDict((f"model.{k}", v) for k, v in model.state_dict().items())
    checkpoint.write(content, tmp_path / "last.ckpt")
    again = checkpoint.load(tmp_path).model
    idx = torch.arange(8)[None]
    assert torch.equal(model(idx), again(idx))
    assert all(not tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
