"""Run folders -> one row per run, and the compact per-prompt results behind the rows.

`rows.csv` has one row per run that was started or expected, finished or not; `prompts.npz` has, for each set of test
prompts (column `prompts` of the rows), the arrays `<set>/<field>` of shape (runs, prompts), in the order of the rows.
"""

import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from massdpo import store
from massdpo.config import EXPECTED, NOT_IDENTITY
from massdpo.errors import UserError
from massdpo.report import reading
from massdpo.report.reading import FIELDS, GROUPS, IDENTITY, PerPrompt, as_cell, run_status

DATA = "dataset."  # options that change the questions
NO_AXIS = ("choices.", "hydra.", *(f"{key}." for key in NOT_IDENTITY))
PLACES = ("data_dir=", "cache_dir=", "runs_dir=", "dataset.raw_dir=", "dataset.path=")  # of one machine only


@dataclass
class RunRows:
    """`frame`: one row per run. `axes`: its columns of options that the sweep varies by themselves.

    `prompts`: the per-prompt results of each finished run, by its name.
    """

    frame: pd.DataFrame
    axes: list[str]
    prompts: dict[str, PerPrompt]

    @classmethod
    def read(cls, folder: Path) -> "RunRows":
        frame = reading.read_rows(folder / "rows.csv")
        return cls(frame, _axes(frame), reading.read_prompts(folder / "prompts.npz", frame))

    @classmethod
    def through_text(cls, frame: pd.DataFrame, prompts: dict[str, PerPrompt]) -> "RunRows":
        """Rows as they will be read back, the same to the last type."""
        read = reading.read_rows(io.StringIO(frame.to_csv(index=False)))
        return cls(read, _axes(read), prompts)

    def only(self, labels: tuple[str, ...], datasets: tuple[str, ...]) -> "RunRows":
        """The rows of these labels and datasets; empty: of all."""
        frame = self.frame
        for column, allowed in (("label", labels), ("dataset", datasets)):
            if allowed:
                frame = frame[frame[column].isin(allowed)]
        return RunRows(frame, _axes(frame), self.prompts)

    def merged(self, new: "RunRows") -> "RunRows":
        """These rows and the new ones, which replace those of the same name (it holds a hash of the run's config)."""
        kept = self.frame[~self.frame["name"].isin(new.frame["name"])]
        frame = pd.concat([kept, new.frame], ignore_index=True).sort_values("name", kind="stable")
        return RunRows.through_text(frame, self.prompts | new.prompts)

    def write(self, folder: Path) -> None:
        """Of the per-prompt results of a set, the fields that all of its runs have."""
        store.write_text(folder / "rows.csv", self.frame.to_csv(index=False, lineterminator="\n"))
        arrays: dict[str, Any] = {}
        for key, names in self.frame.groupby("prompts")["name"]:
            runs = [self.prompts[name] for name in names]
            for field in (field for field in FIELDS if all(field in run for run in runs)):
                arrays[f"{key}/{field}"] = np.stack([run[field] for run in runs])
        with store.replacing(folder / "prompts.npz") as beside, open(beside, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def collect(folder: Path) -> RunRows:
    """The rows of all runs below `results/runs/<sweep>`; one that has not finished has a row without numbers."""
    runs = [_read_run(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
    started = {row["name"] for row, _, _ in runs}
    for name, noted in expected_runs(folder).items():
        if name not in started:
            early = (folder / name / "status.json").exists()  # it failed before its config was written
            state, why = run_status(folder / name) if early else ("missing", "")
            with reading.reading(folder / EXPECTED):
                runs.append((_row(name, noted["config"], state, why), _flatten(noted["config"]), {}))
    if not runs:
        raise no_runs(folder)
    axes = _varied_options([options for _, options, _ in runs])
    rows = [row | {f"option/{name}": options.get(path) for name, path in axes.items()} for row, options, _ in runs]
    frame = pd.DataFrame(
        {as_cell(key): as_cell(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in rows
    )
    prompts = {as_cell(row["name"]): predictions for row, _, predictions in runs if predictions}
    first = [*IDENTITY, "seed", *(f"option/{name}" for name in axes), "prompts"]
    frame = frame[[*first, *frame.columns.difference(first, sort=False)]]
    return RunRows.through_text(frame, prompts)


def no_runs(folder: Path) -> UserError:
    return UserError(f"no runs in {folder}: start them with `python run.py -m sweep={folder.name} ...`")


def _axes(frame: pd.DataFrame) -> list[str]:
    """Options with more than one value for the same data, model and label."""
    candidates = ["k", "beta", "refresh", *(name for name in frame.columns if name.startswith("option/"))]
    values = frame.dropna(subset="label").groupby(["dataset", "model", "label"])[candidates].nunique(dropna=False)
    return [name for name in candidates if (values[name] > 1).any()]


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], PerPrompt]:
    """One run's row, its config flattened, and its per-prompt results (empty if it has not finished)."""
    status, why = run_status(folder)
    with reading.reading(folder / "config.yaml"):
        config = reading.sound(store.plain_yaml((folder / "config.yaml").read_text(encoding="utf-8")))
        row, options = _row(folder.name, config, status, why), _flatten(config)
    if status != "finished":
        return row, options, {}
    metrics = reading.read_metrics(folder / "metrics.json")
    with reading.reading(folder / "metrics.json"):
        parts = shlex.split(metrics.get("command", ""))
        metrics |= {"command": shlex.join(part for part in parts if not part.startswith(PLACES))} if parts else {}
    ids, predictions = reading.read_predictions(folder / "predictions.jsonl", metrics)
    row |= {name: value for name, value in metrics.items() if name not in row}
    return row | {"prompts": store.digest(ids)}, options, predictions


def _row(name: str, config: dict[str, Any], status: str, why: str) -> dict[str, Any]:
    """What a run is, without its numbers."""
    choices = config["choices"]
    by_parts = choices["selector"] if choices["loss"] == "pl" else f"{choices['selector']}+{choices['loss']}"
    return {
        **{"name": name, "status": status, "why": why, "label": choices["method"] or by_parts, "prompts": None},
        **{group: choices[group] for group in GROUPS},
        **{key: config[key] for key in ("k", "beta", "refresh", "seed")},
    }


def expected_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"job", "command", "config"} of the runs that multiruns into this folder were to make."""
    path = folder / EXPECTED
    with reading.reading(path):
        runs = reading.read_json(path) if path.exists() else {}
        return {name: {**noted, "job": reading.as_cell(noted["job"])} for name, noted in runs.items()}


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _varied_options(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Options that differ between runs of the same choices, so those that the sweep itself varied: short name -> path.

    Options of the data keep their path: lines that differ in one answer different questions.
    An option that follows another one (`selector.k`, interpolated from `k`) is no axis of its own.
    """
    seen: dict[tuple[Any, ...], dict[str, set[Any]]] = {}
    for options in runs:
        group = seen.setdefault(tuple(options.get(f"choices.{name}") for name in GROUPS), {})
        for path, value in options.items():
            group.setdefault(path, set()).add(value)
    paths = {path for group in seen.values() for path, values in group.items() if len(values) > 1}
    known = {tuple(options.get(path) for options in runs) for path in ("k", "beta", "refresh", "seed", "name")}
    axes: dict[str, str] = {}
    for path in sorted(paths):
        values = tuple(options.get(path) for options in runs)
        if "." in path and not f"{path}.".startswith(NO_AXIS) and not _follows(values, known):
            known.add(values)
            short = path.rsplit(".", 1)[1]
            axes[path if short in axes or path.startswith(DATA) else short] = path
    return axes


def _follows(values: tuple[Any, ...], known: set[tuple[Any, ...]]) -> bool:
    """Is the option the same as a known one wherever it exists?"""
    return any(
        all(value is None or value == other for value, other in zip(values, column, strict=True)) for column in known
    )
