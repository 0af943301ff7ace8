"""Panels of a figure: a row per model, a column per metric, each method with its own colour and marker.

Each kind of figure comes with its caption, which names only what is drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from massdpo.evaluation.metrics import described
from massdpo.report.methods import BASELINES, GREY, METHODS, UNTRAINED, method, rank_in
from massdpo.report.rows import DATA
from massdpo.report.summary import Summary
from massdpo.report.views import View, axis_name, shown

T = TypeVar("T")


def _looks(label: str) -> dict[str, str]:
    return {"color": method(label).colour, "marker": method(label).marker}


def _bounded(axis: Any, metric: str) -> None:
    """Keep the axis of a share within 0 and 1; `axis` is the getter and the setter of its limits."""
    get, put = axis
    low, high = get()
    if not described(metric).unit:
        put(max(low, -0.02 if low < 0 else low), min(high, 1.0))


def _panels(
    frame: pd.DataFrame, columns: Sequence[T], size: tuple[float, float], draw: Callable[[Axes, pd.DataFrame, T], None]
) -> Figure:
    """`draw(axis, lines of a model, column)` for each panel, of that size, and one legend for all."""
    models = sorted(frame["model"].unique())
    whole = (size[0] * len(columns) + 0.6, size[1] * len(models) + 0.5)
    figure, axes = plt.subplots(len(models), len(columns), figsize=whole, squeeze=False, layout="constrained")
    for model, row in zip(models, axes, strict=True):
        for column, axis in zip(columns, row, strict=True):
            draw(axis, frame[frame["model"] == model], column)
        if row[0].get_ylabel():
            row[0].set_title(model, loc="left", color=GREY)
        else:
            row[0].set_ylabel(model, color=GREY)
    fullest: Axes = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    handles, names = fullest.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda place: rank_in(METHODS, names[place].split(" ")[0]))
    figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside right upper", frameon=False)
    return figure


def _option(axis: str) -> str:
    return axis.removeprefix("option/").removeprefix(DATA)


def _names(cells: pd.DataFrame, axes: list[str]) -> list[str]:
    names = []
    for line in cells[["label", *axes]].itertuples(index=False):
        options = [f"{_option(axis)}={shown(value)}" for axis, value in zip(axes, line[1:], strict=True)]
        names.append(" ".join([line[0], *(option for option in options if not option.endswith("="))]))
    return names


def _bars(cells: pd.DataFrame, metric: str) -> np.ndarray:
    """How far intervals reach below and above the means, (2, cells); 0 where there is none.

    The interval of a share is cut at 0 and 1.
    """
    half, mean = cells["half"].fillna(0).to_numpy(), cells["mean"].to_numpy()
    if described(metric).unit:
        return np.array([half, half])
    return np.array([np.minimum(half, np.maximum(mean, 0)), np.minimum(half, np.maximum(1 - mean, 0))])


def _of_means(cells: pd.DataFrame, bars: str, also: str) -> str:
    """The caption of means."""
    few = ", where there are three or more" if (cells["n"] == 2).any() else ""
    intervals = f"{bars}: 95% t intervals over seeds{few}" if cells["half"].notna().any() else ""
    return "; ".join(filter(None, ["Means", intervals, also]))


def dots(cells: pd.DataFrame, summary: Summary, view: View, differences: bool = False) -> tuple[Figure, str]:
    """A line per method: means and intervals, or paired differences from random and theirs."""
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
    dashed = False
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
                dashed = True
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
        row[0].set_title(model, loc="left", color=GREY)
    if differences:
        over = ", seeds and prompts as crossed random effects" if cells["pairs"].max() > 1 else " over prompts"
        return figure, f"Method minus random; bars: 95% intervals{over}; dashed: no difference"
    return figure, _of_means(cells, "bars", "dashed: random" if dashed else "")


def lines(cells: pd.DataFrame, summary: Summary, view: View) -> tuple[Figure, str]:
    """Metrics over `view.x`, or the numeric option with most values; a method with one value is a horizontal line."""
    numeric = [axis for axis in summary.axes if all(not isinstance(value, str) or not value for value in cells[axis])]
    chosen = [axis for axis in summary.axes if view.x in (axis, _option(axis))]
    if not (chosen or numeric):
        return dots(cells, summary, view)
    over = chosen[0] if chosen else max(numeric, key=lambda axis: cells[axis].nunique())
    group = next((axis for axis in summary.axes if view.group in (axis, _option(axis))), "label")
    others = [name for name in ("label", *summary.axes) if name not in (over, group)]
    values = sorted((value for value in cells[over].unique() if value != ""), key=lambda it: (isinstance(it, str), it))
    place_of = {value: float(value) if over in numeric else place for place, value in enumerate(values)}
    first, last = place_of[values[0]], place_of[values[-1]]
    log = first > 0 and last >= 8 * first
    colours = {value: f"C{place}" for place, value in enumerate(sorted(cells[group].unique(), key=str))}

    def draw(axis: Axes, of_model: pd.DataFrame, metric: str) -> None:
        part = of_model[of_model["metric"] == metric]
        groups = {
            " ".join(shown(key) for key in keys if key != ""): (keys, line)
            for keys, line in part.groupby([group, *others], sort=False)
        }
        middle = (len(groups) - 1) / 2
        for place, (name, (keys, line)) in enumerate(groups.items()):
            label = line["label"].iloc[0]
            looks: dict[str, Any] = _looks(label) | ({} if group == "label" else {"color": colours[keys[0]]})
            if len(line) == 1:
                dashes = method(label).dashes if label in UNTRAINED else (0, (1, 1))
                axis.axhline(line["mean"].iloc[0], label=name, color=looks["color"], linestyle=dashes, linewidth=1.3)
                continue
            line = line[line[over] != ""].assign(x=lambda line: line[over].map(place_of)).sort_values("x")
            aside = 0.012 * (place - middle)  # of the axis: bars at the same value would hide one another
            x = line["x"] * (last / first) ** aside if log else line["x"] + (last - first) * aside
            looks |= {"linestyle": method(label).dashes, "capsize": 2, "markersize": 4.5}
            axis.errorbar(x, line["mean"], _bars(line, metric), label=name, **looks)
        axis.set_xscale("log" if log else "linear")
        axis.set_xticks(list(place_of.values()), [shown(value) for value in values], minor=False)
        axis.set_xticks([], minor=True)
        axis.tick_params(axis="x", labelrotation=45 if len(values) > 4 else 0)
        axis.set_xlabel(_option(over).replace("_", " "))
        axis.set_title(axis_name(metric), loc="left")
        _bounded((axis.get_ylim, axis.set_ylim), metric)

    level = cells.groupby(["model", "metric", group, *others]).size().eq(1).any()
    caption = _of_means(cells, "bars", "horizontal lines: methods with one setting" if level else "")
    return _panels(cells, summary.metrics, (2.5, 2.3), draw), caption


def front(cells: pd.DataFrame, summary: Summary, view: View) -> tuple[Figure, str]:
    """Pairs of metrics against each other; the line joins the points that nothing beats in both."""
    pairs = [pair for pair in view.pairs if set(pair) <= set(summary.metrics)]
    if not pairs:
        return dots(cells, summary, view)

    longest = 0

    def draw(axis: Axes, part: pd.DataFrame, pair: tuple[str, str]) -> None:
        nonlocal longest
        (across, up), keys = pair, ["label", *summary.axes]
        both = part[part["metric"] == across].merge(part[part["metric"] == up], on=keys)  # x: across, y: up
        for line, name in zip(both.to_dict("records"), _names(both, summary.axes), strict=True):
            looks: dict[str, Any] = {"markersize": 6, "elinewidth": 0.8, **_looks(line["label"])}
            half_x, half_y = np.nan_to_num([line["half_x"], line["half_y"]])
            point = axis.errorbar(line["mean_x"], line["mean_y"], half_y, half_x, label=name, **looks)
            for bar in point[2]:
                bar.set_alpha(0.35)  # with few seeds they are long, and it is the points that matter
        best_x = -1.0 if described(across).better < 0 else 1.0
        points = both[["mean_x", "mean_y"]].to_numpy(dtype=float) * [best_x, 1.0]
        unbeaten = [p for p in points if not ((points >= p).all(1) & (points > p).any(1)).any()]
        front = np.array(sorted(unbeaten, key=lambda point: point[0])) * [best_x, 1.0]
        axis.plot(front[:, 0], front[:, 1], color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        longest = max(longest, len(front))
        axis.set_xlabel(axis_name(across))
        axis.set_ylabel(axis_name(up))
        _bounded((axis.get_xlim, axis.set_xlim), across)
        _bounded((axis.get_ylim, axis.set_ylim), up)

    figure = _panels(cells, pairs, (3.3, 2.9), draw)
    joined = "dashed: joins the points that nothing beats in both" if longest > 1 else ""
    return figure, _of_means(cells, "pale bars", joined)


def curves(histories: pd.DataFrame, view: View) -> tuple[Figure, str]:
    """Columns of the histories over steps: mean over seeds, shaded from the lowest to the highest seed."""

    def draw(axis: Axes, part: pd.DataFrame, column: str) -> None:
        if described(column).of_rewards:  # 0 at the start by definition
            part = part.assign(**{column: part[column].mask(part["step"] == 0, 0.0)})
        for label, line in part.dropna(subset=column).groupby("label"):
            over = line.groupby("step")[column].agg(["mean", "min", "max"])
            looks: dict[str, Any] = {"linewidth": 1.4, "markersize": 4, **_looks(str(label))}
            axis.plot(over.index, over["mean"], label=label, **looks)
            axis.fill_between(over.index, over["min"], over["max"], color=looks["color"], alpha=0.15, linewidth=0)
        axis.set_xlabel("step")
        axis.set_title(axis_name(column).replace(" (", "\n("), loc="left")
        _bounded((axis.get_ylim, axis.set_ylim), column)

    columns = [column for column in view.curves if column in histories]
    several = histories["seed"].nunique() > 1
    caption = "Mean over seeds; band: lowest to highest seed" if several else "One seed"
    return _panels(histories, columns, (2.9, 2.3), draw), caption
