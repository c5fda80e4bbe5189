"""The exact loss of a model over a whole split, and the closed-form losses of count models as baselines."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.counts import Reporter
from charlm.data.chunks import IGNORE, Windows
from charlm.data.datamodule import CharDataModule
from charlm.data.pairs import Pairs
from charlm.model import device_of

BLOCK = 1000  # characters; errors of differences over shorter ones come out too small
FEWEST, MOST = 10, 1000  # blocks of a text
FEWEST_FOR_ERROR = 4  # blocks; the spread of fewer says little
FINE = 100  # characters, of which blocks are made


@dataclass(frozen=True)
class Score:
    """A loss over a split, in nats per token, with its standard error.

    Args:
        characters, bytes: length of the text of the targets. A character counts in the token where it begins.
        share: the part of the split's targets that was scored.
    """

    loss: float
    loss_se: float
    n_targets: int
    characters: int
    bytes: int
    share: float = 1.0

    @property
    def nats_per_char(self) -> float:
        """The loss per character: use it to compare models with different tokenizers on the same text."""
        return self.loss * (self.n_targets / self.characters)

    @property
    def bits_per_char(self) -> float:
        return self.nats_per_char / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * (self.n_targets / self.bytes) / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp of more overflows

    @classmethod
    def of(
        cls,
        window_nll: Tensor,
        counts: Tensor,
        characters: int | None = None,
        n_bytes: int | None = None,
        n_there: int | None = None,
    ) -> "Score":
        """From the summed loss of each window, (n_windows,), and how many targets each counts, (n_windows,).

        Args:
            characters, n_bytes: that the targets stand for; None: one each.
            n_there: number of targets of the split; None: all of them were scored.

        Neighbouring characters are not independent, so the error comes from the spread over blocks of about
        sqrt(N) consecutive targets (batch means: Flegal and Jones 2010, "Batch means and spectral variance
        estimators", section 3), as that of a ratio of sums, since blocks need not be equally long. A text with too few
        blocks has none (NaN).
        """
        nll, n = window_nll.cpu().double(), counts.cpu().double()
        n_targets = int(n.sum())
        rest = n_targets, characters or n_targets, n_bytes or n_targets, n_targets / (n_there or n_targets)
        loss = float(nll.sum() / n_targets)
        per_block = max(1, round(math.sqrt(n_targets) / float(n[0])))  # windows in a block
        block = torch.arange(len(nll)) // per_block
        n_blocks = int(block[-1]) + 1
        if n_blocks < FEWEST_FOR_ERROR:
            return cls(loss, math.nan, *rest)
        residual = torch.zeros(n_blocks, dtype=torch.float64).index_add_(0, block, nll - loss * n)
        variance = n_blocks / (n_blocks - 1) * float(residual.square().sum()) / n_targets**2
        return cls(loss, math.sqrt(variance), *rest)

    def figures(self, split: str) -> dict[str, float]:
        """The names that results files and dashboards use."""
        relative = self.loss_se / self.loss if self.loss else math.nan
        units = ("nats_per_char", "bits_per_char", "bits_per_byte")
        return {
            f"{split}/loss": self.loss,
            f"{split}/loss_se": self.loss_se,
            **{f"{split}/{unit}": getattr(self, unit) for unit in units},
            **{f"{split}/{unit}_se": getattr(self, unit) * relative for unit in units},
            f"{split}/perplexity": self.perplexity,
            f"{split}/perplexity_se": self.perplexity * self.loss_se,  # the delta method: d exp(x) = exp(x) dx
            f"{split}/targets": self.n_targets,
            f"{split}/characters": self.characters,
            f"{split}/bytes": self.bytes,
            f"{split}/share": self.share,
        }


class Blocks:
    """The losses of all targets of a split, summed over blocks of its text, so that models can be compared in pairs.

    Blocks have BLOCK characters, more in a text of more than MOST such blocks, and fewer in one of less than FEWEST.

    Args:
        ids: tokens of the split.
        sizes: characters and bytes of each token, (V, 2); None: one of each.
    """

    def __init__(self, ids: Tensor, sizes: Tensor | None):
        self.sizes = sizes
        self.first = self.characters = 1 if sizes is None else int(sizes[int(ids[0]), 0])  # before the next target
        self.fine: dict[int, float] = {}  # nats of each FINE characters

    def add(self, nll: Tensor, y: Tensor) -> None:
        """Add the losses of the next targets y (B, T), where y is not IGNORE."""
        counted = y != IGNORE
        ids, nats = y[counted].cpu(), nll[counted].double().cpu()
        lengths = torch.ones_like(ids) if self.sizes is None else self.sizes[ids, 0]
        ends = self.characters + lengths.cumsum(0)
        if len(ids):
            places = (ends - lengths) // FINE
            begin = int(places[0])
            for place, nats_there in enumerate(torch.bincount(places - begin, nats).tolist(), begin):
                self.fine[place] = self.fine.get(place, 0.0) + nats_there
            self.characters = int(ends[-1])

    def summed(self) -> tuple[Tensor, Tensor]:
        """Return the characters of each block and their nats, (n,) each; the last takes what is left of the text."""
        size = max(min(BLOCK, self.characters // FEWEST), -(-self.characters // MOST))
        size = max(FINE, size // FINE * FINE)
        n = max(1, self.characters // size)
        nats, characters = torch.zeros(n).double(), torch.full((n,), float(size)).double()
        for place, nats_there in self.fine.items():
            nats[min(n - 1, place * FINE // size)] += nats_there
        characters[-1] += self.characters - n * size
        characters[0] -= self.first  # no target begins there
        return characters, nats


def token_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each target of x, y (B, T) in nats: (B, T), 0 where the target is IGNORE."""
    shortcut: Any = getattr(model, "loss", None)
    if shortcut:
        found: Tensor = shortcut(x, y)
        return found
    logits = model(x)  # (B, T, V)
    nll = F.cross_entropy(in_single(logits).flatten(0, 1), y.flatten(), reduction="none", ignore_index=IGNORE)
    return nll.view_as(y)


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of the targets of x, y (B, T) that are not IGNORE, in nats: what training minimizes."""
    if hasattr(model, "loss"):
        return token_losses(model, x, y).sum() / (y != IGNORE).sum()
    logits = model(x)  # (B, T, V)
    return F.cross_entropy(in_single(logits).flatten(0, 1), y.flatten(), ignore_index=IGNORE)


def in_single(logits: Tensor) -> Tensor:
    """Return logits in at least single precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.inference_mode()
def evaluate(model: nn.Module, windows: Windows, report: Reporter | None = None, blocks: Blocks | None = None) -> Score:
    """The loss of `model` on all targets of `windows`, on the device where the model is.

    The mode of the model, training or not, is restored.

    Args:
        blocks: where losses are summed in the order of the text.
    """
    was_training = model.training
    model.eval()
    device = device_of(model)
    window_nll = torch.zeros(windows.n_windows, device=device)
    done = characters = n_bytes = 0
    for j, (x, y) in enumerate(windows, start=1):
        nll = token_losses(model, x.to(device), y.to(device))
        window_nll[done : done + len(x)] = nll.sum(1)
        if blocks:
            blocks.add(nll, y.to(device))
        done += len(x)
        if windows.sizes is not None:
            found = windows.sizes[y[y != IGNORE].cpu()].sum(0).tolist()
            characters, n_bytes = characters + found[0], n_bytes + found[1]
        if report:
            report(j, len(windows))
    model.train(was_training)
    return Score.of(window_nll, windows.counts(), characters, n_bytes, windows.n_targets)


def baselines(train: Pairs, split: Pairs, vocab_size: int, smoothing: float) -> dict[str, float]:
    """The losses on `split`, nats per character, of models that are counted on `train` and not learned.

    Args:
        smoothing: added to each count. 0 with `split` = `train` gives the optimum: no table can do better.

    Returns:
        uniform: log V. unigram, bigram: computed from the frequencies of characters and of pairs.
    """
    v, n = vocab_size, int(split.counts.sum())
    unigram = torch.bincount(train.codes % v, train.counts.double(), v) + smoothing
    often = torch.bincount(split.codes % v, split.counts.double(), v)
    targets = often.nonzero().flatten()
    place = torch.searchsorted(train.codes, split.codes).clamp_max(len(train.codes) - 1)
    count = torch.where(train.codes[place] == split.codes, train.counts[place], 0).double()
    row = torch.bincount(train.codes // v, train.counts.double(), v)[split.codes // v]
    bigram = (count + smoothing) / (row + smoothing * v)
    return {
        "uniform": math.log(v),
        "unigram": float(-(often[targets] * (unigram[targets] / unigram.sum()).log()).sum() / n),
        "bigram": float(-(split.counts * bigram.log()).sum() / n),
    }


def splits_to_evaluate(chosen: str | list[str], unseen: int = 0) -> list[str]:
    """Return the splits that a setting `evaluate` means.

    Args:
        chosen: their names; "auto": val, and train if the run has been trained on as many tokens as it has.
        unseen: how many tokens fewer that were.
    """
    if isinstance(chosen, list):
        return chosen
    return ["val"] if unseen > 0 else ["train", "val"]


def figures(
    model: nn.Module,
    data: CharDataModule,
    splits: list[str],
    report: Reporter | None = None,
    stride: int | None = None,
    blocks: Blocks | None = None,
) -> dict[str, Any]:
    """Return the figures of a model over splits, and the count baselines.

    Of a split with more than `data.final_targets` targets, evenly spaced windows are scored.

    On train the counts are unsmoothed, which is the optimum: no bigram has a lower loss there. Elsewhere one is added
    to each count, so that a pair that train never showed is possible.

    Args:
        blocks: where the losses of val are summed, if all of it is scored.
    """
    device = device_of(model)
    found: dict[str, Any] = {"baselines": {}}
    windows = {split: data.windows(split, device, stride=stride, most=data.final_targets) for split in splits}
    for split in splits:
        wanted = blocks if split == "val" and not windows[split].partial else None
        found |= evaluate(model, windows[split], report, wanted).figures(split)
        smoothing = 0.0 if split == "train" else 1.0
        v, scored = data.tokenizer.vocab_size, windows[split]
        pairs = Pairs.of_targets(scored, v) if scored.partial else data.pairs(split)
        found["baselines"][split] = baselines(data.pairs("train"), pairs, v, smoothing)
    return found
