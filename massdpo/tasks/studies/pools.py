"""Pools of a world without text, and the design of `selector=mass` on pools, for the studies.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), S clusters, D features.
"""

import torch
from torch import Tensor

from massdpo.selection import logdet
from massdpo.selection.gram import candidate_gram
from massdpo.store import keyed_seed
from massdpo.tensors import CandidateScores, Picks, PoolStatistics, members

CLUSTERS = 5


def clustered_pools(prompts: int, size: int, seed: int, width: int = 16) -> PoolStatistics:
    """Pools whose features gather around a few centres, as near-duplicates do, with random log-probs."""
    noise = torch.Generator().manual_seed(keyed_seed("clustered pools", size, seed))
    centre_BSD = torch.randn(prompts, CLUSTERS, width, generator=noise)
    which_BC = torch.randint(CLUSTERS, (prompts, size + 1), generator=noise)
    features_BCD = centre_BSD[torch.arange(prompts)[:, None], which_BC]
    features_BCD = features_BCD + 0.3 * torch.randn(features_BCD.shape, generator=noise)
    logp_BC = 2 * torch.randn(prompts, size + 1, generator=noise)
    return pools_of(features_BCD, logp_BC, torch.rand(prompts, size, generator=noise), beta=1.0)


def pools_of(features_BCD: Tensor, logp_BC: Tensor, noise_BN: Tensor, beta: float) -> PoolStatistics:
    """Pool statistics of these log-probs and features; the reference is uniform."""
    ones_BC = torch.ones_like(logp_BC, dtype=torch.int64)
    mask_BC = ones_BC.bool()
    scores = CandidateScores(logp_BC, logp_BC[..., None], ones_BC, mask_BC, features_BCD, precision=torch.float64)
    names = [f"prompt {row}" for row in range(len(logp_BC))]
    return PoolStatistics(scores, torch.zeros_like(logp_BC), beta, noise_BN, names)


def mass_design(pool: PoolStatistics, features: str = "mean") -> tuple[Tensor, Tensor]:
    """Gram matrix of the design vectors and the ridge, both as `selector=mass` has them by default."""
    gram_BCC, mask_BC = candidate_gram(pool, features), pool.scores.mask_BC
    gram_BNN, _ = logdet.design_gram(gram_BCC, pool.rewards_BC, pool.beta, mask_BC=mask_BC)
    return gram_BNN, logdet.mean_square(gram_BNN.diagonal(dim1=-2, dim2=-1), pool.mask_BN)


def value_of(gram_BNN: Tensor, ridge_B: Tensor, picks: Picks) -> Tensor:
    """The log-det `(B,)` that a given selection reaches."""
    picked_BN = members(picks.index_BK, picks.mask_BK, gram_BNN.shape[1])
    return logdet.select_logdet_gram(gram_BNN, picks.index_BK.shape[1], ridge_B, mask_BN=picked_BN).logdet_B
