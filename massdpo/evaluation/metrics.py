"""`METRICS`, the table of all metrics: what each is called, means, is measured in, and how it is computed.

`metrics.json`, `predictions.jsonl`, the table at a run's end, `trainer.keep_metric`, the report with its paired
differences, and the page docs/runs.md all follow this table: a new metric is one entry.

Suffixes: B prompts, C = 1 + N candidates (column 0 is the chosen one, the target of the ranking).
Masks are boolean, True where a candidate exists.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from massdpo.config.messages import near
from massdpo.errors import UserError

CUTOFFS = (1, 3, 5, 10, 20)


@dataclass(frozen=True)
class Rewards:
    """A batch's rewards: beta times the nats by which each response became likelier than under the reference."""

    rewards_BC: Tensor
    mask_BC: Tensor
    chosen_logp_change_B: Tensor  # nats

    @property
    def margin_BN(self) -> Tensor:
        return self.rewards_BC[:, :1] - self.rewards_BC[:, 1:]

    @property
    def wins_BN(self) -> Tensor:
        return (self.margin_BN > 0) & self.mask_BC[:, 1:]

    def mean_rejected(self, value_BN: Tensor) -> Tensor:
        """Mean over the rejected responses that exist."""
        rejected_BN = self.mask_BC[:, 1:]
        return value_BN.masked_fill(~rejected_BN, 0).sum(-1) / rejected_BN.sum(-1)


@dataclass(frozen=True)
class Metric:
    """A number of `metrics.json` under its name there: the mean over prompts of a function, or one number per run."""

    name: str
    label: str  # in tables and figures
    meaning: str  # in docs/runs.md and the report's page
    unit: str = ""  # none: a share or the like, from 0 to 1
    better: int = 1  # 1: higher is better, -1: lower is, 0: a diagnosis
    of_rank: Callable[[Tensor], Tensor] | None = None  # (B,) ranks -> (B,) values
    of_rewards: Callable[[Rewards], Tensor] | None = None
    column: str = ""  # of `predictions.jsonl` that it comes from; none: it cannot be compared prompt by prompt
    summary: bool = False  # in the table at a run's end


def _recall(k: int, rank_B: Tensor) -> Tensor:
    return rank_B <= k


def _ndcg(k: int, rank_B: Tensor) -> Tensor:
    return (rank_B <= k) / torch.log2(1 + rank_B)


RANKED = "share of prompts whose chosen response"
RANKING = (  # of one relevant candidate: its ideal DCG is 1 (Järvelin and Kekäläinen, 2002), and recall is the hit rate
    Metric(
        *("accuracy", "accuracy", f"{RANKED} ranks first among all candidates, by mean log-prob per token"),
        of_rank=partial(_recall, 1),
        summary=True,
    ),
    *(
        Metric(f"recall@{k}", f"recall@{k}", f"{RANKED} is among the first {k}", of_rank=partial(_recall, k))
        for k in CUTOFFS
    ),
    *(
        Metric(
            *(f"ndcg@{k}", f"NDCG@{k}"),
            f"mean of `1 / log2(1 + rank)`, and 0 where the chosen response is not among the first {k}",
            of_rank=partial(_ndcg, k),
            summary=k == 5,
        )
        for k in CUTOFFS
    ),
    Metric("mrr", "MRR", "mean of `1 / rank`", of_rank=lambda rank_B: 1 / rank_B, summary=True),
)
REWARDS = (  # a NaN reward is never a win, and makes the prompt's margin NaN
    Metric(
        *("reward_accuracy", "reward accuracy"),
        "share of prompts whose chosen reward is above **all** rejected rewards",
        of_rewards=lambda it: it.wins_BN.sum(-1) == it.mask_BC[:, 1:].sum(-1),
        column="reward_correct",
        summary=True,
    ),
    Metric(
        *("reward_accuracy_pairwise", "pairwise reward accuracy"),
        "share of rejected rewards below the chosen one, averaged over prompts",
        of_rewards=lambda it: it.mean_rejected(it.wins_BN.double()),
        summary=True,
    ),
    Metric(
        *("margin", "mean margin", "chosen reward minus the mean rejected reward, in β · nats", "β·nats"),
        of_rewards=lambda it: it.mean_rejected(it.margin_BN),
        column="margin",
        summary=True,
    ),
    Metric(
        *("margin_max", "max margin", "chosen reward minus the largest rejected reward", "β·nats"),
        of_rewards=lambda it: it.margin_BN.masked_fill(~it.mask_BC[:, 1:], torch.inf).amin(-1),
        column="margin_max",
        summary=True,
    ),
    Metric(
        *("chosen_reward", "chosen reward", "mean reward of the chosen response", "β·nats", 0),
        of_rewards=lambda it: it.rewards_BC[:, 0],
    ),
    Metric(
        *("rejected_reward", "rejected reward", "mean reward of the rejected responses", "β·nats", 0),
        of_rewards=lambda it: it.mean_rejected(it.rewards_BC[:, 1:]),
    ),
    Metric(
        *("chosen_logp_change", "chosen log-prob change"),
        "nats by which the chosen response became likelier than at the start; far below 0, the policy loses what it"
        " was taught (likelihood displacement)",
        *("nats", 0),
        of_rewards=lambda it: it.chosen_logp_change_B,
        column="chosen_logp_change",
        summary=True,
    ),
)
GENERATION = (
    Metric(
        *("hr@1", "generated the chosen one"),
        "share of prompts where greedy decoding writes the chosen response and nothing else, ignoring case and spaces"
        " (this and the next three only with `trainer.generate=true`)",
    ),
    Metric("valid_ratio", "generated a candidate", "share of prompts where it writes exactly one of the candidates"),
    Metric(
        *("hr@1_constrained", "hit rate, constrained"),
        "`hr@1` of greedy decoding held, token by token, to what continues some candidate",
    ),
    Metric(
        *("constrained_agreement", "constrained agreement"),
        "share of prompts where that yields the candidate with the largest summed log-prob",
    ),
)
COST = (
    Metric("k_effective", "negatives", "negatives per prompt that were actually trained on", "negatives", 0),
    Metric("train_seconds", "training", "time spent in the preference stage", "s", -1),
    Metric("select_seconds", "selection", "the part of that spent on scoring pools and selecting", "s", -1),
    Metric("fed_tokens", "fed forward", "tokens fed in the preference stage, selection included", "tokens", -1),
    Metric("train_tokens", "with gradients", "the part of them that gradients went through", "tokens", -1),
    Metric("tokens_per_second", "speed", "tokens fed to the model per second of the preference stage", "tokens/s"),
    Metric("peak_memory_mb", "peak memory", "the GPU's where there is one, else the process's", "MB", -1),
)
BY_SUM = tuple(
    replace(
        metric,
        name=f"{metric.name}_sum",
        label=f"{metric.label} (summed)",
        meaning="the same, ranked by the summed log-prob",
        column="rank_sum",
        summary=metric.name in ("accuracy", "ndcg@5"),
    )
    for metric in RANKING
)
METRICS = {
    metric.name: metric
    for metric in (*(replace(metric, column="rank") for metric in RANKING), *BY_SUM, *REWARDS, *GENERATION, *COST)
}


def described(name: str) -> Metric:
    """The entry of a metric, with validation or the catalogue in its label; just the name where it is unknown."""
    place, _, bare = name.rpartition("/")
    known = METRICS.get(bare, Metric(name, name.replace("_", " "), ""))
    notes = {"val": "validation", "catalogue": "whole catalogue", "sft": "SFT start"}
    if place not in notes or bare not in METRICS:
        return known if not place else Metric(name, name.replace("_", " "), "")
    column = "catalogue_rank" if place == "catalogue" and known.column == "rank" else ""
    return replace(known, name=name, label=f"{known.label} ({notes[place]})", column=column)


def standard_errors(prompts: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Of each metric's mean over prompts, from its column of `predictions.jsonl` where there is one."""
    found = {}
    for name, metric in METRICS.items():
        if metric.column in prompts and len(prompts[metric.column]) > 1:
            values = torch.tensor(prompts[metric.column], dtype=torch.float64)
            values = values if metric.of_rank is None else metric.of_rank(values).double()
            found[name] = float(values.std() / len(values) ** 0.5)
    return found


def check_keep_metric(name: str) -> None:
    """Raise UserError for a `trainer.keep_metric` that is unknown on validation, or where higher is not better."""
    names = [metric.name for metric in METRICS.values() if metric.better > 0 and (metric.of_rank or metric.of_rewards)]
    if name not in names:
        listed = " | ".join(known for known in names if not known.endswith("_sum"))
        raise UserError(
            f"trainer.keep_metric={name!r} is not allowed"
            f"{near(name, names) or f'; there are {listed}, and those of ranks with _sum'}"
        )


def target_ranks(scores_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """The rank of the target (column 0) among a prompt's candidates by score, int64 `(B,)`, 1 is best.

    Ties count against the target, and so does NaN: a NaN target ranks last, a NaN rival counts as above the target.
    """
    target_B1, rivals_BN = scores_BC[:, :1], scores_BC[:, 1:]
    # "not below" instead of "at or above": a comparison with NaN is False, which must not help the target.
    not_below_BN = ~(rivals_BN < target_B1) & mask_BC[:, 1:]
    return 1 + not_below_BN.sum(-1)


def ranking_values(rank_B: Tensor) -> dict[str, Tensor]:
    """Each ranking metric of each prompt, float64 `(B,)`, for one relevant candidate at rank `rank_B`."""
    rank_B = rank_B.double()
    return {metric.name: metric.of_rank(rank_B).double() for metric in RANKING if metric.of_rank}


def ranking_metrics(rank_B: Tensor) -> dict[str, float]:
    """Means over prompts of `ranking_values`."""
    return _means(ranking_values(rank_B))


def both_rankings(rank_B: Tensor, rank_sum_B: Tensor) -> dict[str, float]:
    """`ranking_metrics` of the ranks by mean log-prob and, as `_sum`, of those by summed log-prob."""
    return ranking_metrics(rank_B) | {f"{name}_sum": value for name, value in ranking_metrics(rank_sum_B).items()}


def reward_values(rewards_BC: Tensor, mask_BC: Tensor, chosen_logp_change_B: Tensor) -> dict[str, Tensor]:
    """Each reward metric of each prompt, float64 `(B,)`; every prompt has at least one rejected response."""
    rewards = Rewards(rewards_BC.double(), mask_BC, chosen_logp_change_B.double())
    return {metric.name: metric.of_rewards(rewards).double() for metric in REWARDS if metric.of_rewards}


def reward_metrics(rewards_BC: Tensor, mask_BC: Tensor, chosen_logp_change_B: Tensor) -> dict[str, float]:
    """Means over prompts of `reward_values`."""
    return _means(reward_values(rewards_BC, mask_BC, chosen_logp_change_B))


def _means(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value_B.mean()) for name, value_B in values.items()}
