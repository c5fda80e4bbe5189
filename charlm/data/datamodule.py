"""The LightningDataModule: corpus -> tokenizer -> ids -> chunks."""

from itertools import pairwise
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from charlm.data.blend import Blend
from charlm.data.chunks import RandomChunks, Windows, check_length
from charlm.data.corpora import CORPORA, load_corpus
from charlm.data.corpus import Corpus
from charlm.data.pairs import Pairs
from charlm.data.store import Encoded, encode
from charlm.errors import InputError
from charlm.tokenizer import CharTokenizer, MakeTokenizer, Tokenizer

VAL_FRACTION = 0.1  # as in the lecture
# Arguments that decide splits and batches, together with the corpus and the tokenizer.
ARGUMENTS = (
    "field",
    "weights",
    "block_size",
    "batch_size",
    "fallback",
    "fold",
    "val_fraction",
    "test_fraction",
    "min_context",
    "val_targets",
    "final_targets",
    "order",
    "cross_documents",
    "seed",
)


class CharDataModule(L.LightningDataModule):
    """A text, cut into contiguous train, val and test splits, served as chunks of block_size characters.

    Args:
        corpus: name of a corpus (see `charlm.data.corpus`); None: the one that `path` names, or text.
        path: your text for data=text: a file, a folder or a 'glob/**/*.txt', also .gz, .zst and .jsonl; on
            the command line also -, for standard input.
        field: the field of each line of a .jsonl file that holds its text.
        paths: several texts for data=blend, each as `path` or the name of a corpus. Each is cut into splits of its own.
        weights: how often a training chunk is taken from each of `paths`, relative to each other; None: as long as
            they are.
        fallback: corpus to train on, loudly, if this one cannot be downloaded; null: report an error instead.
        block_size: T, characters in a chunk: the context that a model sees.
        batch_size: B, chunks in a batch of one process.
        fold: number of the document that is held out as val, from 1: a play of Tiny Shakespeare, or a file of a folder,
            in the order of their names; None: val is the end of the text.
        val_fraction: fraction of the text, at its end, for the val split; None: as the split of this corpus was
            published.
        test_fraction: fraction of the text, after the val split, for the test split.
        min_context: characters of context that evaluation gives each target at least; losses of different block sizes
            compare only if it is the same. At most block_size. With 1, windows do not overlap.
        val_targets: targets that a validation during training scores at most, in evenly spaced windows; null: all.
        final_targets: targets that an evaluation scores at most in each split, in evenly spaced windows; null: all.
        batches_per_epoch: length of an epoch for Lightning, since random chunks have no natural end. Rounded up to
            whole optimizer steps where the trainer accumulates gradients.
        order: "random": training chunks begin anywhere, as in the lecture. "epoch": every chunk of the text comes once
            per epoch, in random order.
        cross_documents: whether a training chunk may hold parts of several documents. A document is a file of a folder,
            or a line of a .jsonl file.
        seed: seed of the random chunks.
        tokenizer: makes a tokenizer from the corpus.

    Raises (from `setup`):
        InputError: if the text cannot be read, a split is shorter than block_size + 1, or min_context exceeds it.
    """

    def __init__(
        self,
        corpus: str | None = None,
        block_size: Annotated[int, Ge(1)] = 8,
        batch_size: Annotated[int, Ge(1)] = 32,
        path: str | None = None,
        field: str = "text",
        fallback: Literal["pydoc"] | None = None,
        val_fraction: Annotated[float, Gt(0), Lt(1)] | None = VAL_FRACTION,
        test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        min_context: Annotated[int, Ge(1)] = 1,
        val_targets: Annotated[int, Ge(1)] | None = 131_072,
        final_targets: Annotated[int, Ge(1)] | None = 4_000_000,
        batches_per_epoch: Annotated[int, Ge(1)] = 500,
        order: Literal["random", "epoch"] = "random",
        cross_documents: bool = True,
        seed: Annotated[int, Ge(0)] = 0,
        paths: list[str] | None = None,
        weights: list[Annotated[float, Gt(0)]] | None = None,
        tokenizer: MakeTokenizer = CharTokenizer.from_corpus,
        fold: Annotated[int, Ge(1)] | None = None,
    ):
        super().__init__()
        if corpus is None:
            corpus, path = ("blend", None) if paths else (path, None) if path in CORPORA else ("text", path)
        self.corpus_name, self.path, self.field, self.fallback = corpus, path, field, fallback
        self.paths, self.weights = paths, weights
        self.block_size, self.batch_size = block_size, batch_size
        self.fold, self.val_fraction, self.test_fraction = fold, val_fraction, test_fraction
        self.min_context, self.batches_per_epoch, self.seed = min_context, batches_per_epoch, seed
        self.order, self.cross_documents = order, cross_documents
        self.val_targets, self.final_targets = val_targets, final_targets
        self.make_tokenizer = tokenizer
        self.tokens_at_once = 8_192  # in a batch of an evaluation
        self.splits: dict[str, Tensor] = {}
        self.counted: dict[str, Pairs] = {}
        self.corpus: Corpus
        self.tokenizer: Tokenizer
        self.encoded: Encoded
        self.n_parts = 1  # of a blend
        self.sizes: Tensor | None = None  # characters and bytes of each token, (V, 2); None: one of each

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and split the text; a second call does nothing."""
        if self.splits:
            return
        if self.min_context > self.block_size:
            raise InputError(
                f"min_context={self.min_context} is more than block_size={self.block_size} characters can "
                f"show: make it {self.block_size} at most"
            )
        paths = tuple(self.paths) if self.paths else None
        self.corpus = load_corpus(self.corpus_name, self.path, self.field, paths, self.fold)
        if isinstance(self.corpus, Blend):
            self.corpus = self.corpus.in_splits([self.cuts(part) for part in self.corpus.parts])
            cuts, self.n_parts = self.corpus.cuts, len(self.corpus.parts)
        else:
            cuts = self.cuts(self.corpus)
        self.tokenizer = self.make_tokenizer(self.corpus, cuts[self.n_parts - 1])
        self.sizes = sizes_of(self.tokenizer)
        self.encoded = encode(self.corpus, self.tokenizer, cuts)
        self.splits = self.split(self.encoded.ids)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make the same splits again, as plain types."""
        path = self.corpus.source if self.corpus_name == "text" else self.path  # absolute
        parts = self.corpus.parts if isinstance(self.corpus, Blend) else ()
        paths = [one if one in CORPORA else part.source for one, part in zip(self.paths or (), parts, strict=True)]
        which = {"corpus": self.corpus_name, "path": path, "paths": paths or None}
        return which | {name: getattr(self, name) for name in ARGUMENTS}

    @property
    def vocab_size(self) -> int:
        """V, the number of symbols of the text, which is read for it if it was not yet."""
        self.setup()
        return self.tokenizer.vocab_size

    def cuts(self, corpus: Corpus) -> list[int]:
        """Return after how many characters the train and val splits of a corpus end, and the test split, if any."""
        n = corpus.survey.characters
        if self.fold is not None:
            if self.val_fraction != VAL_FRACTION or self.test_fraction:
                raise InputError(
                    f"fold={self.fold} makes val of a whole document, and there is no test: leave out val_fraction and "
                    f"test_fraction"
                )
            return [*corpus.survey.cuts, n]
        if self.val_fraction is None:
            if not corpus.split:
                raise InputError(
                    f"val_fraction={None} means the published split, and {corpus.name} has none: give a number"
                )
            return [*corpus.survey.cuts, n]
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} leave nothing to "
                f"train on: their sum must be below 1"
            )
        # As in the lecture: int(0.9 * n). One rounding keeps 0.1 + 0.1 from moving a boundary by a character.
        train_end = int(round(1 - self.val_fraction - self.test_fraction, 12) * n)
        return [train_end, *([int(round(1 - self.test_fraction, 12) * n)] if self.test_fraction else []), n]

    def split(self, ids: Tensor) -> dict[str, Tensor]:
        """Contiguous views, in the order of the text: train, val and, if asked for, test."""
        train_end, val_end = self.encoded.bounds[self.n_parts - 1], self.encoded.bounds[2 * self.n_parts - 1]
        splits = {"train": ids[:train_end], "val": ids[train_end:val_end]}
        if len(self.encoded.bounds) > 2 * self.n_parts:
            splits["test"] = ids[val_end:]
        for name, part in splits.items():
            check_length(part, self.block_size, name)
        for start, end in pairwise([0, *self.encoded.bounds]):
            check_length(ids[start:end], self.block_size, "shortest")
        return splits

    def pairs(self, split: str) -> Pairs:
        """Return the baselines of a split, counted once."""
        if split not in self.counted:
            self.counted[split] = self.count(self.splits[split])
        return self.counted[split]

    def count(self, ids: Tensor) -> Pairs:
        """Return the pairs of neighbours in ids (N,)."""
        return Pairs.of(ids, self.vocab_size)

    def home(self, device: torch.device) -> torch.device:
        """Where batches for `device` are made: on it, unless the ids take over a quarter of a GPU's free memory."""
        if device.type != "cuda":
            return device
        free, _ = torch.cuda.mem_get_info(device)
        return device if sum(ids.nbytes for ids in self.splits.values()) <= free / 4 else torch.device("cpu")

    def train_dataloader(self) -> RandomChunks:
        """Batches (x, y), (B, T) int64 each, in epochs; others on each rank. A resumed run goes on where it was."""
        device, rank, world_size = self.place()
        ids = self.encoded.scattered[: len(self.splits["train"])].to(self.home(device))
        trainer: Any = self.trainer
        per_step = trainer.accumulate_grad_batches if trainer else 1
        n = -(-self.batches_per_epoch // per_step) * per_step

        def first() -> int:
            made: int = trainer.fit_loop.epoch_loop.batch_progress.total.ready  # in all, also before a resumption
            return 0 if trainer.overfit_batches else made

        return RandomChunks(
            ids,
            self.block_size,
            self.batch_size,
            self.seed,
            rank,
            n,
            first if trainer else None,
            self.order,
            world_size,
            None if self.cross_documents else self.encoded.documents,
            self.encoded.bounds[: self.n_parts],
            self.weights,
        )

    def val_dataloader(self) -> Windows:
        """The val split once, shared among the ranks: at most val_targets of its targets."""
        return self.windows("val", *self.place(), most=self.val_targets)

    def test_dataloader(self) -> Windows:
        """The test split once, shared among the ranks, if the configuration keeps one."""
        return self.windows("test", *self.place(), most=self.final_targets)

    def place(self) -> tuple[torch.device, int, int]:
        """Device, rank and number of ranks: the trainer's, if there is one."""
        if self.trainer is None:
            return torch.device("cpu"), 0, 1
        return self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size

    def windows(
        self,
        split: str,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        stride: int | None = None,
        most: int | None = None,
    ) -> Windows:
        """Every target of `split` exactly once, with min_context unless there is another `stride` between windows.

        Args:
            most: targets to score at most; None: all.

        Raises:
            InputError: if the split does not exist.
        """
        if split not in self.splits:
            raise InputError(f"there is no split {split!r} in this run: choose one of {', '.join(self.splits)}")
        ids = self.splits[split].to(self.home(torch.device(device)))
        stride = stride or self.block_size - self.min_context + 1
        return Windows(ids, self.block_size, stride, self.tokens_at_once, rank, world_size, split, most, self.sizes)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are made on the device; only those of a corpus that did not fit travel."""
        if batch[0].device == device:
            return batch
        return tuple(part.to(device, non_blocking=True) for part in batch)


def sizes_of(tokenizer: Tokenizer) -> Tensor | None:
    """Return how many characters begin in each token, and its bytes, (V, 2) int64; None where both are always 1."""
    sizes = torch.tensor([(sum(byte & 0xC0 != 0x80 for byte in token), len(token)) for token in tokenizer.tokens])
    return None if bool((sizes == 1).all()) else sizes
