"""What a run logs of its selection, against the picks that the selector was seen to make."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from massdpo.config import compose
from massdpo.runs import pipeline
from massdpo.selection import Hardest, Mass
from massdpo.tensors import Picks, PoolStatistics

TINY = [
    *("dataset.num_train=40", "dataset.num_val=8", "dataset.num_test=8", "dataset.num_negatives=8", "k=3"),
    *("model.config.hidden_size=16", "model.config.intermediate_size=16", "model.config.num_hidden_layers=1"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=3", "trainer.log_every=1", "trainer.threads=1"),
    *("trainer.batch_size=8", "logger=none", "trainer.save_policy=false", "verbosity=quiet"),
]
EPOCHS, STEPS = 3, 5  # 40 prompts, 8 a step
Seen = list[dict[str, tuple[set[int], set[int]]]]  # a call: each prompt's picks, and those that `hardest` would make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    calls: Seen = []
    select: Callable[[Mass, PoolStatistics], Picks] = Mass.__call__

    def note(self: Mass, pool: PoolStatistics) -> Picks:
        picks, hardest = select(self, pool), Hardest(3)(pool)
        pairs = zip(picks.index_BK.tolist(), hardest.index_BK.tolist(), strict=True)
        calls.append({name: (set(ours), set(top)) for name, (ours, top) in zip(pool.ids, pairs, strict=True)})
        return picks

    monkeypatch.setattr(Mass, "__call__", note)
    return calls


def train(refresh: str, home: Path, *more: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The rows of the preference stage with something of the selection in them, and the last row of a step."""
    options = [f"refresh={refresh}", f"cache_dir={home}", f"runs_dir={home / 'runs'}"]
    folder = pipeline.train(compose([*TINY, *options, *more]))
    rows = [row for row in csv.DictReader((folder / "history.csv").open()) if row["stage"] == "preference"]
    return [row for row in rows if row["selection/hardest_overlap"]], [row for row in rows if row["loss"]][-1]


def test_certificates_of_a_whole_split_are_made_as_often_as_steps_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five batches of eight prompts; the logged mean is that of the batches that were looked at."""
    found: list[Tensor | None] = []
    select: Callable[[Mass, PoolStatistics], Picks] = Mass.__call__

    def note(self: Mass, pool: PoolStatistics) -> Picks:
        picks = select(self, pool)
        found.append(picks.info.get("certified_ratio"))
        return picks

    monkeypatch.setattr(Mass, "__call__", note)
    every = ["trainer.log_every=3", "trainer.eval_batch_size=8", "trainer.preference.epochs=1"]
    (row, *_), _ = train("epoch", tmp_path, *every)
    assert [ratio_B is not None for ratio_B in found] == [True, False, False, True, False]
    expected = float(torch.cat([ratio_B for ratio_B in found if ratio_B is not None]).mean())
    assert float(row["selection/certified_ratio"]) == pytest.approx(expected, abs=1e-6)


def jaccard(pairs: list[tuple[set[int], set[int]]]) -> float:
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


def joined(calls: Seen) -> dict[str, tuple[set[int], set[int]]]:
    return {name: picks for call in calls for name, picks in call.items()}


def test_a_selection_at_every_step_is_logged_there(seen: Seen, tmp_path: Path) -> None:
    rows, last = train("step", tmp_path)
    assert len(rows) == len(seen) == EPOCHS * STEPS
    for step, (row, call) in enumerate(zip(rows, seen, strict=True)):
        assert float(row["selection/hardest_overlap"]) == pytest.approx(jaccard(list(call.values())), abs=1e-6)
        assert 0 < float(row["selection/certified_ratio"]) <= 1
        if step < STEPS:  # nothing to compare with yet
            assert row["selection/same_as_before"] == ""
        else:
            before = joined(seen[: step // STEPS * STEPS][-STEPS:])
            pairs = [(before[name][0], picks) for name, (picks, _) in call.items()]
            assert float(row["selection/same_as_before"]) == pytest.approx(jaccard(pairs), abs=1e-6)
    seconds = [float(row["select_seconds"]) for row in rows]
    assert 0 < seconds[0] < seconds[-1] and seconds == sorted(seconds)
    assert float(last["select_share"]) < 1


@pytest.mark.parametrize("refresh", ["epoch", "once"])
def test_a_selection_of_the_whole_split_has_a_row_of_its_own(seen: Seen, tmp_path: Path, refresh: str) -> None:
    rows, last = train(refresh, tmp_path)
    refreshed = [row for row in rows if not row["loss"]]
    assert [row["epoch"] for row in refreshed] == (["0", "1", "2"] if refresh == "epoch" else ["0"])
    batches = len(seen) // len(refreshed)
    passes = [joined(seen[place * batches : (place + 1) * batches]) for place in range(len(refreshed))]
    for place, (row, picks) in enumerate(zip(refreshed, passes, strict=True)):
        assert len(picks) == 40
        assert float(row["selection/hardest_overlap"]) == pytest.approx(jaccard(list(picks.values())), abs=1e-6)
        assert 0 < float(row["selection/certified_ratio"]) <= 1
        if place:
            pairs = [(passes[place - 1][name][0], ours) for name, (ours, _) in picks.items()]
            assert float(row["selection/same_as_before"]) == pytest.approx(jaccard(pairs), abs=1e-6)
        else:
            assert row.get("selection/same_as_before", "") == ""
    assert float(last["select_seconds"]) > 0
