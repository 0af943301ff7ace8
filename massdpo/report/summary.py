"""Rows -> one long frame: a line per table cell, with mean, interval, number of seeds, best and ties, and the paired
difference from `random`.

A table has a block for each (dataset, model) and, if options of the data are varied, for each of their values: methods
are compared only within a block. It has a line for each label and value of the other varied options.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from massdpo.errors import UserError
from massdpo.evaluation.metrics import described
from massdpo.report.methods import BASELINES, METHODS, UNTRAINED, rank_in
from massdpo.report.per_prompt import NO_TEST, compare
from massdpo.report.reading import PerPrompt
from massdpo.report.rows import DATA, RunRows
from massdpo.report.statistics import Floats, holm
from massdpo.report.views import shown

BLOCK = ["dataset", "model"]


@dataclass
class Summary:
    """`cells`: columns dataset, model, label, the axes, metric, mean, half, n, of, best, tie, difference, low, high, p,
    pairs (seeds that were compared), note, p_holm. A cell without a finished run has n = 0."""

    cells: pd.DataFrame
    block: list[str]  # columns that say which block a line is in: dataset, model and the axes that change the data
    axes: list[str]
    metrics: list[str]
    absent: list[str]  # requested metrics that no run has
    unfinished: pd.DataFrame  # name, status and why of runs without numbers
    odd: list[str]  # names of finished runs with NaN or infinity among the metrics
    sizes: dict[str, str]  # test prompts of each dataset


def summarise(rows: RunRows, metrics: tuple[str, ...], baselines: tuple[str, ...] = BASELINES) -> Summary:
    """The summary of all finished runs, compared with those of `baselines`."""
    known = [metric for metric in metrics if metric in rows.frame]
    present = known or [metrics[0]]  # where no run has finished, the table says what is missing
    frame = rows.frame if known else rows.frame.assign(**{metrics[0]: np.nan})
    frame = frame.assign(**{axis: frame[axis].astype(object).where(frame[axis].notna(), "") for axis in rows.axes})
    data_axes, axes = split_axes(rows.axes)
    in_block = [*BLOCK, *data_axes]
    frame = pd.concat([frame, _untrained(frame, in_block, axes, present)], ignore_index=True)
    frame = frame[frame["label"].notna()]  # a run that never started may have nothing but a name
    lines = _grid(frame, axes)
    _refuse_twins(frame, rows.axes)
    parts = []
    blocks: dict[tuple[Any, ...], pd.DataFrame] = dict(iter(frame.groupby(in_block)))
    for values in sorted(blocks, key=lambda values: [*map(_order, values)]):
        block, place = blocks[values], dict(zip(in_block, values, strict=True))
        finished = block[block["status"] == "finished"].reset_index(drop=True)
        trained = ~lines["label"].isin(UNTRAINED)  # a benchmark without a popularity baseline lacks no result
        lines_of_block = lines[trained | lines["label"].isin(block["label"])].reset_index(drop=True)
        cells = _block_cells(finished, lines_of_block, axes, present, rows.prompts, baselines)
        parts.append(cells.assign(**place, of=block["seed"].nunique()))
    cells = pd.concat(parts, ignore_index=True)
    cells["p_holm"] = holm(cells["p"].tolist())
    first = [*BLOCK, "label", *rows.axes, "metric"]
    cells = cells[[*first, *cells.columns.difference(first, sort=False)]]
    unfinished = rows.frame.loc[rows.frame["status"] != "finished", ["name", "status", "why"]]
    absent = [metric for metric in metrics if metric not in known]
    finished = rows.frame[rows.frame["status"] == "finished"]
    finite = np.isfinite(finished[known].to_numpy(dtype=np.float64))  # NaN is written as an empty cell
    odd = finished["name"][~finite.all(axis=1)].tolist()
    return Summary(cells, in_block, rows.axes, present, absent, unfinished, odd, _sizes(rows))


def _sizes(rows: RunRows) -> dict[str, str]:
    counts: dict[str, set[int]] = {}
    for dataset, name in rows.frame.dropna(subset="prompts")[["dataset", "name"]].itertuples(index=False):
        counts.setdefault(dataset, set()).add(len(next(iter(rows.prompts[name].values()))))
    return {dataset: " or ".join(f"{size:,}" for size in sorted(sizes)) for dataset, sizes in counts.items()}


def split_axes(axes: list[str]) -> tuple[list[str], list[str]]:
    """Axes that change the data, and the others."""
    of_data = [axis for axis in axes if axis.startswith(f"option/{DATA}")]
    return of_data, [axis for axis in axes if axis not in of_data]


def at_best(rows: RunRows, metric: str) -> tuple[RunRows, list[str]]:
    """Only the runs at each method's best value of the varied options, by the mean over seeds of a validation metric.

    Also returns notes on which values these are. The order of the rows decides between equal means.
    """
    data_axes, axes = split_axes(rows.axes)
    keys = [*BLOCK, *data_axes, "label"]
    finished = rows.frame[rows.frame["status"] == "finished"]
    means = finished.groupby([*keys, *axes], dropna=False, sort=False)[metric].mean().reset_index()
    means = means[means[metric].notna()]  # method=sft validates nothing
    best = means.loc[means.groupby(keys, dropna=False, sort=True)[metric].idxmax()]
    told = []
    for line in best.to_dict("records"):
        options = ", ".join(f"{axis.removeprefix('option/')} = {line[axis]}" for axis in axes)
        told.append(f"{', '.join(shown(line[key]) for key in keys)}: {options}")
    return RunRows(rows.frame.merge(best[[*keys, *axes]]), data_axes, rows.prompts), told


def _refuse_twins(frame: pd.DataFrame, axes: list[str]) -> None:
    finished = frame[(frame["status"] == "finished") & frame["name"].notna()]
    twins = finished[finished.duplicated([*BLOCK, "label", *axes, "seed"], keep=False)]
    if len(twins):
        first, second = twins.sort_values([*BLOCK, "label", "seed"], kind="stable")["name"].iloc[:2]
        raise UserError(
            f"runs {first} and {second} have the same data, model, method, options and seed: remove one, "
            "or report with --replace"
        )


def _untrained(frame: pd.DataFrame, in_block: list[str], axes: list[str], metrics: list[str]) -> pd.DataFrame:
    """A line for the SFT start, and for each guess without a model, of each block and seed.

    They come from the `sft/...`, `popularity/...` and `lookup/...` metrics of one of the runs that share them: all runs
    of a seed, unless an option changes the start; then those with the same value of it.
    """
    parts = []
    shared = [*in_block, "seed"]
    for label in UNTRAINED:
        columns = {f"{label}/{metric}": metric for metric in metrics if f"{label}/{metric}" in frame}
        if not columns or (frame["label"] == label).any():
            continue
        finished = frame[(frame["status"] == "finished") & frame[list(columns)].notna().any(axis=1)]
        starts = finished.groupby([*shared, *columns], dropna=False)
        several = starts.ngroups > len(finished[shared].drop_duplicates())
        own = [axis for axis in axes if several and (starts[axis].nunique(dropna=False) == 1).all()]
        lines = finished.drop_duplicates([*shared, *own])[[*shared, "status", *own, *columns]]
        none = dict.fromkeys((axis for axis in axes if axis not in own), "")
        parts.append(lines.rename(columns=columns).assign(label=label, **none))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _grid(frame: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """The lines of every block: all blocks have the same lines, so that what is missing can be seen."""
    lines = frame[["label", *axes]].drop_duplicates()
    keys = [(rank_in(METHODS, label), *map(_order, values)) for label, *values in lines.itertuples(index=False)]
    return lines.iloc[sorted(range(len(keys)), key=keys.__getitem__)].reset_index(drop=True)


def _order(value: Any) -> tuple[bool, Any]:
    return (isinstance(value, str), value)  # numbers before words


def _block_cells(
    finished: pd.DataFrame,
    lines: pd.DataFrame,
    axes: list[str],
    metrics: list[str],
    results: dict[str, PerPrompt],
    baselines: tuple[str, ...],
) -> pd.DataFrame:
    """All cells of one block; L lines, S seeds."""
    keys = ["label", *axes]
    places = finished.assign(run=range(len(finished))).pivot(index=keys, columns="seed", values="run")
    found = lines[keys].merge(places, how="left", left_on=keys, right_index=True)[places.columns]
    run_LS = found.fillna(-1).to_numpy(dtype=int)  # place in `finished`, -1: no such run
    baseline_L = _baselines(lines, (run_LS >= 0).any(1), axes, baselines)
    runs = list(zip(finished["prompts"], finished["name"], strict=True))
    parts = []
    for metric in metrics:
        values = finished[metric].to_numpy(dtype=np.float64)
        values_LS = np.where(run_LS >= 0, values[run_LS], np.nan)
        if described(metric).of_rewards:  # measured from the start: its own are 0 by definition
            values_LS[lines["label"].isin(UNTRAINED)] = np.nan
        cells = lines.assign(metric=metric, **_means(values_LS, run_LS >= 0))
        cells["best"], cells["tie"] = _best(metric, values_LS, run_LS >= 0)
        tests = []
        for line, base in enumerate(baseline_L):
            start = lines["label"][line] in UNTRAINED
            if base in (-1, line) or (start and described(metric).of_rewards):
                tests.append((*NO_TEST, 0, "baseline" if base == line else "start" if start else "no baseline"))
                continue
            both_S = (run_LS[line] >= 0) & (run_LS[base] >= 0)
            pairs = [
                (runs[run], runs[other]) for run, other in zip(run_LS[line][both_S], run_LS[base][both_S], strict=True)
            ]
            tests.append(compare(results, metric, pairs))
        parts.append(cells.assign(**pd.DataFrame(tests, columns=["difference", "low", "high", "p", "pairs", "note"])))
    return pd.concat(parts, ignore_index=True)


def _means(values_LS: Floats, there_LS: NDArray[np.bool_]) -> dict[str, Floats]:
    """Mean, half-width of its 95% t interval, and number of seeds of each line; a NaN among the values is kept."""
    n_L = there_LS.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_L = np.where(there_LS, values_LS, 0).sum(1) / n_L
        variance_L = np.where(there_LS, (values_LS - mean_L[:, None]) ** 2, 0).sum(1) / (n_L - 1)
        half_L = stats.t.ppf(0.975, n_L - 1) * np.sqrt(variance_L / n_L)
    return {"mean": mean_L, "half": np.where(n_L > 1, half_L, np.nan), "n": n_L}


def _best(metric: str, values_LS: Floats, there_LS: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The best line, and those whose difference from it over shared seeds has a 95% interval that contains 0."""
    better = described(metric).better
    mean_L = better * _means(values_LS, there_LS)["mean"]
    mean_L[~np.isfinite(mean_L)] = np.nan  # neither the best nor compared
    if not better or np.isnan(mean_L).all():
        return np.zeros(len(mean_L), dtype=bool), np.zeros(len(mean_L), dtype=bool)
    best_L = mean_L == np.nanmax(mean_L)
    gap_LS = values_LS[best_L.argmax()] - values_LS
    gap = _means(gap_LS, np.isfinite(gap_LS))
    return best_L, ~best_L & np.isfinite(mean_L) & (np.abs(gap["mean"]) <= gap["half"])


def _baselines(lines: pd.DataFrame, there_L: Any, axes: list[str], names: tuple[str, ...]) -> list[int]:
    """For each line, the baseline's line with the same options; if the baseline was run at one setting only, that one.

    -1: there is none.
    """
    options = [tuple(line) for line in lines[axes].to_numpy()]
    candidates = {options[place]: int(place) for place in np.flatnonzero(there_L & lines["label"].isin(names))}
    only = next(iter(candidates.values())) if len(candidates) == 1 else -1
    return [candidates.get(option, only) for option in options]
