"""The log-det maximisers against brute force in float64, the Fisher information against autograd.

Suffixes as in massdpo/selection/logdet/.
"""

import itertools
import math
import time

import pytest
import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.selection import logdet
from massdpo.selection.logdet import (
    design_gram,
    design_vectors,
    limits,
    select_logdet,
    select_logdet_gram,
    select_subset_fisher,
    solve,
)
from massdpo.selection.logdet.subset import _with_one_more, subset_fisher_logdet

BATCH = 24  # prompts of one shape; 48 shapes make 1,152 instances


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pl_fisher(features_CD: Tensor, rewards_C: Tensor, beta: float) -> Tensor:
    """The exact Fisher matrix `(D, D)` of one prompt's Plackett-Luce loss over the candidates given.

    beta^2 Phi^T (diag q - q q^T) Phi, q = softmax(r): the Hessian of log(1 + sum_i exp s_i) under a log-linear policy.
    """
    share_C = torch.softmax(rewards_C, dim=0)
    centred_CD = features_CD - share_C @ features_CD
    return beta**2 * (share_C[:, None] * centred_CD).T @ centred_CD


def explicit_logdet(vectors_ND: Tensor, members: list[int], ridge: float, scale: float) -> float:
    """log det H(S) - log det H(empty) from the D x D matrix itself."""
    taken_KD = vectors_ND[members]
    size = vectors_ND.shape[1]
    information_DD = ridge * torch.eye(size, dtype=torch.float64) + scale * taken_KD.T @ taken_KD
    return float(torch.linalg.slogdet(information_DD).logabsdet) - size * math.log(ridge)


def singular_logdet(vectors_ND: Tensor, members: list[int], ridge: float, scale: float) -> float:
    """The same from singular values: exact to round-off even where the matrix is badly conditioned."""
    return float((torch.linalg.svdvals(vectors_ND[members]).square() * (scale / ridge)).log1p().sum())


def instances(shape: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """BATCH random problems of one shape, raw or as design vectors: vectors, ridges, scales, k."""
    noise = generator(shape)
    pool, size, k = 1 + shape % 8, 1 + (shape * 7) % 6, 1 + (shape // 8) % 4
    ridge_B = 10 ** (5 * torch.rand(BATCH, generator=noise, dtype=torch.float64) - 3)
    if shape % 3 == 0:
        vectors_BND = torch.randn(BATCH, pool, size, generator=noise, dtype=torch.float64)
        return vectors_BND, ridge_B, torch.rand(BATCH, generator=noise, dtype=torch.float64) + 0.1, min(k, pool)
    features_BCD = torch.randn(BATCH, pool + 1, size, generator=noise, dtype=torch.float64)
    rewards_BC = 2 * torch.randn(BATCH, pool + 1, generator=noise, dtype=torch.float64)
    variant = ("centered", "relative")[shape % 2]
    vectors_BND, scale_B = design_vectors(features_BCD, rewards_BC, 0.7, variant, normalize=shape % 3 == 1)
    return vectors_BND, ridge_B, scale_B, min(k, pool)


@pytest.mark.parametrize("shape", range(48))
def test_solvers_against_brute_force(shape: int) -> None:
    vectors_BND, ridge_B, scale_B, k = instances(shape)
    greedy, swap, exact = (
        select_logdet(vectors_BND, k, ridge_B, scale_B, solver=solver) for solver in ("greedy", "swap", "exact")
    )
    pool = vectors_BND.shape[1]
    for row in range(BATCH):
        problem = vectors_BND[row], float(ridge_B[row]), float(scale_B[row])

        def value(members: list[int], problem: tuple[Tensor, float, float] = problem) -> float:
            return explicit_logdet(problem[0], members, *problem[1:])

        taken: list[int] = []
        for index, gain in zip(greedy.indices_BK[row].tolist(), greedy.gains_BK[row].tolist(), strict=True):
            rivals = [value([*taken, other]) - value(taken) for other in range(pool) if other not in taken]
            assert gain == pytest.approx(value([*taken, index]) - value(taken), abs=1e-9)
            assert gain >= max(rivals) - 1e-9
            taken.append(index)
        best = max(value(list(subset)) for subset in itertools.combinations(range(pool), k))
        # The bound is the smaller of two: the k largest gains on top of greedy's set, and the k largest eigenvalues.
        gains = [value([*taken, other]) - value(taken) for other in range(pool) if other not in taken]
        spectrum = torch.linalg.svdvals(problem[0]).square() * (problem[2] / problem[1])
        for bound in (value(taken) + sum(sorted(gains)[-k:]), float(spectrum[:k].log1p().sum())):
            assert float(greedy.upper_bound_B[row]) <= bound + 1e-9
        assert float(exact.upper_bound_B[row]) == float(exact.logdet_B[row])
        assert float(exact.logdet_B[row]) == pytest.approx(best, abs=1e-9)
        for solved in (greedy, swap, exact):
            assert len(set(solved.indices_BK[row].tolist())) == k
            assert float(solved.logdet_B[row]) == pytest.approx(value(solved.indices_BK[row].tolist()), abs=1e-9)
            assert best <= float(solved.upper_bound_B[row]) + 1e-9
            assert float(solved.certified_ratio_B[row]) <= 1 + 1e-9
        assert float(greedy.logdet_B[row]) >= (1 - 1 / math.e) * best - 1e-12
        assert float(greedy.logdet_B[row]) <= float(swap.logdet_B[row]) + 1e-12
        assert float(swap.logdet_B[row]) <= best + 1e-9
    for solved in (greedy, swap, exact):
        torch.testing.assert_close(solved.gains_BK.sum(-1), solved.logdet_B)


def test_no_single_exchange_improves_swap() -> None:
    vectors_BND = torch.randn(50, 8, 4, generator=generator(1), dtype=torch.float64)
    solved = select_logdet(vectors_BND, 3, 0.1, solver="swap")
    for row in range(50):
        members = solved.indices_BK[row].tolist()
        for out, new in itertools.product(range(3), set(range(8)) - set(members)):
            exchanged = [*members[:out], *members[out + 1 :], new]
            assert explicit_logdet(vectors_BND[row], exchanged, 0.1, 1.0) <= float(solved.logdet_B[row]) + 1e-9


def test_greedy_is_not_optimal() -> None:
    """The counterexample of the method's description: greedy takes the longest vector, the best are the other two."""
    root = 1 / math.sqrt(2)
    vectors_BND = torch.tensor([[[1.1, 0.0], [root, root], [root, -root]]], dtype=torch.float64)
    greedy = select_logdet(vectors_BND, 2, 1.0)
    assert greedy.indices_BK[0, 0] == 0
    for solver in ("swap", "exact"):
        best = select_logdet(vectors_BND, 2, 1.0, solver=solver)
        assert set(best.indices_BK[0].tolist()) == {1, 2}
        assert float(best.logdet_B) == pytest.approx(2 * math.log(2))
    assert float(greedy.logdet_B) < 2 * math.log(2)


def test_exact_and_swap_report_greedy_order() -> None:
    vectors_BND = torch.randn(40, 7, 3, generator=generator(2), dtype=torch.float64)
    for solver in ("swap", "exact"):
        solved = select_logdet(vectors_BND, 3, 0.5, solver=solver)
        within_BKD = vectors_BND.gather(1, solved.indices_BK[..., None].expand(-1, -1, 3))
        again = select_logdet(within_BKD, 3, 0.5)
        torch.testing.assert_close(again.gains_BK, solved.gains_BK)


# The Fisher information ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", range(24))
def test_gradient_hessian_and_loewner_order(shape: int) -> None:
    """Autograd on the pool's Plackett-Luce loss of a log-linear policy; then centered <= Fisher <= relative.

    24 shapes of 48 prompts, 1,152 instances; beta from 0.1 to 10, a pool of 1 and one feature among them.
    """
    noise, prompts, pool, size = generator(shape), 2 * BATCH, 1 + shape % 7, 1 + shape % 5
    beta = 10 ** (2 * (shape / 23) - 1)
    features_BCD = torch.randn(prompts, pool + 1, size, generator=noise, dtype=torch.float64)
    offset_BC = torch.randn(prompts, pool + 1, generator=noise, dtype=torch.float64)  # minus the reference's log-probs
    theta_BD = torch.randn(prompts, size, generator=noise, dtype=torch.float64)

    def loss(theta_D: Tensor, features_CD: Tensor, offset_C: Tensor) -> Tensor:
        rewards_C = beta * (features_CD @ theta_D + offset_C)
        return torch.logsumexp(rewards_C - rewards_C[0], dim=0)  # log(1 + sum exp s): softplus is cut off at 20

    gradient_BD = torch.func.vmap(torch.func.grad(loss))(theta_BD, features_BCD, offset_BC)
    hessian_BDD = torch.func.vmap(torch.func.hessian(loss))(theta_BD, features_BCD, offset_BC)
    rewards_BC = beta * (torch.einsum("bcd,bd->bc", features_BCD, theta_BD) + offset_BC)
    advantage_BN = rewards_BC[:, 1:] - rewards_BC[:, :1]
    loses_B = torch.sigmoid(torch.logsumexp(advantage_BN, dim=-1))  # 1 - sigma(Z)
    mean_BD = torch.einsum("bn,bnd->bd", advantage_BN.softmax(-1), features_BCD[:, 1:] - features_BCD[:, :1])
    torch.testing.assert_close(gradient_BD, beta * loses_B[:, None] * mean_BD)
    exact_BDD = torch.stack([pl_fisher(*case, beta) for case in zip(features_BCD, rewards_BC, strict=True)])
    torch.testing.assert_close(hessian_BDD, exact_BDD)

    def information(variant: str) -> Tensor:
        vectors_BND, scale_B = design_vectors(features_BCD, rewards_BC, beta, variant, normalize=False)
        return scale_B[:, None, None] * vectors_BND.mT @ vectors_BND

    part_BDD = information("centered")
    round_off = 1e-12 * float(exact_BDD.abs().max())
    assert torch.linalg.eigvalsh(exact_BDD - part_BDD).min() >= -round_off
    assert torch.linalg.eigvalsh(information("relative") - exact_BDD).min() >= -round_off
    # The remainder of the exact Hessian is the rank-one term sigma(Z) dbar dbar^T.
    factor_B = beta**2 * loses_B * (1 - loses_B)
    torch.testing.assert_close(exact_BDD, part_BDD + factor_B[:, None, None] * mean_BD[:, :, None] * mean_BD[:, None])


def test_design_vectors_by_hand() -> None:
    features_BCD = torch.tensor([[[5.0, 5.0], [3.0, 0.0], [0.0, 1.0]]])
    rewards_BC = torch.tensor([[0.0, math.log(3.0), 0.0]])  # p = 3/4, 1/4; 1 - sigma(Z) = 4/5
    centered, scale_B = design_vectors(features_BCD, rewards_BC, 0.5, normalize=False)
    expected_ND = torch.tensor([[0.75, -0.25], [-2.25, 0.75]]) * torch.tensor([[0.75], [0.25]]).sqrt()
    torch.testing.assert_close(centered[0].float(), expected_ND)
    assert float(scale_B) == pytest.approx(0.25 * 0.8)
    unit, _ = design_vectors(features_BCD, rewards_BC, 0.5)
    torch.testing.assert_close(unit[0].norm(dim=-1), torch.tensor([0.75, 0.25], dtype=torch.float64).sqrt())
    relative, _ = design_vectors(features_BCD, rewards_BC, 0.5, "relative", normalize=False)
    torch.testing.assert_close(relative[0, 0].float(), torch.tensor([-2.0, -5.0]) * math.sqrt(0.75))
    pairwise, pair_scale_B = design_vectors(features_BCD, rewards_BC, 0.5, "pairwise", normalize=False)
    torch.testing.assert_close(pairwise[0, 1].float(), torch.tensor([-5.0, -4.0]) * 0.5)  # mu = 1/2
    assert float(pair_scale_B) == 0.25


@pytest.mark.parametrize("design", ["centered", "relative", "pairwise"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gram_form_equals_vectors_and_masks(design: str, normalize: bool) -> None:
    noise = generator(3)
    features_BCD = torch.randn(6, 9, 5, generator=noise, dtype=torch.float64)
    rewards_BC = torch.randn(6, 9, generator=noise, dtype=torch.float64)
    mask_BC = torch.rand(6, 9, generator=noise) < 0.7
    mask_BC[:, :2] = True
    vectors_BND, scale_B = design_vectors(features_BCD, rewards_BC, 0.7, design, normalize, mask_BC)
    gram_BCC = features_BCD @ features_BCD.mT
    gram_BNN, gram_scale_B = design_gram(gram_BCC, rewards_BC, 0.7, design, normalize, mask_BC)
    torch.testing.assert_close(gram_BNN, vectors_BND @ vectors_BND.mT, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gram_scale_B, scale_B)
    assert bool((vectors_BND[~mask_BC[:, 1:]] == 0).all())
    for row in range(6):  # a masked candidate changes nothing: the same as a pool without it
        kept_C = mask_BC[row]
        alone, alone_scale = design_vectors(
            features_BCD[row : row + 1, kept_C], rewards_BC[row : row + 1, kept_C], 0.7, design, normalize
        )
        torch.testing.assert_close(vectors_BND[row, kept_C[1:]], alone[0])
        torch.testing.assert_close(scale_B[row], alone_scale[0])


def test_same_direction_different_share_is_no_tie() -> None:
    """Normalising the difference, not the vector: p still decides between two negatives in one direction."""
    features_BCD = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [-4.0, 1.0]]])
    rewards_BC = torch.tensor([[0.0, 0.0, 1.0, -2.0]])
    vectors_BND, _ = design_vectors(features_BCD, rewards_BC, 1.0, "relative")
    first, second = vectors_BND[0, 0], vectors_BND[0, 1]
    torch.testing.assert_close(first / first.norm(), second / second.norm())
    assert second.norm() > first.norm() * 1.5
    assert select_logdet(vectors_BND, 1, 0.1).indices_BK.item() == 1


# The Fisher information of the subset's own loss ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_subset_fisher_against_the_explicit_matrix(seed: int) -> None:
    """12 shapes of 90 prompts: 1,080 instances, each with all of its subsets."""
    noise = generator(seed)
    batch, pool, size, k, beta, ridge = 90, 3 + seed % 4, 1 + seed % 5, 1 + seed % 3, 0.8, 10.0 ** (seed % 5 - 3)
    features_BCD = torch.randn(batch, pool + 1, size, generator=noise, dtype=torch.float64)
    rewards_BC = torch.randn(batch, pool + 1, generator=noise, dtype=torch.float64)
    gram_BCC = features_BCD @ features_BCD.mT
    subsets_MK = torch.tensor(list(itertools.combinations(range(pool), k)))
    value_BM = subset_fisher_logdet(gram_BCC, rewards_BC, beta, ridge, subsets_MK.expand(batch, -1, -1))

    def value(row: int, members: list[int]) -> float:
        kept = [0, *(member + 1 for member in members)]
        information_DD = pl_fisher(features_BCD[row, kept], rewards_BC[row, kept], beta)
        information_DD = information_DD + ridge * torch.eye(size, dtype=torch.float64)
        return float(torch.linalg.slogdet(information_DD).logabsdet) - size * math.log(ridge)

    greedy = select_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge)
    exact = select_subset_fisher(gram_BCC, rewards_BC, beta, k, ridge, solver="exact")
    for row in range(batch):
        expected = [value(row, members) for members in subsets_MK.tolist()]
        assert value_BM[row].tolist() == pytest.approx(expected, abs=1e-9)
        assert float(exact.logdet_B[row]) == pytest.approx(max(expected), abs=1e-9)
        assert value(row, exact.indices_BK[row].tolist()) == pytest.approx(max(expected), abs=1e-9)
        taken: list[int] = []
        for index, gain in zip(greedy.indices_BK[row].tolist(), greedy.gains_BK[row].tolist(), strict=True):
            rivals = [value(row, [*taken, other]) for other in range(pool) if other not in taken]
            assert value(row, [*taken, index]) == pytest.approx(max(rivals), abs=1e-9)
            assert gain == pytest.approx(value(row, [*taken, index]) - value(row, taken), abs=1e-9)
            taken.append(index)
    assert bool(greedy.upper_bound_B.isnan().all())


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("taken", [0, 1, 3, 7])
def test_subset_fisher_of_one_more_against_each_subset(ridge: float, taken: int) -> None:
    """One eigendecomposition for all candidates, against a determinant for each; equal features have no eigenvectors
    of their own."""
    noise = generator(taken)
    features_BCD = torch.randn(4, 13, 9, generator=noise, dtype=torch.float64)
    features_BCD[1, 3:7] = features_BCD[1, 2:3]
    rewards_BC = 3 * torch.randn(4, 13, generator=noise, dtype=torch.float64)
    rewards_BC[2, 1:] -= 600.0
    gram_BCC = features_BCD @ features_BCD.mT
    taken_BJ = torch.stack([torch.randperm(12, generator=noise)[:taken] for _ in range(4)])
    each_BN1 = torch.arange(12).expand(4, 12)[..., None]
    subsets_BMJ = torch.cat([taken_BJ[:, None].expand(4, 12, taken), each_BN1], dim=-1)
    expected_BN = subset_fisher_logdet(gram_BCC, rewards_BC, 0.5, ridge, subsets_BMJ)
    open_BN = ~(taken_BJ[:, None] == each_BN1).any(-1)
    found_BN = _with_one_more(gram_BCC, rewards_BC, 0.5, ridge, taken_BJ)
    torch.testing.assert_close(found_BN[open_BN], expected_BN[open_BN], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("batch", "pool", "k"), [(8, 200, 50), (4, 1_000, 16)])
def test_a_certificate_of_a_large_pool_costs_at_most_what_greedy_does(batch: int, pool: int, k: int) -> None:
    """In turn, in one process, the least of several: other processes take time from both."""
    vectors_BND = torch.randn(batch, pool, 32, generator=generator(3), dtype=torch.float64)
    gram_BNN = vectors_BND @ vectors_BND.mT
    seconds = {False: math.inf, True: math.inf}
    for _ in range(6):
        for certify in seconds:
            started = time.process_time()
            select_logdet_gram(gram_BNN, k, 1.0, certify=certify)
            seconds[certify] = min(seconds[certify], time.process_time() - started)
    assert seconds[True] < 2 * seconds[False]


def test_subset_fisher_masks_and_short_rows() -> None:
    noise = generator(4)
    features_BCD = torch.randn(3, 7, 4, generator=noise, dtype=torch.float64)
    rewards_BC = torch.randn(3, 7, generator=noise, dtype=torch.float64)
    mask_BN = torch.ones(3, 6, dtype=torch.bool)
    mask_BN[1, 2:] = False
    mask_BN[2, :3] = False
    gram_BCC = features_BCD @ features_BCD.mT
    for solver in ("greedy", "exact"):
        solved = select_subset_fisher(gram_BCC, rewards_BC, 1.0, 3, 0.1, mask_BN, solver)
        assert solved.mask_BK.tolist() == [[True] * 3, [True, True, False], [True] * 3]
        assert set(solved.indices_BK[1, :2].tolist()) == {0, 1}
        assert set(solved.indices_BK[2].tolist()) == {3, 4, 5}


# Edges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", logdet.SOLVERS)
def test_uncertified_selection_is_the_same(solver: str) -> None:
    """`certify=False` leaves out the bound and nothing else; by rows as by the matrix."""
    vectors_BND = torch.randn(12, 9, 4, generator=generator(20), dtype=torch.float64)
    full, bare = (select_logdet(vectors_BND, 4, 0.1, solver=solver, certify=certify) for certify in (True, False))
    for name in ("indices_BK", "gains_BK", "logdet_B", "mask_BK", "ties_B"):
        assert torch.equal(getattr(full, name), getattr(bare, name)), name
    assert bool(full.upper_bound_B.isfinite().all())
    if solver != "exact":  # whose optimum is its own bound
        assert bool(bare.upper_bound_B.isnan().all())


@pytest.mark.parametrize("solver", logdet.SOLVERS)
def test_ties_take_the_lowest_index(solver: str) -> None:
    same_BND = torch.ones(1, 5, 3)
    assert select_logdet(same_BND, 3, 0.1, solver=solver).indices_BK.tolist() == [[0, 1, 2]]
    assert select_logdet(torch.zeros(1, 5, 3), 3, 0.1, solver=solver).indices_BK.tolist() == [[0, 1, 2]]
    orthogonal_BND = torch.eye(5)[None]
    assert select_logdet(orthogonal_BND, 2, 1.0, solver=solver).indices_BK.tolist() == [[0, 1]]


def test_zero_vectors_certify_as_optimal_and_ties_are_counted() -> None:
    solved = select_logdet(torch.zeros(2, 4, 3), 2, 1.0)
    assert solved.logdet_B.tolist() == [0.0, 0.0]
    assert solved.certified_ratio_B.tolist() == [1.0, 1.0]
    assert solved.ties_B.tolist() == [2, 2]
    assert select_logdet(torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None], 2, 1.0).ties_B.tolist() == [0]


@pytest.mark.parametrize("solver", logdet.SOLVERS)
def test_duplicates_are_the_last_resort(solver: str) -> None:
    vectors_BND = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
    assert set(select_logdet(vectors_BND, 2, 0.01, solver=solver).indices_BK[0].tolist()) == {0, 2}


@pytest.mark.parametrize("solver", logdet.SOLVERS)
def test_masked_candidates_are_never_picked(solver: str) -> None:
    noise = generator(5)
    vectors_BND = torch.randn(30, 8, 3, generator=noise)
    mask_BN = torch.rand(30, 8, generator=noise) < 0.5
    mask_BN[0] = False  # not one candidate
    vectors_BND[~mask_BN] *= 100.0  # the most tempting of all
    tempting = select_logdet(
        torch.zeros(1, 4, 3), 2, 1.0, mask_BN=torch.tensor([[False, True, True, True]]), solver=solver
    )
    assert tempting.indices_BK.tolist() == [[1, 2]]  # where all tie, the lowest index that may be picked
    solved = select_logdet(vectors_BND, 3, 0.1, mask_BN=mask_BN, solver=solver)
    for row in range(30):
        real = solved.indices_BK[row][solved.mask_BK[row]].tolist()
        assert len(set(real)) == len(real) == min(3, int(mask_BN[row].sum()))
        assert all(mask_BN[row, index] for index in real)
        expected = explicit_logdet(vectors_BND[row].double(), real, 0.1, 1.0) if real else 0.0
        assert float(solved.logdet_B[row]) == pytest.approx(expected, abs=1e-8)
        open_N = mask_BN[row].nonzero()[:, 0]
        if len(open_N) > 3:  # the same as a pool without the masked ones
            alone = select_logdet(vectors_BND[row : row + 1, open_N], 3, 0.1, solver=solver)
            assert open_N[alone.indices_BK[0]].tolist() == real


@pytest.mark.parametrize("solver", logdet.SOLVERS)
@pytest.mark.parametrize(("pool", "k"), [(1, 1), (4, 4), (3, 5)])
def test_whole_pools(solver: str, pool: int, k: int) -> None:
    vectors_BND = torch.randn(6, pool, 2, generator=generator(6), dtype=torch.float64)
    solved = select_logdet(vectors_BND, k, 0.3, solver=solver)
    assert solved.mask_BK.sum(-1).tolist() == [min(pool, k)] * 6
    for row in range(6):
        expected = explicit_logdet(vectors_BND[row], list(range(pool)), 0.3, 1.0)
        assert float(solved.logdet_B[row]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ridge", [1e-8, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("solver", logdet.SOLVERS)
def test_any_ridge_and_rank_below_k(ridge: float, solver: str) -> None:
    """Rank 2, four picks. At 1e-8 the third gain is of order one after a diagonal of 1e8: round-off of 1e-8 remains."""
    plane_BND = torch.randn(20, 6, 2, generator=generator(7), dtype=torch.float64)
    vectors_BND = plane_BND @ torch.randn(2, 5, generator=generator(8), dtype=torch.float64)
    solved = select_logdet(vectors_BND, 4, ridge, solver=solver)
    for row in range(20):
        expected = singular_logdet(vectors_BND[row], solved.indices_BK[row].tolist(), ridge, 1.0)
        assert float(solved.logdet_B[row]) == pytest.approx(expected, rel=1e-9, abs=1e-6 if ridge < 1e-6 else 1e-9)
        subsets = itertools.combinations(range(6), 4)
        best = max(singular_logdet(vectors_BND[row], list(subset), ridge, 1.0) for subset in subsets)
        assert best <= float(solved.upper_bound_B[row]) * (1 + 1e-9) + 1e-6
        assert float(solved.logdet_B[row]) >= (1 - 1 / math.e) * best - 1e-6
    assert bool((solved.gains_BK >= 0).all())


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_of_features_does_not_matter_when_normalised(factor: float, dtype: torch.dtype) -> None:
    features_BCD = torch.randn(8, 11, 6, generator=generator(9), dtype=dtype) + 5
    rewards_BC = torch.randn(8, 11, generator=generator(10), dtype=dtype)
    plain, _ = design_vectors(features_BCD, rewards_BC, 0.5)
    scaled, _ = design_vectors(features_BCD * factor, rewards_BC, 0.5)
    torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-6)  # float32 inputs are rounded after the factor
    gram = features_BCD.double() @ features_BCD.double().mT
    torch.testing.assert_close(
        design_gram(gram, rewards_BC, 0.5)[0], design_gram(gram * factor**2, rewards_BC, 0.5)[0], rtol=1e-6, atol=1e-9
    )


def test_scaled_vectors_with_a_scaled_ridge_select_alike() -> None:
    vectors_BND = torch.randn(10, 9, 4, generator=generator(11), dtype=torch.float64)
    plain = select_logdet(vectors_BND, 4, 0.2)
    for factor in (1e-4, 1e4):
        scaled = select_logdet(vectors_BND * factor, 4, 0.2 * factor**2)
        assert scaled.indices_BK.tolist() == plain.indices_BK.tolist()
        torch.testing.assert_close(scaled.gains_BK, plain.gains_BK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_converted_once(dtype: torch.dtype) -> None:
    """The result is that of the rounded inputs in float64: no arithmetic happens in the input's own precision."""
    features_BCD = torch.randn(4, 8, 6, generator=generator(12)).to(dtype)
    rewards_BC = torch.randn(4, 8, generator=generator(13)).to(dtype)
    low, low_scale = design_vectors(features_BCD, rewards_BC, 0.5)
    high, high_scale = design_vectors(features_BCD.double(), rewards_BC.double(), 0.5)
    torch.testing.assert_close(low, high)
    torch.testing.assert_close(low_scale, high_scale)
    vectors_BND = torch.randn(4, 8, 6, generator=generator(14)).to(dtype)
    torch.testing.assert_close(
        select_logdet(vectors_BND, 3, 0.1).gains_BK, select_logdet(vectors_BND.double(), 3, 0.1).gains_BK
    )


def test_identical_features_have_no_direction() -> None:
    features_BCD = torch.full((1, 4, 5), 0.1).repeat(1, 1, 1)
    rewards_BC = torch.tensor([[0.0, 0.3, -0.2, 0.1]])
    assert bool((design_vectors(features_BCD, rewards_BC, 0.5)[0] == 0).all())
    features = features_BCD.double()
    assert bool((design_gram(features @ features.mT, rewards_BC, 0.5)[0] == 0).all())


@pytest.mark.parametrize("solver", logdet.SOLVERS)
def test_permutation_equivariance(solver: str) -> None:
    noise = generator(15)
    features_BCD = torch.randn(20, 9, 5, generator=noise)
    rewards_BC = torch.randn(20, 9, generator=noise)
    order_N = torch.randperm(8, generator=noise)
    order_C = torch.cat([torch.zeros(1, dtype=torch.int64), order_N + 1])
    vectors_BND, scale_B = design_vectors(features_BCD, rewards_BC, 0.5)
    moved_BND, moved_scale_B = design_vectors(features_BCD[:, order_C], rewards_BC[:, order_C], 0.5)
    plain = select_logdet(vectors_BND, 3, 0.01, scale_B, solver=solver)
    moved = select_logdet(moved_BND, 3, 0.01, moved_scale_B, solver=solver)
    assert order_N[moved.indices_BK].tolist() == plain.indices_BK.tolist()
    torch.testing.assert_close(moved.logdet_B, plain.logdet_B)


def test_large_pool_needs_no_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 candidates from the picked rows alone; the same picks as from the matrix where that is still possible."""
    vectors_BND = torch.randn(2, limits.DENSE_POOL + 200, 16, generator=generator(16), dtype=torch.float64)
    by_rows = select_logdet(vectors_BND, 5, 0.1)
    by_matrix = select_logdet_gram(vectors_BND @ vectors_BND.mT, 5, 0.1)
    assert by_rows.indices_BK.tolist() == by_matrix.indices_BK.tolist()
    torch.testing.assert_close(by_rows.gains_BK, by_matrix.gains_BK)
    monkeypatch.setattr(solve, "select_logdet_gram", None)  # would hold 800 MB a prompt
    large_BND = torch.randn(2, 10_000, 64, generator=generator(17))
    solved = select_logdet(large_BND, 4, 1.0)
    for row in range(2):
        expected = explicit_logdet(large_BND[row].double(), solved.indices_BK[row].tolist(), 1.0, 1.0)
        assert float(solved.logdet_B[row]) == pytest.approx(expected, abs=1e-9)
    assert bool((solved.upper_bound_B >= solved.logdet_B).all())


def test_exact_in_chunks_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_BND = torch.randn(5, 9, 4, generator=generator(18), dtype=torch.float64)
    gram_BCC = (
        torch.nn.functional.pad(vectors_BND, (0, 0, 1, 0)) @ torch.nn.functional.pad(vectors_BND, (0, 0, 1, 0)).mT
    )
    rewards_BC = torch.randn(5, 10, generator=generator(19), dtype=torch.float64)
    whole = select_logdet(vectors_BND, 4, 0.1, solver="exact")
    whole_subset = select_subset_fisher(gram_BCC, rewards_BC, 1.0, 4, 0.1, solver="exact")
    monkeypatch.setattr(limits, "CHUNK_NUMBERS", 1)  # one subset at a time
    assert select_logdet(vectors_BND, 4, 0.1, solver="exact").indices_BK.tolist() == whole.indices_BK.tolist()
    again = select_subset_fisher(gram_BCC, rewards_BC, 1.0, 4, 0.1, solver="exact")
    assert again.indices_BK.tolist() == whole_subset.indices_BK.tolist()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_limits() -> None:
    with pytest.raises(UserError, match=r"847,660,528 subsets .10 of 40 candidates.*limit of 200,000.*solver=swap"):
        select_logdet(torch.ones(1, 40, 2), 10, 1.0, solver="exact")
