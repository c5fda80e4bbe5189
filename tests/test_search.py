"""`python train.py -m hydra/sweeper=optuna ...`: trials that learn from those before them, each an ordinary run."""

import csv
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from charlm.errors import InputError
from charlm.sweep.space import Space
from tests.conftest import ROOT
from tests.test_sweep import at_work

LR = "optimizer.lr=tag(log,interval(1e-4,1e3))"


def space(*overrides: str) -> Space:
    return Space(OverridesParser.create().parse_overrides([*overrides]))


def test_a_space_is_told_as_hydra_tells_sweeps():
    made = space(
        "seed=3",
        "optimizer.lr=tag(log,interval(1e-4,1e-1))",
        "optimizer.weight_decay=interval(0,1)",
        "model.n_layer=range(1,5)",
        "data.batch_size=range(8,33,8)",
        "data.block_size=int(tag(log,interval(4,64)))",
        "model.dropout=range(0,0.5,0.25)",
        "callbacks=[default],[default,ema]",
        "+more=choice(a,b,a)",
    )
    assert made.open == {
        "optimizer.lr": FloatDistribution(1e-4, 1e-1, log=True),
        "optimizer.weight_decay": FloatDistribution(0, 1),
        "model.n_layer": IntDistribution(1, 4),
        "data.batch_size": IntDistribution(8, 32, step=8),
        "data.block_size": IntDistribution(4, 64, log=True),
        "model.dropout": FloatDistribution(0, 0.25, step=0.25),
        "callbacks": CategoricalDistribution(["[default]", "[default,ema]"]),
        "more": CategoricalDistribution(["a", "b"]),
    }


def test_of_two_settings_of_the_same_the_last_counts():
    made = space("optimizer.lr=interval(0,1)", "seed=1", "seed=2", "optimizer.lr=interval(1,2)")
    assert made.point({"optimizer.lr": 1.5}) == ["optimizer.lr=1.5", "seed=2"]


def test_the_corners_of_a_space_are_points_of_it_and_have_each_choice_and_both_ends():
    made = space("seed=3", "model=gpt,lstm", "optimizer.lr=interval(0.5,1)", "data.batch_size=range(2,4)")
    first = ["seed=3", "model=gpt", "optimizer.lr=0.5", "data.batch_size=2"]
    assert made.corners() == [
        first,
        ["seed=3", "model=lstm", *first[2:]],
        [*first[:2], "optimizer.lr=1.0", first[3]],
        [*first[:3], "data.batch_size=3"],
    ]
    many = space("data.batch_size=range(1,1000000000)").corners()
    assert many == [["data.batch_size=1"], ["data.batch_size=999999999"]]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("a=1", "leave one open"),
        ("a=interval(1,0)", "low <= high"),
        ("a=interval(0,inf)", "it has no end"),
        ("a=tag(log,interval(0,1))", "low > 0"),
        ("a=tag(log,range(1,9,2))", "no place for a step"),
        ("a=tag(log,choice(1,2))", "the one tag that there is here is log"),
        ("a=tag(linear,interval(1,2))", "the one tag that there is here is log"),
        ("a=range(3,3)", "nothing in it"),
    ],
)
def test_what_cannot_be_searched_is_told(override, told):
    with pytest.raises(InputError, match=told) as raised:
        space(override)
    assert "\n" not in str(raised.value)


@pytest.fixture
def search(train, text_file):
    def run(*overrides: str, folder: str = "s", train=train, **env: str):
        fixed = ["data=text", f"data.path={text_file}", "trainer=cpu", "logger=none", "sample_length=1"]
        if not any(o.startswith("trainer.max_steps") for o in overrides):
            fixed += ["trainer.max_steps=40", "trainer.val_check_interval=10"]
        options = [o for o in overrides if o.startswith("--")]
        given = [*fixed, *(o for o in overrides if o not in options), f"hydra.sweep.dir={folder}"]
        return train("-m", *options, "hydra/sweeper=optuna", *given, timeout=280, **env)

    return run


def rows_of(folder: Path) -> dict[str, tuple[str, ...]]:
    """By the number of a trial: its settings, how it ended, and its val loss."""
    rows = [*csv.DictReader((folder / "results.csv").read_text().splitlines())]
    wanted = ("optimizer.lr", "data.batch_size", "status", "val/loss")
    return {row["trial"]: tuple(row[key] for key in wanted) for row in rows}


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(
        study_name="search", storage=JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    )


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {file.parent.name: file.stat() for file in folder.glob("*/results.json")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.slow
def test_a_search_with_one_worker_repeats_itself_also_where_it_is_begun_with_fewer_trials(search, train, tmp_path):
    command = [LR, "data.batch_size=8,32", "seed=2", "hydra.launcher.n_jobs=1", "hydra.sweeper.prune_startup_trials=1"]
    command.append("hydra.sweeper.n_startup_trials=2")
    whole = search(*command, "hydra.sweeper.n_trials=4", folder="whole")
    assert (whole.code, whole.err) == (0, "")
    folders = sorted(f.name for f in (tmp_path / "whole").iterdir() if f.is_dir())
    assert [name.partition(",")[0] for name in folders] == [f"trial_00{n}" for n in range(4)]
    rows = rows_of(tmp_path / "whole")
    verdicts = [rows[str(n)][2].partition(" ")[0] for n in range(4)]
    assert set(verdicts) == {"finished", "pruned"}
    finished = [float(loss) for *_, how, loss in rows.values() if how == "finished"]
    assert finished == sorted(finished)
    best = next(name for name in folders if name.startswith(f"trial_00{next(iter(rows))},"))
    assert json.loads((tmp_path / "whole" / best / "results.json").read_text())["val/loss"] == finished[0]
    states = {"finished": "done", "pruned": "pruned"}
    ledger = json.loads((tmp_path / "whole" / "sweep.json").read_text())["jobs"]
    assert {n: entry["state"] for n, entry in ledger.items()} == {
        name: states[how] for name, how in zip(folders, verdicts, strict=True)
    }
    trials = study_of(tmp_path / "whole").trials
    assert [trial.state == TrialState.PRUNED for trial in trials] == [how == "pruned" for how in verdicts]

    assert search(*command, "hydra.sweeper.n_trials=2", folder="parts").code == 0
    before = inodes(tmp_path / "parts")
    with (tmp_path / "parts" / "optuna.journal").open("a") as journal:
        journal.write('{"op_code": 4, "wor')  # as a full disk leaves it
    (tmp_path / "parts" / "optuna.journal.lock").touch()  # as a kill may leave it
    ended = train("resume=parts", "hydra.sweeper.n_trials=4", "hydra.launcher.n_jobs=1", timeout=280)
    assert (ended.code, ended.err) == (0, "")
    assert "parts has 2 of these jobs done: 2 to go" in ended.out
    assert before.items() <= inodes(tmp_path / "parts").items()
    assert rows_of(tmp_path / "parts") == rows

    line = next(line for line in ended.out.splitlines() if line.startswith("The best again: "))
    again = train(*line.removeprefix("The best again: python train.py ").split(), "hydra.run.dir=again")
    assert again.code == 0
    assert json.loads((tmp_path / "again" / "results.json").read_text())["val/loss"] == finished[0]


def test_a_trial_that_fails_is_no_success_and_is_tried_again_in_its_folder(search, tmp_path):
    place = tmp_path / "conf" / "callbacks"
    place.mkdir(parents=True)
    (place / "fault.yaml").write_text("fault:\n  _target_: tests.test_sweep.Fault\n  kind: raise\n")
    command = [f"--config-dir={tmp_path / 'conf'}", "callbacks=[default,fault]", "optimizer.lr=interval(0.01,0.1)"]
    command += ["trainer.max_steps=110", "hydra.sweeper.n_trials=2"]
    ended = search(*command, PYTHONPATH=str(ROOT))
    assert ended.code == 1
    assert ended.err.startswith("charlm: 2 of 2 jobs failed")
    assert [trial.state for trial in study_of(tmp_path / "s").trials] == [TrialState.FAIL] * 2
    again = search(*command, PYTHONPATH=str(ROOT))
    assert again.code == 0, again.err
    assert [row[2] for row in rows_trimmed(tmp_path / "s")] == ["finished"] * 2
    assert len(inodes(tmp_path / "s")) == 2
    assert [trial.state for trial in study_of(tmp_path / "s").trials] == [TrialState.FAIL] * 2 + [
        TrialState.COMPLETE
    ] * 2


def rows_trimmed(folder: Path) -> list[list[str]]:
    rows = [*csv.DictReader((folder / "results.csv").read_text().splitlines())]
    return [[row["trial"], row["optimizer.lr"], row["status"]] for row in rows]


@pytest.mark.slow
def test_values_with_which_no_run_can_be_count_as_the_worst_and_not_as_failed(search, tmp_path):
    one = "hydra.sweeper.n_trials=1"
    diverged = search("optimizer.lr=choice(1e30)", one)
    assert (diverged.code, diverged.err) == (0, "")
    assert "pruned: training diverged: the loss of step" in rows_trimmed(tmp_path / "s")[0][2]
    # Both ends are multiples of the three heads.
    holes = search("model=gpt", "model.n_head=3", "model.n_embd=range(12,61)", "optimizer.lr=1e-3", one, folder="h")
    assert (holes.code, holes.err) == (0, "")
    assert "pruned: model.n_embd=" in (tmp_path / "h" / "results.csv").read_text()
    [trial] = study_of(tmp_path / "h").trials
    assert trial.state == TrialState.PRUNED
    assert trial.params["model.n_embd"] % 3


@pytest.mark.slow
def test_a_strangers_search_runs_no_code_and_writes_nowhere_else(search, check, tmp_path):
    assert search("optimizer.lr=choice(0.1,0.2)", "hydra.sweeper.n_trials=1").code == 0
    files = [tmp_path / "s" / name for name in ("sweep.json", "optuna.journal")]
    ledger, journal = (file.read_text() for file in files)
    more = ["resume=s", "hydra.sweeper.n_trials=2"]

    def refused(told: str, ledger: str = ledger, journal: str = journal) -> None:
        for file, text in zip(files, (ledger, journal), strict=True):
            file.write_text(text)
        ended = check(*more)
        assert ended.code == 2
        assert told in ended.err
        assert ended.err.count("\n") == 1

    evil = json.loads(ledger)
    evil["search"]["space"] = {"hydra.searchpath": "[file:///evil]"}
    refused("does not record: not run", ledger=json.dumps(evil))
    evil["search"]["space"] = {"+callbacks.evil": "{_target_: os.system, command: touch evil}"}
    refused("names 'os.system'", ledger=json.dumps(evil))
    [(name, entry)] = json.loads(ledger)["jobs"].items()
    refused("outside of its folder", ledger=json.dumps(json.loads(ledger) | {"jobs": {f"../{name}": entry}}))
    refused("is not of this search", journal=journal.replace(r"\"0.2\"", r"\"{_target_: os.system}\""))
    refused("is damaged, or not Optuna's", journal="[]\n" + journal)
    refused("does not know trial_000", journal="")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer.lr=interval(-1,1)"], "optimizer.lr=-1.0 is not possible: give a number above 0"),
        (["optimizer.lr=tag(log,interval(0,1))"], "cannot be searched: `low > 0`"),
        (["optimizer.lr=0.1"], "a search needs settings to search"),
        (["optimizer.lrr=interval(0.1,1)"], "there is no setting optimizer.lrr: did you mean optimizer.lr?"),
        (["model=gpt,lstmm"], "model=lstmm is not there: choose one of"),
        (["model=interval(1,2)"], "model=interval(1,2) is not there: choose one of"),
        (["model=gpt", "model.n_head=1,3"], "model.n_head=3"),
        ([LR, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 is not possible: give a whole number of at least"),
        ([LR, "hydra.sweeper.n_trails=9"], "did you mean hydra.sweeper.n_trials?"),
        ([LR, "hydra/launcher=basic"], "hydra/launcher=basic is not there: choose one of local, slurm, ray"),
        ([LR, "hydra/sweeper=basic"], "is for a search: add hydra/sweeper=optuna, or give values"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(search, check, tmp_path, overrides, told):
    ended = search(*overrides, train=check)
    assert ended.code == 2
    assert told in ended.err
    assert ended.err.startswith("charlm: ")
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_search_is_many_runs(check):
    ended = check("hydra/sweeper=optuna", "optimizer.lr=0.1")
    assert (ended.code, ended.err) == (2, "charlm: hydra/sweeper=optuna makes many runs: say python train.py -m ...\n")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_thirty_trials_that_are_killed_again_and_again_are_thirty_trials_in_the_end(tmp_path, text_file):
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=30"]
    command += [LR, "data.batch_size=8,32", "data=text", f"data.path={text_file}", "trainer=cpu", "seed=1"]
    command += ["trainer.max_steps=1000", "trainer.val_check_interval=100", "evaluate=[val]", "sample_length=1"]
    rng = random.Random(3)
    before: dict[str, Any] = {}
    for kill, begun in enumerate([3, 8, 12, 16, 20, None]):
        log = tmp_path / "log"
        with log.open("w") as out, subprocess.Popen(command, cwd=tmp_path, stdout=out) as process:
            while process.poll() is None:
                if begun and len([*tmp_path.glob("outputs/*/trial_*")]) >= begun:
                    time.sleep(rng.uniform(0, 2))
                    process.send_signal([signal.SIGKILL, signal.SIGKILL, signal.SIGINT][kill % 3])
                    process.wait()
                time.sleep(0.1)
        # Among its imports, Python itself ends by SIGINT.
        assert process.returncode in ((0,) if begun is None else [(-9,), (-9,), (130, -2)][kill % 3])
        until = time.monotonic() + 30
        while left := at_work(tmp_path):
            assert time.monotonic() < until, f"left: {left}"
        [folder] = (tmp_path / "outputs").iterdir()  # the same command goes on with what it has begun
        assert before.items() <= inodes(folder).items()
        before = inodes(folder)
    assert "30 runs, by val loss" in log.read_text()
    trials = [f.name for f in folder.iterdir() if f.is_dir()]
    assert sorted(name[:9] for name in trials) == [f"trial_{n:03d}" for n in range(30)]
    ledger = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert ledger.keys() == set(trials)
    states = [entry["state"] for entry in ledger.values()]
    assert set(states) == {"done", "pruned"}
    ends = [trial.state for trial in study_of(folder).trials if trial.state != TrialState.FAIL]
    assert [state == TrialState.PRUNED for state in ends] == [state == "pruned" for state in states]
    for name, entry in ledger.items():
        assert (folder / name / "run.json").exists()
        assert (entry["reason"] or "").startswith("pruned") == (entry["state"] == "pruned")
