"""Selectors by the Fisher information of what they pick.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, D features.
"""

import math

import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.model.features import FEATURES
from massdpo.selection import logdet
from massdpo.selection.gram import candidate_gram
from massdpo.selection.pools import PickK
from massdpo.tensors import Picks, PoolStatistics


class Mass(PickK):
    """The subset with the largest log det(ridge I + Fisher information): MASS-DPO, arXiv 2605.10784.

    variant: `centered` (the paper's design objective), `relative` (against the chosen response, uncentred) or
    `subset_fisher` (the exact Fisher information of the loss over the picks; no guarantee, greedy or exact only).
    normalize: bring the centred features to unit length before their share in the gradient weighs them.
    ridge: gamma, or with ridge_relative in units of the mean diagonal of the prompt's own information matrix.
    features: `mean`, `last` or `head`; solver: `greedy`, `swap` or `exact`.
    """

    def __init__(
        self,
        k: int,
        variant: str = "centered",
        features: str = "mean",
        normalize: bool = True,
        ridge: float = 1.0,
        ridge_relative: bool = True,
        solver: str = "greedy",
        short_pool: str = "error",
    ):
        super().__init__(k, short_pool)
        logdet.check_name("variant", variant, ("centered", "relative", "subset_fisher"))
        logdet.check_name("features", features, FEATURES)
        logdet.check_name("solver", solver, ("greedy", "exact") if variant == "subset_fisher" else logdet.SOLVERS)
        if not (isinstance(ridge, (int, float)) and 0 < ridge < math.inf):
            raise UserError(f"the ridge must be a positive number, got {ridge!r}")
        self.features: str = features
        self.variant, self.normalize = variant, normalize
        self.ridge, self.ridge_relative, self.solver = ridge, ridge_relative, solver

    def pick(self, pool: PoolStatistics) -> Picks:
        large = pool.mask_BN.shape[1] > logdet.limits.DENSE_POOL and self.solver == "greedy"
        if large and self.features != "head" and self.variant != "subset_fisher":
            selection = self._select_from_vectors(pool)
        else:
            selection = self._select_from_gram(pool)
        info = {"logdet": selection.logdet_B.float(), "ties": selection.ties_B.float()}
        if pool.observe and self.variant != "subset_fisher":
            info["certified_ratio"] = selection.certified_ratio_B.float()
        return Picks(selection.indices_BK, selection.mask_BK, info, selection.gains_BK)

    def _select_from_gram(self, pool: PoolStatistics) -> logdet.LogdetSelection:
        gram_BCC, rewards_BC = candidate_gram(pool, self.features), pool.rewards_BC
        mask_BC, mask_BN = pool.scores.mask_BC, pool.mask_BN
        design = "centered" if self.variant == "subset_fisher" else self.variant
        vectors_BNN, scale_B = logdet.design_gram(
            gram_BCC, rewards_BC, pool.beta, design, self.normalize, mask_BC, pool.resolution.features
        )
        mean_B = logdet.mean_square(vectors_BNN.diagonal(dim1=-2, dim2=-1), mask_BN)
        if self.variant == "subset_fisher":
            if self.normalize:
                gram_BCC = logdet.unit_gram(gram_BCC, rewards_BC, mask_BC)
            # Where the chosen response wins beyond float64's range, every gain is 0 and the tie rule decides.
            ridge = (self.ridge * mean_B * scale_B).clamp(min=1e-300) if self.ridge_relative else self.ridge
            return logdet.select_subset_fisher(
                gram_BCC, rewards_BC, pool.beta, self.k, ridge, mask_BN, self.solver, pool.resolution.features
            )
        ridge, scale_B = self._weighing(mean_B, scale_B)
        return logdet.select_logdet_gram(
            vectors_BNN, self.k, ridge, scale_B, mask_BN, self.solver, pool.observe, pool.resolution.features
        )

    def _select_from_vectors(self, pool: PoolStatistics) -> logdet.LogdetSelection:
        """For large pools: only the picked rows of the Gram matrix are ever made."""
        features_BCD, mask_BN, resolution = pool.scores.features_BCD, pool.mask_BN, pool.resolution.features
        assert features_BCD is not None, "the scorer was built with the selector's `features`"
        vectors_BND, scale_B = logdet.design_vectors(
            features_BCD, pool.rewards_BC, pool.beta, self.variant, self.normalize, pool.scores.mask_BC, resolution
        )
        mean_B = logdet.mean_square(vectors_BND.square().sum(-1), mask_BN)
        ridge, scale_B = self._weighing(mean_B, scale_B)
        return logdet.select_logdet(vectors_BND, self.k, ridge, scale_B, mask_BN, self.solver, pool.observe, resolution)

    def _weighing(self, mean_B: Tensor, scale_B: Tensor) -> tuple[float | Tensor, Tensor]:
        """Gamma and the vectors' scale: a relative gamma is ridge * mean(scale |v|^2), where the scale cancels."""
        return (self.ridge * mean_B, torch.ones_like(scale_B)) if self.ridge_relative else (self.ridge, scale_B)


class Adpo(Mass):
    """Greedy log-det with the pairwise vectors of Active DPO (arXiv 2503.01076): mass with another design."""

    def __init__(
        self,
        k: int,
        features: str = "mean",
        normalize: bool = True,
        ridge: float = 1.0,
        ridge_relative: bool = True,
        short_pool: str = "error",
    ):
        super().__init__(k, "relative", features, normalize, ridge, ridge_relative, "greedy", short_pool)
        self.variant = "pairwise"
