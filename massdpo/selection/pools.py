"""What selectors share: checks of options and pools, ties by chance, the k best of a pool, overlap.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.selection import logdet
from massdpo.tensors import Picks, PoolStatistics, first, members, rows


class Selector(Protocol):
    """What training asks of a selector."""

    @property
    def features(self) -> str | None: ...

    @property
    def needs_scores(self) -> bool: ...

    def __call__(self, pool: PoolStatistics) -> Picks: ...


class PickK(ABC):
    """A selector of k negatives. `pick` sees pools that have been checked, with their negatives by falling noise.

    In that order, taking the first of equals decides ties by chance.
    """

    features: str | None = None
    needs_scores = True

    def __init__(self, k: int, short_pool: str = "error"):
        logdet.check_name("short_pool", short_pool, ("error", "all"))
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise UserError(f"k must be a whole number of at least 1, got {k!r}")
        self.k, self.short_pool = k, short_pool

    def __call__(self, pool: PoolStatistics) -> Picks:
        self.check(pool)
        order_BN = noise_order(pool)
        return _put_back(self.pick(_reorder(pool, order_BN)), order_BN)

    @abstractmethod
    def pick(self, pool: PoolStatistics) -> Picks: ...

    def check(self, pool: PoolStatistics) -> None:
        """Raise UserError for pools that are too small, or where what the selector looks at is not finite."""
        if self.needs_scores:
            check_finite(pool)
        check_pools(pool.mask_BN.sum(-1), self.k, self.short_pool)


def check_pools(sizes: Sequence[int] | Tensor, k: int, short_pool: str) -> None:
    """Raise UserError where pools (`sizes`: a prompt's negatives) are smaller than k, unless `short_pool` is `all`."""
    if short_pool == "all":
        return
    sizes = torch.as_tensor(sizes)
    if short := int((sizes < k).sum()):
        raise UserError(
            f"{short} of {len(sizes)} prompts have fewer than k={k} negatives (the smallest pool: {int(sizes.min())}): "
            "set selector.short_pool=all to train on the whole pool there, or lower k"
        )


def check_selection(options: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Raise UserError where a selector with these options cannot pick from pools of these sizes."""
    if "k" in options:
        check_pools(sizes, options["k"], options.get("short_pool", "error"))
    if options.get("solver") == "exact":
        logdet.check_exact(max(sizes), options["k"])


def check_finite(pool: PoolStatistics) -> None:
    """Raise UserError, naming the examples, where a real candidate's log-probs or features are not finite."""
    scores = pool.scores
    found = {
        "log-probabilities": scores.logp_BC,
        "reference log-probabilities": pool.ref_logp_BC,
        "features": scores.features_BCD if scores.gram_BCC is None else scores.gram_BCC.diagonal(dim1=-2, dim2=-1),
    }
    values = {what: value for what, value in found.items() if value is not None}
    if math.isfinite(float(sum(value.sum() for value in values.values()))):  # the device is waited for once
        return
    for what, value in values.items():
        bad_BC = ~value.isfinite().reshape(*scores.mask_BC.shape, -1).all(-1) & scores.mask_BC
        if names := [str(name) for name, bad in zip(pool.ids, bad_BC.any(-1).tolist(), strict=True) if bad]:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"{what} that are not finite for {len(names)} of {len(pool.ids)} prompts ({shown}): the policy has "
                "diverged or its dtype overflows; lower the learning rate or use another precision"
            )


def take_best(pool: PoolStatistics, score_BN: Tensor, k: int, short_pool: str = "error") -> Picks:
    """The k best negatives of each pool by score, best first; equal scores are decided by the noise."""
    check_pools(pool.mask_BN.sum(-1), k, short_pool)
    order_BN = noise_order(pool)
    return _put_back(best(score_BN.gather(1, order_BN), pool.mask_BN.gather(1, order_BN), k), order_BN)


def best(score_BN: Tensor, mask_BN: Tensor, k: int) -> Picks:
    """The k best by score, best first, and the first of equals."""
    score_BN = score_BN.double().masked_fill(~mask_BN, -math.inf)
    return in_order(score_BN.argsort(dim=-1, descending=True, stable=True)[:, :k], mask_BN)


def in_order(index_BK: Tensor, mask_BN: Tensor) -> Picks:
    """Picks of these negatives, of which the real ones come first."""
    return Picks(index_BK, first(mask_BN.sum(-1), index_BK.shape[1]))


def noise_order(pool: PoolStatistics) -> Tensor:
    """Negatives by falling noise, `(B, N)`."""
    return pool.noise_BN.argsort(dim=-1, descending=True, stable=True)


def _reorder(pool: PoolStatistics, order_BN: Tensor) -> PoolStatistics:
    """The same pools with their negatives in another order; the chosen response stays first."""
    order_BC = torch.nn.functional.pad(order_BN + 1, (1, 0))
    row_B1, scores = rows(order_BC), pool.scores
    columns = {
        name: value[row_B1, order_BC]
        for name in ("logp_BC", "token_logp_BCT", "length_BC", "mask_BC", "features_BCD", "gram_BCC")
        if (value := getattr(scores, name)) is not None
    }
    if scores.gram_BCC is not None:
        columns["gram_BCC"] = columns["gram_BCC"].gather(2, order_BC[:, None].expand_as(scores.gram_BCC))
    ref_logp_BC, noise_BN = pool.ref_logp_BC[row_B1, order_BC], pool.noise_BN.gather(1, order_BN)
    return replace(pool, scores=replace(scores, **columns), ref_logp_BC=ref_logp_BC, noise_BN=noise_BN)


def _put_back(picks: Picks, order_BN: Tensor) -> Picks:
    """Picks from reordered pools, as places in the pools as they were."""
    return replace(picks, index_BK=order_BN.gather(1, picks.index_BK) * picks.mask_BK)


def overlap(a: Picks, b: Picks) -> Tensor:
    """Jaccard similarity `(B,)` of two selections from the same pools; two empty ones count as equal."""
    size = 1 + int(max(a.index_BK.max(), b.index_BK.max()))
    in_a, in_b = (members(picks.index_BK, picks.mask_BK, size) for picks in (a, b))
    either_B = (in_a | in_b).sum(-1)
    return torch.where(either_B == 0, 1.0, (in_a & in_b).sum(-1) / either_B.clamp(min=1))
