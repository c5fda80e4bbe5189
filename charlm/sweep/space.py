"""The space of a search: the settings that a command leaves open, in the words of Hydra's sweeps.

optimizer.lr=interval(0.1,1)                 any number between
optimizer.lr=tag(log,interval(1e-4,1e-1))    the same, with as many tries for each order of magnitude
model.n_layer=range(1,5)                     1, 2, 3 or 4; also with a step, or tag(log,...)
model=gpt,lstm   model=choice(gpt,lstm)      one of those, which have no order
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from charlm import schema
from charlm.errors import InputError
from charlm.sweep.ledger import Search

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEW = 16  # ranges with fewer values are checked completely before a search


class Space:
    """The space of a search: fixed overrides, and the open settings with their distributions.

    Args:
        overrides: parsed overrides; the last one of a setting counts, as in Hydra.

    Raises:
        InputError: if nothing is open, or something cannot be searched.
    """

    def __init__(self, overrides: Sequence[Override]):
        self.overrides = {override.get_key_element(): override for override in overrides}
        self.open = {name_of(o): distribution(o) for o in self.overrides.values() if o.is_sweep_override()}
        if not self.open:
            raise InputError(
                "a search needs settings to search: leave one open, as in 'optimizer.lr=tag(log,interval(1e-4,1e-1))'"
            )

    def point(self, values: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial with `values`."""
        return [
            f"{key}={values[name_of(o)]!s}" if o.is_sweep_override() else str(o.input_line)
            for key, o in self.overrides.items()
        ]

    def corners(self) -> list[list[str]]:
        """Return points that reveal impossible values: the first values of all, and each other value in turn."""
        firsts = {name: ends(distribution)[0] for name, distribution in self.open.items()}
        others = [
            firsts | {name: value} for name, distribution in self.open.items() for value in ends(distribution)[1:]
        ]
        return [self.point(values) for values in [firsts, *others]]

    def words(self) -> dict[str, str]:
        """Return the open settings as they were typed."""
        return {key: str(o.input_line).partition("=")[2] for key, o in self.overrides.items() if o.is_sweep_override()}

    def fixed(self) -> set[str]:
        """Return the overrides that all trials share."""
        return {str(o.input_line) for o in self.overrides.values() if not o.is_sweep_override()}


def name_of(override: Override) -> str:
    """Return the name of a setting without + and ~."""
    return override.get_key_element().lstrip("+")


def distribution(override: Override) -> "BaseDistribution":
    """Return Optuna's distribution for a sweep of Hydra.

    Raises:
        InputError: if it cannot be searched.
    """
    # Imported here, because only a search needs it.
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    log = bool(getattr(value, "tags", None))
    try:
        if log and (value.tags != {"log"} or override.is_choice_sweep()):
            raise ValueError("the one tag that there is here is log, for an interval or a range")
        if override.is_interval_sweep():
            if not (math.isfinite(value.start) and math.isfinite(value.end)):
                raise ValueError("it has no end")
            kind = IntDistribution if isinstance(value.start, int) else FloatDistribution
            return kind(value.start, value.end, log=log)
        if override.is_choice_sweep():
            # Without those that are there twice; as texts, as some are lists.
            return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
        numbers: Any = value.range()
        numbers = numbers if isinstance(numbers, range) else list(numbers)
        if not numbers:
            raise ValueError("there is nothing in it")
        if log and value.step != 1:
            raise ValueError("tag(log,...) leaves no place for a step")
        least, most = sorted([numbers[0], numbers[-1]])
        if isinstance(least, int):
            return IntDistribution(least, most, log=log, step=abs(value.step))
        with warnings.catch_warnings(action="ignore"):  # that the last bit of a number is another
            return FloatDistribution(least, most, log=log, step=None if log else abs(value.step))
    except ValueError as error:
        raise InputError(f"{override.input_line} cannot be searched: {str(error).rstrip('.')}") from None


def ends(distribution: "BaseDistribution") -> list[Any]:
    """Return the values to check before a search: all if they are few, otherwise the smallest and the largest."""
    choices: Sequence[Any] | None = getattr(distribution, "choices", None)
    if choices is not None:
        return list(choices)
    numbers: Any = distribution
    if numbers.step and (numbers.high - numbers.low) / numbers.step < FEW and isinstance(numbers.low, int):
        return list(range(numbers.low, numbers.high + 1, numbers.step))
    return list(dict.fromkeys([numbers.low, numbers.high]))


def asked(hydra: Any, space: Space) -> Search:
    """Return the settings of a search that a command gives.

    Args:
        hydra: its settings of Hydra.

    Raises:
        InputError: if a setting is not possible.
    """
    node: Any = OmegaConf.to_container(hydra.sweeper, resolve=True)
    schema.check_node("hydra.sweeper", node)
    if not hydra.launcher._target_.endswith(".LocalLauncher"):
        raise InputError("hydra/sweeper=optuna runs its trials on this machine: leave hydra/launcher=local as it is")
    return {**{key: node[key] for key in Search.__annotations__ if key != "space"}, "space": space.words()}  # type: ignore[typeddict-item]


def recorded(search: Search, command: Sequence[str]) -> list[str]:
    """Return the overrides that continue a search, in addition to its first command."""
    settings = [f"hydra.sweeper.{key}={value}" for key, value in search.items() if key != "space"]
    known = {o.partition("=")[0] for o in command}
    elsewhere = [f"{key}={words}" for key, words in search["space"].items() if key not in known]
    return ["hydra/sweeper=optuna", *settings, *elsewhere]
