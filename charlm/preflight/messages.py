"""Errors of Hydra and OmegaConf as one line of charlm's."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from charlm import schema
from charlm.errors import InputError, one_line
from charlm.preflight.flags import refusal


@contextmanager
def one_line_hydra_errors(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Raise errors of Hydra and OmegaConf as an InputError.

    Needs an initialized Hydra, to suggest the nearest name for an unknown setting.
    """
    try:
        yield
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        there = choices(error.options or GlobalHydra.instance().config_loader().get_group_options(group))
        if not group or not there:
            raise InputError(one_line(error)) from error
        raise InputError(f"{group}={choice} is not there: choose one of {', '.join(there)}") from error
    except OverrideParseException as error:
        raise InputError(f"{error.override} cannot be read as NAME=VALUE: {one_line(error)}") from error
    except HydraException as error:
        unknown = re.search(r"Could not (?:override|delete|append to config)[^']*'([^']+)'", str(error))
        if not unknown or "already at" in str(error):
            raise InputError(one_line(error)) from error
        key = unknown[1].split("=")[0].split("@")[0]
        raise InputError(absent(key, overrides)) from error
    except InputError:
        raise
    except ValueError as error:  # Hydra's own, for a value where it wants the name of a file, for example
        raise InputError(one_line(error)) from error
    except RecursionError as error:
        raise InputError("settings refer to one another in a circle: give one of them a value") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {one_line(error)}" if error.full_key else one_line(error)) from error


def choices(options: Iterable[str] | None) -> list[str]:
    """Return the choices of a group, without its base file."""
    return [option for option in options or [] if option != "base"]


def absent(key: str, overrides: Sequence[str]) -> str:
    """Return the message for a setting that conf/ does not have: unknown, or one that needs a plus."""
    path, _, name = key.rpartition(".")
    if path == "trainer" and (reason := refusal(name)):
        return f"{key} is not possible: {reason}"
    settings = composed_settings(overrides, key)
    if schema.is_default(key, settings):
        value = next((o.partition("=")[2] for o in overrides if o.lstrip("+~").startswith(f"{key}=")), "VALUE")
        return f"{key} has its default, which conf/ leaves as it is: to give it a value add a plus, +{key}={value}"
    return schema.unknown_key(key, schema.leaves(settings))


def known_settings(overrides: Sequence[str], wrong: str) -> list[str]:
    """Return the settings of the chosen groups, without the wrong one."""
    return list(schema.leaves(composed_settings(overrides, wrong)))


def composed_settings(overrides: Sequence[str], wrong: str) -> dict[str, Any]:
    """The settings under the groups that the command chose, without the wrong one."""
    groups = [o for o in overrides if re.match(r"(hydra/)?[a-z_]+=", o) and o.split("=")[0] != wrong]
    chosen = [o for o in groups if "," not in o or re.match(rf"({'|'.join(schema.SETS)})=\[", o)]
    of_hydra = wrong.startswith("hydra.")
    try:
        cfg = compose("train", chosen, return_hydra_config=of_hydra)
    except HydraException:
        cfg = compose("train", return_hydra_config=of_hydra)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    return plain
