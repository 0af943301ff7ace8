"""The subset with the largest log det(ridge I + scale sum_S v_i v_i^T): the design objective of MASS-DPO.

Suffixes: B prompts, N pool negatives, K selected, D features.
"""

import torch
from torch import Tensor

from massdpo.selection.logdet import limits
from massdpo.selection.logdet.arguments import check_exact, factor, selectable
from massdpo.selection.logdet.design import inner_products
from massdpo.selection.logdet.greedy import ROUND_OFF, LogdetSelection, greedy, greedy_gram
from massdpo.selection.logdet.search import enumerate_all, exchange, in_greedy_order
from massdpo.tensors import rows

SOLVERS = ("greedy", "swap", "exact")


def select_logdet(
    vectors_BND: Tensor,
    k: int,
    ridge: float | Tensor,
    scale: float | Tensor = 1.0,
    mask_BN: Tensor | None = None,
    solver: str = "greedy",
    certify: bool = True,
    resolution: float = ROUND_OFF,
) -> LogdetSelection:
    """Choose k rows per prompt that maximise log det(ridge I + scale sum_{i in S} v_i v_i^T).

    `ridge` and `scale` are numbers or `(B,)`; only candidates where `mask_BN` is True can be selected (all by default).
    `greedy` is within 1 - 1/e of the best log-det above the empty set's (Nemhauser et al. 1978), `swap` improves it by
    single exchanges, `exact` enumerates up to EXACT_LIMIT subsets. `resolution` is the relative precision of the inner
    products: of candidates that gain alike within it, the first is taken.
    `certify=False` leaves the upper bound out.
    Raises UserError for too many subsets for `exact`.
    """
    if vectors_BND.shape[1] <= limits.DENSE_POOL or solver != "greedy":
        return select_logdet_gram(inner_products(vectors_BND), k, ridge, scale, mask_BN, solver, certify, resolution)
    factor_B = factor(ridge, scale, vectors_BND)
    vectors = vectors_BND.double()

    def row(index_B: Tensor) -> Tensor:
        picked_BD1 = vectors[rows(index_B), index_B][..., None] * factor_B[:, None, None]
        return (vectors @ picked_BD1)[..., 0]

    diagonal_BN = vectors.square().sum(-1) * factor_B[:, None]
    mask_BN = selectable(mask_BN, diagonal_BN)
    return greedy(row, diagonal_BN, mask_BN, k, resolution, certify)


def select_logdet_gram(
    gram_BNN: Tensor,
    k: int,
    ridge: float | Tensor,
    scale: float | Tensor = 1.0,
    mask_BN: Tensor | None = None,
    solver: str = "greedy",
    certify: bool = True,
    resolution: float = ROUND_OFF,
) -> LogdetSelection:
    """`select_logdet` from the inner products `v_i . v_j` alone."""
    gram_BNN = gram_BNN.double() * factor(ridge, scale, gram_BNN)[:, None, None]
    if mask_BN is not None:
        gram_BNN = gram_BNN.masked_fill(~(mask_BN[:, :, None] & mask_BN[:, None, :]), 0.0)
    mask_BN = selectable(mask_BN, gram_BNN[..., 0])
    start = greedy_gram(gram_BNN, mask_BN, k, certify, resolution)
    if certify and gram_BNN.shape[1] <= limits.SPECTRUM_POOL:
        start = start._replace(upper_bound_B=torch.minimum(start.upper_bound_B, _eigenvalue_bound(gram_BNN, k)))
    if solver == "greedy":
        return start
    if solver == "swap":
        members_BN = exchange(gram_BNN, mask_BN, start, resolution)
        return in_greedy_order(gram_BNN, members_BN, start, resolution)
    check_exact(int(mask_BN.sum(-1).max()), k)
    members_BN = enumerate_all(gram_BNN, mask_BN, start, resolution)
    best = in_greedy_order(gram_BNN, members_BN, start, resolution)
    return best._replace(upper_bound_B=best.logdet_B)


def _eigenvalue_bound(gram_BNN: Tensor, k: int) -> Tensor:
    """log det(I + A_S) <= sum of the k largest log(1 + eigenvalue of A): eigenvalues interlace (Cauchy)."""
    return torch.linalg.eigvalsh(gram_BNN)[:, -k:].clamp(min=0.0).log1p().sum(-1)
