"""The vectors whose outer products make a prompt's information matrix, and their Gram matrices.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), D features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from massdpo.selection.logdet import limits
from massdpo.selection.logdet.arguments import selectable


def design_vectors(
    features_BCD: Tensor,
    rewards_BC: Tensor,
    beta: float,
    design: str = "centered",
    normalize: bool = True,
    mask_BC: Tensor | None = None,
    resolution: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Vectors `(B, N, D)` and scale `(B,)`, float64, with H(S) = ridge I + scale sum_{i in S} v_i v_i^T.

    With s_i = r_i - r_0, p = softmax(s) and phibar = sum_i p_i phi_i over the whole pool, `centered` is
    v_i = sqrt(p_i) (phi_i - phibar) (MASS-DPO) and `relative` is v_i = sqrt(p_i) (phi_i - phi_0);
    scale = beta^2 (1 - sigma(Z)), where sigma(Z) = 1 / (1 + sum_i exp s_i) is the chance that the chosen one wins.
    `pairwise` is v_i = sqrt(mu_i (1 - mu_i)) (phi_i - phi_0), mu_i = sigma(-s_i), with scale beta^2 (Active DPO,
    arXiv 2503.01076). `normalize` brings the difference to unit length before the root's factor weighs it; a difference
    within the rounding of its inputs has no direction and becomes zero. In `relative` and `pairwise` so does one whose
    square is at most `resolution`, the relative precision of inner products, of the pool's largest: a copy of the
    chosen response. Rows where `mask_BC` is False are zero.
    """
    mask_BN = selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
    shares = _shares(rewards_BC, mask_BN)
    weight_BN, scale_B = _weighing(rewards_BC, beta, design, normalize, shares)
    negatives_BND = features_BCD[:, 1:].double() * mask_BN[..., None]  # 0 * padding is 0, as padding is finite
    if design == "centered":
        origin_BXD = torch.stack([shares.all_BN, shares.others_BN], dim=1) @ negatives_BND
    else:
        origin_BXD = features_BCD[:, :1].double()
    difference_BND = (negatives_BND - origin_BXD[:, :1]) * mask_BN[..., None]
    if design == "centered":
        rows_B, top_B = torch.arange(len(mask_BN), device=mask_BN.device), shares.top_B1[:, 0]
        difference_BND[rows_B, top_B] = negatives_BND[rows_B, top_B] - origin_BXD[:, 1]
    else:
        weight_BN = weight_BN * _apart(difference_BND.square().sum(-1), resolution)
    if normalize:
        length_BN = difference_BND.norm(dim=-1)
        size_BN = negatives_BND.norm(dim=-1) + origin_BXD.norm(dim=-1).amax(-1, keepdim=True)
        has_direction_BN = length_BN > torch.finfo(features_BCD.dtype).eps * size_BN
        weight_BN = weight_BN * _inverse_where(has_direction_BN, length_BN)
    return difference_BND * weight_BN[..., None], scale_B


def design_gram(
    gram_BCC: Tensor,
    rewards_BC: Tensor,
    beta: float,
    design: str = "centered",
    normalize: bool = True,
    mask_BC: Tensor | None = None,
    resolution: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`design_vectors` from inner products of the features: the vectors' Gram matrix `(B, N, N)` and the scale."""
    mask_BN = selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
    shares = _shares(rewards_BC, mask_BN)
    weight_BN, scale_B = _weighing(rewards_BC, beta, design, normalize, shares)
    if design == "centered":
        centred_BCC = _about_the_mean(gram_BCC.double(), shares)
    else:
        chosen_BC = torch.zeros_like(gram_BCC[..., 0], dtype=torch.float64)
        chosen_BC[:, 0] = 1.0
        centred_BCC = centre_gram(gram_BCC.double(), chosen_BC)
    centred_BNN = centred_BCC[:, 1:, 1:] * (mask_BN[:, :, None] & mask_BN[:, None, :])
    if design != "centered":
        weight_BN = weight_BN * _apart(centred_BNN.diagonal(dim1=-2, dim2=-1), resolution)
    if normalize:
        weight_BN = weight_BN * _inverse_length(centred_BCC, gram_BCC, mask_BN)[:, 1:]
    return centred_BNN * weight_BN[:, :, None] * weight_BN[:, None, :], scale_B


def inner_products(vectors_BND: Tensor, origin_B1D: Tensor | None = None) -> Tensor:
    """Gram matrices `(B, N, N)`, float64, of `vectors - origin`.

    Where float64 copies must be made, a few prompts at a time, so that they stay in the cache.
    """
    if origin_B1D is None and vectors_BND.dtype == torch.float64:
        return vectors_BND @ vectors_BND.mT
    batch, pool, size = vectors_BND.shape
    gram_BNN = torch.empty(batch, pool, pool, dtype=torch.float64, device=vectors_BND.device)
    step = max(1, torch.get_num_threads() * limits.CACHE_NUMBERS // (pool * size))
    step = step if vectors_BND.device.type == "cpu" else batch
    for at in range(0, batch, step):
        part = slice(at, at + step)
        wide_BND = (vectors_BND[part] if origin_B1D is None else vectors_BND[part] - origin_B1D[part]).double()
        torch.bmm(wide_BND, wide_BND.mT, out=gram_BNN[part])
    return gram_BNN


def centre_gram(gram_BCC: Tensor, weight_BC: Tensor) -> Tensor:
    """Inner products of `phi_i - sum_j w_j phi_j`, from those of phi (w sums to 1)."""
    towards_BC = torch.einsum("bij,bj->bi", gram_BCC, weight_BC)
    square_B = (towards_BC * weight_BC).sum(-1)
    return gram_BCC - towards_BC[:, :, None] - towards_BC[:, None, :] + square_B[:, None, None]


def unit_gram(gram_BCC: Tensor, rewards_BC: Tensor, mask_BC: Tensor | None = None) -> Tensor:
    """Inner products of (phi_i - phibar) / |phi_i - phibar|, the chosen one included; phibar is the pool's."""
    mask_BN = selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
    centred_BCC = _about_the_mean(gram_BCC.double(), _shares(rewards_BC, mask_BN))
    unit_BC = _inverse_length(centred_BCC, gram_BCC, mask_BN)
    return centred_BCC * unit_BC[:, :, None] * unit_BC[:, None, :]


def mean_square(square_BN: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Mean of |v_i|^2 over a prompt's candidates `(B,)`, the unit of a relative ridge; 1 where all vectors are zero."""
    count_B = square_BN.shape[1] if mask_BN is None else mask_BN.sum(-1).clamp(min=1)
    mean_B = (square_BN if mask_BN is None else square_BN * mask_BN).sum(-1) / count_B
    return torch.where(mean_B > 0, mean_B, 1.0)


class _Shares(NamedTuple):
    """p = softmax(s) over the pool, and what is left without the negative that holds most of it."""

    all_BN: Tensor  # p; 0 where masked
    top_B1: Tensor  # the largest p's index
    others_BN: Tensor  # p of all but the top, summing to 1; a pool of one keeps its own
    left_B1: Tensor  # 1 - p of the top, exact where it is far below float64's epsilon


def _shares(rewards_BC: Tensor, mask_BN: Tensor) -> _Shares:
    reward_BN = rewards_BC[:, 1:].double().masked_fill(~mask_BN, -math.inf)
    total_B1 = torch.logsumexp(reward_BN, dim=-1, keepdim=True)
    all_BN = torch.where(mask_BN, (reward_BN - total_B1).exp(), 0.0)
    top_B1 = reward_BN.argmax(-1, keepdim=True)
    reward_BN = reward_BN.scatter(1, top_B1, -math.inf)
    rest_B1 = torch.logsumexp(reward_BN, dim=-1, keepdim=True)
    others_BN = torch.where(rest_B1.isfinite(), (reward_BN - rest_B1).exp(), all_BN)
    return _Shares(all_BN, top_B1, others_BN, torch.where(mask_BN.any(-1, keepdim=True), (rest_B1 - total_B1).exp(), 0))


def _weighing(rewards_BC: Tensor, beta: float, design: str, normalize: bool, shares: _Shares) -> tuple[Tensor, Tensor]:
    """The factor of each difference, `(B, N)`, and the scale, `(B,)`, float64."""
    rewards_BC = rewards_BC.double()
    advantage_BN = rewards_BC[:, 1:] - rewards_BC[:, :1]
    if design == "pairwise":
        variance_BN = torch.sigmoid(advantage_BN) * torch.sigmoid(-advantage_BN)
        return variance_BN.sqrt(), torch.full_like(advantage_BN[:, 0], beta**2)
    weight_BN = shares.all_BN.sqrt()
    if design == "centered" and not normalize:  # the top's difference is to the others' mean, longer than to phibar
        weight_BN = weight_BN.scatter(1, shares.top_B1, weight_BN.gather(1, shares.top_B1) * shares.left_B1)
    total_B = torch.logsumexp(advantage_BN.masked_fill(shares.all_BN == 0, -math.inf), dim=-1)
    return weight_BN, beta**2 * torch.sigmoid(total_B)


def _about_the_mean(gram_BCC: Tensor, shares: _Shares) -> Tensor:
    """Inner products of phi_i - phibar, with phi_i - the others' mean for the top negative.

    phi_i - phibar = (1 - p_i) (phi_i - the others' mean): where p_i is within rounding of 1 only the right side has a
    direction left, so the negative that dominates a pool would vanish from it.
    """
    all_BC, others_BC = (torch.nn.functional.pad(share_BN, (1, 0)) for share_BN in (shares.all_BN, shares.others_BN))
    towards_BCX = gram_BCC @ torch.stack([all_BC, others_BC], dim=-1)
    rows_B, top_B = torch.arange(len(gram_BCC), device=gram_BCC.device), shares.top_B1[:, 0] + 1
    mean_others_B1 = (towards_BCX[..., 1] * all_BC).sum(-1, keepdim=True)
    row_BC = gram_BCC[rows_B, top_B] - towards_BCX[rows_B, top_B, :1] - towards_BCX[..., 1] + mean_others_B1
    others_B = (towards_BCX[..., 1] * others_BC).sum(-1)
    row_BC[rows_B, top_B] = gram_BCC[rows_B, top_B, top_B] - 2 * towards_BCX[rows_B, top_B, 1] + others_B
    centred_BCC = centre_gram(gram_BCC, all_BC)
    centred_BCC[rows_B, top_B], centred_BCC[rows_B, :, top_B] = row_BC, row_BC
    return centred_BCC


def _inverse_length(centred_BCC: Tensor, gram_BCC: Tensor, mask_BN: Tensor) -> Tensor:
    """1 / |phi_i - phibar| `(B, C)`; 0 where masked, or where the difference is within its terms' rounding."""
    mask_BC = torch.nn.functional.pad(mask_BN, (1, 0), value=True)
    size_BC = gram_BCC.diagonal(dim1=-2, dim2=-1).double() * mask_BC
    square_BC = centred_BCC.diagonal(dim1=-2, dim2=-1)
    least_BC = 8 * torch.finfo(gram_BCC.dtype).eps * (size_BC + size_BC.amax(-1, keepdim=True))
    return _inverse_where((square_BC > least_BC) & mask_BC, square_BC.clamp(min=0).sqrt())


def _apart(square_BN: Tensor, resolution: float) -> Tensor:
    """Where a squared distance to the chosen response is more than the rounding of the pool's largest."""
    return square_BN > resolution * square_BN.amax(-1, keepdim=True)


def _inverse_where(condition: Tensor, value: Tensor) -> Tensor:
    return torch.where(condition, 1.0 / torch.where(condition, value, 1.0), 0.0)
