"""How often `charlm compare` and `charlm report` are wrong, and how often they see a difference, in simulations.

    python benchmarks/verdicts.py    # 2,000 tables for each number of seeds and rows; about ten minutes

Runs are made as those on Tiny Shakespeare are: 111 blocks of 1,000 characters that differ by 0.3 nats, systems that
each like some blocks better (0.01), seeds with a luck of their own (0.005 over the whole text), and seeds that like
some blocks better (0.015). The next column is Welch's t-test of the final losses alone.
"""

import numpy as np
from scipy import stats

from charlm.study.comparison import ALPHA, SEED_SD, System, against_best, compare, over_folds

BLOCKS = 111
OF_REPORTS = 400  # tables, because the p value of a range takes 30 ms
EFFECT = 0.01  # nats per character


def simulated(rng: np.random.Generator, text: np.ndarray, n_seeds: int, effect: float = 0.0) -> System:
    """Return the losses of runs of one recipe on a text, whose blocks have a loss each."""
    blocks = text + effect + rng.normal(0, 0.01, BLOCKS)
    nats = blocks + rng.normal(0, SEED_SD, (n_seeds, 1)) + rng.normal(0, 0.015, (n_seeds, BLOCKS))
    characters = np.full(BLOCKS, 1000.0)
    return System("x", tuple(range(n_seeds)), nats * characters, characters)


def trials(
    n: int, n_seeds: int, n_rows: int, effect: float = 0.0, level: float = 0.95, reports: int = 0
) -> dict[str, float]:
    """Compare n tables whose rows differ by `effect` from the first.

    Args:
        reports: the number of tables that are also judged as a report does.

    Returns:
        better: the part of them that call any row better; welch: the same by a t-test of the first row alone.
        worse: the part of reports that call any row worse than the best.
        covered: the part of all intervals that hold the effect.
    """
    rng = np.random.default_rng([n_seeds, n_rows])
    better, worse, covered, compared, by_welch = 0, 0, 0, 0, 0
    for table in range(n):
        text = 1.5 + rng.normal(0, 0.3, BLOCKS)
        rows = [simulated(rng, text, n_seeds), *(simulated(rng, text, n_seeds, effect) for _ in range(n_rows - 1))]
        found = compare(rows, level=level)
        better += any(one.verdict == "better" for one in found)
        covered += sum(one.interval[0] <= effect <= one.interval[1] for one in found)
        compared += len(found)
        if table < reports:
            worse += any(one.verdict == "worse" for one in against_best(sorted(rows, key=lambda row: row.loss)))
        if n_seeds > 1:
            p = stats.ttest_ind(rows[0].losses, rows[1].losses, equal_var=False).pvalue
            by_welch += bool(p < ALPHA and rows[1].loss < rows[0].loss)
    return {
        "better": better / n,
        "worse": worse / max(1, reports),
        "covered": covered / compared,
        "welch": by_welch / n,
    }


def worse_over_folds(n: int, n_folds: int, n_rows: int) -> float:
    """Return the part of n tables of equal rows over folds in which a report calls any row worse than the best.

    Documents differ by 0.1 nats, and each row likes some better (0.01).
    """
    rng, worse = np.random.default_rng([n_folds, n_rows]), 0
    for _ in range(n):
        losses = rng.normal(1.5, 0.1, n_folds) + rng.normal(0, 0.01, (n_rows, n_folds))
        rows = [over_folds("x", [1], range(n_folds), row) for row in losses]
        found = against_best(sorted(rows, key=lambda row: row.loss))
        worse += any(one.verdict == "worse" for one in found)
    return worse / n


def main() -> None:
    print("seeds  rows  equal, called better  worse than the best  90% intervals hold it")
    for n_seeds in (1, 3, 5):
        for n_rows in (2, 5, 10, 20):
            reports = OF_REPORTS if n_seeds > 1 and n_rows > 2 else 2000
            found = trials(2000, n_seeds, n_rows, level=0.9, reports=reports)
            better, worse, covered = found["better"], found["worse"], found["covered"]
            print(f"{n_seeds:>5}  {n_rows:>4}  {better:>20.1%}  {worse:>19.1%}  {covered:>21.1%}", flush=True)
    print("folds  rows  equal, called worse than the best")
    for n_folds in (3, 9):
        for n_rows in (2, 3, 10, 20):
            print(f"{n_folds:>5}  {n_rows:>4}  {worse_over_folds(2000, n_folds, n_rows):>32.1%}", flush=True)
    print(f"seeds  {EFFECT} nats better, seen  by Welch's test of final losses")
    for n_seeds in (1, 3, 5):
        found = trials(2000, n_seeds, 2, -EFFECT)
        print(f"{n_seeds:>5}  {found['better']:>22.1%}  {found['welch']:>30.1%}", flush=True)


if __name__ == "__main__":
    main()
