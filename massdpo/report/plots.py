"""Panels of a figure: a row per model, a column per metric, each method with its own colour and marker."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from massdpo.evaluation.metrics import described
from massdpo.report.methods import BASELINES, GREY, UNTRAINED, label_rank, method
from massdpo.report.rows import DATA
from massdpo.report.summary import Summary
from massdpo.report.views import View, axis_name, shown


def _looks(label: str) -> dict[str, str]:
    return {"color": method(label).colour, "marker": method(label).marker}


def _bounded(axis: Any, metric: str) -> None:
    """Keep the axis of a share within 0 and 1; `axis` is the getter and the setter of its limits."""
    get, put = axis
    low, high = get()
    if not described(metric).unit:
        put(max(low, -0.02 if low < 0 else low), min(high, 1.0))


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


def _bars(cells: pd.DataFrame, metric: str) -> np.ndarray:
    """How far intervals reach below and above the means, (2, cells); 0 for a single seed, which has none.

    The interval of a share is cut at 0 and 1.
    """
    half, mean = cells["half"].fillna(0).to_numpy(), cells["mean"].to_numpy()
    if described(metric).unit:
        return np.array([half, half])
    return np.array([np.minimum(half, np.maximum(mean, 0)), np.minimum(half, np.maximum(1 - mean, 0))])


def dots(cells: pd.DataFrame, summary: Summary, view: View, differences: bool = False) -> Figure:
    """A line per method: means and intervals, or paired differences to random and theirs."""
    metrics = [metric for metric in summary.metrics if metric in set(cells["metric"])]
    models = sorted(cells["model"].unique())
    lines = cells[["label", *summary.axes]].drop_duplicates()
    names = _names(lines, summary.axes)
    place_of = {name: len(names) - place for place, name in enumerate(names)}
    # Margins by hand: fitting them takes most of the time of a figure with many panels.
    left, panel, gap, top = 0.25 + 0.08 * max(map(len, names)), 0.22 * len(names) + 0.15, 0.7, 0.6
    bottom = 0.95  # the axis label and the caption
    width, height = left + max(2.2 * len(metrics), 4), bottom + top + (panel + gap) * len(models) - gap
    figure, axes = plt.subplots(len(models), len(metrics), figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left / width, bottom / height, 1 - 0.15 / width, 1 - top / height, wspace=0.12, hspace=gap / panel
    )
    for model, row in zip(models, axes, strict=True):
        for metric, axis in zip(metrics, row, strict=True):
            part = cells[(cells["model"] == model) & (cells["metric"] == metric)]
            places = [place_of[name] for name in _names(part, summary.axes)]
            colours = [method(label).colour for label in part["label"]]
            mean = part["difference" if differences else "mean"].to_numpy()
            below, above = _bars(part, metric)
            low = part["low"] if differences else mean - below
            high = part["high"] if differences else mean + above
            axis.hlines(places, low, high, colors=colours, linewidth=1.4)
            for x, y, label in zip(mean, places, part["label"], strict=True):
                axis.plot(x, y, markersize=5, **_looks(label))
            random = part[part["label"].isin(BASELINES)]["mean"].tolist()
            if differences or len(random) == 1:
                axis.axvline(0 if differences else random[0], color=GREY, linewidth=1, linestyle="--", zorder=1)
            axis.set_xlabel(f"Δ {axis_name(metric)}" if differences else axis_name(metric))
            if not differences:
                _bounded((axis.get_xlim, axis.set_xlim), metric)
            axis.set_ylim(0.4, len(names) + 0.6)
            if axis is row[0]:
                axis.set_yticks(list(place_of.values()), list(place_of))
            else:
                axis.set_yticks([])
            axis.grid(axis="y", visible=False)
            axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        row[0].set_title(str(model).replace("$", r"\$"), loc="left", color=GREY)
    return figure


def lines(cells: pd.DataFrame, summary: Summary, view: View) -> Figure:
    """Metrics over `view.x`, or the numeric option with most values; a method with one value is a horizontal line."""
    numeric = [axis for axis in summary.axes if all(not isinstance(value, str) or not value for value in cells[axis])]
    chosen = [axis for axis in summary.axes if view.x in (axis, _option(axis))]
    if not (chosen or numeric):
        return dots(cells, summary, view)
    over = chosen[0] if chosen else max(numeric, key=lambda axis: cells[axis].nunique())
    group = next((axis for axis in summary.axes if view.group in (axis, _option(axis))), "label")
    others = [name for name in ("label", *summary.axes) if name not in (over, group)]
    models = sorted(cells["model"].unique())
    values = sorted((value for value in cells[over].unique() if value != ""), key=lambda it: (isinstance(it, str), it))
    place_of = {value: float(value) if over in numeric else place for place, value in enumerate(values)}
    first, last = place_of[values[0]], place_of[values[-1]]
    log = first > 0 and last >= 8 * first
    colours = {value: f"C{place}" for place, value in enumerate(sorted(cells[group].unique(), key=str))}
    figure, axes = _panels(len(models), len(summary.metrics), 2.5, 2.3)
    for model, row in zip(models, axes, strict=True):
        for metric, axis in zip(summary.metrics, row, strict=True):
            part = cells[(cells["model"] == model) & (cells["metric"] == metric)]
            groups = {
                " ".join(shown(key) for key in keys if key != ""): (keys, line)
                for keys, line in part.groupby([group, *others], sort=False)
            }
            middle = (len(groups) - 1) / 2
            for place, (name, (keys, line)) in enumerate(groups.items()):
                label = line["label"].iloc[0]
                looks = _looks(label) | ({} if group == "label" else {"color": colours[keys[0]]})
                if len(line) == 1:
                    dashes = method(label).dashes if label in UNTRAINED else (0, (1, 1))
                    level = {"color": looks["color"], "linestyle": dashes, "linewidth": 1.3}
                    axis.axhline(line["mean"].iloc[0], label=name, **level)
                    continue
                line = line[line[over] != ""]
                line = line.iloc[np.argsort([place_of[value] for value in line[over]])]
                x = np.array([place_of[value] for value in line[over]])
                aside = 0.012 * (place - middle)  # of the axis: bars at the same value would hide one another
                x = x * (last / first) ** aside if log else x + (last - first) * aside
                bars = {"linestyle": method(label).dashes, "capsize": 2, "markersize": 4.5}
                axis.errorbar(x, line["mean"], _bars(line, metric), label=name, **bars, **looks)
            axis.set_xscale("log" if log else "linear")
            axis.set_xticks(list(place_of.values()), [shown(value) for value in values], minor=False)
            axis.set_xticks([], minor=True)
            axis.tick_params(axis="x", labelrotation=45 if len(values) > 4 else 0)
            axis.set_xlabel(_option(over).replace("_", " "))
            axis.set_title(axis_name(metric), loc="left")
            _bounded((axis.get_ylim, axis.set_ylim), metric)
        row[0].set_ylabel(str(model).replace("$", r"\$"), color=GREY)
    _legend(figure, axes)
    return figure


def front(cells: pd.DataFrame, summary: Summary, view: View) -> Figure:
    """Pairs of metrics against each other; the line joins the points that nothing beats in both."""
    models = sorted(cells["model"].unique())
    pairs = [pair for pair in view.pairs if set(pair) <= set(summary.metrics)]
    if not pairs:
        return dots(cells, summary, view)
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
                    line.mean_x, line.mean_y, label=name, markersize=6, elinewidth=0.8, **bars, **_looks(line.label)
                )
                for bar in point[2]:
                    bar.set_alpha(0.35)  # with few seeds they are long, and it is the points that matter
            best_x = -1.0 if described(across).better < 0 else 1.0
            points = both[["mean_x", "mean_y"]].to_numpy(dtype=float) * [best_x, 1.0]
            unbeaten = [p for p in points if not ((points >= p).all(1) & (points > p).any(1)).any()]
            front = np.array(sorted(unbeaten, key=lambda point: point[0])) * [best_x, 1.0]
            axis.plot(front[:, 0], front[:, 1], color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            axis.set_xlabel(axis_name(across))
            axis.set_ylabel(axis_name(up))
            _bounded((axis.get_xlim, axis.set_xlim), across)
            _bounded((axis.get_ylim, axis.set_ylim), up)
        row[0].set_title(str(model).replace("$", r"\$"), loc="left", color=GREY)
    _legend(figure, axes)
    return figure


def curves(histories: pd.DataFrame, view: View) -> Figure:
    """Columns of the histories over steps: mean over seeds, shaded from the lowest to the highest seed."""
    models = sorted(histories["model"].unique())
    columns = [column for column in view.curves if column in histories]
    figure, axes = _panels(len(models), max(len(columns), 1), 2.9, 2.3)
    for model, row in zip(models, axes, strict=True):
        for column, axis in zip(columns, row, strict=True):
            part = histories[histories["model"] == model]
            if described(column).of_rewards:
                part = part.assign(**{column: part[column].mask(part["step"] == 0, 0.0)})
            for label, line in part.dropna(subset=column).groupby("label"):
                over = line.groupby("step")[column].agg(["mean", "min", "max"])
                axis.plot(over.index, over["mean"], label=label, linewidth=1.4, markersize=4, **_looks(label))
                axis.fill_between(
                    over.index, over["min"], over["max"], color=method(label).colour, alpha=0.15, linewidth=0
                )
            axis.set_xlabel("step")
            axis.set_title(axis_name(column).replace(" (", "\n("), loc="left")
            _bounded((axis.get_ylim, axis.set_ylim), column)
        row[0].set_ylabel(str(model).replace("$", r"\$"), color=GREY)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: np.ndarray) -> None:
    first: Axes = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    handles, names = first.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda place: label_rank(names[place].split(" ")[0]))
    figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside right upper", frameon=False)
