"""The vectors whose outer products make a prompt's information matrix, and their Gram matrices.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), D features.
"""

import math

import torch
from torch import Tensor

from massdpo.selection.logdet import limits
from massdpo.selection.logdet.arguments import check_name, selectable

VARIANTS = ("centered", "relative", "pairwise")


def design_vectors(
    features_BCD: Tensor,
    rewards_BC: Tensor,
    beta: float,
    variant: str = "centered",
    normalize: bool = True,
    mask_BC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Vectors `(B, N, D)` and scale `(B,)`, float64, with H(S) = ridge I + scale sum_{i in S} v_i v_i^T.

    With s_i = r_i - r_0, p = softmax(s) and phibar = sum_i p_i phi_i over the whole pool, `centered` is
    v_i = sqrt(p_i) (phi_i - phibar) (MASS-DPO) and `relative` is v_i = sqrt(p_i) (phi_i - phi_0);
    scale = beta^2 (1 - sigma(Z)), where sigma(Z) = 1 / (1 + sum_i exp s_i) is the chance that the chosen one wins.
    `pairwise` is v_i = sqrt(mu_i (1 - mu_i)) (phi_i - phi_0), mu_i = sigma(-s_i), with scale beta^2 (Active DPO,
    arXiv 2503.01076). `normalize` brings the difference to unit length before the root's factor weighs it; a difference
    within the rounding of its inputs has no direction and becomes zero. Rows where `mask_BC` is False are zero.
    Raises UserError for an unknown variant.
    """
    check_name("variant", variant, VARIANTS)
    mask_BN = selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
    share_BN, weight_BN, scale_B = _pool_weights(rewards_BC, beta, variant, mask_BN)
    negatives_BND = features_BCD[:, 1:].double() * mask_BN[..., None]  # 0 * padding: padding must be finite, as it is
    if variant == "centered":
        origin_B1D = torch.einsum("bn,bnd->bd", share_BN, negatives_BND)[:, None]
    else:
        origin_B1D = features_BCD[:, :1].double()
    difference_BND = (negatives_BND - origin_B1D) * mask_BN[..., None]
    if normalize:
        length_BN = difference_BND.norm(dim=-1)
        size_BN = negatives_BND.norm(dim=-1) + origin_B1D.norm(dim=-1)
        has_direction_BN = length_BN > torch.finfo(features_BCD.dtype).eps * size_BN
        weight_BN = weight_BN * _inverse_where(has_direction_BN, length_BN)
    return difference_BND * weight_BN[..., None], scale_B


def design_gram(
    gram_BCC: Tensor,
    rewards_BC: Tensor,
    beta: float,
    variant: str = "centered",
    normalize: bool = True,
    mask_BC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`design_vectors` from inner products of the features: the vectors' Gram matrix `(B, N, N)` and the scale."""
    check_name("variant", variant, VARIANTS)
    mask_BN = selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
    share_BN, weight_BN, scale_B = _pool_weights(rewards_BC, beta, variant, mask_BN)
    gram = gram_BCC.double()
    origin_BC = torch.zeros_like(gram[..., 0])
    if variant == "centered":
        origin_BC[:, 1:] = share_BN
    else:
        origin_BC[:, 0] = 1.0
    centred_BNN = centre_gram(gram, origin_BC)[:, 1:, 1:] * (mask_BN[:, :, None] & mask_BN[:, None, :])
    if normalize:
        square_BN = centred_BNN.diagonal(dim1=-2, dim2=-1)
        origin_square_B = torch.einsum("bi,bij,bj->b", origin_BC, gram, origin_BC)
        size_BN = gram.diagonal(dim1=-2, dim2=-1)[:, 1:] + origin_square_B[:, None]
        has_direction_BN = square_BN > 8 * torch.finfo(gram_BCC.dtype).eps * size_BN
        weight_BN = weight_BN * _inverse_where(has_direction_BN, square_BN.clamp(min=0).sqrt())
    return centred_BNN * weight_BN[:, :, None] * weight_BN[:, None, :], scale_B


def pl_fisher(features_CD: Tensor, rewards_C: Tensor, beta: float) -> Tensor:
    """The exact Fisher matrix `(D, D)` of one prompt's Plackett-Luce loss over the candidates given, for checks.

    beta^2 Phi^T (diag q - q q^T) Phi, q = softmax(r): the Hessian of log(1 + sum_i exp s_i) under a log-linear policy.
    """
    share_C = torch.softmax(rewards_C, dim=0)
    centred_CD = features_CD - share_C @ features_CD
    return beta**2 * (share_C[:, None] * centred_CD).T @ centred_CD


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
    share_BN, _, _ = _pool_weights(rewards_BC, 1.0, "centered", mask_BN)
    centred_BCC = centre_gram(gram_BCC.double(), torch.nn.functional.pad(share_BN, (1, 0)))
    square_BC = centred_BCC.diagonal(dim1=-2, dim2=-1)
    size_BC = gram_BCC.diagonal(dim1=-2, dim2=-1)
    has_direction_BC = square_BC > 8 * torch.finfo(gram_BCC.dtype).eps * size_BC
    has_direction_BC = has_direction_BC & torch.nn.functional.pad(mask_BN, (1, 0), value=True)
    unit_BC = _inverse_where(has_direction_BC, square_BC.clamp(min=0).sqrt())
    return centred_BCC * unit_BC[:, :, None] * unit_BC[:, None, :]


def mean_square(square_BN: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Mean of |v_i|^2 over a prompt's candidates `(B,)`, the unit of a relative ridge; 1 where all vectors are zero."""
    count_B = square_BN.shape[1] if mask_BN is None else mask_BN.sum(-1).clamp(min=1)
    mean_B = (square_BN if mask_BN is None else square_BN * mask_BN).sum(-1) / count_B
    return torch.where(mean_B > 0, mean_B, 1.0)


def _pool_weights(rewards_BC: Tensor, beta: float, variant: str, mask_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p over the pool, the factor of each difference, and the scale, all float64."""
    rewards_BC = rewards_BC.double()
    advantage_BN = (rewards_BC[:, 1:] - rewards_BC[:, :1]).masked_fill(~mask_BN, -math.inf)
    total_B1 = torch.logsumexp(advantage_BN, dim=-1, keepdim=True)
    share_BN = torch.where(mask_BN, (advantage_BN - total_B1).exp(), 0.0)
    if variant == "pairwise":
        variance_BN = torch.sigmoid(advantage_BN) * torch.sigmoid(-advantage_BN)
        return share_BN, variance_BN.sqrt(), torch.full_like(total_B1[:, 0], beta**2)
    return share_BN, share_BN.sqrt(), beta**2 * torch.sigmoid(total_B1[:, 0])


def _inverse_where(condition: Tensor, value: Tensor) -> Tensor:
    return torch.where(condition, 1.0 / torch.where(condition, value, 1.0), 0.0)
