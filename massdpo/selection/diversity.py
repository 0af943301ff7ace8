"""Selectors by how unlike their picks are: a determinantal sample, and farthest first.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, L sizes of a
sample (0 to k), X random numbers.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from massdpo.model.features import FEATURES
from massdpo.selection import logdet
from massdpo.selection.gram import candidate_gram, square_distances
from massdpo.selection.information import Mass
from massdpo.selection.pools import PickK, in_order
from massdpo.store import keyed_seed
from massdpo.tensors import Picks, PoolStatistics, rows

DISTANCE_ERROR = 1e-12  # of squared distances in float64, relative to the largest
APART = 1e-6  # times the noise, added to a kernel whose smallest eigenvalue is 1


class Dpp(Mass):
    """A k-DPP sample of the kernel whose most probable set is the one `mass` looks for: P(S) ~ det H(S).

    Sampling: Kulesza and Taskar 2012 (arXiv 1207.6083), algorithms 1 and 8, its random numbers keyed by the noise.
    """

    def __init__(
        self, k: int, features: str = "mean", normalize: bool = True, ridge: float = 1.0, short_pool: str = "error"
    ):
        super().__init__(k, "centered", features, normalize, ridge, True, "greedy", short_pool)

    def __call__(self, pool: PoolStatistics) -> Picks:
        """In the pool's own order: its noise has to decide the sample, not ties."""
        self.check(pool)
        mask_BN, gram_BCC, mask_BC = pool.mask_BN, candidate_gram(pool, self.features), pool.scores.mask_BC
        gram_BNN, _ = logdet.design_gram(gram_BCC, pool.rewards_BC, pool.beta, "centered", self.normalize, mask_BC)
        ridge_B = self.ridge * logdet.mean_square(gram_BNN.diagonal(dim1=-2, dim2=-1), mask_BN)
        kernel_BNN = gram_BNN / ridge_B[:, None, None] + torch.diag_embed(mask_BN.double())
        picks = in_order(sample_dpp(kernel_BNN, self.k, mask_BN, pool.noise_BN), mask_BN)
        return replace(picks, index_BK=picks.index_BK * picks.mask_BK)


class Farthest(PickK):
    """Farthest first, diversity alone: each pick is farthest from the chosen response and all picks before it."""

    def __init__(self, k: int, features: str = "mean", normalize: bool = True, short_pool: str = "error"):
        super().__init__(k, short_pool)
        logdet.check_name("features", features, FEATURES)
        self.features: str = features
        self.normalize = normalize

    def pick(self, pool: PoolStatistics) -> Picks:
        distance_BCC = square_distances(pool, self.features, self.normalize)
        unsure_B1 = DISTANCE_ERROR * distance_BCC.amax((1, 2))[:, None]  # copies of what is picked are all equally near
        nearest_BN = distance_BCC[:, 0, 1:].masked_fill(~pool.mask_BN, -math.inf)
        picked = []
        for _ in range(min(self.k, nearest_BN.shape[1])):
            best_B1 = nearest_BN.amax(-1, keepdim=True)
            tied_BN = nearest_BN >= best_B1 * (1 - pool.resolution.features) - unsure_B1
            index_B1 = tied_BN.to(torch.uint8).argmax(-1, keepdim=True)
            picked.append(index_B1)
            nearest_BN = torch.minimum(nearest_BN, distance_BCC[rows(index_B1), index_B1 + 1, 1:][:, 0])
            nearest_BN = nearest_BN.scatter(1, index_B1, -math.inf)
        return in_order(torch.cat(picked, dim=1), pool.mask_BN)


def sample_dpp(kernel_BNN: Tensor, k: int, mask_BN: Tensor, noise_BN: Tensor) -> Tensor:
    """One k-DPP sample per prompt, indices `(B, K)`, from kernels that are zero where masked."""
    batch, pool = mask_BN.shape
    count_B = mask_BN.sum(-1)
    uniform_BX = torch.zeros(batch, pool + k, dtype=torch.float64)
    for row in range(batch):  # by the real candidates' noise alone, so that padding changes nothing
        generator = torch.Generator().manual_seed(keyed_seed("dpp", noise_BN[row][mask_BN[row]]))
        numbers = torch.rand(int(count_B[row]) + k, generator=generator, dtype=torch.float64)
        uniform_BX[row, -len(numbers) :] = numbers
    uniform_BX = uniform_BX.to(kernel_BNN.device)
    # Near-duplicates share an eigenvalue, and which vectors then span its space depends on the padding: part them.
    value_BN, vector_BNN = torch.linalg.eigh(kernel_BNN + torch.diag_embed(APART * noise_BN * mask_BN))
    value_BN = value_BN.clamp(min=0.0).log()
    # symmetric[n]: logarithms of the elementary symmetric polynomials e_0..e_k of the first n eigenvalues
    symmetric = [torch.nn.functional.pad(value_BN.new_full((batch, k), -math.inf), (1, 0))]
    for n in range(pool):
        shifted_BL = torch.nn.functional.pad(symmetric[-1][:, :-1], (1, 0), value=-math.inf)
        symmetric.append(torch.logaddexp(symmetric[-1], value_BN[:, n : n + 1] + shifted_BL))
    left_B1 = count_B.clamp(max=k)[:, None]
    chosen_BN = torch.zeros_like(mask_BN)
    for n in reversed(range(pool)):  # which eigenvectors span the sample
        without_B1 = symmetric[n].gather(1, left_B1)
        chance_B1 = (without_B1 - symmetric[n + 1].gather(1, left_B1)).exp()  # of leaving it out
        take_B1 = (left_B1 > 0) & ((uniform_BX[:, n : n + 1] >= chance_B1) | (without_B1 == -math.inf))
        chosen_BN[:, n : n + 1] = take_B1
        left_B1 = left_B1 - take_B1.long()
    span_BNN = vector_BNN * chosen_BN[:, None]
    projection_BNN = span_BNN @ span_BNN.mT
    left_BN = projection_BNN.diagonal(dim1=-2, dim2=-1).clamp(min=0.0)
    rows_B = torch.arange(batch, device=mask_BN.device)
    picked: list[Tensor] = []
    factors: list[Tensor] = []
    for step in range(min(k, pool)):  # a candidate in proportion to its squared length, then project it out
        cumulative_BN = (left_BN * mask_BN).cumsum(-1)
        threshold_B1 = uniform_BX[:, pool + step : pool + step + 1] * cumulative_BN[:, -1:]
        index_B = (cumulative_BN > threshold_B1).to(torch.uint8).argmax(-1)
        picked.append(index_B)
        row_BN = projection_BNN[rows_B, index_B]
        for factor_BN in factors:
            row_BN = row_BN - factor_BN * factor_BN[rows_B, index_B][:, None]
        factors.append(row_BN * left_BN[rows_B, index_B].clamp(min=1e-300).rsqrt()[:, None])
        left_BN = (left_BN - factors[-1].square()).clamp(min=0.0)
        left_BN = left_BN.scatter(1, index_B[:, None], 0.0)
    return torch.stack(picked, dim=1)
