"""The `charlm` command: train runs, and use trained ones."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from charlm import __version__
from charlm.errors import COMMANDS, InputError, one_line_errors, out_of_memory, printable
from charlm.home import TRAIN
from charlm.schema import name_of
from charlm.system import memory, streams

# torch and Lightning are imported by the commands that need them, so that --help and mistakes answer at once.

EXAMPLES = """
\b
Examples:
  charlm doctor                  what this machine can do, what is missing
  charlm data TEXT               a text, before you train on it
  charlm train model=gpt         train (see charlm train --help)
  charlm generate outputs/RUN --prompt "ROMEO:" --temperature 0.8
  charlm play outputs/RUN        its text in a browser, as it comes
  charlm evaluate outputs/RUN    its exact loss, beside that of counting
  charlm inspect outputs/RUN     learned or copied? what surprises it?
  charlm checkpoint outputs/RUN  what its last state holds; --export it
  charlm reproduce outputs/RUN   train it again: the same to the bit?
  charlm compare outputs/RUN outputs/OTHER    better, or noise?
  charlm report outputs/SWEEP    what many runs found, as one page
  charlm submit outputs/SWEEP --budget cpu_90s    a record?
  charlm board                   all runs of outputs in TensorBoard
"""
RUN = click.argument("run", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, and nothing else.")
COUNT = click.IntRange(min=1)
LAYOUT = "\n\t"  # the control characters that a text is shown with


class Finite(click.FloatRange):
    """A range without infinity and NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


PROBABILITY = Finite(0, 1, min_open=True)


def print_json(content: Any, indent: int | None = 2) -> None:
    """Print JSON; control characters are escaped, because a terminal may show it."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    print(COMMANDS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text))


def check_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    import torch

    from charlm.devices import accelerator_of, make_deterministic

    if value == "auto":
        value = accelerator_of("auto")
    if value.startswith("cuda"):
        make_deterministic()  # as in training, whose figures `evaluate` repeats
    try:
        torch.zeros(1, device=value).item()  # read back: devices such as meta hold no numbers
    except (RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"--device {value} is not there on this machine: use --device cpu, or auto") from None
    return value


DEVICE = click.option(
    "--device", default="auto", show_default=True, callback=check_device, help="cpu, cuda, cuda:1, mps, or auto."
)


TRUST = click.option(
    "--trust",
    multiple=True,
    metavar="PACKAGE",
    help="A package outside of charlm whose model may be loaded. May be repeated.",
)


def check_folder(ctx: click.Context, param: click.Parameter, file: Path | None) -> Path | None:
    if file and not file.parent.is_dir():
        raise InputError(f"{file} cannot be written, as {file.parent} is no folder: make it, or choose another place")
    return file


def output(name: str, purpose: str) -> Callable[[Any], Any]:
    return click.option(name, type=click.Path(path_type=Path), callback=check_folder, help=purpose)


@click.group(epilog=EXAMPLES, context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="charlm")
def charlm() -> None:
    """Train small language models on text, generate with them, and evaluate them exactly.

    RUN_OR_CHECKPOINT is a run folder, such as one under outputs/, or a checkpoint file.
    """


@charlm.command()
@RUN
@click.option("--prompt", help="What to continue. Without one, text starts as a new line does.")
@click.option("--length", type=COUNT, default=500, show_default=True, help="Characters to generate.")
@click.option(
    "--temperature",
    type=Finite(min=0),
    default=1.0,
    show_default=True,
    help="Below 1 bolder in what is likely, above 1 wilder; 0 always takes the likeliest character.",
)
@click.option("--top-k", type=COUNT, help="Choose among the K likeliest characters only.")
@click.option("--top-p", type=PROBABILITY, help="Choose among the fewest characters that together reach probability P.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=1337, show_default=True, help="Same seed, same text."
)
@click.option("--num-samples", type=COUNT, default=1, show_default=True, help="How many texts.")
@DEVICE
@TRUST
@AS_JSON
def generate(
    run: Path,
    prompt: str | None,
    length: int,
    num_samples: int,
    device: str,
    trust: tuple[str, ...],
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text, character by character."""
    from charlm import checkpoint
    from charlm.generate import sample_text, use_threads

    loaded = checkpoint.load(run, device, trust)
    use_threads([loaded.model], num_samples)
    stream = sample_text(loaded.model, loaded.tokenizer, length, prompt, num_samples=num_samples, **sampling)
    if num_samples == 1 and not as_json:
        [first] = next(stream)  # a mistake in the prompt is found here, before anything is printed
        sys.stdout.write(printable((prompt or "") + first, keep=LAYOUT))
        for [new] in stream:
            sys.stdout.write(printable(new, keep=LAYOUT))
            sys.stdout.flush()
            if streams.reader_left:
                return
        print()
        return
    texts = [(prompt or "") + "".join(parts) for parts in zip(*stream, strict=True)]
    if as_json:
        print_json({"checkpoint": str(loaded.path), "step": loaded.step, "samples": texts}, indent=None)
        return
    for number, text in enumerate(texts, start=1):
        print(f"--- sample {number} of {num_samples} ---\n{printable(text, keep=LAYOUT)}")


@charlm.command()
@RUN
@click.argument("other", metavar="[RUN_OR_CHECKPOINT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port of this machine; 0 picks a free one.",
)
@click.option("--open", "in_browser", is_flag=True, help="Open the page in a browser.")
@DEVICE
@TRUST
def play(run: Path, other: Path | None, port: int, in_browser: bool, device: str, trust: tuple[str, ...]) -> None:
    """Show a page on which one checkpoint generates text, or two next to each other.

    The page shows how surprised the model is by each character, what else could have come, what was
    counted in train, and which spans are copied from it. Only this machine can open the page.
    """
    import webbrowser

    try:
        from charlm.play import player, server
    except ModuleNotFoundError as missing:
        if missing.name not in ("starlette", "uvicorn", "sse_starlette"):
            raise
        needed = "charlm play needs packages that are not there"
        raise InputError(f"{needed} ({missing.name}): pip install 'charlm[play]'") from None
    from charlm.generate import use_threads

    with server.listen(port) as listener:  # a port in use is found before anything is loaded
        players = [player.load(place, device, trust) for place in (run, other) if place]
        use_threads([one.loaded.model for one in players])
        address = server.address_of(listener)
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        if in_browser:
            webbrowser.open(address)
        server.serve(players, listener)


@charlm.command()
@RUN
@click.option(
    "--split", "splits", multiple=True, help="train, val or test; may be repeated. Default: those of the run."
)
@click.option("--whole", is_flag=True, help="Measure all of a large split.")
@click.option("--stride", type=COUNT, help="Step between windows; below block_size every target has more context.")
@click.option("--context", type=COUNT, help="Least number of characters before a target; 1 to block_size.")
@click.option("--text", type=click.Path(path_type=Path), help="Score this text instead: a file, a folder or a glob.")
@output("--losses", "Write the loss of each target: FILE.npz with nats, and the characters before each.")
@click.option("--by-position", "positions", is_flag=True, help="Also show the loss by position in the window.")
@click.option("--certify", is_flag=True, help="Also check that the loss is what it seems; see docs/runs.md.")
@DEVICE
@TRUST
@AS_JSON
def evaluate(
    run: Path,
    splits: tuple[str, ...],
    whole: bool,
    stride: int | None,
    context: int | None,
    text: Path | None,
    losses: Path | None,
    positions: bool,
    certify: bool,
    device: str,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the exact loss over whole splits: every character predicted once.

    Of a split with more than data.final_targets characters, evenly spaced parts are measured, unless --whole is given.
    --losses and --by-position take all of it.
    """
    from charlm import checkpoint, terminal
    from charlm.data.corpora import PUBLISHED
    from charlm.evaluate import figures, splits_to_evaluate
    from charlm.files import plain
    from charlm.run import results
    from charlm.study.systems import by_place, data_of

    loaded = checkpoint.load(run, device, trust)
    data = data_of(loaded, run, **({"final_targets": None} if whole else {}))
    name = name_of(loaded.config["model"]) + (f" at {loaded.step:,}" if loaded.step else "")
    if context is not None:
        if stride is not None:
            raise InputError("--context and --stride set the same: give one of them")
        if context > data.block_size:
            raise InputError(f"--context {context} is not possible: give 1 to block_size ({data.block_size})")
        stride = data.block_size - context + 1
    if text:
        evaluate_text(loaded, data, text, stride, name, as_json)
        return
    unseen = len(data.splits["train"]) - 1 - loaded.step * data.batch_size * data.block_size
    chosen = list(splits) or splits_to_evaluate(loaded.config["evaluate"], unseen)
    with terminal.tracked("evaluating") as progress:
        found = figures(loaded.model, data, chosen, progress, stride)
    context = data.min_context if stride is None else max(1, data.block_size - stride + 1)
    header = {"checkpoint": str(loaded.path), "step": loaded.step, "corpus": data.corpus.name, "min_context": context}
    header["tokenizer"] = data.tokenizer.name
    published = PUBLISHED.get(data.corpus.name, ()) if data.fold is None else ()
    header["published"] = [one._asdict() for one in published]
    found = header | found
    if losses or positions:
        each = each_loss(loaded.model, data, chosen, context)
        if losses:
            write_losses(losses, each)
        if positions:
            found["by_position"] = {split: by_place(of_split) for split, of_split in each.items()}
    checks = certificate(loaded.model, data, [split for split in chosen if split != "train"]) if certify else {}
    failures = [f"{check}: {failure}" for check, failure in checks.items() if failure]
    passed = [check for check, failure in checks.items() if not failure]
    found |= {"certified": passed} if certify else {}
    if certify and loaded.path.parent.name == "checkpoints":
        results.certify(loaded.path.parent.parent, loaded.step, [] if failures else passed)
    if failures:
        raise Refuted(f"{loaded.path} is not certified: {'; '.join(failures)}")
    if as_json:
        print_json(plain(found))
    else:
        terminal.console.print(terminal.figures(found, name))
        if found["published"]:
            terminal.console.print(terminal.published(found, name))
        if positions:
            terminal.console.print(terminal.positions(found))
        if certify:
            terminal.console.print(f"certified: {', '.join(passed)}")


def each_loss(model: Any, data: Any, splits: list[str], context: int) -> dict[str, Any]:
    """Return the losses of all targets of splits: `charlm.study.systems.Losses`."""
    from charlm import terminal
    from charlm.study.systems import losses_of

    found = {}
    for split in splits:
        with terminal.tracked(f"the losses of {split}") as progress:
            found[split] = losses_of(model, data, split, context, progress)
    return found


def write_losses(file: Path, losses: dict[str, Any]) -> None:
    """Write the loss of each target of splits, named such as val.nats and val.position."""
    import numpy as np

    from charlm.files import write_atomically

    arrays: dict[str, Any] = {}
    for split, found in losses.items():
        arrays |= {f"{split}.nats": found.nats.numpy(), f"{split}.position": found.position.numpy()}
    write_atomically(file, lambda opened: np.savez_compressed(opened, **arrays))


class Refuted(InputError):
    """A model whose loss is not what it seems."""

    code = 1


def certificate(model: Any, data: Any, splits: list[str]) -> dict[str, str | None]:
    """Return all checks by name, and how each failed on one of the splits, if it did."""
    from charlm.certify import certify

    found: dict[str, str | None] = {}
    for split in splits or ["val"]:
        for check in certify(model, data, split):
            found[check.name] = found.get(check.name) or check.failure
    return found


def evaluate_text(loaded: Any, data: Any, text: Path, stride: int | None, name: str, as_json: bool) -> None:
    """Score a text that a model has not seen, in windows as its own splits are."""
    from charlm import terminal
    from charlm.data.chunks import Windows
    from charlm.data.corpora import load_corpus
    from charlm.data.store import encode
    from charlm.evaluate import evaluate
    from charlm.files import plain
    from charlm.model import device_of

    ids = encode(load_corpus("text", str(text)), loaded.tokenizer, []).ids.to(device_of(loaded.model))
    stride = stride or data.block_size - data.min_context + 1
    windows = Windows(ids, data.block_size, stride, split="given", sizes=data.sizes)
    with terminal.tracked("evaluating") as progress:
        found = evaluate(loaded.model, windows, progress).figures("text")
    found = {
        "checkpoint": str(loaded.path),
        "text": str(text),
        "tokenizer": loaded.tokenizer.name,
        "baselines": {},
    } | found
    print_json(plain(found)) if as_json else terminal.console.print(terminal.figures(found, name, ["text"]))


@charlm.command()
@RUN
@click.option("--export", type=click.Path(path_type=Path), help="Write the weights to a FILE.safetensors, or a FOLDER.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["safetensors", "huggingface"]),
    default="safetensors",
    show_default=True,
    help="huggingface writes a GPT-2 that transformers reads.",
)
@click.option("--force", is_flag=True, help="Let --export replace what is there.")
@TRUST
@AS_JSON
def checkpoint(run: Path, export: Path | None, kind: str, force: bool, trust: tuple[str, ...], as_json: bool) -> None:
    """Show what is in a checkpoint, without loading its weights."""
    from charlm import checkpoint, terminal
    from charlm.files import plain

    path, content, _ = checkpoint.read_newest(run, "meta", needs_text=False)
    found = checkpoint.describe(path, content)
    if export:
        if export.exists() and not force:
            raise InputError(f"--export {export} is there already: choose another name, or say --force")
        write = checkpoint.export if kind == "safetensors" else checkpoint.huggingface.write
        write(checkpoint.load(path, trust=trust), export)
        found["exported"] = str(export)
    if as_json:
        print_json(plain(found))
    else:
        terminal.console.print(terminal.checkpoint(found))


@charlm.command()
@click.argument("path", required=False)
@click.option("--field", default="text", show_default=True, help="The field of a line of .jsonl that holds its text.")
@click.option("--compress", is_flag=True, help="Also compress val, alone and given train: baselines without a model.")
@click.option("--cache", is_flag=True, help="List what is kept of large texts in the user's cache.")
@click.option("--prune", is_flag=True, help="Remove all that is kept there; it is made again when it is needed.")
@AS_JSON
def data(path: str | None, field: str, compress: bool, cache: bool, prune: bool, as_json: bool) -> None:
    """Show a text before you train on it: size, alphabet, documents, entropies, a sample.

    PATH is a file, a folder or a 'glob/**/*.txt', also packed; - for standard input; or the name
    of a corpus: tinyshakespeare, enwik8, text8, ptb_char, pydoc.
    """
    from charlm import terminal
    from charlm.data import CharDataModule, store
    from charlm.data.compressors import compressed
    from charlm.data.corpora import ARCHIVES
    from charlm.data.corpus import spool
    from charlm.data.describe import describe
    from charlm.files import plain
    from charlm.tokenizer import ByteTokenizer

    if (path is None) == (not cache and not prune):
        raise InputError("give a text to show, or --cache, or --prune: charlm data FILE_OR_FOLDER_OR_GLOB")
    if prune:
        freed = store.prune()
        print_json({"freed": freed}) if as_json else print(f"{memory.size(freed)} removed")
    elif cache:
        kept = store.kept()
        if as_json:
            print_json([one._asdict() | {"folder": str(one.folder)} for one in kept])
        else:
            terminal.console.print(terminal.cache(kept))
    else:
        path = str(spool(sys.stdin.buffer)) if path == "-" else path
        val_fraction = None if path in ARCHIVES else 0.1
        found = describe(CharDataModule(path=path, field=field, val_fraction=val_fraction))
        if compress:
            in_bytes = ByteTokenizer.from_corpus
            of_bytes = CharDataModule(path=path, field=field, val_fraction=val_fraction, tokenizer=in_bytes)
            found["compressed"] = [one._asdict() for one in compressed(of_bytes)]
        if as_json:
            print_json(plain(found))
        else:
            terminal.console.print(terminal.corpus(found))


@charlm.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@TRUST
@AS_JSON
def reproduce(run: Path, trust: tuple[str, ...], as_json: bool) -> None:
    """Train a run again from its record and compare bit for bit. The exit code is 0 if both are equal, and 1 if not."""
    from charlm import terminal
    from charlm.files import plain
    from charlm.run.reproduce import reproduce

    with terminal.tracked("training it again") as progress:
        found = reproduce(run, progress, trust)
    if as_json:
        print_json(plain(found))
    else:
        terminal.console.print(terminal.comparison(found))
    sys.exit(0 if found["equal"] else 1)


@charlm.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def train(arguments: tuple[str, ...]) -> None:
    """Train a run or a sweep: the same as python train.py. See charlm train --help."""
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


@charlm.command()
@click.argument("places", metavar="SWEEP_OR_RUNS...", nargs=-1, required=True, type=click.Path(path_type=Path))
@output("--html", "Where to write the page. Default: report.html in the folder.")
@output("--png", "Also draw the main plots as one picture. Default with --scaling: scaling.png in the folder.")
@click.option("--columns", help="The settings to show in the table, such as lr,block_size. Default: all that differ.")
@click.option("--compress", is_flag=True, help="Also compress val, given train: rows without a model.")
@click.option(
    "--scaling",
    "scales",
    is_flag=True,
    help="Also fit the loss as a function of model size and tokens, and predict a larger model.",
)
@AS_JSON
def report(
    places: tuple[Path, ...],
    html: Path | None,
    png: Path | None,
    columns: str | None,
    compress: bool,
    scales: bool,
    as_json: bool,
) -> None:
    """Compare runs over seeds: table, plots, one HTML page.

    SWEEP_OR_RUNS are folders of runs or of sweeps, or folders that hold such, at any depth. --scaling needs runs of
    several sizes and budgets, as python train.py sweep=scaling makes them; it holds out those with 3 times the compute
    of all others or more, and checks its prediction of their loss.
    """
    from charlm import terminal
    from charlm.files import plain, write_atomically
    from charlm.study import read_study
    from charlm.study.scaling import scaling_of
    from charlm.study.systems import compressed_val
    from charlm.study.text import scaling_text, text

    study = read_study(places)
    names = None if columns is None else study.named(columns.split(","))
    others = compressed_val(study) if compress else {}
    scaling = scaling_of(study) if scales else None
    if as_json:
        found = study.found()
        found["references"] |= others
        print_json(plain(found | ({"scaling": scaling.found()} if scaling else {})))
    else:
        terminal.console.print(text(study, terminal.console, names, others))
        folder = places[0] if len(places) == 1 else Path()
        html = html or folder / "report.html"
        if scaling:
            terminal.console.print(scaling_text(scaling))
            png = png or folder / "scaling.png"
    if html:
        from charlm.study.page import page

        content = page(study, f"charlm report: {', '.join(map(str, places))}", names, others, scaling).encode()
        write_atomically(html, lambda file: file.write(content))
    if png:
        from charlm.study.plots import draw_png, png_of, scaling_panels

        picture = png_of(scaling_panels(scaling)) if scaling else draw_png(study)
        write_atomically(png, lambda file: file.write(picture))
    for file in filter(None, (html, png)) if not as_json else ():
        terminal.console.print(f"written: {terminal.quote(file)}", soft_wrap=True)


@charlm.command()
@RUN
@click.option(
    "--length", type=COUNT, default=2000, show_default=True, help="Characters to sample and look for in train."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1337, show_default=True, help="Of the sample.")
@output("--html", "Write a page: surprise in colour, what follows each character, attention of a GPT.")
@DEVICE
@TRUST
@AS_JSON
def inspect(
    run: Path, length: int, seed: int, html: Path | None, device: str, trust: tuple[str, ...], as_json: bool
) -> None:
    """Learned or copied? Copied spans, surprise at each character, what is hard and what is alike to the model."""
    from charlm import checkpoint, terminal
    from charlm.files import plain, write_atomically
    from charlm.study import inspection
    from charlm.study.systems import data_of

    loaded = checkpoint.load(run, device, trust)
    data = data_of(loaded, run)
    with terminal.tracked("looking at val") as progress:
        found = inspection.inspect(loaded, data, length, seed, progress)
    if html:
        content = inspection.page(found, f"{run} on val", inspection.pictures(loaded, data)).encode()
        write_atomically(html, lambda file: file.write(content))
    if as_json:
        print_json(plain(found))
    else:
        terminal.console.print(inspection.text(found))


@charlm.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Show what this machine can do, what GPUs, clusters and compilation still need, and how to get it."""
    from charlm import terminal
    from charlm.doctor import examine

    found = list(examine(Path("outputs")))
    print_json([one._asdict() for one in found]) if as_json else terminal.console.print(terminal.health(found))


@charlm.command()
@click.argument("places", metavar="[FOLDERS]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=6006, show_default=True, help="0 is any free one.")
def board(places: tuple[Path, ...], port: int) -> None:
    """Open TensorBoard on all runs in FOLDERS, outputs by default.

    Runs have short names that differ at the front, and HPARAMS shows the loss and the settings that were varied. Runs
    that begin later appear too.
    """
    from charlm import terminal
    from charlm.board import serving

    with serving(places or (Path("outputs"),), port) as (address, wait):
        terminal.console.print(f"{address}  Ctrl-C ends it.", soft_wrap=True)
        with suppress(KeyboardInterrupt):
            wait()


@charlm.command()
@click.argument("places", metavar="A B...", nargs=-1, required=True)
@click.option("--split", default="val", show_default=True, help="The split on which to compare.")
@DEVICE
@TRUST
@AS_JSON
def compare(places: tuple[str, ...], split: str, device: str, trust: tuple[str, ...], as_json: bool) -> None:
    """Is B better than A? Compare models on the same text, with the spread over seeds.

    A and B are run folders, checkpoints, folders of runs that differ in their seed only, or rows of
    a sweep: SWEEP@optimizer.lr=0.01,model=gpt. All losses are computed again, character by
    character. The exit code is 0 for a verdict, and 1 if the models do not compare.
    """
    from charlm import terminal
    from charlm.files import plain
    from charlm.study import comparison, systems
    from charlm.study.text import compared

    if len(places) < 2:
        raise InputError("give at least two to compare: charlm compare outputs/RUN outputs/OTHER")
    chosen = [systems.choose(place) for place in places]
    measured, reasons, context = systems.measure(chosen, split, device, trust, terminal.tracked)
    if reasons:
        print_json({"verdict": "not comparable", "reasons": reasons}) if as_json else print(
            f"not comparable: {'; '.join(reasons)}"
        )
        sys.exit(1)
    found = comparison.compare(measured)
    settings, notes = systems.differences(chosen)
    if as_json:
        each = [plain(one.found()) | {"min_context": context} for one in found]
        print_json(each if len(each) > 1 else each[0])
    else:
        terminal.console.print(compared(measured, found, settings, [note.text for note in notes], context))


@charlm.command()
@click.argument("places", metavar="SWEEP_OR_RUNS...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--budget", required=True, help="Class of the table: cpu_90s, cpu_10min, gpu_1min or gpu_nanogpt.")
@click.option("--against", type=click.Path(path_type=Path), help="Folder with runs of the present record, made here.")
@click.option("--twin", type=click.Path(path_type=Path), help="A token-matched run, if the clock ended the runs.")
@click.option("--no-reproduce", is_flag=True, help="Do not train one of the runs again.")
@DEVICE
@AS_JSON
def submit(
    places: tuple[Path, ...],
    budget: str,
    against: Path | None,
    twin: Path | None,
    no_reproduce: bool,
    device: str,
    as_json: bool,
) -> None:
    """May these runs enter the table of records? Check them against the rules, and print their row.

    SWEEP_OR_RUNS hold runs of one configuration with three seeds or more. Their losses are computed again, their models
    certified, one of them is trained again, and with --against they are compared with the present record. The rules are
    in docs/records.md. The exit code is 0 for runs that keep them, and 1 for runs that are refused.
    """
    from charlm import terminal
    from charlm.files import plain
    from charlm.study import submission

    if budget not in submission.BUDGETS:
        raise InputError(f"--budget {budget} is no class of the table: choose one of {', '.join(submission.BUDGETS)}")
    chosen = submission.BUDGETS[budget]
    found = submission.submit(places, chosen, against, twin, not no_reproduce, device, terminal.tracked)
    print_json(plain(found.found())) if as_json else print("\n".join(map(printable, found.lines())))
    sys.exit(1 if found.failures else 0)


def main() -> None:
    """Run the command; a mistake is one line on standard error and exit code 2."""
    with one_line_errors(smaller="close other programs, ask for fewer samples, or use a machine with more memory"):
        try:
            charlm(standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as nothing_given:
            print(nothing_given.format_message())
        except click.Abort:
            raise KeyboardInterrupt from None
        except click.ClickException as error:
            usage = error.ctx if isinstance(error, click.UsageError) else None
            hint = f" (see {usage.command_path} --help)" if usage else ""
            raise InputError(" ".join(error.format_message().split()) + hint) from None
