"""Files that are whole or refused, whoever wrote them and whatever the disk did; two generations; the command."""

import copy
import errno
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from charlm import archive, checkpoint
from charlm.callbacks import AtomicCheckpointIO, Checkpoint
from charlm.errors import DiskError, InputError
from charlm.model.bigram import Bigram
from charlm.model.gpt import GPT
from charlm.tokenizer import CharTokenizer
from tests.conftest import ROOT
from tests.test_callbacks import fit, flat  # noqa: F401
from tests.test_model import MODELS, recipe

GPT_NODE = {"_target_": "charlm.model.gpt.GPT", "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}


def content_of(model: str = "bigram", step: int = 3) -> dict[str, Any]:
    """What a run leaves behind, of a small model."""
    torch.manual_seed(step)
    tokenizer = CharTokenizer("abcdefghij")
    node = GPT_NODE if model == "gpt" else {"_target_": "charlm.model.bigram.Bigram"}
    made = GPT(10, 8, 1, 1, 4) if model == "gpt" else Bigram(10)
    config = {"model": dict(node), "data": {"path": None}, "evaluate": ["val"]}
    record = checkpoint.record(config, tokenizer, {"name": "a", "source": "a.txt", "sha256": "0" * 64})
    weights = OrderedDict((f"model.{name}", weight) for name, weight in made.state_dict().items())
    return {"global_step": step, "state_dict": weights, "optimizer_states": [{"state": {}}], "charlm": record}


def write(folder: Path, step: int) -> Path:
    path = folder / checkpoint.NAME
    checkpoint.write(content_of(step=step), path)
    return path


def flip(path: Path, place: int = -500) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_file_carries_the_hash_of_what_torch_wrote_and_every_reader_of_zips_still_reads_it(tmp_path):
    content, plain = content_of(), io.BytesIO()
    path = write(tmp_path, 3)
    torch.save(content, plain)
    raw, comment = path.read_bytes(), zipfile.ZipFile(path).comment
    assert len(raw) == len(plain.getvalue()) + len(comment)
    assert comment.decode() == f"sha256:{archive.stored_hash(path)}"
    assert zipfile.ZipFile(path).testzip() is None
    assert subprocess.run([sys.executable, "-m", "zipfile", "-t", str(path)], check=False).returncode == 0
    for mmap in (False, True):
        again = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(*(c["state_dict"]["model.token_embedding_table.weight"] for c in (again, content)))
    assert checkpoint.load(path).step == 3


def test_a_file_of_an_earlier_version_without_a_hash_still_loads(tmp_path):
    torch.save(content_of(), tmp_path / "old.ckpt")
    assert checkpoint.load(tmp_path / "old.ckpt").step == 3
    assert archive.stored_hash(tmp_path / "old.ckpt") is None


def test_any_bit_of_a_file_that_is_flipped_is_noticed(tmp_path):
    path = write(tmp_path, 3)
    raw = path.read_bytes()
    places = {*range(0, len(raw), 37), *range(len(raw) - archive.COMMENT - archive.END, len(raw))}
    for place in sorted(places):
        for bit in (0, 7) if place % 2 else (3,):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(InputError):
                archive.load(path)


def test_damage_to_the_last_generation_costs_the_steps_since_the_one_before(tmp_path, capsys):
    for step in (1, 2, 3):
        path = write(tmp_path, step)
    assert checkpoint.load(tmp_path).step == 3
    assert capsys.readouterr().err == ""
    flip(path)
    found = checkpoint.newest(tmp_path)
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
    steps = [checkpoint.newest(state).content["global_step"] for state in states]
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
    AtomicCheckpointIO().save_checkpoint(content_of(step=step), folder / checkpoint.NAME)


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
        assert "the one before still stands" in str(told.value)
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
            with pytest.raises(DiskError, match=r"No space left on device.*the one before still stands"):
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


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_whose_disk_becomes_full_ends_with_one_line(tmp_path, text_file, devices):
    settings = ["data=text", f"data.path={text_file}", "logger=none", "hydra.run.dir=run", "trainer.max_steps=40"]
    settings += ["callbacks.checkpoint.every_n_steps=10"]
    settings += ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"] if devices == 2 else ["trainer=cpu"]
    # Kilobytes of a file, of which a measurement of coverage would need more.
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

    class Noted(Checkpoint):
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
    """A zip without comment, with the hash that a forger would put behind it."""
    import hashlib

    return raw[:-2] + archive.LENGTH + archive.LABEL + hashlib.sha256(raw).hexdigest().encode()


def unsealed(raw: bytes) -> bytes:
    return raw[: -archive.COMMENT - 2] + b"\0\0"


def dumped(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return sealed(file.getvalue())


def rezipped(raw: bytes, change: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive after `change` of its records, names and bytes, with a hash that is right."""
    with zipfile.ZipFile(io.BytesIO(raw)) as before:
        records = [(entry.filename, before.read(entry)) for entry in before.infolist()]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as after:
        for name, data in change(records):
            after.writestr(name, data)
    return sealed(file.getvalue())


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
    """Damage to the pickle or the numbers, under a hash that is right."""

    def change(records: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        if draw.random() < 0.2:
            (one, first), (other, second) = a, b = draw.sample(records, 2)
            i, j = records.index(a), records.index(b)
            records[i], records[j] = (one, second), (other, first)
            return records
        i = 0 if draw.random() < 0.8 else draw.randrange(len(records))
        data = bytearray(records[i][1])
        for _ in range(draw.choice([1, 1, 3])):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        return [*records[:i], (records[i][0], bytes(data)), *records[i + 1 :]]

    return rezipped(raw, change)


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
    found: dict[str, list[Any]] = {"damaged": [], "forged": [], "without a hash": []}
    for trial in range(900):
        raw = bases[trial % 2]
        kind = ("damaged", "forged", "without a hash")[trial % 3]
        mutated = random_damage(raw, draw) if kind == "damaged" else forged_noise(raw, draw)
        if kind != "damaged" and trial % 3 == 2:
            mutated = unsealed(mutated)
        start = time.process_time()
        found[kind].append(mutated != raw and outcome(path, mutated))
        slowest = max(slowest, time.process_time() - start)
    assert {*found["damaged"]} <= {"refused", False}
    assert {*found["forged"], *found["without a hash"]} <= {"refused", "loaded", False}
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


def doubled(levels: int = 60) -> list[Any]:
    """Two to the sixtieth elements for who follows them one by one."""
    nested: list[Any] = [0]
    for _ in range(levels):
        nested = [nested, nested]
    return nested


PLACES = ["global_step", "state_dict", "charlm", "charlm/format", "charlm/config", "charlm/tokenizer", "charlm/corpus"]
PLACES += ["charlm/config/model", "charlm/config/data", "charlm/config/evaluate", "charlm/tokenizer/name"]
PLACES += ["charlm/tokenizer/points", "charlm/corpus/sha256", "charlm/config/model/_target_"]
PLACES += ["state_dict/model.token_embedding_table.weight"]
WRONG = [KeyError, None, float("nan"), -1, True, torch.zeros(2), circular(), doubled(), "\x1b[1m\n", [None], {"a": 1}]


@pytest.mark.parametrize("place", PLACES)
def test_a_part_that_is_missing_or_of_another_type_is_refused(tmp_path, place):
    may: dict[str, list[Any]] = {"charlm/config/data": [{"a": 1}], "charlm/corpus/sha256": ["\x1b[1m\n"]}
    for number, value in enumerate(WRONG):  # some values have no end to print
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


def test_code_is_not_run_whatever_the_hash_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("extra", "global_step", "charlm/config/model/_target_", "charlm/corpus/name"):
        assert outcome(tmp_path / "x.ckpt", with_part(place, Command())) == "refused"
    assert not (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize(
    "value", [bytearray(8), torch.float16, torch.device("cpu"), 1j, torch.nn.Parameter(torch.zeros(1))]
)
def test_only_plain_types_and_tensors_are_read(tmp_path, value):
    assert outcome(tmp_path / "x.ckpt", with_part("extra", value)) == "refused"


def replaced(old: bytes, new: bytes) -> Any:
    """Change the pickle, in which `old` must stand."""

    def change(records: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        (name, data), *others = records
        assert old in data
        return [(name, data.replace(old, new)), *others]

    return change


def test_a_claim_of_more_than_the_file_holds_is_refused_before_memory_is_taken(tmp_path):
    raw, before = dumped(content_of()), peak()
    shape, hundred, huge = b"K\nK\n\x86", b"Kd", b"J\xff\xff\xff\x7f"
    claims = {
        "shape": replaced(shape, huge + huge + b"\x86"),
        "storage": replaced(hundred, huge),
        "storage of nothing": replaced(hundred, b"K\0"),
        "negative storage": replaced(hundred, b"J\xff\xff\xff\xff"),
        "both": lambda records: replaced(hundred, huge)(replaced(shape, huge + b"K\n\x86")(records)),
        "bytearray": replaced(b"ccollections\nOrderedDict\n", b"cbuiltins\nbytearray\n"),
        "record gone": lambda records: [r for r in records if not r[0].endswith("data/0")],
        "pickle gone": lambda records: records[1:],
        "nothing": lambda records: [],
        "larger record": lambda records: [(n, d * 2 if n.endswith("data/0") else d) for n, d in records],
        "two pickles": lambda records: [*records, ("archive/DATA.pkl", records[0][1])],
        "other folder first": lambda records: [("other/a", b""), *records],
    }
    for name, change in claims.items():
        assert outcome(tmp_path / "x.ckpt", rezipped(raw, change)) == "refused", name
    bomb = rezipped(raw, lambda records: [*records, ("archive/data/9", bytes(2**26))], zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    before = max(before, peak())
    assert outcome(tmp_path / "x.ckpt", bomb) == "refused"
    assert peak() - before < 5e7


def test_a_key_that_takes_forever_to_hash_is_refused(tmp_path):
    key: Any = (0, 0)
    for _ in range(60):
        key = (key, key)
    assert outcome(tmp_path / "x.ckpt", dumped(content_of() | {"extra": [key]})) == "refused"
    # The same as a key, which no writer could make: (0, 0) doubled in the memo, then {key: 0}.
    doubling = b"K\0K\0\x86q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    forged = b"\x80\x02}" + doubling + b"K\0s."
    change = lambda records: [(records[0][0], forged), *records[1:]]  # noqa: E731
    assert outcome(tmp_path / "x.ckpt", rezipped(dumped(content_of()), change)) == "refused"


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
    found = checkpoint.outline(path)
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
