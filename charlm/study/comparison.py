"""Is B better than A? Differences of losses, paired by text, with the spread over seeds.

A loss on val depends on the text that happens to be there and on the seed that the run happened to have. The first is
the same for all models, so differences are taken block by block. The second is estimated from seeds. The variance of a
difference of means is the sum of both: paired^2 + sd^2 / n_A + sd^2 / n_B.

Where each of several documents is held out once, by runs of their own, the documents are the sample: the error of a
mean or of a difference is that of the mean over folds, which holds the spread over seeds too. Folds share most of their
train text, so it is somewhat too small (Nadeau and Bengio 2003; there is no unbiased one, Bengio and Grandvalet 2004).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

ALPHA = 0.05  # of verdicts
LEVEL = 0.95  # of intervals
SEED_SD = 0.005  # nats per character: of small models on small texts, where no two seeds tell
PAIRED_BY_SEED = 8  # seeds that match; with fewer, it costs more degrees of freedom than it gains
POWER = 0.8
MANY = 100  # seeds
CERTAIN = 1e-4  # p values below are not computed exactly, which takes 30 ms each
LARGE = 200  # degrees of freedom that are as good as infinitely many

Verdict = Literal["better", "worse", "within noise", "not comparable"]


@dataclass(frozen=True)
class System:
    """What is compared: runs that differ in their seeds only.

    Args:
        name: as it was typed.
        seeds: of each run, (S,).
        nats: losses of each run in each block of the text, summed, (S, n).
        characters: that they are of, (n,).
        folds: the held-out document that each block stands for; empty: blocks are parts of one text.
    """

    name: str
    seeds: tuple[int, ...]
    nats: np.ndarray
    characters: np.ndarray
    folds: tuple[int, ...] = ()

    @property
    def losses(self) -> np.ndarray:
        """Nats per character of each run, (S,)."""
        return np.asarray(self.nats.sum(1) / self.characters.sum())

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def per_block(self) -> np.ndarray:
        """The mean loss over runs as a sum over blocks, (n,)."""
        return np.asarray(self.nats.mean(0) / self.characters.sum())

    @property
    def noise(self) -> float:
        """Variance of the mean loss that comes from how the runs differ on single blocks; 0 for one run."""
        S, n = self.nats.shape
        if S < 2 or n < 2:
            return 0.0
        weights = self.characters / self.characters.sum()
        parts = self.nats / self.characters.sum()
        rest = parts - parts.mean(0) - np.outer(self.losses - self.loss, weights)
        return float((rest**2).sum() * n / ((S - 1) * (n - 1)) / S)


def over_folds(name: str, seeds: Sequence[int], folds: Sequence[int], losses: Sequence[float]) -> System:
    """Return runs that each hold out one of several documents as one system, in which all documents count the same.

    Args:
        losses: nats per character of each fold, mean over its seeds, (n,).
    """
    return System(name, tuple(sorted({*seeds})), np.array([losses]), np.ones(len(losses)), tuple(folds))


def times_error(n: int) -> float:
    """Return how many standard errors of a mean of n values an interval at LEVEL has to each side."""
    from scipy import stats  # here, because it takes a second to import

    return float(stats.t.isf((1 - LEVEL) / 2, n - 1))


@dataclass(frozen=True)
class Comparison:
    """A system against another, in nats per character.

    Args:
        difference: of the losses; below 0, B is better.
        se: its standard error; paired: the part that comes from the text.
        interval: at LEVEL.
        p: two-sided, for equal losses; corrected where there are several comparisons.
        seed_sd: standard deviation over seeds that was used, and where it comes from.
        more_seeds: how many more seeds of each would show a difference as large as `detectable`; None: no number would.
        n_folds: held-out documents over which the difference is a mean; 0: there is one text.
    """

    a: str
    b: str
    verdict: Verdict
    difference: float
    se: float
    paired: float
    interval: tuple[float, float]
    p: float
    seed_sd: float
    seed_sd_from: str
    n_seeds: tuple[int, int]
    detectable: float
    more_seeds: int | None
    reasons: tuple[str, ...] = ()
    n_folds: int = 0

    def text(self, name: str) -> str:
        """One line for people, in which B has a short name."""
        size = f"{abs(self.difference):.4f} ± {self.se:.4f} nats per character"
        if self.verdict in ("better", "worse"):
            return f"{name} is {self.verdict} by {size} (p = {self.p:.2g})"
        if self.n_folds:
            size = f"{self.difference:+.4f} ± {self.se:.4f}"
            return f"{name}: within noise, {size} (p = {self.p:.2g}) over {self.n_folds} folds"
        if self.more_seeds is None:
            more = f"no number of seeds would show {self.detectable:.3f} on so little text"
        elif self.more_seeds > MANY:
            more = f"as good as equal: more than {MANY} more seeds of each would have to show {self.detectable:.3f}"
        else:
            more = f"{self.more_seeds} more seed{'s' * (self.more_seeds != 1)} of each would show {self.detectable:.3f}"
        return f"{name}: within noise, {self.difference:+.4f} ± {self.se:.4f} (p = {self.p:.2g}); {more}"

    def against(self) -> dict[str, Any]:
        """Return what a table says of B."""
        return {name: getattr(self, name) for name in ("difference", "se", "interval", "p")}

    def found(self) -> dict[str, Any]:
        """Return the comparison as plain types, for programs."""
        kept = ("a", "b", "verdict", "difference", "se", "interval", "p", "reasons", "seed_sd", "seed_sd_from")
        return {name: getattr(self, name) for name in (*kept, "n_seeds", "n_folds", "more_seeds", "detectable")}


def spread(systems: Sequence[System], default: float = SEED_SD) -> tuple[float, float, str]:
    """Return the standard deviation over seeds, its degrees of freedom, and where it comes from. Folds hold it.

    It is pooled from two systems. Of more, it is the median, so that a few systems with a large spread, such as those
    of a learning rate that is too high, hide no differences among the others; half of the degrees of freedom pay.
    """
    if systems[0].folds:
        return 0.0, math.inf, "as the spread over folds holds that of seeds"
    several = [system.losses for system in systems if len(system.seeds) > 1]
    if not several:
        return default, math.inf, "assumed, as there is one seed of each"
    sizes, variances = [len(losses) for losses in several], [float(losses.var(ddof=1)) for losses in several]
    free, source = sum(sizes) - len(sizes), f"of {sum(sizes)} runs"
    if len(several) == 2:
        return math.sqrt(sum(v * (n - 1) for v, n in zip(variances, sizes, strict=True)) / free), free, source
    variance = statistics.median(v / median_of_variance(n) for v, n in zip(variances, sizes, strict=True))
    return math.sqrt(variance), max(1, free // 2) if len(several) > 2 else free, source


@cache
def median_of_variance(n: int) -> float:
    """Return the median of the sample variance of n normal values, whose variance is 1."""
    from scipy import stats  # here, because it takes a second to import

    return float(stats.chi2.median(n - 1) / (n - 1))


def compare(
    systems: Sequence[System],
    default_sd: float = SEED_SD,
    level: float = LEVEL,
) -> list[Comparison]:
    """Compare each system with the first. Several p values are corrected together (Holm 1979).

    Args:
        default_sd: standard deviation over seeds to assume where each system has one.
        level: of the intervals.
    """
    first, *others = systems
    sd, free, source = spread(systems, default_sd)
    found = [one_by_one(first, other, sd, free, source, level) for other in others]
    adjusted = holm([one.p for one in found])
    return [replace(one, p=p, verdict=verdict_of(one.difference, p)) for one, p in zip(found, adjusted, strict=True)]


def against_best(systems: Sequence[System], default_sd: float = SEED_SD) -> list[Comparison]:
    """Compare each system with the first, which is the best of them.

    The best was chosen by its loss, so the difference of any other is at most the range of all: its p value is that of
    the studentized range (Tukey 1949, with Kramer's correction for unequal variances, 1956). That assumes equal spreads
    over seeds, so a system is worse only if a test by the two systems' own spreads (Welch 1947) says so too. The few
    differences over folds have spreads of their own, for which the range is too short: p values count all pairs there.
    """
    first, *others = systems
    sd, free, source = spread(systems, default_sd)
    found = []
    for other in others:
        one = one_by_one(first, other, sd, free, source, LEVEL, len(systems))
        if min(one.n_seeds) > 1 and len(systems) > 2 and not one.n_folds:
            n, m = one.n_seeds
            mine, theirs = float(first.losses.var(ddof=1)) / n, float(other.losses.var(ddof=1)) / m
            of_seeds = mine + theirs
            spent = mine**2 / (n - 1) + theirs**2 / (m - 1)
            own = of_seeds**2 / spent if spent else math.inf
            one = replace(one, p=max(one.p, p_of(one.difference, one.paired**2, of_seeds, own, len(first.characters))))
        found.append(replace(one, verdict=verdict_of(one.difference, one.p)))
    return found


def verdict_of(difference: float, p: float) -> Verdict:
    if p >= ALPHA:
        return "within noise"
    return "better" if difference < 0 else "worse"


def one_by_one(a: System, b: System, sd: float, free: float, source: str, level: float, best_of: int = 2) -> Comparison:
    """Compare two systems.

    Args:
        sd, free, source: spread over seeds; see `spread`.
        best_of: number of systems of which A was chosen as the best; 2 means that it was not chosen.
    """
    from scipy import stats  # here, because it takes a second to import

    difference = b.loss - a.loss
    parts = b.per_block - a.per_block
    weights = a.characters / a.characters.sum()
    n = len(parts)
    rest = parts - difference * weights
    paired = float((rest**2).sum() * n / (n - 1)) if n > 1 else 0.0
    paired = max(0.0, paired - a.noise - b.noise)  # the seeds' part is in the other term
    if not a.folds and sorted(a.seeds) == sorted(b.seeds) and len(a.seeds) >= PAIRED_BY_SEED:
        by_seed = b.losses[np.argsort(b.seeds)] - a.losses[np.argsort(a.seeds)]
        of_seeds, free = float(by_seed.var(ddof=1)) / len(by_seed), len(by_seed) - 1
        sd, source = math.sqrt(float(by_seed.var(ddof=1)) / 2), f"of {len(by_seed)} differences, paired by seed"
    else:
        of_seeds = sd**2 * (1 / len(a.seeds) + 1 / len(b.seeds))
    se = math.sqrt(paired + of_seeds)
    p = p_of(difference, paired, of_seeds, free, n, best_of, by_range=not a.folds)
    half = float(stats.t.isf((1 - level) / 2, df=freedom(paired, of_seeds, free, n))) * se
    interval = difference - half, difference + half
    detectable = max(0.001, round(abs(difference), 3))
    fewest = min(len(a.seeds), len(b.seeds))
    return Comparison(
        a.name, b.name, verdict_of(difference, p), difference, se, math.sqrt(paired), interval, p, sd, source,
        (len(a.seeds), len(b.seeds)), detectable, None if a.folds else more_seeds(detectable, paired, sd, fewest),
        n_folds=len(a.folds),
    )  # fmt: skip


def freedom(paired: float, of_seeds: float, free: float, n_blocks: int) -> float:
    """Return the degrees of freedom of a sum of two variances (Satterthwaite 1946)."""
    spent = paired**2 / max(1, n_blocks - 1) + of_seeds**2 / free
    return (paired + of_seeds) ** 2 / spent if spent > 0 else math.inf


def p_of(
    difference: float,
    paired: float,
    of_seeds: float,
    free: float,
    n_blocks: int,
    best_of: int = 2,
    by_range: bool = True,
) -> float:
    """Return the p value of a difference with the variances `paired` and `of_seeds`.

    Args:
        free: degrees of freedom of the second.
        best_of: number of systems of whose range the difference is a part.
        by_range: whether to go by the distribution of that range; else by the number of pairs (Bonferroni).
    """
    from scipy import stats

    se = math.sqrt(paired + of_seeds)
    if not se:
        return float(difference == 0)
    df, t = freedom(paired, of_seeds, free, n_blocks), abs(difference) / se
    alone = float(2 * stats.t.sf(t, df=df))
    pairs = best_of * (best_of - 1) / 2
    if best_of <= 2 or alone * pairs < CERTAIN or not by_range:
        return min(1.0, alone * pairs)
    return range_p(best_of, round(df) if df < LARGE else math.inf, round(t * math.sqrt(2), 3))


@cache
def range_p(n_groups: int, free: float, q: float) -> float:
    """Return the probability that the studentized range of `n_groups` exceeds q."""
    from scipy import stats

    return float(stats.studentized_range.sf(q, n_groups, max(1, free)))


def more_seeds(difference: float, paired: float, sd: float, there: int) -> int | None:
    """Return how many more seeds of each system would show a difference with POWER; None if no number would."""
    normal = statistics.NormalDist()
    needed = (difference / (normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(POWER))) ** 2 - paired
    return max(1, math.ceil(2 * sd**2 / needed) - there) if needed > 0 else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm 1979): of all sets of equal systems, at most ALPHA have one below it."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted
