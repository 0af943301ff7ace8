"""The training loop: picks are refreshed when asked, and numbers that go wrong are told."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from massdpo.errors import UserError
from massdpo.runs import pipeline
from massdpo.store import is_whole
from massdpo.tensors import Batch
from massdpo.training import loop, losses, objectives
from massdpo.training.objectives import Preference
from tests.test_experiment import cache, metrics, places, steps, train  # noqa: F401  fixtures too

CHANGE = "chosen_mean_logp_change"

# Refresh --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["step", "epoch", "once"])
def test_picks_are_selected_when_refresh_says(
    refresh: str,
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random picks, whose noise is keyed by the epoch, and hardest picks, which follow the policy."""
    seen: list[Tensor] = []
    validate = Preference.validate

    def spy(objective: Preference, scorer: nn.Module) -> dict[str, float]:
        seen.append(objective.state["index_SK"].clone())
        return validate(objective, scorer)

    monkeypatch.setattr(Preference, "validate", spy)
    for selector in ("random", "hardest"):
        seen.clear()
        train(*places, f"selector={selector}", f"refresh={refresh}", "trainer.preference.epochs=3")
        assert len(seen) == 3  # at each epoch's end
        assert all(len(set(row)) == 4 and max(row) < 20 for picks in seen for row in picks.tolist())
        changed = [not torch.equal(before, after) for before, after in pairwise(seen)]
        assert changed == [refresh != "once"] * 2, selector


def test_once_and_epoch_agree_in_the_first_epoch(places: list[str]) -> None:  # noqa: F811
    """Before anything is learned both select with the same policy; so does `step` in its first step only."""
    first = [train(*places, f"refresh={refresh}") for refresh in ("once", "epoch")]
    numbers = [{k: v for k, v in metrics(run).items() if k in ("margin", "accuracy", "mrr")} for run in first]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("refresh", ["epoch", "once"])
def test_uniform_draws_need_no_correction_also_where_they_were_made_before(refresh: str, places: list[str]) -> None:  # noqa: F811
    """`is_pl` of random picks is `pl`; and the plan's steps, whose picks nobody drew, do not stop it."""
    runs = [
        train(*places, "selector=random", f"loss={loss}", f"refresh={refresh}", "verbosity=normal")
        for loss in ("pl", "is_pl")
    ]
    numbers = [[metrics(run)[name] for name in ("margin", "accuracy", "mrr", "chosen_logp_change")] for run in runs]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


# Loop -----------------------------------------------------------------------------------------------------------------


def test_two_small_batches_are_one_large(places: list[str]) -> None:  # noqa: F811
    """accumulate=2 at half the batch size takes the same steps; float32 sums in another order differ slightly."""
    sizes = [("trainer.batch_size=16", "trainer.accumulate=1"), ("trainer.batch_size=8", "trainer.accumulate=2")]
    found = []
    for size, accumulate in sizes:
        folder = train(*places, size, accumulate, "selector=full")
        found.append([metrics(folder)[name] for name in ("margin", "chosen_logp_change", "val/margin")])
    assert found[0] == pytest.approx(found[1], rel=2e-3, abs=2e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_examples(
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    logger: str,
) -> None:
    """The fifth micro-batch is the first of step 3; one of its prompts is bad, and the message names that one alone."""
    seen: list[str] = []
    loss = Preference.loss

    def breaks(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
        return rewards_BC.sum(-1) * torch.tensor([1.0] * 5 + [float("nan") if len(seen) == 5 else 1.0, 1.0, 1.0])

    def spy(objective: Preference, scorer: nn.Module, batch: Batch, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(batch.ids[5])
        return loss(objective, scorer, batch, *rest)

    monkeypatch.setattr(losses, "pl", breaks)
    monkeypatch.setattr(Preference, "loss", spy)
    with pytest.raises(UserError) as caught:
        train(*places, "name=broken", "trainer.batch_size=8", "trainer.accumulate=2", logger)
    assert f"the loss is not finite at step 3 of preference (examples {seen[4]}): lower" in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_step_and_examples(
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    logger: str,
) -> None:
    """The loss is 0 and its gradient is not: sqrt at 0. The checkpoint before that step stays, and is gone on from."""
    calls = []

    def breaks(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
        calls.append(1)
        return (rewards_BC[:, 0] * 0).abs().sqrt() if len(calls) == 3 else rewards_BC.sum(-1)

    monkeypatch.setattr(losses, "pl", breaks)
    examples = r"\(examples (train/\d+, ){15}train/\d+\)"  # all 16 of the step: no one knows which it was
    options = ["name=broken", "trainer.checkpoint_every=1", logger]
    with pytest.raises(UserError, match=rf"the gradient is not finite at step 3 of preference {examples}"):
        train(*places, *options)
    runs = Path(places[0].removeprefix("runs_dir="))
    (checkpoint,) = (runs / "single" / "broken" / "checkpoints").iterdir()
    assert checkpoint.name.endswith("2")
    assert is_whole(checkpoint)


def test_log_probs_that_are_not_finite_are_told_with_the_step(
    places: list[str],  # noqa: F811
    logger: str,
) -> None:
    """A learning rate that throws the weights out of float32's range."""
    with pytest.raises(UserError, match=r"step \d+ of preference: log-probabilities that are not finite .*\(train/\d+"):
        train(*places, "trainer.preference.learning_rate=1e38", "name=thrown", logger)


def test_runaway_rewards_and_collapsing_log_probs_are_told_once_each(
    places: list[str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    wild = ["beta=50", "trainer.preference.learning_rate=0.3", "trainer.preference.epochs=2"]
    folder = train(*places, *wild)
    said = capsys.readouterr().err
    assert said.count("rewards run away") == said.count("log-probs collapse") == 1
    rows = [row for row in json.loads(steps(folder)) if row["stage"] == "preference" and row["loss"]]
    limits = {
        "rewards run away": ("rejected_reward", -objectives.RUNAWAY),
        "log-probs collapse": (CHANGE, -objectives.COLLAPSE),
    }
    for kind, (column, limit) in limits.items():
        first = next(int(row["step"]) for row in rows if float(row[column]) < limit)
        assert re.search(rf"warning: preference, step {first}: .*{kind}", said), column
    train(*places)
    assert "warning: preference, step" not in capsys.readouterr().err


def test_alarms_are_for_numbers_beyond_their_limits_only() -> None:
    quiet = {"chosen_reward": 15.9, "rejected_reward": -15.9, "chosen_mean_logp_change": -0.99}
    assert Preference.alarms(quiet) == {}
    assert list(Preference.alarms(quiet | {"chosen_reward": -16.1})) == ["rewards"]
    assert "+16.1" in Preference.alarms(quiet | {"rejected_reward": 16.1})["rewards"]
    assert list(Preference.alarms(quiet | {"chosen_mean_logp_change": -1.01})) == ["chosen"]


def test_keep_best_ends_with_the_best_epochs_policy(
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes out of the loop is validated once more, beside what was logged after each epoch."""
    ended: dict[str, float] = {}

    def fit(stage: loop.Stage, *rest: Any) -> Any:
        scorer, position = loop.fit(stage, *rest)
        ended[stage.name] = stage.objective.validate(scorer)["mrr"]
        return scorer, position

    monkeypatch.setattr(pipeline, "fit", fit)
    rate = "trainer.preference.learning_rate=0.01"  # far too high: the policy gets worse
    options = ["trainer.preference.epochs=4", "trainer.keep_metric=mrr", "trainer.keep=best", rate]
    rows = json.loads(steps(train(*places, *options)))
    values = [float(row["val/mrr"]) for row in rows if row["stage"] == "preference" and row["val/mrr"]]
    assert len(values) == 4
    assert values[-1] < max(values)  # else the test could not tell best from last
    assert ended["preference"] == max(values)


def test_patience_ends_a_stage_whose_validation_gets_no_better(
    places: list[str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the first run of 2 epochs without a gain, as read off a run that goes on; stopped and resumed, the same."""
    options = ["trainer.preference.epochs=6", "trainer.keep_metric=mrr", "trainer.preference.learning_rate=0.01"]

    def values(folder: Path) -> list[float]:
        rows = json.loads(steps(folder))
        return [float(row["val/mrr"]) for row in rows if row["stage"] == "preference" and row["val/mrr"]]

    whole = values(train(*places, *options))
    gained = [epoch for epoch in range(6) if whole[epoch] > max(whole[:epoch], default=0)]
    end = next(epoch for epoch in range(6) if not {epoch, epoch - 1} & set(gained))
    assert end < 5  # else the test could not tell patience from the end
    capsys.readouterr()
    assert values(train(*places, *options, "trainer.patience=2")) == whole[: end + 1]
    assert f"preference: ended after epoch {end + 1}, without gain in the last 2" in capsys.readouterr().out

    count, validate = [0], Preference.validate

    def killed(objective: Preference, scorer: nn.Module) -> dict[str, float]:
        count[0] += 1
        if count[0] == end + 1:
            raise KeyboardInterrupt
        return validate(objective, scorer)

    monkeypatch.setattr(Preference, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*places, *options, "trainer.patience=2", "name=again")
    assert values(train(*places, *options, "trainer.patience=2", "name=again")) == whole[: end + 1]
