"""A study -> its scaling law: sizes and budgets, the fit, the best use of compute, and the check on a larger run.

N counts all parameters, embeddings and head included, as Hoffmann et al. (2022) do. Kaplan et al. (2020, section 2.1)
leave embeddings out; small models, in which they are a large part, then follow a law with other exponents (Pearce and
Song 2024; Porian et al. 2024). D counts the tokens of training, and C is D times the floating-point operations per
token, counted for each model (`charlm.model.flops_per_token`): 6 N would leave out attention.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from charlm.errors import InputError
from charlm.study.law import LEVEL, PARAMETERS, Array, Fit, Interval
from charlm.study.runs import Run
from charlm.study.study import Study

FLOPS = "train/flops_per_token"
NAMES = {"E": "E", "A": "A", "alpha": "alpha", "B": "B", "beta": "beta", "allocation": "a"}
LEAST_LEVELS = 3  # sizes, and budgets, that a fit needs
LEAST_CELLS = PARAMETERS + 3
FAR = 3.0  # times the compute of all other runs that makes a run held out
ALIKE = 1.05  # ratio of compute within which runs are of one size of compute
LIMITS = 1e-6, 1e30  # smallest and largest figure, so that its powers stay finite
NEXT = 4.0  # times the largest compute: the next model
SWEEP = "python train.py sweep=scaling"


@dataclass(frozen=True)
class Cell:
    """The runs of one size and budget, one for each seed.

    Args:
        n: parameters.
        d: tokens of training.
        flops_per_token: floating-point operations of training, per token.
        losses: final val losses, nats per character.
    """

    n: float
    d: float
    flops_per_token: float
    losses: Sequence[float]

    @property
    def compute(self) -> float:
        return self.flops_per_token * self.d

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def sd(self) -> float | None:
        """The standard deviation over seeds, None for one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Prediction:
    """A model that the fit did not see: its size, budget and compute, and its loss by the law.

    Args:
        measured: the cell, if such a model was trained.
    """

    n: float
    d: float
    compute: float
    loss: Interval
    measured: Cell | None = None

    @property
    def within(self) -> bool:
        """Return whether the measured mean lies in the interval."""
        return self.measured is not None and self.loss.low <= self.measured.loss <= self.loss.high


class Scaling:
    """The scaling law of a study.

    Args:
        cells: the cells to fit.
        held_out: cells with much more compute, to be predicted.
    """

    def __init__(self, cells: Sequence[Cell], held_out: Sequence[Cell]):
        self.cells, self.held_out = cells, held_out
        runs = [(cell.n, cell.d, loss, number) for number, cell in enumerate(cells) for loss in cell.losses]
        n, d, losses, numbers = zip(*runs, strict=True)
        self.fit = Fit(n, d, losses, numbers)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The parameters of the law, and the exponent a of the best size: N ~ C^a."""
        return {short: self.fit.interval(name) for name, short in NAMES.items()}

    @cached_property
    def checks(self) -> list[Prediction]:
        """The held-out cells, predicted: the mean of as many seeds as each has."""
        return [Prediction(c.n, c.d, c.compute, self.fit.predict(c.n, c.d, len(c.losses)), c) for c in self.held_out]

    @cached_property
    def next(self) -> Prediction:
        """The best model for NEXT times the largest compute."""
        compute = NEXT * max(cell.compute for cell in [*self.cells, *self.held_out])
        n, d = self.best(compute)
        return Prediction(n, d, compute, self.fit.predict(n, d))

    def predicted(self, cell: Cell) -> float:
        return float(self.fit.law.loss(cell.n, cell.d)[0, 0])

    def flops_per_token(self, n: Array) -> Array:
        """Return the operations per token of models with `n` parameters, between those that were counted.

        Interpolated in logarithms; beyond the counted sizes they grow as n.
        """
        counted = sorted({cell.n: cell.flops_per_token for cell in [*self.cells, *self.held_out]}.items())
        sizes, flops = np.log(np.array(counted)).T
        ratios: Array = np.exp(np.interp(np.log(n), sizes, flops - sizes))
        return ratios * n

    def best(self, compute: float) -> tuple[float, float]:
        """Return the n and d with the lowest loss for a given compute."""
        sizes = [cell.n for cell in [*self.cells, *self.held_out]]
        n = np.geomspace(min(sizes) / 100, max(sizes) * 100, 4001)
        d = compute / self.flops_per_token(n)
        best = int(self.fit.law.loss(n, d)[0].argmin())
        return float(n[best]), float(d[best])

    def found(self) -> dict[str, Any]:
        """Return all as plain types, for programs."""

        def cell(c: Cell) -> dict[str, Any]:
            figures = {"parameters": c.n, "tokens": c.d, "flops": c.compute, "losses": list(c.losses), "mean": c.loss}
            return figures | {"sd": c.sd, "predicted": self.predicted(c)}

        def prediction(p: Prediction) -> dict[str, Any]:
            figures = {"parameters": p.n, "tokens": p.d, "flops": p.compute, "predicted": asdict(p.loss)}
            return figures | ({"measured": p.measured.loss, "within": p.within} if p.measured else {})

        return {
            "cells": [cell(c) for c in self.cells],
            "level": LEVEL,
            "law": {name: asdict(interval) for name, interval in self.intervals.items()},
            "misfit": asdict(self.fit.misfit),
            "held_out": [cell(c) | prediction(p) for c, p in zip(self.held_out, self.checks, strict=True)],
            "next": prediction(self.next),
        }


def scaling_of(study: Study) -> Scaling:
    """Fit the scaling law of a study; runs with much more compute than all others are held out and predicted.

    Where several rows have one size and budget, such as with several learning rates, the best of them counts.

    Raises:
        InputError: if the runs do not compare, or are too few, or of too few sizes or budgets.
    """
    rows = [row for row in study.rows if row.mean("steps") != 0]  # what is only counted has no budget
    families = sorted({str(run.settings.get("model")) for row in rows for run in row.runs})
    if len(families) > 1:
        raise InputError(f"--scaling fits one family of models, and these are {', '.join(families)}: report each alone")
    if study.folds:
        raise InputError(
            "--scaling needs runs of one val text, and these hold out several documents: leave out data.fold"
        )
    if not study.comparable:
        raise InputError(
            "--scaling needs runs of one text and one least context: charlm report without it shows how these differ"
        )
    best: dict[tuple[float, float], Cell] = {}
    for row in rows:  # best first
        runs = [run for run in row.runs if not run.lost]
        if runs:
            cell = cell_of(runs)
            best.setdefault((cell.n, cell.d), cell)
    cells = sorted(best.values(), key=lambda cell: (cell.n, cell.d))
    held_out = far_above(cells)
    fitted = [cell for cell in cells if cell not in held_out]
    check_enough(fitted)
    return Scaling(fitted, held_out)


def cell_of(runs: Sequence[Run]) -> Cell:
    """Return the cell of runs that differ in their seed only.

    Raises:
        InputError: if a figure is missing or not positive.
    """
    for run in runs:
        for figure in ("parameters", "train/tokens", FLOPS, "val/loss"):
            if not LIMITS[0] < run.figures.get(figure, 0) < LIMITS[1]:
                raise InputError(
                    f"--scaling needs {figure} above 0 in results.json, and {run.name} has none: train it again with "
                    "this version, or leave it out; a bigram, which multiplies no matrices, has no such law"
                )
    n, d, flops = (
        statistics.fmean(run.figures[name] for run in runs) for name in ("parameters", "train/tokens", FLOPS)
    )
    return Cell(n, d, flops, [run.figures["val/loss"] for run in runs])


def far_above(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with the most compute, if it is FAR times that of all others or more."""
    most = max((cell.compute for cell in cells), default=0.0)
    top = [cell for cell in cells if cell.compute * ALIKE >= most]
    rest = max((cell.compute for cell in cells if cell not in top), default=math.inf)
    return top if most >= FAR * rest else []


def check_enough(cells: Sequence[Cell]) -> None:
    """Check that a law can be fitted.

    Raises:
        InputError: if not.
    """
    sizes, budgets = ({getattr(cell, name) for cell in cells} for name in ("n", "d"))
    if min(len(sizes), len(budgets)) < LEAST_LEVELS or len(cells) < LEAST_CELLS:
        raise InputError(
            f"--scaling needs {LEAST_LEVELS} sizes, {LEAST_LEVELS} budgets and {LEAST_CELLS} combinations of them, and "
            f"here are {len(sizes)}, {len(budgets)} and {len(cells)}: {SWEEP} makes enough"
        )
