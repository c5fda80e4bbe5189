"""run.json is true, a folder belongs to one process, and a run can be repeated from its record."""

import contextlib
import json
import math
import multiprocessing
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from charlm import checkpoint, schema
from charlm.callbacks import Recorder
from charlm.errors import InputError
from charlm.preflight.command import check_command
from charlm.run import record
from charlm.run.folder import own_folder
from tests.conftest import PRELOAD, ROOT, run_command

SMALL = ["trainer=cpu", "threads=1", "trainer.max_steps=60", "evaluate=[val]", "sample_length=1"]


def told(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_finished_run_tells_what_it_was(trained):
    found = told(trained)
    assert (found["status"], found["reason"], found["step"], found["seed"]) == ("finished", None, 20, 1337)
    kept = checkpoint.read(trained / "checkpoints" / "last.ckpt")["charlm"]
    assert found["config"] == kept["config"]
    assert found["corpus"] == kept["corpus"]
    environment = found["environment"]
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    assert environment["processes"] == environment["threads"] == 1
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    assert (environment["git"] or {}).get("commit", "") == commit
    assert record.read_record(trained) == found


def settings_of(recipe: Path) -> list[str]:
    """All settings that a recipe has, by their dotted names."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("train", [f"experiment={recipe.stem}"]), resolve=False)
    return list(schema.leaves(cfg))


QUICK = ("cpu_90s", "lecture_bigram")
RECIPES = [
    pytest.param(file, id=file.stem, marks=() if file.stem in QUICK else pytest.mark.slow)
    for file in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_in_small_on_any_machine(recipe, train, tmp_path, text_file):
    text_file.write_text(text_file.read_text()[:6000])
    small = ["trainer=cpu", "trainer.max_steps=2", "trainer.max_time=null", "data.batch_size=2", "compile=false"]
    small += ["max_tokens=null"]
    smaller = ("scheduler.warmup_steps=1", "model.n_layer=1", "callbacks.samples.length=1")
    small += [setting for setting in smaller if setting.partition("=")[0] in settings_of(recipe)]
    small += ["data=text", f"data.path={text_file}", "evaluate=[val]", "sample_length=1", "hydra.run.dir=r"]
    ended = train(f"experiment={recipe.stem}", *small)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "r" / "results.json").read_text())["steps"] == 2


@pytest.fixture
def begun(begin, text_file):
    """A run without end, as its own process."""
    common = ["data=text", f"data.path={text_file}", "hydra.run.dir=run", "trainer.max_steps=100000000", "trainer=cpu"]
    return begin(*common, "callbacks.progress.seconds_between_lines=0.1")


def test_run_json_is_there_before_the_first_step_and_tells_of_the_end(begun, train, check, tmp_path):
    begun.line("model")  # the header, which comes before training
    found = told(tmp_path / "run")
    assert (found["status"], found["process"]["pid"]) == ("running", begun.pid)
    begun.line("step")
    # Nobody else may train there.
    ended = train("resume=run")
    assert (ended.code, "another process" in ended.err) == (2, True)
    assert "run" in check("data=pydoc", "hydra.run.dir=run").err
    begun.send_signal(signal.SIGTERM)
    assert begun.end().code == 143
    found = told(tmp_path / "run")
    assert (found["status"], found["reason"]) == ("stopped", "SIGTERM")
    assert found["step"] == checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]


def test_further_signals_do_not_come_before_run_json_tells_of_the_first(begun, tmp_path):
    begun.line("step")
    begun.send_signal(signal.SIGTERM)
    while told(tmp_path / "run")["status"] == "running" and begun.process.is_alive():
        begun.send_signal(signal.SIGTERM)  # as a batch system does
        time.sleep(0.001)
    begun.end()
    found = told(tmp_path / "run")
    assert (found["status"], found["reason"]) == ("stopped", "SIGTERM")


def test_a_killed_run_is_told_as_such_by_the_next(begun, train, tmp_path):
    begun.line("step")
    begun.kill()
    assert told(tmp_path / "run")["status"] == "running"
    ended = train("resume=run", "trainer.max_time=00:00:00:01")
    assert ended.code == 0, ended.err
    found = told(tmp_path / "run")
    assert found["status"] == "finished"
    assert found["earlier"][0]["status"] == "killed"


def test_a_life_sign_comes_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SECONDS_BETWEEN_BEATS", 0.01)
    seen: list[int] = []
    with record.Run({"run_dir": str(tmp_path / "run"), "seed": 1}, {}) as one:
        one.step = lambda: len(seen)
        while len(seen) < 3:
            step = told(tmp_path / "run")["step"]
            if step not in seen:
                seen.append(step)
            time.sleep(0.001)
    assert told(tmp_path / "run")["status"] == "finished"
    assert threading.active_count() == 1 or one.pulse not in threading.enumerate()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "finished", None),
        (SystemExit(143), "stopped", "SIGTERM"),
        (SystemExit(0), "stopped", "stop_at"),
        (KeyboardInterrupt(), "stopped", "SIGINT"),
        (RuntimeError("a defect\nof ours"), "failed", "RuntimeError: a defect"),
        (InputError("the disk is full"), "failed", "the disk is full"),
        (SystemExit(1), "failed", "exit code 1"),
    ],
)
def test_every_end_has_its_status(error, status, reason):
    assert record.how(error) == (status, reason)


def test_a_crash_leaves_its_traceback_in_the_runs_own_log(train, tmp_path, text_file):
    common = [*SMALL, "data=text", f"data.path={text_file}", "hydra.run.dir=run"]
    ended = train(*common, "+callbacks.defect={_target_: tests.test_run.Defect}", PYTHONPATH=str(ROOT))
    assert ended.code == 1
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    found = told(tmp_path / "run")
    assert (found["status"], found["reason"]) == ("failed", "RuntimeError: a defect")


class Defect(L.Callback):
    """Ends a run as a mistake in its code would."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise RuntimeError("a defect")


def test_runs_begun_in_the_same_second_have_a_folder_each(tmp_path, text_file):
    common = [*SMALL, "data=text", f"data.path={text_file}", f"hydra.sweep.dir={tmp_path}", "trainer.max_steps=2"]

    def begin(number: int) -> int:
        place = tmp_path / f"from_{number}"
        place.mkdir()
        (place / "outputs").symlink_to(tmp_path / "outputs")
        return run_command([str(ROOT / "train.py"), *common], place, {}, 100).code

    (tmp_path / "outputs").mkdir()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(begin, range(4))) == [0] * 4
    folders = list((tmp_path / "outputs").iterdir())
    assert [told(folder)["status"] for folder in folders] == ["finished"] * 4


def test_a_folder_is_claimed_by_one_process_alone(tmp_path):
    """However many want a new one of the same name at the same moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ready, given = context.Barrier(8), context.Queue()
    processes = [context.Process(target=own, args=(str(tmp_path / "run"), ready, given)) for _ in range(8)]
    for process in processes:
        process.start()
    folders = {given.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert folders == {str(tmp_path / name) for name in ["run", *(f"run_{n}" for n in range(2, 9))]}


def own(folder: str, ready: Any, given: Any) -> None:
    ready.wait()
    given.put(str(own_folder(Path(folder), new=True)))
    ready.wait()  # and keeps it until all have one


def test_a_loss_that_leaves_the_numbers_ends_the_run(train, tmp_path, text_file):
    common = ["data=text", f"data.path={text_file}", "model=gpt", "model.n_layer=1", "model.n_embd=16"]
    common += ["trainer=cpu", "threads=1", "trainer.max_steps=500", "callbacks.checkpoint.every_n_steps=1"]
    ended = train(*common, "data.batch_size=2", "optimizer.lr=1e30", "trainer.log_every_n_steps=100")
    assert ended.code == 1
    named = re.fullmatch(
        r"charlm: .* step (\d+).*; try a lower optimizer.lr, .* of step (\d+), and intact\n", ended.err
    )
    assert named, ended.err
    folder = next((tmp_path / "outputs").iterdir())
    kept = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    assert kept["global_step"] == int(named[2]) <= int(named[1])
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
    found = told(folder)
    assert found["status"] == "failed"
    assert f"step {named[1]}" in found["reason"]


def test_the_step_of_the_first_such_loss_is_named(train, tmp_path, text_file):
    """Between two looks, and with the weights of the step before still finite."""
    common = [*SMALL, "data=text", f"data.path={text_file}", "hydra.run.dir=run", "optimizer.lr=1e38"]
    ended = train(*common, "trainer.log_every_n_steps=50")
    losses = np.fromfile(tmp_path / "run" / "losses.f32", "<f4")
    first = int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
    assert 1 < first < 50
    assert f"the loss of step {first} is" in ended.err
    assert math.isfinite(losses[0])


@pytest.mark.slow
def test_two_processes_leave_the_numbers_together_and_are_reproduced(train, charlm, tmp_path, text_file):
    common = [*SMALL, "data=text", f"data.path={text_file}", "trainer=ddp", "trainer.accelerator=cpu"]
    common += ["trainer.devices=2", "callbacks.checkpoint.every_n_steps=20"]
    ended = train(*common, "optimizer.lr=1e38", "hydra.run.dir=diverged")
    assert ended.code == 1
    assert re.fullmatch(
        r"charlm: training diverged: the loss of step \d+ is .*; diverged/checkpoints/last.ckpt .*intact\n", ended.err
    )
    assert told(tmp_path / "diverged")["status"] == "failed"
    assert train(*common, "hydra.run.dir=run").code == 0
    ended = charlm("reproduce", "run", "--json")
    assert ended.code == 0, ended.out + ended.err
    assert json.loads(ended.out)["equal"]


def test_a_run_that_goes_on_in_other_surroundings_says_so(copied, train):
    rewrite(copied, lambda found: found["environment"].update(python="2.7", cpu="a Z80"))
    ended = train(f"resume={copied}", "trainer.max_steps=30")
    assert ended.code == 0
    assert ended.err.startswith("charlm: python was 2.7 and is 3")
    assert "cpu was a Z80 and is" in ended.err


def test_a_run_that_was_killed_before_its_first_state_can_be_begun_again(copied, train, tmp_path):
    for file in ("results.json", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"):
        (copied / file).unlink(missing_ok=True)
    for place in (copied, copied / "checkpoints"):
        (place / ".partial-abc123").write_bytes(b"half")
    ended = train(f"resume={copied}")
    assert ended.code == 2
    assert f"begin it again with rerun={copied}" in ended.err
    assert train(f"rerun={copied}").code == 0
    assert told(copied)["status"] == "finished"
    assert not [*copied.rglob(".partial-*")]


def test_a_second_ctrl_c_stops_at_once(begin, tmp_path, text_file):
    """The first one only asks for the end of a step, which here has none."""
    common = [*SMALL, "data=text", f"data.path={text_file}", "hydra.run.dir=run"]
    process = begin(*common, "+callbacks.endless={_target_: tests.test_run.Endless}", PYTHONPATH=str(ROOT))
    process.line("a step begins")
    process.send_signal(signal.SIGINT)
    process.line("and goes on after a signal")
    process.send_signal(signal.SIGINT)
    ended = process.end()
    assert (ended.code, ended.err) == (130, "charlm: interrupted\n")
    assert (told(tmp_path / "run")["status"], told(tmp_path / "run")["reason"]) == ("stopped", "SIGINT")


class Endless(L.Callback):
    """Makes the first step one without an end, and notices when the process has received a signal."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        [recorder] = [callback for callback in trainer.callbacks if isinstance(callback, Recorder)]
        print("a step begins", flush=True)
        while not recorder.stop.received:
            time.sleep(0.01)
        print("and goes on after a signal", flush=True)
        while True:
            time.sleep(0.01)


@pytest.fixture
def disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("logger", ["tensorboard", *(pytest.param(n, marks=pytest.mark.slow) for n in ("csv", "none"))])
def test_a_disk_that_fills_ends_a_run_with_one_line_and_it_goes_on_when_there_is_room(
    disk, begin, train, tmp_path, text_file, logger
):
    common = [*SMALL[1:2], "trainer=cpu", "data=text", f"data.path={text_file}", f"logger={logger}", "evaluate=[val]"]
    common += ["callbacks.checkpoint.every_n_steps=100", "callbacks.progress.seconds_between_lines=0.1"]
    process = begin(*common, "trainer.max_steps=100000", f"hydra.run.dir={disk}/run")
    process.line("step")
    with pytest.raises(OSError, match="No space left"):
        (disk / "filler").write_bytes(bytes(2**22))
    ended = process.end()
    assert ended.code == 1
    assert ended.err.startswith("charlm: ")
    assert ended.err.count("\n") == 1
    assert "No space left on device" in ended.err
    assert told(disk / "run")["status"] == "failed"
    assert "No space left on device" in told(disk / "run")["reason"]
    (disk / "filler").unlink()
    step = checkpoint.read(disk / "run" / "checkpoints" / "last.ckpt")["global_step"]
    ended = train(f"resume={disk}/run", f"trainer.max_steps={step + 50}")
    assert ended.code == 0, ended.err
    assert train(*common, f"trainer.max_steps={step + 50}", "hydra.run.dir=unbroken").code == 0
    assert (disk / "run" / "losses.f32").read_bytes() == (tmp_path / "unbroken" / "losses.f32").read_bytes()


def test_a_folder_that_vanishes_ends_a_run_with_one_line(begun, tmp_path):
    begun.line("step")
    while (tmp_path / "run").exists():  # between two files that it writes
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    ended = begun.end()
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert ended.err.startswith(f"charlm: {tmp_path}/run has vanished while the run wrote there")
    assert not (tmp_path / "run").exists()


def test_losses_are_kept_for_each_step(trained):
    losses = np.fromfile(trained / "losses.f32", "<f4")
    assert len(losses) == 20
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_same_run_again_is_equal_to_the_bit(trained, charlm):
    ended = charlm("reproduce", str(trained), "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["equal"]
    assert found["steps"] == 20
    assert found["environment"] == {}


@pytest.fixture
def copied(trained, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(trained, folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    found = told(folder)
    change(found)
    (folder / "run.json").write_text(json.dumps(found))


def test_another_run_is_told_from_its_first_step_on_with_what_was_otherwise(copied, call):
    losses = np.fromfile(copied / "losses.f32", "<f4")
    losses[6:] = np.nextafter(losses[6:], np.float32(9))
    losses.tofile(copied / "losses.f32")
    rewrite(copied, lambda found: found["environment"]["packages"].update(torch="1.0"))
    found = json.loads(call("reproduce", str(copied), "--json").out)
    assert not found["equal"]
    assert found["first_step"] == 7
    assert found["environment"] == {"packages.torch": ["1.0", torch.__version__]}
    ended = call("reproduce", str(copied))
    assert ended.code == 1
    assert "Losses differ from step 7 on" in ended.out
    assert re.search(r"packages.torch +1.0 +" + re.escape(torch.__version__), ended.out)


def test_other_weights_are_told_though_the_losses_are_the_same(copied, call):
    path = copied / "checkpoints" / "last.ckpt"
    content = checkpoint.read(path)
    name, weight = next(iter(content["state_dict"].items()))
    weight.flatten()[0] += 1
    checkpoint.write(content, path)
    ended = call("reproduce", str(copied))
    assert ended.code == 1
    assert f"state_dict.{name}" in ended.out
    assert "environment is the same" in ended.out


def test_a_run_that_was_stopped_and_resumed_can_be_reproduced_at_each_state(train, call, tmp_path, text_file):
    """With a schedule that follows the whole budget."""
    common = [*SMALL, "data=text", f"data.path={text_file}", "scheduler=warmup_cosine", "scheduler.warmup_steps=5"]
    assert train(*common, "stop_at=25", "hydra.run.dir=run").code == 0
    assert (told(tmp_path / "run")["status"], told(tmp_path / "run")["reason"]) == ("stopped", "stop_at")
    for resumed, steps in ((False, 25), (True, 60)):
        if resumed:
            assert train("resume=run").code == 0
        ended = call("reproduce", "run", "--json")
        assert ended.code == 0, ended.out + ended.err
        assert json.loads(ended.out)["steps"] == steps
        before = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
        assert before == steps  # the repetition has left it alone


@pytest.mark.parametrize("recipe", ["cpu_90s", pytest.param("cpu_10min", marks=pytest.mark.slow)])
def test_the_token_matched_twin_of_a_recipe_ends_by_tokens_and_is_reproduced(recipe, train, call, tmp_path, text_file):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        timed, twin = (
            record.flat(OmegaConf.to_container(compose("train", [f"experiment={name}"]), resolve=False))
            for name in (recipe, f"{recipe}_tokens")
        )
    assert {name for name in timed | twin if timed.get(name) != twin.get(name)} == {
        "trainer.max_time", "max_tokens", "threads"
    }  # fmt: skip
    text_file.write_text(text_file.read_text()[:6000])
    small = ["max_tokens=2_048", "scheduler.warmup_steps=1", "model.n_layer=1", "data.batch_size=2", "compile=false"]
    small += ["data=text", f"data.path={text_file}", "trainer=cpu", "sample_length=1", "hydra.run.dir=run"]
    ended = train(f"experiment={recipe}_tokens", *small)
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["steps"], results["stopped_by"]) == (4, "tokens")
    ended = call("reproduce", "run")
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.startswith("Bitwise equal")


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_of_a_run_that_ended_by_the_clock_as_many_steps_are_repeated(schedule, train, call, tmp_path, text_file):
    common = ["trainer=cpu", "threads=1", "data=text", f"data.path={text_file}", "evaluate=[val]", "sample_length=1"]
    warmup = ["scheduler.warmup_steps=5"] if schedule == "linear" else []
    ended = train(
        *common, f"scheduler={schedule}", *warmup, "trainer.max_time=00:00:00:01", "speed=off", "hydra.run.dir=run"
    )
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stopped_by"] == "time"
    found = json.loads(call("reproduce", "run", "--json").out)
    assert (found["steps"], found["timed"]) == (results["steps"], True)
    assert found["equal"] == (schedule == "constant")
    if schedule == "linear":
        assert found["first_step"] > 6  # the warm-up is counted in steps
        line = f"It ended by the clock: the same {results['steps']:,} steps, but the learning rate followed the clock, "
        assert line + "which no repetition can.\n" in call("reproduce", "run").out


def test_a_run_that_is_begun_again_keeps_the_number_of_threads_it_had_chosen(copied, train, tmp_path):
    assert told(copied)["config"]["threads"] == told(copied)["environment"]["threads"] == 1
    rewrite(copied, lambda found: found["config"].update(threads=2))
    assert train(f"rerun={copied}", "trainer.max_steps=2", "hydra.run.dir=new").code == 0
    assert told(tmp_path / "new")["config"]["threads"] == told(tmp_path / "new")["environment"]["threads"] == 2


def test_a_new_run_takes_the_settings_of_another_and_what_follows_them(train, trained, tmp_path):
    assert train(f"rerun={trained}", "seed=2", "hydra.run.dir=new").code == 0
    old, new = told(trained)["config"], told(tmp_path / "new")["config"]
    assert new["data"]["seed"] == new["callbacks"]["samples"]["seed"] == new["seed"] == 2
    assert new["callbacks"]["checkpoint"]["dirpath"] == str(tmp_path / "new" / "checkpoints")
    assert new["optimizer"] == old["optimizer"]
    assert old["seed"] == told(trained)["seed"] == 1337
    # Without hydra.run.dir the new folder is next to the old one.
    for name in ("new_2", "new_3"):
        assert train("rerun=new", "trainer.max_steps=3").code == 0
        assert told(tmp_path / name)["config"]["trainer"]["max_steps"] == 3


STRANGE: dict[str, Callable[[dict], Any]] = {
    "which no file of conf/ does": lambda found: found["config"]["callbacks"].update(
        evil={"_target_": "os.system", "command": "touch evil"}
    ),
    "no file of conf/": lambda found: found["config"]["model"].update(_target_="charlm.sweep.jobs.become"),
    "looked up elsewhere": lambda found: found["config"].update(model="${oc.create:'{_target_: os.system}'}"),
    "is damaged": lambda found: found.update(config=7),
    "format 99": lambda found: found.update(format=99),
    "outside of the run's folder": lambda found: found["config"]["logger"]["tensorboard"].update(save_dir="/elsewhere"),
}


@pytest.mark.parametrize("told_so", STRANGE)
def test_a_strangers_record_runs_no_code(copied, told_so, monkeypatch, tmp_path):
    rewrite(copied, STRANGE[told_so])
    rewrite(copied, lambda found: found.update(follows={}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told_so):
        check_command(["train.py", f"rerun={copied}"], ROOT / "conf")
    assert not Path("evil").exists()


def test_a_strangers_checkpoint_runs_no_code_where_it_is_resumed(copied):
    content = checkpoint.read(copied / "checkpoints" / "last.ckpt")
    content["charlm"]["config"]["callbacks"]["evil"] = {"_target_": "os.system", "command": "touch evil"}
    checkpoint.write(content, copied / "checkpoints" / "last.ckpt")
    with pytest.raises(InputError, match="no file of conf/"):
        check_command(["train.py", f"resume={copied}", "trainer.max_steps=30"], ROOT / "conf")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000, '{"format": 1}', "\xff"])
def test_a_damaged_record_is_one_line_hydra_errors(copied, call, content):
    (copied / "run.json").write_text(content)
    ended = call("reproduce", str(copied))
    assert (ended.code, ended.err) == (2, f"charlm: {copied}/run.json is damaged, or of another version\n")


SPOILED = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    st.sampled_from([[], {}, "${x}", "${seed}", "${run_dir}", "???", "\x1b[2J", "a\nb"]),
)


def spoil(node: Any, choose: Callable[[int], int], value: Any) -> None:
    """Put `value` somewhere into nested dictionaries, or take something away."""
    while True:
        key = sorted(node)[choose(len(node))]
        if isinstance(node[key], dict) and node[key] and choose(4):
            node = node[key]
            continue
        if choose(3):
            node[key] = value
        else:
            del node[key]
        return


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(SPOILED, st.lists(st.integers(0, 10**6), min_size=12), st.sampled_from(["rerun", "resume"]))
def test_whatever_a_record_says_it_is_refused_or_a_run(trained, tmp_path_factory, value, draws, where):
    folder = tmp_path_factory.mktemp("spoiled") / "run"
    shutil.copytree(trained, folder)
    numbers = iter(draws)

    def choose(n: int) -> int:
        return next(numbers, 0) % n

    if where == "rerun":
        rewrite(folder, lambda found: spoil(found, choose, value))
    else:
        path = folder / "checkpoints" / "last.ckpt"
        content = checkpoint.read(path)
        spoil(content["charlm"], choose, value)
        checkpoint.write(content, path)
        shutil.copy(path, path.with_name("previous.ckpt"))
    with contextlib.suppress(InputError):
        check_command(["train.py", f"{where}={folder}", "trainer.max_steps=21"], ROOT / "conf")
