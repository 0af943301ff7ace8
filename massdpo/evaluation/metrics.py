"""Ranking and reward metrics: the values of each prompt first, then their means, so that intervals can be computed.

Suffixes: B prompts, C = 1 + N candidates (column 0 is the chosen one, the target of the ranking).
Masks are boolean, True where a candidate exists.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

CUTOFFS = (1, 3, 5, 10, 20)


def target_ranks(scores_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """The rank of the target (column 0) among a prompt's candidates by score, int64 `(B,)`, 1 is best.

    Ties count against the target, and so does NaN: a NaN target ranks last, a NaN rival counts as above the target.
    """
    target_B1, rivals_BN = scores_BC[:, :1], scores_BC[:, 1:]
    # "not below" instead of "at or above": a comparison with NaN is False, which must not help the target.
    not_below_BN = ~(rivals_BN < target_B1) & mask_BC[:, 1:]
    return 1 + not_below_BN.sum(-1)


def ranking_values(rank_B: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, Tensor]:
    """Each ranking metric of each prompt, float64 `(B,)`, for one relevant candidate at rank `rank_B`.

    With a single relevant candidate the ideal DCG is 1, so NDCG@k = 1 / log2(1 + rank) where rank <= k (Järvelin and
    Kekäläinen, 2002), recall@k = hit rate at k, and MRR is the mean of 1 / rank.
    """
    rank_B = rank_B.double()
    values = {"accuracy": (rank_B == 1).double()}
    values |= {f"recall@{k}": (rank_B <= k).double() for k in cutoffs}
    values |= {f"ndcg@{k}": (rank_B <= k) / torch.log2(1 + rank_B) for k in cutoffs}
    values["mrr"] = 1 / rank_B
    return values


def ranking_metrics(rank_B: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over prompts of `ranking_values`."""
    return _means(ranking_values(rank_B, cutoffs))


def reward_values(rewards_BC: Tensor, mask_BC: Tensor, chosen_logp_change_B: Tensor) -> dict[str, Tensor]:
    """Each reward metric of each prompt, float64 `(B,)`; every prompt has at least one rejected response.

    `reward_accuracy`: is the chosen reward above ALL rejected ones; `reward_accuracy_pairwise`: above how many;
    `margin`, `margin_max`: how far it is above their mean and above the best of them (reward units: beta x nats).
    `chosen_logp_change`: nats by which the chosen response became likelier than under the reference.
    A NaN reward is never a win, and makes the prompt's margin NaN.
    """
    rewards_BC, rejected_BN = rewards_BC.double(), mask_BC[:, 1:]
    negatives_B = rejected_BN.sum(-1)
    margin_BN = rewards_BC[:, :1] - rewards_BC[:, 1:]
    wins_BN = (margin_BN > 0) & rejected_BN
    return {
        "reward_accuracy": (wins_BN.sum(-1) == negatives_B).double(),
        "reward_accuracy_pairwise": wins_BN.sum(-1) / negatives_B.double(),
        "margin": margin_BN.masked_fill(~rejected_BN, 0).sum(-1) / negatives_B,
        "margin_max": margin_BN.masked_fill(~rejected_BN, torch.inf).amin(-1),
        "chosen_reward": rewards_BC[:, 0],
        "rejected_reward": rewards_BC[:, 1:].masked_fill(~rejected_BN, 0).sum(-1) / negatives_B,
        "chosen_logp_change": chosen_logp_change_B.double(),
    }


def reward_metrics(rewards_BC: Tensor, mask_BC: Tensor, chosen_logp_change_B: Tensor) -> dict[str, float]:
    """Means over prompts of `reward_values`."""
    return _means(reward_values(rewards_BC, mask_BC, chosen_logp_change_B))


def _means(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value_B.mean()) for name, value_B in values.items()}


def mean_interval(values: Sequence[float] | NDArray[np.floating], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its t interval; the half-width of fewer than two values is NaN (not known), not 0."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()) if len(array) else float("nan"), float("nan")
    half = stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(half)
