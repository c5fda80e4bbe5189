"""A scaling law: the loss as a function of the size of a model and of the tokens it is trained on.

L(N, D) = E + A / N^alpha + B / D^beta, Hoffmann et al. (2022), "Training Compute-Optimal Large Language Models", eq. 2.

For given exponents the law is linear in E, A and B, which are not negative. So the fit searches alpha and beta only,
and solves for the others at each point: variable projection (Golub and Pereyra 1973), by the method of Levenberg and
Marquardt with the Jacobian of Kaufman (1975). It minimizes the Huber loss of the relative residuals (predicted -
measured) / measured, which to first order are the log residuals of Hoffmann et al., section 3.3, and keep the problem
linear. The parabolas of equal compute of Hoffmann et al. are biased even without noise (arXiv 2603.22339).

Intervals come from a bootstrap of residuals (Davison and Hinkley 1997, section 6.2.3). A cell, which is all seeds of
one size and budget, has one residual, so that the distance of cells from the law counts, and not only the spread of
seeds. Residuals are divided by sqrt(1 - leverage), because a fit with 5 parameters follows the cells at the corners,
and multiplied by the ratio of the quantiles of Student's t and of the normal distribution, because cells are few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PARAMETERS = 5
LEVEL = 0.9  # of the intervals
REPLICATES = 1000  # of the bootstrap
EXPONENTS = 0.01, 4.0  # limits of alpha and beta
TUNING = (
    1.345  # limit of the Huber loss in standard deviations: 95% efficient for normal errors (Holland and Welsch 1977)
)
LEAST_DELTA = 1e-3  # that of Hoffmann et al.
ROUNDS = 60  # most steps of a search
MASKS = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)


@dataclass(frozen=True)
class Interval:
    """An estimate, and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Misfit:
    """The relative distance of cells from a law, root mean square.

    Args:
        apart: as measured, with the degrees of freedom of the fit.
        by_seeds: as the spread of seeds would make it; 0 if each cell has one seed.
        p: p value of an F test of the two, None for one seed each; if it is small, the law does not describe all cells.
    """

    apart: float
    by_seeds: float
    p: float | None


@dataclass(frozen=True)
class Laws:
    """R laws over the same runs: a fit, or the replicates of a bootstrap. Each array has shape (R,)."""

    E: Array
    A: Array
    alpha: Array
    B: Array
    beta: Array

    def loss(self, n: float | Array, d: float | Array) -> Array:
        """Return the losses (R, M) of models with `n` parameters after `d` tokens, numbers or arrays (M,)."""
        E, A, alpha, B, beta = (np.reshape(each, (-1, 1)) for each in (self.E, self.A, self.alpha, self.B, self.beta))
        losses: Array = E + A * np.power(n, -alpha) + B * np.power(d, -beta)
        return losses

    @property
    def allocation(self) -> Array:
        """The exponent a of N ~ C^a, the best size for a compute C ~ N D (Hoffmann et al., eq. 4)."""
        share: Array = self.beta / (self.alpha + self.beta)
        return share


class Fit:
    """The law of measured losses, with its bootstrap.

    Args:
        n: parameters of the model of each run, (M,).
        d: tokens that each run was trained on, (M,).
        losses: final losses, (M,).
        cells: the number of the cell of each run, (M,), from 0: runs of a cell differ in their seed only.
        seed: of the bootstrap.
    """

    def __init__(
        self, n: Sequence[float], d: Sequence[float], losses: Sequence[float], cells: Sequence[int], seed: int = 0
    ):
        self.n, self.d, self.losses = np.array(n, float), np.array(d, float), np.array(losses, float)
        self.cells, self.generator = np.array(cells), np.random.default_rng(seed)
        self.count = int(self.cells.max()) + 1
        self.delta = np.inf
        laws = search(self.n, self.d, self.losses[None], self.delta)
        residuals = np.abs(laws.loss(self.n, self.d)[0] / self.losses - 1)
        scale = float(np.median(residuals)) / 0.6745 * np.sqrt(len(losses) / (len(losses) - PARAMETERS))
        self.delta = max(LEAST_DELTA, TUNING * scale)
        self.law = search(self.n, self.d, self.losses[None], self.delta, laws)

    @cached_property
    def residuals(self) -> Array:
        """Measured / predicted - 1 of each run, (M,)."""
        found: Array = self.losses / self.law.loss(self.n, self.d)[0] - 1
        return found

    def cell_means(self, values: Array) -> Array:
        """Return the mean of each cell, (K,)."""
        means: Array = np.bincount(self.cells, values) / np.bincount(self.cells)
        return means

    @cached_property
    def modified(self) -> Array:
        """The residuals of the cells, (K,), as large as those of new runs would be, and with Student's longer tails."""
        from scipy import stats  # here, because it takes a second to import

        law = self.law
        powers = self.n**-law.alpha, self.d**-law.beta
        slopes = -law.A * np.log(self.n) * powers[0], -law.B * np.log(self.d) * powers[1]
        jacobian = np.stack([np.ones_like(self.n), *powers, *slopes], 1) / self.losses[:, None]
        lengths = np.linalg.norm(jacobian, axis=0).clip(min=1e-300)  # a term that is zero has no slope
        basis, sizes, _ = np.linalg.svd(jacobian / lengths, full_matrices=False)
        leverage = np.bincount(self.cells, (basis[:, sizes > 1e-9 * sizes[0]] ** 2).sum(1)).clip(max=0.95)
        free = self.count - PARAMETERS
        tails = stats.t.isf((1 - LEVEL) / 2, free) / stats.norm.isf((1 - LEVEL) / 2)
        found: Array = self.cell_means(self.residuals) / np.sqrt(1 - leverage) * tails
        return found

    @cached_property
    def seed_sd(self) -> float:
        """The relative standard deviation over seeds, pooled over cells; 0 where each cell has one seed."""
        apart = self.residuals - self.cell_means(self.residuals)[self.cells]
        free = len(apart) - self.count
        return float(np.sqrt((apart**2).sum() / free)) if free else 0.0

    @cached_property
    def misfit(self) -> Misfit:
        """How far cells lie from the law, and how far they would by the spread of seeds alone."""
        from scipy import stats

        free, free_seeds = self.count - PARAMETERS, len(self.cells) - self.count
        apart = float(np.sqrt((self.cell_means(self.residuals) ** 2).sum() / free))
        by_seeds = self.seed_sd / np.sqrt(len(self.cells) / self.count)
        p = float(stats.f.sf((apart / by_seeds) ** 2, free, free_seeds)) if by_seeds else None
        return Misfit(apart, by_seeds, p)

    @cached_property
    def replicates(self) -> Laws:
        """The laws of REPLICATES samples in which each cell has the residual of a cell drawn at random."""
        fitted, means = self.law.loss(self.n, self.d), self.cell_means(self.residuals)
        drawn = self.generator.choice(self.modified, (REPLICATES, self.count))
        residuals = drawn[:, self.cells] + (self.residuals - means[self.cells])
        return search(self.n, self.d, fitted * (1 + residuals), self.delta, self.law)

    def interval(self, name: str) -> Interval:
        """Return the interval of a parameter, or of the `allocation`."""
        low, high = np.quantile(getattr(self.replicates, name), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(getattr(self.law, name)[0]), float(low), float(high))

    def predict(self, n: float, d: float, seeds: int = 1) -> Interval:
        """Return the loss of a new model, and the interval for its mean over `seeds` runs."""
        value = float(self.law.loss(n, d)[0, 0])
        drawn = self.generator.choice(self.modified, REPLICATES)
        in_cell = len(self.cells) / self.count  # seeds whose mean the residual of a cell is
        more = self.seed_sd * np.sqrt(max(0.0, 1 / seeds - 1 / in_cell))
        drawn = drawn + more * self.generator.standard_normal(REPLICATES)
        # In simulations of four laws these quantiles cover 89 to 91%; if the errors of the replicates counted with the
        # opposite sign, as in "basic" intervals, 85 to 92%.
        samples = self.replicates.loss(n, d)[:, 0] * (1 + drawn)
        low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(value, float(low), float(high))


def search(n: Array, d: Array, losses: Array, delta: float, start: Laws | None = None) -> Laws:
    """Return the laws with the least Huber loss.

    Args:
        n: parameters of the models, (M,).
        d: tokens, (M,).
        losses: R samples of the losses of these runs, (R, M).
        delta: relative residual beyond which the loss is linear.
        start: the law where the search begins; None: the best start on a grid of exponents, for one sample only.
    """
    if start is None:
        grid = np.geomspace(0.05, 2, 6)
        points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
        losses = np.repeat(losses, len(points), 0)
    else:
        points = np.broadcast_to(np.stack([start.alpha, start.beta], -1), (len(losses), 2))
    origin = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # so that A and B are as large as E
    logs = np.stack([np.log(n / origin[0]), np.log(d / origin[1])], -1)  # (M, 2)
    p, limits = np.log(points), np.log(EXPONENTS)
    value, scales, residuals, weights, columns = project(p, logs, losses, delta)
    damping = np.full(len(p), 1e-2)
    for _ in range(ROUNDS):
        jacobian = -scales[:, None, 1:] * np.exp(p)[:, None] * logs * columns[..., 1:]  # (R, M, 2), by p
        active = columns * (scales > 0)[:, None]
        weighted = active * weights[..., None]
        gram = regular(np.swapaxes(weighted, 1, 2) @ active)
        jacobian = jacobian - active @ np.linalg.solve(gram, np.swapaxes(weighted, 1, 2) @ jacobian)
        turned = np.swapaxes(jacobian * weights[..., None], 1, 2)
        hessian, slope = turned @ jacobian, (turned @ residuals[..., None])[..., 0]
        hessian = hessian + np.eye(2) * (damping[:, None] * np.einsum("rii->ri", hessian) + 1e-15)[:, None]
        step = np.linalg.solve(hessian, slope[..., None])[..., 0].clip(-1, 1)
        trial = (p - step).clip(*limits)
        found = project(trial, logs, losses, delta, weights)
        better = found[0] < value
        done = np.abs(trial - p).max(-1) < 1e-6
        damping = np.where(better, damping / 4, damping * 5).clip(1e-9, 1e9)
        p = np.where(better[:, None], trial, p)
        old = (value, scales, residuals, weights, columns)
        value, scales, residuals, weights, columns = (
            np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, before)
            for new, before in zip(found, old, strict=True)
        )
        if done.all():
            break
    best = slice(None) if start is not None else [int(value.argmin())]
    E, a, b = scales[best].T
    alpha, beta = np.exp(p[best]).T
    return Laws(E, a * origin[0] ** alpha, alpha, b * origin[1] ** beta, beta)


def project(
    p: Array, logs: Array, losses: Array, delta: float, weights: Array | None = None
) -> tuple[Array, Array, Array, Array, Array]:
    """Solve for E, A and B at given exponents, by least squares with weights that make them a Huber loss.

    Args:
        p: logarithms of alpha and beta, (R, 2).
        logs: logarithms of n and d over their means, (M, 2).
        losses: measured, (R, M).
        delta: relative residual beyond which the loss is linear.
        weights: initial weights, those of an earlier call, (R, M).

    Returns:
        The Huber loss (R,), the solution (R, 3), relative residuals and weights (R, M), and columns (R, M, 3).
    """
    powers = np.exp(-np.exp(p)[:, None] * logs)  # (R, M, 2)
    columns = np.concatenate([np.ones_like(powers[..., :1]), powers], -1) / losses[..., None]
    weights = np.ones_like(losses) if weights is None else weights
    for _ in range(1 if np.isinf(delta) else 4):
        scales = not_negative(columns, weights)
        residuals = (columns @ scales[..., None])[..., 0] - 1
        far = np.abs(residuals).clip(min=1e-300)
        weights = np.minimum(1.0, delta / far)
    value = np.where(far <= delta, far**2 / 2, weights * far * (far - far * weights / 2)).sum(-1)
    return value, scales, residuals, weights, columns


def not_negative(columns: Array, weights: Array) -> Array:
    """Return the x >= 0, (R, 3), with the least weighted squares of `columns` (R, M, 3) x - 1: the best subset's."""
    turned = np.swapaxes(columns * weights[..., None], 1, 2)
    gram, right = regular(turned @ columns), turned.sum(-1)
    x: Array = np.linalg.solve(gram, right[..., None])[..., 0]
    if (below := (x < 0).any(-1)).any():
        gram, right = gram[below][:, None], right[below][:, None]
        masked = gram * MASKS[:, :, None] * MASKS[:, None] + np.eye(3) * (1 - MASKS)[:, None]
        each = np.linalg.solve(masked, (right * MASKS)[..., None])[..., 0]  # (R', 7, 3)
        squares = np.einsum("rsi,rsij,rsj->rs", each, np.broadcast_to(gram, masked.shape), each)
        squares = np.where((each < 0).any(-1), np.inf, squares - 2 * (each * right).sum(-1))
        x[below] = each[np.arange(len(each)), squares.argmin(-1)]
    return x


def regular(gram: Array) -> Array:
    """Return matrices (R, 3, 3) that can be inverted, also where columns are equal or zero."""
    size = np.trace(gram, axis1=1, axis2=2)[:, None, None]
    found: Array = gram + (1e-12 * size + 1e-300) * np.eye(3)
    return found
