"""What the report of each sweep shows: its title, the metrics of its tables, and its figures."""

from dataclasses import dataclass

LABEL_ORDER = (
    *("popularity", "lookup", "sft", "random", "sdpo", "dpo", "dmpo", "mppo", "pairwise", "full"),
    *("lipo", "ndcg", "hardest", "hardest_logp", "sampled", "top_random"),
    *("dpp", "farthest", "coreset", "medoids", "herding", "dynamic", "adpo", "interleaved", "mass"),
)
BASELINES = ("random", "sdpo")  # two names of one thing: k negatives drawn uniformly, PL loss

NAMES = {
    "accuracy": "accuracy",
    "reward_accuracy": "reward accuracy",
    "reward_accuracy_pairwise": "pairwise reward accuracy",
    "margin": "mean margin",
    "margin_max": "max margin",
    "mrr": "MRR",
    "mrr_sum": "MRR (summed)",
    "chosen_logp_change": "chosen log-prob change",
    "train_seconds": "training (s)",
    "select_seconds": "selection (s)",
    "tokens_per_second": "tokens/s",
    "peak_memory_mb": "peak memory (MB)",
}
UNITS = {"margin": "β·nats", "margin_max": "β·nats", "chosen_logp_change": "nats"}  # where the name holds none
LOWER_IS_BETTER = {"train_seconds", "select_seconds", "peak_memory_mb"}
ZERO_AT_START = {"reward_accuracy", "reward_accuracy_pairwise", "margin", "margin_max", "chosen_logp_change"}
NO_BEST = {"chosen_logp_change"}  # a diagnosis, not a goal


def metric_name(metric: str) -> str:
    if metric.startswith("val/"):
        return f"{metric_name(metric.removeprefix('val/'))} (validation)"
    if metric in NAMES:
        return NAMES[metric]
    name = metric.removesuffix("_sum").replace("ndcg", "NDCG").replace("_", " ")
    return f"{name} (summed)" if metric.endswith("_sum") else name


def axis_name(metric: str) -> str:
    """The metric's name as an axis shows it, with what its numbers mean."""
    bare = metric.removeprefix("val/")
    notes = ["validation"] if bare != metric else []
    notes += [UNITS[bare]] if bare in UNITS else []
    notes += ["lower is better"] if bare in LOWER_IS_BETTER else []
    return f"{metric_name(bare)} ({', '.join(notes)})" if notes else metric_name(bare)


def shown(value: object) -> str:
    """An option's value; nothing for a line that the option does not concern."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def label_rank(label: str) -> tuple[int, str]:
    return (LABEL_ORDER.index(label) if label in LABEL_ORDER else len(LABEL_ORDER), label)


@dataclass(frozen=True)
class View:
    """Tables show `metrics`; `figure` is `dots` (a mean and interval a method), `lines` (over the option that the sweep
    varies), `front` (pairs of metrics against each other) or `curves` (columns of `history.csv` over steps).
    `best_on`: where an option is varied, a further table with each method at its best value by this validation metric.
    `differences`: a further figure, of the paired differences to random. `against`: a further table, of those to this
    method. `rows_of`: the sweep whose runs are shown, where it is another one; `labels` and `datasets`: only these of
    them.
    """

    title: str
    metrics: tuple[str, ...]
    figure: str = "dots"
    pairs: tuple[tuple[str, str], ...] = ()
    curves: tuple[str, ...] = ()
    best_on: str | None = None
    differences: bool = False
    against: str | None = None
    rows_of: str | None = None
    labels: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


FEW_LABELS = ("sdpo", "mass", "hardest", "full")
FEW_DATASETS = ("synthetic_mcqa", "synthetic_rec", "lastfm")
QUALITY = ("accuracy", "ndcg@5", "reward_accuracy", "margin")
DEFAULT = View("{sweep}", QUALITY)

VIEWS = {
    "demo": View("Demonstration: selectors on the embedded default", QUALITY),
    "main": View(
        "Main comparison",
        ("accuracy", "reward_accuracy", "margin", "margin_max", "chosen_logp_change"),
        differences=True,
        against="mass",
    ),
    "ranking": View(
        "Ranking",
        (
            "recall@1",
            "recall@3",
            "recall@5",
            "recall@10",
            "ndcg@3",
            "ndcg@5",
            "ndcg@10",
            "mrr",
            "ndcg@5_sum",
            "mrr_sum",
        ),
        rows_of="main",
    ),
    "negatives": View("Number of negatives", QUALITY, "lines"),
    "beta": View("Reward scale", QUALITY, "lines"),
    "refresh": View("When negatives are selected again", QUALITY),
    "features": View("Features behind the selection", QUALITY),
    "learning_rate": View("Learning rate", QUALITY, "lines", best_on="val/accuracy"),
    "pool": View("Size of the pool", QUALITY, "lines"),
    "near_duplicates": View("Near-duplicates in the pool", QUALITY, "lines"),
    "dynamics": View(
        "Training dynamics",
        QUALITY,
        "curves",
        curves=("val/accuracy", "val/reward_accuracy", "val/margin", "val/chosen_logp_change"),
        rows_of="main",
        labels=FEW_LABELS,
        datasets=FEW_DATASETS,
    ),
    "cost": View(
        "Cost",
        ("accuracy", "ndcg@5", "train_seconds", "select_seconds", "tokens_per_second", "peak_memory_mb"),
        "front",
        pairs=(("train_seconds", "accuracy"), ("peak_memory_mb", "accuracy")),
        rows_of="main",
        labels=FEW_LABELS,
        datasets=FEW_DATASETS,
    ),
    "front": View(
        "The whole front",
        ("accuracy", "ndcg@5", "ndcg@5_sum", "reward_accuracy", "reward_accuracy_pairwise", "margin", "margin_max"),
        "front",
        pairs=(("ndcg@5_sum", "ndcg@5"), ("reward_accuracy", "ndcg@5"), ("margin", "ndcg@5_sum")),
    ),
}


def view_of(sweep: str) -> View:
    return VIEWS.get(sweep, DEFAULT)
