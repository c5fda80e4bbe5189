"""Several corpora as one, each with its own train, val and test split, to be drawn from by weights."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate

from charlm.data.corpus import Corpus
from charlm.data.reader import Piece
from charlm.data.segments import cut_at
from charlm.data.survey import Survey


@dataclass(frozen=True, eq=False)
class Blend(Corpus):
    """Several corpora.

    Args:
        parts: these.
        order: their splits in the order in which they are read: number of the part, and its first and last character
            but one. Empty: all of each part.
    """

    parts: tuple[Corpus, ...] = ()
    order: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of_parts(cls, parts: Sequence[Corpus]) -> "Blend":
        """Several corpora, one after the other."""
        name, source = "+".join(part.name for part in parts), ", ".join(part.source for part in parts)
        files = [file for part in parts for file in part.files]
        blend = cls(name, source, unread, all(part.small for part in parts), files, parts=tuple(parts))
        return replace(blend, read=partial(read_in_order, blend))

    def in_splits(self, cuts: Sequence[Sequence[int]]) -> "Blend":
        """The same corpora, but the train splits of all come first, then the other splits.

        Args:
            cuts: for each part, the numbers of characters after which its splits end.
        """
        between = [[0, *ends] for ends in cuts]
        order = [(i, ends[k], ends[k + 1]) for k in range(len(between[0]) - 1) for i, ends in enumerate(between)]
        blend = replace(self, order=tuple(order))
        return replace(blend, read=partial(read_in_order, blend))

    @property
    def cuts(self) -> list[int]:
        """Numbers of characters after which each split of each part ends, in order."""
        return [*accumulate(end - start for _, start, end in self.order)]

    @cached_property
    def survey(self) -> Survey:
        """What the surveys of the parts say together. The hash is one of their hashes."""
        surveys = [part.survey for part in self.parts]
        return Survey(
            sha256=digest([one.sha256 for one in surveys]),
            characters=sum(one.characters for one in surveys),
            bytes=sum(one.bytes for one in surveys),
            alphabet="".join(sorted({character for one in surveys for character in one.alphabet})),
            documents=sum(one.documents for one in surveys),
            layout=digest([*(one.layout for one in surveys), *self.order]),
            cuts=[],
            nuls=sum(one.nuls for one in surveys),
            crlfs=sum(one.crlfs for one in surveys),
        )


def unread() -> Iterator[Piece]:
    """Stand in for a function that is not known yet."""
    raise NotImplementedError


def digest(values: Sequence[object]) -> str:
    return hashlib.sha256(repr([*values]).encode()).hexdigest()


def read_in_order(blend: Blend) -> Iterator[Piece]:
    """Yield the splits of all parts in their order. Each begins a document."""
    for number, start, end in blend.order or [(i, 0, part.survey.characters) for i, part in enumerate(blend.parts)]:
        if start == end:
            continue
        begins, inside = True, start == 0
        for raw, new, is_cut in cut_at(blend.parts[number].read(), [*([start] if start else []), end]):
            if inside:
                yield Piece(raw, new or begins)
                begins = False
            if is_cut and inside:
                break
            inside = inside or is_cut
