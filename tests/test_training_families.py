"""Two preference steps of selectors and losses on every family of models."""

import copy

import pytest
import torch
from torch import Tensor

from massdpo.data.batches import collate
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.logps import SplitLogps
from massdpo.model.scoring import PreferenceScorer
from massdpo.selection import Coreset, Dynamic, Herding, Mass, Medoids, Sampled, Selector, TopRandom
from massdpo.training.losses import is_pl, lipo, ndcg, pl
from massdpo.training.objectives import Loss, Preference
from tests.test_engine_families import ALONE, FAMILIES
from tests.test_scoring import VOCABULARY, tiny

KINDS: dict[str, tuple[Selector, Loss]] = {
    "coreset": (Coreset(2), pl),
    "medoids": (Medoids(2), pl),
    "herding": (Herding(2), pl),
    "top_random": (TopRandom(2, top=3), pl),
    "lipo": (Mass(2), lipo),
    "ndcg": (Mass(2), ndcg),
    "is_pl": (Sampled(2), is_pl),
    "dynamic": (Dynamic(2, beta_margin=6.0), pl),
}


@pytest.mark.parametrize("family", [*FAMILIES, *ALONE])
def test_two_steps_raise_the_chosen_above_the_rejected(family: str) -> None:
    """The first step's loss is that of equal rewards; after two, the margin over the whole pool is above 0."""
    draw = torch.Generator().manual_seed(1)  # under 0 a token of gpt_oss lies between two experts
    numbers = torch.randint(3, VOCABULARY, (4, 6, 4), generator=draw).tolist()
    rows = [TokenizedExample(str(row), prompt, responses) for row, (prompt, *responses) in enumerate(numbers)]
    batch = collate(list(enumerate(rows)), 0)
    model = tiny((FAMILIES | ALONE)[family])
    weights = copy.deepcopy(model.state_dict())
    scorer = PreferenceScorer(model, "mean", "repeated" if family in ALONE else "packed")
    with torch.no_grad():
        start = scorer(batch).scores
    reference = {"train": SplitLogps(start.logp_BC, start.length_BC)}
    for name, (selector, compare) in KINDS.items():
        model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # small: no router changes its mind
        objective = Preference(selector, compare, 1.0, "step", 0, rows, rows, reference, score_split=None)  # type: ignore[arg-type]
        losses, counts = list[Tensor](), list[Tensor]()
        for _ in range(2):
            loss_B, logs = objective.loss(scorer, batch, 0, observe=True)
            loss_B.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_B.detach())
            counts.append(logs["k_effective"])
            assert counts[-1].tolist() == [2.0] * 4 or name == "dynamic"  # whose set may be smaller
        tied_BC = torch.zeros(4, 3)
        mask_BC = torch.arange(3) <= counts[0][:, None]
        given = {"log_inclusion_BK": tied_BC[:, 1:]} if compare is is_pl else {}
        torch.testing.assert_close(losses[0], compare(tied_BC, tied_BC, mask_BC, **given), rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            rewards_BC = scorer(batch).scores.logp_BC - start.logp_BC
        assert float((rewards_BC[:, 0] - rewards_BC[:, 1:].mean(-1)).mean()) > 0, name
