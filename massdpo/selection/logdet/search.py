"""Beyond greedy, from its start: single exchanges, or all subsets, by the same update of marginal gains.

Suffixes: B prompts, N pool negatives, K selected, M subsets, J members of a subset.
"""

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from massdpo.selection.logdet import limits
from massdpo.selection.logdet.greedy import LogdetSelection, greedy_gram
from massdpo.tensors import members, rows


def exchange(gram_BNN: Tensor, mask_BN: Tensor, start: LogdetSelection, resolution: float) -> Tensor:
    """Members `(B, N)` after single exchanges, the best first, until none helps a prompt by more than rounding."""
    k, alike = start.indices_BK.shape[1], max(resolution, 1e-10)
    members_BN = members(start.indices_BK, start.mask_BK, mask_BN.shape[1])
    open_B = mask_BN.sum(-1) > k  # a short row has nothing to exchange
    others = [[j for j in range(k) if j != out] for out in range(k)]
    others_KJ = torch.tensor(others, dtype=torch.int64, device=gram_BNN.device)
    current_BK, value_B = start.indices_BK, start.logdet_B
    while bool(open_B.any()):
        logdet_BM, excess_BMN = _given(gram_BNN, current_BK[:, others_KJ])
        value_BMN = logdet_BM[..., None] + excess_BMN.log1p()
        value_BMN = value_BMN.masked_fill(~(mask_BN & ~members_BN)[:, None], -math.inf)
        best_B = value_BMN.amax((-2, -1))
        open_B = open_B & (best_B > value_B * (1 + alike))
        where_B = (value_BMN.flatten(1) >= (best_B * (1 - alike))[:, None]).to(torch.uint8).argmax(-1)
        out_B, in_B = where_B // mask_BN.shape[1], where_B % mask_BN.shape[1]
        exchanged_BK = current_BK.scatter(1, out_B[:, None], in_B[:, None])
        current_BK = torch.where(open_B[:, None], exchanged_BK, current_BK)
        value_B = torch.where(open_B, best_B, value_B)
        members_BN = torch.zeros_like(mask_BN).scatter(1, current_BK, True)
    short_B1 = (mask_BN.sum(-1) <= k)[:, None]
    return torch.where(short_B1, mask_BN, members_BN)


def enumerate_all(gram_BNN: Tensor, mask_BN: Tensor, start: LogdetSelection, resolution: float) -> Tensor:
    """Members `(B, N)` of the best subset of k; the lexicographically first of those within the resolution of it.

    For every subset of k - 1 the excess of all others is at hand, so the last member costs nothing.
    """
    pool, k = mask_BN.shape[1], start.indices_BK.shape[1]
    alike = max(resolution, 1e-12)
    short_B = mask_BN.sum(-1) <= k
    if bool(short_B.all()):
        return mask_BN
    prefixes_MJ = all_subsets(pool, k - 1).to(gram_BNN.device)
    last_M = prefixes_MJ[:, -1] if k > 1 else prefixes_MJ.new_full((1,), -1)
    later_MN = torch.arange(pool, device=gram_BNN.device) > last_M[:, None]
    best_B1 = torch.full_like(start.logdet_B[:, None], -math.inf)
    best_BK = start.indices_BK
    batch = gram_BNN.shape[0]
    chunk = max(1, limits.CHUNK_NUMBERS // (batch * pool * k))
    for at in range(0, len(prefixes_MJ), chunk):
        part_MJ = prefixes_MJ[at : at + chunk]
        logdet_BM, excess_BMN = _given(gram_BNN, part_MJ.expand(batch, -1, -1))
        closed_BMN = ~(mask_BN[:, None] & later_MN[at : at + chunk])
        excess_BMN = excess_BMN.masked_fill(closed_BMN, -1.0)  # log1p(-1) is minus infinity
        last_BM = excess_BMN.amax(-1)
        value_BM = (logdet_BM + last_BM.log1p()).masked_fill(~mask_BN[:, part_MJ].all(-1), -math.inf)
        top_B1 = value_BM.amax(-1, keepdim=True)
        prefix_B = (value_BM >= top_B1 * (1 - alike)).to(torch.uint8).argmax(-1)
        excess_BN = excess_BMN[rows(prefix_B), prefix_B]
        last_B1 = (excess_BN >= excess_BN.amax(-1, keepdim=True) * (1 - alike)).to(torch.uint8).argmax(-1, keepdim=True)
        better_B1 = top_B1 * (1 - alike) > best_B1
        best_BK = torch.where(better_B1, torch.cat([part_MJ[prefix_B], last_B1], dim=1), best_BK)
        best_B1 = torch.where(better_B1, top_B1, best_B1)
    members_BN = torch.zeros_like(mask_BN).scatter(1, best_BK, True)
    return torch.where(short_B[:, None], mask_BN, members_BN)


def _given(gram_BNN: Tensor, subsets_BMJ: Tensor) -> tuple[Tensor, Tensor]:
    """For each subset: its log-det `(B, M)` and every candidate's excess once it is taken `(B, M, N)`."""
    batch, subsets, size = subsets_BMJ.shape
    excess_BMN = gram_BNN.diagonal(dim1=-2, dim2=-1)[:, None].repeat(1, subsets, 1)
    logdet_BM = gram_BNN.new_zeros(batch, subsets)
    factors: list[Tensor] = []
    for member in range(size):
        index_BM = subsets_BMJ[..., member]
        new_BMN = gram_BNN[rows(index_BM), index_BM]
        for factor_BMN in factors:
            new_BMN = new_BMN - factor_BMN * factor_BMN.gather(2, index_BM[..., None])
        picked_BM = excess_BMN.gather(2, index_BM[..., None])[..., 0].clamp(min=0.0)
        logdet_BM = logdet_BM + picked_BM.log1p()
        factors.append(new_BMN * (1.0 + picked_BM).rsqrt()[..., None])
        excess_BMN = excess_BMN - factors[-1].square()
    return logdet_BM, excess_BMN.clamp(min=0.0)


@lru_cache(maxsize=16)
def all_subsets(pool: int, size: int) -> Tensor:
    """All subsets of `size` of `pool`, `(M, size)`, in lexicographic order."""
    subsets = list(itertools.combinations(range(pool), size))
    return torch.tensor(subsets, dtype=torch.int64).view(len(subsets), size)


def in_greedy_order(gram_BNN: Tensor, members_BN: Tensor, start: LogdetSelection, resolution: float) -> LogdetSelection:
    """The selection of exactly these members; the bound and the ties stay those of the start."""
    ordered = greedy_gram(gram_BNN, members_BN, start.indices_BK.shape[1], False, resolution)
    return ordered._replace(upper_bound_B=start.upper_bound_B, ties_B=start.ties_B)
