"""Checkpoints: one safetensors file with JSON metadata and a hash; no pickle, and no code from a file runs.

archive.py   the file format: tensors, JSON and a SHA-256, read without trust in the file
content.py   the keys that a checkpoint must have, and their types
file.py      the checkpoints of a run folder: read one, read the newest intact one, write
model.py     from content to a model with its weights, never larger than these
counts.py    what a model has counted, next to its checkpoints
initial.py   the weights that a new run begins from
huggingface.py   GPT-2 in the format of Hugging Face
restore.py   training state from a file, checked against the trainer that continues with it
"""

from charlm.checkpoint.content import check_training, record, record_of
from charlm.checkpoint.counts import write_counts
from charlm.checkpoint.file import BEST, LAST, PREVIOUS, Newest, read, read_newest, write
from charlm.checkpoint.initial import Initial, initial
from charlm.checkpoint.model import (
    Checkpoint,
    build,
    check_weights,
    describe,
    dtype_of,
    export,
    load,
    model_of,
    tokenizer_of,
    trained,
)

__all__ = [
    "BEST",
    "LAST",
    "PREVIOUS",
    "Checkpoint",
    "Initial",
    "Newest",
    "build",
    "check_training",
    "check_weights",
    "describe",
    "dtype_of",
    "export",
    "initial",
    "load",
    "model_of",
    "read",
    "read_newest",
    "record",
    "record_of",
    "tokenizer_of",
    "trained",
    "write",
    "write_counts",
]
