"""Observers of training: adding or removing one leaves the trained weights bitwise the same."""

from collections.abc import Mapping

import lightning as L

from charlm.callbacks.at_steps import AtSteps
from charlm.callbacks.best import Best
from charlm.callbacks.bigram_table import BigramTable
from charlm.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from charlm.callbacks.ema import EMA
from charlm.callbacks.losses import Losses, Validations
from charlm.callbacks.progress import Progress
from charlm.callbacks.samples import Samples
from charlm.callbacks.stop import Stop
from charlm.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "AtSteps",
    "AtomicCheckpointIO",
    "Best",
    "BigramTable",
    "Checkpoint",
    "Losses",
    "Progress",
    "Samples",
    "Stop",
    "Throughput",
    "Validations",
    "in_order",
]


def in_order(
    observers: Mapping[str, L.Callback] | None,
    run_dir: str,
    throughput: Throughput,
    stop_at: int | None = None,
    speed: L.Callback | None = None,
) -> list[L.Callback]:
    """Return all callbacks of a run, in the order in which Lightning has to call them.

    Args:
        observers: those that the settings name.
        stop_at: the step to stop after.
        speed: what groups steps.
    """
    given = [*(observers or {}).values()]
    savers = [callback for callback in given if isinstance(callback, Checkpoint)]
    return [
        Validations(run_dir, throughput),  # first, so that its file never lags behind a checkpoint
        *(callback for callback in given if callback not in savers),
        *savers,  # a state is saved when all others are done with its step
        Losses(run_dir),
        throughput,  # its clock starts after what the others do before a step
        Stop(stop_at),
        *([speed] if speed else []),
    ]
