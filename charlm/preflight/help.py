"""python train.py --help: every choice and every setting, one line each."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import docstring_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from charlm import schema
from charlm.home import COMMAND
from charlm.preflight.messages import choices
from charlm.run.overrides import typed
from charlm.terminal import SafeConsole, console

USAGE = f"""\
Train a language model on text.

  {COMMAND} {{SETTING=VALUE | GROUP=CHOICE}}...

  {COMMAND}                                      train a bigram on Tiny Shakespeare
  {COMMAND} data=text data.path=my.txt           train on your own text
  {COMMAND} model=gpt trainer.accelerator=gpu    train a GPT on a GPU
  {COMMAND} -m optimizer.lr=1e-3,1e-2 seed=1,2   train every combination: a sweep
  {COMMAND} resume=outputs/RUN                   continue an interrupted run or sweep
  {COMMAND} model=gpt --help                     this help, with the settings and defaults of a GPT
"""
AFTERWARDS = "Look at the results: charlm --help, and charlm board"
MOST_USED = (
    "model",
    "data",
    "data.path",
    "data.block_size",
    "data.batch_size",
    "optimizer.lr",
    "trainer.max_steps",
    "trainer.accelerator",
    "seed",
    "experiment",
)
# The meaning of each group, in the order of --help.
GROUPS = {
    "model": "the language model",
    "data": "the corpus",
    "tokenizer": "the units of text",
    "optimizer": "how weights are updated",
    "scheduler": "how the learning rate changes",
    "trainer": "devices and precision",
    "speed": "grouped optimizer steps",
    "callbacks": "observers of training; give a list to combine them: callbacks=[default,ema]",
    "logger": "where curves are logged; give a list for several places: logger=[tensorboard,csv]",
    "experiment": "a recipe: many settings under one name",
    "sweep": "a study of many runs under one name",
}
HIDDEN = {"run_dir", "data.corpus"}  # set by hydra.run.dir and by data=
WIDEST = 160  # characters, if the output is not a terminal


class Entry(NamedTuple):
    """A line of the help: what to type with its default, and what it means."""

    typed: str
    meaning: str


def show_help(cfg: DictConfig, config_dirs: Sequence[Path]) -> None:
    """Print the help for a composed config.

    Args:
        config_dirs: folders of config files, whose comments explain settings that no docstring does.
    """
    onto = console if console.is_terminal else SafeConsole(width=WIDEST)
    loader = GlobalHydra.instance().config_loader()
    chosen: dict[str, Any] = {group: cfg.hydra.runtime.choices.get(group) for group in GROUPS}
    chosen["callbacks"], chosen["logger"] = chosen["callbacks"] or "[default]", chosen["logger"] or "[tensorboard]"
    groups = {
        group: Entry(
            f"{group}={typed(chosen[group])}", f"{meaning}: {', '.join(choices(loader.get_group_options(group)))}"
        )
        for group, meaning in GROUPS.items()
    }
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    entries = groups | dict(settings_of(config, config_dirs, chosen))
    onto.print(Text(USAGE), soft_wrap=True)
    print_section(onto, "Most used, with defaults", [entries.pop(name) for name in MOST_USED if name in entries])
    print_section(onto, "Other choices", [entries.pop(group) for group in GROUPS if group in entries])
    print_section(onto, "Settings of a run", [entry for name, entry in entries.items() if "." not in name])
    for group in GROUPS:
        title = f"Settings of {group}={typed(chosen[group])}"
        print_section(onto, title, [entry for name, entry in entries.items() if name.startswith(f"{group}.")])
    onto.print(Text(AFTERWARDS))


def print_section(onto: Console, title: str, lines: Sequence[Entry]) -> None:
    if not lines:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for line in lines:
        table.add_row(Text(f"  {line.typed}", "green"), Text(line.meaning))
    onto.print(Text(f"{title}:", "bold"), table, Text(), sep="\n")


def settings_of(
    config: dict[str, Any], config_dirs: Sequence[Path], chosen: dict[str, Any]
) -> Iterator[tuple[str, Entry]]:
    """Yield the settings of a run by dotted name."""
    root = comments(config_dirs, "train")
    for name, value in config.items():
        if name in schema.ROOT and name not in HIDDEN:
            yield name, Entry(f"{name}={typed(value)}", root.get(name, ""))
        elif name in schema.SETS:
            for part, node in (value or {}).items():
                files = comments(config_dirs, f"{name}/default", f"{name}/{part}")
                yield from settings_of_part(f"{name}.{part}", node, files)
        elif name in schema.GROUPS and value:
            files = comments(config_dirs, f"{name}/base", f"{name}/auto", f"{name}/{chosen.get(name)}")
            yield from settings_of_part(name, value, files)


def settings_of_part(path: str, node: dict[str, Any], notes: dict[str, str]) -> Iterator[tuple[str, Entry]]:
    """Yield the settings of what `node` names, explained by its docstring or else by comments in config files."""
    meanings = documented(schema.resolve(path, node["_target_"]))
    own = str(node["_target_"]).startswith("charlm.")
    meanings = notes | meanings if own else meanings | notes
    for name, value in node.items():
        setting = f"{path}.{name}"
        if not name.startswith("_") and setting not in HIDDEN and not setting.endswith((".dirpath", ".save_dir")):
            yield setting, Entry(f"{setting}={typed(value)}", first_sentence(meanings.get(name, "")))


def documented(target: Any) -> dict[str, str]:
    """Return the description of each argument in the docstring of a class or a function."""
    found: dict[str, str] = {}
    for place in (target, getattr(target, "__init__", None)):
        for argument in docstring_parser.parse(inspect.getdoc(place) or "").params:
            for name in argument.arg_name.split(", "):
                found |= {name: argument.description} if argument.description else {}
    return found


def comments(config_dirs: Iterable[Path], *files: str) -> dict[str, str]:
    """Return the comment behind each setting in config files, those of later files first."""
    found: dict[str, str] = {}
    for folder in config_dirs:
        for file in files:
            path = folder / f"{file}.yaml"
            if path.is_file():
                found |= dict(re.findall(r"^ *(\w+):.*? # (.*)$", path.read_text(encoding="utf-8"), re.M))
    return found


def first_sentence(description: str) -> str:
    """Return the first sentence, in one line and without the markup of reStructuredText."""
    text = re.sub(r":\w+:(?=`)|`+", "", " ".join(description.split()))
    return re.split(r"\.(?: |$)", text)[0]
