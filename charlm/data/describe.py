"""A text at a glance: its size, alphabet, documents and entropies, and a sample batch as the lecture prints it."""

import math
import unicodedata
from typing import Any

import torch

from charlm.data.chunks import RandomChunks
from charlm.data.datamodule import CharDataModule

ORDINARY = "\n\t"  # control characters that every text has
SAMPLE_SEED = 1337  # the lecture's


def describe(data: CharDataModule) -> dict[str, Any]:
    """Return what `charlm data` prints, in plain types. The tokenizer must be that of characters.

    The entropies come from the text's own frequencies, in bits per character. The first treats each character alone,
    the second uses the character before it. No model of that order does better on the same text.
    """
    data.setup()
    survey, ids, v = data.corpus.survey, data.encoded.ids, data.vocab_size
    pairs = data.count(ids)
    before = torch.bincount(pairs.codes // v, pairs.counts.double(), v)
    counts = before.clone()
    counts[int(ids[-1])] += 1  # the last character begins no pair
    p = counts / counts.sum()
    conditional = -(pairs.counts / pairs.counts.sum() * (pairs.counts / before[pairs.codes // v]).log2()).sum()
    alphabet = [
        {"character": character, "count": int(count), "unusual": unusual(character)}
        for character, count in zip(survey.alphabet, counts.tolist(), strict=True)
    ]
    return {
        "name": data.corpus.name,
        "source": data.corpus.source,
        "sha256": survey.sha256,
        "bytes": survey.bytes,
        "characters": survey.characters,
        "documents": survey.documents,
        "symbols": v,
        "folds": [document.name for document in data.corpus.documents()],
        "splits": {name: len(part) for name, part in data.splits.items()},
        "entropy": {
            "uniform": math.log2(v),
            "unigram": abs(float((p[p > 0] * p[p > 0].log2()).sum())),
            "bigram": abs(float(conditional)),  # not -0.0
        },
        "alphabet": sorted(alphabet, key=lambda entry: -int(entry["count"])),
        "sample": sample(data),
    }


def unusual(character: str) -> str | None:
    """Return the name of a character that is seldom meant as text; None for any other."""
    category = unicodedata.category(character)
    if (category[0] == "C" and character not in ORDINARY) or character == "\ufffd":
        return unicodedata.name(character, f"control character U+{ord(character):04X}")
    return None


def sample(data: CharDataModule) -> list[tuple[str, str]]:
    """Return contexts and targets of the first chunk of a batch."""
    x, y = RandomChunks(data.splits["train"], data.block_size, 1, SAMPLE_SEED).batch(0)
    decode = data.tokenizer.decode
    return [(decode(x[0, : t + 1]), decode(y[0, t : t + 1])) for t in range(x.shape[1])]
