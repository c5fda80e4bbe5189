"""Every mistake: one line on standard error with advice, no traceback, and no files left behind."""

import gzip
import importlib.util
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# The file that the fixture text_file writes.
ANY_TEXT = ("data=text", "data.path=prose.txt")


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, without what the tests' own commands print."""
    found = (place for place in folder.rglob("*") if ".command" not in place.relative_to(folder).parts)
    return {str(place): place.read_bytes() if place.is_file() else None for place in found}


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Run a command that is a mistake. Return the one line of its message."""

    def run(command: Callable[..., Any], *arguments: str, **env: str) -> str:
        before = tree(tmp_path)
        ended = command(*arguments, **env)
        assert ended.code == 2, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
        assert ended.out == ""
        assert ended.err.count("\n") == 1, ended.err
        assert ended.err.startswith("charlm: ")
        assert tree(tmp_path) == before
        return str(ended.err)

    return run


# Settings


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("+optimizer.lrr=1", "optimizer.lr"),
        ("++optimizer.lrr=1", "optimizer.lr"),
        ("~optimizer.lrr", "optimizer.lr"),
        ("optimzer.lr=1", "optimizer.lr"),
        ("+optimzer.lr=1", "optimizer"),
        ("lr=1", "optimizer.lr"),
        ("block_size=8", "data.block_size"),
        ("data.blocksize=8", "data.block_size"),
        ("sede=1", "seed"),
        ("+sede=1", "seed"),
        ("~sede", "seed"),
        ("modell=bigram", "model"),
        ("trainer.max_step=5", "trainer.max_steps"),
        ("+trainer.limit_val_batch=5", "trainer.limit_val_batches"),
        ("callbacks.samples.lenght=5", "callbacks.samples.length"),
        ("+callbacks.samples.lenght=5", "callbacks.samples.length"),
        ("~callbacks.samples.lenght", "callbacks.samples.length"),
        ("~callbacks.sample", "callbacks.samples"),
        ("callbacks.smaples.length=5", "callbacks.samples.length"),
        ("hydra.run.dirr=x", "hydra.run.dir"),
        ("max_token=5", "max_tokens"),
        ("callbacks=[default,ema] callbacks.ema.decy=0.5", "callbacks.ema.decay"),
        ("callbacks=ema ~callbacks.emma", "callbacks.ema"),
        ("optimizer=muon optimizer.adam_lr=1", "optimizer.adamw_lr"),
        ("scheduler=linear scheduler.warmup=1", "scheduler.warmup_steps"),
    ],
)
def test_a_key_that_is_not_there_names_the_nearest(refused, check, override, nearest):
    assert f"did you mean {nearest}?" in refused(check, *override.split())


@pytest.mark.parametrize("override", ["xyzzy=1", "+xyzzy=1", "~xyzzy", "+model.xyzzy=1"])
def test_a_key_like_no_other_points_to_the_help(refused, check, override):
    assert "there is no setting " in (told := refused(check, override))
    assert "train.py --help" in told


@pytest.mark.parametrize(
    "override", ["+model.vocab_size=5", "+trainer.logger=true", "+optimizer.params=5", "run_dir=elsewhere"]
)
def test_what_charlm_decides_by_itself_is_no_setting(refused, check, override):
    refused(check, override)


@pytest.mark.parametrize("override", ["~seed", "~model", "~optimizer.lr", "~data.path", "~trainer.devices", "~logger"])
def test_what_a_run_needs_cannot_be_taken_away(refused, check, override):
    assert f"{override} takes away what a run needs" in refused(check, override)


def test_a_setting_without_a_value_is_missing(refused, check):
    added = "+callbacks.more._target_=charlm.callbacks.Checkpoint"
    assert "callbacks.more.dirpath is missing" in refused(check, added)


def choices() -> list[str]:
    """Every single choice of every group, as on the command line, and none."""
    from charlm.schema import GROUPS

    files = [file for group in sorted(GROUPS) for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]
    return ["", *(f"{file.parent.name}={file.stem}" for file in files if file.stem != "base")]


def numbers(choice: str) -> tuple[Any, list[str]]:
    """The configuration with one choice, and the names of the numbers that this brings."""
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, DictConfig):
            for key in map(str, node):
                if not OmegaConf.is_missing(node, key):
                    yield from leaves(node[key], f"{path}.{key}".lstrip("."))
        else:
            yield path, node

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [choice] if choice else [])
    cfg.run_dir = "run"
    found = [path for path, value in leaves(cfg, "") if isinstance(value, int | float) and not isinstance(value, bool)]
    return cfg, [path for path in found if path.startswith(choice.partition("=")[0])]


@pytest.mark.parametrize("choice", choices())
def test_every_number_has_a_type_and_a_range(choice):
    from omegaconf import OmegaConf

    from charlm.errors import InputError
    from charlm.preflight.configs import resolved
    from charlm.preflight.settings import check_settings

    cfg, settings = numbers(choice)
    cfg.data.path, cfg.trainer.accelerator = None, "cpu"  # which data=text and trainer=gpu leave to others
    for setting in settings:
        possible, told = OmegaConf.select(cfg, setting), ""
        for impossible in ("abc", -1_000_000, 8.5, math.nan):
            if impossible == 8.5 and "whole number" not in told:
                continue
            OmegaConf.update(cfg, setting, impossible)
            with pytest.raises(InputError) as refused:
                check_settings(resolved(cfg))
            told = told or str(refused.value)
            assert f"{setting}={impossible} is not possible: give " in str(refused.value)
        OmegaConf.update(cfg, setting, possible)


def test_the_numbers_of_every_group_are_found():
    found = numbers("")[1]
    for known in ("seed", "data.block_size", "optimizer.lr", "trainer.val_check_interval", "callbacks.samples.length"):
        assert known in found
    assert "model.n_head" in numbers("model=gpt")[1]


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=0",
        "optimizer.lr=-1",
        "optimizer.lr=inf",
        "optimizer.lr=null",
        "optimizer.lr=true",
        "optimizer.lr=",
        "optimizer.betas=[0.9]",
        "optimizer.betas=[0.9,2]",
        "optimizer.betas=0.9",
        "data.block_size=0",
        "data.block_size=null",
        "data.block_size=[8]",
        "data.val_fraction=0",
        "data.val_fraction=1",
        "data.test_fraction=1",
        "data.fallback=nosuch",
        "data.fallback=tinyshakespeare",
        "data.corpus=5",
        "seed=4294967296",
        "evaluate=train",
        "evaluate=[5]",
        "trainer.gradient_clip_val=0",
        "trainer.gradient_clip_val=abc",
        "trainer.check_val_every_n_epoch=-1",
        "max_tokens=0",
        "max_tokens=abc",
        "max_tokens=1.5",
        "trainer.max_steps=0",
        "trainer.max_steps=-2",
        "trainer.max_time=5",
        "trainer.max_time=00:00:00:00",
        "trainer.precision=nosuch",
        "trainer.deterministic=5",
        "+trainer.limit_train_batches=-1",
        "+trainer.min_steps=-1",
        "trainer.max_epochs=0",
    ],
)
def test_values_are_held_against_the_signature(refused, check, override):
    assert f"{override.partition('=')[0].lstrip('+')}=" in (told := refused(check, override))
    assert "is not possible: give " in told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model=gpt", "model.n_head=3"], "model.n_embd=128 cannot be shared out to model.n_head=3"),
        (["model=transformerpp", "model.n_embd=12"], "model.n_embd=12"),
        (["model=gpt", "model.block_size=16"], "64 characters are more than the 16 positions"),
    ],
)
def test_parts_of_a_model_must_fit_together(refused, check, settings, words):
    assert words in refused(check, *settings)


def test_fractions_must_leave_something_to_train_on(refused, check, text_file):
    told = refused(check, *ANY_TEXT, "data.val_fraction=0.6", "data.test_fraction=0.5")
    assert "leave nothing to train on" in told


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("model=nosuch", "bigram"),
        ("data=nosuch", "pydoc, text, tinyshakespeare"),
        ("data=base", "pydoc, text, tinyshakespeare"),
        ("trainer=nosuch", "auto, cpu, ddp, gpu"),
        ("callbacks=nosuch", "best, default, early_stopping, ema, none"),
        ("callbacks=[5]", "default, none"),
        ("callbacks=[default,null]", "default, none"),
        ("callbacks=[[default]]", "default, none"),
        ("model=[bigram]", "bigram"),
        ("scheduler=nosuch", "constant, linear, warmup_cosine, warmup_stable_decay"),
        ("experiment=nosuch", "lecture_bigram"),
        ("+experiment=nosuch", "lecture_bigram"),
        ("hydra/launcher=nosuch", "local, slurm, ray"),
        ("hydra/launcher=basic", "local, slurm, ray"),
        ("model=null", "bigram"),
        ("optimizer=5", "adamw"),
        ("optimizer={lr:1}", "adamw"),
    ],
)
def test_a_choice_that_is_not_there_lists_those_that_are(refused, check, override, choices):
    told = refused(check, override)
    assert f"{override.lstrip('+')} is not there: choose one of " in told
    assert set(choices.split(", ")) <= set(told.strip().rpartition("choose one of ")[2].split(", "))


def test_one_of_several_choices_that_is_not_there_lists_those_that_are(refused, check):
    assert "callbacks=nosuch is not there: choose one of best, default" in refused(check, "callbacks=[default,nosuch]")


NO_CALLBACKS = [pytest.param(words, marks=pytest.mark.slow) for words in ("callbacks=none", "callbacks=[none]")]


@pytest.mark.parametrize("callbacks", ["callbacks=[]", *NO_CALLBACKS])
def test_no_observers_are_a_choice(train, text_file, callbacks):
    ended = train(*ANY_TEXT, "trainer.max_steps=2", "logger=none", callbacks)
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["-m", "--cfg=job", "seed=1,2"], "--cfg and --info show one run: leave -m away"),
        (["trainer.max_steps=-1"], "trainer.max_steps=-1 never ends: give max_tokens, or trainer.max_time"),
        (["scheduler=linear", "trainer.max_steps=100"], "warmup_steps=100 leaves nothing of a run of 100 steps"),
        (["scheduler=warmup_cosine", "max_tokens=2560"], "warmup_steps=100 leaves nothing of a run of 10 steps"),
        (["scheduler=linear", "max_tokens=51200", "trainer=ddp"], "warmup_steps=100 leaves nothing of a run of 100"),
        (["callbacks=[default,ema]", "trainer=fsdp"], "callbacks=ema averages whole weights, and trainer=fsdp"),
        (["callbacks=early_stopping", "callbacks.early_stopping.monitor=loss"], "monitor=loss is not possible: give"),
        (["optimizer=muon", "optimizer.adjust_lr_fn=nosuch"], "give one of original, match_rms_adamw"),
    ],
)
def test_settings_that_exclude_one_another(refused, check, settings, words):
    assert words in refused(check, *settings)


@pytest.mark.parametrize("target", ["nosuch.Thing", "charlm.model.bigram", "charlm.model.bigram.Nosuch", "5", "null"])
def test_a_target_must_be_a_class_or_a_function(refused, check, target):
    assert "name a class or a function" in refused(check, f"model._target_={target}")


@pytest.mark.parametrize(
    "argument",
    ["--nosuch", "--config-name=nosuch", "--config-dir=nosuch", "--config-path=nosuch", "=5", "optimizer.lr", "a=[1"],
)
def test_a_command_line_that_cannot_be_read(refused, check, argument):
    refused(check, argument)


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rerun='run"], "'run cannot be read as a quoted path: close its quote, or leave quotes out"),
        (["resume='run"], "'run cannot be read as a quoted path"),
        (["-m", "resume='run"], "'run cannot be read as a quoted path"),
        (["resume=RUN", "seed=["], "seed=[ cannot be read as NAME=VALUE"),
        (["rerun=RUN", "=5"], "there is no setting"),
        (["logger=~", "seed=1"], "logger=~ cannot be read as NAME=VALUE"),
        (["rerun=RUN", "seed='"], "seed=' cannot be read as NAME=VALUE"),
        (["trainer.max_steps='\"21\"'"], "is not possible: give a whole number of at least 1, -1 for no end, or auto"),
        ([f"model={LONG}"], "is not there: choose one of bigram"),
        ([f"experiment={LONG}"], "is not there: choose one of"),
        ([f"hydra/sweeper={LONG}"], "is not there: choose one of"),
        ([f"resume={LONG}"], "is no folder"),
        ([f"hydra.run.dir={LONG}"], "File name too long"),
        (["hydra=1"], "give one of Hydra's settings, as in hydra.run.dir=outputs/NAME"),
        (["-m", "resume=RUN", "hydra=1,2,3"], "leave -m away"),
        (["-m", "hydra=1,2,3"], "give one of Hydra's settings"),
        (["+hydra=1"], "give one of Hydra's settings"),
        (["hydra/job_logging=1"], "hydra/job_logging=1 is not there: choose one of"),
        (["hydra.run.dir=interval(0,1)"], "requires --multirun"),
        (["seed=${data.seed}"], "Recursive interpolation"),
        (["data.batch_size=1_000_000_000_000"], "choose a smaller data.batch_size or data.block_size"),
        (["model=gpt", "model.n_layer=1_000_000"], "choose fewer layers"),
        (["model=gpt", "model.n_embd=10_000_000"], "choose a smaller model"),
        (["threads=1_000_000"], "of at least 1 and of at most 1024"),
    ],
)
def test_words_that_no_grammar_knows_and_numbers_that_no_machine_has(refused, check, trained, arguments, words):
    told = refused(check, *(argument.replace("RUN", str(trained)) for argument in arguments))
    assert words in told
    assert len(told) < 2500


def test_two_values_without_a_sweep_name_the_flag(refused, check):
    assert "--multirun" in refused(check, "optimizer.lr=1e-3,1e-2")


def test_settings_are_checked_before_data(refused, check):
    assert "optimizer.lr=abc" in refused(check, "optimizer.lr=abc", "data=text", "data.path=missing.txt")
    assert "trainer.devices=99" in refused(check, "trainer.devices=99", "data=text", "data.path=missing.txt")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("optimizer.lr=abc", "optimizer.lr=abc is not possible: give "),
        ("model=nosuch", "choose one of bigram"),
        ("~seed", "takes away what a run needs"),
        ("--nosuch", "--nosuch"),
        ("trainer.devices=99", "trainer.devices=99 is not possible"),
        ("data=text data.path=missing.txt", "missing.txt does not exist"),
        ("hydra.run.dir=file", "file cannot be written"),
        ("resume=nowhere", "nowhere is no folder"),
        ("-m data=text data.path=prose.txt optimizer.lr=1e-3,abc", "optimizer.lr=abc"),
        ("-m data=text data.path=prose.txt,missing.txt", "missing.txt does not exist"),
        ("-m optimizer.lr=1e-3,1e-2 ~model", "~model takes away"),
    ],
)
def test_the_command_itself_tells_a_mistake_in_one_line(refused, train, text_file, command, words):
    """The other tests call the checks of the same command without a process."""
    text_file.with_name("file").write_text("in the way")
    assert words in refused(train, *command.split())


# Texts


def test_a_text_needs_a_path(refused, check):
    assert "data.corpus=text needs a path: say data.path=FILE" in refused(check, "data=text")


def test_a_named_corpus_takes_no_path(refused, check):
    assert "give data.corpus=text" in refused(check, "data=pydoc", "data.path=x.txt")


def test_an_unknown_corpus_lists_the_known(refused, check):
    assert "choose one of tinyshakespeare, enwik8, text8, ptb_char, pydoc, text" in refused(check, "data.corpus=nosuch")


@pytest.mark.parametrize("path", ["missing.txt", "missing/*.txt", "nowhere", "a" * 400])
def test_a_text_that_is_not_there(refused, check, path):
    assert path in refused(check, "data=text", f"data.path={path}")


def test_a_folder_without_text_says_what_it_looked_for(refused, check, tmp_path):
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "main.py").write_text("print()")
    told = refused(check, "data=text", "data.path=sources")
    assert ".txt .text .md .rst .jsonl (also .gz and .zst)" in told
    assert "sources/**/*.py" in told


def test_an_empty_file_has_no_text(refused, check, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty" in refused(check, "data=text", "data.path=empty.txt")


def test_white_space_is_text(train, tmp_path):
    (tmp_path / "white.txt").write_text(" \t\n" * 200)
    ended = train("data=text", "data.path=white.txt", "trainer.max_steps=2")
    assert ended.code == 0, ended.err


def test_a_file_that_is_not_utf8_is_named_with_the_place(refused, check, tmp_path):
    (tmp_path / "old.txt").write_bytes(b"caf\xe9 " * 100)
    told = refused(check, "data=text", "data.path=old.txt")
    assert "old.txt is not UTF-8: byte 0xe9 at offset 3" in told
    assert "iconv" in told


def test_the_file_of_a_folder_that_is_not_utf8_is_named(refused, check, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("fine\n" * 100)
    (tmp_path / "texts" / "b.txt").write_bytes(b"0123456789\xff")
    assert "texts/b.txt is not UTF-8: byte 0xff at offset 10" in refused(check, "data=text", "data.path=texts")


@pytest.mark.parametrize("damage", ["cut", "plain", "tail"])
def test_a_broken_gz_is_named(refused, check, tmp_path, damage):
    whole = gzip.compress(os.urandom(5000).hex().encode())
    raw = {"cut": whole[: len(whole) // 2], "plain": b"no gzip at all", "tail": whole[:-8] + bytes(8)}[damage]
    (tmp_path / "text.txt.gz").write_bytes(raw)
    assert "text.txt.gz cannot be unpacked" in refused(check, "data=text", "data.path=text.txt.gz")


@pytest.mark.parametrize(
    ("length", "settings", "split"),
    [
        (5, [], "train split has 4 characters"),
        (50, [], "val split has 5 characters"),
        (100, ["data.test_fraction=0.05"], "test split has 5 characters"),
        (100, ["data.block_size=91"], "train split has 90 characters"),
    ],
)
def test_a_split_must_hold_a_chunk_and_its_last_target(refused, check, tmp_path, length, settings, split):
    (tmp_path / "short.txt").write_text("ab" * (length // 2) + "c" * (length % 2))
    told = refused(check, "data=text", "data.path=short.txt", *settings)
    assert split in told
    assert "choose a smaller data.block_size" in told


def test_a_split_of_just_one_chunk_will_do(train, tmp_path):
    (tmp_path / "short.txt").write_text("abcdefghi" * 10)
    ended = train("data=text", "data.path=short.txt", "data.block_size=8", "trainer.max_steps=2")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("split", ["nosuch", "test"])
def test_a_split_that_is_not_there_lists_those_that_are(refused, check, text_file, split):
    told = refused(check, *ANY_TEXT, f"evaluate=[val,{split}]")
    assert f"'{split}'" in told
    assert "choose one of train, val" in told


def test_val_is_always_evaluated_since_runs_are_compared_by_it(refused, check, text_file):
    assert "evaluate=['train'] leaves out val" in refused(check, *ANY_TEXT, "evaluate=[train]")


# Hardware, folders and packages


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.accelerator=cuda"], "trainer.accelerator=cuda is not possible"),
        (["trainer.accelerator=nosuch"], "choose one of auto, cpu, gpu"),
        (["trainer.accelerator=null"], "trainer.accelerator=null"),
        (["trainer.devices=99"], "trainer.devices=99 is not possible"),
        (["trainer.devices=0"], "trainer.devices=0 is not possible"),
        (["trainer.devices=abc"], "give a number, a list such as [0,1], or auto"),
        (["trainer.devices=[]"], "trainer.devices=[]"),
        (["trainer.devices=true"], "trainer.devices=True"),
        (["trainer.accelerator=cpu", "trainer.devices=-1"], "processes on the CPU"),
        (["trainer.accelerator=cpu", "trainer.devices=[0]"], "processes on the CPU"),
        (["trainer.accelerator=cpu", "trainer.devices=2"], "say trainer=ddp"),
        (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=999"], "processes on the CPU"),
        (["trainer.strategy=nosuch"], "trainer.strategy=nosuch is not possible"),
        (["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn is not possible"),
        (["speed.cuda_graph=true"], "speed.cuda_graph=true is for one NVIDIA GPU"),
        (["speed.cuda_graph=true", "model=mixture"], "speed.cuda_graph=true needs steps of one size"),
        (["trainer.strategy=fsdp"], "say trainer=fsdp, which is FSDP2"),
    ],
)
def test_hardware_that_is_not_there(refused, check, settings, words):
    assert words in refused(check, *settings)


def test_torchrun_without_a_folder_is_told_to_give_one(refused, train):
    """Each process would name its folder by the second in which it started."""
    assert "give them one folder, hydra.run.dir=" in refused(
        train, "trainer=ddp", TORCHELASTIC_RUN_ID="none", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2"
    )


def test_a_gpu_that_is_not_there(refused, train):
    import torch

    if torch.backends.mps.is_available():
        pytest.skip("this machine's GPU cannot be hidden")
    assert "use trainer.accelerator=cpu, or auto" in refused(train, "trainer.accelerator=gpu")
    assert "trainer.accelerator=gpu is not possible" in refused(train, "trainer=gpu")


@pytest.mark.parametrize("place", ["file", "file/deeper/run"])
@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_folder_that_cannot_be_written(refused, check, tmp_path, place, mode):
    (tmp_path / "file").write_text("in the way")
    told = refused(check, *(["-m"] if mode == "sweep" else []), f"hydra.{mode}.dir={place}")
    assert f"{place} cannot be written" in told
    assert f"choose another hydra.{mode}.dir" in told


@pytest.mark.parametrize("trace", ["results.json", "checkpoints/last.ckpt"])
def test_a_folder_that_holds_a_run_is_left_alone(refused, check, tmp_path, trace):
    (tmp_path / "run" / trace).mkdir(parents=True)
    assert "run already holds a run: choose another hydra.run.dir" in refused(check, "hydra.run.dir=run")


def test_a_folder_that_holds_a_run_or_a_sweep_without_a_ledger_is_refused(refused, check, train, tmp_path, text_file):
    once = (*ANY_TEXT, "trainer.max_steps=2", "logger=none", "callbacks=none")
    assert train(*once, "hydra.run.dir=run").code == 0
    assert "run already holds a run" in refused(check, *once, "hydra.run.dir=run")
    assert train("-m", *once, "seed=1,2", "hydra.sweep.dir=sweep").code == 0
    (tmp_path / "sweep" / "sweep.json").unlink()
    assert "sweep already holds a sweep" in refused(check, "-m", *once, "seed=1,3", "hydra.sweep.dir=sweep")


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_not_installed_names_it(refused, check, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert f"pip install {package}" in refused(check, f"logger={package}")


# Sweeps


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=1e-3,abc"], "optimizer.lr=abc"),
        (["optimizer.lr=choice(1e-3,-1)"], "optimizer.lr=-1"),
        (["optimizer.lr=1e-3,1e-2", "optimizer.lrr=1,2"], "did you mean optimizer.lr?"),
        (["optimizer.lr=1e-3,1e-2", "~model"], "~model takes away"),
        (["model=bigram,nosuch"], "model=nosuch is not there"),
        (["model=bigram,null"], "is not there: choose one of bigram"),
        (["data.block_size=8,100000"], "data.block_size=100000 needs at least 100001"),
        (["data.path=prose.txt,missing.txt"], "missing.txt does not exist"),
        (["evaluate=[val],[val,nosuch]"], "'nosuch'"),
        (["trainer.devices=1,99"], "trainer.devices=99"),
        (["trainer.accelerator=cpu,cuda"], "trainer.accelerator=cuda is not possible"),
        (["data=text,pydoc", "+data.xyzzy=1,2"], "there is no setting data.xyzzy"),
        (["callbacks=[default],[default,nosuch]"], "callbacks=nosuch is not there"),
        (["scheduler=constant,linear", "trainer.max_steps=50"], "warmup_steps=100 leaves nothing"),
        (["data.block_size=8,abc"], "data.block_size=abc is not possible: give a whole number"),
        (["seed=1,2", "data.val_fraction=???"], "data.val_fraction is missing: give it a value"),
        (["seed=1,2", "sample_length=${nosuch}"], "nosuch"),
        (["seed=1,2", "hydra.sweeper.max_batch_size=1"], "there is no setting hydra.sweeper.max_batch_size"),
    ],
)
def test_a_mistake_in_any_job_is_found_before_the_first_starts(refused, check, text_file, overrides, words):
    assert words in refused(check, "-m", *ANY_TEXT, *overrides)


def test_the_settings_of_every_job_are_checked_before_any_text(refused, check):
    told = refused(check, "-m", "data=text", "data.path=missing.txt", "optimizer.lr=1e-3,abc")
    assert "optimizer.lr=abc" in told


# charlm


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["--nosuch"], "--nosuch"),
        (["generate"], "Missing argument"),
        (["generate", "RUN", "more"], "more"),
        (["generate", "RUN", "--nosuch"], "--nosuch"),
        (["generate", "RUN", "--length", "0"], "--length"),
        (["generate", "RUN", "--length", "abc"], "--length"),
        (["generate", "RUN", "--num-samples", "0"], "--num-samples"),
        (["generate", "RUN", "--temperature", "-1"], "--temperature"),
        (["generate", "RUN", "--temperature", "nan"], "--temperature"),
        (["generate", "RUN", "--temperature", "inf"], "--temperature"),
        (["generate", "RUN", "--top-p", "2"], "--top-p"),
        (["generate", "RUN", "--top-p", "0"], "--top-p"),
        (["generate", "RUN", "--top-p", "nan"], "--top-p"),
        (["generate", "RUN", "--top-k", "0"], "--top-k"),
        (["generate", "RUN", "--seed", "-1"], "--seed"),
        (["generate", "RUN", "--device", "nonsense"], "--device nonsense is not there"),
        (["generate", "RUN", "--device", "meta"], "--device meta is not there"),
        (["generate", "RUN", "--device", ""], "--device  is not there"),
        (["generate", "RUN", "--prompt", ""], "the prompt is empty"),
        (["generate", "RUN", "--prompt", "The \u4e16"], "'\u4e16' (U+4E16) at position 4"),
        (["generate", "RUN", "--prompt", "The \u4e16", "--json"], "'\u4e16' (U+4E16) at position 4"),
        (["generate", "RUN", "--prompt", "\u4e16", "--num-samples", "2"], "'\u4e16' (U+4E16) at position 0"),
        (["evaluate", "RUN", "--split", "nosuch"], "choose one of train, val"),
        (["evaluate", "RUN", "--split", "val", "--split", "test"], "choose one of train, val"),
        (["evaluate", "RUN", "--stride", "0"], "--stride"),
        (["evaluate", "RUN", "--stride", "9"], "give 1 to block_size (8)"),
        (["evaluate", "RUN", "--device", "cuda"], "--device cuda is not there"),
    ],
)
def test_charlm_tells_a_mistake_in_one_line(refused, call, trained, arguments, words):
    run = [str(trained) if argument == "RUN" else argument for argument in arguments]
    assert words in refused(call, *run, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("nosuch", "No such command 'nosuch'"),
        ("generate --length 0 RUN", "--length"),
        ("evaluate --split nosuch RUN", "choose one of train, val"),
    ],
)
def test_the_command_charlm_itself_tells_a_mistake_in_one_line(refused, charlm, trained, command, words):
    assert words in refused(charlm, *command.replace("RUN", str(trained)).split())


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize("place", ["missing", "a" * 400, "."])
def test_a_checkpoint_that_is_not_there(refused, call, command, place):
    assert f"{place} " in refused(call, command, place)


@pytest.mark.parametrize("kept", [0, 1, 2, 100, 0.5, 0.9, -1])
def test_a_checkpoint_that_is_cut_off(refused, call, trained, tmp_path, kept):
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "cut.ckpt is " in (told := refused(call, "generate", "cut.ckpt"))
    assert "cut off" in told or "not a checkpoint" in told


def test_a_checkpoint_with_damage_in_the_middle(refused, call, trained, tmp_path):
    raw = bytearray((trained / "checkpoints" / "last.ckpt").read_bytes())
    raw[60:400] = bytes(340)
    (tmp_path / "damaged.ckpt").write_bytes(raw)
    assert "damaged.ckpt" in refused(call, "generate", "damaged.ckpt")


class Runs:
    """A pickle of this makes a folder when it is loaded by a reader that trusts it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("code_was_run",)


def write_foreign(file: Path, kind: str) -> None:
    import torch

    if kind == "text":
        file.write_text("To be, or not to be")
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("readme.txt", "no checkpoint")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Runs()))
    else:
        content = {
            "dict": {"weights": torch.zeros(2)},
            "lightning": {"state_dict": {}, "global_step": 3, "pytorch-lightning_version": "2.0"},
            "tensor": torch.zeros(2),
            "list": [1, 2],
            "code": {"charlm": {"format": 1}, "state_dict": {"a": Runs()}},
        }[kind.removeprefix("old ")]
        torch.save(content, file, _use_new_zipfile_serialization=not kind.startswith("old "))


@pytest.mark.parametrize(
    "kind", ["text", "zip", "pickle", "dict", "lightning", "tensor", "list", "code", "old dict", "old code"]
)
def test_a_file_of_another_kind_is_no_checkpoint_and_none_of_its_code_runs(refused, call, tmp_path, kind):
    write_foreign(tmp_path / "foreign.ckpt", kind)
    assert "foreign.ckpt " in refused(call, "generate", "foreign.ckpt")


@pytest.mark.parametrize(
    "target",
    ["os.system", "torch.nn.Linear", "charlm.model.bigram.nn.Linear", "charlm.model.nosuch.Model", "charlm.model", "5"],
)
def test_a_checkpoint_names_only_models_of_charlm(refused, call, trained, tmp_path, target):
    from charlm.checkpoint import archive
    from tests.hostile import write_checkpoint

    content = archive.load(trained / "checkpoints" / "last.ckpt")
    content["charlm"]["config"]["model"]["_target_"] = target
    write_checkpoint(content, tmp_path / "stranger.ckpt")
    told = refused(call, "generate", "stranger.ckpt")
    assert f"names {target} as its model" in told or "has no attribute 'nosuch'" in told


@pytest.mark.parametrize("lost", ["tokenizer", "config", "corpus", "weights", "step", "format"])
def test_a_checkpoint_that_lacks_a_part(refused, call, trained, tmp_path, lost):
    from charlm.checkpoint import archive
    from tests.hostile import write_checkpoint

    content = archive.load(trained / "checkpoints" / "last.ckpt")
    part = {"weights": content["state_dict"], "step": content}.get(lost, content["charlm"])
    del part[{"weights": "model.token_embedding_table.weight", "step": "global_step"}.get(lost, lost)]
    write_checkpoint(content, tmp_path / "partial.ckpt")
    assert "partial.ckpt " in refused(call, "generate", "partial.ckpt")


def test_evaluating_wants_the_text_of_the_run(refused, train, call, text_file):
    assert train(*ANY_TEXT, "trainer.max_steps=2", "logger=none", "hydra.run.dir=run").code == 0
    text = text_file.read_text()
    text_file.write_text(text.replace("e", "a", 1))
    assert "has changed since run was trained on it" in refused(call, "evaluate", "run")
    text_file.unlink()
    assert "prose.txt does not exist" in refused(call, "evaluate", "run")
    text_file.write_text(text)
    ended = call("evaluate", "run", "--json")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "flag",
    [
        "limit_val_batches=0.5",
        "limit_val_batches=1",
        "limit_val_batches=2",
        "fast_dev_run=true",
        "overfit_batches=3",
        "barebones=true",
    ],
)
def test_flags_that_would_make_figures_of_a_part_are_refused_with_the_reason(check, refused, flag):
    told = refused(check, f"+trainer.{flag}")
    name, _, value = flag.partition("=")
    assert told.startswith(
        f"charlm: trainer.{name}={value.capitalize() if value == 'true' else value} is not possible: "
    )


@pytest.mark.parametrize("flag", ["+trainer.limit_train_batches=7", "trainer.max_epochs=2", "trainer.num_nodes=1"])
def test_flags_that_work_are_taken(check, flag):
    check(flag)


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        (["+trainer.limit_train_batches=3"], 3),
        (["+trainer.limit_train_batches=0.5"], 250),
        (["+data.batches_per_epoch=7", "trainer.accumulate_grad_batches=2"], 8),
    ],
)
def test_an_epoch_too_short_for_its_validation_is_refused(check, refused, text_file, settings, batches):
    every = [*ANY_TEXT, "trainer.check_val_every_n_epoch=1", "trainer.max_epochs=2", *settings]
    told = refused(check, *every)
    assert f"is more than the {batches} batches of an epoch: say trainer.val_check_interval={batches}," in told
    assert check(*every, f"trainer.val_check_interval={batches}").code == 0
