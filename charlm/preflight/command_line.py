"""The command line of train.py: Hydra's options, parsed."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from charlm.data.corpus import spool
from charlm.errors import InputError
from charlm.home import COMMAND
from charlm.internals.hydra import argument_parser
from charlm.run.overrides import quoted

STANDARD_INPUT = "data.path=-"


def conf_dirs(config_dir: Path, args: Namespace) -> list[Path]:
    """Return the folders of configuration files: charlm's, and one that the command adds.

    As for Hydra, --config-path is relative to train.py and --config-dir to the current folder.
    """
    main = config_dir.parent / (args.config_path or config_dir.name)
    return [main, *([Path(args.config_dir)] if args.config_dir else [])]


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse a command line with Hydra's own parser.

    Raises:
        InputError: if an option is unknown.
    """

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}: see {COMMAND} --help")

    return argument_parser(refuse).parse_args(arguments)


def options(argv: Sequence[str]) -> list[str]:
    """Return the options that name configuration files; each job of a sweep gets them too."""
    args = parse(argv[1:])
    places = {"--config-dir": args.config_dir, "--config-path": args.config_path, "--config-name": args.config_name}
    return [f"{name}={place}" for name, place in places.items() if place]


def with_standard_input(argv: Sequence[str]) -> list[str]:
    """Return a command line whose data.path=- is replaced by a file with what standard input holds.

    Other processes of the run and a run that is resumed read the same file.
    """
    if STANDARD_INPUT not in argv or shows_only(parse(argv[1:])):
        return list(argv)
    path = f"data.path={quoted(spool(sys.stdin.buffer))}"
    return [path if argument == STANDARD_INPUT else argument for argument in argv]


def shows_only(args: Namespace) -> bool:
    """Return whether a command line asks Hydra to print something instead of training."""
    return bool(args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)
