"""Observers of training: adding or removing one leaves the trained weights bitwise the same."""

from charlm.callbacks.at_steps import AtSteps
from charlm.callbacks.attention import Attention
from charlm.callbacks.best import Best
from charlm.callbacks.bigram_table import BigramTable
from charlm.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from charlm.callbacks.ema import EMA
from charlm.callbacks.progress import Progress
from charlm.callbacks.recorder import Recorder
from charlm.callbacks.samples import Samples

__all__ = [
    "EMA",
    "AtSteps",
    "AtomicCheckpointIO",
    "Attention",
    "Best",
    "BigramTable",
    "Checkpoint",
    "Progress",
    "Recorder",
    "Samples",
]
