"""The subset with the largest Fisher information of its own loss (`subset_fisher`): no guarantee, none claimed.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, M subsets,
J members of a subset.
"""

import math

import torch
from torch import Tensor

from massdpo.selection.logdet import limits
from massdpo.selection.logdet.arguments import check_exact, factor, selectable
from massdpo.selection.logdet.design import centre_gram
from massdpo.selection.logdet.greedy import ROUND_OFF, LogdetSelection
from massdpo.selection.logdet.search import all_subsets
from massdpo.tensors import first, rows


def subset_fisher_logdet(
    gram_BCC: Tensor, rewards_BC: Tensor, beta: float, ridge: float | Tensor, subsets_BMJ: Tensor
) -> Tensor:
    """log det(ridge I + Fisher of the loss over {0} + S) - D log ridge, `(B, M)` float64, for subsets of negatives.

    q, its mean feature and so the whole matrix are the subset's: log det(I + (beta^2 / ridge) (diag q - q q^T) G_S).
    Neither monotone nor submodular in S. `gram_BCC`: inner products of the features, chosen one first.
    """
    columns_BMC = torch.nn.functional.pad(subsets_BMJ + 1, (1, 0))
    row_B11 = rows(columns_BMC)
    share_BMC = rewards_BC.double()[row_B11, columns_BMC].softmax(-1)
    gram_BMCC = gram_BCC.double()[row_B11[..., None], columns_BMC[..., :, None], columns_BMC[..., None, :]]
    size = columns_BMC.shape[-1]
    centred = centre_gram(gram_BMCC.flatten(0, 1), share_BMC.flatten(0, 1)).view_as(gram_BMCC)
    weight_BMC = share_BMC.sqrt()
    factor_B = factor(ridge, beta**2, gram_BCC)
    information = centred * weight_BMC[..., :, None] * weight_BMC[..., None, :] * factor_B[:, None, None, None]
    identity = torch.eye(size, dtype=torch.float64, device=gram_BCC.device)
    return torch.linalg.slogdet(identity + information).logabsdet


def select_subset_fisher(
    gram_BCC: Tensor,
    rewards_BC: Tensor,
    beta: float,
    k: int,
    ridge: float | Tensor,
    mask_BN: Tensor | None = None,
    solver: str = "greedy",
    resolution: float = ROUND_OFF,
) -> LogdetSelection:
    """Choose k negatives per prompt that make `subset_fisher_logdet` large: greedily, or the best of all by `exact`.

    Greedy has no guarantee here, so `upper_bound_B` is NaN; gains may be negative. Rows of fewer than k take all.
    """
    mask_BN = selectable(mask_BN, rewards_BC[:, 1:])
    if solver == "exact":
        check_exact(int(mask_BN.sum(-1).max()), k)
        members_BN = _enumerate_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge, mask_BN)
        best = _greedy_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge, members_BN)
        return best._replace(upper_bound_B=best.logdet_B)
    return _greedy_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge, mask_BN, resolution)


def _greedy_subset_fisher(
    gram_BCC: Tensor,
    rewards_BC: Tensor,
    beta: float,
    k: int,
    ridge: float | Tensor,
    mask_BN: Tensor,
    resolution: float = ROUND_OFF,
) -> LogdetSelection:
    count_B, available_BN = mask_BN.sum(-1), mask_BN
    taken_BJ = torch.zeros(len(mask_BN), 0, dtype=torch.int64, device=mask_BN.device)
    reached = [gram_BCC.new_zeros(len(mask_BN), dtype=torch.float64)]
    ties_B = torch.zeros_like(count_B)
    for step in range(k):
        value_BN = _with_one_more(gram_BCC, rewards_BC, beta, ridge, taken_BJ).masked_fill(~available_BN, -math.inf)
        best_B = value_BN.amax(-1)
        tied_BN = value_BN >= (best_B - (1e-10 + resolution) * best_B.abs())[:, None]
        index_B1 = tied_BN.to(torch.uint8).argmax(-1, keepdim=True)
        real_B = count_B > step
        reached.append(torch.where(real_B, best_B, reached[-1]))
        ties_B = ties_B + (real_B & (tied_BN.sum(-1) > 1))
        taken_BJ = torch.cat([taken_BJ, index_B1 * real_B[:, None]], dim=1)
        available_BN = available_BN.scatter(1, index_B1, False)
    gains_BK = torch.stack(reached, dim=1).diff(dim=1)
    mask_BK = first(count_B, k)
    return LogdetSelection(taken_BJ, gains_BK, reached[-1], torch.full_like(reached[-1], math.nan), mask_BK, ties_B)


def _with_one_more(
    gram_BCC: Tensor, rewards_BC: Tensor, beta: float, ridge: float | Tensor, taken_BJ: Tensor
) -> Tensor:
    """`subset_fisher_logdet` of what is taken and each negative, `(B, N)`, in O(N J^2 + J^3) for all of them.

    With A = U^(1/2) G U^(1/2), u = exp(r), n = sqrt(q) of length 1 and t = beta^2 / (ridge sum u), it is
    log det(I + t A) + log(n^T (I + t A)^-1 n): the determinant on what is perpendicular to n. Each further negative
    borders A by a row and has a t of its own, so A's eigenvectors serve them all.
    """
    columns_BE = torch.nn.functional.pad(taken_BJ + 1, (1, 0))  # E = 1 + J
    reward_BC = rewards_BC.double()
    root_BC = ((reward_BC - reward_BC.amax(-1, keepdim=True)) / 2).exp()
    weighed_BCC = gram_BCC.double() * root_BC[:, :, None] * root_BC[:, None, :]
    row_BE1 = columns_BE[..., None].expand(-1, -1, gram_BCC.shape[1])
    rows_BEC = weighed_BCC.gather(1, row_BE1)
    own_BEE = rows_BEC.gather(2, columns_BE[:, None].expand(-1, columns_BE.shape[1], -1))
    value_BE, vector_BEE = torch.linalg.eigh(own_BEE)
    border_BEN = vector_BEE.mT @ rows_BEC[..., 1:]
    root_BE = root_BC.gather(1, columns_BE)
    along_BE = (root_BE[:, None] @ vector_BEE)[:, 0]
    total_BN = root_BE.square().sum(-1, keepdim=True) + root_BC[:, 1:].square()
    scale_BN = factor(ridge, beta**2, gram_BCC)[:, None] / total_BN
    shrunk_BEN = 1 / (1 + scale_BN[:, None] * value_BE.clamp(min=0.0)[..., None])
    diagonal_BN = weighed_BCC.diagonal(dim1=-2, dim2=-1)[:, 1:]
    excess_BN = 1 + scale_BN * (diagonal_BN - scale_BN * (border_BEN.square() * shrunk_BEN).sum(1))
    missing_BN = root_BC[:, 1:] - scale_BN * (border_BEN * shrunk_BEN * along_BE[..., None]).sum(1)
    inside_BN = ((along_BE.square()[..., None] * shrunk_BEN).sum(1) + missing_BN.square() / excess_BN) / total_BN
    return excess_BN.log() - shrunk_BEN.log().sum(1) + inside_BN.log()


def _enumerate_subset_fisher(
    gram_BCC: Tensor, rewards_BC: Tensor, beta: float, k: int, ridge: float | Tensor, mask_BN: Tensor
) -> Tensor:
    batch, pool = mask_BN.shape
    members_BN = mask_BN.clone()
    if pool <= k:
        return members_BN
    subsets_MK = all_subsets(pool, k).to(mask_BN.device)
    best_B = torch.full((batch,), -math.inf, dtype=torch.float64, device=mask_BN.device)
    long_B = mask_BN.sum(-1) > k
    chunk = max(1, limits.CHUNK_NUMBERS // (batch * (k + 1) ** 2))
    for part_MK in subsets_MK.split(chunk):
        value_BM = subset_fisher_logdet(gram_BCC, rewards_BC, beta, ridge, part_MK.expand(batch, -1, -1))
        value_BM = value_BM.masked_fill(~mask_BN[:, part_MK].all(-1), -math.inf)
        top_B, where_B = value_BM.max(-1)
        better_B = long_B & (top_B > best_B)
        found_BN = torch.zeros_like(mask_BN).scatter(1, part_MK[where_B], True)
        members_BN = torch.where(better_B[:, None], found_BN, members_BN)
        best_B = torch.where(better_B, top_B, best_B)
    return members_BN
