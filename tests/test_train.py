"""Training through the public command: reproducible to the bit, whoever watches, on one process or two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from charlm import checkpoint
from tests.conftest import ROOT, run_command


@pytest.fixture
def run(train, tmp_path, text_file):
    """Train for a few steps into the folder `name`; returns what it left there."""

    def run(name: str, *overrides: str) -> Path:
        ended = train(
            "data=text",
            f"data.path={text_file}",
            "trainer.accelerator=cpu",
            "trainer.max_steps=60",
            "trainer.val_check_interval=25",
            f"hydra.run.dir={name}",
            *overrides,
        )
        assert ended.code == 0, ended.err + ended.out
        assert ended.err == ""
        return tmp_path / name

    return run


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in checkpoint.load(folder).model.parameters()])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_leaves_its_figures_in_one_file(trained, prose):
    found = results(trained)
    assert found["status"] == "finished"
    assert found["corpus"] == "prose.txt"
    assert found["model"] == "bigram"
    assert found["steps"] == 20
    assert found["train/tokens"] == 20 * 32 * 8
    assert found["train/tokens_per_second"] == pytest.approx(found["train/tokens"] / found["train/seconds"])
    assert found["val/targets"] == len(prose) - int(0.9 * len(prose)) - 1
    for split in ("train", "val"):
        assert found[f"{split}/bits_per_char"] == pytest.approx(found[f"{split}/loss"] / 0.6931471805599453)
        assert set(found["baselines"][split]) == {"uniform", "unigram", "bigram"}


def test_the_same_seed_gives_the_same_bits_and_another_other_ones(run, trained):
    again, other = (run(f"seed{seed}", "trainer.max_steps=20", f"seed={seed}") for seed in (1337, 6))
    first = trained
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert results(first)["val/loss"] == results(again)["val/loss"]


def test_the_terminal_shows_what_is_trained_what_came_of_it_and_what_to_type_next(train, text_file):
    ended = train("data=text", f"data.path={text_file}", "trainer.max_steps=20", "hydra.run.dir=a")
    assert ended.err == ""
    before, after = ended.out.split("counted bigram", maxsplit=1)
    for word in (
        "bigram, ",
        "parameters",
        "prose.txt: 20,000 characters",
        "20 steps of 256 tokens",
        "seed 1337",
        "cpu",
    ):
        assert word in before
    for word in ("perplexity", "bits per character", "a sample", "generate a --length 500", "evaluate a", "--logdir ."):
        assert word in after


def test_the_log_of_a_run_has_what_the_terminal_had(trained):
    log = (trained / "train.log").read_text()
    for word in ("parameters", "counted bigram", "a sample"):
        assert word in log


def test_progress_through_a_pipe_is_plain_lines(train, text_file):
    ended = train(
        "data=text", f"data.path={text_file}", "trainer.max_steps=1500", "callbacks.progress.seconds_between_lines=0.05"
    )
    lines = [line for line in ended.out.splitlines() if line.startswith("step ")]
    assert len(lines) > 2
    assert all("loss " in line and "tokens/s" in line for line in lines)
    assert "\r" not in ended.out
    assert "\x1b" not in ended.out


def test_a_run_may_keep_a_test_split(run, call, prose):
    folder = run("a", "data.test_fraction=0.2", "evaluate=[val,test]")
    found = results(folder)
    assert found["val/targets"] == pytest.approx(0.1 * len(prose), abs=3)
    assert found["test/targets"] == pytest.approx(0.2 * len(prose), abs=3)
    assert "train/loss" not in found


def test_accumulation_and_clipping_train(run):
    one = run("a", "data.batch_size=8")
    more = run("b", "data.batch_size=8", "trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=0.5")
    assert results(more)["train/tokens"] == 3 * results(one)["train/tokens"]
    assert results(more)["steps"] == 60


def test_evaluating_a_checkpoint_gives_the_figures_of_the_run_to_the_digit(trained, call):
    folder = trained
    ended = call("evaluate", str(folder), "--json")
    assert ended.code == 0, ended.err
    again, first = json.loads(ended.out), results(folder)
    shared = [key for key in again if key.startswith(("train/", "val/"))]
    assert "val/perplexity_se" in shared
    assert {key: again[key] for key in shared} == {key: first[key] for key in shared}
    assert again["baselines"] == first["baselines"]
    one = json.loads(call("evaluate", str(folder / "checkpoints" / "last.ckpt"), "--split", "val", "--json").out)
    assert one["val/loss"] == first["val/loss"]
    assert "train/loss" not in one


def test_a_run_on_a_relative_path_is_evaluated_from_any_folder(train, tmp_path, text_file):
    assert train("data=text", "data.path=prose.txt", "trainer.max_steps=5", "hydra.run.dir=a").code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = run_command(["charlm", "evaluate", "../a", "--json"], elsewhere, {}, 120)
    assert again.code == 0, again.err
    assert json.loads(again.out)["val/loss"] == results(tmp_path / "a")["val/loss"]


def test_generation_is_repeatable_and_streams(trained, call, charlm):
    folder = trained
    first = charlm("generate", str(folder), "--length", "80", "--prompt", "The ", "--seed", "3")
    assert first.code == 0, first.err
    assert first.out.startswith("The ")
    assert len(first.out) == 4 + 80 + 1
    assert call("generate", str(folder), "--length", "80", "--prompt", "The ", "--seed", "3").out == first.out
    assert call("generate", str(folder), "--length", "80", "--prompt", "The ", "--seed", "4").out != first.out
    asked = ("generate", str(folder), "--length", "20", "--num-samples", "3", "--temperature", "0.5", "--top-k", "5")
    samples = json.loads(call(*asked, "--top-p", "0.9", "--json").out)["samples"]
    assert [len(sample) for sample in samples] == [20, 20, 20]
    assert call(*asked).out.count("--- sample") == 3


@pytest.mark.slow
def test_a_text_is_found_from_where_the_command_was_typed(train, tmp_path, text_file):
    """Also where each job works in a folder of its own, and where train.py is called by a link."""
    chdir = ["hydra.job.chdir=true", "data=text", f"data.path={text_file.name}", "trainer=cpu", "trainer.max_steps=3"]
    ended = train(*chdir, "hydra.run.dir=deep/run")
    assert ended.code == 0, ended.err
    assert "charlm generate deep/run " in ended.out
    assert train("-m", *chdir, "seed=1,2", "hydra.sweep.dir=s").code == 0
    (tmp_path / "link.py").symlink_to(ROOT / "train.py")
    command = [sys.executable, "link.py", "--cfg=job", "--package=data"]
    told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "corpus: tinyshakespeare" in told.stdout
    for place in ("deep/run", "s/seed=1", "s/seed=2"):
        record = json.loads((tmp_path / place / "run.json").read_text())
        assert (record["status"], record["config"]["data"]["path"]) == ("finished", str(text_file))


def test_a_counted_floor_is_not_undercut_on_train(run):
    found = results(run("a", "trainer.max_steps=500", "trainer.val_check_interval=500", "optimizer.lr=0.1"))
    assert found["baselines"]["train"]["bigram"] <= found["train/loss"] < found["baselines"]["train"]["unigram"]


def test_the_default_recipe_learns_tiny_shakespeare(train, tmp_path, shakespeare):
    file = tmp_path / "input.txt"
    file.write_text(shakespeare, encoding="utf-8")
    ended = train("data=text", f"data.path={file}", "hydra.run.dir=a")
    assert ended.code == 0, ended.err
    found = results(tmp_path / "a")
    assert found["train/loss"] >= 2.4519
    assert found["val/loss"] <= 2.490
    assert found["baselines"]["val"]["bigram"] == pytest.approx(2.4819, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_default_recipe_learns_whatever_the_seed(train, tmp_path, shakespeare, seed):
    file = tmp_path / "input.txt"
    file.write_text(shakespeare, encoding="utf-8")
    ended = train("data=text", f"data.path={file}", f"seed={seed}", "hydra.run.dir=a")
    assert ended.code == 0, ended.err
    assert results(tmp_path / "a")["val/loss"] <= 2.490
