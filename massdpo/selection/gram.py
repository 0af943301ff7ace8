"""The inner products of a pool's candidates, which selectors by information and by diversity see.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), D features.
"""

import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.selection import logdet
from massdpo.tensors import PoolStatistics


def candidate_gram(pool: PoolStatistics, features: str) -> Tensor:
    """Inner products of the candidates' features `(B, C, C)`, float64.

    Hidden states of one prompt are almost alike, so they are taken relative to the chosen one first: a Gram matrix of
    what is left loses nothing when it is centred.
    """
    if features == "head":
        assert pool.scores.gram_BCC is not None, "the scorer was built with features=head"
        return pool.scores.gram_BCC.double()
    if pool.mask_BN.shape[1] > logdet.limits.DENSE_POOL:
        raise UserError(
            f"this selector needs all inner products, and a pool of {pool.mask_BN.shape[1]:,} is above its limit of "
            f"{logdet.limits.DENSE_POOL:,}: use selector=mass with variant=centered or relative and solver=greedy"
        )
    assert pool.scores.features_BCD is not None, "the scorer was built with the selector's `features`"
    features_BCD = pool.scores.features_BCD.float()
    return logdet.inner_products(features_BCD, features_BCD[:, :1])


def square_distances(pool: PoolStatistics, features: str, normalize: bool) -> Tensor:
    """Squared distances of the candidates `(B, C, C)`; `normalize`: of unit vectors from the pool's plain mean."""
    gram_BCC = candidate_gram(pool, features)
    if normalize:
        gram_BCC = logdet.unit_gram(gram_BCC, torch.zeros_like(gram_BCC[..., 0]), pool.scores.mask_BC)
    square_BC = gram_BCC.diagonal(dim1=-2, dim2=-1)
    return (square_BC[:, :, None] + square_BC[:, None, :] - 2 * gram_BCC).clamp(min=0.0)
