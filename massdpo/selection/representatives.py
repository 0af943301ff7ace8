"""Selectors by how well a few picks represent the whole pool: clusters, medoids, and the pool's gradient.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected or clusters.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from massdpo.model.features import FEATURES
from massdpo.selection import logdet
from massdpo.selection.diversity import DISTANCE_ERROR, Farthest
from massdpo.selection.gram import candidate_gram, square_distances
from massdpo.selection.pools import PickK, in_order
from massdpo.tensors import Picks, PoolStatistics


class Coreset(Farthest):
    """The hardest negative of each of k clusters: AMPO's coreset (arXiv 2502.18293).

    k-means of the features by Lloyd's algorithm from the picks of `farthest`; hard is a large s_i. Where copies leave
    fewer clusters than k, the hardest of the rest fill up.
    """

    rounds = 50  # of Lloyd's algorithm at most; a pool of 20 settles within ten

    def pick(self, pool: PoolStatistics) -> Picks:
        start = super().pick(pool)
        hard_BN = pool.advantage_BN.masked_fill(~pool.mask_BN, -math.inf)
        order_BN = hard_BN.argsort(dim=-1, descending=True, stable=True)
        cluster_BN = self._clusters(pool, start).gather(1, order_BN)
        seen_BNK = one_hot(cluster_BN, start.index_BK.shape[1]).cumsum(1)
        later_BN = seen_BNK.gather(2, cluster_BN[..., None])[..., 0] > 1  # than its cluster's hardest
        later_BN = later_BN.long() + 2 * ~pool.mask_BN.gather(1, order_BN)
        best_BN = order_BN.gather(1, later_BN.argsort(dim=-1, stable=True))
        return in_order(best_BN[:, : start.index_BK.shape[1]], pool.mask_BN)

    def _clusters(self, pool: PoolStatistics, start: Picks) -> Tensor:
        """The cluster of each negative `(B, N)`, from distances alone: |x - mean|^2 = (D w)_x - w D w / 2."""
        distance_BNN = square_distances(pool, self.features, self.normalize)[:, 1:, 1:]
        weight_BNK = one_hot(start.index_BK, pool.mask_BN.shape[1]).mT.double()
        unsure_B11 = DISTANCE_ERROR * distance_BNN.amax((1, 2), keepdim=True)
        cluster_BN = torch.full_like(pool.noise_BN, -1, dtype=torch.int64)
        for _ in range(self.rounds):
            towards_BNK = distance_BNN @ weight_BNK
            to_centre_BNK = towards_BNK - (towards_BNK * weight_BNK).sum(1, keepdim=True) / 2
            to_centre_BNK = to_centre_BNK.masked_fill(~start.mask_BK[:, None], math.inf)
            near_BNK = to_centre_BNK <= to_centre_BNK.amin(-1, keepdim=True) + unsure_B11
            before_BN, cluster_BN = cluster_BN, near_BNK.to(torch.uint8).argmax(-1)
            if torch.equal(before_BN, cluster_BN):
                break
            member_BNK = one_hot(cluster_BN, weight_BNK.shape[2]) * pool.mask_BN[..., None]
            size_B1K = member_BNK.sum(1, keepdim=True)
            weight_BNK = torch.where(size_B1K > 0, member_BNK / size_B1K.clamp(min=1), weight_BNK)
        return cluster_BN


class Medoids(Farthest):
    """The k negatives closest to all of the pool, each weighed by its share p of the gradient (arXiv 2502.18293).

    sum_i p_i min_{j in S} |phi_i - phi_j|: greedily, then by single exchanges until none helps.
    """

    def pick(self, pool: PoolStatistics) -> Picks:
        distance_BNN = square_distances(pool, self.features, self.normalize)[:, 1:, 1:].sqrt()
        mask_BN, share_BN = pool.mask_BN, _share(pool)
        nearest_BN, open_BN = torch.full_like(share_BN, torch.finfo(share_BN.dtype).max), mask_BN
        picked: list[Tensor] = []
        for _ in range(min(self.k, mask_BN.shape[1])):
            cost_BN = _cost(distance_BNN, nearest_BN, share_BN).masked_fill(~open_BN, math.inf)
            least_B1 = cost_BN.amin(-1, keepdim=True)
            if not picked:  # the rounding of distances, in terms of the first medoid's
                unsure_B1 = pool.resolution.features * least_B1
            best_B1 = (cost_BN <= least_B1 + unsure_B1).to(torch.uint8).argmax(-1, keepdim=True)
            picked.append(best_B1)
            open_BN = open_BN.scatter(1, best_B1, False)
            nearest_BN = torch.minimum(nearest_BN, _column(distance_BNN, best_B1))
        picked_BK = self._exchange(distance_BNN, share_BN, mask_BN, torch.cat(picked, dim=1), unsure_B1)
        return in_order(picked_BK, mask_BN)

    def _exchange(
        self, distance_BNN: Tensor, share_BN: Tensor, mask_BN: Tensor, picked_BK: Tensor, unsure_B1: Tensor
    ) -> Tensor:
        k = picked_BK.shape[1]
        going_B1 = mask_BN.sum(-1, keepdim=True) > k
        while bool(going_B1.any()):
            to_BKN = distance_BNN.gather(1, picked_BK[..., None].expand(-1, -1, mask_BN.shape[1]))
            open_BN = mask_BN.scatter(1, picked_BK, False)
            costs = []
            for out in range(k):
                rest_BN = to_BKN[:, [kept for kept in range(k) if kept != out]]
                nearest_BN = rest_BN.amin(1) if k > 1 else torch.full_like(share_BN, torch.finfo(share_BN.dtype).max)
                costs.append(_cost(distance_BNN, nearest_BN, share_BN).masked_fill(~open_BN, math.inf))
            cost_BX = torch.cat(costs, dim=1)
            best_B1 = cost_BX.amin(-1, keepdim=True)
            now_B1 = (share_BN * to_BKN.amin(1)).sum(-1, keepdim=True)
            going_B1 = going_B1 & (best_B1 + 2 * unsure_B1 < now_B1)
            where_B1 = (cost_BX <= best_B1 + unsure_B1).to(torch.uint8).argmax(-1, keepdim=True)
            exchanged_BK = picked_BK.scatter(1, where_B1 // mask_BN.shape[1], where_B1 % mask_BN.shape[1])
            picked_BK = torch.where(going_B1, exchanged_BK, picked_BK)
        return picked_BK


def _cost(distance_BNN: Tensor, nearest_BN: Tensor, share_BN: Tensor) -> Tensor:
    """What the pool's weighed distance becomes with each further medoid `(B, N)`."""
    return (torch.minimum(distance_BNN, nearest_BN[:, None]) * share_BN[:, None]).sum(-1)


def _column(value_BNN: Tensor, index_B1: Tensor) -> Tensor:
    return value_BNN.gather(1, index_B1[..., None].expand(-1, 1, value_BNN.shape[2]))[:, 0]


def _share(pool: PoolStatistics) -> Tensor:
    """p = softmax(s) over the pool, `(B, N)`."""
    return pool.advantage_BN.masked_fill(~pool.mask_BN, -math.inf).softmax(-1)


class Herding(PickK):
    """The k whose plain mean comes nearest to sum_i p_i phi_i, the direction of the whole pool's gradient.

    Greedily, as kernel herding does (Chen, Welling and Smola 2010, arXiv 1203.3472), without picking any twice.
    """

    def __init__(self, k: int, features: str = "mean", short_pool: str = "error"):
        super().__init__(k, short_pool)
        logdet.check_name("features", features, FEATURES)
        self.features: str = features

    def pick(self, pool: PoolStatistics) -> Picks:
        gram_BNN = candidate_gram(pool, self.features)[:, 1:, 1:]
        mask_BN, share_BN = pool.mask_BN, _share(pool)
        towards_BN = (gram_BNN @ share_BN[..., None])[..., 0]
        square_BN = gram_BNN.diagonal(dim1=-2, dim2=-1)
        target_B1 = (towards_BN * share_BN).sum(-1, keepdim=True)
        unsure_B1 = pool.resolution.features * logdet.mean_square(square_BN, mask_BN)[:, None]
        sum_towards_B1, sum_square_B1 = torch.zeros_like(target_B1), torch.zeros_like(target_B1)
        cross_BN, open_BN, picked = torch.zeros_like(towards_BN), mask_BN, []
        for count in range(1, min(self.k, mask_BN.shape[1]) + 1):  # |target - sum_S phi / count|^2 with each added
            norm_BN = (sum_square_B1 + 2 * cross_BN + square_BN) / count**2
            off_BN = target_B1 - 2 * (sum_towards_B1 + towards_BN) / count + norm_BN
            off_BN = off_BN.masked_fill(~open_BN, math.inf)
            near_BN = off_BN <= off_BN.amin(-1, keepdim=True) + unsure_B1
            index_B1 = near_BN.to(torch.uint8).argmax(-1, keepdim=True)
            picked.append(index_B1)
            sum_square_B1 = sum_square_B1 + (2 * cross_BN + square_BN).gather(1, index_B1)
            sum_towards_B1 = sum_towards_B1 + towards_BN.gather(1, index_B1)
            cross_BN = cross_BN + _column(gram_BNN, index_B1)
            open_BN = open_BN.scatter(1, index_B1, False)
        return in_order(torch.cat(picked, dim=1), mask_BN)
