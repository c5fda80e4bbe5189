"""Training through the public command: reproducible to the bit, whoever watches, on one process or two."""

import csv
import json
import math
import os
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
    for word in (
        "perplexity",
        "bits per character",
        "a sample",
        "generate a --length 500",
        "evaluate a",
        "charlm board .",
    ):
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
    assert all(("loss " in line and "tokens/s" in line) or "validating: " in line for line in lines)
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


def test_an_order_of_epochs_resumes_to_the_bit_and_is_another_run(run, train, tmp_path, text_file):
    settings = ("data.order=epoch", "data.block_size=32", "data.batch_size=4")
    whole, resumed = run("whole", *settings), tmp_path / "part"
    cut = ["data=text", f"data.path={text_file}", "trainer.accelerator=cpu", "trainer.max_steps=60", "stop_at=37"]
    assert train(*cut, "trainer.val_check_interval=25", "hydra.run.dir=part", *settings).code == 0
    assert json.loads((resumed / "run.json").read_text())["step"] == 37
    assert train("resume=part").code == 0
    assert (resumed / "losses.f32").read_bytes() == (whole / "losses.f32").read_bytes()
    assert torch.equal(weights(resumed), weights(whole))
    assert results(run("random", *settings[1:]))["val/loss"] != results(whole)["val/loss"]


def test_a_model_of_bytes_has_its_loss_in_all_units(train, charlm, tmp_path):
    text = "Zażółć gęślą jaźń, 日本語. " * 200
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    settings = [
        "data=text",
        "data.path=text.txt",
        "trainer=cpu",
        "trainer.max_steps=300",
        "trainer.val_check_interval=300",
    ]
    ended = train(*settings, "tokenizer=byte", "hydra.run.dir=run", "logger=csv")
    assert ended.code == 0, ended.err
    assert "loss, nats per byte" in ended.out
    assert "bits per byte" in ended.out
    found = results(tmp_path / "run")
    n = int(0.9 * len(text))
    assert found["val/bytes"] == len(text[n:].encode()) - 1
    assert found["val/characters"] == len(text) - n - 1
    assert found["val/nats_per_char"] == pytest.approx(found["val/loss"] * found["val/bytes"] / found["val/characters"])
    assert found["val/bits_per_byte"] == pytest.approx(found["val/loss"] / 0.6931471805599453)
    assert found["val/bits_per_char"] == pytest.approx(found["val/nats_per_char"] / 0.6931471805599453)
    [curves] = (tmp_path / "run").glob("**/metrics.csv")
    rows = list(csv.DictReader(curves.read_text().splitlines()))
    [shown] = [float(row["val/bits_per_char"]) for row in rows if row.get("val/bits_per_char")]
    assert shown == pytest.approx(found["val/bits_per_char"], rel=1e-6)
    again = json.loads(charlm("evaluate", "run", "--split", "val", "--json").out)
    assert again["val/loss"] == found["val/loss"]
    out = charlm("generate", "run", "--prompt", "Zażółć", "--length", "40").out
    assert len(out.rstrip("\n")) == len("Zażółć") + 40 or out.endswith("\n\n")
    both = train("-m", *settings, "tokenizer=char,byte", "hydra.sweep.dir=sweep")
    assert both.code == 0, both.err
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines()))
    assert {float(row["val/loss"]) for row in rows} == {
        results(folder)["val/nats_per_char"] for folder in (tmp_path / "sweep").glob("*/") if folder.is_dir()
    }


def test_a_part_of_a_split_is_told_as_a_part(train, charlm, tmp_path, text_file, prose):
    settings = ["data=text", f"data.path={text_file}", "trainer=cpu", "trainer.max_steps=50", "logger=csv"]
    settings += ["trainer.val_check_interval=50", "hydra.run.dir=run", "data.val_targets=200", "data.final_targets=400"]
    ended = train(*settings)
    assert ended.code == 0, ended.err
    found, there = results(tmp_path / "run"), len(prose) - int(0.9 * len(prose)) - 1
    assert found["val/targets"] == 400
    assert found["val/share"] == pytest.approx(400 / there)
    assert f"val ({40000 / there:.2g}% of it)" in ended.out
    [curves] = (tmp_path / "run").glob("**/metrics.csv")
    head = curves.read_text().splitlines()[0]
    assert "val_partial/loss" in head
    again = json.loads(charlm("evaluate", "run", "--split", "val", "--json").out)
    assert again["val/loss"] == found["val/loss"]
    whole = json.loads(charlm("evaluate", "run", "--split", "val", "--whole", "--json").out)
    assert whole["val/targets"] == there
    assert whole["val/loss"] != found["val/loss"]
    assert whole["baselines"]["val"] != found["baselines"]["val"]  # which are of the same part


@pytest.mark.parametrize(("steps", "splits"), [(10, {"val"}), (400, {"train", "val"})])
def test_train_is_evaluated_if_the_run_has_seen_as_much_of_it(train, tmp_path, text_file, prose, steps, splits):
    settings = ["data=text", f"data.path={text_file}", "trainer=cpu", f"trainer.max_steps={steps}"]
    assert train(*settings, "hydra.run.dir=run").code == 0
    assert 256 * 10 < 0.9 * len(prose) < 256 * 400
    assert {*results(tmp_path / "run")["baselines"]} == splits


@pytest.mark.slow
def test_standard_input_is_a_text(tmp_path, prose):
    environment = os.environ | {"CHARLM_CACHE": str(tmp_path / "cache")}

    def train(*overrides: str, given: str = prose) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        return subprocess.run(command, cwd=tmp_path, env=environment, input=given, capture_output=True, text=True)

    settings = ["data=text", "data.path=-", "trainer=cpu", "trainer.max_steps=20"]
    ended = train(*settings, "hydra.run.dir=run", "stop_at=10")
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert Path(record["corpus"]["source"]).read_text() == prose
    assert Path(record["corpus"]["source"]).name.startswith("stdin-")
    assert train("resume=run", given="").returncode == 0
    assert results(tmp_path / "run")["steps"] == 20
    refused = train(*settings, given="")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is empty" in refused.stderr


def test_a_text_can_be_looked_at(charlm, tmp_path):
    (tmp_path / "text.txt").write_text("abab abab\u200b" * 50)
    ended = charlm("data", "text.txt")
    assert ended.code == 0, ended.err
    for part in ("text.txt: 500 characters, 600 bytes, 1 document", "train 450, val 50", "4 symbols", "a 200"):
        assert part in ended.out
    assert "ZERO WIDTH SPACE: 50" in ended.out
    found = json.loads(charlm("data", "text.txt", "--json").out)
    assert found["entropy"]["uniform"] == 2
    counts = [200 / 500] * 2 + [50 / 500] * 2
    assert found["entropy"]["unigram"] == pytest.approx(-sum(p * math.log2(p) for p in counts))
    before = {"a": 200, "b": 200}  # a is always followed by b; b by a, a space or the unusual one; those by a
    assert found["entropy"]["bigram"] == pytest.approx(
        before["b"] / 499 * -sum(p * math.log2(p) for p in (100 / 200, 50 / 200, 50 / 200))
    )
    assert [*found["sample"][0]] == [found["sample"][7][0][0], found["sample"][7][0][1]]
    for mistake in ([], ["text.txt", "--cache"], ["nowhere"], ["text.txt", "--field", "x", "--prune"]):
        ended = charlm("data", *mistake)
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err


def test_a_model_of_byte_pairs_resumes_to_the_bit_and_needs_no_text_to_write(run, train, charlm, tmp_path, text_file):
    settings = ("tokenizer=bpe", "tokenizer.vocab_size=300", "data.block_size=4")
    whole, resumed = run("whole", *settings), tmp_path / "part"
    cut = ["data=text", f"data.path={text_file}", "trainer.accelerator=cpu", "trainer.max_steps=60", "stop_at=30"]
    assert train(*cut, "trainer.val_check_interval=25", "hydra.run.dir=part", *settings).code == 0
    assert train("resume=part").code == 0
    assert (resumed / "losses.f32").read_bytes() == (whole / "losses.f32").read_bytes()
    found = results(whole)
    again = json.loads(charlm("evaluate", "whole", "--split", "val", "--json").out)
    assert again["val/loss"] == found["val/loss"]
    assert found["val/targets"] < found["val/characters"] <= found["val/bytes"]
    text_file.unlink()
    out = json.loads(charlm("generate", "whole", "--prompt", "The ", "--length", "100", "--json").out)
    assert [len(sample) for sample in out["samples"]] == [len("The ") + 100]
    refused = train(*cut, "tokenizer=bpe", "tokenizer.vocab_size=3")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "tokenizer.vocab_size=3" in refused.err
