"""Selectors against plain per-prompt loops, their chance against exact distributions, and what users can get wrong."""

import inspect
import itertools
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from massdpo import selection
from massdpo.config import instantiate
from massdpo.errors import UserError
from massdpo.selection import (
    Adpo,
    Coreset,
    Dpp,
    Dynamic,
    Farthest,
    Full,
    Hardest,
    HardestLogp,
    Herding,
    Interleaved,
    Mass,
    Medoids,
    Random,
    Sampled,
    TopRandom,
    check_selection,
    hardest_overlap,
    logdet,
    overlap,
    take_best,
)
from massdpo.selection.pools import check_pools
from massdpo.tensors import CandidateScores, Picks, PoolStatistics
from tests.conftest import ROOT

EVERY = (Mass, Adpo, Dpp, Dynamic, Farthest, Hardest, HardestLogp, Interleaved, Random, Sampled)
EVERY += (Coreset, Medoids, Herding, TopRandom)


def make_pool(
    batch: int = 6, size: int = 8, width: int = 5, seed: int = 0, at_reference: bool = False
) -> PoolStatistics:
    noise = torch.Generator().manual_seed(seed)
    logp_BC = -5 + 2 * torch.randn(batch, size + 1, generator=noise)
    length_BC = torch.randint(1, 5, (batch, size + 1), generator=noise)
    features_BCD = torch.randn(batch, size + 1, width, generator=noise)
    ref_logp_BC = logp_BC.clone() if at_reference else logp_BC + torch.randn(batch, size + 1, generator=noise)
    scores = CandidateScores(
        logp_BC=logp_BC,
        token_logp_BCT=logp_BC[..., None],
        length_BC=length_BC,
        mask_BC=torch.ones(batch, size + 1, dtype=torch.bool),
        features_BCD=features_BCD,
        gram_BCC=(features_BCD @ features_BCD.mT).double(),
    )
    noise_BN = torch.rand(batch, size, generator=noise)
    return PoolStatistics(scores, ref_logp_BC, 0.5, noise_BN, [f"example-{row}" for row in range(batch)])


def shorten(pool: PoolStatistics, sizes: list[int]) -> PoolStatistics:
    """Cut the pools to these sizes; what lies beyond is padding as the scorer leaves it, except tempting features."""
    mask_BC = torch.arange(pool.scores.mask_BC.shape[1]) <= torch.tensor(sizes)[:, None]
    scores = pool.scores
    scores.mask_BC = mask_BC
    scores.logp_BC = scores.logp_BC * mask_BC
    scores.length_BC = scores.length_BC * mask_BC
    pool.ref_logp_BC = pool.ref_logp_BC * mask_BC
    assert scores.features_BCD is not None
    scores.features_BCD = scores.features_BCD * torch.where(mask_BC, 1.0, 50.0)[..., None]
    scores.gram_BCC = (scores.features_BCD @ scores.features_BCD.mT).double()
    return pool


def permute(pool: PoolStatistics, order_N: Tensor) -> PoolStatistics:
    order_C = torch.cat([torch.zeros(1, dtype=torch.int64), order_N + 1])
    scores = pool.scores
    assert scores.features_BCD is not None and scores.gram_BCC is not None
    moved = CandidateScores(
        scores.logp_BC[:, order_C],
        scores.token_logp_BCT[:, order_C],
        scores.length_BC[:, order_C],
        scores.mask_BC[:, order_C],
        scores.features_BCD[:, order_C],
        scores.gram_BCC[:, order_C][:, :, order_C],
    )
    return PoolStatistics(moved, pool.ref_logp_BC[:, order_C], pool.beta, pool.noise_BN[:, order_N], pool.ids)


def sets(picks: Picks) -> list[set[int]]:
    return [set(index_K[mask_K].tolist()) for index_K, mask_K in zip(picks.index_BK, picks.mask_BK, strict=True)]


# Every selector ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_k_distinct_real_candidates(kind: type) -> None:
    sizes = [8, 3, 5, 1, 2, 4]
    picks = kind(k=3, short_pool="all")(shorten(make_pool(), sizes))
    assert picks.index_BK.shape == picks.mask_BK.shape == (6, 3)
    for row, size in enumerate(sizes):
        real = picks.index_BK[row][picks.mask_BK[row]].tolist()
        assert len(set(real)) == len(real) <= min(3, size)
        if kind is not Dynamic:  # its boundary set can be smaller
            assert len(real) == min(3, size)
        assert all(index < size for index in real)
        assert bool((picks.index_BK[row][~picks.mask_BK[row]] == 0).all())
    for name, value in picks.info.items():
        assert value.shape == (6,), name


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind is not Dpp])
@pytest.mark.parametrize("at_reference", [False, True])
def test_permutation_equivariance(kind: type, at_reference: bool) -> None:
    """The order of the pool decides nothing, ties included. (A k-DPP is equivariant in distribution only.)"""
    pool = make_pool(seed=3, at_reference=at_reference)
    order_N = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    plain, moved = kind(k=3)(pool), kind(k=3)(permute(pool, order_N))
    assert (
        order_N[moved.index_BK].masked_fill(~moved.mask_BK, -1).tolist()
        == plain.index_BK.masked_fill(~plain.mask_BK, -1).tolist()
    )


@pytest.mark.parametrize("kind", EVERY)
def test_padding_and_neighbours_change_nothing(kind: type) -> None:
    """A prompt's picks are the same alone as in a batch with longer pools."""
    together = kind(k=3)(shorten(make_pool(), [8, 4, 5, 3, 8, 6]))
    single = shorten(make_pool(), [8, 4, 5, 3, 8, 6])
    scores = single.scores
    assert scores.features_BCD is not None and scores.gram_BCC is not None
    row, width = 3, 4
    alone = PoolStatistics(
        CandidateScores(
            scores.logp_BC[row : row + 1, :width],
            scores.token_logp_BCT[row : row + 1, :width],
            scores.length_BC[row : row + 1, :width],
            scores.mask_BC[row : row + 1, :width],
            scores.features_BCD[row : row + 1, :width],
            scores.gram_BCC[row : row + 1, :width, :width],
        ),
        single.ref_logp_BC[row : row + 1, :width],
        single.beta,
        single.noise_BN[row : row + 1, : width - 1],
        ["alone"],
    )
    picks = kind(k=3)(alone)
    assert picks.index_BK[0].tolist() == together.index_BK[row].tolist()
    assert picks.mask_BK[0].tolist() == together.mask_BK[row].tolist()
    for name, value_B in picks.info.items():  # the relative ridge among what they depend on
        torch.testing.assert_close(value_B[0], together.info[name][row])


@pytest.mark.parametrize("kind", [Mass, Adpo, Farthest, Hardest, HardestLogp, Interleaved, Random, Sampled])
def test_ties_are_decided_by_noise_alone(kind: type) -> None:
    """All candidates alike: over many draws every one is picked first about equally often."""
    pool = make_pool(batch=3_000, size=4, at_reference=True)
    pool.scores.logp_BC = torch.full_like(pool.scores.logp_BC, -3.0)
    pool.ref_logp_BC = pool.scores.logp_BC + 1e-6 * torch.randn_like(pool.ref_logp_BC)  # noise of a second pass
    pool.scores.length_BC = torch.ones_like(pool.scores.length_BC)
    pool.scores.features_BCD = torch.ones(3_000, 5, 2)
    picks = kind(k=2)(pool)
    counts = torch.bincount(picks.index_BK[:, 0], minlength=4)
    # Binomial(3000, 1/4): standard deviation 24, so 5 of them are 120.
    assert bool(((counts - 750).abs() < 120).all())


def test_pure_chance_needs_no_scores() -> None:
    assert not Random(2).needs_scores and not Full().needs_scores
    assert all(kind(2).needs_scores for kind in EVERY if kind is not Random)
    assert [Mass(2).features, Hardest(2).features, Farthest(2, features="last").features] == ["mean", None, "last"]


# By one score --------------------------------------------------------------------------------------------------------


def test_hardest_kinds_against_sorting() -> None:
    pool = make_pool()
    policy, length, reward = pool.scores.logp_BC, pool.scores.length_BC, pool.rewards_BC
    expected = {
        "hardest": (Hardest(3), reward[:, 1:] - reward[:, :1]),
        "sum": (HardestLogp(3, score="sum"), policy[:, 1:]),
        "mean": (HardestLogp(3), (policy / length)[:, 1:]),
    }
    for name, (selector, score_BN) in expected.items():
        for row, score_N in enumerate(score_BN.tolist()):
            best = sorted(range(8), key=lambda index, score_N=score_N: -score_N[index])[:3]
            assert selector(pool).index_BK[row].tolist() == best, name


def test_random_is_uniform_over_subsets() -> None:
    pool = make_pool(batch=6_000, size=4)
    counts = Counter(frozenset(members) for members in sets(Random(2)(pool)))
    assert len(counts) == 6
    assert all(abs(count - 1_000) < 5 * math.sqrt(6_000 * 5 / 36) for count in counts.values())  # 5 sigma


def test_sampled_follows_the_sequential_law() -> None:
    """Without replacement in proportion to p: P(i then j) = p_i p_j / (1 - p_i)."""
    pool = make_pool(batch=20_000, size=3)
    pool.scores.logp_BC = torch.tensor([-1.0, 0.0, 1.0, 3.0]).repeat(20_000, 1)
    pool.ref_logp_BC = torch.zeros(20_000, 4)
    share = torch.softmax(torch.tensor([0.0, 0.5, 1.5]), 0).tolist()
    counts = Counter(tuple(pair) for pair in Sampled(2)(pool).index_BK.tolist())
    for first, second in itertools.permutations(range(3), 2):
        expected = share[first] * share[second] / (1 - share[first])
        sigma = math.sqrt(expected * (1 - expected) / 20_000)
        assert abs(counts[first, second] / 20_000 - expected) < 5 * sigma


def test_full_takes_all() -> None:
    assert sets(Full()(shorten(make_pool(), [8, 3, 5, 1, 2, 4]))) == [set(range(size)) for size in (8, 3, 5, 1, 2, 4)]


# By several scores ---------------------------------------------------------------------------------------------------


def test_interleaved_against_a_loop() -> None:
    pool = make_pool(batch=40, size=7, seed=5)
    picks = Interleaved(5)(pool)
    starts = set()
    for row in range(40):
        logp_C, ref_C, length_C = pool.scores.logp_BC[row], pool.ref_logp_BC[row], pool.scores.length_BC[row]
        mean_C = logp_C / length_C
        scores = [value_C[1:] - value_C[0] for value_C in (logp_C, logp_C - ref_C, mean_C)]
        start = int((float(pool.noise_BN[row].double().sum()) % 1) * 3)
        starts.add(start)
        expected: list[int] = []
        for step in range(5):
            score_N = scores[(start + step) % 3]
            expected.append(
                max(set(range(7)) - set(expected), key=lambda index, score_N=score_N: float(score_N[index]))
            )
        assert picks.index_BK[row].tolist() == expected
    assert starts == {0, 1, 2}


def test_dynamic_takes_the_boundary() -> None:
    pool = make_pool(batch=3, size=6)
    pool.scores.logp_BC = torch.tensor(
        [
            [-3.0, -2.0, -9.0, -1.0, -9.5, -3.0, -10.0],  # three are at least as likely as the chosen one
            [-1.0, -9.0, -2.0, -9.1, -2.1, -8.0, -20.0],  # none is: the top cluster is {1, 3}
            [-9.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],  # all are: the likeliest k
        ]
    )
    picks = Dynamic(4)(pool)
    assert sets(picks) == [{0, 2, 4}, {1, 3}, {0, 1, 2, 3}]
    assert picks.index_BK[0, 0] == 2
    assert picks.info["boundary_size"].tolist() == [3.0, 2.0, 6.0]


def test_dynamic_varies_beta_as_its_authors_do() -> None:
    """Pick by pick; the last pool is all boundary, so that it stands for its own easy negatives too."""
    pool = make_pool(batch=3, size=6)
    pool.scores.precision = torch.float64
    logp_BC = [
        [-3.0, -2.0, -9.0, -1.0, -9.5, -3.0, -10.0],
        [-1.0, -9.0, -2.0, -9.1, -2.1, -8.0, -20.0],
        [-9.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
    ]
    pool.scores.logp_BC = torch.tensor(logp_BC, dtype=torch.float64)
    picks = Dynamic(4, beta_margin=6.0)(pool)
    assert picks.beta_scale_BK is not None
    for row, easy in enumerate([{1, 3, 5}, {0, 2, 4, 5}, {0, 1, 2, 3, 4, 5}]):
        chosen, *negatives = logp_BC[row]
        mean = sum(negatives[index] for index in easy) / len(easy)
        for place in range(int(picks.mask_BK[row].sum())):
            pick = negatives[picks.index_BK[row, place]]
            above, below = chosen - pick, pick - mean
            expected = 1 + 0.5 * math.tanh((above - below - 6.0) / (abs(above) + abs(below)))
            assert float(picks.beta_scale_BK[row, place]) == pytest.approx(expected, abs=1e-6)
    assert sets(picks) == sets(Dynamic(4, None)(pool)) and Dynamic(4, beta_margin=None)(pool).beta_scale_BK is None


def test_dynamic_clusters_until_nothing_changes() -> None:
    """Where no negative is above the chosen response: the top cluster of Lloyd's algorithm in one dimension."""
    pool = make_pool(batch=60, size=20, seed=15)
    pool.scores.logp_BC[:, 0] = 0.0
    pool.scores.logp_BC[:, 1:] = -1 - pool.scores.logp_BC[:, 1:].abs()
    most = 0
    for row, members in enumerate(sets(Dynamic(20, short_pool="all")(pool))):
        values = pool.scores.logp_BC[row, 1:].tolist()
        centres, nearest, rounds = [min(values), (min(values) + max(values)) / 2, max(values)], [-1], 0
        while nearest != (again := [min(range(3), key=lambda c, v=v, at=centres: abs(v - at[c])) for v in values]):
            nearest, rounds = again, rounds + 1
            clusters = [[v for v, place in zip(values, nearest, strict=True) if place == c] for c in range(3)]
            centres = [sum(c) / len(c) if c else old for c, old in zip(clusters, centres, strict=True)]
        assert members == {index for index, place in enumerate(nearest) if place == 2}
        most = max(most, rounds)
    assert most > 2  # more rounds than one are needed


def test_farthest_against_a_loop() -> None:
    pool = make_pool(seed=6)
    features = pool.scores.features_BCD
    assert features is not None
    for normalize in (False, True):
        picks = Farthest(4, normalize=normalize)(pool)
        for row in range(6):
            point_CD = features[row].double()
            if normalize:
                point_CD = torch.nn.functional.normalize(point_CD - point_CD[1:].mean(0), dim=-1)
            distance_CC = torch.cdist(point_CD, point_CD)
            taken = [0]
            for _ in range(4):
                left = [index for index in range(9) if index not in taken]
                taken.append(max(left, key=lambda index: float(distance_CC[index, taken].min())))
            assert picks.index_BK[row].tolist() == [index - 1 for index in taken[1:]]


def unit_features(pool: PoolStatistics, row: int) -> Tensor:
    """A pool's negatives about their plain mean, at unit length."""
    features = pool.scores.features_BCD
    assert features is not None
    return torch.nn.functional.normalize(features[row, 1:].double() - features[row, 1:].double().mean(0), dim=-1)


def test_coreset_against_lloyds_algorithm() -> None:
    pool = make_pool(batch=30, size=12, seed=18)
    starts, found = Farthest(4)(pool).index_BK.tolist(), Coreset(4)(pool)
    for row in range(30):
        point_ND, hard = unit_features(pool, row), pool.advantage_BN[row].tolist()
        centres, nearest = point_ND[starts[row]], None
        while nearest is None or not torch.equal(nearest, torch.cdist(point_ND, centres).argmin(-1)):
            nearest = torch.cdist(point_ND, centres).argmin(-1)
            centres = torch.stack(
                [point_ND[nearest == c].mean(0) if (nearest == c).any() else centres[c] for c in range(4)]
            )
        best = [max((nearest == c).nonzero()[:, 0].tolist(), key=lambda i: hard[i]) for c in set(nearest.tolist())]
        assert found.index_BK[row].tolist()[: len(best)] == sorted(best, key=lambda i: -hard[i])


def test_medoids_are_the_best_of_greedy_and_exchanges() -> None:
    """No single exchange improves them; over 30 pools they are within a hundredth of the best subset on average."""
    pool = make_pool(batch=30, size=8, seed=19)
    found, ratios = Medoids(3)(pool), []
    for row, members in enumerate(sets(found)):
        distance_NN = torch.cdist(unit_features(pool, row), unit_features(pool, row))
        share_N = pool.advantage_BN[row].softmax(-1)
        costs = {
            subset: float((share_N * distance_NN[:, list(subset)].amin(-1)).sum())
            for subset in itertools.combinations(range(8), 3)
        }
        own = costs[tuple(sorted(members))]
        assert all(own <= cost * 1.001 for subset, cost in costs.items() if len(members & set(subset)) == 2)
        ratios.append(own / min(costs.values()))
    assert sum(ratios) / 30 < 1.01


def test_herding_against_a_loop() -> None:
    pool = make_pool(batch=30, size=9, seed=20)
    pool.scores.precision = torch.float64
    features = pool.scores.features_BCD
    assert features is not None
    for row, picks in enumerate(Herding(4)(pool).index_BK.tolist()):
        point_ND = features[row, 1:].double()
        target_D = pool.advantage_BN[row].softmax(-1) @ point_ND
        taken: list[int] = []
        for _ in range(4):
            left = [index for index in range(9) if index not in taken]
            means = {index: point_ND[[*taken, index]].mean(0) for index in left}
            taken.append(min(left, key=lambda index: float((means[index] - target_D).norm())))
        assert picks == taken


@pytest.mark.parametrize("at_reference", [True, False])
def test_top_random_draws_evenly_from_the_hardest(at_reference: bool) -> None:
    pool = make_pool(batch=6_000, size=7, at_reference=at_reference)
    pool.noise_BN = torch.rand(6_000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(21))
    top = pool.advantage_BN.argsort(dim=-1, descending=True)[:, :4]
    picked_BN = torch.zeros(6_000, 7).scatter(1, TopRandom(2, top=4)(pool).index_BK, 1.0)
    drawn = picked_BN.sum(0) if at_reference else picked_BN.gather(1, top).sum(0)
    share = 2 / drawn.shape[0]
    assert bool(((drawn - 6_000 * share).abs() < 5 * math.sqrt(6_000 * share * (1 - share))).all())
    with pytest.raises(UserError, match=r"selector\.top must be a whole number of at least k=3"):
        TopRandom(3, top=2)


# By the Fisher information -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["centered", "relative"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ridge_relative", [True, False])
@pytest.mark.parametrize("solver", logdet.SOLVERS)
def test_mass_is_the_maximiser_of_its_design(variant: str, normalize: bool, ridge_relative: bool, solver: str) -> None:
    pool = make_pool(seed=7)
    pool.scores.precision = torch.float64
    picks = Mass(3, variant, "mean", normalize, 0.2, ridge_relative, solver)(pool)
    features_BCD = pool.scores.features_BCD
    assert features_BCD is not None
    vectors_BND, scale_B = logdet.design_vectors(features_BCD, pool.rewards_BC, pool.beta, variant, normalize)
    ridge_B = torch.full((6,), 0.2, dtype=torch.float64)
    if ridge_relative:
        ridge_B = 0.2 * (scale_B[:, None] * vectors_BND.square().sum(-1)).mean(-1)
    expected = logdet.select_logdet(vectors_BND, 3, ridge_B, scale_B, solver=solver)
    assert picks.index_BK.tolist() == expected.indices_BK.tolist()
    torch.testing.assert_close(picks.info["logdet"], expected.logdet_B.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(picks.info["certified_ratio"], expected.certified_ratio_B.float(), rtol=1e-4, atol=1e-5)


def test_mass_from_the_head_kernel_and_adpo() -> None:
    pool = make_pool(seed=8)
    assert Mass(3, features="head")(pool).index_BK.tolist() == Mass(3)(pool).index_BK.tolist()
    features_BCD = pool.scores.features_BCD
    assert features_BCD is not None
    loses_BN = torch.sigmoid(pool.advantage_BN.double())
    weight_BN = pool.beta * (loses_BN * (1 - loses_BN)).sqrt()
    vectors_BND = weight_BN[..., None] * (features_BCD[:, :1] - features_BCD[:, 1:]).double()
    expected = logdet.select_logdet(vectors_BND, 3, 0.3)
    picks = Adpo(3, normalize=False, ridge=0.3, ridge_relative=False)(pool)
    assert picks.index_BK.tolist() == expected.indices_BK.tolist()


@pytest.mark.parametrize("solver", ["greedy", "exact"])
def test_mass_with_the_subset_fisher(solver: str) -> None:
    pool = make_pool(seed=9)
    gram_BCC = pool.scores.gram_BCC
    assert gram_BCC is not None
    selector = Mass(3, "subset_fisher", normalize=False, ridge=0.3, ridge_relative=False, solver=solver)
    expected = logdet.select_subset_fisher(gram_BCC, pool.rewards_BC, pool.beta, 3, 0.3, solver=solver)
    picks = selector(pool)
    assert picks.index_BK.tolist() == expected.indices_BK.tolist()
    assert "certified_ratio" not in picks.info  # nothing is proved, nothing is claimed
    assert bool(Mass(3, "subset_fisher", solver=solver)(pool).info["logdet"].isfinite().all())


@pytest.mark.parametrize("variant", ["centered", "relative", "subset_fisher"])
@pytest.mark.parametrize("shift", [-2_000.0, 2_000.0])
def test_mass_beyond_the_range_of_exp(variant: str, shift: float) -> None:
    """The chosen response wins or loses by 1,000 nats: exp(s) leaves float64, the picks stay sound."""
    pool = make_pool(seed=13)
    pool.scores.logp_BC[:, 1:] += shift
    picks = Mass(3, variant)(pool)
    assert all(len(members) == 3 for members in sets(picks))
    assert bool(picks.info["logdet"].isfinite().all())


def test_mass_ignores_length_scale_when_normalised() -> None:
    pool, scaled = make_pool(seed=10), make_pool(seed=10)
    assert scaled.scores.features_BCD is not None
    scaled.scores.features_BCD = scaled.scores.features_BCD * 1e4
    assert Mass(3)(pool).index_BK.tolist() == Mass(3)(scaled).index_BK.tolist()


BIG = """
import torch
from massdpo.benchmark.measure import peak_bytes
from massdpo.tensors import PoolStatistics, CandidateScores
from massdpo.selection import Mass

noise = torch.Generator().manual_seed(0)
logp_BC, mask_BC = torch.randn(1, 10_001, generator=noise), torch.ones(1, 10_001, dtype=torch.bool)
features_BCD = torch.randn(1, 10_001, 256, generator=noise)
scores = CandidateScores(logp_BC, logp_BC[..., None], mask_BC.long(), mask_BC, features_BCD)
pool = PoolStatistics(scores, torch.zeros_like(logp_BC), 0.5, torch.rand(1, 10_000, generator=noise), ["big"])
assert len(set(Mass(4)(pool).index_BK[0].tolist())) == 4
print(peak_bytes(lambda: Mass(4)(pool)))
"""


def test_mass_on_ten_thousand_candidates_in_bounded_memory() -> None:
    """The features are 10 MB, 20 in float64; all inner products would be 800 MB."""
    done = subprocess.run([sys.executable, "-c", BIG], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150e6


def test_large_pools_are_selected_from_by_rows() -> None:
    small = make_pool(batch=2, size=300, width=16)
    by_matrix = Mass(4)(small)
    limit, logdet.limits.DENSE_POOL = logdet.limits.DENSE_POOL, 100
    try:
        assert Mass(4)(small).index_BK.tolist() == by_matrix.index_BK.tolist()
        with pytest.raises(UserError, match="needs all inner products"):
            Mass(2, "subset_fisher")(small)
        with pytest.raises(UserError, match="needs all inner products"):
            Dpp(2)(small)
        with pytest.raises(UserError, match="and solver=greedy"):
            Mass(2, solver="swap")(small)
    finally:
        logdet.limits.DENSE_POOL = limit


def test_what_is_only_logged_is_computed_when_it_is_logged() -> None:
    pool, silent = make_pool(seed=14), make_pool(seed=14)
    silent.observe = False
    for selector in (Mass(3), Mass(3, solver="swap"), Adpo(3)):
        assert selector(silent).index_BK.tolist() == selector(pool).index_BK.tolist()
        assert "certified_ratio" in selector(pool).info and "certified_ratio" not in selector(silent).info


def test_dpp_follows_the_determinant() -> None:
    """Over 6,000 draws the subsets of 3 out of 5 appear in proportion to det(I + A_S)."""
    draws = 6_000
    pool = make_pool(batch=1, size=5, width=3, seed=11)
    features_BCD = pool.scores.features_BCD
    assert features_BCD is not None
    vectors_BND, _ = logdet.design_vectors(features_BCD, pool.rewards_BC, pool.beta)
    ridge = 0.1 * float(vectors_BND.square().sum(-1).mean())
    subsets = list(itertools.combinations(range(5), 3))
    weights = [
        float(torch.linalg.det(torch.eye(3) + vectors_BND[0, list(s)] @ vectors_BND[0, list(s)].T / ridge))
        for s in subsets
    ]
    pool.scores.features_BCD = features_BCD.expand(draws, -1, -1)
    for name in ("logp_BC", "length_BC", "mask_BC"):
        setattr(pool.scores, name, getattr(pool.scores, name).expand(draws, -1))
    pool.ref_logp_BC = pool.ref_logp_BC.expand(draws, -1)
    pool.noise_BN = torch.rand(draws, 5, generator=torch.Generator().manual_seed(12))
    counts = Counter(tuple(sorted(members)) for members in sets(Dpp(3, ridge=0.1)(pool)))
    for subset, weight in zip(subsets, weights, strict=True):
        expected = weight / sum(weights)
        assert abs(counts[subset] / draws - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)


@pytest.mark.parametrize(("size", "k", "ridge"), [(100, 50, 1.0), (120, 110, 1e-4), (200, 150, 1e-2), (60, 60, 1.0)])
def test_dpp_picks_none_twice(size: int, k: int, ridge: float) -> None:
    """The elementary symmetric polynomials of a large pool leave float64's range."""
    picks = Dpp(k, ridge=ridge)(make_pool(batch=2, size=size, width=16, seed=16))
    assert [len(members) for members in sets(picks)] == [k, k]


def test_dpp_with_duplicates_does_not_depend_on_padding() -> None:
    """Copies share an eigenvalue, whose eigenvectors are anyone's choice: not that of how wide the batch is."""
    wide = make_pool(batch=40, size=12, seed=17)
    wide.scores.logp_BC[:, 2:6] = wide.scores.logp_BC[:, 1:2]
    wide.ref_logp_BC[:, 2:6] = wide.ref_logp_BC[:, 1:2]
    wide.scores.length_BC[:, 2:6] = wide.scores.length_BC[:, 1:2]
    assert wide.scores.features_BCD is not None
    wide.scores.features_BCD[:, 2:6] = wide.scores.features_BCD[:, 1:2]
    wide = shorten(wide, [7] * 40)
    scores = wide.scores
    assert scores.features_BCD is not None
    narrow = CandidateScores(
        *(getattr(scores, name)[:, :8] for name in ("logp_BC", "token_logp_BCT", "length_BC", "mask_BC"))
    )
    narrow.features_BCD = scores.features_BCD[:, :8]
    alone = PoolStatistics(narrow, wide.ref_logp_BC[:, :8], wide.beta, wide.noise_BN[:, :7], wide.ids)
    assert Dpp(4, ridge=0.1)(alone).index_BK.tolist() == Dpp(4, ridge=0.1)(wide).index_BK.tolist()


# Overlaps, bad input, options ----------------------------------------------------------------------------------------


def test_overlap() -> None:
    full = torch.ones(3, 2, dtype=torch.bool)
    a = Picks(torch.tensor([[0, 1], [2, 3], [0, 0]]), full & torch.tensor([[True], [True], [False]]))
    b = Picks(torch.tensor([[1, 0], [3, 4], [0, 0]]), a.mask_BK)
    assert overlap(a, b).tolist() == pytest.approx([1.0, 1 / 3, 1.0])
    pool = make_pool()
    assert hardest_overlap(pool, Hardest(3)(pool)).tolist() == [1.0] * 6


@pytest.mark.parametrize("kind", EVERY)
def test_short_pools_are_an_error_unless_allowed(kind: type) -> None:
    with pytest.raises(UserError, match=r"2 of 6 prompts.*k=3.*smallest pool: 1.*selector.short_pool=all"):
        kind(k=3)(shorten(make_pool(), [8, 2, 5, 1, 3, 4]))


@pytest.mark.parametrize("kind", EVERY)
def test_copies_and_short_pools_never_lead_to_padding_or_the_same_pick_twice(kind: type) -> None:
    """Distances between copies are rounding, and may come out below zero."""
    for seed in range(8):
        pool = make_pool(seed=seed)
        for value in (pool.scores.features_BCD, pool.scores.logp_BC, pool.scores.length_BC, pool.ref_logp_BC):
            assert value is not None
            value[:, 3:] = value[:, 1:2]  # from the third on all are the first
        pool = shorten(pool, [8, 2, 5, 1, 3, 4])
        for features in ("mean", "head") if "features" in inspect.signature(kind).parameters else (None,):
            picks = kind(k=5, short_pool="all", **({"features": features} if features else {}))(pool)
            for index_K, mask_K, size in zip(picks.index_BK, picks.mask_BK, [8, 2, 5, 1, 3, 4], strict=True):
                taken = index_K[mask_K].tolist()
                assert len(set(taken)) == len(taken) and max(taken) < size
                assert len(taken) == min(5, size) or kind is Dynamic


def test_check_pools() -> None:
    check_pools([3, 4], 3, "error")
    check_pools([1, 4], 3, "all")
    with pytest.raises(UserError, match="1 of 2 prompts"):
        check_pools([1, 4], 3, "error")


def test_pools_are_checked_before_training() -> None:
    check_selection({"k": 3, "short_pool": "all"}, [1, 4])
    check_selection({"_target_": "massdpo.selection.Full"}, [1, 4])
    check_selection({"k": 4, "short_pool": "error", "solver": "exact"}, [20, 20])
    with pytest.raises(UserError, match="1 of 2 prompts"):
        check_selection({"k": 3, "short_pool": "error"}, [1, 4])
    with pytest.raises(UserError, match=r"847,660,528 subsets .10 of 40 candidates.*use solver=swap"):
        check_selection({"k": 10, "short_pool": "error", "solver": "exact"}, [20, 40])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_names_its_example(value: float) -> None:
    for kind in EVERY:
        if kind is Random:
            continue
        pool = make_pool()
        pool.scores.logp_BC[2, 3] = value
        with pytest.raises(UserError, match=r"log-probabilities that are not finite for 1 of 6 prompts \(example-2\)"):
            kind(k=2)(pool)
    for features in ("mean", "head"):
        pool = make_pool()
        assert pool.scores.features_BCD is not None and pool.scores.gram_BCC is not None
        pool.scores.features_BCD[4, 1, 0] = value
        pool.scores.gram_BCC[4, 1, 1] = value
        with pytest.raises(UserError, match=r"features that are not finite for 1 of 6 prompts \(example-4\)"):
            Mass(2, features=features)(pool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a whole number"),
        ({"k": "abc"}, "k must be a whole number"),
        ({"variant": "centred"}, "unknown variant 'centred'; did you mean 'centered'"),
        ({"variant": "pairwise"}, "unknown variant 'pairwise'"),
        ({"features": "gradient"}, "unknown features 'gradient'"),
        ({"features": "hed"}, "did you mean 'head'"),
        ({"solver": "exakt"}, "did you mean 'exact'"),
        ({"variant": "subset_fisher", "solver": "swap"}, "there are greedy, exact"),
        ({"ridge": 0}, "ridge must be a positive number"),
        ({"ridge": "x"}, "ridge must be a positive number"),
        ({"short_pool": "al"}, "did you mean 'all'"),
    ],
)
def test_bad_options_fail_when_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Mass(**{"k": 2, **options})
    assert "\n" not in str(caught.value)


def test_exact_above_its_limit_says_so() -> None:
    with pytest.raises(UserError, match="use solver=swap or solver=greedy"):
        Mass(10, solver="exact")(make_pool(size=40))


@pytest.mark.parametrize("path", sorted((ROOT / "conf/selector").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds_its_selector(path: Path) -> None:
    """Each YAML spells out every option of its class, with a comment."""
    node = OmegaConf.create({"k": 3, "selector": OmegaConf.load(path)})
    selector = instantiate(node.selector)
    picks = selector(make_pool())
    assert picks.mask_BK.any(-1).all()
    assert set(inspect.signature(type(selector)).parameters) == set(node.selector) - {"_target_", "screen"}
    assert all("#" in line for line in path.read_text().splitlines() if not line.startswith("_target_"))


def test_every_selector_has_a_config() -> None:
    targets = {str(OmegaConf.load(path)["_target_"]) for path in (ROOT / "conf/selector").glob("*.yaml")}
    built = {target.split(".")[-1] for target in targets if target.startswith("massdpo.")}  # others are one's own
    public = {name for name, value in vars(selection).items() if isinstance(value, type) and "__call__" in vars(value)}
    inherited = {kind.__name__ for kind in EVERY}
    assert built == (public | inherited) - {"Selector"}


def test_a_users_own_selector() -> None:
    """The whole protocol, as the README shows it."""

    class Longest:
        """The k longest negatives."""

        features = None
        needs_scores = False

        def __init__(self, k: int):
            self.k = k

        def __call__(self, pool: PoolStatistics) -> Picks:
            return take_best(pool, pool.scores.length_BC[:, 1:], self.k)

    pool = make_pool()
    picks = Longest(2)(pool)
    picked_BK = pool.scores.length_BC[:, 1:].gather(1, picks.index_BK)
    assert picked_BK.tolist() == pool.scores.length_BC[:, 1:].topk(2).values.tolist()
