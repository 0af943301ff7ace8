"""`selector.screen`: what is scored of a pool, what it costs in log-det, and that nothing else changes."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from massdpo.data.batches import collate
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.logps import SplitLogps
from massdpo.model.scoring import PreferenceScorer
from massdpo.selection import Mass
from massdpo.tasks.studies.pools import mass_design, value_of
from massdpo.tensors import Batch, Picks
from massdpo.training.losses import pl
from massdpo.training.objectives import Preference
from massdpo.training.remembered import Remembered
from tests.test_scoring import LLAMA, VOCABULARY, tiny


def rows_of(count: int, negatives: int, seed: int = 0) -> list[TokenizedExample]:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(3, VOCABULARY, (count, negatives + 2, 4), generator=draw).tolist()
    rows = [TokenizedExample(str(row), prompt, responses) for row, (prompt, *responses) in enumerate(numbers)]
    return [
        TokenizedExample(r.id, r.prompt_ids, r.response_ids[: len(r.response_ids) - at % 3])
        for at, r in enumerate(rows)
    ]


def objective_of(
    rows: list[TokenizedExample], batch: Batch, scorer: PreferenceScorer, screen: int | None
) -> Preference:
    with torch.no_grad():
        start = scorer(batch).scores
    reference = {"train": SplitLogps(start.logp_BC, start.length_BC)}
    return Preference(Mass(3), pl, 0.5, "step", 0, rows, rows, reference, None, screen)  # type: ignore[arg-type]


class Training:
    """A tiny policy that takes a step at a time on one batch."""

    def __init__(self, rows: list[TokenizedExample], screen: int | None, rate: float):
        self.batch = collate(list(enumerate(rows)), 0)
        self.scorer = PreferenceScorer(tiny(LLAMA), "mean")
        self.objective = objective_of(rows, self.batch, self.scorer, screen)
        self.optimizer = torch.optim.SGD(self.scorer.parameters(), lr=rate)

    def step(self, number: int, observe: bool = False) -> float:
        loss_B, _ = self.objective.loss(self.scorer, self.batch, number, observe=observe)
        loss_B.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss_B.mean().detach())


def test_the_shortlist_is_the_largest_last_rewards_then_the_likeliest() -> None:
    rows = rows_of(3, 6)
    batch = collate(list(enumerate(rows)), 0)
    remembered = Remembered(rows, 2, 3)
    ref_logp_BC = -torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) * batch.mask_BC
    remembered.state["advantage_SN"][1, :5] = torch.tensor([0.0, -2.0, 1.5, 0.0, 0.5])
    few = remembered.shortlist(batch, ref_logp_BC)
    assert few.column_BC is not None and few.response_ids_BCT.shape[1] == 4
    for row in range(3):
        last = remembered.state["advantage_SN"][row].tolist()
        real = [index for index in range(6) if batch.mask_BC[row, index + 1]]
        best = sorted(real, key=lambda index: (-last[index], -float(ref_logp_BC[row, index + 1])))[:3]
        assert few.column_BC[row].tolist() == [0, *(index + 1 for index in best)]
        assert torch.equal(few.response_ids_BCT[row], batch.response_ids_BCT[row, few.column_BC[row]])
    picks = few.whole(Picks(torch.tensor([[2, 0]] * 3), torch.tensor([[True, False]] * 3)))
    assert picks.index_BK.tolist() == [[int(few.column_BC[row, 3]) - 1, 0] for row in range(3)]


def test_a_shortlist_of_the_whole_pool_changes_nothing() -> None:
    """Losses and picks of some steps, to rounding; the candidates only come in another order."""
    found = []
    for screen in (None, 7):
        training = Training(rows_of(6, 7), screen, rate=0.1)
        losses = [training.step(number, observe=True) for number in range(4)]
        objective = training.objective
        objective._remembered.store(training.batch.index_B, objective._own[-1].picks)
        sets = [set(row.tolist()) for row in objective.state["index_SK"]]
        found.append((losses[1:], sets))
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)


@pytest.mark.parametrize(("screen", "least"), [(6, 0.9), (10, 0.95), (20, 1 - 1e-6)])
def test_what_a_shortlist_costs_in_log_det(screen: int, least: float) -> None:
    """Under the whole pool's design, in training: of what greedy reaches on the whole pool, the screened picks keep
    93% with 6 of 20 negatives scored and 97% with 10."""
    rows = rows_of(12, 22)
    rows = [TokenizedExample(row.id, row.prompt_ids, row.response_ids[:21]) for row in rows]
    training = Training(rows, screen, rate=0.3)
    batch, objective = training.batch, training.objective
    shares = []
    for number in range(24):
        with torch.no_grad():
            pool = objective._statistics(batch, training.scorer(batch).scores, number)
        training.step(number)
        gram_BNN, ridge_B = mass_design(pool)
        best_B, ours_B = (value_of(gram_BNN, ridge_B, picks) for picks in (Mass(3)(pool), objective._own[-1].picks))
        shares.append(float((ours_B / best_B).mean()))
        objective._remembered.saw(batch.index_B, *objective._own[-1].seen)
    assert sum(shares) / 24 > least


def test_a_step_with_selection_waits_for_the_device_six_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a tensor's value would make a GPU idle: two for the rows, one each for noise, checks and picks."""
    training = Training(rows_of(4, 6), None, rate=0.1)
    reads = 0

    def counted(self: torch.Tensor, *given: Any, read: Callable[..., Any]) -> Any:
        nonlocal reads
        reads += self.dim() > 0  # numbers come from single elements, which are counted below
        return read(self, *given)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
            nonlocal reads
            reads += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
            return function(*given, **(options or {}))

    for name in ("tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, partialmethod(counted, read=getattr(torch.Tensor, name)))
    with Counting():
        training.objective.loss(training.scorer, training.batch, 1, observe=False)
    assert 0 < reads <= 6
