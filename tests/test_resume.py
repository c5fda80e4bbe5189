"""A run that is ended anywhere and resumed is the run that was not."""

import contextlib
import csv
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from charlm import checkpoint
from charlm.errors import InputError, one_line_errors
from charlm.run.results import RESULTS, read_validations
from tests.conftest import PRELOAD, ROOT, check_command, run_command, with_speed

SETTINGS = [
    *("model=gpt", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.dropout=0.2"),
    *("trainer=cpu", "threads=1", "data=text", "data.batch_size=2", "data.block_size=8"),
    *("scheduler=warmup_cosine", "scheduler.warmup_steps=5", "trainer.gradient_clip_val=0.5"),
    *("trainer.max_steps=40", "trainer.val_check_interval=30", "trainer.log_every_n_steps=5"),
    *("trainer.accumulate_grad_batches=2", "callbacks=[default,ema,best]", "callbacks.checkpoint.every_n_steps=7"),
    *("callbacks.samples.length=20", "sample_length=20", "evaluate=[val]"),
]
ENDS: dict[str, signal.Signals | None] = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
    "hup": signal.SIGHUP,
    "raise": None,
}
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
# Where a run can be ended: a function that is called there, and how often it is in a run.
PLACES = {
    "step": ("charlm.module", "mean_loss", 80),
    "validation": ("charlm.module", "token_losses", 6),
    "evaluation": ("charlm.evaluate", "token_losses", 3),
    "write": ("os", "fsync", 30),
    "rename": ("os", "replace", 18),
}


def become(argv: list[str], log: str, place: str | None, number: int, end: str, second: bool) -> None:
    """In a fresh process: be `python train.py ...`, and end it, or its second process, at a call of `place`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if place:
        module, name, _ = PLACES[place]
        original, calls = getattr(sys.modules[module], name), iter(range(1, 1_000_000))

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                sent = ENDS[end]
                if sent is None:
                    raise RuntimeError("a defect")
                os.kill(children()[0] if second else os.getpid(), sent)
            return original(*args, **kwargs)

        setattr(sys.modules[module], name, counted)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def children() -> list[int]:
    """The processes that this one has started."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    return [pid for pid, parent in parents.items() if parent == os.getpid()]


def at_work(folder: Path) -> list[str]:
    """The processes whose command names `folder`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [command] if str(folder) in (command := file.read_text()) else []
    return found


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., int]:
    """Start a run in a process of its own. Returns its exit code, negative for a signal that killed it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tests.test_resume"])

    def run(*overrides: str, place: str | None = None, number: int = 0, end: str = "kill", second: bool = False) -> int:
        arguments = (
            with_speed([str(ROOT / "train.py"), *overrides]),
            str(tmp_path / "log"),
            place,
            number,
            end,
            second,
        )
        process = context.Process(target=become, args=arguments)
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            pytest.fail(f"{overrides} hangs")
        assert process.exitcode is not None
        return process.exitcode

    return run


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, prose: str) -> dict[str, Any]:
    """The folder of an uninterrupted run with SETTINGS."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "prose.txt").write_text(prose, encoding="utf-8")
    command = [str(ROOT / "train.py"), *SETTINGS, f"data.path={folder / 'prose.txt'}", "hydra.run.dir=run"]
    ended = run_command(command, folder, {}, timeout=120)
    assert ended.code == 0, ended.err
    return story(folder / "run")


def story(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for what the clock says."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = board.Tags()
    told = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"] if "per_second" not in tag}
    texts = {
        t: [(e.step, e.tensor_proto.string_val[0]) for e in board.Tensors(t)] for t in tags["tensors"] if "sample" in t
    }
    results = {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if "second" not in k}
    state = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    best = checkpoint.read(folder / "checkpoints" / "best.ckpt")
    kept = [state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ema")]
    losses = (folder / "losses.f32").read_bytes()
    parts = {"told": told, "texts": texts, "results": results, "state": kept, "best": best["state_dict"]}
    validations = [(step, loss) for step, _, loss in read_validations(folder)]
    return parts | {
        "losses": losses,
        "validations": validations,
        "status": json.loads((folder / "run.json").read_text())["status"],
    }


def same(a: Any, b: Any) -> bool:
    """To the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def end_and_resume(start: Callable[..., int], folder: Path, settings: list[str], rng: random.Random, ends: int) -> int:
    """End a run `ends` times, each time at a place drawn at random, and go on with it. Returns how often it did end."""
    common = [*settings, f"hydra.run.dir={folder}"]
    ended = 0
    for _ in range(ends):
        place, end = rng.choice(list(PLACES)), rng.choice(list(ENDS))
        number = rng.randint(1, PLACES[place][2])
        second = "trainer.devices=2" in settings and ENDS[end] is not None and rng.random() < 0.5
        begun = (folder / "checkpoints" / "last.ckpt").exists()
        command = [f"resume={folder}"] if begun else common
        code = start(*command, place=place, number=number, end=end, second=second)
        until = time.monotonic() + 120
        while at_work(folder):
            assert time.monotonic() < until, "a process is left"
            time.sleep(0.01)
        if code == 0:
            break
        sent = ENDS[end]
        expected = {1} if sent is None else {-sent} if sent == signal.SIGKILL else {-sent, 128 + sent}
        assert code in expected or second, (place, number, end, code)
        ended += 1
    else:
        begun = (folder / "checkpoints" / "last.ckpt").exists()
        assert start(*([f"resume={folder}"] if begun else common)) == 0
    return ended


def end_often(start, tmp_path, settings, unbroken, ends, seed):
    """Until there were so many ends, at places drawn at random: three at most for a run, which then must be whole."""
    rng, ended, number = random.Random(seed), 0, 0
    while ended < ends:
        folder = tmp_path / str(number)
        ended += end_and_resume(start, folder, settings, rng, ends=3)
        found = story(folder)
        for part, wanted in unbroken.items():
            assert same(found[part], wanted), (number, part)
        number += 1


def test_a_run_ended_anywhere_and_resumed_equals_the_unbroken_run(start, tmp_path, text_file, unbroken):
    end_often(start, tmp_path, [*SETTINGS, f"data.path={text_file}"], unbroken, ends=4, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(30_000)
def test_a_hundred_ends_leave_no_trace(start, tmp_path, text_file, unbroken, pytestconfig):
    settings = [*SETTINGS, f"data.path={text_file}"]
    end_often(start, tmp_path, settings, unbroken, ends=pytestconfig.getoption("ends"), seed=2)


@pytest.mark.slow
@pytest.mark.timeout(30_000)
def test_ends_of_either_of_two_processes_leave_no_trace(start, tmp_path, text_file, pytestconfig):
    settings = [*SETTINGS, *TWO, f"data.path={text_file}"]
    assert start(*settings, f"hydra.run.dir={tmp_path / 'unbroken'}") == 0
    unbroken = story(tmp_path / "unbroken")
    end_often(start, tmp_path, settings, unbroken, ends=pytestconfig.getoption("ends") // 8, seed=3)


@pytest.mark.parametrize("ended_by", ["early stopping", pytest.param("steps", marks=pytest.mark.slow)])
def test_a_run_that_is_ended_after_its_last_step_makes_no_other(start, tmp_path, text_file, ended_by):
    early = ["callbacks=[default,ema,best,early_stopping]", "callbacks.early_stopping.patience=1"]
    early += ["callbacks.early_stopping.min_delta=9"]
    settings = [*SETTINGS, f"data.path={text_file}", *(early if ended_by != "steps" else ["trainer.max_steps=30"])]
    assert start(*settings, f"hydra.run.dir={tmp_path / 'unbroken'}") == 0
    unbroken, folder = story(tmp_path / "unbroken"), tmp_path / "run"
    assert unbroken["results"]["stopped_by"] == ended_by
    assert unbroken["results"]["steps"] == 30  # where there was a validation
    assert start(*settings, f"hydra.run.dir={folder}", place="evaluation", number=1) == -signal.SIGKILL
    assert start(f"resume={folder}") == 0
    assert all(same(part, unbroken[name]) for name, part in story(folder).items())


def test_a_run_may_be_made_longer(start, tmp_path, text_file):
    settings = [*(s for s in SETTINGS if not s.startswith("scheduler")), f"data.path={text_file}"]
    assert start(*settings, f"hydra.run.dir={tmp_path / 'long'}") == 0
    assert start(*settings, "trainer.max_steps=20", f"hydra.run.dir={tmp_path / 'short'}") == 0
    moved = (tmp_path / "short").rename(tmp_path / "moved")
    assert start(f"resume={moved}", "trainer.max_steps=40") == 0
    long, longer = story(tmp_path / "long"), story(moved)
    assert same(longer["state"], long["state"])
    assert longer["told"]["train/loss"] == long["told"]["train/loss"]
    assert longer["results"] == long["results"]


@pytest.mark.slow
def test_metrics_csv_goes_on_where_the_state_was_saved(start, tmp_path, text_file):
    common = [*SETTINGS, f"data.path={text_file}", "logger=csv"]
    assert start(*common, f"hydra.run.dir={tmp_path / 'a'}") == 0
    folder = tmp_path / "b"
    assert start(*common, f"hydra.run.dir={folder}", place="step", number=50) == -signal.SIGKILL
    assert start(f"resume={folder}", place="rename", number=2) == -signal.SIGKILL  # while old rows are taken over
    assert start(f"resume={folder}") == 0
    rows, unbroken = (
        [
            {key: value for key, value in row.items() if value and "per_second" not in key}
            for row in csv.DictReader((place / "metrics.csv").read_text().splitlines())
        ]
        for place in (folder, tmp_path / "a")
    )
    assert [row for row in rows if len(row) > 1] == [row for row in unbroken if len(row) > 1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("optimizer.lr=1", "optimizer.lr=1 is not how"),
        ("model=gpt", "model=gpt is not how"),
        ("optimizer.rl=1", "did you mean optimizer.lr?"),
        ("trainer.max_steps=10", "has made 20 steps"),
        ("~callbacks.samples", "is not possible with resume"),
        ("-m", "leave -m away"),
        ("stop_at=3", "has made 20 steps"),
        ("trainer.devices=2", "would change the batches, since"),
        ("trainer.devices=auto", "would change the batches, since"),
    ],
)
def test_a_change_of_what_was_is_refused(trained, change, told):
    with pytest.raises(InputError, match=re.escape(told)):
        check_command(["train.py", f"resume={trained}", change], ROOT / "conf")


@pytest.mark.slow
def test_a_run_goes_on_with_other_threads_and_steps_on_the_same_batches(train, tmp_path, text_file):
    common = ["model=gpt", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "trainer.max_steps=60", "threads=1"]
    common += ["data=text", f"data.path={text_file}", "data.block_size=8", "data.batch_size=8"]
    assert train(*common, "trainer=cpu", "stop_at=25", "hydra.run.dir=other").code == 0
    ended = train("resume=other", "threads=2", "speed.steps_per_execution=3", "trainer.accelerator=auto")
    assert (ended.code, "threads was 1 and is 2: what follows may not be, to the bit" in ended.err) == (0, True)
    assert "steps was" not in ended.err
    assert train(*common, "trainer=cpu", "hydra.run.dir=unbroken").code == 0
    ours, theirs = (checkpoint.read(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("other", "unbroken"))
    assert ours["global_step"] == theirs["global_step"] == 60
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_resumed_is_told(trained, tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        check_command(["train.py", f"resume={tmp_path / 'none'}"], ROOT / "conf")
    with pytest.raises(InputError, match="holds no checkpoint"):
        check_command(["train.py", f"resume={tmp_path}"], ROOT / "conf")


def test_another_text_is_refused(start, tmp_path, text_file):
    folder = tmp_path / "run"
    assert start(*SETTINGS, f"data.path={text_file}", f"hydra.run.dir={folder}", place="step", number=9) < 0
    text_file.write_text(text_file.read_text() + "!")
    with pytest.raises(InputError, match="no longer the text"):
        check_command(["train.py", f"resume={folder}"], ROOT / "conf")


def test_a_schedule_that_follows_the_budget_keeps_it(start, tmp_path, text_file):
    folder = tmp_path / "run"
    assert start(*SETTINGS, f"data.path={text_file}", f"hydra.run.dir={folder}", place="step", number=9) < 0
    with pytest.raises(InputError, match="warmup_cosine follows the budget"):
        check_command(["train.py", f"resume={folder}", "trainer.max_steps=80"], ROOT / "conf")


def test_resuming_a_finished_run_says_so_and_does_nothing(trained, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        check_command(["train.py", f"resume={trained}"], ROOT / "conf")
    assert ended.value.code == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in trained.rglob("*")}


def test_a_stopped_run_says_how_to_go_on(start, tmp_path, text_file):
    folder = tmp_path / "run"
    for end, code in (("int", 130), ("term", 143), ("usr1", 138), ("hup", 129)):
        begun = (
            [f"resume={folder}"]
            if folder.exists()
            else [*SETTINGS, f"data.path={text_file}", f"hydra.run.dir={folder}"]
        )
        assert start(*begun, place="step", number=9, end=end) == code
    events = b"".join(file.read_bytes() for file in folder.glob("events.*"))
    assert b"session_start_info" in events
    assert b"session_end_info" not in events  # it has neither succeeded nor failed
    log = (tmp_path / "log").read_text()
    for name, step in (("Ctrl-C", 5), ("SIGTERM", 10), ("SIGUSR1", 15), ("SIGHUP", 20)):
        assert f"charlm: stopped by {name} after step {step}; go on with:\n  python train.py resume=" in log


@pytest.mark.parametrize(("end", "code"), [("term", 143), pytest.param("hup", 129, marks=pytest.mark.slow)])
def test_a_signal_during_the_final_evaluation_stops_the_run_in_one_line_and_resume_finishes_it(
    start, tmp_path, text_file, end, code
):
    folder = tmp_path / "run"
    begun = [*SETTINGS, f"data.path={text_file}", f"hydra.run.dir={folder}"]
    assert start(*begun, place="evaluation", number=1, end=end) == code
    name = signal.Signals(code - 128).name
    log = (tmp_path / "log").read_text()
    assert log.endswith(f"\ncharlm: stopped by {name} before the end\n")
    assert "Traceback" not in log
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["reason"], record["step"]) == ("stopped", name, 40)
    assert start(f"resume={folder}") == 0
    assert json.loads((folder / RESULTS).read_text())["steps"] == 40


def test_ctrl_c_is_told_as_such_whatever_it_became(capsys):
    """Libraries in C++ fail with an error of their own where they are interrupted."""

    @one_line_errors()
    def write() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")

    with pytest.raises(SystemExit) as ended:
        write()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "charlm: interrupted\n"


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(train, tmp_path, text_file):
    """Only the first process gets the signal; what they go on to is what two do that nobody stops."""
    common = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "threads=1", "data=text"]
    common += [f"data.path={text_file}", "trainer.max_steps=3000", "callbacks.progress.seconds_between_lines=0.1"]
    command = [sys.executable, str(ROOT / "train.py"), *common, "hydra.run.dir=stopped"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        next(line for line in process.stdout if line.startswith("step"))
        process.send_signal(signal.SIGTERM)
        assert "charlm: stopped by SIGTERM" in process.stderr.read()
    assert process.returncode == 143
    assert train("resume=stopped").code == 0
    assert train(*common, "hydra.run.dir=unbroken").code == 0
    weights = [checkpoint.read(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("stopped", "unbroken")]
    assert same(weights[0]["state_dict"], weights[1]["state_dict"])
    assert weights[0]["global_step"] == 3000


NAMES = ["block_size=8,lr=0.01", "a b", "it's", 'a "quoted" one', "back\\slash", "back\\'", "end\\", "[x]"]
ALL_OF_THEM = "a \"b\" 'c' [x],lr=0.1\\"


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_have_any_name(trained, tmp_path, call, check, name):
    folder = tmp_path / name
    shutil.copytree(trained, folder)
    for path in (name, f"./{name}"):
        ended = check(f"resume={path}")
        assert (ended.code, ended.err) == (0, "")
        assert "is at its end" in ended.out
    for command, place in ((f"rerun={name}", f"{name}_2"), (f"resume={name}", name)):
        argv = check_command(["train.py", command, "trainer.max_steps=25"], ROOT / "conf")
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", argv[1:], return_hydra_config=True)
        assert cfg.hydra.run.dir == place
        assert cfg[command.partition("=")[0]] == name
    assert call("evaluate", name, "--split", "val").code == 0


@pytest.mark.parametrize("name", [ALL_OF_THEM, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])
def test_runs_in_folders_of_any_name_are_begun_again_made_longer_and_reproduced(trained, tmp_path, train, call, name):
    shutil.copytree(trained, tmp_path / name)
    assert train(f"rerun={name}", "trainer.max_steps=3").code == 0
    assert (tmp_path / f"{name}_2" / "results.json").exists()
    assert train(f"resume={name}", "trainer.max_steps=25").code == 0
    assert call("reproduce", name).code == 0
