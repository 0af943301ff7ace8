"""How likely picks were, by enumeration, and the loss that corrects for it: right in expectation, in float64."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from mpmath import binomial, exp, fsum, log, mpf, workdps
from torch import Tensor

from massdpo.selection import Random, Sampled, TopRandom
from massdpo.selection.inclusion import of_draws_from_the_top, of_successive_draws
from massdpo.selection.scores import ByScore
from massdpo.tensors import CandidateScores, Picks, PoolStatistics
from massdpo.training.losses import is_pl, pl

Chance = Callable[[list[float], frozenset[int], frozenset[int]], float]  # of drawing the second set from the first


def successively(reward: list[float], universe: frozenset[int], drawn: frozenset[int]) -> float:
    total = 0.0
    for order in itertools.permutations(drawn):
        chance, left = 1.0, set(universe)
        for index in order:
            chance /= sum(math.exp(min(reward[other] - reward[index], 700.0)) for other in left)
            left.remove(index)
        total += chance
    return total


def from_the_top(reward: list[float], universe: frozenset[int], drawn: frozenset[int], top: int) -> float:
    """Over every order in which chance may put what ties."""
    orders = list(itertools.permutations(universe))
    hits = sum(drawn <= set(sorted(order, key=lambda index: -reward[index])[:top]) for order in orders)
    return hits / len(orders) / math.comb(min(top, len(universe)), len(drawn))


def uniformly(reward: list[float], universe: frozenset[int], drawn: frozenset[int]) -> float:
    return 1 / math.comb(len(universe), len(drawn))


def from_the_top_three(reward: list[float], universe: frozenset[int], drawn: frozenset[int]) -> float:
    return from_the_top(reward, universe, drawn, 3)


def one(picks: tuple[int, ...]) -> Picks:
    return Picks(torch.tensor([picks]), torch.ones(1, len(picks), dtype=torch.bool))


@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0, 300.0])
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_successive_draws_against_every_order(spread: float, k: int) -> None:
    """Five negatives, of which 5 are all; at a spread of 300 some rates leave float64's range."""
    noise = torch.Generator().manual_seed(k)
    reward_BC = spread * torch.randn(1, 6, generator=noise, dtype=torch.float64)
    mask_BC = torch.ones(1, 6, dtype=torch.bool)
    reward = reward_BC[0].tolist()
    for picks in itertools.combinations(range(5), k):
        slate = frozenset({0, *(index + 1 for index in picks)})
        chances = [successively(reward, frozenset(range(6)) - {j}, slate - {j}) for j in (0, *(i + 1 for i in picks))]
        (found,) = of_successive_draws(reward_BC, mask_BC, one(picks)).tolist()
        for chance, log_inclusion in zip(chances[1:], found, strict=True):
            if min(chance, chances[0]) > 1e-280:
                assert log_inclusion == pytest.approx(math.log(chances[0] / chance), abs=1e-9)
            assert math.isfinite(log_inclusion)


@pytest.mark.parametrize("top", [2, 3, 4, 9])
@pytest.mark.parametrize("levels", [2, 3, 50])
def test_draws_from_the_top_against_every_order(top: int, levels: int) -> None:
    """Few levels tie often, the chosen one too, across the last place of the top."""
    noise = torch.Generator().manual_seed(top)
    for _ in range(4):
        value_BC = torch.randint(levels, (1, 6), generator=noise).double()
        value = value_BC[0].tolist()
        for picks in itertools.combinations(range(5), 2):
            slate, everyone = frozenset({0, *(index + 1 for index in picks)}), frozenset(range(6))
            own, *others = (from_the_top(value, everyone - {j}, slate - {j}, top) for j in (0, *(i + 1 for i in picks)))
            if own == 0:
                continue  # these cannot be drawn
            mask_BC = torch.ones(1, 6, dtype=torch.bool)
            (found,) = of_draws_from_the_top(value_BC, mask_BC, one(picks), top).tolist()
            assert [math.exp(-log_inclusion) for log_inclusion in found] == pytest.approx([p / own for p in others])


def test_padding_changes_nothing() -> None:
    noise = torch.Generator().manual_seed(0)
    reward_BC = torch.randn(3, 6, generator=noise, dtype=torch.float64)
    index_BK = torch.tensor([[0, 3], [4, 1], [2, 0]])
    picks = Picks(index_BK, torch.tensor([[True, True], [True, True], [True, False]]))
    wide_BC = torch.cat([reward_BC, torch.full((3, 2), 9.0, dtype=torch.float64)], dim=1)
    for count in (of_successive_draws, lambda *given: of_draws_from_the_top(*given, top=3)):
        alone_BK = count(reward_BC, torch.ones(3, 6, dtype=torch.bool), picks)
        mask_BC = torch.arange(8).expand(3, -1) < 6
        torch.testing.assert_close(count(wide_BC, mask_BC, picks), alone_BK, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert alone_BK[2, 1] == 0


DRAWS: dict[str, tuple[ByScore, Chance]] = {
    "random": (Random(2), uniformly),
    "sampled": (Sampled(2), successively),
    "top_random": (TopRandom(2, top=3), from_the_top_three),
}


def pool_of(reward_C: Tensor, noise_BN: Tensor) -> PoolStatistics:
    reward_BC = reward_C.expand(len(noise_BN), -1)
    ones_BC = torch.ones_like(reward_BC, dtype=torch.int64)
    scores = CandidateScores(reward_BC, reward_BC[..., None], ones_BC, ones_BC.bool(), precision=torch.float64)
    return PoolStatistics(scores, torch.zeros_like(reward_BC), 1.0, noise_BN, [""] * len(noise_BN))


@pytest.mark.parametrize("name", DRAWS)
def test_the_corrected_loss_is_stationary_at_the_truth(name: str) -> None:
    """The gradient's expectation at the true weights, over every choice and every draw: 0 for `is_pl`.

    Draws go by other weights, as those of an unfinished fit do. Without the correction it is 0 for uniform draws alone.
    """
    selector, chance = DRAWS[name]
    noise = torch.Generator().manual_seed(7)
    features_CD = torch.randn(5, 3, generator=noise, dtype=torch.float64)
    truth_D, policy_D = torch.randn(2, 3, generator=noise, dtype=torch.float64)
    policy_C = features_CD @ policy_D / 2
    reward, everyone = policy_C.tolist(), frozenset(range(5))
    expected = {loss: torch.zeros(3, dtype=torch.float64) for loss in ("is_pl", "pl")}
    total = 0.0
    for j, choice in enumerate((features_CD @ truth_D).softmax(0).tolist()):
        columns = [j, *(everyone - {j})]
        noise_BN = torch.rand(3_000, 4, generator=noise, dtype=torch.float64)  # enough that every draw is among them
        picks = selector(pool_of(policy_C[columns], noise_BN))
        assert picks.log_inclusion_BK is not None
        drawn = {tuple(sorted(row)): place for place, row in enumerate(picks.index_BK.tolist())}
        for place in drawn.values():
            index_K = picks.index_BK[place]
            slate = [j, *(columns[index + 1] for index in index_K.tolist())]
            weight = choice * chance(reward, everyone - {j}, frozenset(slate) - {j})
            total += weight
            theta_D = truth_D.clone().requires_grad_()
            reward_BC = (features_CD[slate] @ theta_D)[None]
            mask_BC = torch.ones(1, 3, dtype=torch.bool)
            losses = {
                "is_pl": is_pl(reward_BC, reward_BC, mask_BC, picks.log_inclusion_BK[place][None]),
                "pl": pl(reward_BC, reward_BC, mask_BC),
            }
            for kind, loss_B in losses.items():
                (gradient_D,) = torch.autograd.grad(loss_B.sum(), theta_D, retain_graph=True)
                expected[kind] += weight * gradient_D
    assert total == pytest.approx(1.0)
    assert float(expected["is_pl"].norm()) < 1e-10
    assert (float(expected["pl"].norm()) < 1e-10) == (name == "random")


def test_a_slate_that_says_nothing_gives_a_loss_and_a_gradient_of_zero() -> None:
    """The chosen one would not have been among the hardest: seen among them, it was sure to win."""
    reward_BC = torch.tensor([[-5.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    picks = TopRandom(1, top=2)(pool_of(reward_BC[0], torch.rand(1, 3, dtype=torch.float64)))
    assert picks.log_inclusion_BK is not None and bool(picks.log_inclusion_BK.isposinf().all())
    slate_BC = reward_BC[:, :2].clone().requires_grad_()
    loss = is_pl(slate_BC, slate_BC, torch.ones(1, 2, dtype=torch.bool), picks.log_inclusion_BK).sum()
    (gradient_BC,) = torch.autograd.grad(loss, slate_BC)
    assert float(loss.detach()) == 0 and gradient_BC.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("k", [1, 4, 20, 100])
def test_the_steps_of_the_integral_are_small_enough(k: int) -> None:
    """Equal rates: each set is as likely as any other. One rate apart: 150-digit arithmetic, term by term."""
    mask_BC = torch.ones(1, 2 * k + 1, dtype=torch.bool)
    reward_BC = torch.zeros(1, 2 * k + 1, dtype=torch.float64)
    picks = one(tuple(range(k)))
    assert float(of_successive_draws(reward_BC, mask_BC, picks).abs().max()) < 1e-11
    reward_BC[0, 1] = 2.0
    with workdps(150):
        rate, others = exp(2), mpf(k)  # the chance of k - 1 equal ones and one of `rate`, or of k equal ones

        def chance(own: mpf) -> mpf:
            terms = [binomial(k - 1, i) * (-1) ** i * (beta(others, i) - beta(others, i + own)) for i in range(k)]
            return fsum(terms)

        def beta(others: mpf, more: mpf) -> mpf:  # the integral of W exp(-(W + more) t)
            return others / (others + more)

        expected = float(log(chance(rate) / chance(mpf(1))))
    assert float(of_successive_draws(reward_BC, mask_BC, picks)[0, 0]) == pytest.approx(expected, abs=1e-10)
