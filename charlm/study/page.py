"""A study as one self-contained HTML file: notes, tables, plots. All text is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from charlm import __version__
from charlm.errors import printable
from charlm.meaning import NOTHING
from charlm.run.table import COLUMNS, LOSS
from charlm.study import text as texts
from charlm.study.law import LEVEL
from charlm.study.plots import Panel, curves_panels, maps_panels, scaling_panels, settings_panels
from charlm.study.runs import LONGEST, Run
from charlm.study.scaling import Scaling
from charlm.study.study import Row, Study

TEXTUAL = dict.fromkeys(("state", "run", "why", "what", "against the best", "parameter"), "text")  # aligned left
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 1160px; margin: 2em auto;
  padding: 0 1.2em; overflow-wrap: anywhere }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.15em; margin-top: 2em }
small, .pale { color: #666; font-size: 13px }
ul.notes { padding-left: 1.2em } .loud { color: #a00018; font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .22em .8em; text-align: right; white-space: nowrap } td.text, th.text { text-align: left }
td.reason { white-space: normal; text-align: left } thead th { border-bottom: 1.5px solid #1b1b1b; cursor: pointer }
tbody tr:hover { background: #f3f6fa } tr.best { font-weight: 600 } tr.within { background: #eef6ee }
.figures { display: flex; flex-wrap: wrap; gap: 1.2em } figure { margin: 0; max-width: 100% }
figure svg { max-width: 100%; height: auto }
figcaption { color: #666; font-size: 13px; width: 0; min-width: 100% } figcaption b { color: #1b1b1b }
figure svg { background: #fff; border-radius: 4px }
@media (prefers-color-scheme: dark) {
  body { color: #e4e4e4; background: #161718 }
  small, .pale, figcaption { color: #a5a5a5 } figcaption b { color: #e4e4e4 }
  .loud { color: #ff8a8a } thead th { border-color: #e4e4e4 } tbody tr:hover { background: #26292d }
  tr.within { background: #1c2b1f }
}
@media print { body { max-width: none } thead th { cursor: auto } figure, tr { break-inside: avoid } }
"""
# A click on the head of a column sorts by it, a second one the other way.
SCRIPT = """
document.querySelectorAll('th').forEach(head => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], up = head.dataset.up = head.dataset.up === '1' ? '0' : '1'
  const key = row => { const cell = row.cells[head.cellIndex]; return cell.dataset.key ?? cell.textContent }
  const compare = (a, b) => isNaN(a) || isNaN(b) || a === '' || b === '' ? String(a).localeCompare(b) : a - b
  const rows = [...body.rows].sort((a, b) => compare(key(a), key(b)) * (up === '1' ? 1 : -1))
  body.append(...rows)
}))
"""


def page(
    study: Study,
    title: str,
    columns: Sequence[str] | None = None,
    others: Mapping[str, float] = NOTHING,
    scaling: Scaling | None = None,
) -> str:
    """The whole file, with a section on the scaling law if there is one; see `charlm.study.text.text`."""
    names = study.swept if columns is None else columns
    title = escape(printable(title, LONGEST))
    text = "".join(f"<li{' class=loud' if note.loud else ''}>{escape(note.text)}</li>" for note in study.notes)
    parts = [
        f"<h1>{title}</h1>",
        f"<p class=pale>{escape(counts(study))}</p>",
        f"<ul class=notes>{text}</ul>" if text else "",
        section("Without a final figure", unfinished(study, study.failed)) if study.failed else "",
        scaling_section(scaling) if scaling else "",
        section("Runs", table(study, names)) if study.rows else "",
        section(study.same_text, references(study, others)) if study.references else "",
        "".join(f"<p>{escape(line)}</p>" for line in study.meaning),
        pictures("One setting at a time", settings_panels(study)),
        pictures("Two at a time", maps_panels(study)),
        pictures("Curves", curves_panels(study)),
        section("Not finished", unfinished(study, study.others)) if study.others else "",
        f"<p><small>Made by charlm {escape(__version__)} report.</small></p>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + f"\n<script>{SCRIPT}</script>\n"
        "</body></html>\n"
    )


def counts(study: Study) -> str:
    """Count the runs and the combinations of settings."""
    runs, rows = len(study.runs), len(study.rows)
    text = f"{runs} run{'s' * (runs != 1)}"
    if study.swept:
        text += f", {rows} combination{'s' * (rows != 1)} of {', '.join(study.labels.values())}"
    return text


def section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n<div class=wide>{content}</div>"


def pictures(title: str, panels: Sequence[Panel]) -> str:
    drawn = [
        f"<figure>{panel.svg()}<figcaption><b>{escape(panel.title)}.</b> {escape(panel.caption)}</figcaption></figure>"
        for panel in panels
    ]
    head = f"<h2>{title}</h2>\n" if title else ""
    return f"{head}<div class=figures>{''.join(drawn)}</div>" if drawn else ""


def references(study: Study, others: Mapping[str, float]) -> str:
    """Return the table of what reaches which loss without training, with the best row among it."""
    best = "the best row"
    lines = [*({**study.references, **others}).items(), (best, study.rows[0].loss)]
    return html_table(
        ["what", "val loss"],
        [
            f'<tr class="{"best" if name == best else ""}">{cell(name, kind="text")}{cell(f"{loss:.4f}")}</tr>'
            for name, loss in sorted(lines, key=lambda line: line[1])
        ],
    )


def table(study: Study, names: Sequence[str]) -> str:
    rest = [column.head for column in COLUMNS if column != LOSS]
    # The loss comes first, so that it is seen on a phone.
    heads = [LOSS.head, *(study.labels[name] for name in names), *(["folds"] if study.folds else []), "seeds", *rest]
    text = f"Losses are in nats per character. {study.legend} "
    return html_table([*heads, "against the best"], [line(study, row, names) for row in study.rows]) + (
        f"</div><p class=pale>{escape(text + study.criterion)}</p><div>"
    )


def line(study: Study, row: Row, names: Sequence[str]) -> str:
    verdict = study.verdict(row)
    cells = [
        cell(study.formatted[name][row.settings[name]], row.settings[name]) if name in row.settings else cell("-")
        for name in names
    ]
    cells += [cell(str(len(row.folds) or "-"))] if study.folds else []
    cells.append(cell(str(row.seeds)))
    figures = {}
    for figure, head, digits in COLUMNS:
        mean, spread, mark = row.mean(figure), row.error(figure), "±*" if len(row.runs) == 1 else "±"
        text = "-" if mean is None else number(mean, digits)
        text += f" {mark} {number(spread, digits)}" if spread else ""
        figures[head] = cell(text, mean)
    cells = [figures.pop(LOSS.head), *cells, *figures.values()]
    kind = {"best": "best", "within noise": "within"}.get(verdict, "")
    one = study.compared.get(id(row))
    if one and verdict == one.verdict:
        verdict += f", {one.difference:+.4f} ± {one.se:.4f} (p = {one.p:.2g})"
    return f'<tr class="{kind}">{"".join(cells)}{cell(verdict, kind="text")}</tr>'


def scaling_section(scaling: Scaling) -> str:
    """The law, its pictures, what it predicts, and the cells that it was fitted to."""
    rows = [
        f"<tr>{''.join(map(cell, texts.cell_texts(scaling, each)))}</tr>"
        for each in [*scaling.cells, *scaling.held_out]
    ]
    law = [
        f"<tr>{cell(name, kind='text')}{cell(f'{i.value:.4g}')}{cell(f'{i.low:.4g} to {i.high:.4g}')}</tr>"
        for name, i in scaling.intervals.items()
    ]
    lines = [texts.formula(scaling), *texts.predictions(scaling)]
    return (
        "".join(f"<p>{escape(line)}</p>" for line in lines).join(("<h2>Scaling law</h2>\n", "\n"))
        + pictures("", scaling_panels(scaling))
        + f"<div class=wide>{html_table(['parameter', 'estimate', f'{LEVEL:.0%} interval'], law)}</div>\n"
        + f"<div class=wide>{html_table(texts.HEADS, rows)}</div>"
    )


def number(value: float, digits: int) -> str:
    """Format with `digits` decimals; large numbers get three significant digits."""
    return f"{value:,.{digits}f}" if digits == 0 or value < 1e5 else f"{value:.3g}"


def cell(text: str, key: object = None, kind: str = "") -> str:
    """Return a table cell, with the key to sort it by if that is not its text."""
    by = "" if key is None else f' data-key="{escape(str(key))}"'
    return f'<td class="{kind}"{by}>{escape(text)}</td>'


def unfinished(study: Study, runs: Sequence[Run]) -> str:
    lines = [
        "".join(
            [
                f"<tr>{cell(run.state, kind='text')}{cell(study.near(run), kind='text')}",
                cell("" if run.last is None else f"{run.last:.4f}"),
                f"{cell(run.reason or '', kind='reason')}</tr>",
            ]
        )
        for run in runs
    ]
    return html_table(["state", "run", "last val loss", "why"], lines)


def html_table(heads: Iterable[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th scope="col" class="{TEXTUAL.get(head, "")}">{escape(head)}</th>' for head in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
