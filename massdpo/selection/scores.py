"""Selectors by the log-probs and rewards of each negative: one score, several, or none.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, S scores.
"""

import math
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.selection import logdet
from massdpo.selection.inclusion import of_draws_from_the_top, of_successive_draws
from massdpo.selection.pools import PickK, best, in_order, overlap
from massdpo.tensors import Picks, PoolStatistics, members, rows


class ByScore(PickK):
    """The k negatives with the largest `score_BN(pool)`."""

    @abstractmethod
    def score_BN(self, pool: PoolStatistics) -> Tensor: ...

    def log_inclusion_BK(self, pool: PoolStatistics, picks: Picks) -> Tensor | None:
        """What `is_pl` corrects for, where picks are drawn by chance."""
        return None

    def pick(self, pool: PoolStatistics) -> Picks:
        picks = best(self.score_BN(pool), pool.mask_BN, self.k)
        return replace(picks, log_inclusion_BK=self.log_inclusion_BK(pool, picks))


class Random(ByScore):
    """k of the pool, uniformly (S-DPO, arXiv 2406.09215)."""

    needs_scores = False

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        return pool.noise_BN

    def log_inclusion_BK(self, pool: PoolStatistics, picks: Picks) -> Tensor:
        return torch.zeros_like(picks.mask_BK, dtype=torch.float64)  # all were equally likely


class Hardest(ByScore):
    """The k with the largest s_i = r_i - r_0: what the policy has come to prefer most, relative to the reference."""

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        return pool.advantage_BN


class TopRandom(ByScore):
    """k uniformly from the `top` hardest, of which the very first may be false negatives (RoDPO, arXiv 2603.29259).

    top: by default three times k, so that it follows k in a sweep.
    """

    def __init__(self, k: int, top: int | None = None, short_pool: str = "error"):
        super().__init__(k, short_pool)
        top = 3 * k if top is None else top
        if isinstance(top, bool) or not isinstance(top, int) or top < k:
            raise UserError(f"selector.top must be a whole number of at least k={k}, got {top!r}")
        self.top = top

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        hardest = best(pool.advantage_BN, pool.mask_BN, self.top)
        in_top_BN = members(hardest.index_BK, hardest.mask_BK, pool.mask_BN.shape[1])
        # Where scores tie, the noise has decided who is among the top: its further digits draw from them.
        return (pool.noise_BN * 2**10).frac() - (~in_top_BN).to(pool.noise_BN)

    def log_inclusion_BK(self, pool: PoolStatistics, picks: Picks) -> Tensor:
        value_BC = torch.nn.functional.pad(pool.advantage_BN, (1, 0))
        return of_draws_from_the_top(value_BC, pool.scores.mask_BC, picks, self.top)


class HardestLogp(ByScore):
    """The k that the policy itself finds likeliest, by the mean of their tokens' log-probs or by the `sum`."""

    def __init__(self, k: int, score: str = "mean", short_pool: str = "error"):
        super().__init__(k, short_pool)
        logdet.check_name("score", score, ("mean", "sum"))
        self.score = score

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        logp_BC = pool.mean_logp_BC if self.score == "mean" else pool.logp_BC
        return logp_BC[:, 1:]


class Sampled(ByScore):
    """k without replacement in proportion to p = softmax(s): the largest of s_i plus Gumbel noise (Vieira 2014)."""

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        uniform_BN = pool.noise_BN.double().clamp(min=torch.finfo(torch.float64).tiny)
        return pool.advantage_BN - (-uniform_BN.log()).log()

    def log_inclusion_BK(self, pool: PoolStatistics, picks: Picks) -> Tensor:
        return of_successive_draws(pool.rewards_BC, pool.scores.mask_BC, picks)


class Full:
    """The whole pool."""

    features: str | None = None
    needs_scores = False

    def __call__(self, pool: PoolStatistics) -> Picks:
        mask_BN = pool.mask_BN
        return Picks(torch.arange(mask_BN.shape[1], device=mask_BN.device) * mask_BN, mask_BN)


class Interleaved(PickK):
    """This project's own: three scores take turns, each picking its best negative not yet picked.

    The scores are logp_i - logp_0, s_i = r_i - r_0 and the difference of mean token log-probs; the first is random.
    """

    def pick(self, pool: PoolStatistics) -> Picks:
        mask_BN = pool.mask_BN
        values = (pool.logp_BC, pool.rewards_BC, pool.mean_logp_BC)  # taking the chosen one's away changes no order
        scores_BSN = torch.stack([value_BC[:, 1:] for value_BC in values], dim=1)
        scores_BSN = scores_BSN.masked_fill(~mask_BN[:, None], -math.inf)
        start_B = ((pool.noise_BN.double() * mask_BN).sum(-1).frac() * 3).long()  # uniform, in whatever order they come
        picked = []
        for step in range(min(self.k, mask_BN.shape[1])):
            best_B1 = scores_BSN[rows(start_B), (start_B + step) % 3].argmax(-1, keepdim=True)
            picked.append(best_B1)
            scores_BSN = scores_BSN.scatter(2, best_B1[..., None].expand(-1, 3, 1), -math.inf)
        return in_order(torch.cat(picked, dim=1), mask_BN)


class Dynamic(PickK):
    """Negatives on the decision boundary: the boundary set of DynamicPO (arXiv 2605.00327), at most k of it.

    Those that the policy finds at least as likely as the chosen response; where there are none, the top cluster of a
    3-means of the pool's log-probs (centres start at its minimum, middle and maximum). The likeliest k are taken where
    the set is larger, and all of it where it is smaller.

    beta_margin: with a margin of m nats, not null, each pick has a beta of its own, beta (1 + tanh((a - b - m) / (|a| +
    |b|)) / 2), where a is the chosen response's log-prob less the pick's, and b the pick's less the mean of those that
    are not on the boundary. The formula and m = 6 are those of the authors' code (github.com/xingyuHuxingyu/DynamicPO).
    """

    rounds = 50  # of Lloyd's algorithm at most; a pool of 20 settles within ten

    def __init__(self, k: int, beta_margin: float | None = 6.0, short_pool: str = "error"):
        super().__init__(k, short_pool)
        self.beta_margin = beta_margin

    def pick(self, pool: PoolStatistics) -> Picks:
        logp_BC = pool.logp_BC
        logp_BN = logp_BC[:, 1:]
        above_BN = (logp_BN >= logp_BC[:, :1]) & pool.mask_BN
        boundary_BN = torch.where(above_BN.any(-1, keepdim=True), above_BN, self._top_cluster(logp_BN, pool.mask_BN))
        index_BK = best(logp_BN, boundary_BN, self.k).index_BK
        picks = Picks(index_BK, boundary_BN.gather(1, index_BK), {"boundary_size": boundary_BN.sum(-1).float()})
        if self.beta_margin is None:
            return picks
        easy_BN = pool.mask_BN & ~boundary_BN
        easy_BN = torch.where(easy_BN.any(-1, keepdim=True), easy_BN, boundary_BN)
        easy_B1 = (logp_BN * easy_BN).sum(-1, keepdim=True) / easy_BN.sum(-1, keepdim=True)
        pick_BK = logp_BN.gather(1, index_BK)
        to_chosen_BK, to_easy_BK = logp_BC[:, :1] - pick_BK, pick_BK - easy_B1
        apart_BK = to_chosen_BK - to_easy_BK - self.beta_margin
        scale_BK = 1 + (apart_BK / (to_chosen_BK.abs() + to_easy_BK.abs())).tanh() / 2
        return replace(picks, beta_scale_BK=scale_BK)

    def _top_cluster(self, value_BN: Tensor, mask_BN: Tensor) -> Tensor:
        low_B = value_BN.masked_fill(~mask_BN, math.inf).amin(-1)
        high_B = value_BN.masked_fill(~mask_BN, -math.inf).amax(-1)
        centre_B3 = torch.stack([low_B, (low_B + high_B) / 2, high_B], dim=1)
        for _ in range(self.rounds):
            nearest_BN = (value_BN[..., None] - centre_B3[:, None]).abs().argmin(-1)
            member_BN3 = torch.nn.functional.one_hot(nearest_BN, 3) * mask_BN[..., None]
            size_B3 = member_BN3.sum(1)
            mean_B3 = (member_BN3 * value_BN[..., None]).sum(1) / size_B3.clamp(min=1)
            before_B3, centre_B3 = centre_B3, torch.where(size_B3 > 0, mean_B3, centre_B3)
            if torch.equal(before_B3, centre_B3):
                break
        top_B1 = nearest_BN.masked_fill(~mask_BN, 0).amax(-1, keepdim=True)  # centres keep their order
        return (nearest_BN == top_B1) & mask_BN


def hardest_overlap(pool: PoolStatistics, picks: Picks) -> Tensor:
    """Jaccard similarity `(B,)` with what `hardest` would pick from the same pools."""
    return overlap(picks, Hardest(k=picks.index_BK.shape[1], short_pool="all")(pool))
