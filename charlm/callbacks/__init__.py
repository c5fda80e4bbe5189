"""Observers of training: adding or removing one leaves the trained weights bitwise the same."""

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
]
