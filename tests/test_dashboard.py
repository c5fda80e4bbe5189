"""TensorBoard's pages and the other loggers' files; logging never changes training."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import lightning as L
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

from charlm.callbacks import BigramTable, Samples
from charlm.callbacks.bigram_table import TAG, TOP, cell_of, draw_frame, left_of, paste, png
from charlm.callbacks.samples import COLUMNS, as_markdown
from charlm.checkpoint import archive
from charlm.data import CharDataModule
from charlm.logger import FINISHED, TensorBoard
from charlm.module import LanguageModel
from charlm.optimizer.adamw import adamw
from charlm.scheduler import constant
from tests.conftest import ROOT, run_command

SWEEP = ["sweep/lr=0.01", "sweep/lr=0.1"]
ALL = sorted(["another_model", "broken", "single", *SWEEP])
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that a server on this machine answers."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with DIRECT.open(request, timeout=30) as answer:
        return json.load(answer)


def until(found: Callable[[], Any], seconds: float = 60) -> Any:
    """Return the value of `found` as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"nothing within {seconds} s"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    """A single run, a sweep, a run that failed, and one of a model with a setting that the bigram does not have."""
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "prose.txt").write_text(prose, encoding="utf-8")

    def train(*overrides: str, code: int = 0) -> None:
        common = ["data=text", f"data.path={folder / 'prose.txt'}", "trainer=cpu", "trainer.log_every_n_steps=20"]
        ended = run_command([str(ROOT / "train.py"), *overrides, *common], folder, {"COLUMNS": "120"}, timeout=120)
        assert ended.code == code, ended.err + ended.out

    train("hydra.run.dir=outputs/single", "trainer.max_steps=130", "trainer.val_check_interval=50")
    sweep = ("-m", "hydra.sweep.dir=outputs/sweep", "optimizer.lr=0.01,0.1", "seed=7")
    train(*sweep, "trainer.max_steps=60", "trainer.val_check_interval=60")
    train("hydra.run.dir=outputs/broken", "trainer.max_steps=60", "optimizer.lr=1e38", code=1)
    other = TensorBoard(str(folder / "outputs" / "another_model"))
    other.log_hyperparams({"model": "transformer", "model.n_layer": 4})
    other.log_metrics({"final/val/loss": 1.5}, 10)
    other.finalize(FINISHED)
    return folder / "outputs"


@pytest.fixture(scope="module")
def board(outputs: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read all of `outputs`."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(outputs), "--host", "127.0.0.1", "--port", "0"]
    log = outputs.parent / "tensorboard.log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            found = until(lambda: re.search(r"at (http://127\.0\.0\.1:\d+)/", log.read_text()))
            address = found.group(1)
            until(lambda: len(ask(f"{address}/data/runs")) == len(ALL))
            # The last thing that the last run writes.
            until(lambda: len(ended(address)) == len(ALL))
            yield address
        finally:
            server.terminate()


def session_groups(board: str) -> list[dict[str, Any]]:
    statuses = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]
    request = {"startIndex": 0, "sliceSize": 100, "allowedStatuses": statuses, "colParams": []}
    groups: list[dict[str, Any]] = ask(f"{board}/data/plugin/hparams/session_groups", request)["sessionGroups"]
    return groups


def ended(board: str) -> list[dict[str, Any]]:
    return [group for group in session_groups(board) if group["sessions"][0]["status"] != "STATUS_UNKNOWN"]


def scalars(board: str, run: str, tag: str) -> dict[int, float]:
    events = ask(f"{board}/data/plugin/scalars/scalars?{urlencode({'run': run, 'tag': tag})}")
    assert len({step for _, step, _ in events}) == len(events), f"{tag} has two values at one step"
    return {step: value for _, step, value in events}


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_each_run_is_one_line_called_as_its_folder(board, outputs):
    assert sorted(ask(f"{board}/data/runs")) == ALL
    for run in ALL:
        assert len(list((outputs / run).rglob("*tfevents*"))) == 1


def test_curves_have_points_at_their_own_steps_and_reach_the_end(board, outputs):
    assert list(scalars(board, "single", "train/loss")) == [19, 39, 59, 79, 99, 119]
    assert list(scalars(board, "single", "train/tokens_per_second")) == [19, 39, 59, 79, 99, 119]
    assert all(lr == pytest.approx(0.01) for lr in scalars(board, "single", "train/lr").values())
    # 130 is no multiple of 50: the final figures end the curves.
    val = scalars(board, "single", "val/loss")
    assert list(val) == [49, 99, 129]
    assert val[129] == pytest.approx(results(outputs / "single")["val/loss"], rel=1e-6)
    bits = scalars(board, "single", "val/bits_per_char")
    assert bits[129] == pytest.approx(results(outputs / "single")["val/bits_per_char"], rel=1e-6)
    # 60 is one of 60: the last validation is not logged twice.
    assert list(scalars(board, SWEEP[0], "val/loss")) == [59]


def test_no_curve_is_of_something_else(board):
    tags = ask(f"{board}/data/plugin/scalars/tags")
    train, val = {"train/loss", "train/lr", "train/tokens_per_second"}, {"val/loss", "val/bits_per_char"}
    for run in ["single", *SWEEP]:
        assert set(tags[run]) == train | val | {"val/perplexity", "final/val/loss"}


def test_train_and_val_loss_share_a_chart(board):
    (category,) = ask(f"{board}/data/plugin/custom_scalars/layout")["category"]
    (chart,) = category["chart"]
    shown = [tag for tag in ask(f"{board}/data/plugin/scalars/tags")["single"] if matches(chart["multiline"], tag)]
    assert sorted(shown) == ["train/loss", "val/loss"]


def matches(chart: dict[str, Any], tag: str) -> bool:
    return any(re.match(pattern, tag) for pattern in chart["tag"])


def test_hparams_shows_the_final_exact_loss_of_every_run(board, outputs):
    for group in session_groups(board):
        run = group["name"]
        metrics = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        if run in ("single", *SWEEP):
            assert metrics["final/val/loss"] == pytest.approx(results(outputs / run)["val/loss"], rel=1e-6)
            assert metrics["val/loss"] == metrics["final/val/loss"]
        status = group["sessions"][0]["status"]
        assert status == ("STATUS_FAILURE" if run == "broken" else "STATUS_SUCCESS")
    # A run without an end has no verdict.
    assert "final/val/loss" not in next(
        {metric["name"]["tag"] for metric in group["metricValues"]}
        for group in session_groups(board)
        if group["name"] == "broken"
    )


def test_hparams_has_the_columns_of_all_runs_those_that_differ_first(board):
    experiment = ask(f"{board}/data/plugin/hparams/experiment", {"experimentName": ""})
    columns = [info["name"] for info in experiment["hparamInfos"]]
    differing = [info["name"] for info in experiment["hparamInfos"] if info.get("differs")]
    assert differing == ["model", "optimizer.lr", "seed", "trainer.max_steps"]
    assert columns[: len(differing)] == differing
    assert {"model.n_layer", "data", "data.block_size", "optimizer.weight_decay", "trainer.precision"} <= set(columns)
    # The page shows the first five metrics, and the first of them without scrolling.
    assert experiment["metricInfos"][0]["name"]["tag"] == "final/val/loss"
    types = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
    assert types["optimizer.lr"] == "DATA_TYPE_FLOAT64"
    lrs = {group["name"]: group["hparams"].get("optimizer.lr") for group in session_groups(board)}
    assert [lrs[run] for run in SWEEP] == [0.01, 0.1]
    assert lrs["another_model"] is None


def test_charlm_board_has_short_names_and_the_loss_beside_what_was_varied(outputs, tmp_path, browser):
    command = [sys.executable, "-m", "charlm", "board", str(outputs), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        assert server.stdout
        assert server.stderr
        try:
            address = server.stdout.readline().split()[0].rstrip("/")
            until(lambda: len(ended(address)) == 4)
            names = {name for name in ask(f"{address}/data/runs") if name.startswith("lr=")}
            assert {name.split(",")[0] for name in names} == {"lr=0.01", "lr=0.1", "lr=1e+38"}
            assert all("max_steps=" in name and "seed=" in name for name in names)
            experiment = ask(f"{address}/data/plugin/hparams/experiment", {"experimentName": ""})
            shown = {info["name"] for info in experiment["hparamInfos"]}
            assert "optimizer.lr" in shown
            assert len(shown) <= 4
            assert experiment["metricInfos"][0]["name"]["tag"] == "final/val/loss"
            loss = f"{results(outputs / 'single')['val/loss']:.5g}"
            browser(f"{address}/#hparams")
            until(lambda: loss in (text := browser()) and "final/val/loss" in text)
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
            assert server.stderr.read() == ""
        finally:
            server.kill()


def test_charlm_board_needs_runs_and_a_free_port(charlm, tmp_path):
    ended = charlm("board")
    assert (ended.code, ended.err) == (
        2,
        "charlm: outputs is no folder: give folders of runs or of sweeps, such as outputs\n",
    )
    (tmp_path / "outputs").mkdir()
    assert "holds no run" in charlm("board").err


def test_text_and_table_are_there_before_the_first_step_and_until_the_last(board):
    texts = ask(f"{board}/data/plugin/text/text?{urlencode({'run': 'single', 'tag': 'sample/text_summary'})}")
    assert [text["step"] for text in texts] == [0, 50, 100, 130]
    assert all("<pre><code>" in text["text"] for text in texts)
    assert texts[0]["text"] != texts[-1]["text"]
    query = urlencode({"run": "single", "tag": TAG, "sample": 0})
    assert ask(f"{board}/data/plugin/images/tags")["single"].keys() == {TAG}
    pictures = ask(f"{board}/data/plugin/images/images?{query}")
    assert [picture["step"] for picture in pictures] == [0, 50, 100, 130]


def test_a_browser_shows_runs_and_losses(board, outputs, browser):
    """The page of HPARAMS itself, as it opens: every run, and its final loss to the digits of the page."""
    browser(f"{board}/#hparams")
    expected = {run: f"{results(outputs / run)['val/loss']:.5g}" for run in ("single", *SWEEP)}
    shown = until(lambda: text if all(loss in (text := browser()) for loss in expected.values()) else None)
    for name in ("final/val/loss", "optimizer.lr", "seed", *ALL):
        assert name in shown


# All text of a page, TensorBoard's shadow trees included.
READ = """
const read = node => node.nodeType == 3 ? node.textContent : /^(STYLE|SCRIPT|TEMPLATE)$/.test(node.tagName) ? '' :
  [node.shadowRoot, ...node.childNodes].filter(child => child).map(read).join(' ')
return read(document.body)
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A function that goes to an address, if there is one, and returns the text of the page."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser: needs chromium and chromedriver, such as from apt-get install chromium-driver")
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "window-size=1500,1000", f"user-data-dir={tmp_path / 'user'}"]
    options = {"binary": chromium, "args": [f"--{flag}" for flag in flags]}
    log = tmp_path / "driver.log"
    with log.open("w") as file, subprocess.Popen([driver, "--port=0"], stdout=file, stderr=file) as server:
        session = ""
        try:
            port = until(lambda: re.search(r"successfully on port (\d+)", log.read_text())).group(1)
            capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            started = ask(f"http://127.0.0.1:{port}/session", capabilities)
            session = f"http://127.0.0.1:{port}/session/{started['value']['sessionId']}"

            def page(address: str | None = None) -> str:
                if address:
                    ask(f"{session}/url", {"url": address})
                return str(ask(f"{session}/execute/sync", {"script": READ, "args": []})["value"])

            yield page
        finally:
            if session:
                DIRECT.open(urllib.request.Request(session, method="DELETE"), timeout=30).close()
            server.terminate()


def test_lines_of_a_sample_stand_as_they_are_and_stay_in_their_frame():
    text = f"# no heading\n\n\ttab *no* emphasis\n{'x' * (COLUMNS + 3)}\n"
    lines = as_markdown(text).split("\n")
    assert all(line.startswith("    ") for line in lines)
    shown = [line[4:] for line in lines]
    assert shown == ["# no heading", "", "\ttab *no* emphasis", "x" * COLUMNS, "xxx", ""]


@pytest.mark.parametrize("labels", ["ab", [*map(chr, range(1040, 1120))]], ids=["two", "eighty"])
def test_the_picture_puts_a_probability_into_its_row_and_column(labels, tmp_path):
    n = len(labels)
    table = torch.zeros(n, n)
    table[0, 1] = 1.0  # after the first, always the second
    frame = draw_frame([*labels], ["learned", "counted"])
    paste(frame, table, 0)
    paste(frame, torch.full((n, n), 0.25), 1)
    file = tmp_path / "picture.png"
    file.write_bytes(png(frame))
    picture = Image.open(file).convert("RGB")
    assert picture.size == frame.size

    def colour(t: int, row: int, column: int) -> Any:
        cell = cell_of(n)
        return picture.getpixel((left_of(t, n * cell) + column * cell + cell // 2, TOP + row * cell + cell // 2))

    assert colour(0, 0, 1) == (253, 231, 37)
    assert colour(0, 1, 0) == colour(0, 0, 0) == (68, 1, 84)
    assert colour(1, 1, 1) == pytest.approx((33, 145, 140), abs=2)  # half of the scale, which is that of the root


def test_csv_and_none_by_one_word(train, tmp_path, text_file):
    common = ["data=text", f"data.path={text_file}", "trainer.max_steps=50", "trainer.val_check_interval=20"]
    common += ["trainer.log_every_n_steps=10", "evaluate=[val]"]
    for logger in ("csv", "none"):
        ended = train(*common, f"logger={logger}", f"hydra.run.dir={logger}")
        assert (ended.code, ended.err) == (0, "")
        assert "arning" not in ended.out
        assert not list((tmp_path / logger).rglob("*tfevents*"))
    assert not (tmp_path / "none" / "metrics.csv").exists()
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = {name: {int(r["step"]): float(r[name]) for r in rows if r[name]} for name in ("train/loss", "val/loss")}
    assert list(points["train/loss"]) == [9, 19, 29, 39, 49]
    assert list(points["val/loss"]) == [19, 39, 49]
    assert points["val/loss"][49] == results(tmp_path / "csv")["val/loss"]
    assert results(tmp_path / "none")["val/loss"] == results(tmp_path / "csv")["val/loss"]


def test_several_loggers_at_once_and_after_a_resume(train, tmp_path, text_file):
    common = ["data=text", f"data.path={text_file}", "trainer.max_steps=50", "trainer.log_every_n_steps=10"]
    common += ["logger=[tensorboard,csv]", "trainer.val_check_interval=20"]
    assert train(*common, "hydra.run.dir=whole").code == 0
    assert train(*common, "hydra.run.dir=parts", "stop_at=25").code == 0
    assert train("resume=parts").code == 0
    kept = [
        [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file.read_text().splitlines())]
        for file in (tmp_path / "whole" / "metrics.csv", tmp_path / "parts" / "metrics.csv")
    ]
    assert kept[0] == kept[1]
    found = [
        sorted(
            (event.step, value.tag, value.metadata.plugin_data.plugin_name, value.tensor.float_val[:])
            for file in sorted((tmp_path / name).glob("*tfevents*"))
            for event in EventFileLoader(str(file)).Load()
            for value in event.summary.value
            if value.tag in ("train/loss", "val/loss", "final/val/loss")
        )
        for name in ("whole", "parts")
    ]
    assert found[0] == found[1]
    assert {tag for _, tag, *_ in found[0]} == {"train/loss", "val/loss", "final/val/loss"}


def test_progress_through_a_pipe_and_its_end_by_ctrl_c(tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # narrower than a line
    common = ["data=text", f"data.path={text_file}", "hydra.run.dir=run", "trainer.max_steps=1000000"]
    command = [sys.executable, str(ROOT / "train.py"), *common, "callbacks.progress.seconds_between_lines=0.2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        line = next(line for line in process.stdout if line.startswith("step") and "loss" in line)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert re.fullmatch(
        r"charlm: stopped by Ctrl-C after step [\d,]+; go on with:\n  python train.py resume=run\n", told
    )
    assert process.returncode == 130
    assert re.fullmatch(r"step +[\d,]+/1,000,000  loss \d\.\d{4}  (val .*)?[\d,]+ tokens/s  [\d,]+ s left\n", line)


def test_observers_change_no_weight(train, tmp_path, text_file):
    common = ["data=text", f"data.path={text_file}", "trainer.max_steps=60", "trainer.val_check_interval=20"]
    another = "+callbacks.another={_target_: charlm.callbacks.Samples, length: 7, seed: 3}"
    without = ["~callbacks.samples", "~callbacks.bigram_table", "~callbacks.progress", "logger=none"]
    weights = []
    for name, observers in {"without": without, "more": [another]}.items():
        ended = train(*common, *observers, f"hydra.run.dir={name}")
        assert (ended.code, ended.err) == (0, "")
        weights.append(archive.load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"])
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[key], weights[0][key]) for key in other)


class Forgetful(nn.Module):
    """A model whose training takes from the global randomness."""

    block_size = 4

    def __init__(self, vocab_size: int):
        super().__init__()
        layers = nn.Embedding(vocab_size, 8), nn.Dropout(0.5), nn.Linear(8, vocab_size)
        self.layers = nn.Sequential(*layers)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(idx)
        return logits


def test_exhibits_take_nothing_from_the_randomness_of_dropout(tmp_path, text_file):
    def weights(callbacks: list[L.Callback]) -> list[torch.Tensor]:
        L.seed_everything(1, verbose=False)
        data = CharDataModule("text", path=str(text_file), block_size=4, batch_size=4, seed=1)
        data.setup()
        module = LanguageModel(Forgetful(data.tokenizer.vocab_size), adamw_of, constant)
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=12,
            val_check_interval=5,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=5,
            logger=TensorBoard(str(tmp_path)),
            callbacks=callbacks,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            **quiet,
        )
        trainer.fit(module, data)
        return list(module.parameters())

    watched, alone = weights([Samples(length=5), BigramTable()]), weights([])
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))


def adamw_of(model: nn.Module) -> torch.optim.Optimizer:
    return adamw(model, lr=0.01, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0)
