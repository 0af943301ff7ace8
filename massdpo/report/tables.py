"""A summary as tables, of means and of paired differences from `random`: in Markdown, HTML and CSV."""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pandas as pd

from massdpo.console import markdown_table
from massdpo.evaluation.metrics import described
from massdpo.report.methods import UNTRAINED
from massdpo.report.per_prompt import NOT_PER_PROMPT
from massdpo.report.summary import Summary
from massdpo.report.views import metric_name, shown

MISSING = "missing"
NAMED = 5  # runs without results that a table names
QUIET = ("baseline", "start", "no baseline")  # where no test is expected


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False
    tie: bool = False
    p: float | None = None

    @property
    def plain(self) -> str:
        """With its p value, if it has one, and a star if that is below 0.05."""
        if self.p is None:
            return self.text
        return f"{self.text} {'p < 0.001' if self.p < 0.001 else f'p = {self.p:.3f}'}{'*' if self.starred else ''}"

    @property
    def starred(self) -> bool:
        return self.p is not None and self.p < 0.05

    def __str__(self) -> str:
        return f"{self.plain} (best)" if self.best else f"{self.plain} ~" if self.tie else self.plain


@dataclass
class ReportTable:
    """Lines of cells under a head. The first `names` columns say what a line is, and the first `block_names` of these
    which block it is in."""

    title: str
    notes: list[str]
    head: list[str]
    lines: list[list[Cell]]
    block_names: int
    names: int

    @property
    def blocks(self) -> list[list[list[Cell]]]:
        """The lines, block by block."""
        return [list(block) for _, block in groupby(self.lines, lambda line: line[: self.block_names])]


def means_table(summary: Summary, title: str) -> ReportTable:
    notes = [
        "Mean over seeds ± half-width of its 95% t interval; bold: best of its block; ~: not distinguishable from the "
        "best (the 95% interval of the difference over shared seeds contains 0).",
    ]
    if summary.absent:
        notes.append(f"No run has: {', '.join(map(metric_name, summary.absent))}.")
    if len(summary.unfinished):
        counts = summary.unfinished["status"].value_counts().sort_index()
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        names, more = ", ".join(summary.unfinished["name"][:NAMED]), len(summary.unfinished) - NAMED
        notes.append(f"Runs without results: {told} ({names}{f' and {more} more' if more > 0 else ''}).")
    if summary.odd:
        notes.append(
            f"NaN or infinity in {len(summary.odd)} runs, which are never best: {', '.join(summary.odd[:NAMED])}."
        )
    arrows = {metric: "↓" if described(metric).better < 0 else "" for metric in summary.metrics}
    head = [f"{metric_name(metric)} {arrows[metric]}".strip() for metric in summary.metrics]
    table = _table(summary, title, notes, head, _mean_cell)
    table.head.append("seeds")
    first = summary.cells[summary.cells["metric"] == summary.metrics[0]]
    for line, n, of in zip(table.lines, first["n"], first["of"], strict=True):
        line.append(Cell(f"{n}" if n == of else f"{n} of {of}"))
    return table


def differences_table(summary: Summary, title: str, baseline: str = "random negatives") -> ReportTable:
    count = int(summary.cells["p_holm"].notna().sum())
    notes = [
        f"Mean paired difference from {baseline} on the same seeds and test prompts [95% interval], p adjusted by "
        f"Holm ({count} tests); seeds and prompts are crossed random effects. *: p below 0.05.",
    ]
    if (summary.cells["pairs"] == 1).any():
        notes.append("One seed: the interval is over prompts alone, and says nothing about other seeds.")
    of_runs = set(summary.cells.loc[summary.cells["note"] == NOT_PER_PROMPT, "metric"])
    tested = [metric for metric in summary.metrics if metric not in of_runs]
    untested = [metric for metric in summary.metrics if metric in of_runs]
    if untested:
        notes.append(f"Not recorded per prompt, so not tested: {', '.join(map(metric_name, untested))}.")
    head = [f"Δ {metric_name(metric)}" for metric in tested]
    table = _table(replace(summary, metrics=tested), title, notes, head, _difference_cell)
    # The baseline has no difference from itself, and a guess without a model none from a policy.
    table.lines = [line for line in table.lines if any(cell.text != "–" for cell in line[table.names :])]
    return table


def _table(
    summary: Summary, title: str, notes: list[str], head: list[str], render: Callable[[Any], Cell]
) -> ReportTable:
    keys = [*summary.block, "label", *(axis for axis in summary.axes if axis not in summary.block)]
    by_metric = [summary.cells[summary.cells["metric"] == metric] for metric in summary.metrics]
    names = by_metric[0][keys]
    if "k" in names:  # `full` trains on the whole pool, whatever k its command says
        names = names.assign(k=names["k"].mask(names["label"] == "full", "all"))
    columns = [[render(cell) for cell in cells.itertuples(index=False)] for cells in by_metric]
    lines = [
        [*(Cell(shown(value) or "–") for value in name), *values]
        for name, *values in zip(names.itertuples(index=False), *columns, strict=True)
    ]
    head = ["method" if key == "label" else key.removeprefix("option/") for key in keys] + head
    return ReportTable(title, notes, head, lines, len(summary.block), len(keys))


def number(value: float, scale: float | None = None) -> str:
    """Three decimals, fewer for large numbers (`scale` decides if a value accompanies another one)."""
    if math.isnan(value):
        return "NaN"
    size = abs(value if scale is None else scale)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"


def _mean_cell(cell: Any) -> Cell:
    if cell.n == 0:
        return Cell(MISSING)
    if cell.label in UNTRAINED and math.isnan(cell.mean):
        return Cell("–")  # what does not apply, such as training time
    text = number(cell.mean)
    if not math.isnan(cell.half):
        text += f" ± {number(cell.half, cell.mean)}"
    return Cell(text, bool(cell.best), bool(cell.tie))


def _difference_cell(cell: Any) -> Cell:
    if cell.n == 0:
        return Cell(MISSING)
    if cell.note:
        return Cell("–" if cell.note in QUIET else cell.note)
    scale = max(abs(cell.low), abs(cell.high))
    values = (cell.difference, cell.low, cell.high)
    mean, low, high = (f"{'+' if value >= 0 else ''}{number(value, scale)}" for value in values)
    seeds = "" if cell.pairs == cell.of else f" ({cell.pairs} of {cell.of} seeds)"
    return Cell(f"{mean} [{low}, {high}]{seeds}", p=cell.p_holm)


def to_markdown(table: ReportTable) -> str:
    def show(cell: Cell) -> str:
        text = escape_markdown(cell.plain)
        return f"**{text}**" if cell.best else f"{text} ~" if cell.tie else text

    lines = [[show(cell) for cell in line] for line in table.lines]
    body = markdown_table([escape_markdown(name) for name in table.head], lines)
    return "\n\n".join([f"## {escape_markdown(table.title)}", body, *map(escape_markdown, table.notes), ""])


MARKDOWN = str.maketrans({char: f"\\{char}" for char in "\\`*_[]<>|~"} | {"\n": " "})


def escape_markdown(text: str) -> str:
    return text.translate(MARKDOWN)


def to_html(table: ReportTable) -> str:
    def show(cell: Cell) -> str:
        text = html.escape(cell.plain)
        kind = ' class="missing"' if cell.text == MISSING else ""
        return f"<td{kind}><b>{text}</b></td>" if cell.best else f"<td{kind}>{text}{' ~' if cell.tie else ''}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    lines = ""
    for number, block in enumerate(table.blocks):
        for place, line in enumerate(block):
            kind = " class=block" if number and not place else ""
            lines += f"<tr{kind}>{''.join(map(show, line))}</tr>\n"
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    return (
        f"<h3>{html.escape(table.title)}</h3><div class=scroll><table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{lines}</tbody></table></div>{notes}\n"
    )


def to_csv(summary: Summary) -> str:
    """Every number behind the tables, one line per cell, with six significant digits (the rows have all digits)."""
    frame: pd.DataFrame = summary.cells.rename(columns=lambda name: str(name).removeprefix("option/"))
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")
