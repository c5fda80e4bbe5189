"""The pictures of a study: val loss against each swept setting, pairs as heat maps, curves, and a scaling law."""

import io
import itertools
import logging
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from charlm.errors import InputError
from charlm.study.law import LEVEL
from charlm.study.runs import Run, Value, is_number
from charlm.study.scaling import Cell, Scaling
from charlm.study.study import Row, Study

# Okabe and Ito 2008: colours that colour-blind people can distinguish. Their yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FRAME, ALARM, GREY = "#D55E00", "#B00020", "#555555"
LOSS = "val loss, nats per character"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # no TeX in names of folders
    "svg.fonttype": "none",  # text that can be searched
    "svg.hashsalt": "charlm",  # the same study, the same bytes
}
THICKEST, THINNEST = 3.2, 1.3  # of lines, in points
MOST_LINES = 7  # lines per panel: one per colour
MOST_CELLS = 12  # cells of a heat map per axis; a setting with more values was searched, not swept
MOST_MAPS = 6
MOST_CURVES = 12
LEGEND = 66  # characters in one line of the legend below a panel
WIDE = (5.6, 3.8)  # inches
GEOMETRIC = 8  # values that span such a factor are on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """One plot: title, caption, drawing function and size in inches."""

    title: str
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (3.8, 3.1)

    def svg(self) -> str:
        """Return the plot as an SVG element for an HTML page."""
        file = io.StringIO()
        with style():
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.add_subplot())
            figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        drawn = file.getvalue()
        drawn = re.sub(r' id="[a-zA-Z]\w*?_\d+"', "", drawn[drawn.index("<svg") :])  # other figures share these
        return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(self.title)}"', 1)


@contextmanager
def style() -> Iterator[None]:
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a browser's font may differ
        yield


def settings_panels(study: Study) -> list[Panel]:
    """Plot val loss against each setting, the most influential first."""
    found = []
    for name in study.varied:
        caption, alike = lines_of(study, name)
        draw = partial(draw_setting, study=study, name=name, alike=alike)
        found.append(Panel(f"Val loss against {study.labels[name]}", caption, draw))
    return found


def lines_of(study: Study, name: str) -> tuple[str, list[str] | None]:
    """Return the settings that the points of one line have in common, and a description of such a line. Those are all
    but `name` or, with too many lines, the most influential one. None if each row has a different value.
    """
    every, others = "Every run as a point", [other for other in study.varied if other != name]
    if len(study.values(name)) > MOST_CELLS:
        return f"{every}.", None
    joined = "lines join" if all(map(is_number, study.values(name))) else "large dots are"
    if len({study.label(row, others) for row in study.rows if name in row.settings}) <= MOST_LINES:
        return f"{every}; {joined} means over {study.over}, bars their {study.bars}.", others
    few = [other for other in others if len(study.values(other)) <= MOST_LINES][:1]
    rest = ", ".join(study.labels[other] for other in others if other not in few)
    return f"{every}; {joined} the best over {rest}, bars their {study.bars}.", few


def draw_setting(axes: Axes, study: Study, name: str, alike: list[str] | None) -> None:
    values = study.values(name)
    places = axis_of(axes, study, name)
    rows = in_order(study, [row for row in study.rows if name in row.settings])
    top = ceiling([loss for row in rows for loss in row.values("val/loss")])
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(study.label(row, alike) if alike is not None else "", []).append(row)
    beyond: list[float] = []
    for i, (colour, (label, line)) in enumerate(zip(itertools.cycle(COLOURS), lines.items(), strict=False)):
        points = [(places[row.settings[name]], loss) for row in line for loss in row.values("val/loss")]
        beyond += [x for x, loss in points if loss > top]
        seen = np.array([point for point in points if point[1] <= top]).reshape(-1, 2)
        axes.scatter(seen[:, 0], seen[:, 1], s=12 if alike else 20, color=colour, alpha=0.5, linewidths=0)
        if alike is not None:
            means = [(places[value], best) for value, best in best_of(line, name).items()]
            join(axes, means, top, colour, label, thinner(i, len(lines)))
    if not all(map(is_number, values)):  # words have no order for a line
        for drawn in axes.lines:
            drawn.set_linestyle("none")
    if beyond:
        room = 0.06 * (top - min(row.loss for row in rows))
        axes.scatter(beyond, [top + room] * len(beyond), marker="^", s=24, color=ALARM, zorder=4, label="far above")
    axes.set_ylabel(LOSS)
    if len(lines) > 1 or beyond:
        columns = max(1, LEGEND // (8 + max(map(len, axes.get_legend_handles_labels()[1]))))
        figure_of(axes).legend(loc="outside lower center", ncols=columns, columnspacing=1, handlelength=1.4)


def thinner(i: int, n: int) -> float:
    """Return the width of the i-th of n lines: later ones are thinner, so that none hides another."""
    return THICKEST - (THICKEST - THINNEST) * i / max(1, n - 1) if n > 1 else THINNEST


def join(axes: Axes, points: Sequence[tuple[float, Row]], top: float, colour: str, label: str, width: float) -> None:
    """Draw a line through the losses of rows, with their spread, inside of the picture."""
    spreads = [row.error() or 0.0 if len(row.runs) > 1 else 0.0 for _, row in points]
    inside = sorted((x, row.loss, s) for (x, row), s in zip(points, spreads, strict=True) if row.loss <= top)
    if inside:
        x, loss, spread = zip(*inside, strict=True)
        style: Any = {"color": colour, "label": label, "linewidth": width, "markersize": 3 + width}
        axes.errorbar(x, loss, spread, fmt="o-", capsize=2.5, elinewidth=1, zorder=3, **style)


def in_order(study: Study, rows: Sequence[Row]) -> list[Row]:
    """Sort rows by their settings."""
    orders = {name: {value: i for i, value in enumerate(study.values(name))} for name in study.swept}
    return sorted(rows, key=lambda row: [order.get(row.settings.get(name), -1) for name, order in orders.items()])


def best_of(rows: Sequence[Row], name: str) -> dict[Value, Row]:
    """Return the best row for each value of a setting."""
    return {row.settings[name]: row for row in sorted(rows, key=lambda row: -row.loss)}


def axis_of(axes: Axes, study: Study, name: str, along: str = "x") -> dict[Value, float]:
    """Make an axis for the values of a setting. Returns their positions."""
    axis, values = axes.xaxis if along == "x" else axes.yaxis, study.values(name)
    axis.set_label_text(study.labels[name])
    numbers = [float(value) for value in values if isinstance(value, int | float) and is_number(value)]
    words = len(numbers) < len(values)
    places = dict(zip(values, range(len(values)) if words else numbers, strict=True))
    if words:
        axes.set(**{f"{along}lim": (-0.5, len(values) - 0.5)})
    elif geometric(numbers):
        # With limits, because Matplotlib divides by zero if the first line of a logarithmic axis has one point.
        room = (max(numbers) / min(numbers)) ** 0.05
        axes.set(**{f"{along}scale": "log", f"{along}lim": (min(numbers) / room, max(numbers) * room)})
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        axis.set_minor_formatter(NullFormatter())
    if words or len(values) <= MOST_CELLS:
        labels = [clipped(study.formatted[name][value]) for value in values]
        axis.set_ticks(list(places.values()), labels)
        axis.set_minor_locator(NullLocator())
        if along == "x" and sum(map(len, labels)) > 36:
            axes.tick_params(axis="x", rotation=30)
    return places


def geometric(numbers: Sequence[float]) -> bool:
    """Return whether values span a large factor or are spaced like powers."""
    if min(numbers) <= 0:
        return False
    steps = [after / before for before, after in itertools.pairwise(sorted(numbers))]
    alike = len(steps) > 1 and min(steps) > 1.5 and max(steps) < 1.3 * min(steps)
    return alike or max(numbers) / min(numbers) >= GEOMETRIC


def ceiling(losses: Sequence[float]) -> float:
    """Return the upper end of a plot: a few diverged runs must not flatten the others."""
    best, middle = min(losses), statistics.median(losses)
    far = best + 6 * (middle - best)
    return max(loss for loss in losses if loss <= far) if middle > best else max(losses)


def clipped(text: str, longest: int = 20) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def maps_panels(study: Study) -> list[Panel]:
    """Plot pairs of settings, the most influential first: heat maps or, for searched settings, points."""
    pairs = sorted(itertools.combinations(study.varied, 2), key=lambda pair: sum(map(study.varied.index, pair)))
    found = []
    for pair in pairs:
        across, up = sorted(pair, key=lambda name: -len(study.values(name)))
        columns, lines = study.values(across), study.values(up)
        title = f"{study.labels[across]} and {study.labels[up]}"
        if len(columns) <= MOST_CELLS:
            best = ", the best over the other settings" if len(study.varied) > 2 else ""
            caption = f"Mean val loss over {study.over}{best}. Lower is better; the lowest is framed."
            size = 2.3 + 0.56 * max(len(columns), 3), 1.4 + 0.4 * max(len(lines), 3)
            found.append(Panel(title, caption, partial(draw_map, study=study, across=across, up=up), size))
        elif all(map(is_number, [*columns, *lines])):
            caption = (
                f"Every combination that was tried, its mean over {study.over}. Lower is better; the lowest is ringed."
            )
            found.append(Panel(title, caption, partial(draw_points, study=study, across=across, up=up), (4.6, 3.1)))
    return found[:MOST_MAPS]


def draw_map(axes: Axes, study: Study, across: str, up: str) -> None:
    """Draw a cell for each pair of values, with its loss."""
    columns, lines = study.values(across), study.values(up)
    cells = np.full((len(lines), len(columns)), np.nan)
    for row in reversed(study.rows):  # so that the best is written last
        if across in row.settings and up in row.settings:
            cells[lines.index(row.settings[up]), columns.index(row.settings[across])] = row.loss
    losses = cells[np.isfinite(cells)].tolist()
    if not losses:
        return
    least, top = min(losses), ceiling(losses)
    image = axes.imshow(cells, cmap="viridis_r", origin="lower", aspect="auto", vmin=least, vmax=top)
    digits = digits_of(losses)
    for (line, column), loss in np.ndenumerate(cells):
        if np.isfinite(loss):
            colour = "white" if loss - least > 0.45 * (top - least) > 0 else "black"
            axes.text(column, line, f"{loss:.{digits}f}", ha="center", va="center", fontsize=8, color=colour)
        if loss == least:
            axes.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, fill=False, edgecolor=FRAME, linewidth=2.5))
    axes.set_xticks(range(len(columns)), [clipped(study.formatted[across][value], 12) for value in columns])
    axes.set_yticks(range(len(lines)), [clipped(study.formatted[up][value], 12) for value in lines])
    axes.set(xlabel=study.labels[across], ylabel=study.labels[up])
    axes.grid(visible=False)
    figure_of(axes).colorbar(image, ax=axes, label=LOSS, extend="max" if max(losses) > top else "neither")


def digits_of(losses: Sequence[float]) -> int:
    """Return the number of decimals that distinguishes the values."""
    spread = max(losses) - min(losses)
    return min(4, max(2, 2 - math.floor(math.log10(spread)))) if spread else 3


def draw_points(axes: Axes, study: Study, across: str, up: str) -> None:
    """Draw a point for each combination, for too many values for cells."""
    places = [axis_of(axes, study, name, along) for name, along in ((across, "x"), (up, "y"))]
    rows = [row for row in reversed(study.rows) if across in row.settings and up in row.settings]
    x, y = ([place[row.settings[name]] for row in rows] for place, name in zip(places, (across, up), strict=True))
    losses = [row.loss for row in rows]
    points = axes.scatter(
        x, y, c=losses, cmap="viridis_r", vmax=ceiling(losses), s=30, edgecolors=GREY, linewidths=0.4, zorder=3
    )
    axes.scatter(x[-1:], y[-1:], s=110, facecolors="none", edgecolors=FRAME, linewidths=1.8, zorder=4)
    figure_of(axes).colorbar(points, ax=axes, label=LOSS, extend="max" if max(losses) > ceiling(losses) else "neither")


def figure_of(axes: Axes) -> FigureBase:
    """Return the figure or subfigure of the axes."""
    figure = axes.get_figure(root=False)
    assert figure is not None
    return figure


@dataclass(frozen=True)
class Curve:
    """The val losses of a row during training."""

    label: str
    steps: list[float]
    tokens: list[float]
    seconds: list[float]
    losses: list[float]


def curve_of(study: Study, row: Row) -> Curve | None:
    """Return the mean over runs at steps at which all were validated, and the final figure."""
    known = [{step: (seconds, loss) for step, seconds, loss in points_of(run)} for run in row.runs]
    steps = sorted(set.intersection(*map(set, known)))
    last, tokens = row.mean("steps"), row.mean("train/tokens")
    if len(steps) < 2 or not last or tokens is None:
        return None
    seconds, losses = ([statistics.fmean(curve[step][part] for curve in known) for step in steps] for part in (0, 1))
    label = study.label(row) or f"mean over {study.over}"
    return Curve(label, [*map(float, steps)], [step * tokens / last for step in steps], seconds, losses)


def points_of(run: Run) -> list[tuple[int, float, float]]:
    """Return the validations of a run, and its final loss after its last step."""
    step, seconds = run.figures.get("steps"), run.figures.get("train/seconds")
    if step is None or seconds is None or run.loss is None:
        return run.validations
    return [*(curve for curve in run.validations if curve[0] < step), (int(step), seconds, run.loss)]


def curves_panels(study: Study) -> list[Panel]:
    """Plot val loss against steps and, if they differ, against tokens and seconds."""
    validated = [curve for row in study.rows if (curve := curve_of(study, row))]
    curves = validated[:MOST_CURVES]
    if not curves:
        return []
    kinds = {"steps": "optimizer steps"}
    if unlike([curve.tokens[-1] / curve.steps[-1] for curve in curves], 1.01):
        kinds["tokens"] = "tokens trained on"
    if unlike([curve.seconds[-1] / curve.steps[-1] for curve in curves], 1.2):
        kinds["seconds"] = "seconds of training"
    which = f"The best {len(curves)} of {len(validated)}" if len(validated) > len(curves) else f"All {len(curves)}"
    caption = f"{which} that were validated on their way, means over {study.over}. The last point is the final figure."
    return [
        Panel(
            f"Val loss against {axis}",
            caption,
            partial(draw_curves, study=study, curves=curves, along=along),
            (7.6, 3.6),
        )
        for along, axis in kinds.items()
    ]


def counted_rows(study: Study) -> list[Row]:
    """Return the rows of models that take no steps, best first: n-grams are reference lines."""
    return [row for row in study.rows if row.mean("steps") == 0]


def unlike(ratios: Sequence[float], factor: float) -> bool:
    return max(ratios) > factor * min(ratios)


def draw_curves(axes: Axes, study: Study, curves: Sequence[Curve], along: str) -> None:
    for i, curve in enumerate(curves):
        dashes: Any = "-" if i < len(COLOURS) else (0, (4, 1.5))
        x, colour = getattr(curve, along), COLOURS[i % len(COLOURS)]
        width = thinner(i, len(curves))
        axes.plot(x, curve.losses, linestyle=dashes, linewidth=width, color=colour, label=clipped(curve.label, 48))
        axes.plot(x[-1], curve.losses[-1], "o", color=colour)
    # The first steps are steep, and not of interest.
    least = min(min(curve.losses) for curve in curves)
    most = max(float(np.quantile(curve.losses, 0.6)) for curve in curves)
    counted = {run.figures.get("baselines.val.bigram") for row in study.rows for run in row.runs}
    if len(counted) == 1 and (bigram := counted.pop()) is not None:
        axes.axhline(bigram, color=GREY, linestyle=":", label=f"counted bigram, {bigram:.4f}")
        least, most = min(least, bigram), max(most, bigram)
    for row, dashes in zip(counted_rows(study), ("--", "-.", (0, (1, 1))), strict=False):
        axes.axhline(row.loss, color=GREY, linestyle=dashes, label=f"{clipped(study.label(row), 40)}, {row.loss:.4f}")
        least, most = min(least, row.loss), max(most, row.loss)
    room = 0.06 * (most - least) or 0.1
    axes.set_ylim(least - room, most + 3 * room)
    axes.set_xlabel({"steps": "optimizer steps", "tokens": "tokens", "seconds": "seconds of training"}[along])
    axes.set_ylabel(LOSS)
    figure_of(axes).legend(loc="outside lower center", ncols=1 if len(curves) < 5 else 2)


def scaling_panels(scaling: Scaling) -> list[Panel]:
    """Plot val loss against compute, a line per size, and against the size, a line per budget."""
    many = "Means over seeds, with their standard deviation; lines are the fitted law"
    checked = f"; the star was held out, and its bar is the predicted {LEVEL:.0%} interval" if scaling.held_out else ""
    frontier = "The frontier is the lowest loss that the law gives for each compute."
    return [
        Panel("Val loss against compute", f"{many}{checked}. {frontier}", partial(draw_compute, scaling=scaling), WIDE),
        Panel("Val loss against size", f"{many}{checked}.", partial(draw_sizes, scaling=scaling), WIDE),
    ]


def draw_compute(axes: Axes, scaling: Scaling) -> None:
    """Draw a line for each size, and the frontier."""
    cells = [*scaling.cells, *scaling.held_out]
    budgets = np.geomspace(min(cell.d for cell in cells) / 1.5, max(cell.d for cell in cells) * 1.5, 100)
    for n, line, colour in groups(scaling.cells, "n"):
        compute = budgets * line[0].flops_per_token
        axes.plot(compute, scaling.fit.law.loss(n, budgets)[0], color=colour, linewidth=1)
        points(axes, [cell.compute for cell in line], line, colour, f"N = {n:,.0f}")
    compute = np.geomspace(min(cell.compute for cell in cells) / 2, max(cell.compute for cell in cells) * 4, 60)
    frontier = [float(scaling.fit.law.loss(*scaling.best(each))[0, 0]) for each in compute]
    axes.plot(compute, frontier, color=GREY, linestyle="--", label="frontier", zorder=2.5)
    stars(axes, scaling, [check.compute for check in scaling.checks])
    finish_scaling(axes, scaling, "floating-point operations of training, C")


def draw_sizes(axes: Axes, scaling: Scaling) -> None:
    """Draw a line for each budget."""
    cells = [*scaling.cells, *scaling.held_out]
    sizes = np.geomspace(min(cell.n for cell in cells) / 1.5, max(cell.n for cell in cells) * 1.5, 100)
    for d, line, colour in groups(scaling.cells, "d"):
        axes.plot(sizes, scaling.fit.law.loss(sizes, d)[0], color=colour, linewidth=1)
        points(axes, [cell.n for cell in line], line, colour, f"D = {d:,.0f}")
    for d in sorted({check.d for check in scaling.checks}):
        axes.plot(sizes, scaling.fit.law.loss(sizes, d)[0], color=GREY, linestyle=":", label=f"law at D = {d:,.0f}")
    stars(axes, scaling, [check.n for check in scaling.checks])
    finish_scaling(axes, scaling, "parameters, N")


def groups(cells: Sequence[Cell], name: str) -> Iterator[tuple[float, list[Cell], str]]:
    """Yield the cells of each size, n, or of each budget, d, with a colour."""
    values = sorted({getattr(cell, name) for cell in cells})
    for value, colour in zip(values, itertools.cycle(COLOURS), strict=False):
        yield value, [cell for cell in cells if getattr(cell, name) == value], colour


def points(axes: Axes, x: Sequence[float], cells: Sequence[Cell], colour: str, label: str) -> None:
    spreads = [cell.sd or 0.0 for cell in cells]
    losses = [cell.loss for cell in cells]
    axes.errorbar(x, losses, spreads, fmt="o", color=colour, label=label, capsize=2.5, elinewidth=1, zorder=3)


def stars(axes: Axes, scaling: Scaling, x: Sequence[float]) -> None:
    """Draw the held-out cells, with the intervals that were predicted."""
    for place, check in zip(x, scaling.checks, strict=True):
        low, high = check.loss.value - check.loss.low, check.loss.high - check.loss.value
        axes.errorbar(
            place, check.loss.value, [[low], [high]], fmt="_", color=GREY, capsize=4, elinewidth=1.4, zorder=4
        )
    if scaling.checks:
        losses = [check.measured.loss for check in scaling.checks if check.measured]
        axes.scatter(x, losses, marker="*", s=45, color=ALARM, zorder=5, label="held out")


def finish_scaling(axes: Axes, scaling: Scaling, label: str) -> None:
    losses = [cell.loss for cell in [*scaling.cells, *scaling.held_out]]
    room = 0.08 * (max(losses) - min(losses)) or 0.1
    axes.set(xscale="log", xlabel=label, ylabel=LOSS, ylim=(min(losses) - 1.5 * room, max(losses) + room))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda number, _: f"{number:,.0f}" if number < 1e7 else f"{number:.0e}")
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure_of(axes).legend(loc="outside lower center", ncols=4, columnspacing=1, handlelength=1.4)


def draw_png(study: Study) -> bytes:
    """Draw the most informative panels as one picture.

    Raises:
        InputError: if there is nothing to draw.
    """
    panels = [*settings_panels(study)[:2], *maps_panels(study)[:1], *curves_panels(study)[:1]]
    if not panels:
        raise InputError("--png has nothing to draw: nothing was varied, and no run was validated on its way")
    return png_of(panels)


def png_of(panels: Sequence[Panel]) -> bytes:
    """Draw panels as one picture, two in a line."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(5.6 * columns, 3.8 * lines), layout="constrained", dpi=150)
        for part, panel in zip(figure.subfigures(lines, columns, squeeze=False).flat, panels, strict=False):
            axes = part.add_subplot()
            panel.draw(axes)
            axes.set_title(panel.title)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
