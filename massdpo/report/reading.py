"""The files of results, read as data that may be damaged or somebody else's: what leaves here has a run's own form.

Every function raises `UserError` in one line: the file, what is wrong with it, and what helps.
"""

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from numpy.typing import NDArray
from pandas.api.types import is_numeric_dtype

from massdpo.errors import UserError
from massdpo.evaluation.metrics import METRICS, ranking_values

GROUPS = ["dataset", "model", "selector", "loss", "method"]
STATES = ("running", "finished", "interrupted", "failed")
FIELDS = {  # what is kept of a prompt: the columns of predictions.jsonl that metrics come from; older runs have not all
    **{metric.column: np.float32 for metric in METRICS.values() if metric.column},
    **{"rank": np.uint16, "rank_sum": np.uint16, "reward_correct": np.bool_},
}
TEXTS = ["name", "status", "why", *GROUPS, "label", "refresh", "prompts", "git_commit", "machine", "command"]
IDENTITY = ["name", "status", "why", "dataset", "model", "label", "method", "selector", "loss", "k", "beta", "refresh"]
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
LARGEST = 2**63 - 1

Prompts = dict[str, NDArray[Any]]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a parser makes of damaged content becomes one line."""
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise UserError(f"{path} cannot be read ({why}): remove its run's folder, or make it again") from error


def read_config(path: Path) -> dict[str, Any]:
    """A run's config: plain values, the choices and the options that every table needs among them."""
    with reading(path):
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.CSafeLoader)):
            raise ValueError("an alias: a run writes none, and a few lines of them can fill any memory")
        return _checked_config(_plain(yaml.load(text, Loader=yaml.CSafeLoader)))


def read_expected(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> what a multirun noted of a run: texts (its job, its command), and its resolved config."""
    with reading(path):
        expected = _plain(json.loads(path.read_text(encoding="utf-8")))
        for run in expected.values():
            _checked_config(run["config"])
            if not all(isinstance(run[name], str) for name in ("job", "command")):
                raise TypeError("a job or command that is no text")
        return dict(expected)


def read_status(path: Path) -> tuple[str, str]:
    """A run's state, and for a failed or interrupted one why."""
    with reading(path):
        status = _plain(json.loads(path.read_text(encoding="utf-8")))
        if status["status"] not in STATES:
            raise ValueError(f"status {status['status']!r} is none of {', '.join(STATES)}")
        return status["status"], _no_formula(_text(status.get("why") or ""))


def read_metrics(path: Path) -> dict[str, Any]:
    """Flat: numbers, and texts about where they come from."""
    with reading(path):
        metrics = _plain(json.loads(path.read_text(encoding="utf-8")))
        for name, value in metrics.items():
            if not (isinstance(value, str) if name in TEXTS else isinstance(value, int | float | None)):
                raise TypeError(f"{name} is {value!r:.40}")
        return {name: _no_formula(value) if isinstance(value, str) else value for name, value in metrics.items()}


def read_predictions(path: Path, metrics: dict[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
    """Ids of the test prompts in their order by name, and each of `FIELDS` that is there, in that order.

    They are the prompts that `metrics` were measured on: a file cut short, or with a line twice, is refused.
    """
    with reading(path):
        with open(path, encoding="utf-8") as file:
            lines = [_plain(json.loads(line)) for line in file]
        ids = [str(line["id"]) for line in lines]
        if not lines or len(set(ids)) < len(ids):
            raise ValueError("a prompt twice" if lines else "no prompt")
        for line in lines:
            ranks = line["rank"], line["rank_sum"]
            if not all(type(rank) is int and 1 <= rank <= np.iinfo(np.uint16).max for rank in ranks):
                raise ValueError(f"ranks {ranks!r:.40}")
            if not isinstance(line["margin"], int | float) or not isinstance(line["reward_correct"], bool):
                raise TypeError(f"margin {line['margin']!r:.40}, reward_correct {line['reward_correct']!r:.40}")
        for name, values in ranking_values(torch.tensor([line["rank"] for line in lines])).items():
            mean = float(values.mean())
            if abs(metrics.get(name, mean) - mean) > 1e-6:
                raise ValueError(f"{len(lines)} prompts with {name} {mean:.4f}, in metrics.json {metrics[name]:.4f}")
        lines.sort(key=lambda line: str(line["id"]))
        there = [name for name in FIELDS if all(isinstance(line.get(name), int | float) for line in lines)]
        return sorted(ids), {name: [line[name] for line in lines] for name in there}


def read_history(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Steps of the preference stage and the columns asked for, all of them numbers; step 0 is the SFT start."""
    with reading(path):
        frame = pd.read_csv(path)
        columns = tuple(column for column in columns if column in frame)
        _only_numbers(frame, ["step", *columns])
        measured = frame[frame[list(columns)].notna().any(axis=1)]
        start = measured[measured["stage"] == "sft"].tail(1).assign(step=0)
        frame = pd.concat([start, measured[measured["stage"] == "preference"]], ignore_index=True)
        return frame[["step", *columns]]


def read_histories(path: Path) -> pd.DataFrame:
    """Histories of the runs of a sweep, one below the other."""
    with reading(path):
        frame = pd.read_csv(path, dtype={"dataset": str, "model": str, "label": str})
        _only_numbers(frame, [name for name in frame.columns if name not in ("dataset", "model", "label")])
        if frame[["dataset", "model", "label", "seed", "step"]].isna().any(axis=None):
            raise ValueError("a row without dataset, model, label, seed or step")
        return frame


def read_prompts(path: Path) -> Prompts:
    """The arrays of `prompts.npz`; never a pickle."""
    with reading(path), np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def read_rows(csv: Path | io.StringIO, prompts: Prompts) -> pd.DataFrame:
    """`rows.csv`, a row per run; those that name a set of `prompts` are as many as the arrays of that set have rows."""
    with reading(csv if isinstance(csv, Path) else Path("rows.csv")):
        frame = pd.read_csv(csv, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])
        if missing := [name for name in (*IDENTITY, "seed", "prompts") if name not in frame]:
            raise ValueError(f"no column {missing[0]}")
        numbers = [name for name in frame.columns if name not in TEXTS and not name.startswith("option/")]
        _only_numbers(frame, numbers)
        if not frame["status"].isin([*STATES, "missing"]).all():
            raise ValueError("unknown status")
        run = frame[frame["label"].notna()]
        if run[["name", "dataset", "model", "k", "beta", "refresh", "seed"]].isna().any(axis=None):
            raise ValueError("a run without name, data, model, k, beta, refresh or seed")
        for key, rows in frame.groupby("prompts").size().items():
            shapes = {values.shape for name, values in prompts.items() if name.startswith(f"{key}/")}
            if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] != rows:
                raise ValueError(f"{rows} runs of the prompts {key}, and arrays of other shapes beside them")
        return frame


def _plain(value: Any) -> Any:
    """The value of texts that can be printed, numbers that fit a column, lists and mappings, and nothing else."""
    if isinstance(value, dict):
        return {_text(key): _plain(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_plain(inside) for inside in value]
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST):
        return value
    raise TypeError(f"{value!r:.40} is no plain value")


def _text(value: Any) -> str:
    """On one line: a table and its CSV have no place for more."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return "".join(char if char.isprintable() else " " for char in value)


def _no_formula(text: str) -> str:
    """A spreadsheet that opens `rows.csv` computes what begins like this."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _checked_config(config: Any) -> dict[str, Any]:
    choices = config["choices"]
    for group in GROUPS:
        choice = choices[group]
        if not (isinstance(choice, str) and NAME.fullmatch(choice)) and not (group == "method" and choice is None):
            raise ValueError(f"choices.{group} is {choice!r:.40}")
    if not (type(config["k"]) is int and type(config["seed"]) is int and isinstance(config["refresh"], str)):
        raise TypeError("k, seed or refresh is no such value")
    if type(config["beta"]) not in (int, float) or not math.isfinite(config["beta"]):
        raise ValueError(f"beta is {config['beta']!r:.40}")
    return dict(config)


def _only_numbers(frame: pd.DataFrame, names: list[str]) -> None:
    for name in names:
        if not is_numeric_dtype(frame[name]) and frame[name].notna().any():
            raise ValueError(f"column {name} holds something else than numbers")
