"""Check configs against constructor signatures, which are the schema; YAML only chooses values.

Every node with a `_target_` must match the signature of its target: no unknown key, and every value of the annotated
type and in its annotated range. Nothing is built, and no data is read.
"""

import difflib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import DocInfo, Ge, Gt, Le, Len, Lt, Predicate, doc
from pydantic import ConfigDict, PydanticUserError, StringConstraints, TypeAdapter, ValidationError

from charlm.errors import InputError, chain
from charlm.home import COMMAND

HYDRA_KEYS = {"_target_": str, "_partial_": bool, "_args_": list, "_recursive_": bool, "_convert_": str}
Positive = Annotated[int, Ge(1)]
# L.seed_everything takes 32 bits.
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
# The settings at the top of conf/train.yaml.
ROOT = {
    "resume": str | None,
    "rerun": str | None,
    "init_from": str | None,
    "trust": str | list[str] | None,
    "seed": Seed,
    "threads": Annotated[int, Ge(1), Le(1024)] | Literal["auto"],
    "compile": bool,
    "max_tokens": Positive | None,
    "stop_at": Positive | None,
    "evaluate": Literal["auto"] | list[str],
    "sample_length": Annotated[int, Ge(0), Le(1_000_000)],
    "run_dir": str,
}
GROUPS = {"data", "tokenizer", "model", "optimizer", "scheduler", "trainer", "speed", "callbacks", "logger"}
SETS = {"callbacks", "logger"}  # groups of any number of parts, each under a name
MAY_BE_EMPTY = {"speed", *SETS}
# Parameters that train.py passes; the others are settings. The caller passes a partial's first parameter.
PASSED = {
    "data": {"tokenizer"},
    "tokenizer": {"train"},
    "model": {"vocab_size"},
    "scheduler": {"budget"},
    "trainer": {"default_root_dir", "logger", "callbacks", "plugins"},
}
# A fraction or a number of batches.
Part = Annotated[float, Ge(0), Le(1)] | Annotated[int, Ge(0)]
# Ranges that Lightning's signatures do not have.
RANGES = {
    "lightning.Trainer": {
        "max_steps": Annotated[
            int | Literal["auto"],
            Predicate(lambda steps: steps in ("auto", -1) or (isinstance(steps, int) and steps >= 1)),
            doc("a whole number of at least 1, -1 for no end, or auto"),
        ],
        "val_check_interval": Positive,
        "log_every_n_steps": Positive,
        "accumulate_grad_batches": Positive,
        "num_nodes": Positive,
        "gradient_clip_val": Annotated[float, Gt(0)] | None,
        "devices": Annotated[int, Ge(-1)] | Annotated[list[Annotated[int, Ge(0)]], Len(1)] | str,
        "max_time": Annotated[
            str,
            StringConstraints(pattern=r"^\d+:\d\d:\d\d:\d\d$"),
            Predicate(lambda time: time.strip("0:") != ""),
            doc("a time above zero as DD:HH:MM:SS"),
        ]
        | None,
        "deterministic": bool,
        "precision": Literal["auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"],
        "max_epochs": Literal[-1] | Positive | None,
        "min_epochs": Positive | None,
        "min_steps": Positive | None,
        "check_val_every_n_epoch": Positive | None,
        "num_sanity_val_steps": Annotated[int, Ge(-1)],
        "reload_dataloaders_every_n_epochs": Annotated[int, Ge(0)],
        "limit_train_batches": Part | None,
    },
    "lightning.pytorch.callbacks.EarlyStopping": {
        "monitor": Literal["val/loss", "val/bits_per_char", "val/perplexity"],
        "mode": Literal["min"],
        "patience": Positive,
        "min_delta": Annotated[float, Ge(0)],
        "stopping_threshold": Annotated[float, Ge(0)] | None,
        "divergence_threshold": Annotated[float, Gt(0)] | None,
    },
}
# Loggers of Lightning that need a package which charlm does not bring.
NEEDS = {"lightning.pytorch.loggers.WandbLogger": "wandb", "lightning.pytorch.loggers.MLFlowLogger": "mlflow"}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
LIMITS = {
    Ge: "of at least {}",
    Gt: "above {}",
    Le: "of at most {}",
    Lt: "below {}",
}
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def check(config: dict[str, Any]) -> None:
    """Check a resolved config, as plain types, against the signatures that it names.

    Raises:
        InputError: if a setting is unknown, of a wrong type or out of range.
    """
    for key, value in config.items():
        if key in ROOT:
            check_value(key, value, ROOT[key])
        elif key not in GROUPS:
            known = {name: config[name] for name in GROUPS & config.keys()}
            raise InputError(unknown_key(key, [*ROOT, *leaves(known)]))
    for key in sorted(ROOT.keys() | GROUPS):
        if key not in config or (key in GROUPS - MAY_BE_EMPTY and not config[key]):
            raise InputError(f"{key} is missing: give it a value, {key}=...")
    for name in sorted(GROUPS):
        check_node(name, config[name])


def check_node(path: str, node: Any) -> None:
    """Check a node with a `_target_`, a set of such nodes (callbacks, logger), or an empty node (logger=none)."""
    if node is None or node == {}:
        return
    if not isinstance(node, dict):
        raise InputError(f"{path}={node!r} is not a choice of this group: see {COMMAND} --help")
    if "_target_" not in node:
        if path in GROUPS - MAY_BE_EMPTY:
            raise InputError(f"{path}._target_ is missing: name a class or a function, {path}._target_=...")
        for name, child in node.items():
            check_node(f"{path}.{name}", child)
        return
    target = resolve(path, node["_target_"])
    needed = NEEDS.get(node["_target_"])
    if needed and importlib.util.find_spec(needed) is None:
        raise InputError(f"{path.partition('.')[0]}={needed} needs a package that is not there: pip install {needed}")
    parameters = inspect.signature(target).parameters
    passed = passed_by_charlm(path, node)
    settings = {name: parameter for name, parameter in parameters.items() if name not in passed}
    hints = annotations(target) | RANGES.get(node["_target_"], {})
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if key in HYDRA_KEYS:
            check_value(f"{path}.{key}", value, HYDRA_KEYS[key])
            continue
        if key in passed or (key not in settings and not open_ended):
            raise InputError(unknown_key(f"{path}.{key}", [f"{path}.{name}" for name in settings if name != "self"]))
        if isinstance(value, dict) and "_target_" in value:
            check_node(f"{path}.{key}", value)
        elif key in hints:
            check_value(f"{path}.{key}", value, hints[key])
    for name, parameter in settings.items():
        named = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if named and parameter.default is inspect.Parameter.empty and name not in node:
            raise InputError(f"{path}.{name} is missing: give it a value, {path}.{name}=...")


def passed_by_charlm(path: str, node: dict[str, Any]) -> set[str]:
    """Return the parameters of a node's target that charlm passes, so that they are no settings."""
    parameters = inspect.signature(resolve(path, node["_target_"])).parameters
    return PASSED.get(path, set()) | ({next(iter(parameters), "")} if node.get("_partial_") else set())


def is_default(key: str, config: dict[str, Any]) -> bool:
    """Return whether a setting exists that a config leaves at its default."""
    path, _, name = key.rpartition(".")
    node: Any = config
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or "_target_" not in node or name in node:
        return False
    parameters = inspect.signature(resolve(path, node["_target_"])).parameters
    return name in parameters and name not in passed_by_charlm(path, node)


def check_value(path: str, value: Any, hint: Any) -> None:
    try:
        adapter(hint).validate_python(value)
    except ValidationError:
        given = "null" if value is None else value
        raise InputError(f"{path}={given} is not possible: give {allowed(hint)}") from None


@cache  # the jobs of a sweep have the same types
def adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=STRICT)
    except PydanticUserError:  # the type brings a configuration of its own
        return TypeAdapter(hint)


def allowed(hint: Any) -> str:
    """Describe the values that a type annotation allows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        documented = [m.documentation for m in hint.__metadata__ if isinstance(m, DocInfo)]
        limits = [LIMITS[type(m)].format(*vars_of(m)) for m in hint.__metadata__ if type(m) in LIMITS]
        return documented[0] if documented else " ".join([allowed(hint.__origin__), " and ".join(limits)]).strip()
    if origin in (Union, UnionType):
        return " or ".join(allowed(a) for a in arguments)
    if origin is Literal:
        return f"one of {', '.join(str(a) for a in arguments)}"
    if origin in (list, Sequence) and arguments:
        return f"a list, each {allowed(arguments[0])}"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def vars_of(limit: Any) -> list[Any]:
    return [getattr(limit, name) for name in limit.__dataclass_fields__]


def resolve(path: str, target: str) -> Any:
    try:
        found = pkgutil.resolve_name(target)
        inspect.signature(found)  # a target without a signature cannot be checked
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}._target_={target} cannot be used ({error}): name a class or a function") from None
    return found


def annotations(target: Any) -> dict[str, Any]:
    """Parameter annotations, or none where the target does not reveal them."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError):
        return {}


@contextmanager
def arguments_as_settings(group: str, node: dict[str, Any]) -> Iterator[None]:
    """Make error messages name arguments as the command line does: `data.block_size`, not `block_size`."""
    names = "|".join(inspect.signature(resolve(group, node["_target_"])).parameters)
    try:
        yield
    except Exception as error:
        for mistake in chain(error):
            if isinstance(mistake, ValueError) and mistake.args:
                # An argument that is also an English word is meant only where a value follows.
                found = rf"(?<![\w./])(?=(?:{names})(?!\w))(?=\w*(?:_\w|=))"
                mistake.args = (re.sub(found, f"{group}.", str(mistake.args[0])), *mistake.args[1:])
        raise


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for key, value in config.items():
        if key not in HYDRA_KEYS:
            yield prefix + key
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown setting, with the nearest known name."""
    known = sorted(set(known))
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same_leaf[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"see {COMMAND} --help for all settings"
    return f"there is no setting {key}: {hint}"


def name_of(node: dict[str, Any]) -> str:
    """Return the name of a config node: the last part of its `_target_`, which is also its file's name.

    Of a method that makes a tokenizer, such as charlm.tokenizer.CharTokenizer.from_corpus, it is char.
    """
    target = str(node["_target_"]).removesuffix(".from_corpus")
    return target.rpartition(".")[2].lower().removesuffix("tokenizer")
