"""Folders of strangers: nothing in them runs code, reaches outside, commands a terminal, or ends in a traceback."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from charlm import cli
from charlm.errors import COMMANDS, InputError, one_line_errors, printable
from charlm.run import reproduce
from charlm.run.results import read_results, whole_results
from charlm.run.trust import all_references, check_overrides
from charlm.sweep.ledger import Ledger
from tests import hostile
from tests.conftest import ROOT, Ended, check_command, run_command
from tests.hostile import FILES, MARKER, RECORDS, SECRET, SETTINGS, SHOWN, SWEEPS, outside_of

SECONDS = 20  # that a command may take at most
READERS = ("report", "evaluate", "generate", "checkpoint", "reproduce", "submit")
TRAINERS = ("resume", "rerun")
RUNS = SETTINGS | RECORDS | FILES | SHOWN
# The commands that must refuse a kind of folder. Other commands do not read the damaged file.
REFUSED = {(kind, name) for kind in SETTINGS for name in (*TRAINERS, "reproduce")}
REFUSED |= {(kind, name) for kind in RECORDS for name in ("rerun", "reproduce")}
REFUSED |= {(kind, "resume") for kind in FILES if re.match("(more|a )?.*(link|fifo|zeros|two names)", kind)}
REFUSED -= {("a log that has two names", "resume")}  # which is made a file of its own
REFUSED |= {(kind, "reproduce") for kind in FILES if "losses" in kind}


@contextmanager
def ended_in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("the command hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_in(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder, with what is in its files."""
    found: dict[str, bytes | str] = {}
    for place in sorted(folder.rglob("*")):
        if place.is_file() and not place.is_symlink():
            found[str(place)] = place.read_bytes()
        else:
            found[str(place)] = os.readlink(place) if place.is_symlink() else "folder"
    return found


Here = Callable[..., Ended]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Run a command in this process, as far as a run would begin, and look at what it prints and leaves."""
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    outside = outside_of(tmp_path)

    def no_training(*_: object) -> None:
        raise InputError("it would be trained again now")

    monkeypatch.setattr(reproduce, "train", no_training)

    def run(*argv: str) -> Ended:
        before, code = files_in(outside), 0
        try:
            with ended_in_time():
                if argv[0] == "charlm":
                    monkeypatch.setattr(sys, "argv", list(argv))
                    cli.main()
                else:
                    with one_line_errors():
                        check_command(list(argv), ROOT / "conf")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        told = capsys.readouterr()
        check_output(code, told.out, told.err)
        assert files_in(outside) == before
        assert not (tmp_path / MARKER).exists()
        return Ended(code, told.out, told.err)

    return run


def check_output(code: int, out: str, err: str) -> None:
    assert code in (0, 1, 2), err
    assert SECRET not in out + err
    assert not {*COMMANDS.findall(out + err)} - {"\n", "\t"}, (out, err)
    assert "Traceback" not in out + err
    if code and not out:  # a submission is refused on standard output
        assert [line for line in err.splitlines() if line.startswith("charlm: ")], err
    assert all(line.startswith("charlm: ") for line in err.splitlines()), err


def command_for(name: str, run: str) -> list[str]:
    if name == "resume":
        return ["train.py", f"resume={run}", "trainer.max_steps=22"]
    if name == "rerun":
        return ["train.py", f"rerun={run}", "trainer.max_steps=22"]
    more = {"generate": ["--length", "200"], "submit": ["--budget", "cpu_90s"]}
    return ["charlm", name, run, *more.get(name, [])]


@pytest.mark.parametrize("kind", RUNS)
def test_each_command_on_a_strangers_run_reads_it_safely_or_refuses_it_in_one_line(kind, here, trained, tmp_path):
    # Each command that reads what is damaged; the others are among the long proofs.
    names: tuple[str, ...] = (*READERS, *TRAINERS)
    names = ("report", "evaluate", "reproduce", "submit", *TRAINERS) if kind in SETTINGS else names
    names = ("report", "reproduce", "submit", "rerun") if kind in RECORDS else names
    names = ("report", "reproduce", "submit", "resume", "generate") if kind in FILES else names
    for name in names:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "run")
        RUNS[kind](tmp_path / "run", tmp_path / "outside")
        ended = here(*command_for(name, "run"))
        if (kind, name) in REFUSED:
            assert ended.code == 2, (name, ended)


@pytest.mark.parametrize("name", [*READERS, *TRAINERS])
def test_each_command_takes_an_ordinary_run(name, here, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    ended = here(*command_for(name, "run"))
    if name == "reproduce":
        assert ended.err == "charlm: it would be trained again now\n"
    elif name == "submit":
        assert ended.code == 1
        assert "refused: 1 seed: a record needs at least 3\n" in ended.out
    else:
        assert (ended.code, ended.err) == (0, "")


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    """The folder of a sweep of two short runs that has ended, for tests that copy it."""
    place = tmp_path_factory.mktemp("swept")
    (place / "prose.txt").write_text(prose, encoding="utf-8")
    given = ["-m", "data=text", f"data.path={place / 'prose.txt'}", "trainer.max_steps=5", "trainer=cpu", "seed=1,2"]
    ended = run_command([str(ROOT / "train.py"), *given, "hydra.sweep.dir=sweep"], place, {}, timeout=120)
    assert ended.code == 0, ended.err
    return place / "sweep"


@pytest.mark.parametrize("kind", SWEEPS)
def test_each_command_on_a_strangers_sweep_reads_it_safely_or_refuses_it_in_one_line(kind, here, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "sweep")
    SWEEPS[kind](tmp_path / "sweep", tmp_path / "outside")
    here("charlm", "report", "sweep")
    assert here("train.py", "resume=sweep", "seed=1,2,3").code == 2


@pytest.mark.parametrize("override", hostile.OVERRIDES)
def test_an_override_that_charlm_does_not_record_is_refused(override, tmp_path):
    with pytest.raises(InputError, match=r": not run$"):
        check_overrides(tmp_path, [override])


def test_a_sweep_in_whose_folder_links_lie_is_not_continued_by_the_same_command(here, swept, tmp_path):
    """The command starts a new sweep in another folder instead."""
    place = tmp_path / "outputs" / "2000-01-01_00-00-00_sweep"
    shutil.copytree(swept, place)
    (place / "results.csv").unlink()  # as if it had not ended
    given = [o for o in json.loads((place / "sweep.json").read_text())["command"] if o]
    (place / "seed=1" / "terminal.log").unlink()
    (place / "seed=1" / "terminal.log").symlink_to(tmp_path / "outside" / "log")
    ended = here("train.py", "-m", *given)
    assert ended.code == 0, ended.err
    assert "Going on with" not in ended.out


def test_an_ordinary_sweep_is_continued(here, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "sweep")
    assert here("train.py", "resume=sweep", "seed=1,2,3").code == 0


@pytest.mark.parametrize("damage", [b"", b"\x80", b"[]", b"{}", b'{"status": "finished"}'])
def test_damaged_results_are_none_and_the_run_counts_as_unfinished(trained, tmp_path, damage, here):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_bytes(damage)
    with pytest.raises(InputError, match=r"results\.json is damaged"):
        read_results(tmp_path / "run")
    assert whole_results(tmp_path / "run") is None
    ended = here("train.py", "resume=run")
    assert ended.code == 0
    assert "nothing to do" not in ended.out


def test_one_damaged_results_file_costs_a_sweep_only_that_job(swept, train, tmp_path):
    shutil.copytree(swept, tmp_path / "sweep")
    whole = json.loads((swept / "seed=1" / "results.json").read_text())
    (tmp_path / "sweep" / "seed=1" / "results.json").write_text("[]")
    ended = train("resume=sweep")
    assert ended.code == 0, ended.err
    assert "has 1 of these jobs done: 1 to go" in ended.out
    again = json.loads((tmp_path / "sweep" / "seed=1" / "results.json").read_text())
    assert again["val/loss"] == whole["val/loss"]


def test_a_log_with_two_names_is_written_under_the_one_in_the_run_alone(trained, train, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    outside = outside_of(tmp_path)
    FILES["a log that has two names"](tmp_path / "run", outside)
    before = (outside / "log").read_bytes()
    assert train("resume=run", "trainer.max_steps=22").code == 0
    assert (outside / "log").read_bytes() == before
    assert len((tmp_path / "run" / "train.log").read_bytes()) > len(before)


def test_a_run_whose_logger_reports_elsewhere_is_continued_if_the_command_repeats_where(here, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    mine = str(tmp_path / "mine")
    hostile.settings(lambda c, run: c["logger"]["tensorboard"].update(save_dir=mine))(tmp_path / "run", tmp_path)
    told = here("train.py", "rerun=run").err
    where = "repeat logger.tensorboard.save_dir=..."
    assert f"which is outside of the run's folder (to use it all the same, {where})" in told
    # Charlm's own loggers stay in the folder all the same, where resume= looks.
    told = here("train.py", "rerun=run", f"logger.tensorboard.save_dir={mine}").err
    assert "is outside of the run's folder, where resume= looks" in told


def test_what_people_type_in_sweeps_is_recorded_and_read_again(tmp_path):
    typed = [
        "data=text,pydoc",
        "data.path='a b, c.txt'",
        "model=gpt",
        "model=choice(gpt,bigram)",
        "model=glob(*)",
        "callbacks=[default,ema],[default]",
        "~callbacks.samples",
        "+trainer.limit_val_batches=2",
        "++trainer.fast_dev_run=true",
        "optimizer.lr=1e-3,1e-2",
        "optimizer.lr=tag(log,interval(1e-4,1e-1))",
        "optimizer.betas=[0.9,0.99],[0.9,0.999]",
        "model.n_layer=range(1,5)",
        "data.seed=${seed}",
        "scheduler.min_lr=null",
        "experiment=cpu_90s",
        "sweep=null",
        "+sweep=gpt",
        "max_tokens=1_000_000",
        "trainer.max_time=00:00:01:00",
        "logger.wandb.project='größe'",
    ]
    check_overrides(tmp_path, typed)
    ledger = Ledger(tmp_path)
    ledger.begin(typed, None)
    ledger.add("a", ["data.path='a b, c.txt'", "+trainer.limit_val_batches=2"], "0", "waiting")
    ledger.write()
    assert Ledger(tmp_path).content["command"] == typed


@pytest.mark.parametrize("text", ["${seed}", "a/${run_dir}/${data.block_size}", "plain", "$", "{}"])
def test_references_to_settings_are_plain(text):
    assert all_references(text)


@pytest.mark.parametrize(
    "text", ["${oc.env:A}", "${hydra.x}", "${now:%Y}", "${${seed}}", "${.lr}", "${seed", "\\${seed}x${"]
)
def test_all_other_lookups_are_not(text):
    assert not all_references(text)


def test_what_is_printed_commands_no_terminal_and_loses_no_letter():
    assert printable("a\x1b[2J\x9b\r\n\u202eb") == "a␛[2J\ufffd␍␊\ufffdb"
    assert printable("tab\tand\nline", keep="\t\n") == "tab\tand\nline"
    assert printable("莎士比亚\u3000\u00a0é\u200d👩\u200d👧") == "莎士比亚\u3000\u00a0é\u200d👩\u200d👧"
    assert printable("x" * 10, longest=5) == "xxxx…"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES | SHOWN)
def test_each_command_on_a_strangers_run_is_safe_to_its_end(kind, charlm, train, trained, tmp_path):
    """The same as real commands, which train where the folder is not refused."""
    outside = outside_of(tmp_path)
    for name in (*READERS, *TRAINERS):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "run")
        RUNS[kind](tmp_path / "run", outside)
        before = files_in(outside)
        program, *argv = command_for(name, "run")
        ended = (charlm if program == "charlm" else train)(*argv, TOKEN=SECRET, timeout=60)
        unequal = name == "reproduce" and ended.code == 1  # which it tells on standard output
        check_output(0 if unequal else ended.code, ended.out, ended.err)
        assert files_in(outside) == before, name
        assert not (tmp_path / MARKER).exists()
