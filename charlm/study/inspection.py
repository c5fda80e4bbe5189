"""What a model has learned, and what it has copied: spans of train in its text, its surprise at each character."""

import base64
import html
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from charlm import checkpoint
from charlm.callbacks.attention import draw_attention
from charlm.callbacks.bigram_table import draw_frame, paste, png, table_of
from charlm.counts import hashes
from charlm.data import CharDataModule
from charlm.generate import continuation
from charlm.model import device_of
from charlm.study.systems import by_place, losses_of

LENGTHS = (4, 8, 12, 16, 20)  # of n-grams that are looked for in train
LONGEST = 4096  # characters of a copied span that is looked for
MOST = 2**24  # characters of train that are searched
SHOWN = 600  # characters whose surprise is shown
HOT = 8.0  # bits at which a colour is at its strongest
NEIGHBOURS = 4
MOST_SYMBOLS, MOST_POSITIONS = 60, 48  # that pictures show


class Surprise(NamedTuple):
    """A character of a text, or a token, and what it cost to predict it."""

    text: str
    bits: float


def inspect(
    loaded: checkpoint.Checkpoint, data: CharDataModule, length: int, seed: int, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return what there is to see in a model, in plain types.

    Args:
        length: characters of the sample that is searched for copies.
    """
    decode, split = data.tokenizer.decode, "val"
    train = points(decode(data.splits["train"][:MOST]))
    sample = continuation(loaded.model, data.tokenizer, length, seed=seed)
    val = decode(data.splits[split][: 4 * length])[:length]
    span, at = longest_copy(train, points(sample))
    losses = losses_of(loaded.model, data, split, data.min_context, report)
    targets = data.splits[split][1:].long()
    bits = losses.nats / math.log(2)
    return {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "sample": sample,
        "copied": {"characters": span, "text": sample[at : at + span]},
        "novel": [
            {"n": n, "sample": novel(train, points(sample), n), "val": novel(train, points(val), n)} for n in LENGTHS
        ],
        "by_position": [
            {"from": one["from"], "to": one["to"], "bits": one["nats"] / math.log(2), "n": one["n"]}
            for one in by_place(losses)
        ],
        "by_class": by_class(bits, targets, data),
        "surprise": [
            Surprise(decode(targets[i : i + 1]), float(bits[i]))._asdict() for i in range(min(SHOWN, len(targets)))
        ],
        "neighbours": neighbours(loaded.model, data),
    }


def points(text: str) -> Tensor:
    """The code points of a text, (N,) int64."""
    return torch.from_numpy(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64))


def grams(text: Tensor, n: int) -> Tensor:
    """The hashes of all n-grams of a text (N,): (N - n + 1,), or none."""
    return hashes(text[None], n)[0, n - 1 :] if len(text) >= n else text[:0]


def novel(train: Tensor, text: Tensor, n: int) -> float | None:
    """The share of n-grams of a text that train does not have; None if it is too short."""
    there = grams(text, n)
    return float((~torch.isin(there, grams(train, n))).double().mean()) if len(there) else None


def longest_copy(train: Tensor, text: Tensor) -> tuple[int, int]:
    """The longest span of a text that train has, in characters, and where it begins."""
    low, high, at = 0, min(LONGEST, len(text), len(train)), 0
    while low < high:  # a span of n characters has spans of all shorter lengths
        n = (low + high + 1) // 2
        found = torch.isin(grams(text, n), grams(train, n)).nonzero()
        if len(found):
            low, at = n, int(found[0])
        else:
            high = n - 1
    return low, at


def class_of(character: str) -> str:
    """The class of a character, in the words of the table."""
    if character in "\n\r":
        return "line ends"
    if character.isspace():
        return "spaces"
    kind = unicodedata.category(character[:1] or " ")
    if kind[0] == "L":
        return "capital letters" if kind == "Lu" else "other letters"
    return {"N": "digits", "P": "punctuation"}.get(kind[0], "others")


def by_class(bits: Tensor, targets: Tensor, data: CharDataModule) -> list[dict[str, Any]]:
    """Mean bits per target by the class of its first character, the most frequent class first."""
    names = [class_of(data.tokenizer.decode(torch.tensor([i]))[:1]) for i in range(data.vocab_size)]
    kinds = sorted(set(names))
    kind = torch.tensor([kinds.index(name) for name in names])[targets]
    n, total = torch.bincount(kind, minlength=len(kinds)), torch.bincount(kind, bits, len(kinds))
    found = [{"class": k, "bits": float(total[i] / n[i]), "n": int(n[i])} for i, k in enumerate(kinds) if n[i]]
    return sorted(found, key=lambda one: -int(one["n"]))


def neighbours(model: Any, data: CharDataModule) -> list[dict[str, Any]]:
    """The nearest embeddings of the most frequent symbols, by their cosine; none without an embedding."""
    embedding = getattr(getattr(model, "token_embedding", None), "weight", None)
    if embedding is None or len(embedding) != data.vocab_size:
        return []
    often = torch.bincount(data.splits["train"][:MOST].long(), minlength=data.vocab_size)
    unit = torch.nn.functional.normalize(embedding.detach().float().cpu(), dim=1)
    found = []
    for i in often.argsort(descending=True)[:12].tolist():
        near = (unit @ unit[i]).masked_fill(often == 0, -2).argsort(descending=True)
        nearest = [data.tokenizer.decode(near[k : k + 1]) for k in range(1, min(NEIGHBOURS + 1, len(near)))]
        found.append({"symbol": data.tokenizer.decode(torch.tensor([i])), "nearest": nearest})
    return found


def text(found: dict[str, Any]) -> RenderableType:
    """Return all of it for a terminal."""
    copied = found["copied"]
    parts: list[RenderableType] = [
        Text(
            f"Of {len(found['sample']):,} sampled characters, the longest span that train has: {copied['characters']}"
        ),
        Text(f"  {copied['text']!r}"),
    ]
    table = Table("n-grams that train does not have", box=box.SIMPLE_HEAD)
    for title in ("of the sample", "of val itself"):
        table.add_column(title, justify="right")
    for row in found["novel"]:
        shares = ("-" if row[of] is None else f"{100 * row[of]:.1f}%" for of in ("sample", "val"))
        table.add_row(f"{row['n']} characters", *shares)
    parts.append(table)
    for title, rows, name in (
        ("by place in the window", found["by_position"], lambda row: f"{row['from']} to {row['to']}"),
        ("by kind of character", found["by_class"], lambda row: row["class"]),
    ):
        table = Table(title, box=box.SIMPLE_HEAD)
        table.add_column("bits", justify="right")
        table.add_column("targets", justify="right")
        for row in rows:
            table.add_row(name(row), f"{row['bits']:.3f}", f"{row['n']:,}")
        parts.append(table)
    if found["neighbours"]:
        table = Table("symbol", "nearest embeddings", box=box.SIMPLE_HEAD)
        for row in found["neighbours"]:
            table.add_row(repr(row["symbol"]), " ".join(map(repr, row["nearest"])))
        parts.append(table)
    parts += [Text("surprise, from 0 bits to 8 and more:", style="bold"), coloured(found["surprise"])]
    return Group(*parts)


def coloured(surprise: Sequence[dict[str, Any]]) -> Text:
    """Return a text whose background is the redder the more surprising a character was."""
    made = Text()
    for one in surprise:
        heat = min(1.0, one["bits"] / HOT)
        shade = f"black on rgb(255,{round(255 - 175 * heat)},{round(255 - 200 * heat)})"
        made.append(one["text"], style=shade)
    return made


@torch.inference_mode()
def pictures(loaded: checkpoint.Checkpoint, data: CharDataModule) -> dict[str, bytes]:
    """Draw what a model says after single characters next to what was counted, and the attention of a GPT, as PNG."""
    device = device_of(loaded.model)
    shown, counted = table_of(data.pairs("train"), data.vocab_size, MOST_SYMBOLS)
    names = [data.tokenizer.decode(shown[i : i + 1])[:1] or "?" for i in range(len(shown))]
    frame = draw_frame(names, ["learned", "counted in the training text"])
    with torch.inference_mode():
        logits = loaded.model(shown[:, None].to(device))[:, -1]
    paste(frame, logits.float().softmax(-1)[:, shown.to(device)].cpu(), 0)
    paste(frame, counted, 1)
    found = {"What follows a character": png(frame)}
    with torch.inference_mode():
        drawn = draw_attention(loaded.model, data, MOST_POSITIONS)
    if drawn:
        found["Attention, a row for each layer and a column for each head"] = png(drawn)
    return found


def page(found: dict[str, Any], title: str, drawn: Mapping[str, bytes] = MappingProxyType({})) -> str:
    """Return the coloured text and the pictures as one HTML page, without scripts and requests."""
    spans = "".join(
        f'<span title="{one["bits"]:.2f} bits" style="background:rgba(230,60,20,{min(1.0, one["bits"] / HOT):.2f})">'
        f"{html.escape(one['text'])}</span>"
        for one in found["surprise"]
    )
    figures = "".join(
        f"<h2>{html.escape(name)}</h2><img alt='{html.escape(name)}' src='data:image/png;base64,"
        f"{base64.b64encode(picture).decode()}'>"
        for name, picture in drawn.items()
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'><meta name=color-scheme content='light dark'>"
        f"<title>{html.escape(title)}</title>"
        "<style>body{font:16px/1.6 ui-monospace,monospace;max-width:80ch;margin:2rem auto;padding:0 1rem}"
        "pre{white-space:pre-wrap;font:inherit} h2{font-size:1.1em} img{max-width:100%;background:#fff}</style>"
        f"<h1>{html.escape(title)}</h1><p>The redder, the more surprising; point at a character for its bits.</p>"
        f"<pre>{spans}</pre>{figures}</html>\n"
    )
