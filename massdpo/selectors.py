"""Which of a prompt's negatives to train on: one small class a selector, pool statistics in, picks out.

A selector is any object with `features` (what the scorer computes for it: "mean", "last", "head" or None),
`needs_scores` (False where it looks at no log-probability) and `__call__(pool) -> Picks`. Chance comes from
`pool.noise_BN` alone, which is keyed by (seed, epoch, example id): larger noise wins a tie.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, D features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from massdpo import fisher
from massdpo.batch import Picks, PoolStatistics
from massdpo.errors import UserError
from massdpo.features import FEATURES
from massdpo.store import keyed_seed

LOGP_RESOLUTION = 1e-4  # nats: two float32 passes over one model differ by about this much; closer is a tie
VARIANTS = ("centered", "relative", "subset_fisher")


class Selector(Protocol):
    """What training asks of a selector."""

    @property
    def features(self) -> str | None: ...

    @property
    def needs_scores(self) -> bool: ...

    def __call__(self, pool: PoolStatistics) -> Picks: ...


# Shared by the selectors ---------------------------------------------------------------------------------------------


def check_pools(sizes: Sequence[int] | Tensor, k: int, short_pool: str) -> None:
    """Raise UserError where pools (`sizes`: a prompt's negatives) are smaller than k, unless `short_pool` is `all`."""
    sizes = torch.as_tensor(sizes)
    short = int((sizes < k).sum())
    if short and short_pool == "error":
        raise UserError(
            f"{short} of {len(sizes)} prompts have fewer than k={k} negatives (the smallest pool: {int(sizes.min())}): "
            "set selector.short_pool=all to train on the whole pool there, or lower k"
        )


def check_selection(options: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Raise UserError where these pools cannot be selected from with the options of a selector, as far as they tell."""
    if "k" in options:
        check_pools(sizes, options["k"], options.get("short_pool", "error"))
    if options.get("solver") == "exact":
        fisher.check_exact(max(sizes), options["k"])


def check_finite(pool: PoolStatistics, features: Tensor | None = None) -> None:
    """Raise UserError, naming the examples, where the log-probs or the features of a real candidate are not finite."""
    for what, value in (
        ("log-probabilities", pool.scores.logp_BC),
        ("reference log-probabilities", pool.ref_logp_BC),
        ("features", features),
    ):
        if value is None or math.isfinite(float(value.sum())):  # one pass; only where it is not, look closer
            continue
        bad_BC = ~(value if value.dim() == 2 else value.flatten(2)).isfinite().reshape(*value.shape[:2], -1).all(-1)
        rows = (bad_BC & pool.scores.mask_BC).any(-1).nonzero()[:, 0].tolist()
        if rows:
            names = ", ".join(str(pool.ids[row]) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
            raise UserError(
                f"{what} that are not finite for {len(rows)} of {len(pool.ids)} prompts ({names}): the policy has "
                "diverged or its dtype overflows; lower the learning rate or use another precision"
            )


def take_best(pool: PoolStatistics, score_BN: Tensor, k: int, short_pool: str = "error") -> Picks:
    """The k best negatives of each pool by score, best first; equal scores are decided by the noise."""
    mask_BN = pool.mask_BN
    check_pools(mask_BN.sum(-1), k, short_pool)
    width = min(k, mask_BN.shape[1])
    by_noise_BN = noise_order(pool)
    score_BN = score_BN.double().masked_fill(~mask_BN, -math.inf).gather(1, by_noise_BN)
    order_BN = by_noise_BN.gather(1, score_BN.argsort(dim=-1, descending=True, stable=True))
    return as_picks(order_BN[:, :width], torch.arange(width, device=mask_BN.device) < mask_BN.sum(-1, keepdim=True))


def noise_order(pool: PoolStatistics) -> Tensor:
    """Negatives by falling noise `(B, N)`: in this order, taking the first of equals decides ties by chance."""
    return pool.noise_BN.argsort(dim=-1, descending=True, stable=True)


def as_picks(index_BK: Tensor, mask_BK: Tensor, info: dict[str, Tensor] | None = None) -> Picks:
    return Picks(index_BK * mask_BK, mask_BK, info or {})


def to_resolution(nats: Tensor, unit: float = LOGP_RESOLUTION) -> Tensor:
    """Rounded, so that what differs by numerical noise alone is equal."""
    return (nats.double() / unit).round()


def overlap(a: Picks, b: Picks) -> Tensor:
    """Jaccard similarity `(B,)` of two selections from the same pools; two empty ones count as equal."""
    size = 1 + int(max(a.index_BK.max(), b.index_BK.max()))
    in_a, in_b = _membership(a, size), _membership(b, size)
    either_B = (in_a | in_b).sum(-1)
    return torch.where(either_B == 0, 1.0, (in_a & in_b).sum(-1) / either_B.clamp(min=1))


def hardest_overlap(pool: PoolStatistics, picks: Picks) -> Tensor:
    """Jaccard similarity `(B,)` with what `hardest` would pick from the same pools."""
    return overlap(picks, Hardest(k=picks.index_BK.shape[1], short_pool="all")(pool))


def _membership(picks: Picks, size: int) -> Tensor:
    zeros = torch.zeros(len(picks.index_BK), size, dtype=torch.int64, device=picks.index_BK.device)
    return zeros.scatter_add(1, picks.index_BK, picks.mask_BK.long()) > 0


def check_options(k: int, short_pool: str) -> None:
    """Raise UserError for a k or a `short_pool` that cannot be."""
    fisher.check_name("short_pool", short_pool, ("error", "all"))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UserError(f"k must be a whole number of at least 1, got {k!r}")


# By one score --------------------------------------------------------------------------------------------------------


class ByScore:
    """The k negatives with the largest `score_BN(pool)`."""

    features: str | None = None
    needs_scores = True

    def __init__(self, k: int, short_pool: str = "error"):
        check_options(k, short_pool)
        self.k, self.short_pool = k, short_pool

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        raise NotImplementedError

    def __call__(self, pool: PoolStatistics) -> Picks:
        if self.needs_scores:
            check_finite(pool)
        return take_best(pool, self.score_BN(pool), self.k, self.short_pool)


class Random(ByScore):
    """k of the pool, uniformly (S-DPO, arXiv 2406.09215)."""

    needs_scores = False

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        return pool.noise_BN


class Hardest(ByScore):
    """The k with the largest s_i = r_i - r_0: what the policy has come to prefer most against the reference."""

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        return to_resolution(pool.advantage_BN / pool.beta)


class HardestLogp(ByScore):
    """The k that the policy itself finds likeliest, by the mean log-prob of their tokens or by the `sum`."""

    def __init__(self, k: int, score: str = "mean", short_pool: str = "error"):
        super().__init__(k, short_pool)
        fisher.check_name("score", score, ("mean", "sum"))
        self.score = score

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        logp_BC = pool.scores.mean_logp_BC if self.score == "mean" else pool.scores.logp_BC
        return to_resolution(logp_BC[:, 1:])


class Sampled(ByScore):
    """k without replacement in proportion to p = softmax(s): the largest of s_i plus Gumbel noise (Vieira 2014)."""

    def score_BN(self, pool: PoolStatistics) -> Tensor:
        uniform_BN = pool.noise_BN.double().clamp(min=torch.finfo(torch.float64).tiny)
        return pool.advantage_BN - (-uniform_BN.log()).log()


class Full:
    """The whole pool."""

    features: str | None = None
    needs_scores = False

    def __call__(self, pool: PoolStatistics) -> Picks:
        mask_BN = pool.mask_BN
        return as_picks(torch.arange(mask_BN.shape[1], device=mask_BN.device).expand_as(mask_BN), mask_BN)


# By several scores ---------------------------------------------------------------------------------------------------


class Interleaved:
    """This project's own: three scores take turns, each time the best negative not yet picked.

    The scores are logp_i - logp_0, s_i = r_i - r_0 and the difference of mean token log-probs; which begins is chance.
    """

    features: str | None = None
    needs_scores = True

    def __init__(self, k: int, short_pool: str = "error"):
        check_options(k, short_pool)
        self.k, self.short_pool = k, short_pool

    def __call__(self, pool: PoolStatistics) -> Picks:
        check_finite(pool)
        mask_BN = pool.mask_BN
        check_pools(mask_BN.sum(-1), self.k, self.short_pool)
        order_BN = noise_order(pool)  # so that the first of equals is the one with the largest noise
        values = (pool.scores.logp_BC, pool.rewards_BC / pool.beta, pool.scores.mean_logp_BC)
        scores_BSN = torch.stack([to_resolution(value_BC[:, 1:] - value_BC[:, :1]) for value_BC in values], dim=1)
        scores_BSN = scores_BSN.masked_fill(~mask_BN[:, None], -math.inf).gather(2, order_BN[:, None].expand(-1, 3, -1))
        start_B = ((pool.noise_BN.double() * mask_BN).sum(-1).frac() * 3).long()  # uniform, in whatever order they come
        rows_B = torch.arange(len(start_B), device=start_B.device)
        picked = []
        for step in range(min(self.k, mask_BN.shape[1])):
            best_B1 = scores_BSN[rows_B, (start_B + step) % 3].argmax(-1, keepdim=True)
            picked.append(order_BN.gather(1, best_B1))
            scores_BSN = scores_BSN.scatter(2, best_B1[..., None].expand(-1, 3, 1), -math.inf)
        index_BK = torch.cat(picked, dim=1)
        return as_picks(index_BK, torch.arange(index_BK.shape[1], device=rows_B.device) < mask_BN.sum(-1, keepdim=True))


class Dynamic:
    """Negatives on the decision boundary: the boundary set of DynamicPO (arXiv 2605.00327), at most k of it.

    Those that the policy finds at least as likely as the chosen response; where there are none, the top cluster of a
    3-means of the pool's log-probs (centres start at its minimum, middle and maximum). The likeliest k are taken where
    the set is larger, and all of it where it is smaller. The paper's varying beta belongs to its loss and is left out.
    """

    features: str | None = None
    needs_scores = True
    rounds = 50  # of Lloyd's algorithm at most; a pool of 20 settles within ten

    def __init__(self, k: int, short_pool: str = "error"):
        check_options(k, short_pool)
        self.k, self.short_pool = k, short_pool

    def __call__(self, pool: PoolStatistics) -> Picks:
        check_finite(pool)
        check_pools(pool.mask_BN.sum(-1), self.k, self.short_pool)
        logp_BC = to_resolution(pool.scores.logp_BC)
        logp_BN = logp_BC[:, 1:]
        above_BN = (logp_BN >= logp_BC[:, :1]) & pool.mask_BN
        boundary_BN = torch.where(above_BN.any(-1, keepdim=True), above_BN, self._top_cluster(logp_BN, pool.mask_BN))
        best = take_best(pool, logp_BN.masked_fill(~boundary_BN, -math.inf), self.k, "all")
        info = {"boundary_size": boundary_BN.sum(-1).float()}
        return as_picks(best.index_BK, best.mask_BK & boundary_BN.gather(1, best.index_BK), info)

    def _top_cluster(self, value_BN: Tensor, mask_BN: Tensor) -> Tensor:
        low_B = value_BN.masked_fill(~mask_BN, math.inf).amin(-1)
        high_B = value_BN.masked_fill(~mask_BN, -math.inf).amax(-1)
        centre_B3 = torch.stack([low_B, (low_B + high_B) / 2, high_B], dim=1)
        for _ in range(self.rounds):
            nearest_BN = (value_BN[..., None] - centre_B3[:, None]).abs().argmin(-1)
            member_BN3 = torch.nn.functional.one_hot(nearest_BN, 3) * mask_BN[..., None]
            size_B3 = member_BN3.sum(1)
            mean_B3 = (member_BN3 * value_BN[..., None]).sum(1) / size_B3.clamp(min=1)
            before_B3, centre_B3 = centre_B3, torch.where(size_B3 > 0, mean_B3, centre_B3)
            if torch.equal(before_B3, centre_B3):
                break
        top_B1 = nearest_BN.masked_fill(~mask_BN, 0).amax(-1, keepdim=True)  # centres keep their order
        return (nearest_BN == top_B1) & mask_BN


# By the Fisher information -------------------------------------------------------------------------------------------


class Mass:
    """The subset with the largest log det(ridge I + Fisher information): MASS-DPO, arXiv 2605.10784.

    variant: `centered` (the paper's design objective), `relative` (against the chosen response, uncentred) or
    `subset_fisher` (the exact Fisher information of the loss over the picks; no guarantee, greedy or exact only).
    normalize: bring the centred features to unit length before their share in the gradient weighs them.
    ridge: gamma, or with ridge_relative in units of the mean diagonal of the prompt's own information matrix.
    features: `mean`, `last` or `head`; solver: `greedy`, `swap` or `exact`.
    """

    needs_scores = True

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
        check_options(k, short_pool)
        fisher.check_name("variant", variant, VARIANTS)
        fisher.check_name("features", features, FEATURES)
        fisher.check_name("solver", solver, ("greedy", "exact") if variant == "subset_fisher" else fisher.SOLVERS)
        check_ridge(ridge)
        self.k, self.variant, self.features, self.normalize = k, variant, features, normalize
        self.ridge, self.ridge_relative, self.solver, self.short_pool = ridge, ridge_relative, solver, short_pool

    def __call__(self, pool: PoolStatistics) -> Picks:
        check_finite(pool)
        check_pools(pool.mask_BN.sum(-1), self.k, self.short_pool)
        # In the order of the noise, "lowest index first" is "largest noise first": it decides ties, and nothing else.
        order_BN = noise_order(pool)
        if self.features != "head" and order_BN.shape[1] > fisher.DENSE_POOL and self.variant != "subset_fisher":
            selection = self._select_from_vectors(pool, order_BN)
        else:
            selection = self._select_from_gram(pool, order_BN)
        info = {"logdet": selection.logdet_B.float(), "ties": selection.ties_B.float()}
        if pool.observe and self.variant != "subset_fisher":
            info["certified_ratio"] = selection.certified_ratio_B.float()
        return as_picks(order_BN.gather(1, selection.indices_BK), selection.mask_BK, info)

    def _select_from_gram(self, pool: PoolStatistics, order_BN: Tensor) -> fisher.LogdetSelection:
        gram_BCC = reorder_gram(candidate_gram(pool, self.features), order_BN)
        rewards_BC, mask_BC = reorder(pool.rewards_BC, order_BN), reorder(pool.scores.mask_BC, order_BN)
        mask_BN = mask_BC[:, 1:]
        design = "centered" if self.variant == "subset_fisher" else self.variant
        vectors_BNN, scale_B = fisher.design_gram(gram_BCC, rewards_BC, pool.beta, design, self.normalize, mask_BC)
        mean_B = fisher.mean_square(vectors_BNN.diagonal(dim1=-2, dim2=-1), mask_BN)
        if self.variant == "subset_fisher":
            if self.normalize:
                gram_BCC = fisher.unit_gram(gram_BCC, rewards_BC, mask_BC)
            # Where the chosen response wins beyond float64's range, every gain is 0 and the tie rule decides.
            ridge = (self.ridge * mean_B * scale_B).clamp(min=1e-300) if self.ridge_relative else self.ridge
            return fisher.select_subset_fisher(gram_BCC, rewards_BC, pool.beta, self.k, ridge, mask_BN, self.solver)
        ridge, scale_B = self._weighing(mean_B, scale_B)
        return fisher.select_logdet_gram(vectors_BNN, self.k, ridge, scale_B, mask_BN, self.solver, pool.observe)

    def _select_from_vectors(self, pool: PoolStatistics, order_BN: Tensor) -> fisher.LogdetSelection:
        """For large pools: only the picked rows of the Gram matrix are ever made."""
        vectors_BND, scale_B = fisher.design_vectors(
            hidden_features(pool), pool.rewards_BC, pool.beta, self.variant, self.normalize, pool.scores.mask_BC
        )
        vectors_BND = vectors_BND[torch.arange(len(order_BN), device=order_BN.device)[:, None], order_BN]
        mask_BN = pool.mask_BN.gather(1, order_BN)
        mean_B = fisher.mean_square(vectors_BND.square().sum(-1), mask_BN)
        ridge, scale_B = self._weighing(mean_B, scale_B)
        return fisher.select_logdet(vectors_BND, self.k, ridge, scale_B, mask_BN, self.solver, pool.observe)

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


class Dpp(Mass):
    """A k-DPP sample of the kernel whose most probable set is the one `mass` looks for: P(S) ~ det H(S).

    Sampling: Kulesza and Taskar 2012 (arXiv 1207.6083), algorithms 1 and 8, its random numbers keyed by the noise.
    """

    def __init__(
        self,
        k: int,
        features: str = "mean",
        normalize: bool = True,
        ridge: float = 1.0,
        short_pool: str = "error",
    ):
        super().__init__(k, "centered", features, normalize, ridge, True, "greedy", short_pool)

    def __call__(self, pool: PoolStatistics) -> Picks:
        check_finite(pool)
        mask_BN = pool.mask_BN
        check_pools(mask_BN.sum(-1), self.k, self.short_pool)
        gram_BCC, mask_BC = candidate_gram(pool, self.features), pool.scores.mask_BC
        gram_BNN, _ = fisher.design_gram(gram_BCC, pool.rewards_BC, pool.beta, "centered", self.normalize, mask_BC)
        ridge_B = self.ridge * fisher.mean_square(gram_BNN.diagonal(dim1=-2, dim2=-1), mask_BN)
        kernel_BNN = gram_BNN / ridge_B[:, None, None] + torch.diag_embed(mask_BN.double())
        return as_picks(*sample_dpp(kernel_BNN, self.k, mask_BN, pool.noise_BN))


class Farthest:
    """Farthest first, diversity alone: each pick is farthest from the chosen response and all picks before it."""

    needs_scores = True  # the features come with them

    def __init__(self, k: int, features: str = "mean", normalize: bool = True, short_pool: str = "error"):
        check_options(k, short_pool)
        fisher.check_name("features", features, FEATURES)
        self.k, self.features, self.normalize, self.short_pool = k, features, normalize, short_pool

    def __call__(self, pool: PoolStatistics) -> Picks:
        check_finite(pool)
        check_pools(pool.mask_BN.sum(-1), self.k, self.short_pool)
        order_BN = noise_order(pool)
        gram_BCC = reorder_gram(candidate_gram(pool, self.features), order_BN)
        mask_BC = reorder(pool.scores.mask_BC, order_BN)
        if self.normalize:  # about the plain mean of the pool: equal rewards
            gram_BCC = fisher.unit_gram(gram_BCC, torch.zeros_like(gram_BCC[..., 0]), mask_BC)
        square_BC = gram_BCC.diagonal(dim1=-2, dim2=-1)
        distance_BCC = square_BC[:, :, None] + square_BC[:, None, :] - 2 * gram_BCC
        nearest_BN = distance_BCC[:, 0, 1:].masked_fill(~mask_BC[:, 1:], -math.inf)
        rows_B = torch.arange(len(order_BN), device=order_BN.device)
        picked = []
        for _ in range(min(self.k, order_BN.shape[1])):
            best_B1 = nearest_BN.amax(-1, keepdim=True)
            index_B1 = (nearest_BN >= best_B1 - 1e-10 * best_B1.abs()).to(torch.uint8).argmax(-1, keepdim=True)
            picked.append(order_BN.gather(1, index_B1))
            nearest_BN = torch.minimum(nearest_BN, distance_BCC[rows_B, index_B1[:, 0] + 1, 1:])
            nearest_BN = nearest_BN.scatter(1, index_B1, -math.inf)
        index_BK = torch.cat(picked, dim=1)
        real_BK = torch.arange(index_BK.shape[1], device=rows_B.device) < pool.mask_BN.sum(-1, keepdim=True)
        return as_picks(index_BK, real_BK)


def check_ridge(ridge: float) -> None:
    if not (isinstance(ridge, (int, float)) and 0 < ridge < math.inf):
        raise UserError(f"the ridge must be a positive number, got {ridge!r}")


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
    if pool.mask_BN.shape[1] > fisher.DENSE_POOL:
        raise UserError(
            f"this selector needs all inner products, a pool of {pool.mask_BN.shape[1]:,} is above its limit of "
            f"{fisher.DENSE_POOL:,}: use selector=mass with variant=centered or relative and solver=greedy"
        )
    features_BCD = hidden_features(pool).float()
    return fisher.inner_products(features_BCD, features_BCD[:, :1])


def sample_dpp(kernel_BNN: Tensor, k: int, mask_BN: Tensor, noise_BN: Tensor) -> tuple[Tensor, Tensor]:
    """A k-DPP sample a prompt from kernels that are zero where masked: indices and mask, `(B, K)`."""
    batch, pool = mask_BN.shape
    count_B = mask_BN.sum(-1)
    uniform_BX = torch.zeros(batch, pool + k, dtype=torch.float64)
    for row in range(batch):  # by the real candidates' noise alone, so that padding changes nothing
        generator = torch.Generator().manual_seed(keyed_seed("dpp", noise_BN[row][mask_BN[row]]))
        numbers = torch.rand(int(count_B[row]) + k, generator=generator, dtype=torch.float64)
        uniform_BX[row, -len(numbers) :] = numbers
    uniform_BX = uniform_BX.to(kernel_BNN.device)
    value_BN, vector_BNN = torch.linalg.eigh(kernel_BNN)
    value_BN = (value_BN / value_BN[:, -1:]).clamp(min=0.0)  # a k-DPP does not change with the kernel's scale
    # symmetric[n]: the elementary symmetric polynomials e_0..e_k of the first n eigenvalues
    symmetric = [torch.nn.functional.pad(value_BN.new_zeros(batch, k), (1, 0), value=1.0)]
    for n in range(pool):
        shifted_BL = torch.nn.functional.pad(symmetric[-1][:, :-1], (1, 0))
        symmetric.append(symmetric[-1] + value_BN[:, n : n + 1] * shifted_BL)
    left_B1 = count_B.clamp(max=k)[:, None]
    chosen_BN = torch.zeros_like(mask_BN)
    for n in reversed(range(pool)):  # which eigenvectors span the sample
        with_it_B1 = value_BN[:, n : n + 1] * symmetric[n].gather(1, (left_B1 - 1).clamp(min=0))
        take_B1 = (left_B1 > 0) & (uniform_BX[:, n : n + 1] * symmetric[n + 1].gather(1, left_B1) < with_it_B1)
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
        index_B = (cumulative_BN <= threshold_B1).sum(-1).clamp(max=pool - 1)
        picked.append(index_B)
        row_BN = projection_BNN[rows_B, index_B]
        for factor_BN in factors:
            row_BN = row_BN - factor_BN * factor_BN[rows_B, index_B][:, None]
        factors.append(row_BN * left_BN[rows_B, index_B].clamp(min=1e-300).rsqrt()[:, None])
        left_BN = (left_BN - factors[-1].square()).clamp(min=0.0)
        left_BN = left_BN.scatter(1, index_B[:, None], 0.0)
    index_BK = torch.stack(picked, dim=1)
    return index_BK, torch.arange(index_BK.shape[1], device=mask_BN.device) < count_B[:, None]
