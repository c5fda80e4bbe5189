"""`python train.py -m ...`: every job an ordinary run in a folder with a readable name, one table at the end."""

import csv
import json

import pytest
from rich.console import Console

from charlm import report
from charlm.sweep import names

GRID = ["data.block_size=4,16", "data.batch_size=8,32", "optimizer.lr=1e-3,1e-1"]
FOLDERS = {f"block_size={t},batch_size={b},lr={lr}" for t in (4, 16) for b in (8, 32) for lr in ("0.001", "0.1")}


@pytest.fixture
def sweep(train, text_file):
    def run(*overrides: str):
        fixed = ["data=text", f"data.path={text_file}", "trainer.max_steps=40", "hydra.sweep.dir=s"]
        return train("-m", *fixed, *overrides, timeout=280)

    return run


def test_eight_jobs_make_eight_runs_and_one_table(sweep, tmp_path, train, text_file):
    ended = sweep(*GRID)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    folders = {f.name for f in (tmp_path / "s").iterdir() if f.is_dir()}
    assert folders == FOLDERS
    losses = {name: json.loads((tmp_path / "s" / name / "results.json").read_text())["val/loss"] for name in folders}
    assert len(set(losses.values())) == 8
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert [float(row["val/loss"]) for row in rows] == sorted(losses.values())
    table = ended.out.split("8 runs, by val loss")[1]
    places = [table.index(f"{loss:.4f}") for loss in sorted(losses.values())]
    assert places == sorted(places)
    # A job is what the same command alone would be, bit for bit.
    alone = [
        "data.block_size=16",
        "data.batch_size=8",
        "optimizer.lr=1e-1",
        "trainer.max_steps=40",
        "hydra.run.dir=one",
    ]
    assert train("data=text", f"data.path={text_file}", *alone).code == 0
    found = json.loads((tmp_path / "one" / "results.json").read_text())["val/loss"]
    assert found == losses["block_size=16,batch_size=8,lr=0.1"]


def test_a_job_that_fails_costs_only_itself(sweep, tmp_path):
    """No check can know how much memory there is: this batch has more bytes than an address."""
    ended = sweep("data.batch_size=10000000000000,8,16")
    assert ended.code == 1
    assert ended.err.startswith("charlm: 1 of 3 jobs failed; each one's terminal.log under s tells why")
    assert ended.err.count("\n") == 1
    failed = tmp_path / "s" / "batch_size=10000000000000"
    assert "MemoryError" in (failed / "terminal.log").read_text()
    assert "MemoryError" in (failed / "train.log").read_text()
    assert not (failed / "results.json").exists()
    rows = [*csv.DictReader((tmp_path / "s" / "results.csv").read_text().splitlines())]
    assert [row["status"][:7] for row in rows] == ["failed:", "finishe", "finishe"]


def test_devices_may_be_swept_under_ddp(sweep, tmp_path):
    ended = sweep("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1,2", "data.batch_size=4")
    assert ended.code == 0, ended.err
    tokens = {
        n: json.loads((tmp_path / "s" / f"devices={n}" / "results.json").read_text())["train/tokens"] for n in (1, 2)
    }
    assert tokens == {1: 40 * 4 * 8, 2: 40 * 4 * 8 * 2}


def test_names_are_the_settings_that_vary():
    jobs = [["data.block_size=8", "optimizer.lr=1e-3", "seed=1"], ["data.block_size=8", "optimizer.lr=1e-2", "seed=1"]]
    assert names(jobs) == ["lr=1e-3", "lr=1e-2"]


def test_names_that_would_be_equal_are_told_apart():
    assert names([["a.lr=1", "b.lr=2"], ["a.lr=2", "b.lr=1"]]) == ["a.lr=1,b.lr=2", "a.lr=2,b.lr=1"]
    assert len(set(names([["seed=1"], ["seed=1"]]))) == 2
    assert len(set(names([["data.path=a/b"], ["data.path=a:b"]]))) == 2
    assert all("/" not in name for name in names([["data.path=a/b"], ["data.path=c"]]))


def test_long_values_make_names_that_a_file_system_takes():
    assert all(len(name) < 255 for name in names([[f"data.path={'x' * 500}"], [f"data.path={'y' * 500}"]]))


def test_a_swept_list_stands_in_the_table_as_it_was_typed():
    row = {"status": "failed: see [log]", "val/loss": None}
    rows = [row | {"callbacks": value} for value in ("[default]", "[default,early_stopping]")]
    console = Console(width=100)
    with console.capture() as told:
        console.print(report.table(rows, ["callbacks"], "2 runs"))
    lines = "".join(told.get().split())
    for word in ("[default]", "early_sto", "failed:see[log]"):
        assert word in lines
