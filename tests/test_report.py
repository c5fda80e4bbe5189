"""`charlm report`: many runs as one study, on the terminal, as a page and for programs."""

import copy
import html
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from scipy import stats

from charlm.errors import InputError
from charlm.study import read_study
from charlm.study.comparison import SEED_SD, System, against_best
from charlm.study.page import page
from charlm.study.plots import counted_rows, curve_of, draw_curves, draw_png, geometric
from charlm.study.text import text
from charlm.sweep.ledger import Ledger

Make = Callable[..., Path]


@pytest.fixture
def make(trained: Path, tmp_path: Path) -> Make:
    """A function that makes a run folder with settings, a seed and a loss, as the real one of `trained` is."""
    record = json.loads((trained / "run.json").read_text())
    found = json.loads((trained / "results.json").read_text())

    def run(name: str, loss: float | None = 2.0, seed: int = 1, **given: Any) -> Path:
        folder, told, figures = tmp_path / name, copy.deepcopy(record), copy.deepcopy(found)
        changes, results = given.pop("record", {}), given.pop("results", {})
        folder.mkdir(parents=True)
        config = told["config"]
        old, told["seed"], config["seed"], config["data"]["seed"] = config["run_dir"], seed, seed, seed
        for setting, value in given.items():
            node = config
            *path, last = setting.split("__")
            for part in path:
                node = node[part]
            node[last] = value
        words = [f"{setting.replace('__', '.')}={value}" for setting, value in given.items()]
        told["command"] = " ".join(["python", "train.py", *words, f"seed={seed}"])
        text = json.dumps(told | changes).replace(json.dumps(old)[1:-1], json.dumps(str(folder))[1:-1])
        (folder / "run.json").write_text(text)
        if loss is not None:
            figures |= {"val/loss": loss, "val/nats_per_char": loss, "val/bits_per_char": loss / math.log(2)}
            figures |= {"val/perplexity": math.exp(loss)}
            (folder / "results.json").write_text(json.dumps(figures | {"seed": seed} | results))
        return folder

    return run


def test_a_sweep_is_reported_over_its_seeds(train, charlm, text_file, tmp_path):
    sweep = ["-m", "optimizer.lr=0.01,0.1", "seed=1,2,3", "trainer.max_steps=40", "trainer.val_check_interval=20"]
    ended = train(*sweep, "data=text", f"data.path={text_file}", "trainer=cpu", "hydra.sweep.dir=s", timeout=280)
    assert ended.code == 0, ended.err
    assert re.search(r"charlm report s +# what each setting did", " ".join(ended.out.split()))
    names = [f"lr={lr},seed={seed}" for lr in ("0.1", "0.01") for seed in (1, 2, 3)]
    results = [json.loads((tmp_path / "s" / name / "results.json").read_text()) for name in names]

    # For programs, the rows and nothing else; a run that is named twice is one.
    found = json.loads(charlm("report", "s", "s/lr=0.1,seed=1", "--json").out)
    assert not (tmp_path / "s" / "report.html").exists()
    assert (found["swept"], found["unfinished"]) == (["optimizer.lr"], [])
    assert [row["settings"] for row in found["rows"]] == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.01}]
    for row, three in zip(found["rows"], (results[:3], results[3:]), strict=True):
        assert row["seeds"] == [1, 2, 3]
        for figure in ("val/loss", "val/bits_per_char", "val/perplexity", "train/seconds", "train/tokens"):
            values = [one[figure] for one in three]
            mean = sum(values) / 3
            assert row[figure]["mean"] == pytest.approx(mean)
            assert row[figure]["sd"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 2))

    # For people, the same as text and as a page.
    report = charlm("report", "s")
    assert (report.code, report.err) == (0, "")
    assert "6 finished runs" in report.out
    assert "matched by steps and by tokens: each made 40, and they saw 10,240 tokens" in report.out
    best, other = (row["val/loss"] for row in found["rows"])
    lines = [re.escape(f"{loss['mean']:.4f} ± {loss['sd']:.4f}") for loss in (best, other)]
    assert re.search(rf"0\.1 +{lines[0]} +3 .* best\s.*0\.01 +{lines[1]} +3 ", report.out, re.DOTALL)
    assert report.out.endswith("written: s/report.html\n")
    told = (tmp_path / "s" / "report.html").read_text()
    assert "<title>charlm report: s</title>" in told
    assert told.count("<svg") >= 1


def test_the_page_goes_where_it_is_told_and_a_picture_beside_it(make, call, tmp_path):
    grid(make, [1e-3, 1e-2], [8, 16], [1])
    ended = call("report", "g", "--html", "a.html", "--png", "b.png")
    assert ended.code == 0, ended.err
    assert ended.out.endswith("written: a.html\nwritten: b.png\n")
    with Image.open(tmp_path / "b.png") as picture:
        assert min(picture.size) > 400
        assert len(set(picture.convert("L").tobytes())) > 50  # something is drawn
    assert "<svg" in (tmp_path / "a.html").read_text()
    runs = [str(folder.relative_to(tmp_path)) for folder in (tmp_path / "g").iterdir()]
    assert call("report", *runs[:2]).out.endswith("written: report.html\n")
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["empty"], "empty holds no run: give folders"),
        (["damaged"], "damaged holds no run that can be read (damaged/run.json is damaged, or of another version)"),
        (["empty", "--html", "nowhere/report.html"], "nowhere is no folder: make it"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_reported_is_one_line_hydra_errors(call, tmp_path, arguments, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"format": 1')
    ended = call("report", *arguments)
    assert ended.code == 2
    assert told in ended.err
    assert (ended.err.count("\n"), ended.out) == (1, "")


def test_only_what_was_chosen_is_a_setting(make, tmp_path):
    """Neither where a run is, nor what follows its seed, nor what the machine suggests; and a model's own settings
    come with the model.
    """
    gpt = {"_target_": "charlm.model.gpt.GPT", "block_size": 64, "n_layer": 4}
    for seed in (1, 2):
        chosen = {"threads": seed, "speed__steps_per_execution": seed}  # by the machine
        make(f"a{seed}", 2.0 + seed / 100, seed, record={"command": "python train.py"}, **chosen)
        make(f"b{seed}", 1.5 + seed / 100, seed, model=gpt, data__block_size=64)
    study = read_study([tmp_path])
    assert set(study.swept) == {"model", "data.block_size"}  # which two command lines named
    for file in tmp_path.glob("b*/run.json"):
        file.write_text(file.read_text().replace(" data.block_size=64", ""))
    study = read_study([tmp_path])
    assert study.swept == ["model"]
    assert [row.settings for row in study.rows] == [{"model": "gpt"}, {"model": "bigram"}]
    assert any(note.text == "with model also differ: data.block_size" for note in study.notes)


def test_a_setting_that_follows_another_is_told_only_where_it_does_not(make, tmp_path):
    make("a", 2.0, 1)
    make("b", 2.1, 2)
    assert read_study([tmp_path]).swept == []
    make("c", 2.2, 1, data__seed=7, record={"follows": {}})
    assert "data.seed" in read_study([tmp_path]).swept


def test_names_are_short_where_they_can_be(make, tmp_path):
    make("a", optimizer__lr=1e-3, data__val_fraction=0.1)
    make("b", optimizer__lr=1e-2, data__val_fraction=0.2)
    assert read_study([tmp_path]).labels == {"optimizer.lr": "lr", "data.val_fraction": "val_fraction"}


def test_values_that_are_close_are_told_apart(make, tmp_path):
    for number, eps in enumerate((0.99991, 0.99992, 0.5)):
        make(f"r{number}", optimizer__eps=eps)
    assert set(read_study([tmp_path]).formatted["optimizer.eps"].values()) == {"0.99991", "0.99992", "0.5"}


@given(
    st.lists(
        st.tuples(st.sampled_from([1e-3, 1e-2, 1e-1]), st.integers(0, 5), st.floats(0.5, 4)),
        min_size=1,
        unique_by=lambda run: run[:2],
    )
)
def test_a_row_has_the_mean_and_the_spread_of_its_seeds(losses):
    from charlm.study.runs import Run
    from charlm.study.study import study_of

    runs = [Run(f"{lr},{seed}", "finished", None, seed, {"lr": lr}, figures={"val/loss": x}) for lr, seed, x in losses]
    study = study_of(runs)
    rows = {row.settings.get("lr", losses[0][0]): row for row in study.rows}
    assert set(rows) == {lr for lr, _, _ in losses}
    for lr, row in rows.items():
        values = [loss for other, _, loss in losses if other == lr]
        assert row.loss == pytest.approx(sum(values) / len(values))
        assert (row.sd() is None) == (len(values) == 1)
        if len(values) > 1:
            assert row.sd() == pytest.approx(statistics.pstdev(values) * math.sqrt(len(values) / (len(values) - 1)))
    means = [row.loss for row in study.rows]
    assert means == sorted(means)


def systems(*groups: Sequence[float]) -> list[System]:
    """Systems with the given losses, on a text that has no blocks."""
    return [System("x", tuple(range(len(g))), np.array(g, float)[:, None], np.ones(1)) for g in groups]


def test_two_rows_are_tested_as_another_implementation_does():
    for shift in (1.0, 2.0, 2.2, 2.4, 3.0):
        groups = [[24.5, 23.5, 26.4, 27.1, 25.9], [x + shift for x in (24.0, 24.5, 26.1, 27.0, 25.2, 25.9)]]
        [one] = against_best(systems(*groups))
        assert one.p == pytest.approx(stats.tukey_hsd(*groups).pvalue[0, 1], rel=1e-6)
        assert one.p == pytest.approx(stats.ttest_ind(*groups).pvalue, rel=1e-6)


def test_several_rows_are_tested_by_the_point_of_printed_tables():
    """4.339 is the 5% point of the studentized range for 3 groups and 6 degrees of freedom, half of 12."""
    equal = [-1.0, 0.0, 1.0, -1.0, 1.0]
    variance = statistics.variance(equal) / (3.3567 / 4)  # the median of chi-square with 4 degrees of freedom: 3.3567
    for point, verdict in ((4.32, "within noise"), (4.36, "worse")):
        shift = point * math.sqrt(variance / 5)
        found = against_best(systems(equal, equal, [x + shift for x in equal]))
        assert [one.verdict for one in found] == ["within noise", verdict]
    assert [one.verdict for one in against_best(systems([1, 1], [1, 1], [2, 2]))] == ["within noise", "worse"]
    assert against_best(systems([1.0, 2.0])) == []


def test_rows_with_a_large_spread_hide_no_difference_among_the_others_and_are_not_called_worse_by_chance():
    good, worse = [2.000, 2.001, 2.002], [2.020, 2.021, 2.022]
    wild = [[2.0, 2.5, 1.6], [3.3, 2.9, 4.0]]
    found = against_best(systems(good, worse, [2.001, 2.002, 2.000], *wild))
    assert [one.verdict for one in found[:3]] == ["worse", "within noise", "within noise"]


def test_a_row_with_one_seed_is_judged_by_the_spread_of_the_others():
    found = against_best(systems([2.000, 2.004, 1.996], [2.001, 2.005, 1.997], [2.002], [2.5]))
    assert [one.verdict for one in found] == ["within noise", "within noise", "worse"]
    alone = against_best(systems([2.000], [2.001], [2.5]))
    assert [one.verdict for one in alone] == ["within noise", "worse"]
    assert alone[0].seed_sd == SEED_SD


@pytest.mark.parametrize(("rows", "seeds", "tables"), [(2, 3, 2000), (10, 1, 500), (5, 3, 200), (20, 5, 20)])
def test_equal_rows_are_rarely_called_worse(rows, seeds, tables):
    generator = np.random.default_rng([rows, seeds])
    wrong = 0
    for _ in range(tables):
        losses = generator.normal(2, SEED_SD, (rows, seeds))
        found = against_best(systems(*losses[losses.mean(1).argsort()]))
        wrong += any(one.verdict == "worse" for one in found)
    assert wrong <= 0.05 * tables + 3 * math.sqrt(0.05 * 0.95 * tables)


def test_what_noise_explains_is_told_apart_from_what_it_does_not(make, tmp_path):
    losses = {1.0: (2.00, 2.02, 2.04), 2.0: (2.01, 2.03, 2.06), 3.0: (2.50, 2.52, 2.54), 4.0: (2.4,), 5.0: (9, 2, 2.6)}
    for lr, found in losses.items():
        for seed, loss in enumerate(found):
            make(f"lr={lr},seed={seed}", loss, seed, optimizer__lr=lr)
    study = read_study([tmp_path])
    told = {row.settings["optimizer.lr"]: study.verdict(row) for row in study.rows}
    assert told == {1.0: "best", 2.0: "within noise", 3.0: "worse", 4.0: "worse", 5.0: "1 of 3 above uniform"}


def test_a_run_that_was_repeated_counts_once(make, tmp_path):
    make("a", 2.0, 1, record={"started": "2026-01-01T00:00:00+00:00"})
    make("b", 3.0, 1, record={"started": "2026-01-02T00:00:00+00:00"})
    study = read_study([tmp_path])
    assert [[run.loss for run in row.runs] for row in study.rows] == [[3.0]]
    assert any("a run repeats the settings and the seed of a newer one" in note.text for note in study.notes)


def ledger(folder: Path, jobs: dict[str, tuple[Any, Any]]) -> None:
    """A sweep.json, from the state and the reason of each job."""
    made = Ledger(folder)
    for name, (state, reason) in jobs.items():
        made.add(name, [f"optimizer.{one}" for one in name.split(",")], name, state)
        made.set(name, state, reason)


def test_every_way_to_end_is_told(make, tmp_path, call):
    def at(minutes: float) -> str:
        return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat(timespec="seconds")

    make("s/lr=1", 2.0)
    make("s/lr=2", None, record={"status": "failed", "reason": "the loss is not a number"})
    make("s/lr=3", None, record={"status": "running", "heartbeat": at(0)})
    make("s/lr=4", None, record={"status": "running", "heartbeat": at(2), "step": 70})
    make("s/lr=5", None, record={"status": "stopped", "reason": "SIGINT", "step": 80})
    pruned = make("s/lr=6", None, record={"status": "stopped", "reason": "stop_at"})
    (pruned / "validations.csv").write_text("step,seconds,val/loss\n10,0.5,3.5\n20,1.0,3.25\n30,")
    make("s/lr=7", None, record={"status": "finished"})
    make("s/lr=8", None, record={"status": "running", "heartbeat": at(0)})
    jobs: dict[str, Any] = {f"lr={n}": ("done", None) for n in range(1, 8)} | {
        "lr=8": ("failed", "failed: killed by SIGKILL")
    }
    jobs |= {"lr=6": ("pruned", "pruned at step 20"), "lr=9": ("waiting", None)}
    ledger(tmp_path / "s", jobs | {"lr=10": ("failed", "failed: no memory")})
    ended = call("report", "s")
    assert ended.code == 0, ended.err
    out = re.sub(r"\s+", " ", ended.out)
    for line in (
        "failed lr=2: the loss is not a number",
        "running lr=3",
        "killed lr=4: no sign of life since",
        "stopped lr=5: by SIGINT after step 80",
        "pruned lr=6, val loss 3.2500: at step 20",
        "failed lr=7: its results.json is gone",
        "failed lr=8: killed by SIGKILL",
        "waiting lr=9",
        "failed lr=10: no memory",
    ):
        assert line in out
    order = ["without a final figure", "failed", "killed", "stopped", "1 finished run", "not finished", "pruned"]
    assert sorted(map(out.index, order)) == [*map(out.index, order)]
    text = (tmp_path / "s" / "report.html").read_text()
    assert all(word in text for word in ("no sign of life since", ">at step 20<", "killed by SIGKILL", "3.2500"))
    (tmp_path / "s" / "lr=2").rename(tmp_path / "s" / "lr=1" / "lr=2")
    assert json.loads(call("report", "s/lr=6", "--json").out)["unfinished"][0]["state"] == "pruned"
    ledger(tmp_path / "s", {"../../lr=11": ("waiting", None)})
    out = re.sub(r"\s+", " ", call("report", "s").out)
    assert "has a job outside of its folder: not run" in out
    assert "lr=11" not in out


NOTES: dict[str, list[dict[str, Any]]] = {
    "matched by tokens: max_tokens=null ended each, and they saw 5,000 to 5,440 tokens": [
        {"stopped_by": "tokens", "train/tokens": 5000},
        {"stopped_by": "tokens", "train/tokens": 5440},
    ],
    "matched by steps and by tokens: each made 20, and they saw 5,120 tokens": [{}, {}],
    "matched by steps: each made 20, and they saw 5,120 to 9,000 tokens, so this also compares data seen: "
    "max_tokens=5120 matches them": [{}, {"train/tokens": 9000}],
    "ended by steps, after 20 to 40 steps; they saw 5,120 to 10,240 tokens, so this also compares data seen": [
        {},
        {"steps": 40, "train/tokens": 10240},
    ],
    "matched by time: trainer.max_time=null ended each, and they saw 5,120 to 7,000 tokens": [
        {"stopped_by": "time"},
        {"stopped_by": "time", "train/tokens": 7000},
    ],
    "ended differently, by steps (1 run), early stopping (1); they saw 5,120 tokens": [
        {},
        {"stopped_by": "early stopping"},
    ],
    "NOT comparable: characters are predicted after at least data.min_context=4, 8 others": [
        {"min_context": 4},
        {"min_context": 8},
    ],
    "every character is predicted after at least 4 others": [{"min_context": 4}, {"min_context": 4}],
}


def test_tokens_that_differ_are_no_match(make, tmp_path):
    for tokens in (1000, 2000):
        make(f"r{tokens}", max_tokens=tokens, results={"stopped_by": "tokens", "train/tokens": tokens})
    assert any(
        "ended by tokens, after 20 steps; they saw 1,000 to 2,000" in n.text for n in read_study([tmp_path]).notes
    )


@pytest.mark.parametrize("told", NOTES)
def test_what_ended_the_runs_and_what_they_saw_is_told(make, tmp_path, told):
    for number, results in enumerate(NOTES[told]):
        make(f"r{number}", 2.0 + number, results=results, optimizer__lr=number + 1.0)
    assert any(told in note.text for note in read_study([tmp_path]).notes)
    assert not any("tokens" in note.text for note in read_study([tmp_path / "r0"]).notes)


def test_what_cannot_be_compared_is_told_loudly(make, tmp_path, trained):
    record = json.loads((trained / "run.json").read_text())
    other = {"corpus": record["corpus"] | {"sha256": "f" * 64, "name": "other.txt"}}
    git = {"environment": record["environment"] | {"git": {"commit": "c" * 40, "dirty": True}, "device": "H200"}}
    make("a", 2.0)
    make("b", 3.0, data__block_size=32, data__val_fraction=0.5, record=other)
    make("c", 3.5, optimizer__lr=0.5, record=git)
    study = read_study([tmp_path])
    loud = "\n".join(note.text for note in study.notes if note.loud)
    assert "NOT comparable: these losses are of 2 different texts: prose.txt (sha256" in loud
    assert "other.txt (sha256 ffffff...) (1)" in loud
    assert "NOT comparable: the val split is not the same: data.val_fraction is 0.1 (2 runs), 0.5 (1)" in loud
    assert "block sizes differ (8, 32) with data.min_context=1" in loud
    assert {study.verdict(row) for row in study.rows} == {"not comparable"}
    quiet = "\n".join(note.text for note in study.notes if not note.loud)
    assert re.search(r"made by different code: commits \w+ \(2 runs\), ccccccc \(1\)", quiet)
    assert "made on different devices, so that seconds cannot be compared" in quiet


class Page(HTMLParser):
    """Parse a page: the addresses it would fetch, its scripts, tags and text."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {name}={value}")
            self.handlers += [name] if name.startswith("on") else []

    def handle_data(self, data: str) -> None:
        self.text += data


def grid(make: Make, lrs: list[Any], blocks: list[int], seeds: list[int]) -> None:
    for i, lr in enumerate(lrs):
        for block in blocks:
            for seed in seeds:
                loss = 2 + 0.1 * i + 1 / block + 0.01 * seed
                settings = {"optimizer__lr": lr, "data__block_size": block}
                folder = make(f"g/lr={lr},T={block},seed={seed}", loss, seed, **settings, results={"steps": 40})
                lines = [f"{step},{step / 100},{loss + 1 / (1 + step)}" for step in (10, 20, 30)]
                (folder / "validations.csv").write_text("\n".join(["step,seconds,val/loss", *lines, ""]))


def test_the_page_needs_nothing_else_and_has_all_pictures(make, tmp_path):
    grid(make, [1e-3, 1e-2, 1e-1], [8, 16], [1, 2])
    study = read_study([tmp_path / "g"])
    told = page(study, "a study")
    found = Page(told)
    assert found.fetched == []
    assert found.tags.count("svg") == 2 + 1 + 1  # two settings, one pair of them, one kind of curve
    assert found.tags.count("script") == 1
    assert "@import" not in told
    assert not re.search(r"url\((?!#)", told)
    for words in ("Val loss against lr", "Val loss against block_size", "lr and block_size", "against optimizer steps"):
        assert f"{words}." in found.text
    for word in (*(f"{row.loss:.4f}" for row in study.rows), "counted bigram, ", "lr=0.001", "block_size=16"):
        assert word in found.text
    # The cells of the heat map, which are means over seeds.
    assert all(f"{row.loss:.3f}" in found.text for row in study.rows)
    assert page(study, "a study") == told  # the same study, the same bytes


def test_names_from_strangers_are_only_text(make, tmp_path, call):
    evil = "<script>alert(1)</script> & \"'$x^$ [bold]\x1b[31m\u202e"
    for number, lr in enumerate((evil, 0.1)):
        make(f"s/{number}", 2.0 + number, optimizer__lr=lr, record={"command": evil})
    failed = make("s/<img src=x onerror=alert(2)>", None, record={"status": "failed", "reason": f"{evil}\nand more"})
    (failed / "validations.csv").write_text("step,seconds,val/loss\n1,2,nan\n1,2,1e999\n")
    ended = call("report", "s", "--html", "r.html")
    assert ended.code == 0, ended.err
    assert not set("\x1b\u202e") & set(ended.out)
    assert "[bold]" in ended.out
    text = (tmp_path / "r.html").read_text()
    found = Page(text)
    assert (found.tags.count("script"), found.fetched, found.handlers) == (1, [], [])
    assert "img" not in found.tags
    assert "<script>alert(1)</script> & " in found.text
    assert not set("\x1b\u202e") & set(text)


def test_nothing_is_read_twice_and_no_link_leads_round(make, tmp_path):
    make("study/one", 2.0, 1)
    elsewhere = make("elsewhere/two", 2.1, 2)
    (tmp_path / "study" / "linked").symlink_to(elsewhere)
    (tmp_path / "study" / "again").symlink_to(elsewhere)
    (tmp_path / "study" / "round").symlink_to(tmp_path / "study")
    os.mkfifo(tmp_path / "study" / "sweep.json")
    places = [tmp_path / "study", tmp_path / "study" / "one", tmp_path / "elsewhere"]
    study = read_study(places)
    assert [[run.seed for run in row.runs] for row in study.rows] == [[1, 2]]
    assert len(study.runs) == 2


DAMAGE = {
    "run.json": ["", "[]", '{"format": 1}', "[" * 100_000, "\x00\xff"],
    "results.json": ["{", "[1]", "[" * 100_000],
    "sweep.json": ["{", '{"format": 2, "command": [], "jobs": {}}'],
}


@pytest.mark.parametrize(("file", "content"), [(file, content) for file in DAMAGE for content in DAMAGE[file]])
def test_what_is_damaged_is_named_and_the_others_are_reported(make, tmp_path, file, content):
    make("s/good", 2.0)
    bad = make("s/bad", 2.1, optimizer__lr=0.5)
    (bad / file).write_text(content)
    study = read_study([tmp_path])
    assert study.rows[0].runs[0].name.endswith("good")
    assert any(note.text.startswith("left out: ") and "bad" in note.text for note in study.notes)
    assert len(study.runs) == 1 + (file == "sweep.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda child: st.lists(child) | st.dictionaries(st.text(), child),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["config", "corpus", "environment", "results", "step", "command"]), JSON))
def test_whatever_a_stranger_writes_makes_a_page_or_one_line(trained, tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("stranger")
    for number in range(2):
        place = folder / str(number)
        place.mkdir()
        found = json.loads((trained / "results.json").read_text())
        if number and isinstance(changes.get("results"), dict):
            found |= dict.fromkeys(
                ("val/loss", "val/nats_per_char", "baselines", "steps", "stopped_by"), changes["results"]
            )
        record = json.loads((trained / "run.json").read_text())
        record |= {key: value for key, value in changes.items() if number and key != "results"}
        (place / "run.json").write_text(json.dumps(record))
        (place / "results.json").write_text(json.dumps(found))
    study = read_study([folder])
    assert study.rows
    Page(page(study, "strangers"))
    json.dumps(study.found())


def test_a_picture_of_nothing_is_refused(make, tmp_path):
    make("a", 2.0)
    with pytest.raises(InputError, match="nothing to draw"):
        draw_png(read_study([tmp_path]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1e-3, 1e-2], True), ([8, 16, 32], True), ([1, 2, 3], False), ([0.0, 0.1, 0.2], False), ([8, 16], False)],
)
def test_values_that_multiply_are_on_a_logarithmic_axis(values, expected):
    assert geometric(values) is expected


def test_a_search_of_many_values_is_drawn_as_points(make, tmp_path):
    for number in range(20):
        make(
            f"t{number}", 2 + number / 100, optimizer__lr=10 ** (-4 + number / 8), optimizer__weight_decay=0.01 * number
        )
    told = page(read_study([tmp_path]), "a search")
    assert told.count("<svg") == 3
    assert "Every combination that was tried" in told


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_shows_whole_figures(make, tmp_path, width):
    grid(make, [1e-3, 1e-2], [8, 16], [1, 2])
    study = read_study([tmp_path])
    console = Console(width=width, file=io.StringIO())
    console.print(text(study, console))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in out.splitlines())
    assert all(f"{row.loss:.4f} ± {row.sd():.4f}" in out for row in study.rows)


def test_many_settings_share_a_column_or_are_chosen(make, tmp_path, call):
    for i, lr in enumerate((1e-3, 1e-2)):
        many = {"model__n_embd": 64 + i, "model__dropout": 0.25 * i, "optimizer__weight_decay": 0.1 * i}
        make(f"s/{i}", 2 + 0.3 * i, data__batch_size=4 + i, data__min_context=1, optimizer__lr=lr, **many)
    console = Console(width=60, file=io.StringIO())
    console.print(text(read_study([tmp_path / "s"]), console))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "lr=0.001" in out
    assert "2.0000 ±" in out
    assert all(len(line) <= 60 for line in out.splitlines())
    few = call("report", "s", "--columns", "lr,batch_size").out.split("by val loss")[1].split("±")[0]
    assert few.split()[3:5] == ["lr", "batch_size"]
    assert call("report", "s", "--columns", "foo").err.startswith(
        "charlm: --columns foo is no setting in which these runs differ: "
    )


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser: apt-get install chromium")
def test_a_browser_opens_the_page_without_complaint(make, tmp_path):
    grid(make, [1e-3, 1e-2], [8, 16], [1, 2])
    told = page(read_study([tmp_path / "g"]), "a study")
    # Its scripts have run, a click sorts, and what went wrong is the title.
    probe = """<script>
      window.onerror = told => { document.title = 'ERROR ' + told }
      addEventListener('load', () => {
        const head = document.querySelectorAll('table th')[1]; head.click(); head.click()
        document.title += ' first=' + document.querySelector('tbody tr').cells[1].textContent })
    </script></head>"""
    (tmp_path / "r.html").write_text(told.replace("</head>", probe, 1))
    assert "<title>a study first=0.01</title>" in opened(tmp_path / "r.html")


def opened(file: Path, *flags: str) -> str:
    """Return a page as a browser has it after its scripts."""
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    common += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={file.parent / 'u'}"]
    command = ["chromium", *common, *flags, "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser: apt-get install chromium")
@pytest.mark.parametrize(("theme", "text", "ground"), [(0, "rgb(228, 228, 228)", 22), (1, "rgb(27, 27, 27)", 255)])
def test_the_page_fits_four_sizes_in_both_themes_and_asks_for_nothing(make, tmp_path, theme, text, ground):
    """Windows in a page, because Chromium has none of its own as narrow as a phone."""
    many = {"model__n_embd": 64, "model__dropout": 0.25, "optimizer__weight_decay": 0.1, "data__batch_size": 4}
    grid(make, [1e-3, 1e-2], [8, 16], [1, 2])
    make("g/<b>bold</b>", 3.5, **many)
    told = page(read_study([tmp_path / "g"]), "a <script>study</script>")
    widths = (360, 768, 1280, 1920)
    frames = "".join(f'<iframe style="width:{w}px;border:0" srcdoc="{html.escape(told)}"></iframe>' for w in widths)
    probe = """<script>addEventListener('load', () => {
      document.title = [...document.querySelectorAll('iframe')].map(frame => {
        const page = frame.contentDocument, look = frame.contentWindow.getComputedStyle(page.body)
        const loss = page.querySelector('tbody td').getBoundingClientRect(), root = page.documentElement
        const seen = loss.left >= 0 && loss.right <= root.clientWidth
        const asked = frame.contentWindow.performance.getEntriesByType('resource').length
        const bold = page.querySelectorAll('b b').length, fits = root.scrollWidth <= root.clientWidth
        return [frame.clientWidth, fits, seen, asked, bold, look.color, look.backgroundColor].join('|') }).join(' / ')
    })</script>"""
    scheme = "<style>:root, iframe { color-scheme: light dark }</style>"
    (tmp_path / "r.html").write_text(f"<!DOCTYPE html>{scheme}<title></title>{probe}{frames}")
    shown = opened(tmp_path / "r.html", f"--blink-settings=preferredColorScheme={theme}")
    found = re.search("<title>(.*)</title>", shown)
    assert found
    for width, seen in zip(widths, found[1].split(" / "), strict=True):
        assert seen.startswith(f"{width}|true|true|0|0|{text}|rgb({ground},")


def test_ngrams_are_reference_lines_and_have_no_budget(make, tmp_path):
    make("s/gpt", 1.9, results={"train/tokens": 1000})
    make("s/other", 1.8, seed=2, results={"train/tokens": 1000})
    make("s/ngram", 1.6, model___target_="charlm.model.ngram.NGram", results={"steps": 0, "train/tokens": 0})
    for name in ("gpt", "other"):
        (tmp_path / "s" / name / "validations.csv").write_text("step,seconds,val/loss\n5,1.0,2.2\n10,2.0,2.0\n")
    study = read_study([tmp_path / "s"])
    assert not any("ended differently" in note.text or "max_tokens=0" in note.text for note in study.notes)
    assert [row.loss for row in counted_rows(study)] == [1.6]
    figure = Figure()
    curves = [curve for row in study.rows if (curve := curve_of(study, row))]
    draw_curves(figure.subplots(), study, curves, "steps")
    [legend] = figure.legends
    assert "model=ngram, 1.6000" in [line.get_text() for line in legend.get_texts()]


def test_a_report_says_what_the_best_loss_means_and_suits_dark_screens(make, tmp_path):
    make("s/a", 2.0)
    study = read_study([tmp_path / "s"])
    assert study.meaning[0].startswith("The best, ")
    assert study.meaning[1].startswith("2.0000 nats per character is better than counting pairs")
    told = page(study, "s")
    assert study.meaning[1] in told
    assert "prefers-color-scheme: dark" in told
    make("t/a", 2.0, results={"baselines": {}})
    assert read_study([tmp_path / "t"]).meaning == []
