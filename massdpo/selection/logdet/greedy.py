"""The greedy maximum of log det(I + A_S), A = (scale / ridge) V V^T, with a proved bound: one row of A per pick.

An incremental Cholesky factor of I + A_S keeps every candidate's marginal gain up to date in O(N k) per step: the
greedy MAP of Chen, Zhang and Zhou 2018 (arXiv 1709.05135).

Suffixes: B prompts, N pool negatives, K selected, J steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from massdpo.tensors import first, rows

ROUND_OFF = 16 * torch.finfo(torch.float64).eps  # of the subtractions that update an excess


class LogdetSelection(NamedTuple):
    """The selected negatives in pick order. Where a prompt has fewer than k to select from, all of them are taken.

    `gains_BK` sum to `logdet_B` = log det H(S) - log det H(empty), in nats; `upper_bound_B` is a proved bound on the
    best that any k candidates reach (NaN for greedy `subset_fisher`, which has no bound, and where none was asked
    for). In the rest of a short row `mask_BK` is False, the index 0 and the gain 0. `ties_B` counts the greedy steps
    that several candidates won alike.
    """

    indices_BK: Tensor
    gains_BK: Tensor
    logdet_B: Tensor
    upper_bound_B: Tensor
    mask_BK: Tensor
    ties_B: Tensor

    @property
    def certified_ratio_B(self) -> Tensor:
        """At least this share of the best achievable log-det was reached; 0/0 counts as 1."""
        return torch.where(self.upper_bound_B == 0, 1.0, self.logdet_B / self.upper_bound_B)


def greedy(
    row: Callable[[Tensor], Tensor], diagonal_BN: Tensor, mask_BN: Tensor, k: int, resolution: float, certify: bool
) -> LogdetSelection:
    """Greedy from rows of A on demand. A candidate's excess is scale v^T H^{-1} v: its gain is log1p(excess).

    An excess is what subtractions leave of the candidate's diagonal, so it is known only to within `resolution` times
    that: anything smaller counts as nothing, and whatever may be as large as the best is a tie.
    """
    batch, pool = diagonal_BN.shape
    rows_B = rows(diagonal_BN[:, 0])
    taken_BN = ~mask_BN
    excess_BN = diagonal_BN.clamp(min=0.0)
    unsure_BN = resolution * excess_BN
    factor_BJN = diagonal_BN.new_zeros(batch, k, pool)
    opens, ties, picks, excesses = [], [], [], []
    for step in range(k):
        open_BN = excess_BN.masked_fill(taken_BN, -math.inf)
        surely_B1 = (1 - 1e-10) * (open_BN - unsure_BN).amax(-1, keepdim=True)  # the best has at least that
        tied_BN = open_BN >= torch.maximum(surely_B1 - unsure_BN, unsure_BN * (surely_B1 > 0))
        index_B1 = tied_BN.view(torch.uint8).argmax(-1, keepdim=True)  # the first of equals
        index_B = index_B1[:, 0]
        picked_B1 = excess_BN.gather(1, index_B1)
        opens.append(open_BN)
        ties.append(tied_BN)
        picks.append(index_B1)
        excesses.append(picked_B1)
        if step == k - 1 and not certify:
            break  # what the last pick leaves to the others matters to the bound alone
        new_BN = row(index_B)
        if step:  # not by baddbmm: starting threads costs more than these few products
            seen_BJ1 = factor_BJN[rows_B, :step, index_B][..., None]
            new_BN = new_BN - (factor_BJN[:, :step] * seen_BJ1).sum(1)
        new_BN = new_BN / (1.0 + picked_B1).sqrt()
        factor_BJN[:, step] = new_BN
        excess_BN = torch.addcmul(excess_BN, new_BN, new_BN, value=-1).clamp_(min=0.0)
        taken_BN = taken_BN.scatter(1, index_B1, True)
    mask_BK = first(mask_BN.sum(-1), k)
    gains_BK = torch.cat(excesses, dim=1).log1p() * mask_BK
    upper_bound_B = torch.full_like(gains_BK[:, 0], math.nan)
    if certify:  # submodularity at every greedy prefix: best <= f(prefix) + the k largest marginal gains there
        opens.append(excess_BN.masked_fill(taken_BN, -math.inf))
        prospects_JB = torch.stack(opens).topk(min(k, pool)).values.clamp(min=0.0).log1p().sum(-1)
        reached_BJ = torch.nn.functional.pad(gains_BK.cumsum(-1), (1, 0))
        upper_bound_B = (reached_BJ + prospects_JB.T).amin(-1)
    ties_BK = (torch.stack(ties, dim=1).sum(-1) > 1) & mask_BK
    return LogdetSelection(
        indices_BK=torch.cat(picks, dim=1) * mask_BK,
        gains_BK=gains_BK,
        logdet_B=gains_BK.sum(-1),
        upper_bound_B=upper_bound_B,
        mask_BK=mask_BK,
        ties_B=ties_BK.sum(-1),
    )


def greedy_gram(
    gram_BNN: Tensor, mask_BN: Tensor, k: int, certify: bool, resolution: float = ROUND_OFF
) -> LogdetSelection:
    """`greedy` from all of A."""
    rows_B = rows(mask_BN[:, 0])

    def row(index_B: Tensor) -> Tensor:
        return gram_BNN[rows_B, index_B]

    return greedy(row, gram_BNN.diagonal(dim1=-2, dim2=-1), mask_BN, k, resolution, certify)
