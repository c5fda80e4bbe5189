"""Overrides in the grammar of Hydra: parse them, quote paths for them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from charlm.errors import InputError, one_line


def changes(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a command line, without resume= and rerun=.

    Raises:
        InputError: if an override is not NAME=VALUE.
    """
    given = {}
    for override in parsed(overrides):
        line, key = override.input_line, override.key_or_group
        if override.is_delete() or override.is_add() or override.is_sweep_override():
            raise InputError(f"{line} is not possible with resume or rerun: give settings as NAME=VALUE")
        if key not in ("resume", "rerun"):
            given[key] = override.value()
    return given


def quoted(path: Path) -> str:
    """Return a path quoted for Hydra's grammar."""
    if re.fullmatch(r"[\w./-]+", str(path)):
        return str(path)
    # In quotes, a backslash stands for itself, except before a quote.
    text = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), str(path))
    return f"'{text}'"


def unquoted(text: str) -> str:
    """Return the path that was typed, either literally, with = and , as in names of sweeps, or quoted for Hydra.

    Raises:
        InputError: if a quote is not closed.
    """
    if text[0] not in "'\"":
        return text
    try:
        [override] = parsed([f"path={text}"])
    except InputError:
        raise InputError(f"{text} cannot be read as a quoted path: close its quote, or leave quotes out") from None
    return str(override.value())


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Return overrides parsed by Hydra's grammar.

    Raises:
        InputError: if one cannot be parsed.
    """
    found = []
    for text in overrides:
        try:
            found += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise InputError(f"{text} cannot be read as NAME=VALUE: {one_line(error)}") from error
    return found


def typed(value: Any) -> str:
    """Format a value as one types it in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(typed, value))}]" if isinstance(value, list) else str(value)
