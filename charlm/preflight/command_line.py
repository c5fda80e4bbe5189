"""The command line of train.py: Hydra's options, parsed."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from charlm.errors import InputError
from charlm.home import COMMAND
from charlm.internals.hydra import argument_parser


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


def shows_only(args: Namespace) -> bool:
    """Return whether a command line asks Hydra to print something instead of training."""
    return bool(args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)
