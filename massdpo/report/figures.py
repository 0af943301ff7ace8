"""A summary as figures: PNG and SVG, colours of Okabe and Ito (safe for colour-blind readers), a marker a method."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from massdpo import store
from massdpo.report.rows import DATA
from massdpo.report.summary import UNTRAINED, Summary
from massdpo.report.views import BASELINES, LOWER_IS_BETTER, ZERO_AT_START, View, axis_name, label_rank, shown

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#000000")
MARKERS = "osD^vP<X>*hp"
GREY = "#6b6b6b"
LEVELS = dict(zip(UNTRAINED, (":", "--", "-."), strict=True))  # all grey
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "massdpo",  # the same figure gives the same bytes
    "svg.fonttype": "none",  # text as text: a quarter of the size, and found by a search
    "savefig.dpi": 120,
}


def draw(summary: Summary, view: View, sweep: str, folder: Path, histories: pd.DataFrame | None = None) -> list[Path]:
    """Write a figure a dataset; returns the PNG files (an SVG stands beside each)."""
    written = []
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        for dataset, cells in summary.cells.groupby("dataset", sort=True):
            known = cells[cells["mean"].notna()]
            if known.empty:
                continue
            figures = {"dots": _dots, "lines": _lines, "front": _front, "curves": _dots}
            figure = figures[view.figure](known, summary, view)
            written.append(_save(figure, folder / f"{sweep}_{dataset}", f"{view.title.format(sweep=sweep)}: {dataset}"))
            compared = known.dropna(subset=["difference", "low", "high"])
            if view.differences and len(compared):
                title = f"{view.title.format(sweep=sweep)}, against random: {dataset}"
                differences = _dots(compared, summary, view, differences=True)
                written.append(_save(differences, folder / f"{sweep}_{dataset}_differences", title))
            if view.figure == "curves" and histories is not None:
                curves = _curves(histories[histories["dataset"] == dataset], view)
                written.append(_save(curves, folder / f"{sweep}_{dataset}_curves", f"Over steps: {dataset}"))
    return written


def _save(figure: Figure, path: Path, title: str) -> Path:
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=10, fontweight="bold")
    layout = figure.get_layout_engine()
    if layout is not None:  # once for both files
        layout.execute(figure)
        figure.set_layout_engine("none")
    for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        data = io.BytesIO()
        figure.savefig(data, format=ending, metadata=metadata)
        with store.replacing(path.with_name(f"{path.name}.{ending}")) as beside:
            beside.write_bytes(data.getvalue())
    plt.close(figure)
    return path.with_name(f"{path.name}.png")


def _style(labels: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each label; random and the start are grey, whatever else is there."""
    styles = {}
    others = sorted(set(labels) - {*BASELINES, *UNTRAINED}, key=label_rank, reverse=True)
    for place, label in enumerate(others):
        styles[label] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
    greys = zip((*BASELINES, *UNTRAINED), "os|_x", strict=True)
    return styles | {name: {"color": GREY, "marker": marker} for name, marker in greys}


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    size = (width * columns + 0.6, height * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    return figure, axes


def _option(axis: str) -> str:
    return axis.removeprefix("option/").removeprefix(DATA)


def _names(cells: pd.DataFrame, axes: list[str]) -> list[str]:
    names = []
    for line in cells[["label", *axes]].itertuples(index=False):
        options = [f"{_option(axis)}={shown(value)}" for axis, value in zip(axes, line[1:], strict=True)]
        names.append(
            " ".join([line[0], *(option for option in options if not option.endswith("="))]).replace("$", r"\$")
        )
    return names


def _bars(cells: pd.DataFrame) -> np.ndarray:
    """Half-widths of the intervals; 0, so no bar, where a single seed gives none."""
    return cells["half"].fillna(0).to_numpy()


def _dots(cells: pd.DataFrame, summary: Summary, view: View, differences: bool = False) -> Figure:
    """A line a method: means and intervals, or paired differences to random and theirs."""
    metrics = [metric for metric in summary.metrics if metric in set(cells["metric"])]
    models = sorted(cells["model"].unique())
    lines = cells[["label", *summary.axes]].drop_duplicates()
    names = _names(lines, summary.axes)
    style = _style(lines["label"])
    place_of = {name: len(names) - place for place, name in enumerate(names)}
    # Margins by hand: fitting them takes most of the time of a figure with many panels.
    left, panel, gap, top = 0.25 + 0.08 * max(map(len, names)), 0.22 * len(names) + 0.15, 0.7, 0.6
    width, height = left + 2.2 * len(metrics), 0.5 + top + (panel + gap) * len(models) - gap
    figure, axes = plt.subplots(len(models), len(metrics), figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left / width, 0.5 / height, 1 - 0.15 / width, 1 - top / height, wspace=0.12, hspace=gap / panel
    )
    for model, row in zip(models, axes, strict=True):
        for metric, axis in zip(metrics, row, strict=True):
            part = cells[(cells["model"] == model) & (cells["metric"] == metric)]
            places = [place_of[name] for name in _names(part, summary.axes)]
            colours = [style[label]["color"] for label in part["label"]]
            mean = part["difference" if differences else "mean"].to_numpy()
            low = part["low"] if differences else mean - _bars(part)
            high = part["high"] if differences else mean + _bars(part)
            axis.hlines(places, low, high, colors=colours, linewidth=1.4)
            for x, y, label in zip(mean, places, part["label"], strict=True):
                axis.plot(x, y, markersize=5, **style[label])
            random = part[part["label"].isin(BASELINES)]["mean"].tolist()
            if differences or len(random) == 1:
                axis.axvline(0 if differences else random[0], color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            axis.set_xlabel(f"Δ {axis_name(metric)}" if differences else axis_name(metric))
            axis.set_ylim(0.4, len(names) + 0.6)
            if axis is row[0]:
                axis.set_yticks(list(place_of.values()), list(place_of))
            else:
                axis.set_yticks([])
            axis.grid(axis="y", visible=False)
            axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        row[0].set_title(str(model).replace("$", r"\$"), loc="left", color=GREY)
    return figure


def _lines(cells: pd.DataFrame, summary: Summary, view: View) -> Figure:
    """Metrics over the numeric option with most values; a method at one value only is a level line."""
    numeric = [axis for axis in summary.axes if all(not isinstance(value, str) or not value for value in cells[axis])]
    if not numeric:
        return _dots(cells, summary, view)
    over = max(numeric, key=lambda axis: cells[axis].nunique())
    others = [axis for axis in summary.axes if axis != over]
    models = sorted(cells["model"].unique())
    style = _style(cells["label"])
    values = [value for value in cells[over].unique() if value != ""]
    log = min(values) > 0 and max(values) >= 8 * min(values)
    figure, axes = _panels(len(models), len(summary.metrics), 2.5, 2.3)
    for model, row in zip(models, axes, strict=True):
        for metric, axis in zip(summary.metrics, row, strict=True):
            part = cells[(cells["model"] == model) & (cells["metric"] == metric)]
            groups = {_line_name(keys): (keys, line) for keys, line in part.groupby(["label", *others], sort=False)}
            middle = (len(groups) - 1) / 2
            for place, (name, (keys, line)) in enumerate(groups.items()):
                if len(line) == 1:
                    colour = style[keys[0]]["color"]
                    dashes = LEVELS.get(keys[0], ":")
                    axis.axhline(line["mean"].iloc[0], color=colour, linestyle=dashes, linewidth=1.3, label=name)
                    continue
                line = line.sort_values(over)
                x = line[over].astype(float)
                looks = {"linestyle": LEVELS.get(keys[0], "-"), "capsize": 2, "markersize": 4.5} | style[keys[0]]
                aside = 0.012 * (place - middle)  # of the axis: bars at one value would hide one another
                x = x * (max(values) / min(values)) ** aside if log else x + (max(values) - min(values)) * aside
                axis.errorbar(x, line["mean"], _bars(line), label=name, **looks)
            axis.set_xscale("log" if log else "linear")
            axis.set_xticks(sorted(values), [shown(value) for value in sorted(values)], minor=False)
            axis.set_xticks([], minor=True)
            axis.tick_params(axis="x", labelrotation=45 if len(values) > 4 else 0)
            axis.set_xlabel(_option(over).replace("_", " "))
            axis.set_title(axis_name(metric), loc="left")
        row[0].set_ylabel(str(model).replace("$", r"\$"), color=GREY)
    _legend(figure, axes)
    return figure


def _line_name(keys: tuple[Any, ...]) -> str:
    return " ".join(shown(key) for key in keys if key != "")


def _front(cells: pd.DataFrame, summary: Summary, view: View) -> Figure:
    """Pairs of metrics against each other; the line joins what nothing beats in both."""
    models = sorted(cells["model"].unique())
    style = _style(cells["label"])
    pairs = [pair for pair in view.pairs if set(pair) <= set(summary.metrics)]
    if not pairs:
        return _dots(cells, summary, view)
    figure, axes = _panels(len(models), len(pairs), 3.3, 2.9)
    for model, row in zip(models, axes, strict=True):
        part = cells[cells["model"] == model]
        for (across, up), axis in zip(pairs, row, strict=True):
            keys = ["label", *summary.axes]
            x_cells = part[part["metric"] == across].set_index(keys)
            y_cells = part[part["metric"] == up].set_index(keys)
            both = x_cells.merge(y_cells, left_index=True, right_index=True, suffixes=("_x", "_y")).reset_index()
            for line, name in zip(both.itertuples(index=False), _names(both, summary.axes), strict=True):
                bars = {"xerr": np.nan_to_num(line.half_x), "yerr": np.nan_to_num(line.half_y)}
                point = axis.errorbar(
                    line.mean_x, line.mean_y, label=name, markersize=6, elinewidth=0.8, **bars, **style[line.label]
                )
                for bar in point[2]:
                    bar.set_alpha(0.35)  # with few seeds they are long, and the points matter
            best_x = -1.0 if across in LOWER_IS_BETTER else 1.0
            points = both[["mean_x", "mean_y"]].to_numpy(dtype=float) * [best_x, 1.0]
            unbeaten = [p for p in points if not ((points >= p).all(1) & (points > p).any(1)).any()]
            front = np.array(sorted(unbeaten, key=lambda point: point[0])) * [best_x, 1.0]
            axis.plot(front[:, 0], front[:, 1], color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            axis.set_xlabel(axis_name(across))
            axis.set_ylabel(axis_name(up))
        row[0].set_title(str(model).replace("$", r"\$"), loc="left", color=GREY)
    _legend(figure, axes)
    return figure


def _curves(histories: pd.DataFrame, view: View) -> Figure:
    """Columns of the histories over steps: mean over seeds, shaded from the lowest to the highest seed."""
    models = sorted(histories["model"].unique())
    columns = [column for column in view.curves if column in histories]
    style = _style(histories["label"])
    figure, axes = _panels(len(models), max(len(columns), 1), 2.9, 2.3)
    for model, row in zip(models, axes, strict=True):
        for column, axis in zip(columns, row, strict=True):
            part = histories[histories["model"] == model]
            if column.removeprefix("val/") in ZERO_AT_START:
                part = part.assign(**{column: part[column].mask(part["step"] == 0, 0.0)})
            for label, line in part.dropna(subset=column).groupby("label"):
                over = line.groupby("step")[column].agg(["mean", "min", "max"])
                axis.plot(over.index, over["mean"], label=label, linewidth=1.4, markersize=4, **style[label])
                axis.fill_between(
                    over.index, over["min"], over["max"], color=style[label]["color"], alpha=0.15, linewidth=0
                )
            axis.set_xlabel("step")
            axis.set_title(axis_name(column).replace(" (", "\n("), loc="left")
        row[0].set_ylabel(str(model).replace("$", r"\$"), color=GREY)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: np.ndarray) -> None:
    first: Axes = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    handles, names = first.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda place: label_rank(names[place].split(" ")[0]))
    figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside right upper", frameon=False)
