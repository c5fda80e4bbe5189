"""The table of records: honest runs are accepted, and each broken rule is one line."""

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, Ended, run_command

COMMON = ["data=tinyshakespeare", "data.fallback=null", "trainer=cpu", "threads=1", "trainer.max_steps=200"]
COMMON += ["logger=none", "evaluate=[val]", "sample_length=1", "optimizer.lr=1e-2"]


def clean(run: Path, **changes: Any) -> None:
    """Record a clean commit, as a run of a clean clone would, and other changes of its run.json."""
    record = json.loads((run / "run.json").read_text())
    record["environment"]["git"] = {"commit": "0123456789", "dirty": False}
    (run / "run.json").write_text(json.dumps(record | changes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shakespeare) -> Path:
    """Three seeds of a bigram, three of one that learns slower, and a run that keeps hardly any rule."""
    folder, env = tmp_path_factory.mktemp("submitted"), {"CHARLM_DATA": os.environ["CHARLM_DATA"]}
    bad = ["data.val_fraction=0.2", "callbacks=[default,best,early_stopping]", "init_from='better/seed=1'"]
    for command in (
        ["-m", *COMMON, "seed=1,2,3", "hydra.sweep.dir=better"],
        ["-m", *COMMON, "seed=1,2,3", "optimizer.lr=1e-3", "hydra.sweep.dir=record"],
        [*COMMON, *bad, "stop_at=10", "hydra.run.dir=bad"],
        ["resume=bad"],
    ):
        ended = run_command([str(ROOT / "train.py"), *command], folder, env, timeout=240)
        assert ended.code == 0, ended.err
    for run in (*folder.glob("*/seed=*"), folder / "bad"):
        clean(run)
    return folder


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    shutil.copytree(runs / "better", tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture
def submit(call) -> Callable[..., Ended]:
    def submit(*words: object, budget: str = "cpu_90s") -> Ended:
        return call("submit", *map(str, words), "--budget", budget, CHARLM_DATA=os.environ["CHARLM_DATA"])

    return submit


def refusals(ended: Ended) -> list[str]:
    assert (ended.code, ended.err) == (1, "")
    return [line.removeprefix("refused: ") for line in ended.out.splitlines()]


def test_an_honest_and_better_set_of_runs_is_a_record(runs, submit):
    ended = submit(runs / "better", "--against", runs / "record")
    assert ended.code == 0, ended.out + ended.err
    head, _, row, _, rules, verdict = ended.out.splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, row)), strict=True))
    losses = [json.loads(file.read_text())["val/loss"] for file in (runs / "better").glob("*/results.json")]
    assert cells["val loss"] == f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
    assert (cells["seeds"], cells["windows"], cells["commit"]) == ("3", "8", "0123456")
    assert rules.startswith("keeps the rules; ")
    assert rules.endswith(" was trained again: the same to the bit")
    assert verdict.startswith("a record: this is better by ")


def test_without_the_record_the_comparison_is_open(runs, submit):
    ended = submit(runs / "better", "--no-reproduce")
    assert ended.code == 0
    assert ended.out.splitlines()[-2] == "keeps the rules; not reproduced"
    assert ended.out.splitlines()[-1].startswith("not compared: ")


def test_a_difference_within_noise_is_no_record(runs, submit):
    [line] = refusals(submit(runs / "better", "--against", runs / "better"))
    assert line.startswith("no record: +0.0000 ± ")
    [line] = refusals(submit(runs / "record", "--against", runs / "better"))
    assert line.startswith("no record: +")


@pytest.mark.parametrize("name", ["val/loss", "val/nats_per_char", "val/perplexity", "train/tokens", "parameters"])
def test_an_altered_figure_is_not_that_of_the_checkpoint(name, copied, submit):
    file = copied / "seed=2" / "results.json"
    results = json.loads(file.read_text())
    changed = type(results[name])(0.99 * results[name])
    file.write_text(json.dumps(results | {name: changed}))
    [line] = refusals(submit(copied))
    assert f"seed=2: results.json has {name}={changed}, and its checkpoint has " in line


def test_what_is_no_number_is_refused_as_well(copied, submit):
    record, file = copied / "seed=1" / "run.json", copied / "seed=2" / "results.json"
    told = json.loads(record.read_text())
    told["environment"]["processes"] = "many"
    record.write_text(json.dumps(told))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"val/bits_per_byte": "low"}))
    lines = refusals(submit(copied))
    assert any("seed=2: results.json has val/bits_per_byte=low, and its checkpoint has " in line for line in lines)
    assert any("does not record how many processes" in line for line in lines)


def test_each_broken_rule_of_a_run_is_a_line(runs, submit):
    lines = refusals(submit(runs / "bad"))
    starts = [
        "data.val_fraction is 0.2, and records have 0.1",
        "callbacks=best chooses by the loss on val",
        "callbacks=early_stopping chooses by the loss on val",
        "init_from=",
        f"{runs / 'bad'} was stopped and resumed",
        "1 seed: a record needs at least 3",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


def test_one_seed_is_too_few(runs, submit):
    assert refusals(submit(runs / "better" / "seed=1")) == ["1 seed: a record needs at least 3"]


def test_runs_that_differ_in_more_than_the_seed_are_refused(runs, submit):
    lines = refusals(submit(runs / "better", runs / "record"))
    assert lines == [
        "the runs differ in optimizer.lr: a record is one configuration",
        "6 runs have 3 different seeds: give one run for each seed",
    ]


def test_other_text_is_refused(trained, submit):
    assert "trained on prose.txt: the table is about Tiny Shakespeare" in refusals(submit(trained))


def test_code_that_is_in_no_commit_is_refused(copied, submit):
    record = json.loads((copied / "seed=1" / "run.json").read_text())
    environment = record["environment"] | {"git": {"commit": "0123456789", "dirty": True}}
    (copied / "seed=1" / "run.json").write_text(json.dumps(record | {"environment": environment}))
    assert refusals(submit(copied)) == [
        "the code had changes that are not in commit 0123456: commit them, and train again"
    ]
    (copied / "seed=1" / "run.json").write_text(json.dumps(record | {"environment": environment | {"git": None}}))
    assert "the commit is not known: train from a clone of the repository" in refusals(submit(copied))


def test_the_budget_is_a_limit(copied, submit):
    started = json.loads((copied / "seed=1" / "run.json").read_text())["started"]
    clean(copied / "seed=1", heartbeat=(datetime.fromisoformat(started) + timedelta(seconds=91)).isoformat())
    [line] = refusals(submit(copied))
    assert line.endswith("seed=1 took 91 seconds from start to end: the limit is 90")
    assert submit(copied, "--no-reproduce", budget="cpu_10min").code == 0
    [line] = refusals(submit(copied, budget="gpu_1min"))
    assert line == "trained on 1 x cpu, and one GPU minute means one GPU"
    ended = submit(copied, budget="nosuch")
    assert ended.code == 2
    assert "choose one of cpu_90s, cpu_10min" in ended.err


def test_runs_that_the_clock_ended_need_a_twin_which_is_reproduced(runs, copied, submit):
    for file in copied.glob("*/results.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"stopped_by": "time"}))
    [line] = refusals(submit(copied))
    assert line.startswith("the clock ended the runs, which nobody can reproduce: train one more with ")
    ended = submit(copied, "--twin", runs / "better" / "seed=2")
    assert ended.code == 0, ended.out
    assert f"{runs / 'better' / 'seed=2'} was trained again: the same to the bit" in ended.out
    assert refusals(submit(copied, "--twin", runs / "record" / "seed=2")) == ["the twin differs in optimizer.lr"]
    assert refusals(submit(copied, "--twin", copied / "seed=1")) == [
        "the clock ended the twin as well: train it with trainer.max_time=null and max_tokens"
    ]


@pytest.mark.slow
def test_real_runs_that_the_clock_ended_are_accepted_with_a_real_twin(runs, submit, train, tmp_path):
    timed = [word for word in COMMON if not word.startswith("trainer.max_steps")] + ["scheduler=linear"]
    timed += ["scheduler.warmup_steps=10"]
    env = {"CHARLM_DATA": os.environ["CHARLM_DATA"]}
    ended = train("-m", *timed, "seed=1,2,3", "trainer.max_time=00:00:00:02", "hydra.sweep.dir=timed", **env)
    assert ended.code == 0, ended.err
    results = [json.loads(file.read_text()) for file in (tmp_path / "timed").glob("*/results.json")]
    assert {one["stopped_by"] for one in results} == {"time"}
    tokens = max(one["train/tokens"] for one in results)
    ended = train(*timed, "seed=4", f"max_tokens={tokens}", "hydra.run.dir=twin", **env)
    assert ended.code == 0, ended.err
    for run in (*(tmp_path / "timed").glob("seed=*"), tmp_path / "twin"):
        clean(run)
    ended = submit("timed", "--twin", "twin", "--against", runs / "record")
    assert ended.code == 0, ended.out + ended.err
    assert "twin was trained again: the same to the bit" in ended.out
    assert "a record: this is better by " in ended.out


def test_a_run_that_is_not_the_same_when_it_is_trained_again_is_refused(copied, submit):
    for file in copied.glob("*/losses.f32"):
        losses = np.fromfile(file, "<f4")
        losses[6:] = np.nextafter(losses[6:], np.float32(9))
        losses.tofile(file)
    [line] = refusals(submit(copied))
    assert "is not reproduced bit for bit: losses differ from step 7 on" in line


def test_programs_get_the_same(runs, submit):
    found = json.loads(submit(runs / "better" / "seed=1", "--json").out)
    assert found["accepted"] is False
    assert found["failures"] == ["1 seed: a record needs at least 3"]
