"""The documentation is true: its links lead somewhere, its commands pass all checks, its tree exists."""

import re
import shlex
from pathlib import Path

import pytest

from charlm import __version__
from charlm.cli import charlm
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


def test_the_commands_of_charlm_exist():
    assert {words[1] for words in commands("charlm ")} <= {*charlm.commands} | {"--help"}


def test_the_tree_exists():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    for name in re.findall(r"(?<![\w.])([a-z_]+(?:/|\.py))(?= |$)", tree, re.M):
        assert (ROOT / name).exists() or (ROOT / "charlm" / name).exists(), name


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest.group(1) == __version__
