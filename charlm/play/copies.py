"""Copied spans: which characters of a text, as it comes, repeat a span of train."""

from collections import deque

import torch
from torch import Tensor

from charlm.study.inspection import grams, points

SHORTEST = 20  # characters of a span that counts as copied
MOST_PLACES = 4096  # of train in which a span is followed; one of a single repeated character has millions


class Spans:
    """All spans of SHORTEST characters of a training text, to be looked up.

    Args:
        text: its code points, (N,) int64.
    """

    def __init__(self, text: Tensor):
        self.text = text
        self.hashes, self.starts = grams(text, SHORTEST).sort()

    def ends(self, span: Tensor) -> Tensor:
        """Return the positions after each occurrence of a span (SHORTEST,), at most MOST_PLACES: (n,) int64."""
        wanted = grams(span, SHORTEST)
        low, high = (int(torch.searchsorted(self.hashes, wanted, right=right)) for right in (False, True))
        return self.starts[low : min(high, low + MOST_PLACES)] + SHORTEST


class Copies:
    """Follows a text character by character, and knows how many of its last characters train has in one piece."""

    def __init__(self, spans: Spans, before: str = ""):
        self.spans = spans
        self.recent: deque[int] = deque(maxlen=SHORTEST)
        self.length = 0  # of the copied span that ends here; 0 if it is shorter than SHORTEST
        self.ends = torch.empty(0, dtype=torch.int64)  # where it ends in train
        self.add(before)

    def add(self, text: str) -> int:
        """Go on by a text; return the length of the copied span that ends with it, or 0."""
        train = self.spans.text
        for point in points(text).tolist():
            self.recent.append(point)
            if self.length:
                inside = self.ends[self.ends < len(train)]
                self.ends = inside[train[inside] == point] + 1
                self.length = self.length + 1 if len(self.ends) else 0
            if not self.length and len(self.recent) == SHORTEST:
                self.ends = self.spans.ends(torch.tensor(self.recent))
                self.length = SHORTEST if len(self.ends) else 0
        return self.length
