"""Terminal output of a run: header, final figures, warnings, next commands."""

import io
import logging
import os
import shlex
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from charlm.errors import InputError, printable, warn
from charlm.files import open_regular
from charlm.home import COMMAND
from charlm.run.results import LOSSES
from charlm.run.table import plus_minus, runs_table, short
from charlm.schema import name_of
from charlm.system import memory

if TYPE_CHECKING:  # slow imports that only training needs
    import lightning as L
    import torch
    from torch import nn

    from charlm.data import CharDataModule
    from charlm.data.store import Kept
    from charlm.doctor import Finding


class SafeConsole(Console):
    """A console that shows text literally: no markup, and no control characters."""

    def __init__(self, **settings: Any):
        super().__init__(highlight=False, emoji=False, markup=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                yield segment._replace(text=printable(segment.text, keep="\n"))


console = SafeConsole()
errors = SafeConsole(stderr=True)
SECONDS_BETWEEN_LINES = 5.0
log = logging.getLogger("charlm")

early_warnings: list[str] = []
started_in: str | None = None  # the folder in which the command was typed, if it is not the current one
UNITS = {"char": "character", "byte": "byte"}  # that a token of a tokenizer is
LEVELS = {"uniform": "uniform", "unigram": "counted unigram", "bigram": "counted bigram"}


@contextmanager
def logged() -> Iterator[None]:
    """Send warnings and messages of libraries, and the traceback of a failure, to the run's log."""
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # another message reports the broken disk
    threading.excepthook = lambda failed: log.error("a thread failed", exc_info=failed.exc_value)
    warnings.simplefilter("default")
    warnings.filterwarnings("ignore", message=".*`dataloader_iter`")  # Lightning's warning about its own feature
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # and may be used, or not
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.INFO)
    for line in early_warnings:
        log.warning(line)
    try:
        yield
    except InputError as error:
        log.error(str(error))
        raise
    except Exception:
        log.exception("the run failed")
        raise


def say(thing: RenderableType) -> None:
    """Print on the terminal and, as plain text, in the run's log."""
    console.print(thing)
    plain = SafeConsole(file=io.StringIO(), width=100)
    plain.print(thing)
    log.info("\n%s", plain.file.getvalue().rstrip())  # type: ignore[attr-defined]


def caution(line: str) -> None:
    """Print a warning on standard error and write it to the run's log."""
    warn(line)
    log.warning(line)


def header(
    config: dict[str, Any],
    data: "CharDataModule",
    model: "nn.Module",
    trainer: "L.Trainer",
    steps: str,
    why_threads: str = "",
) -> None:
    """Print the header of a run: model, corpus, training, device, folder and warnings.

    Args:
        steps: how they are taken, one by one or several at once.
        why_threads: why the run has its number of CPU threads, if it has chosen.
    """
    from charlm.budget import budget_of
    from charlm.devices import broken_gpu

    corpus, sizes = data.corpus, {name: len(ids) for name, ids in data.splits.items()}
    held_out = corpus.card().get("held_out")
    tokens = data.batch_size * data.block_size * trainer.world_size * trainer.accumulate_grad_batches
    counts_only = trainer.max_steps == 0
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = config["optimizer"]
    lines = {
        "model": f"{name_of(config['model'])}, {parameters:,} parameters",
        "corpus": f"{corpus.name}: {corpus.survey.characters:,} characters, {data.tokenizer.vocab_size} symbols; "
        + ", ".join(f"{name} {n:,}" for name, n in sizes.items())
        + (f": {held_out}" if held_out else ""),
        "batches": f"{data.batch_size} chunks of {data.block_size} characters"
        + (f" on each of {trainer.world_size} processes" if trainer.world_size > 1 else ""),
        "training": f"{budget_of(trainer).describe(tokens, sizes['train'])}, "
        f"{name_of(optimizer)} at lr {optimizer['lr']:g}, {name_of(config['scheduler'])}, seed {config['seed']}",
        "device": ", ".join(
            (
                describe_device(trainer.strategy.root_device, why_threads),
                trainer.precision,
                *["compiled"] * config["compile"],
            )
        ),
        "speed": steps,
        "folder": quote(Path(config["run_dir"])),
    }
    if counts_only:
        lines = {k: v for k, v in lines.items() if k not in ("batches", "speed")}
        lines |= {"model": name_of(config["model"]), "training": "none: what it knows is counted"}
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(Text(name, style="bold cyan"), Text(value, overflow="fold"))
    say(table)
    console.print()
    problem = broken_gpu() if config["trainer"]["accelerator"] == "auto" else None
    unused = [f"the GPU is not used, and this run trains on the CPU: {problem}"] if problem else []
    for line in [*corpus.cautions(), *unused]:
        caution(line)


def describe_device(device: "torch.device", why_threads: str) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return f"{device} ({', '.join(filter(None, (threads, why_threads)))})" if device.type == "cpu" else str(device)


def health(findings: Sequence["Finding"]) -> Table:
    """Return what `charlm doctor` has found, a mark before what works and before what is missing."""
    table = Table.grid(padding=(0, 2))
    for one in findings:
        mark = {True: Text("ok", "green"), False: Text("no", "yellow"), None: Text("")}[one.ready]
        table.add_row(mark, Text(one.name, "bold cyan"), Text(one.text, overflow="fold"))
    return table


@contextmanager
def tracked(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress: a bar on a terminal, else a line every few seconds."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    began = told = time.monotonic()
    before = 0  # at the newest line; the same again would only have a longer estimate

    def tell(done: int, total: int) -> None:
        nonlocal told, before
        now = time.monotonic()
        if before < done < total and now - told > SECONDS_BETWEEN_LINES:
            told, before, left = now, done, (now - began) * (total - done) / done
            errors.print(f"{title}: {100 * done / total:.0f}%, {left:,.0f} s left", soft_wrap=True)

    yield tell


def notice_fallback(wanted: str, given: str, reason: Exception) -> None:
    """Print a notice that the run uses the fallback corpus."""
    text = Text()
    text.append(f"NOT {wanted}: this run trains on the {given} corpus instead.\n\n", style="bold")
    text.append(
        f"{reason}.\n\nEverything this run writes is called {given}. Its figures cannot be compared with those "
    )
    text.append(f"of {wanted}. To have an error instead: data.fallback=null")
    console.print(Panel(text, title="ANOTHER CORPUS", border_style="bold red", box=box.HEAVY))
    early_warnings.append(f"NOT {wanted}: trained on {given} instead ({reason})")


def figures(found: dict[str, Any], name: str, splits: Sequence[str] = ()) -> Table:
    """Return the table of losses and baselines, one column per split: those with baselines, or `splits`."""
    baselines, splits = not splits, splits or list(found["baselines"])
    unit = UNITS.get(found.get("tokenizer", "char"), "token")
    title = f"loss, nats per {unit}"
    if found.get("min_context", 1) > 1:
        title += f", each after {found['min_context']} or more"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for split in splits:
        share = found[f"{split}/share"]
        table.add_column(split if share == 1 else f"{split} ({100 * share:.2g}% of it)", justify="right")
    for level, title in LEVELS.items() if baselines else ():
        table.add_row(title, *(f"{found['baselines'][split][level]:.4f}" for split in splits), style="dim")
    table.add_row(name, *(plus_minus(found, split, "loss", 4) for split in splits), style="bold")
    if baselines:
        above = [found[f"{split}/loss"] - found["baselines"][split]["bigram"] for split in splits]
        table.add_row("  against the counted bigram", *(f"{d:+.4f}" for d in above))
    table.add_section()
    table.add_row("bits per character", *(plus_minus(found, split, "bits_per_char", 4) for split in splits))
    if unit != "character" or any(found[f"{split}/bytes"] != found[f"{split}/characters"] for split in splits):
        table.add_row("bits per byte", *(plus_minus(found, split, "bits_per_byte", 4) for split in splits))
    table.add_row("perplexity", *(plus_minus(found, split, "perplexity", 3) for split in splits))
    return table


def positions(found: dict[str, Any]) -> Table:
    """Return the table of losses by position in the window, with the number of targets at each."""
    unit = UNITS.get(found["tokenizer"], "token")
    table = Table(f"{unit} of the window", box=box.SIMPLE_HEAD)
    for split in found["by_position"]:
        table.add_column(f"{split}, nats per {unit}", justify="right")
        table.add_column("targets", justify="right")
    rows: dict[str, list[str]] = {}
    for number, ranges in enumerate(found["by_position"].values()):
        for one in ranges:
            first, last = one["from"], one["to"]
            row = rows.setdefault(str(first) if first == last else f"{first} to {last}", ["", ""] * number)
            row += [f"{one['nats']:.4f}", f"{one['n']:,}"]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def published(found: dict[str, Any], name: str) -> Table:
    """Return the table of published results on the same corpus, the model's own among them."""
    own = [
        (found[f"{split}/bits_per_byte"], name, split if found[f"{split}/share"] == 1 else f"part of {split}")
        for split in found["baselines"]
        if split != "train"
    ]
    others = [(one["bits_per_byte"], one["name"], one["split"]) for one in found["published"]]
    table = Table("known results", box=box.SIMPLE_HEAD)
    table.add_column("text")
    table.add_column("bits per byte", justify="right")
    for row in sorted([*own, *others]):
        figure, title, split = row
        table.add_row(title, split, f"{figure:.4f}", style="bold" if row in own else None)
    return table


def checkpoint(found: dict[str, Any]) -> RenderableType:
    """Return the summary of a checkpoint and the table of its tensors."""
    settings = {k: v for k, v in found["model"].items() if not k.startswith("_")}
    lines = {
        "file": f"{quote(Path(found['checkpoint']))}, {found['bytes']:,} bytes",
        "hash": f"{found['sha256']}, which its content has" if found["sha256"] else "none, as Lightning wrote it",
        "step": f"{found['step']:,}",
        "model": ", ".join([name_of(found["model"]), *(f"{k}={v}" for k, v in settings.items())]),
        "parameters": f"{found['parameters']:,}",
        "optimizer": "its state is there" if found["optimizer_state"] else "its state is not there",
        "corpus": f"{found['corpus']['name']}, sha256 {found['corpus']['sha256']}" if found["corpus"] else "not known",
    }
    lines |= {"exported to": quote(Path(found["exported"]))} if "exported" in found else {}
    grid = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        grid.add_row(Text(name, style="bold cyan"), Text(value, overflow="fold"))
    tensors = Table("tensor", "shape", "dtype", box=box.SIMPLE_HEAD)
    for name, tensor in found["tensors"].items():
        tensors.add_row(Text(name), " x ".join(map(str, tensor["shape"])), tensor["dtype"])
    return Group(grid, tensors)


MOST_SYMBOLS = 60  # number of characters that are listed


def corpus(found: dict[str, Any]) -> RenderableType:
    """Return the description of a text: `charlm.data.describe`."""
    splits = ", ".join(f"{name} {n:,}" for name, n in found["splits"].items())
    entropy, alphabet, folds = found["entropy"], found["alphabet"], found["folds"]
    named = ", ".join(f"{number} {name}" for number, name in enumerate(folds[:MOST_SYMBOLS], 1))
    more = f" and {len(folds) - MOST_SYMBOLS:,} more" if len(folds) > MOST_SYMBOLS else ""
    lines = {
        "text": f"{found['name']}: {found['characters']:,} characters, {memory.size(found['bytes'])}, "
        f"{found['documents']:,} document{'s' * (found['documents'] != 1)}",
        "sha256": found["sha256"],
        "splits": f"{splits} characters",
        **({"data.fold": named + more} if folds else {}),
        "alphabet": f"{found['symbols']:,} symbols",
        "entropy": f"{entropy['uniform']:.4f} bits per character if all were equally frequent, "
        f"{entropy['unigram']:.4f} by their frequencies, {entropy['bigram']:.4f} after the character before",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        grid.add_row(Text(name, style="bold cyan"), Text(value, overflow="fold"))
    shown = [f"{symbol(entry['character'])} {entry['count']:,}" for entry in alphabet[:MOST_SYMBOLS]]
    rest = len(alphabet) - len(shown)
    symbols = Columns([Text(cell) for cell in shown], padding=(0, 2), equal=True)
    parts: list[RenderableType] = [grid, Text(), Text("characters, most frequent first", style="bold"), symbols]
    parts += [Text(f"and {rest:,} more")] if rest else []
    odd = [entry for entry in alphabet if entry["unusual"]]
    parts += [Text("unusual characters", style="bold")] if odd else []
    parts += [Text(f"  {entry['unusual']}: {entry['count']:,}") for entry in odd[:MOST_SYMBOLS]]
    if "compressed" in found:
        table = Table("val, in bits per byte", box=box.SIMPLE_HEAD)
        for title in ("compressed alone (cold start)", "given train"):
            table.add_column(title, justify="right")
        for one in found["compressed"]:
            table.add_row(one["compressor"], f"{one['cold_start']:.4f}", f"{one['given_train']:.4f}")
        parts += [table]
    parts += [Text(), Text("what a model of characters learns: context -> target", style="bold")]
    parts += [Text(f"  {context!r} -> {target!r}") for context, target in found["sample"]]
    return Group(*parts)


def symbol(character: str) -> str:
    """Return a character as it is, or spelled out where it would not show."""
    return character if character.isprintable() and not character.isspace() else repr(character)


def cache(kept: "list[Kept]") -> RenderableType:
    """Return the list of what is kept of large texts."""
    if not kept:
        return Text("Nothing is kept in the cache.")
    table = Table("text", "tokenizer", "size", "folder", box=box.SIMPLE_HEAD)
    for one in kept:
        cells = one.source or one.corpus, one.tokenizer, memory.size(one.size), str(one.folder)
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
    return Group(
        table, Text(f"{memory.size(sum(one.size for one in kept))} in all; remove it with charlm data --prune")
    )


def comparison(found: dict[str, Any]) -> RenderableType:
    """Return the comparison of a run and its repetition."""
    if found["equal"]:
        verdict = f"Bitwise equal: the losses of all {found['steps']:,} steps, the weights and the optimizer states."
    elif found["first_step"]:
        then, now = found["losses"]
        verdict = f"Not the same. Losses differ from step {found['first_step']:,} on: {then:.9g} then, {now:.9g} now."
    else:
        verdict = f"Not the same, though the losses of all {found['steps']:,} steps are. What differs:"
    lines: list[RenderableType] = [Text(verdict, style="bold")]
    if not found["equal"] and not found["first_step"]:
        names = found["differs"]
        lines += [Text(f"  {name}") for name in names[:10]]
        lines += [Text(f"  and {len(names) - 10} more")] if len(names) > 10 else []
    if found["clock"] and not found["equal"]:
        same = f"It ended by the clock: the same {found['steps']:,} steps, but the" if found["timed"] else "Its"
        lines.append(Text(f"{same} learning rate followed the clock, which no repetition can."))
    if found["environment"]:
        table = Table("environment", "then", "now", box=box.SIMPLE_HEAD)
        for name, (before, after) in found["environment"].items():
            table.add_row(*(Text(str(cell), overflow="fold") for cell in (name, before, after)))
        lines.append(table)
    elif not found["equal"]:
        lines.append(Text("The environment is the same: versions, device, threads, corpus, commit."))
    return Group(*lines)


def summary(results: dict[str, Any], sample: str, meaning: Sequence[str] = ()) -> None:
    """Print the final figures, the baselines, what they mean, and a sample."""
    title = f"{results['model']} after {results['steps']:,} steps" if results["steps"] else results["model"]
    say(figures(results, title))
    speed = f"{results['train/tokens_per_second']:,.0f} tokens/s"
    if results["steps"]:
        say(f"trained on {results['train/tokens']:,} tokens in {results['train/seconds']:.1f} s, {speed}\n")
    for line in meaning:
        say(Text(line))
    if meaning:
        say(Text())
    if sample:
        say(Panel(Text(sample), title="a sample", title_align="left", box=box.ROUNDED))


def stopped(why: str, step: int, run_dir: Path | None) -> None:
    """Print why a run stopped and, on a line of its own, the command that resumes it."""
    warn(f"{why} after step {step:,}; {'go on with:' if run_dir else 'without checkpoints, nothing is left'}")
    if run_dir:
        print(f"  {COMMAND} resume={quote(run_dir)}", file=sys.stderr)


def next_commands(run_dir: Path, packages: Sequence[str] = ()) -> None:
    """Print the commands to type next.

    Args:
        packages: whose parts they must trust.
    """
    from charlm.checkpoint import BEST

    charlm, trust = command("charlm", "charlm"), "".join(f" --trust {shlex.quote(name)}" for name in packages)
    commands = {f"{charlm} board {quote(run_dir.parent)}": "the dashboard of all runs there"}
    checkpoints = run_dir / "checkpoints"
    if (checkpoints / BEST).is_file():
        commands = {
            f"{charlm} evaluate {quote(checkpoints / BEST)}{trust}": "the best of those that were validated"
        } | commands
    if checkpoints.is_dir():
        commands = {
            f"{charlm} generate {quote(run_dir)}{trust} --length 500": "more text",
            f"{charlm} evaluate {quote(run_dir)}{trust}": "these figures again",
        } | commands
    type_next(commands)


def type_next(commands: dict[str, str]) -> None:
    """Print commands with their purposes."""
    console.print("\nWhat to type next:")
    for line, purpose in commands.items():
        # Not wrapped, so that it can be pasted.
        console.print(Text.assemble("  ", (line, "green"), (f"   # {purpose}", "dim")), soft_wrap=True)


def command(script: str, module: str) -> str:
    """Return the command for a script of this environment, even if the environment is not activated."""
    return script if shutil.which(script) else f"{sys.executable} -m {module}"


def going_on(sweep_dir: Path, done: int, left: int) -> None:
    """Print how many jobs of a continued sweep are left."""
    console.print(f"{quote(sweep_dir)} has {done} of these jobs done: {left} to go", soft_wrap=True)


def handed_over(jobs: int, name: str) -> None:
    """Print that the jobs wait in Slurm's queue."""
    console.print(f"{jobs} job{'s' * (jobs > 1)} in Slurm's queue: squeue --name={name}", soft_wrap=True)


class SweepAtWork:
    """Prints a line for each job that ends and, on a terminal, a table of the running jobs."""

    def __init__(self, total: int, live: Live):
        self.total, self.live = total, live
        self.number = 0

    def ended(self, name: str, row: dict[str, Any]) -> None:
        self.number += 1
        loss = row["val/loss"]
        verdict = f"val loss {loss:.4f}" if row["status"] == "finished" and loss is not None else row["status"]
        console.print(Text(f"[{self.number}/{self.total}] {name}  {verdict}"), soft_wrap=True)

    def look(self, jobs: Sequence[tuple[str, Path, int, float]]) -> None:
        """Update the table of running jobs: name, folder, number of steps, start by time.monotonic()."""
        if not console.is_terminal:
            return
        table = Table("at work", box=box.SIMPLE_HEAD)
        for column in ("step", "loss", "time left"):
            table.add_column(column, justify="right", min_width=8)
        for name, folder, max_steps, since in jobs:
            step, loss = glance(folder)
            left = (time.monotonic() - since) * (max_steps / step - 1) if step and max_steps > 0 else None
            table.add_row(
                Text(name, overflow="fold"),
                format_steps(step, max_steps),
                "" if loss is None else f"{loss:.4f}",
                "" if left is None else f"{left:,.0f} s",
            )
        waiting = self.total - self.number - len(jobs)
        self.live.update(
            Group(table, Text(f"{self.number} ended, {len(jobs)} at work, {waiting} waiting")), refresh=True
        )


@contextmanager
def sweep_at_work(total: int) -> Iterator[SweepAtWork]:
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield SweepAtWork(total, live)


def glance(run_dir: Path) -> tuple[int, float | None]:
    """Return the newest step of a run and its loss, the mean over the last hundred steps."""
    try:
        with open_regular(run_dir / LOSSES) as file:
            size = file.seek(0, os.SEEK_END) // 4
            file.seek(max(0, 4 * (size - 100)))
            newest = np.frombuffer(file.read(400), "<f4")
    except (InputError, OSError):
        return 0, None
    return size, float(newest.mean()) if len(newest) else None


def format_steps(step: int, total: int) -> str:
    """Format a step and the total, if known, in constant width."""
    return f"{step:{len(f'{total:,}')},}/{total:,}" if total > 0 else f"{step:,}"


def sweep_summary(sweep_dir: Path, rows: list[dict[str, Any]], swept: list[str], best: Sequence[str]) -> None:
    """Print the table of a sweep: failures first, then by val loss, and the command that trains the best again."""
    console.print()
    contexts = {row["min_context"] for row in rows if row.get("min_context")}
    after = f" after {contexts.pop()} or more" if len(contexts) == 1 and max(contexts) > 1 else ""
    title = f"{len(rows)} run{'s' * (len(rows) > 1)}, by val loss (nats per character{after}, ± standard error)"
    console.print(runs_table(rows, swept, title, console))
    for row in rows:
        what, _, why = row["status"].partition(" ")
        if why:
            label = ", ".join(f"{name.rpartition('.')[2]}={short(row[name])}" for name in swept)
            console.print(Text(f"{what} {label}: {why}" if what.endswith(":") else f"{what}: {label}, {why}"))
    console.print(f"All figures: {quote(sweep_dir / 'results.csv')}", soft_wrap=True)
    if best:
        console.print(Text(f"The best again: {COMMAND} {shlex.join(best)}"), soft_wrap=True)
    charlm = command("charlm", "charlm")
    type_next(
        {
            f"{charlm} report {quote(sweep_dir)}": "what each setting did, over seeds, with plots",
            f"{charlm} board {quote(sweep_dir)}": "the dashboard of all runs there",
        }
    )


def quote(path: Path) -> str:
    """Format a path as one types it: relative if that is shorter, quoted if the shell needs it."""
    relative = os.path.relpath(path, started_in)
    return shlex.quote(relative if len(relative) < len(str(path)) else str(path))
