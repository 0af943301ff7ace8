"""The inner products of a pool's candidates, which selectors by information and by diversity see.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), D features.
"""

import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.selection import logdet
from massdpo.selection.pools import check_finite
from massdpo.tensors import PoolStatistics


def hidden_features(pool: PoolStatistics) -> Tensor:
    """The pool's hidden-state features, known to be finite."""
    features_BCD = pool.scores.features_BCD
    assert features_BCD is not None, "the scorer was built with the selector's `features`"
    check_finite(pool, features_BCD)
    return features_BCD


def reorder(value_BC: Tensor, order_BN: Tensor) -> Tensor:
    """Columns of the candidates with the negatives in another order, the chosen one first as ever."""
    return value_BC.gather(1, torch.nn.functional.pad(order_BN + 1, (1, 0)))


def reorder_gram(gram_BCC: Tensor, order_BN: Tensor) -> Tensor:
    order_BC = torch.nn.functional.pad(order_BN + 1, (1, 0))
    rows_B11 = torch.arange(len(order_BC), device=order_BC.device)[:, None, None]
    return gram_BCC[rows_B11, order_BC[:, :, None], order_BC[:, None, :]]


def candidate_gram(pool: PoolStatistics, features: str) -> Tensor:
    """Inner products of the candidates' features `(B, C, C)`, float64, known to be finite.

    Hidden states of one prompt are almost alike, so they are taken relative to the chosen one first: a Gram matrix of
    what is left loses nothing when it is centred.
    """
    if features == "head":
        gram_BCC = pool.scores.gram_BCC
        assert gram_BCC is not None, "the scorer was built with features=head"
        check_finite(pool, gram_BCC.diagonal(dim1=-2, dim2=-1))
        return gram_BCC.double()
    if pool.mask_BN.shape[1] > logdet.limits.DENSE_POOL:
        raise UserError(
            f"this selector needs all inner products, a pool of {pool.mask_BN.shape[1]:,} is above its limit of "
            f"{logdet.limits.DENSE_POOL:,}: use selector=mass with variant=centered or relative and solver=greedy"
        )
    features_BCD = hidden_features(pool).float()
    return logdet.inner_products(features_BCD, features_BCD[:, :1])


def square_distances(pool: PoolStatistics, features: str, normalize: bool) -> Tensor:
    """Squared distances of the candidates `(B, C, C)`; `normalize`: of unit vectors from the pool's plain mean."""
    gram_BCC = candidate_gram(pool, features)
    if normalize:
        gram_BCC = logdet.unit_gram(gram_BCC, torch.zeros_like(gram_BCC[..., 0]), pool.scores.mask_BC)
    square_BC = gram_BCC.diagonal(dim1=-2, dim2=-1)
    return square_BC[:, :, None] + square_BC[:, None, :] - 2 * gram_BCC
