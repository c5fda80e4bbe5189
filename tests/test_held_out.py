"""Documents held out: whole plays or files as val, the error over them, and reports and verdicts over folds."""

import json
import math
import os
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.verdicts import worse_over_folds
from charlm.data import CharDataModule, corpus
from charlm.data.corpora import PLAYS, load_corpus
from charlm.study import systems
from charlm.study.comparison import compare, over_folds
from charlm.tokenizer import ByteTokenizer

SPEECH = re.compile(r"(?:\A|\n\n)([A-Z][^\n:]{0,40}):\n")
FIRST_WORDS = {
    "Coriolanus": "First Citizen:\nBefore we proceed",
    "Richard III": "GLOUCESTER:\nNow is the winter of our discontent",
    "Richard II": "KING RICHARD II:\nOld John of Gaunt",
    "Romeo and Juliet": "SAMPSON:\nGregory, o' my word",
    "Henry VI, Part 3": "WARWICK:\nI wonder how the king escaped",
    "The Winter's Tale": "ARCHIDAMUS:\nIf you shall chance, Camillo",
    "Measure for Measure": "DUKE VINCENTIO:\nEscalus.",
    "The Taming of the Shrew": "SLY:\nI'll pheeze you",
    "The Tempest": "Master:\nBoatswain!",
}
NAMES = ("a.txt", "b.txt", "c.txt", "d.txt")


def parts_of(text: str) -> list[str]:
    """The plays, cut at the pinned offsets."""
    ends = [*PLAYS.values(), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


# Tiny Shakespeare


def test_each_play_begins_with_its_first_speech_after_a_blank_line(shakespeare):
    for play, part, start in zip(PLAYS, parts_of(shakespeare), PLAYS.values(), strict=True):
        assert part.startswith(FIRST_WORDS[play])
        assert start == 0 or shakespeare[start - 2 : start] == "\n\n"


def test_the_speakers_of_neighbouring_plays_differ(shakespeare):
    speakers = [SPEECH.findall(part) for part in parts_of(shakespeare)]
    assert all(len({*names}) > 10 for names in speakers)
    for before, after in pairwise(speakers):
        assert after[0] not in before
        often = [{name for name, n in Counter(names).items() if n >= 20} for names in (before, after)]
        assert len(often[0] & often[1]) <= 1  # a Duchess of York speaks in both Richards


def test_folds_share_the_text_out_and_train_has_nothing_of_the_play(shakespeare):
    parts = parts_of(shakespeare)
    for fold, play in enumerate(PLAYS, 1):
        text = load_corpus("tinyshakespeare", fold=fold)
        others = "".join(part for i, part in enumerate(parts, 1) if i != fold)
        assert text.text == others + parts[fold - 1]
        assert text.survey.cuts == [len(others)]
        assert text.card()["held_out"] == play
        assert text.survey.sha256 == load_corpus("tinyshakespeare").survey.sha256
    data = CharDataModule("tinyshakespeare", fold=9)
    data.setup()
    assert {*data.splits} == {"train", "val"}
    assert data.tokenizer.decode(data.splits["val"]) == parts[8]
    train = data.tokenizer.decode(data.splits["train"])
    assert train == "".join(parts[:8])
    grams = [parts[8][i : i + 60] for i in range(0, len(parts[8]) - 60, 60)]
    assert not [gram for gram in grams if gram in train]


def test_the_text_is_shown_with_the_numbers_of_its_plays(shakespeare, call):
    env = {"CHARLM_DATA": os.environ["CHARLM_DATA"]}
    assert json.loads(call("data", "tinyshakespeare", "--json", **env).out)["folds"] == [*PLAYS]
    assert "1 Coriolanus, 2 Richard III, " in " ".join(call("data", "tinyshakespeare", **env).out.split())


# Files of a folder


@pytest.fixture
def folder(tmp_path: Path, prose: str) -> Path:
    """Four files of one length, so that nothing but their content tells them apart."""
    (tmp_path / "texts").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "texts" / name).write_text(prose[5000 * i : 5000 * i + 4999] + "\n"[: i % 2])
    return tmp_path / "texts"


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer.from_corpus])
def test_each_file_of_a_folder_is_held_out_also_from_a_store(folder, tmp_path, monkeypatch, small, tokenizer):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    if not small:
        monkeypatch.setattr(corpus, "SMALL", 1000)
    load_corpus.cache_clear()
    texts = [(folder / name).read_text().removesuffix("\n") + "\n" for name in NAMES]
    for fold in (1, 2, 3, 4):
        settings: dict[str, Any] = {"tokenizer": tokenizer} if tokenizer else {}
        data = CharDataModule(path=str(folder), fold=fold, cross_documents=False, **settings)
        data.setup()
        assert data.corpus.small is small
        assert data.tokenizer.decode(data.splits["val"]) == texts[fold - 1]
        assert data.tokenizer.decode(data.splits["train"]) == "".join(t for i, t in enumerate(texts, 1) if i != fold)
        assert len(data.encoded.documents) == 4
        assert data.corpus.card()["held_out"] == NAMES[fold - 1]
    assert (tmp_path / "cache" / "store").exists() is not small
    load_corpus.cache_clear()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data=text", "data.path=texts", "data.fold=5"], "data.fold=5 is not possible: texts has documents 1 to 4"),
        (["data=text", "data.path=texts", "data.fold=0"], "data.fold=0"),
        (["data=text", "data.path=texts/a.txt", "data.fold=1"], "a.txt has none to choose from"),
        (["data=pydoc", "data.fold=2"], "pydoc has none to choose from"),
        (["data=blend", "data.paths=[texts/a.txt,texts/b.txt]", "data.fold=1"], "has none to choose from"),
        (["data=text", "data.path=texts", "data.fold=1", "data.val_fraction=0.2"], "leave out data.val_fraction"),
        (["data=text", "data.path=texts", "data.fold=1", "data.test_fraction=0.1"], "leave out data.val_fraction"),
        (["data.fold=3"], "Tiny Shakespeare could not be had"),  # another text has no such play
        (["-m", "data=text", "data.path=texts", "data.fold=1,9"], "data.fold=9 is not possible"),  # before any job
    ],
)
def test_a_fold_that_does_not_exist_is_one_line(folder, check, settings, words):
    ended = check(*settings, https_proxy="http://127.0.0.1:9")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert words in ended.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    """A sweep of two n-grams over three files, and one of them without folds."""
    from tests.conftest import ROOT, run_command

    place = tmp_path_factory.mktemp("folds")
    (place / "texts").mkdir()
    for i, name in enumerate(NAMES[:3]):
        (place / "texts" / name).write_text(prose[5000 * i : 5000 * i + 5000 - 600 * i])
    common = ["data=text", "data.path=texts", "model=ngram", "logger=none", "sample_length=10"]
    for command in (
        ["-m", *common, "model.order=2,3", "data.fold=1,2,3", "hydra.sweep.dir=folds"],
        [*common, "model.order=3", "hydra.run.dir=tail"],
    ):
        ended = run_command([str(ROOT / "train.py"), *command], place, {}, timeout=240)
        assert ended.code == 0, ended.err
    return place


def results_of(runs: Path, fold: int, order: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / "folds" / f"order={order},fold={fold}" / "results.json").read_text())
    return found


def test_the_losses_of_a_fold_are_those_of_a_count_by_hand(runs):
    texts = [(runs / "texts" / name).read_text().removesuffix("\n") + "\n" for name in NAMES[:3]]
    alphabet = {*"".join(texts)}
    for fold in (1, 3):
        train, val = "".join(t for i, t in enumerate(texts, 1) if i != fold), texts[fold - 1]
        pairs, single = Counter(pairwise(train)), Counter(train[:-1])
        losses = [-math.log((pairs[a, b] + 1) / (single[a] + len(alphabet))) for a, b in pairwise(val)]
        results = results_of(runs, fold, 2)
        assert results["baselines"]["val"]["bigram"] == pytest.approx(sum(losses) / len(losses))
        assert results["val/targets"] == len(losses)


def test_a_report_has_one_row_for_all_folds_with_the_error_over_them(runs, call):
    found = json.loads(call("report", str(runs / "folds"), "--json").out)
    assert found["swept"] == ["model.order"]
    losses = {order: [results_of(runs, fold, order)["val/loss"] for fold in (1, 2, 3)] for order in (2, 3)}
    for row in found["rows"]:
        mine = losses[row["settings"]["model.order"]]
        assert row["folds"] == [1, 2, 3]
        assert row["val/loss"]["mean"] == pytest.approx(np.mean(mine))
        assert row["val/loss_se"] == pytest.approx(stats.sem(mine))
        assert row["val/loss_interval"] == pytest.approx(stats.t.interval(0.95, 2, np.mean(mine), stats.sem(mine)))
    best, other = found["rows"]
    a, b = (losses[row["settings"]["model.order"]] for row in (best, other))
    expected = stats.ttest_rel(b, a)
    assert other["p"] == pytest.approx(expected.pvalue)
    assert other["interval"] == pytest.approx(expected.confidence_interval())
    assert other["verdict"] == ("worse" if expected.pvalue < 0.05 else "within noise")
    pairs = [results_of(runs, fold, 3)["baselines"]["val"]["bigram"] for fold in (1, 2, 3)]
    assert found["references"]["counting pairs"] == pytest.approx(np.mean(pairs))
    shown = " ".join(call("report", str(runs / "folds"), "--html", "x.html").out.split())
    assert "each the val text of its own runs, data.fold=1 to 3: a.txt, b.txt, c.txt" in shown
    assert "± is the standard error of the mean over folds" in shown
    assert f"{np.mean(a):.4f} ± {stats.sem(a):.4f}" in shown


def test_rows_of_the_end_of_the_text_and_of_folds_do_not_compare(runs, call):
    found = json.loads(call("report", str(runs / "folds"), str(runs / "tail"), "--json").out)
    assert "data.fold" in found["swept"]
    assert {row["verdict"] for row in found["rows"]} == {"not comparable"}
    loud = [note["text"] for note in found["notes"] if note["loud"]]
    assert any(text.startswith("NOT comparable: 1 of 3 rows have the end of the text as val") for text in loud)
    ended = call("compare", str(runs / "tail"), f"{runs / 'folds'}@model.order=3")
    assert ended.code == 1
    assert "other splits: data.fold is null and 1, 2, 3" in ended.out


def test_rows_that_lack_a_fold_do_not_compare(runs, call, tmp_path):
    shutil.copytree(runs / "folds", tmp_path / "folds")
    (tmp_path / "folds" / "sweep.json").unlink()
    shutil.rmtree(tmp_path / "folds" / "order=2,fold=2")
    found = json.loads(call("report", "folds", "--json").out)
    assert {row["verdict"] for row in found["rows"]} == {"not comparable"}
    assert "1 of 2 rows have only some, such as 1, 3" in found["notes"][0]["text"]


def test_compare_pairs_systems_by_fold_and_runs_of_one_fold_by_text(runs, call):
    names = [f"{runs / 'folds'}@model.order={order}" for order in (2, 3)]
    found = json.loads(call("compare", *names, "--json").out)
    a, b = ([results_of(runs, fold, order)["val/loss"] for fold in (1, 2, 3)] for order in (2, 3))
    expected = stats.ttest_rel(b, a)
    assert found["n_folds"] == 3
    assert found["difference"] == pytest.approx(np.mean(b) - np.mean(a), abs=1e-5)
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-3)
    assert found["interval"] == pytest.approx(expected.confidence_interval(), abs=1e-5)
    assert "over 3 folds" in " ".join(call("compare", *names).out.split())
    alone = json.loads(call("compare", *(f"{name},data.fold=2" for name in names), "--json").out)
    assert alone["n_folds"] == 0
    assert alone["difference"] == pytest.approx(b[1] - a[1], abs=1e-5)
    ended = call("compare", f"{names[0]},data.fold=1", f"{names[0]},data.fold=2")
    assert (ended.code, "other splits: data.fold is 1 and 2" in ended.out) == (1, True)


def test_a_run_of_a_fold_is_certified_and_has_no_published_figures(runs, call):
    run = str(runs / "folds" / "order=3,fold=2")
    found = json.loads(call("evaluate", run, "--certify", "--json").out)
    assert found["val/loss"] == pytest.approx(results_of(runs, 2, 3)["val/loss"])
    assert "what is counted is the train split" in found["certified"]
    assert found["published"] == []


def test_a_resumed_run_of_a_fold_is_to_the_bit_the_unbroken_one(folder, train, call):
    settings = ["data=text", "data.path=texts", "data.fold=2", "logger=none", "trainer.max_steps=30", "trainer=cpu"]
    assert not train(*settings, "hydra.run.dir=run", "stop_at=10", "seed=5").code
    resumed = train("resume=run")
    assert resumed.code == 0, resumed.err
    assert json.loads(call("reproduce", "run", "--json").out)["equal"]  # which trains all of it at once


# Statistics


def test_folds_with_several_seeds_are_their_means():
    nats = torch.tensor([100.0, 100.0]).double()
    found = [(nats, torch.tensor([loss, loss]).double()) for loss in (1.0, 3.0, 5.0, 7.0)]
    system = systems.system_of("x", [1, 2, 1, 2], [4, 4, 7, 7], found)
    assert system.folds == (4, 7)
    assert system.seeds == (1, 2)
    assert system.nats.tolist() == [pytest.approx([0.02, 0.06])]


def test_many_seeds_of_each_fold_are_no_more_documents():
    rng = np.random.default_rng(0)
    losses = rng.normal(1.5, 0.1, (2, 5))
    one, many = (compare([over_folds("x", seeds, range(5), row) for row in losses])[0] for seeds in ([1], [*range(10)]))
    assert (one.p, one.se) == (many.p, many.se)
    assert one.p == pytest.approx(stats.ttest_rel(*losses).pvalue)


@pytest.mark.parametrize("n_folds", [3, 9])
@pytest.mark.parametrize("n_rows", [2, 3, 10])
def test_reports_seldom_call_equal_rows_over_folds_worse(n_folds, n_rows):
    n = 200
    assert worse_over_folds(n, n_folds, n_rows) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
