"""Allow-list for recorded settings: a run folder or a sweep may come from a stranger.

A recorded setting is accepted if charlm itself would have recorded it: it belongs to a known group, its part is one
that a file of conf/ names in the same group, and its value is plain. No recorded value is looked up in the environment,
in Hydra or by any other resolver of OmegaConf; only plain references to other settings are followed.

Every command that reads recorded runs and sweeps uses these checks.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, QuotedString, RangeSweep
from hydra.errors import HydraException

from charlm.errors import InputError, printable
from charlm.files import everything
from charlm.schema import GROUPS, RANGES, ROOT, SETS, check, leaves

OURS = {"charlm", "lightning", "torch"}
CHOICES = GROUPS | {"experiment", "sweep"}  # settings that choose a file of conf/
DECIDED = {"run_dir", "resume", "rerun", "trust"}  # settings for the folder of a run, which a record must not change
REFERENCE = re.compile(r"\$\{(\w+)((?:\.\w+)*)\}")  # another setting; anything else between braces may be a call
PLAIN_NAME = re.compile(r"[\w-]+")
SETTING = re.compile(r"\w+(\.\w+)*")
# Settings for output paths. In a stranger's folder they must stay inside of it.
PLACES = {"dirpath", "save_dir", "tracking_uri"}
# Flags of Lightning's Trainer without a range in `config.RANGES` that neither write nor send anything elsewhere.
HARMLESS = {
    "lightning.Trainer": {
        "barebones",
        "benchmark",
        "detect_anomaly",
        "gradient_clip_algorithm",
        "inference_mode",
        "profiler",
        "sync_batchnorm",
    }
}


class Part(NamedTuple):
    """A part as the files of conf/ name it."""

    special: dict[str, Any]  # _partial_ and the like
    values: dict[str, Any]  # its settings


def refuse(source: Path, what: str, why: str) -> InputError:
    return InputError(f"{source} records {printable(what, 200)}, {why}: not run")


def check_record(source: Path, config: Mapping[str, Any], follows: Mapping[str, str]) -> None:
    """Check the shape of recorded settings; what they name is for `check_config` to check.

    Args:
        config: the resolved settings of a run.
        follows: its settings that were given as references, such as {"data.seed": "${seed}"}.

    Raises:
        InputError: if settings are nested too deep, or refer to anything but other settings.
    """
    for place, value in everything(source, config):
        plain = isinstance(value, str | float | dict | list | None) or (isinstance(value, int) and abs(value) < 2**63)
        if not plain or (isinstance(value, dict) and not all(isinstance(key, str) for key in value)):
            raise InputError(f"{source} is damaged: {printable(place, 200)} is not a setting of a known type")
        if isinstance(value, str) and "${" in value:
            raise refuse(source, f"{place}={value}", "which would have to be looked up elsewhere")
    known = set(leaves(dict(config)))
    for key, value in follows.items():
        node = select(config, key)
        if key not in known or isinstance(node, dict) or key in DECIDED or key.rpartition(".")[2].startswith("_"):
            raise refuse(source, f"{key}={value}", "which is not a setting of this run")
        if not all_references(value):
            raise refuse(source, f"{key}={value}", "which would have to be looked up elsewhere")


def check_run(
    source: Path, config: Mapping[str, Any], conf_dirs: Iterable[Path], given: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Check resolved settings as `check_config` does, and against the signatures of the parts that they name.

    Raises:
        InputError: if charlm would not have recorded a setting.
    """
    check_config(source, config, conf_dirs, given)
    try:
        check(dict(config))
    except InputError as error:
        raise InputError(f"{source} is not as charlm records a run: {error}") from error


def check_config(
    source: Path, config: Mapping[str, Any], conf_dirs: Iterable[Path], given: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Check resolved settings against the allow-list; nothing that they name is imported.

    Args:
        conf_dirs: folders of configuration files, which are not a stranger's.
        given: settings of the command line, which are not checked; `trust` names packages whose parts are accepted.

    Raises:
        InputError: if charlm would not have recorded a setting.
    """
    check_record(source, config, {})
    parts = parts_of(conf_dirs)
    run_dir = str(config.get("run_dir"))
    for group in sorted(GROUPS & config.keys()):
        nodes = {group: config[group]}
        if group in SETS and isinstance(config[group], dict):
            nodes = {f"{group}.{name}": node for name, node in config[group].items()}
        for path, node in nodes.items():
            if node is not None and node != {}:
                check_part(source, path, node, parts, run_dir, given)


def check_part(
    source: Path,
    path: str,
    node: Any,
    parts: Mapping[str, Mapping[str, Part]],
    run_dir: str,
    given: Mapping[str, Any],
) -> None:
    """Check a part of a configuration: its target is one that conf/ names in this group, and so are its settings.

    Raises:
        InputError: if not.
    """
    target = node.get("_target_") if isinstance(node, dict) else None
    if isinstance(target, str) and target.partition(".")[0] in trusted(given):
        return  # its settings are for `schema.check`, against the signature
    part = parts.get(path.partition(".")[0], {}).get(target) if isinstance(target, str) else None
    if part is None or not isinstance(target, str):
        what = printable(repr(target), 200)
        advice = "trust=PACKAGE accepts the parts of a package"
        raise InputError(f"{source} names {what} as {path}, which no file of conf/ does ({advice}): not run")
    allowed = {*part.values, *RANGES.get(target, {}), *HARMLESS.get(target, ())}
    own = target.startswith("charlm.")  # `config.check` compares these settings with the signature
    for key, value in part.special.items():
        if node.get(key) != value:
            raise refuse(source, f"{path}.{key}={node.get(key)}", f"where conf/ has {value}")
    for key, value in node.items():
        setting = f"{path}.{key}"
        if key == "_target_" or key in part.special:
            continue
        if key.startswith("_") or not (own or key in allowed):
            raise refuse(source, setting, "which no file of conf/ sets there")
        if isinstance(value, dict):
            check_part(source, setting, value, parts, run_dir, given)
        as_usual = setting in given or value in (None, part.values.get(key))
        if key in PLACES and not as_usual and not is_inside(value, run_dir):
            why = f"which is outside of the run's folder (to use it all the same, repeat {setting}=...)"
            raise refuse(source, f"{setting}={value}", why)


def foreign(config: Mapping[str, Any]) -> list[str]:
    """Return the packages outside of charlm's own parts that a config names, such as mylab; they must be trusted."""
    targets = [part["_target_"] for part in targets_in(config)]
    return sorted({target.partition(".")[0] for target in targets} - OURS)


def trusted(given: Mapping[str, Any]) -> set[str]:
    """Return the packages that trust=PACKAGE or trust=[ONE,OTHER] names on the command line."""
    names = given.get("trust")
    return {names} if isinstance(names, str) else {str(name) for name in names or ()}


def check_overrides(source: Path, overrides: Sequence[str]) -> None:
    """Check the overrides of a recorded command: groups and settings of a run, with plain values.

    Raises:
        InputError: if charlm does not record one, such as Hydra's own.
    """
    parser = OverridesParser.create()
    for text in overrides:
        unknown = refuse(source, text, "which charlm does not record")
        check_key(source, text)
        try:
            [override] = parser.parse_overrides([text])
            value: Any = override.value()
        except (HydraException, ValueError, RecursionError):
            raise unknown from None
        key = override.key_or_group
        if override.package is not None or not is_key(key):
            raise unknown
        if override.is_delete():
            if not re.fullmatch(r"(callbacks|logger)\.\w+", key):
                raise unknown
            continue
        strings = [*strings_in(value)]
        if key in CHOICES and not isinstance(value, dict) and not all(map(PLAIN_NAME.fullmatch, strings)):
            raise unknown  # a path to a file elsewhere
        if not all(map(all_references, strings)):
            raise unknown


def check_key(source: Path, text: str) -> None:
    """Check which setting a job's override names. Nothing composes these overrides; they identify and label the job.

    Raises:
        InputError: if it is not a setting of a run.
    """
    if not is_key(text.partition("=")[0].lstrip("+~")):
        raise refuse(source, text, "which charlm does not record")


def is_key(key: str) -> bool:
    """Return whether an override may set this: a choice of a group or a setting of a run, except its folder."""
    root, *path = key.split(".")
    special = [name for name in path if name.startswith("_") and name != "_target_"]
    known = root in (ROOT.keys() | CHOICES) - DECIDED
    return bool(SETTING.fullmatch(key)) and known and not special


def all_references(text: str) -> bool:
    """Return whether a text refers to nothing but other settings."""
    names = {root for root, _ in REFERENCE.findall(text)}
    return names <= ROOT.keys() | GROUPS and "${" not in REFERENCE.sub("", text)


def strings_in(value: Any) -> Iterator[str]:
    """Yield all texts in the parsed value of an override, keys of dictionaries included."""
    if isinstance(value, QuotedString):
        yield value.text
    elif isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from (*strings_in(key), *strings_in(child))
    elif isinstance(value, ChoiceSweep):
        yield from strings_in(value.list)
    elif isinstance(value, list):
        for child in value:
            yield from strings_in(child)
    elif not isinstance(value, RangeSweep | IntervalSweep | Glob | int | float | None):
        yield "${}"  # unknown kinds of values are refused


def select(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted setting, or None."""
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def is_inside(path: Any, folder: str) -> bool:
    """Return whether a path is in a folder, also after links and .. are followed."""
    return isinstance(path, str) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def parts_of(conf_dirs: Iterable[Path]) -> dict[str, dict[str, Part]]:
    """Return the parts that the files of conf/ name, by group and by target."""
    found: dict[str, dict[str, Part]] = {}
    for folder in conf_dirs:
        for file in sorted(folder.rglob("*.yaml")):
            content = yaml.safe_load(text := file.read_text(encoding="utf-8")) or {}
            whole = re.match(r"#\s*@package\s+_global_", text) or file.parent == folder
            for group, node in content.items() if whole else [(file.relative_to(folder).parts[0], content)]:
                for part in targets_in(node):
                    special = {key: value for key, value in part.items() if key.startswith("_") and key != "_target_"}
                    values = {key: value for key, value in part.items() if not key.startswith("_")}
                    known = found.setdefault(group, {}).setdefault(part["_target_"], Part(special, {}))
                    known.values.update(values)
    return found


def targets_in(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts in the content of a configuration file."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node
        for child in node.values():
            yield from targets_in(child)
