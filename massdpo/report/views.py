"""What the report of each sweep shows: its title, the metrics of its tables, and its figures."""

import math
from dataclasses import dataclass
from typing import TypeVar

from massdpo.evaluation.metrics import described

T = TypeVar("T")


def metric_name(metric: str, *notes: str) -> str:
    """The metric's label, with its unit and notes."""
    known = described(metric)
    notes = (known.unit, *notes) if known.unit else notes
    return f"{known.label} ({', '.join(notes)})" if notes else known.label


def axis_name(metric: str) -> str:
    """The metric's name on an axis, which also says where lower is better."""
    return metric_name(metric, *(["lower is better"] if described(metric).better < 0 else []))


def shown(value: object) -> str:
    """An option's value; empty for a line that the option does not apply to."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def shares(values: list[T], most: int) -> list[list[T]]:
    """The values in as few lists of at most `most` as possible, as equal in length as possible."""
    count = max(1, math.ceil(len(values) / most))
    return [values[len(values) * at // count : len(values) * (at + 1) // count] for at in range(count)]


@dataclass(frozen=True)
class View:
    """Tables show `metrics`; `figure` is `lines` (over a numeric option that the sweep varies; `dots` if there is
    none), `dots` (a mean and interval per method), `front` (pairs of metrics against each other) or `curves` (columns
    of `history.csv` over steps). `front` draws `dots`, too, if no run has both metrics of a pair.
    `x`: the option of the lines' axis, `group`: the column whose values are coloured; as the sweep suggests, if empty.
    `best_on`: if an option is varied, another table with each method at its best value by this validation metric.
    `differences`: another figure, of the paired differences from random. `against`: another table, of those from this
    method. `rows_of`: the sweep whose runs are shown, if it is another one; `labels` and `datasets`: only these of
    them.
    """

    title: str
    metrics: tuple[str, ...]
    figure: str = "lines"
    x: str = ""
    group: str = "label"
    pairs: tuple[tuple[str, str], ...] = ()
    curves: tuple[str, ...] = ()
    best_on: str | None = None
    differences: bool = False
    against: str | None = None
    rows_of: str | None = None
    labels: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


QUALITY = ("accuracy", "ndcg@5", "reward_accuracy", "margin")
DEFAULT = View("{sweep}", QUALITY)

VIEWS = {  # in the order in which a reader asks
    "small": View(
        "Real models",
        ("accuracy", "ndcg@5", "reward_accuracy", "margin", "chosen_logp_change"),
        "dots",
        differences=True,
        against="mass",
    ),
    "small_rates": View("Real models: learning rates", QUALITY, best_on="val/ndcg@5"),
    "small_negatives": View("Real models: number of negatives", QUALITY, x="k"),
    "small_beta": View("Real models: reward scale", QUALITY, x="beta"),
    "demo": View("Demonstration: selectors on the default dataset", QUALITY, differences=True),
    "main": View(
        "Main comparison",
        ("accuracy", "reward_accuracy", "margin", "margin_max", "chosen_logp_change"),
        "dots",
        differences=True,
        against="mass",
    ),
    "ranking": View(
        "Ranking",
        (
            *("recall@1", "recall@3", "recall@5", "recall@10", "ndcg@3", "ndcg@5", "ndcg@10", "mrr"),
            *("ndcg@5_sum", "mrr_sum"),
        ),
        "dots",
        rows_of="main",
    ),
    "negatives": View("Number of negatives", QUALITY, x="k"),
    "refresh": View("When negatives are selected again", QUALITY, "dots"),
    "beta": View("Reward scale", QUALITY, x="beta"),
    "cost": View(
        "Cost",
        ("accuracy", "train_seconds", "select_seconds", "fed_tokens", "train_tokens", "peak_memory_mb"),
        "front",
        pairs=(("train_seconds", "accuracy"), ("peak_memory_mb", "accuracy")),
    ),
    "learning_rate": View("Learning rate", QUALITY, best_on="val/accuracy"),
    "dynamics": View(
        "Training dynamics",
        QUALITY,
        "curves",
        curves=("val/accuracy", "val/reward_accuracy", "val/margin", "val/chosen_logp_change"),
        rows_of="main",
        labels=("sdpo", "mass", "hardest", "full"),
        datasets=("synthetic_mcqa", "synthetic_rec", "lastfm"),
    ),
    "pool": View("Size of the pool", QUALITY),
    "near_duplicates": View("Near-duplicates in the pool", QUALITY),
    "features": View("Features behind the selection", QUALITY, "dots"),
    "front": View(
        "The whole front",
        ("accuracy", "ndcg@5", "ndcg@5_sum", "reward_accuracy", "reward_accuracy_pairwise", "margin", "margin_max"),
        "front",
        pairs=(("ndcg@5_sum", "ndcg@5"), ("reward_accuracy", "ndcg@5"), ("margin", "ndcg@5_sum")),
    ),
}


def view_of(sweep: str) -> View:
    return VIEWS.get(sweep, DEFAULT)


def rows_of(sweep: str) -> str:
    """The sweep whose runs a sweep's report shows."""
    return view_of(sweep).rows_of or sweep
