"""One document of a corpus held out: the others are train, and it is val. All of them in turn are a cross-validation.

A split within a text measures how well the rest of this text is predicted. The loss of text that nobody has seen, and
how far it differs from one text to the next, is that of whole documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from charlm.data.blend import Blend, digest
from charlm.data.corpus import Corpus
from charlm.data.survey import Survey
from charlm.errors import InputError


@dataclass(frozen=True, eq=False)
class HeldOut(Corpus):
    """A corpus whose documents come in another order: the one that is held out comes last.

    Args:
        whole: the corpus as it stands, whose hash this one has.
        order: its documents.
    """

    whole: Corpus | None = None
    order: Sequence[Corpus] = ()

    @cached_property
    def survey(self) -> Survey:
        """The survey of the text in its new order, but for the hash; the cut is where the last document begins."""
        assert self.whole
        found, last = Blend.of_parts(self.order).survey, self.order[-1].survey
        return replace(
            found,
            sha256=self.whole.survey.sha256,
            layout=digest([found.sha256, found.layout]),
            cuts=[found.characters - last.characters],
        )

    def card(self) -> dict[str, str | int]:
        return {**super().card(), "held_out": self.order[-1].name}


def hold_out(corpus: Corpus, fold: int) -> Corpus:
    """Return a corpus whose val split is its document number `fold`, from 1.

    Raises:
        InputError: if there is no such document.
    """
    documents = corpus.documents()
    if not documents:
        raise InputError(
            f"fold={fold} holds out a whole document, and {corpus.name} has none to choose from: take "
            f"corpus=tinyshakespeare, whose documents are plays, or a folder with several files; or leave out fold"
        )
    if not 1 <= fold <= len(documents):
        raise InputError(f"fold={fold} is not possible: {corpus.name} has documents 1 to {len(documents)}")
    order = [*documents[: fold - 1], *documents[fold:], documents[fold - 1]]
    read = Blend.of_parts(order).read
    return HeldOut(
        corpus.name, corpus.source, read, corpus.small, corpus.files, corpus.field, whole=corpus, order=order
    )
