"""The documentation is true: its links lead somewhere, its commands pass all checks, its tree exists."""

import os
import re
import shlex
from pathlib import Path

import pytest

from charlm import __version__
from charlm.cli import charlm as cli
from charlm.preflight.command import check_command
from charlm.sweep.plan import check_command as check_sweep
from charlm.sweep.plan import is_sweep

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = sorted((ROOT / "docs" / "tutorial").glob("*/*.md"))  # tests/test_tutorial.py has its commands


def commands(start: str) -> list[list[str]]:
    """All commands in the pages that begin with `start`, without placeholders such as outputs/RUN."""
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(start)]
    return [words for words in found if not any(re.search(r"\b[A-Z]{3,}\b", word) for word in words)]


@pytest.mark.parametrize("page", [*PAGES, *TUTORIAL], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.is_file(), target
        headings = re.findall("^#+ (.*)", file.read_text(encoding="utf-8"), re.M) if heading else []
        anchors = [re.sub(r"[^\w -]", "", found).lower().replace(" ", "-") for found in headings]
        assert not heading or heading in anchors, target


@pytest.mark.parametrize("words", commands("python train.py"), ids=" ".join)
def test_each_command_passes_the_checks(words, tmp_path, monkeypatch):
    needs = ("hydra/launcher=", "trainer=fsdp", "trainer=ddp", "--config-dir")
    if any("gpu" in word or word.startswith(needs) for word in words):
        pytest.skip("needs a GPU, several processes, a cluster or a package")
    for program in ("preflight.command", "sweep.plan"):  # no test needs a corpus or the network
        monkeypatch.setattr(f"charlm.{program}.fallback_corpus", lambda cfgs: None)
    monkeypatch.setattr("charlm.preflight.settings.check_text", lambda plain: [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    check = check_sweep if is_sweep(words[1:]) else check_command
    assert check(words[1:], ROOT / "conf")


# What needs a GPU, a cluster, an installation or a package, what serves a page, a sweep of 63 runs, and what refuses
# the runs of this test.
NOT_HERE = re.compile(
    r"&&|gpu|hydra/launcher=|trainer=ddp|torchrun|^pip|^charlm (play|board|submit)|one_machine|myconf|mylab|scaling"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_command_that_a_cpu_can_run_runs(tmp_path, train, charlm, shakespeare):
    """With few steps and a short text, and the placeholders of the pages as runs and files."""
    (tmp_path / "my.txt").write_text(shakespeare[:20_000], encoding="utf-8")
    (tmp_path / "unseen.txt").write_text(shakespeare[20_000:22_000], encoding="utf-8")
    (tmp_path / "plays").mkdir()
    for number in (1, 2):
        (tmp_path / "plays" / f"{number}.txt").write_text(shakespeare[: 10_000 * number], encoding="utf-8")
    short, env = ["data=text", "data.path=my.txt", "trainer.max_steps=4"], {"CHARLM_DATA": os.environ["CHARLM_DATA"]}
    for name in ("RUN", "OTHER"):
        assert not train("model=gpt", *short, f"seed={len(name)}", f"hydra.run.dir=outputs/{name}").code
    assert not train("-m", *short, "optimizer.lr=0.01,0.03", "hydra.sweep.dir=outputs/SWEEP").code
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for line in dict.fromkeys(line for page in pages for line in lines_of(page) if not NOT_HERE.search(line)):
        words = shlex.split(line, comments=True)
        ended = charlm(*words[1:], **env) if words[0] == "charlm" else train(*shortened(words[2:]), timeout=300, **env)
        assert ended.code == 0, f"{line}\n{ended.out}\n{ended.err}"


def lines_of(page: Path) -> list[str]:
    found = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    lines = [line.split("  #")[0].strip() for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def shortened(words: list[str]) -> list[str]:
    """Give a command of train.py few steps, and what takes long otherwise a short text."""
    kept = [word for word in words if not word.startswith("trainer.max_steps=")]
    if any(word.startswith("max_tokens=") for word in kept):
        kept = ["max_tokens=2_048" if word.startswith("max_tokens=") else word for word in kept]
    else:
        kept.append(f"trainer.max_steps={6 if any(word.startswith('resume=') for word in kept) else 4}")
    if "hydra/sweeper=optuna" in kept:
        kept.append("hydra.sweeper.n_trials=2")
    if any(word.startswith("experiment=cpu_90s") for word in kept):
        kept += ["data.final_targets=10_000", "scheduler.warmup_steps=1"]
    if "sweep=plays" in kept:
        return [*kept, "data=text", "data.path=plays", "data.fold=1,2"]
    several = "-m" in kept or any(word.startswith("sweep=") for word in kept)
    return [*kept, "data=text", "data.path=my.txt"] if several else kept


def test_the_commands_of_charlm_exist():
    assert {words[1] for words in commands("charlm ")} <= {*cli.commands} | {"--help"}


def test_the_tree_exists():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    for name in re.findall(r"(?<![\w.])([a-z_]+(?:/|\.py))(?= |$)", tree, re.M):
        assert (ROOT / name).exists() or (ROOT / "charlm" / name).exists(), name


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest.group(1) == __version__
