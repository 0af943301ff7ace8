"""Every loss and its gradient against the formula as it is written in the papers, term by term, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.training import losses

# float64: two ways to sum a handful of exponentials differ by a few units of 2e-16, times rewards of order 10
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def written_pl(rewards: list[Tensor], means: list[Tensor]) -> Tensor:
    return -torch.log(torch.exp(rewards[0]) / sum(torch.exp(reward) for reward in rewards))


def written_dpo(rewards: list[Tensor], means: list[Tensor]) -> Tensor:
    chosen, rejected = rewards
    return -torch.log(sigmoid(chosen - rejected))


def written_dmpo(rewards: list[Tensor], means: list[Tensor]) -> Tensor:
    return -torch.log(sigmoid(rewards[0] - sum(rewards[1:]) / len(rewards[1:])))


def written_mppo(rewards: list[Tensor], means: list[Tensor]) -> Tensor:
    chosen, *rejected = (torch.exp(mean) for mean in means)
    return -torch.log(sigmoid(len(rejected) * chosen - sum(rejected)))


def written_pairwise(rewards: list[Tensor], means: list[Tensor]) -> Tensor:
    terms = [-torch.log(sigmoid(rewards[0] - reward)) for reward in rewards[1:]]
    return sum(terms) / len(terms)


def written_lipo(rewards: list[Tensor], means: list[Tensor]) -> Tensor:
    ranked = sorted(range(len(rewards)), key=lambda index: -float(rewards[index]))
    discount = [1 / math.log2(2 + ranked.index(index)) for index in range(len(rewards))]
    pairs = range(1, len(rewards))
    return sum(-abs(discount[0] - discount[i]) * torch.log(sigmoid(rewards[0] - rewards[i])) for i in pairs)


def written_ndcg(rewards: list[Tensor], means: list[Tensor]) -> Tensor:
    rank = 1 + sum(sigmoid(reward - rewards[0]) for reward in rewards[1:])
    return 1 - 1 / torch.log2(1 + rank)


WRITTEN = {
    "pl": written_pl,
    "dpo": written_dpo,
    "dmpo": written_dmpo,
    "mppo": written_mppo,
    "pairwise": written_pairwise,
    "lipo": written_lipo,
    "ndcg": written_ndcg,
}


def slates(negatives: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, mean log-probs (both with gradients) and mask of prompts with so many negatives each."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(negatives), 1 + max(negatives)
    rewards_BC = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    mean_BC = -torch.rand(shape, generator=generator, dtype=torch.float64) * 5
    mask_BC = torch.arange(shape[1]) <= torch.tensor(negatives)[:, None]
    return rewards_BC.requires_grad_(), mean_BC.requires_grad_(), mask_BC


def grads(total: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients; zeros for an input that the loss does not look at."""
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(value) if grad is None else grad for value, grad in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WRITTEN)
def test_loss_and_gradient_are_those_of_the_written_formula(name: str, seed: int) -> None:
    negatives = [1, 1, 1] if name == "dpo" else [1, 4, 2, 7]  # unequal: masked candidates stand in three of four rows
    rewards_BC, mean_BC, mask_BC = slates(negatives, seed)
    loss_B = getattr(losses, name)(rewards_BC, mean_BC, mask_BC)
    written_B = torch.stack(
        [
            WRITTEN[name](list(rewards_BC[row, : 1 + count]), list(mean_BC[row, : 1 + count]))
            for row, count in enumerate(negatives)
        ]
    )
    torch.testing.assert_close(loss_B, written_B, **TOLERANCE)
    weight_B = torch.rand(len(negatives), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, theirs = (grads((value * weight_B).sum(), rewards_BC, mean_BC) for value in (loss_B, written_B))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **TOLERANCE)
    assert sum(float(grad.abs().sum()) for grad in ours) > 0.01  # equal zeros would prove nothing


@pytest.mark.parametrize("name", ["pl", "dmpo", "mppo", "pairwise", "lipo", "ndcg"])
@pytest.mark.parametrize("junk", [0.0, 50.0, -50.0])
def test_masked_candidate_changes_nothing_and_gets_no_gradient(name: str, junk: float) -> None:
    rewards_BC, mean_BC, mask_BC = slates([3, 3])
    alone_B = getattr(losses, name)(rewards_BC, mean_BC, mask_BC)
    wider = [
        torch.cat([value.detach(), torch.full((2, 2), junk, dtype=torch.float64)], dim=1).requires_grad_()
        for value in (rewards_BC, mean_BC)
    ]
    mask = torch.cat([mask_BC, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    padded_B = getattr(losses, name)(*wider, mask)
    torch.testing.assert_close(padded_B, alone_B, **TOLERANCE)
    for before, after in zip(
        grads(alone_B.sum(), rewards_BC, mean_BC), grads(padded_B.sum(), wider[0], wider[1]), strict=True
    ):
        torch.testing.assert_close(after[:, :4], before, **TOLERANCE)
        assert (after[:, 4:] == 0).all()


def test_lipo_learns_from_ties() -> None:
    """At the start all rewards tie: ranks must not, or every weight would be 0."""
    rewards_BC, mask_BC = torch.zeros(1, 4, requires_grad=True), torch.ones(1, 4, dtype=torch.bool)
    (grad_BC,) = grads(losses.lipo(rewards_BC, rewards_BC, mask_BC).sum(), rewards_BC)
    assert float(grad_BC[0, 0]) < 0 and bool((grad_BC[0, 1:] > 0).all())


def test_ties_in_lipo_are_those_of_every_order() -> None:
    """Equal but for rounding: the chosen one stands last of them, and its negatives in any order, on average."""
    value = [0.0, 0.0, 1.0, 0.0, 1.0, -1.0]
    mean = 0.0
    orders = [(1, 3), (3, 1)], [(2, 4), (4, 2)]
    for low, high in itertools.product(*orders):
        ranked = [*high, *low, 0, 5]
        discount = [1 / math.log2(2 + ranked.index(index)) for index in range(6)]
        terms = [abs(discount[0] - discount[i]) * math.log1p(math.exp(value[i])) for i in range(1, 6)]
        mean += sum(terms) / 4
    for rounding in (0.0, 1e-6, -1e-6):
        rewards_BC = torch.tensor([value], dtype=torch.float64) + rounding * torch.arange(6)
        loss_B = losses.lipo(rewards_BC, rewards_BC, torch.ones(1, 6, dtype=torch.bool))
        assert loss_B.tolist() == pytest.approx([mean], abs=1e-4)


@pytest.mark.parametrize("name", ["pl", "dpo", "dmpo", "pairwise"])
@pytest.mark.parametrize("gap", [300.0, -300.0])
def test_large_rewards_stay_finite(name: str, gap: float) -> None:
    """exp(300) overflows float32: the written formula would be inf or nan, a stable one is 0 or the gap."""
    rewards_BC = torch.tensor([[gap, 0.0]], requires_grad=True)
    loss = getattr(losses, name)(rewards_BC, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).sum()
    assert float(loss.detach()) == pytest.approx(max(-gap, 0.0))
    assert torch.isfinite(grads(loss, rewards_BC)[0]).all()


def test_dpo_refuses_several_negatives() -> None:
    with pytest.raises(UserError, match="k=1"):
        losses.dpo(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("name", ["pl", "dpo", "dmpo", "pairwise"])
@pytest.mark.parametrize("margin", [1.0, 16.0, 20.0, 40.0, 80.0])
def test_gradients_in_float32_are_exact_far_ahead(name: str, margin: float) -> None:
    """1 - softmax rounds to 0 beyond a margin of 16 in float32; the gradient, exp(-margin), does not."""
    rewards_BC = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = getattr(losses, name)(rewards_BC, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).sum()
    expected = 1 / (1 + math.exp(margin))
    assert grads(loss, rewards_BC)[0][0].tolist() == pytest.approx([-expected, expected], rel=1e-5, abs=0.0)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5, abs=0.0)
