"""Fisher information of a Plackett-Luce preference, and the subsets of negatives that say most in its log-determinant.

Everything is batched over prompts and never builds a D x D matrix: with A = (scale / ridge) V V^T,
`log det(ridge I + scale sum_S v_i v_i^T) - D log ridge = log det(I + A_S)`, and an incremental Cholesky factor of
I + A_S keeps every candidate's marginal gain up to date in O(N k) a step: the greedy MAP of Chen, Zhang and Zhou 2018
(arXiv 1709.05135) for the design objective of MASS-DPO (arXiv 2605.10784). `swap` and `exact` share the same update.
The small factor is float64 whatever the inputs are.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, M subsets,
J members of a subset, D features.
"""

import itertools
import math
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from massdpo.errors import UserError

VARIANTS = ("centered", "relative", "pairwise")
SOLVERS = ("greedy", "swap", "exact")
EXACT_LIMIT = 200_000  # subsets a prompt that `exact` enumerates; C(20, 4) is 4,845
DENSE_POOL = 1_000  # above this many candidates no N x N matrix is built and the eigenvalue bound is left out
CHUNK_NUMBERS = 1 << 20  # float64 numbers held at a time while subsets are enumerated
CACHE_NUMBERS = 1 << 17  # float64 numbers, 1 MB, that a CPU core keeps close


class LogdetSelection(NamedTuple):
    """The selected negatives in pick order. Where a prompt has fewer than k to select from, all of them are taken.

    `gains_BK` sum to `logdet_B` = log det H(S) - log det H(empty), in nats; `upper_bound_B` is a proved bound on the
    best that any k candidates reach (NaN for `subset_fisher` by greedy, which has none, and where it was not asked
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


# Design vectors ------------------------------------------------------------------------------------------------------


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
    mask_BN = _selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
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
    mask_BN = _selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
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
    step = max(1, torch.get_num_threads() * CACHE_NUMBERS // (pool * size))
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
    mask_BN = _selectable(None if mask_BC is None else mask_BC[:, 1:], rewards_BC[:, 1:])
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


# Maximising log det(I + A_S) -----------------------------------------------------------------------------------------


def select_logdet(
    vectors_BND: Tensor,
    k: int,
    ridge: float | Tensor,
    scale: float | Tensor = 1.0,
    mask_BN: Tensor | None = None,
    solver: str = "greedy",
    certify: bool = True,
) -> LogdetSelection:
    """Choose k rows a prompt that maximise log det(ridge I + scale sum_{i in S} v_i v_i^T).

    `ridge` and `scale` are numbers or `(B,)`; only candidates where `mask_BN` is True can be selected (all by default).
    `greedy` is within 1 - 1/e of the best log-det above the empty set's (Nemhauser et al. 1978), `swap` improves it by
    single exchanges, `exact` enumerates up to EXACT_LIMIT subsets. Of candidates that gain alike the first is taken.
    `certify=False` leaves the upper bound out.
    Raises UserError for an unknown solver, a ridge that is not positive, too many subsets for `exact`, or vectors that
    are not finite, naming their rows.
    """
    check_name("solver", solver, SOLVERS)
    pool = vectors_BND.shape[1]
    if pool <= DENSE_POOL:
        return select_logdet_gram(inner_products(vectors_BND), k, ridge, scale, mask_BN, solver, certify)
    if solver != "greedy":
        raise UserError(
            f"solver={solver} needs all inner products, a pool of {pool:,} is above its limit of {DENSE_POOL:,}: "
            "use solver=greedy"
        )
    factor_B = _factor(ridge, scale, vectors_BND)
    vectors = vectors_BND.double()

    def row(index_B: Tensor) -> Tensor:
        picked_BD1 = vectors[_rows(index_B), index_B][..., None] * factor_B[:, None, None]
        return (vectors @ picked_BD1)[..., 0]

    diagonal_BN = vectors.square().sum(-1) * factor_B[:, None]
    mask_BN = _selectable(mask_BN, diagonal_BN)
    _check_finite(diagonal_BN.masked_fill(~mask_BN, 0.0))
    return _greedy(row, diagonal_BN, mask_BN, k, certify)


def select_logdet_gram(
    gram_BNN: Tensor,
    k: int,
    ridge: float | Tensor,
    scale: float | Tensor = 1.0,
    mask_BN: Tensor | None = None,
    solver: str = "greedy",
    certify: bool = True,
) -> LogdetSelection:
    """`select_logdet` from the inner products `v_i . v_j` alone."""
    check_name("solver", solver, SOLVERS)
    gram_BNN = gram_BNN.double() * _factor(ridge, scale, gram_BNN)[:, None, None]
    if mask_BN is not None:
        gram_BNN = gram_BNN.masked_fill(~(mask_BN[:, :, None] & mask_BN[:, None, :]), 0.0)
    mask_BN = _selectable(mask_BN, gram_BNN[..., 0])
    _check_finite(gram_BNN)
    start = _greedy_gram(gram_BNN, mask_BN, k, certify)
    if certify and gram_BNN.shape[1] <= DENSE_POOL:
        start = start._replace(upper_bound_B=torch.minimum(start.upper_bound_B, _eigenvalue_bound(gram_BNN, k)))
    if solver == "greedy":
        return start
    if solver == "swap":
        members_BN = _exchange(gram_BNN, mask_BN, start)
        return _in_greedy_order(gram_BNN, members_BN, start)
    check_exact(int(mask_BN.sum(-1).max()), k)
    members_BN = _enumerate(gram_BNN, mask_BN, start)
    best = _in_greedy_order(gram_BNN, members_BN, start)
    return best._replace(upper_bound_B=best.logdet_B)


def check_exact(pool: int, k: int) -> None:
    """Raise UserError where `exact` would have to look at more than EXACT_LIMIT subsets of a pool."""
    subsets = math.comb(pool, min(k, pool))
    if subsets > EXACT_LIMIT:
        raise UserError(
            f"solver=exact would look at {subsets:,} subsets ({k} of {pool} candidates), above its limit of "
            f"{EXACT_LIMIT:,}: use solver=swap or solver=greedy"
        )


def check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raise UserError, with the nearest known name, where `name` is not among `known`."""
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown {what} '{name}': {hint}it is one of {', '.join(known)}")


def _check_finite(gram: Tensor) -> None:
    if not math.isfinite(float(gram.sum())):  # one pass; only where it is not, look closer
        rows = (~gram.isfinite().flatten(1).all(-1)).nonzero()[:, 0].tolist()
        if rows:
            raise UserError(
                f"features or rewards that are not finite in {len(rows)} of {len(gram)} prompts: rows {rows[:5]}"
            )


def _factor(ridge: float | Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    """scale / ridge, `(B,)` float64."""
    ridge_B = torch.as_tensor(ridge, dtype=torch.float64, device=like.device).expand(like.shape[0])
    wrong_B = ~((ridge_B > 0) & ridge_B.isfinite())
    if bool(wrong_B.any()):
        raise UserError(f"the ridge must be a positive number, got {float(ridge_B[wrong_B][0]):g}")
    return torch.as_tensor(scale, dtype=torch.float64, device=like.device) / ridge_B


def _selectable(mask_BN: Tensor | None, like_BN: Tensor) -> Tensor:
    return torch.ones_like(like_BN, dtype=torch.bool) if mask_BN is None else mask_BN


def _rows(index: Tensor) -> Tensor:
    """0..B-1, shaped to index the first dimension beside `index`."""
    return torch.arange(index.shape[0], device=index.device).view(-1, *[1] * (index.dim() - 1))


def _greedy(
    row: Callable[[Tensor], Tensor], diagonal_BN: Tensor, mask_BN: Tensor, k: int, certify: bool
) -> LogdetSelection:
    """Greedy from rows of A on demand. A candidate's excess is scale v^T H^{-1} v: its gain is log1p(excess)."""
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    batch, pool = diagonal_BN.shape
    rows_B = torch.arange(batch, device=diagonal_BN.device)
    taken_BN = ~mask_BN
    excess_BN = diagonal_BN.clamp(min=0.0)
    # Round-off of the subtractions below: what differs by less is a tie.
    round_off_B1 = 16 * torch.finfo(torch.float64).eps * excess_BN.amax(-1, keepdim=True)
    factor_BJN = diagonal_BN.new_zeros(batch, k, pool)
    opens, ties, picks, excesses = [], [], [], []
    for step in range(k):
        open_BN = excess_BN.masked_fill(taken_BN, -math.inf)
        best_B1 = open_BN.amax(-1, keepdim=True)
        tied_BN = open_BN >= best_B1 * (1 - 1e-10) - round_off_B1
        index_B1 = tied_BN.view(torch.uint8).argmax(-1, keepdim=True)  # the first of equals
        index_B = index_B1[:, 0]
        picked_B1 = excess_BN.gather(1, index_B1)
        opens.append(open_BN)
        ties.append(tied_BN)
        picks.append(index_B1)
        excesses.append(picked_B1)
        new_BN = row(index_B)
        if step:  # not by baddbmm: starting threads costs more than these few products
            seen_BJ1 = factor_BJN[rows_B, :step, index_B][..., None]
            new_BN = new_BN - (factor_BJN[:, :step] * seen_BJ1).sum(1)
        new_BN = new_BN / (1.0 + picked_B1).sqrt()
        factor_BJN[:, step] = new_BN
        excess_BN = torch.addcmul(excess_BN, new_BN, new_BN, value=-1).clamp_(min=0.0)
        taken_BN = taken_BN.scatter(1, index_B1, True)
    opens.append(excess_BN.masked_fill(taken_BN, -math.inf))
    mask_BK = torch.arange(k, device=mask_BN.device) < mask_BN.sum(-1, keepdim=True)
    gains_BK = torch.cat(excesses, dim=1).log1p() * mask_BK
    upper_bound_B = torch.full_like(gains_BK[:, 0], math.nan)
    if certify:  # submodularity at every greedy prefix: best <= f(prefix) + the k largest marginal gains there
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


def _greedy_gram(gram_BNN: Tensor, mask_BN: Tensor, k: int, certify: bool) -> LogdetSelection:
    rows_B = _rows(mask_BN[:, 0])

    def row(index_B: Tensor) -> Tensor:
        return gram_BNN[rows_B, index_B]

    return _greedy(row, gram_BNN.diagonal(dim1=-2, dim2=-1), mask_BN, k, certify)


def _eigenvalue_bound(gram_BNN: Tensor, k: int) -> Tensor:
    """log det(I + A_S) <= sum of the k largest log(1 + eigenvalue of A): eigenvalues interlace (Cauchy)."""
    return torch.linalg.eigvalsh(gram_BNN)[:, -k:].clamp(min=0.0).log1p().sum(-1)


def _given(gram_BNN: Tensor, subsets_BMJ: Tensor) -> tuple[Tensor, Tensor]:
    """For each subset: its log-det `(B, M)` and every candidate's excess once it is taken `(B, M, N)`."""
    batch, subsets, members = subsets_BMJ.shape
    row_B1 = torch.arange(batch, device=gram_BNN.device)[:, None]
    excess_BMN = gram_BNN.diagonal(dim1=-2, dim2=-1)[:, None].repeat(1, subsets, 1)
    logdet_BM = gram_BNN.new_zeros(batch, subsets)
    factors: list[Tensor] = []
    for member in range(members):
        index_BM = subsets_BMJ[..., member]
        new_BMN = gram_BNN[row_B1, index_BM]
        for factor_BMN in factors:
            new_BMN = new_BMN - factor_BMN * factor_BMN.gather(2, index_BM[..., None])
        picked_BM = excess_BMN.gather(2, index_BM[..., None])[..., 0].clamp(min=0.0)
        logdet_BM = logdet_BM + picked_BM.log1p()
        factors.append(new_BMN * (1.0 + picked_BM).rsqrt()[..., None])
        excess_BMN = excess_BMN - factors[-1].square()
    return logdet_BM, excess_BMN.clamp(min=0.0)


def _exchange(gram_BNN: Tensor, mask_BN: Tensor, start: LogdetSelection) -> Tensor:
    """Members `(B, N)` after single exchanges, the best one first, until none helps any prompt."""
    k = start.indices_BK.shape[1]
    members_BN = _members(start, mask_BN)
    open_B = mask_BN.sum(-1) > k  # a short row has nothing to exchange
    others = [[j for j in range(k) if j != out] for out in range(k)]
    others_KJ = torch.tensor(others, dtype=torch.int64, device=gram_BNN.device)
    current_BK, value_B = start.indices_BK, start.logdet_B
    while bool(open_B.any()):
        logdet_BM, excess_BMN = _given(gram_BNN, current_BK[:, others_KJ])
        value_BMN = logdet_BM[..., None] + excess_BMN.log1p()
        value_BMN = value_BMN.masked_fill(~(mask_BN & ~members_BN)[:, None], -math.inf)
        best_B, where_B = value_BMN.flatten(1).max(-1)
        open_B = open_B & (best_B > value_B + 1e-10 * (1.0 + value_B))  # more than round-off, so that it ends
        out_B, in_B = where_B // mask_BN.shape[1], where_B % mask_BN.shape[1]
        exchanged_BK = current_BK.scatter(1, out_B[:, None], in_B[:, None])
        current_BK = torch.where(open_B[:, None], exchanged_BK, current_BK)
        value_B = torch.where(open_B, best_B, value_B)
        members_BN = torch.zeros_like(mask_BN).scatter(1, current_BK, True)
    short_B1 = (mask_BN.sum(-1) <= k)[:, None]
    return torch.where(short_B1, mask_BN, members_BN)


def _enumerate(gram_BNN: Tensor, mask_BN: Tensor, start: LogdetSelection) -> Tensor:
    """Members `(B, N)` of the best subset of k; the lexicographically first of equals.

    For every subset of k - 1 the excess of all others is at hand, so the last member costs nothing.
    """
    pool, k = mask_BN.shape[1], start.indices_BK.shape[1]
    short_B = mask_BN.sum(-1) <= k
    if bool(short_B.all()):
        return mask_BN
    prefixes_MJ = _subsets(pool, k - 1).to(gram_BNN.device)
    last_M = prefixes_MJ[:, -1] if k > 1 else prefixes_MJ.new_full((1,), -1)
    later_MN = torch.arange(pool, device=gram_BNN.device) > last_M[:, None]
    best_B1 = torch.full_like(start.logdet_B[:, None], -math.inf)
    best_BK = start.indices_BK
    batch = gram_BNN.shape[0]
    chunk = max(1, CHUNK_NUMBERS // (batch * pool * k))
    for at in range(0, len(prefixes_MJ), chunk):
        part_MJ = prefixes_MJ[at : at + chunk]
        logdet_BM, excess_BMN = _given(gram_BNN, part_MJ.expand(batch, -1, -1))
        closed_BMN = ~(mask_BN[:, None] & later_MN[at : at + chunk])
        excess_BMN = excess_BMN.masked_fill(closed_BMN, -1.0)  # log1p(-1) is minus infinity
        last_BM = excess_BMN.amax(-1)
        value_BM = (logdet_BM + last_BM.log1p()).masked_fill(~mask_BN[:, part_MJ].all(-1), -math.inf)
        top_B1 = value_BM.amax(-1, keepdim=True)
        prefix_B = (value_BM >= top_B1 - 1e-12 * (1.0 + top_B1)).to(torch.uint8).argmax(-1)
        excess_BN = excess_BMN[_rows(prefix_B), prefix_B]
        last_B1 = (excess_BN >= excess_BN.amax(-1, keepdim=True) * (1 - 1e-12)).to(torch.uint8).argmax(-1, keepdim=True)
        better_B1 = top_B1 > best_B1 + 1e-12 * (1.0 + top_B1)
        best_BK = torch.where(better_B1, torch.cat([part_MJ[prefix_B], last_B1], dim=1), best_BK)
        best_B1 = torch.where(better_B1, top_B1, best_B1)
    members_BN = torch.zeros_like(mask_BN).scatter(1, best_BK, True)
    return torch.where(short_B[:, None], mask_BN, members_BN)


@lru_cache(maxsize=16)
def _subsets(pool: int, size: int) -> Tensor:
    """All subsets of `size` of `pool`, `(M, size)`, in lexicographic order."""
    subsets = list(itertools.combinations(range(pool), size))
    return torch.tensor(subsets, dtype=torch.int64).view(len(subsets), size)


def _members(selection: LogdetSelection, mask_BN: Tensor) -> Tensor:
    ones_BK = selection.mask_BK.to(torch.int64)
    return torch.zeros_like(mask_BN, dtype=torch.int64).scatter_add(1, selection.indices_BK, ones_BK) > 0


def _in_greedy_order(gram_BNN: Tensor, members_BN: Tensor, start: LogdetSelection) -> LogdetSelection:
    """The selection of exactly these members; the bound and the ties stay those of the start."""
    ordered = _greedy_gram(gram_BNN, members_BN, start.indices_BK.shape[1], certify=False)
    return ordered._replace(upper_bound_B=start.upper_bound_B, ties_B=start.ties_B)


# The Fisher information of the subset's own loss ---------------------------------------------------------------------


def subset_fisher_logdet(
    gram_BCC: Tensor, rewards_BC: Tensor, beta: float, ridge: float | Tensor, subsets_BMJ: Tensor
) -> Tensor:
    """log det(ridge I + Fisher of the loss over {0} + S) - D log ridge, `(B, M)` float64, for subsets of negatives.

    q, its mean feature and so the whole matrix are the subset's: log det(I + (beta^2 / ridge) (diag q - q q^T) G_S).
    Neither monotone nor submodular in S. `gram_BCC`: inner products of the features, chosen one first.
    """
    columns_BMC = torch.nn.functional.pad(subsets_BMJ + 1, (1, 0))
    row_B11 = _rows(columns_BMC)
    share_BMC = rewards_BC.double()[row_B11, columns_BMC].softmax(-1)
    gram_BMCC = gram_BCC.double()[row_B11[..., None], columns_BMC[..., :, None], columns_BMC[..., None, :]]
    size = columns_BMC.shape[-1]
    centred = centre_gram(gram_BMCC.flatten(0, 1), share_BMC.flatten(0, 1)).view_as(gram_BMCC)
    weight_BMC = share_BMC.sqrt()
    factor_B = _factor(ridge, beta**2, gram_BCC)
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
) -> LogdetSelection:
    """Choose k negatives a prompt that make `subset_fisher_logdet` large: greedily, or the best of all by `exact`.

    Greedy has no guarantee here, so `upper_bound_B` is NaN; gains may be negative. Rows of fewer than k take all.
    """
    check_name("solver", solver, ("greedy", "exact"))
    mask_BN = _selectable(mask_BN, rewards_BC[:, 1:])
    real_BC = torch.nn.functional.pad(mask_BN, (1, 0), value=True)
    _check_finite(gram_BCC.masked_fill(~(real_BC[:, :, None] & real_BC[:, None, :]), 0.0))
    _check_finite(rewards_BC.masked_fill(~real_BC, 0.0))
    if solver == "exact":
        check_exact(int(mask_BN.sum(-1).max()), k)
        members_BN = _enumerate_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge, mask_BN)
        best = _greedy_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge, members_BN)
        return best._replace(upper_bound_B=best.logdet_B)
    return _greedy_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge, mask_BN)


def _greedy_subset_fisher(
    gram_BCC: Tensor, rewards_BC: Tensor, beta: float, k: int, ridge: float | Tensor, mask_BN: Tensor
) -> LogdetSelection:
    batch, pool = mask_BN.shape
    taken_BJ = torch.zeros(batch, 0, dtype=torch.int64, device=mask_BN.device)
    count_B = mask_BN.sum(-1)
    reached = [gram_BCC.new_zeros(batch, dtype=torch.float64)]
    ties_B = torch.zeros_like(count_B)
    available_BN = mask_BN
    each_BN1 = torch.arange(pool, device=mask_BN.device).expand(batch, pool)[..., None]
    for step in range(k):
        subsets_BNJ = torch.cat([taken_BJ[:, None].expand(batch, pool, step), each_BN1], dim=-1)
        value_BN = subset_fisher_logdet(gram_BCC, rewards_BC, beta, ridge, subsets_BNJ)
        value_BN = value_BN.masked_fill(~available_BN, -math.inf)
        best_B = value_BN.amax(-1)
        tied_BN = value_BN >= (best_B - 1e-10 * (1.0 + best_B.abs()))[:, None]
        index_B1 = tied_BN.to(torch.uint8).argmax(-1, keepdim=True)
        real_B = count_B > step
        reached.append(torch.where(real_B, best_B, reached[-1]))
        ties_B = ties_B + (real_B & (tied_BN.sum(-1) > 1))
        taken_BJ = torch.cat([taken_BJ, index_B1 * real_B[:, None]], dim=1)
        available_BN = available_BN.scatter(1, index_B1, False)
    gains_BK = torch.stack(reached, dim=1).diff(dim=1)
    mask_BK = torch.arange(k, device=mask_BN.device) < count_B[:, None]
    return LogdetSelection(taken_BJ, gains_BK, reached[-1], torch.full_like(reached[-1], math.nan), mask_BK, ties_B)


def _enumerate_subset_fisher(
    gram_BCC: Tensor, rewards_BC: Tensor, beta: float, k: int, ridge: float | Tensor, mask_BN: Tensor
) -> Tensor:
    batch, pool = mask_BN.shape
    members_BN = mask_BN.clone()
    if pool <= k:
        return members_BN
    subsets_MK = _subsets(pool, k).to(mask_BN.device)
    best_B = torch.full((batch,), -math.inf, dtype=torch.float64, device=mask_BN.device)
    long_B = mask_BN.sum(-1) > k
    chunk = max(1, CHUNK_NUMBERS // (batch * (k + 1) ** 2))
    for part_MK in subsets_MK.split(chunk):
        value_BM = subset_fisher_logdet(gram_BCC, rewards_BC, beta, ridge, part_MK.expand(batch, -1, -1))
        value_BM = value_BM.masked_fill(~mask_BN[:, part_MK].all(-1), -math.inf)
        top_B, where_B = value_BM.max(-1)
        better_B = long_B & (top_B > best_B)
        found_BN = torch.zeros_like(mask_BN).scatter(1, part_MK[where_B], True)
        members_BN = torch.where(better_B[:, None], found_BN, members_BN)
        best_B = torch.where(better_B, top_B, best_B)
    return members_BN
