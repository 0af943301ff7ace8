"""The files of results: read, or refused in one line that names the file, what is wrong, and what to do."""

import io
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pandas.api.types import is_numeric_dtype

from massdpo.errors import UserError, one_line
from massdpo.evaluation.metrics import METRICS, ranking_values

GROUPS = ["dataset", "model", "selector", "loss", "method"]
STATES = ("finished", "missing", "interrupted", "failed", "running")  # as a list shows them: what needs doing last
FIELDS = {  # recorded per prompt: the columns of predictions.jsonl that metrics come from; older runs lack some
    **{metric.column: np.float32 for metric in METRICS.values() if metric.column},
    **{"rank": np.uint16, "rank_sum": np.uint16, "reward_correct": np.bool_},
}
TEXTS = ["name", "status", "why", *GROUPS, "label", "refresh", "prompts", "git_commit", "machine", "command"]
OF_RUN = ["dataset", "model", "label", "seed"]  # which run a row of histories.csv belongs to
IDENTITY = ["name", "status", "why", "dataset", "model", "label", "method", "selector", "loss", "k", "beta", "refresh"]

PerPrompt = dict[str, NDArray[Any]]  # results of a run, one per test prompt, by field


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error that damaged content causes into one `UserError`."""
    try:
        yield
    except Exception as error:
        why = one_line(error, with_type=True)
        raise UserError(f"{path} cannot be read ({why}): delete its run's folder, or run it again") from error


def sound(value: Any) -> Any:
    """The value itself; UnicodeEncodeError if a text in it has a lone surrogate, which UTF-8 cannot encode."""
    json.dumps(value, ensure_ascii=False, default=str).encode()
    return value


def read_json(path: Path) -> Any:
    return sound(json.loads(path.read_text(encoding="utf-8")))


def run_status(folder: Path) -> tuple[str, str]:
    """A run's state (running, finished, interrupted, failed), and why if it failed or was interrupted."""
    path = folder / "status.json"
    if not path.exists():
        return "running", ""
    with reading(path):
        status = read_json(path)
        if status["status"] not in STATES:
            raise ValueError(f"unknown status {status['status']!r:.40}")
        return status["status"], as_cell(status.get("why") or "")


def read_metrics(path: Path) -> dict[str, Any]:
    """A flat dict: numbers, and texts about where they come from."""
    with reading(path):
        return {name: as_cell(value) if name in TEXTS else value for name, value in read_json(path).items()}


def read_predictions(path: Path, metrics: dict[str, Any]) -> tuple[list[str], PerPrompt]:
    """Ids of the test prompts, sorted, and each of the `FIELDS` that the file has, in the order of the ids.

    They must be the prompts that `metrics` were measured on: a truncated file or one with a repeated line is refused.
    """
    with reading(path), open(path, encoding="utf-8") as file:
        lines = sorted((sound(json.loads(line)) for line in file), key=lambda line: str(line["id"]))
        ids = [str(line["id"]) for line in lines]
        if not lines or len(set(ids)) < len(ids):
            raise ValueError("a prompt appears twice" if lines else "no prompts")
        there = [name for name in FIELDS if all(isinstance(line.get(name), int | float) for line in lines)]
        prompts: PerPrompt = {name: np.array([line[name] for line in lines], FIELDS[name]) for name in there}
        ranked = ranking_values(torch.tensor(prompts["rank"].astype(np.int64)))
        means = {name: float(values.mean()) for name, values in ranked.items()}
        if "margin" in prompts:  # ranks of a policy that is always right do not tell prompts apart
            means["margin"] = float(prompts["margin"].astype(float).mean())
        for name, mean in means.items():
            told = metrics.get(name, mean)
            if math.isfinite(told) and not math.isclose(told, mean, rel_tol=1e-4, abs_tol=1e-6):
                raise ValueError(f"{len(lines)} prompts with {name} {mean:.4f}, in metrics.json {told:.4f}")
        return ids, prompts


def read_history(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Steps of the preference stage with the given columns, all of them numbers; step 0 is the SFT start."""
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
        frame = pd.read_csv(path, dtype=dict.fromkeys(OF_RUN[:3], str))
        _only_numbers(frame, frame.columns.difference(OF_RUN[:3]))
        if frame[[*OF_RUN, "step"]].isna().any(axis=None):
            raise ValueError("a row without dataset, model, label, seed or step")
        return frame


def read_prompts(path: Path, frame: pd.DataFrame) -> dict[str, PerPrompt]:
    """The per-prompt results of the runs in `frame`, by their names, from `prompts.npz`; never a pickle."""
    found: dict[str, PerPrompt] = {}
    with reading(path), np.load(path, allow_pickle=False) as data:
        for key, names in frame.groupby("prompts")["name"]:
            arrays = {field: data[f"{key}/{field}"] for field in FIELDS if f"{key}/{field}" in data}
            shapes = {values.shape for values in arrays.values()}
            if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] != len(names):
                raise ValueError(f"rows.csv has {len(names)} runs of the prompts {key}, and its arrays other shapes")
            for place, name in enumerate(names):
                found[name] = {field: values[place] for field, values in arrays.items()}
    return found


def read_rows(csv: Path | io.StringIO) -> pd.DataFrame:
    """`rows.csv`, a row per run."""
    with reading(csv if isinstance(csv, Path) else Path("rows.csv")):
        frame = pd.read_csv(csv, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])
        _only_numbers(frame, [name for name in frame.columns if name not in TEXTS and not name.startswith("option/")])
        run = frame.loc[frame["label"].notna(), [*IDENTITY, "seed", "prompts"]]
        if run[["name", "dataset", "model", "k", "beta", "refresh", "seed"]].isna().any(axis=None):
            raise ValueError("a run without name, data, model, k, beta, refresh or seed")
        if run["name"].duplicated().any():
            raise ValueError("two rows for one run")
        return frame.copy()  # pandas warns of a frame that was built column by column


def as_cell(text: str) -> str:
    """A text for `rows.csv`: on one line, and not a formula to a spreadsheet that opens it."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _only_numbers(frame: pd.DataFrame, names: Iterable[str]) -> None:
    for name in names:
        if not is_numeric_dtype(frame[name]) and frame[name].notna().any():
            raise ValueError(f"column {name} holds something other than numbers")
