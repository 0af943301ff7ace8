"""What selectors share: checks of the pools and options, the k best of a pool, ties by chance, overlap.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.selection import logdet
from massdpo.tensors import Picks, PoolStatistics, first


class Selector(Protocol):
    """What training asks of a selector."""

    @property
    def features(self) -> str | None: ...

    @property
    def needs_scores(self) -> bool: ...

    def __call__(self, pool: PoolStatistics) -> Picks: ...


def check_options(k: int, short_pool: str) -> None:
    """Raise UserError for a k or a `short_pool` that cannot be."""
    logdet.check_name("short_pool", short_pool, ("error", "all"))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UserError(f"k must be a whole number of at least 1, got {k!r}")


def check_pools(sizes: Sequence[int] | Tensor, k: int, short_pool: str) -> None:
    """Raise UserError where pools (`sizes`: a prompt's negatives) are smaller than k, unless `short_pool` is `all`."""
    sizes = torch.as_tensor(sizes)
    short = int((sizes < k).sum())
    if short and short_pool == "error":
        raise UserError(
            f"{short} of {len(sizes)} prompts have fewer than k={k} negatives (the smallest pool: {int(sizes.min())}): "
            "set selector.short_pool=all to train on the whole pool there, or lower k"
        )


def check_selection(options: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Raise UserError where these pools cannot be selected from with the options of a selector, as far as they tell."""
    if "k" in options:
        check_pools(sizes, options["k"], options.get("short_pool", "error"))
    if options.get("solver") == "exact":
        logdet.check_exact(max(sizes), options["k"])


def check_finite(pool: PoolStatistics, features: Tensor | None = None) -> None:
    """Raise UserError, naming the examples, where the log-probs or the features of a real candidate are not finite."""
    for what, value in (
        ("log-probabilities", pool.scores.logp_BC),
        ("reference log-probabilities", pool.ref_logp_BC),
        ("features", features),
    ):
        if value is None or math.isfinite(float(value.sum())):  # one pass; only where it is not, look closer
            continue
        bad_BC = ~(value if value.dim() == 2 else value.flatten(2)).isfinite().reshape(*value.shape[:2], -1).all(-1)
        rows = (bad_BC & pool.scores.mask_BC).any(-1).nonzero()[:, 0].tolist()
        if rows:
            names = ", ".join(str(pool.ids[row]) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
            raise UserError(
                f"{what} that are not finite for {len(rows)} of {len(pool.ids)} prompts ({names}): the policy has "
                "diverged or its dtype overflows; lower the learning rate or use another precision"
            )


def take_best(pool: PoolStatistics, score_BN: Tensor, k: int, short_pool: str = "error") -> Picks:
    """The k best negatives of each pool by score, best first; equal scores are decided by the noise."""
    mask_BN = pool.mask_BN
    check_pools(mask_BN.sum(-1), k, short_pool)
    width = min(k, mask_BN.shape[1])
    by_noise_BN = noise_order(pool)
    score_BN = score_BN.double().masked_fill(~mask_BN, -math.inf).gather(1, by_noise_BN)
    order_BN = by_noise_BN.gather(1, score_BN.argsort(dim=-1, descending=True, stable=True))
    return as_picks(order_BN[:, :width], first(mask_BN.sum(-1), width))


def noise_order(pool: PoolStatistics) -> Tensor:
    """Negatives by falling noise `(B, N)`: in this order, taking the first of equals decides ties by chance."""
    return pool.noise_BN.argsort(dim=-1, descending=True, stable=True)


def as_picks(index_BK: Tensor, mask_BK: Tensor, info: dict[str, Tensor] | None = None) -> Picks:
    return Picks(index_BK * mask_BK, mask_BK, info or {})


def overlap(a: Picks, b: Picks) -> Tensor:
    """Jaccard similarity `(B,)` of two selections from the same pools; two empty ones count as equal."""
    size = 1 + int(max(a.index_BK.max(), b.index_BK.max()))
    in_a, in_b = _membership(a, size), _membership(b, size)
    either_B = (in_a | in_b).sum(-1)
    return torch.where(either_B == 0, 1.0, (in_a & in_b).sum(-1) / either_B.clamp(min=1))


def _membership(picks: Picks, size: int) -> Tensor:
    zeros = torch.zeros(len(picks.index_BK), size, dtype=torch.int64, device=picks.index_BK.device)
    return zeros.scatter_add(1, picks.index_BK, picks.mask_BK.long()) > 0
