"""The tutorial is true: its commands and snippets run and print the figures shown, in English and in Chinese.

A page of the tutorial has prose and fenced blocks:

- `bash`: commands. All commands of a chapter run in one new folder.
- `python`: a snippet. All snippets of a chapter share their variables. One that begins with `# file: NAME` is saved.
- `yaml` that begins with `# file: NAME` is saved.
- `text` after such a block: what it prints. The line `...` stands for any lines, and `...` in a line for any words.
- `<!-- parsed only: REASON -->` before a block: its commands must pass all checks, but do not run.

One machine prints the same figures each time. Other processors round differently, so a decimal may differ by a
thousandth of itself or by 0.002. Whole numbers and words must be equal.
"""

import contextlib
import io
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from filelock import FileLock

from charlm.cli import charlm as cli
from tests.conftest import ROOT, check_command, run_command

TUTORIAL = ROOT / "docs" / "tutorial"
LANGUAGES = ("en", "zh")
CHAPTERS = sorted(path.name for path in (TUTORIAL / "en").glob("*.md"))
QUICK = {"1_run.md", "2_generate.md", "4_lecture.md"}  # the chapters that run by default
NOTEBOOK = "8_notebook.md"  # its snippets are the cells of notebook.ipynb
MOST_MINUTES = 80  # of all chapters
PARSED_ONLY = re.compile(r"<!-- parsed only: .+? -->\s*$")
FILE = re.compile(r"# file: (\S+)\n")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?![\w.])")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    parsed_only: bool

    @property
    def file(self) -> str | None:
        """The name under which a reader saves it."""
        found = FILE.match(self.text)
        return found.group(1) if found else None

    def commands(self) -> list[list[str]]:
        """Return the words of each command of a bash block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    return [Block(found[1], found[2], bool(PARSED_ONLY.search(text[: found.start()]))) for found in fences]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def same_word(found: str, expected: str) -> bool:
    """Compare two words: decimals with a tolerance, `1.9...` with what begins so, anything else exactly."""
    if expected.endswith("...") and expected != "...":
        return found.startswith(expected.removesuffix("..."))
    if "." not in expected or not (NUMBER.fullmatch(found) and NUMBER.fullmatch(expected)):
        return found == expected
    return float(found.replace(",", "")) == pytest.approx(float(expected.replace(",", "")), rel=1e-3, abs=2e-3)


def words(line: str) -> list[str]:
    """Split a line into numbers, beginnings of numbers such as `1.9...`, words and signs."""
    return re.findall(rf"\d[\d.]*?\.\.\.|\.\.\.|(?<![\w.]){NUMBER.pattern}|\w+|\S", line)


def same_line(found: str, expected: str) -> bool:
    return agrees(words(found), words(expected), same_word)


def agrees(found: Sequence[str], expected: Sequence[str], same: Callable[[str, str], bool]) -> bool:
    """Whether two sequences are the same, where `...` stands for any part of the first."""
    ends = {0}  # how much of `found` the part of `expected` up to here may cover
    for item in expected:
        if item == "...":
            ends = set(range(min(ends), len(found) + 1)) if ends else ends
        else:
            ends = {end + 1 for end in ends if end < len(found) and same(found[end], item)}
    return len(found) in ends


def assert_printed(printed: str, expected: str) -> None:
    found, shown = ([line.strip() for line in text.splitlines() if line.strip()] for text in (printed, expected))
    if not agrees(found, shown, same_line):
        lost = [line for line in shown if line != "..." and not any(same_line(other, line) for other in found)]
        pytest.fail(f"these lines are not printed: {lost}\nprinted:\n{printed}\nexpected:\n{expected}")


def run_block(block: Block, folder: Path, names: dict[str, Any], may_fail: bool) -> str:
    """Run a block in `folder` and return what it prints."""
    if block.file:
        file = folder / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text, encoding="utf-8")
        return ""
    if block.kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.text, "snippet", "exec"), names)
        return printed.getvalue()
    printed_by_all = ""
    for command in block.commands():
        env = {"CUDA_VISIBLE_DEVICES": "", "CHARLM_CACHE": str(folder / "cache")}
        while "=" in command[0]:
            name, value = command.pop(0).split("=")
            env[name] = value.replace(".", str(folder))
        if command[0] == "python":
            command = [str(ROOT / "train.py") if command[1] == "train.py" else command[1], *command[2:]]
        ended = run_command(command, folder, env, timeout=280)
        assert may_fail or not ended.code, f"{command}\n{ended.out}\n{ended.err}"
        printed_by_all += ended.out + ended.err
    return printed_by_all


@pytest.mark.timeout(900)  # on a busy machine; two idle cores take a minute or two for the longest
@pytest.mark.parametrize(
    "chapter", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CHAPTERS if c != NOTEBOOK]
)
def test_a_chapter_prints_what_it_shows(chapter, tmp_path, monkeypatch, shakespeare):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # what PYTHONPATH=. does; commands are forked, and find it here
    shutil.copytree(TUTORIAL, tmp_path / "docs" / "tutorial")
    names: dict[str, Any] = {"__name__": "tutorial"}
    found = blocks(TUTORIAL / "en" / chapter)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.kind == "text" or block.parsed_only:
            continue
        shown = after.text if after and after.kind == "text" else None
        printed = run_block(block, tmp_path, names, may_fail="charlm: " in (shown or ""))
        if shown is not None:
            assert_printed(printed, shown)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore:.*platformdirs:DeprecationWarning")
def test_the_notebook_prints_what_its_chapter_shows(tmp_path, tmp_path_factory, monkeypatch, shakespeare):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(TUTORIAL / "notebook.ipynb", as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    with FileLock(tmp_path_factory.getbasetemp().parent / "kernel.lock"):  # the ports of two kernels at once may clash
        nbclient.NotebookClient(notebook, timeout=250, iopub_timeout=60, resources=place).execute()
    found = blocks(TUTORIAL / "en" / NOTEBOOK)
    shown = {
        block.text.strip(): after.text
        for block, after in pairwise(found)
        if block.kind == "python" and after.kind == "text"
    }
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip() in shown:
            assert_printed(stdout(cell), shown[cell.source.strip()])


def stdout(cell: Any) -> str:
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


def test_the_notebook_has_the_snippets_of_its_chapter():
    cells = [c for c in nbformat.read(TUTORIAL / "notebook.ipynb", as_version=4).cells if c.cell_type == "code"]
    snippets = [block.text.strip() for block in blocks(TUTORIAL / "en" / NOTEBOOK) if block.kind == "python"]
    assert [cell.source.strip() for cell in cells] == snippets


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_both_languages_have_the_same_blocks(chapter):
    """Comments of commands and snippets may differ; nothing else may."""
    english, chinese = ([without_comments(block) for block in blocks(TUTORIAL / lang / chapter)] for lang in LANGUAGES)
    assert chinese == english


def without_comments(block: Block) -> tuple[Any, ...]:
    if block.kind == "text":
        return block.kind, block.text, block.parsed_only
    return block.kind, block.file or "", re.sub(r"[ \t]*(?<!\S)# .*", "", block.text), block.parsed_only


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_both_languages_have_the_same_figures(chapter):
    english, chinese = (
        Counter(re.findall(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.]*/)", prose(TUTORIAL / lang / chapter)))
        for lang in LANGUAGES
    )
    assert chinese == english


def test_all_chapters_take_less_than_eighty_minutes():
    """Each chapter states its minutes, and the seconds of its commands."""
    times = {}
    for language, start in (("en", r"\*Time: "), ("zh", r"\*用时：")):
        pages = [(TUTORIAL / language / chapter).read_text(encoding="utf-8") for chapter in CHAPTERS]
        times[language] = [re.findall(r"\d+", re.findall(f"^{start}.*", page, re.M)[0]) for page in pages]
    assert [sorted(chapter) for chapter in times["en"]] == [sorted(chapter) for chapter in times["zh"]]
    assert sum(int(minutes) for minutes, *_ in times["en"]) < MOST_MINUTES


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_command_passes_the_checks(chapter, tmp_path, monkeypatch):
    """Also the commands that do not run: those that need a GPU, a cluster or an installation."""
    for program in ("preflight.command", "sweep.plan"):  # no test needs a corpus or the network
        monkeypatch.setattr(f"charlm.{program}.fallback_corpus", lambda cfgs: None)
    monkeypatch.setattr("charlm.preflight.settings.check_text", lambda plain: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(TUTORIAL, tmp_path / "docs" / "tutorial")
    found = blocks(TUTORIAL / "en" / chapter)
    for block in found:
        if block.file:
            run_block(block, tmp_path, {}, may_fail=False)
    for block, after in zip(found, [*found[1:], None], strict=True):
        mistaken = after and after.kind == "text" and "charlm: " in after.text
        for command in [] if block.kind != "bash" or mistaken else block.commands():
            command = [word for k, word in enumerate(command) if k or "=" not in word]
            if command[0] == "charlm":
                check_options(command[1:])
            elif command[:2] == ["python", "train.py"]:
                if not any(re.match(r"(resume|rerun|init_from)=", word) for word in command):  # those need a run
                    assert check_command(command[1:], ROOT / "conf")
            else:
                assert command[0] in {"tensorboard", "pip", "jupyter", "python", "."}, command


def check_options(arguments: list[str]) -> None:
    """Check that a command of charlm exists and has these options."""
    command = cli.commands[arguments[0]]
    context = command.context_class(command, info_name=arguments[0])
    command.make_parser(context).parse_args(arguments[1:])
