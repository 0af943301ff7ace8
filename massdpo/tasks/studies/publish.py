"""How a study is published: means with intervals, panels, and the files `<study>.csv`, `.md`, `.png` and `.svg`."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from massdpo.console import markdown_table
from massdpo.report.figures import STYLE, save_pictures
from massdpo.report.methods import COLOURS, MARKERS
from massdpo.store import write_text


def with_interval(frame: pd.DataFrame, axes: Sequence[str], values: Iterable[str]) -> pd.DataFrame:
    """Mean of each value, and beside it the half-width of its 95% t interval, over the rows that share `axes`."""
    groups = frame.groupby(list(axes), sort=False)
    count = groups.size()
    quantile = pd.Series(stats.t.ppf(0.975, count - 1), index=count.index)
    table = pd.DataFrame(index=count.index)
    for value in values:
        table[value] = groups[value].mean()
        table[f"{value} ±"] = quantile * groups[value].std() / count**0.5
    return table.reset_index()


def panels(count: int, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, row by row."""
    rows = -(-count // columns)
    size = (min(4.4 * columns, 10.5), 3.1 * rows)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for empty in grid.flat[count:]:
        empty.set_visible(False)
    return figure, list(grid.flat[:count])


def legend_below(figure: Figure, panel: Axes, *more: Line2D) -> None:
    """What the lines of a panel, and more, stand for."""
    handles = [*panel.get_legend_handles_labels()[0], *more]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)


def style(place: int) -> dict[str, Any]:
    """Colour and marker of the line number `place` of a panel."""
    return {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4}


def publish(out: Path, name: str, rows: pd.DataFrame, table: pd.DataFrame, figure: Figure, note: str) -> None:
    """Write `rows` (.csv), `table` (.md, below `note`; a column `x ±` joins its `x`) and the figure (.png, .svg)."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.csv", rows.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    head = [column for column in table.columns if not column.endswith(" ±")]
    cells = [[_cell(row[column], row.get(f"{column} ±")) for column in head] for row in table.to_dict("records")]
    write_text(out / f"{name}.md", f"# {name}\n\n{note}\n\n{markdown_table(head, cells)}\n")
    save_pictures(figure, out / name)


def _cell(value: object, width: float | None) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if width is None or math.isnan(width) else f"{value:.3f} ± {width:.3f}"
