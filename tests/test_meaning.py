"""What a run says of its loss: where it lies, whether it overfits, and what would help most."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charlm.meaning import meaning

DATA: dict[str, Any] = {"data": {"val_fraction": 0.1}}
BASELINES = {"uniform": 4.2, "unigram": 3.3, "bigram": 2.5}


def results(loss: float, **changes: Any) -> dict[str, Any]:
    found = {"val/loss": loss, "val/nats_per_char": loss, "val/share": 1.0, "model": "gpt", "corpus": "a.txt"}
    found |= {"val/targets": 100, "val/characters": 100, "val/bytes": 100, "baselines": {"val": BASELINES}}
    return found | {"steps": 1000, "train/seconds": 9.0, "stopped_by": "steps"} | changes


def of(
    tmp_path: Path, found: dict[str, Any], losses: list[float], train: float | None = None, **model: Any
) -> list[str]:
    """What is said of a run whose validations had these losses, every 100 steps."""
    lines = [f"{100 * i},{i}.0,{loss}" for i, loss in enumerate(losses, 1)]
    (tmp_path / "validations.csv").write_text("\n".join(["step,seconds,val/loss", *lines, ""]))
    if train is not None:
        np.full(300, train, "<f4").tofile(tmp_path / "losses.f32")
    return meaning(found, DATA | {"model": model or {"n_layer": 2, "n_embd": 8}}, tmp_path)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (5.0, "5.0000 nats per character is worse than guessing among all symbols (4.2000)."),
        (3.5, "3.5000 nats per character lies between guessing (4.2000) and counting characters (3.3000)."),
        (2.6, "2.6000 nats per character lies between counting characters (3.3000) and counting pairs (2.5000)."),
        (1.9, "1.9000 nats per character is better than counting pairs (2.5000)."),
    ],
)
def test_it_says_between_which_known_figures_a_loss_lies(tmp_path, loss, words):
    assert of(tmp_path, results(loss, steps=0), []) == [words]


def test_published_results_are_among_them(tmp_path):
    known = "nats per character lies between counting pairs (2.5000) and bz2, given train (1.6622)."
    assert known in of(tmp_path, results(1.9, steps=0, corpus="tinyshakespeare"), [])[0]
    ngram = of(tmp_path, results(1.6, steps=0, corpus="tinyshakespeare"), [])[0]
    assert "and modified Kneser-Ney 7-gram, windows of 256 (model=ngram) (1.5296)" in ngram
    better = of(tmp_path, results(1.4, steps=0, corpus="tinyshakespeare"), [])[0]
    assert better.endswith("is better than lowest claim, one seed (nanoGPT, pull request 254) (1.4543).")


def test_published_results_are_of_the_usual_split_only(tmp_path):
    found = results(1.4, steps=0, corpus="tinyshakespeare")
    other = meaning(found, {"data": {"val_fraction": 0.2}, "model": {}}, tmp_path)
    assert other == ["1.4000 nats per character is better than counting pairs (2.5000)."]


def test_baselines_are_per_character_whatever_the_tokens(tmp_path):
    found = results(3.0, **{"val/nats_per_char": 1.5, "val/targets": 50}, steps=0)
    assert "between counting characters (1.6500) and counting pairs (1.2500)" in of(tmp_path, found, [])[0]


def test_a_val_that_has_risen_is_overfitting(tmp_path):
    lines = of(tmp_path, results(1.9), [2.1, 1.7, 1.8, 1.85])
    assert lines[1].startswith("It overfits: val was lowest at step 200 (1.7000) and has risen since.")
    assert "callbacks=[default,best]" in lines[1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    assert "checkpoints/best.ckpt has that state" in of(tmp_path, results(1.9), [2.1, 1.7, 1.8, 1.85])[1]
    part = of(tmp_path, results(1.9, **{"val/share": 0.1}), [2.1, 1.7, 1.705])  # the final loss is of other text
    assert not part[1].startswith("It overfits")


@pytest.mark.parametrize(
    ("stopped_by", "setting"), [("steps", "trainer.max_steps"), ("tokens", "max_tokens"), ("time", "trainer.max_time")]
)
def test_a_val_that_still_falls_asks_for_more_steps(tmp_path, stopped_by, setting):
    lines = of(tmp_path, results(1.8, stopped_by=stopped_by), [2.2, 2.0, 1.9])
    assert lines[1] == f"Val was still falling: more steps would probably help most, a larger {setting}."


def test_a_gap_to_train_asks_for_more_text(tmp_path):
    lines = of(tmp_path, results(1.8), [1.9, 1.803, 1.802], train=1.2)
    assert lines[1] == "Train is much lower than val: more text would probably help most, or dropout."


def test_without_a_gap_a_larger_model_is_the_next(tmp_path):
    assert "a larger model.n_embd" in of(tmp_path, results(1.8), [1.9, 1.803, 1.802], train=1.78)[1]
    assert "model=gpt" in of(tmp_path, results(2.6), [2.7, 2.603, 2.602], train=2.6, block_size=8)[1]


def test_a_bigram_at_its_floor_can_do_no_better(tmp_path):
    assert "No table of pairs can do better" in of(tmp_path, results(2.504, model="bigram"), [2.51])[1]


def test_damaged_files_of_a_run_cost_no_line(tmp_path):
    (tmp_path / "losses.f32").write_bytes(b"abc")
    (tmp_path / "validations.csv").write_text("nonsense")
    assert len(meaning(results(1.9), DATA | {"model": {}}, tmp_path)) == 2
