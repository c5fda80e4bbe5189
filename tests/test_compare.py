"""Verdicts: how often they are wrong in simulations, and what the command says of real runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.verdicts import BLOCKS, simulated, trials
from charlm.errors import InputError
from charlm.study import systems
from charlm.study.comparison import compare, holm, more_seeds


@pytest.mark.parametrize("n_seeds", [1, 3, 5])
@pytest.mark.parametrize("n_rows", [2, 10])
def test_equal_systems_are_seldom_called_better(n_seeds, n_rows):
    assert trials(150, n_seeds, n_rows)["better"] <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", [1, 3, 5])
@pytest.mark.parametrize("n_rows", [2, 5, 10, 20])
def test_of_two_thousand_equal_tables_at_most_six_percent_call_any_better(n_seeds, n_rows):
    assert trials(2000, n_seeds, n_rows)["better"] <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("n_seeds", "n_rows", "tables"), [(1, 10, 2000), (3, 2, 2000), (5, 2, 2000), (3, 10, 100)])
def test_reports_seldom_call_equal_rows_worse(n_seeds, n_rows, tables):
    error = 3 * (0.05 * 0.95 / tables) ** 0.5
    assert trials(tables, n_seeds, n_rows, reports=tables)["worse"] <= 0.05 + error


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", [3, 5])
@pytest.mark.parametrize("effect", [0.0, -0.01])
def test_intervals_hold_the_difference_as_often_as_they_say(n_seeds, effect):
    assert 0.88 <= trials(4000, n_seeds, 2, effect, level=0.9)["covered"] <= 0.92


def test_more_seeds_show_smaller_differences():
    shown = [trials(200, n_seeds, 2, -0.015)["better"] for n_seeds in (1, 3, 5)]
    assert shown == sorted(shown)
    assert shown[0] < 0.6 < shown[2]


def test_a_verdict_says_how_many_more_seeds_would_help():
    assert more_seeds(0.005, paired=0.0, sd=0.005, there=3) == 13  # (1.96 + 0.84)^2 * 2 = 15.7
    assert more_seeds(0.001, paired=0.01**2, sd=0.005, there=3) is None
    rng = np.random.default_rng(0)
    text = np.full(BLOCKS, 1.5)
    [one] = compare([simulated(rng, text, 2), simulated(rng, text, 2, 0.005)])
    assert "more seeds of each would show" in one.text("B") or "no number of seeds would show" in one.text("B")
    much = replace(one, verdict="within noise", more_seeds=3167)
    assert "as good as equal: more than 100 more seeds" in much.text("B")


def test_the_same_runs_do_not_differ():
    system = simulated(np.random.default_rng(0), np.full(BLOCKS, 1.5), 1)
    [one] = compare([system, system], default_sd=0.0)
    assert (one.verdict, one.difference, one.p) == ("within noise", 0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_corrected_p_values_keep_their_order(p_values):
    found = holm(p_values)
    assert all(p <= corrected <= 1 for p, corrected in zip(p_values, found, strict=True))
    assert sorted(range(len(found)), key=lambda i: (p_values[i], found[i])) == sorted(
        range(len(found)), key=lambda i: (found[i], p_values[i])
    )
    assert min(found) == pytest.approx(min(1, len(p_values) * min(p_values)))


# Real runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, prose) -> Path:
    """Two seeds of a bigram and of a GPT, a sweep, and a bigram of other text."""
    from tests.conftest import ROOT, run_command

    folder = tmp_path_factory.mktemp("compared")
    (folder / "prose.txt").write_text(prose)
    (folder / "other.txt").write_text(prose[::-1])
    common = ["data=text", "data.path=prose.txt", "trainer.max_steps=2000", "logger=none", "optimizer.lr=1e-2"]
    small = ["model=gpt", "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "data.block_size=32"]
    for command in (
        ["-m", *common, "seed=1,2", "hydra.sweep.dir=bigram"],
        [
            "-m",
            *common,
            *small,
            "trainer.max_steps=600",
            "optimizer.lr=5e-3",
            "seed=1,2,3",
            "tokenizer=char,byte",
            "hydra.sweep.dir=gpt",
        ],
        [*common, "data.path=other.txt", "hydra.run.dir=other"],
        [*common, "data.val_fraction=0.2", "hydra.run.dir=split"],
    ):
        ended = run_command([str(ROOT / "train.py"), *command], folder, {}, timeout=240)
        assert ended.code == 0, ended.err
    return folder


def compared(call: Any, *names: str) -> tuple[int, Any]:
    ended = call("compare", *names, "--json")
    return ended.code, json.loads(ended.out)


def test_seeds_of_one_recipe_are_within_noise_and_a_better_model_wins(runs, call):
    one, other = (str(runs / "bigram" / f"seed={seed}") for seed in (1, 2))
    code, found = compared(call, one, other)
    assert (code, found["verdict"]) == (0, "within noise")
    code, found = compared(call, str(runs / "bigram"), f"{runs / 'gpt'}@tokenizer=char")
    assert (code, found["verdict"]) == (0, "better")
    assert found["difference"] < 0
    assert found["interval"][1] < 0
    assert found["n_seeds"] == [2, 3]
    assert found["min_context"] == 4  # half of the bigram's windows
    code, found = compared(call, f"{runs / 'gpt'}@tokenizer=char", str(runs / "bigram"))
    assert found["verdict"] == "worse"


def test_the_difference_is_that_of_the_exact_losses(runs, call):
    names = [str(runs / "gpt" / f"seed=1,tokenizer={kind}") for kind in ("char", "byte")]
    _, found = compared(call, *names)
    losses = [json.loads((Path(name) / "results.json").read_text())["val/nats_per_char"] for name in names]
    assert found["difference"] == pytest.approx(losses[1] - losses[0], abs=1e-5)


def test_the_report_of_a_sweep_says_the_same_as_the_comparison_of_its_rows(runs, call):
    found = json.loads(call("report", str(runs / "gpt"), "--json").out)
    best, other = found["rows"]
    names = [f"{runs / 'gpt'}@tokenizer={row['settings']['tokenizer']}" for row in (best, other)]
    _, alone = compared(call, *names)
    assert other["difference"] == pytest.approx(alone["difference"], abs=1e-4)
    assert other["se"] == pytest.approx(alone["se"], rel=0.02)
    assert other["p"] == pytest.approx(alone["p"], rel=0.1)
    assert list(found["references"]) == ["guessing", "counting characters", "counting pairs"]
    with_others = json.loads(call("report", str(runs / "gpt"), "--json", "--compress").out)["references"]
    assert {"xz, given train", "gzip, given train"} <= with_others.keys()
    assert all(0.5 < loss < 6 for loss in with_others.values())
    shown = call("report", str(runs / "gpt"), "--compress").out
    assert "xz, given train" in shown
    assert "of the text, in pairs by blocks" in " ".join(shown.split())


def test_blocks_that_are_missing_or_damaged_are_not_used(runs, call, tmp_path):
    import shutil

    shutil.copytree(runs / "gpt", tmp_path / "gpt")
    file = next((tmp_path / "gpt").glob("*/val_blocks.csv"))
    for damage in (b"characters,nats\n1000,1.0\n", b"\xff\xfe", b"characters,nats\n1,x\n", b"a\n0,nan\n"):
        file.write_bytes(damage)
        ended = call("report", "gpt")
        assert ended.code == 0
        assert "of the text, in pairs" not in " ".join(ended.out.split())
        assert "of the seed, with a standard deviation" in " ".join(ended.out.split())


def test_three_are_each_compared_with_the_first(runs, call):
    names = [str(runs / "bigram"), f"{runs / 'bigram'}@seed=1", f"{runs / 'gpt'}@tokenizer=char"]
    code, found = compared(call, *names)
    assert code == 0
    assert [one["verdict"] for one in found] == ["within noise", "better"]
    shown = call("compare", *names)
    assert "C is better by" in shown.out
    assert "model" in shown.out


def test_a_checkpoint_is_compared_like_its_run(runs, call):
    run = runs / "bigram" / "seed=1"
    _, found = compared(call, str(run), str(run / "checkpoints" / "last.ckpt"))
    assert found["difference"] == 0


@pytest.mark.parametrize(("other", "reason"), [("other", "other texts"), ("split", "data.val_fraction is 0.1 and 0.2")])
def test_other_texts_and_other_splits_do_not_compare(runs, call, other, reason):
    code, found = compared(call, str(runs / "bigram" / "seed=1"), str(runs / other))
    assert (code, found["verdict"]) == (1, "not comparable")
    assert reason in " ".join(found["reasons"])
    shown = call("compare", str(runs / "bigram" / "seed=1"), str(runs / other))
    assert shown.out.startswith("not comparable: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt", "holds runs that differ in tokenizer: name one of its rows, "),
        ("bigram@optimizer.lr=5", "no finished run has optimizer.lr=5: optimizer.lr is 0.01"),
        ("bigram@nothing=5", "nothing is no setting"),
        ("none", "is no folder"),
    ],
)
def test_a_name_that_stands_for_no_system_is_told(runs, name, words):
    with pytest.raises(InputError, match=words):
        systems.choose(str(runs / name))
