"""The training loop: picks are refreshed when asked, and a run stopped at any moment ends with the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from massdpo import experiment, training
from massdpo.config import compose
from massdpo.errors import UserError
from tests.conftest import ROOT
from tests.test_experiment import TINY, cache, metrics, places, steps, timeless, train  # noqa: F401  fixtures too

LONG = [  # 96 optimiser steps of some 20 ms: long enough to be stopped in the middle
    *TINY,
    *("trainer.preference.epochs=6", "trainer.batch_size=4", "trainer.checkpoint_every=3"),
]


# Refresh --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["step", "epoch", "once"])
def test_picks_are_selected_when_refresh_says(
    refresh: str,
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random picks, whose noise is keyed by the epoch, and hardest picks, which follow the policy."""
    seen: list[Tensor] = []
    begin = training.Stage.__init__

    def spy(stage: training.Stage, *args: object, **kwargs: object) -> None:
        begin(stage, *args, **kwargs)  # type: ignore[arg-type]
        if stage.name == "preference":
            validate = stage.validate
            stage.validate = lambda scorer: (seen.append(stage.state["index_SK"].clone()), validate(scorer))[1]

    monkeypatch.setattr(training.Stage, "__init__", spy)
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


# Stopped and resumed --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:  # noqa: F811
    """The same run, never stopped."""
    return experiment.train(compose([*LONG, f"runs_dir={tmp_path_factory.mktemp('whole')}", f"cache_dir={cache}"]))


def stopped(arguments: list[str], runs: Path, number: signal.Signals, moment: random.Random) -> tuple[Path, int, str]:
    """Start `run.py`, send it a signal at a random moment of the preference stage: its folder, exit code, stderr."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 120
    while not list(runs.glob("single/*/checkpoints/[0-9]*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    time.sleep(moment.uniform(0, 0.6))
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    (folder,) = runs.glob("single/*")
    return folder, process.returncode, err


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM]
    + [pytest.param(signal.SIGKILL, marks=pytest.mark.slow, id=f"kill-{again}") for again in range(5)]
    + [pytest.param(signal.SIGINT, marks=pytest.mark.slow, id="ctrl-c")],
)
def test_a_stopped_run_ends_with_the_same_numbers(
    number: signal.Signals,
    whole: Path,
    tmp_path: Path,
    cache: Path,  # noqa: F811
) -> None:
    arguments = [*LONG, f"runs_dir={tmp_path}", f"cache_dir={cache}"]
    moment = random.Random()  # another moment in every test run: any must do; told when it does not
    seed = moment.randrange(2**32)
    folder, code, err = stopped(arguments, tmp_path, number, random.Random(seed))
    before = json.loads((folder / "status.json").read_text())
    assert not (folder / "metrics.json").exists(), "the run was over before the signal came: make LONG longer"
    if number == signal.SIGKILL:
        assert before["status"] == "running"
    else:
        assert code == 130
        assert before["status"] == "interrupted"
        assert "Traceback" not in err
    assert experiment.train(compose(arguments)) == folder
    assert timeless(folder) == timeless(whole), f"moment {seed}"
    assert steps(folder) == steps(whole), f"moment {seed}"
    assert (folder / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert not (folder / "checkpoints").exists()


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
) -> None:
    from massdpo import losses

    calls = []

    def breaks(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
        calls.append(1)
        return rewards_BC.sum(-1) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(losses, "pl", breaks)
    with pytest.raises(UserError, match=r"the loss is not finite at step 3 of preference \(examples .*train/\d+"):
        train(*places, "name=broken")


def test_keep_best_ends_with_the_best_epochs_policy(
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes out of the loop is validated once more, beside what was logged after each epoch."""
    ended: dict[str, float] = {}

    def fit(stage: training.Stage, *rest: Any) -> Any:
        scorer, position = training.fit(stage, *rest)
        ended[stage.name] = stage.validate(scorer)["mrr"]
        return scorer, position

    monkeypatch.setattr(experiment, "fit", fit)
    rate = "trainer.preference.learning_rate=0.01"  # far too high: the policy gets worse
    options = ["trainer.preference.epochs=4", "trainer.keep_metric=mrr", "trainer.keep=best", rate]
    rows = json.loads(steps(train(*places, *options)))
    values = [float(row["val/mrr"]) for row in rows if row["stage"] == "preference" and row["val/mrr"]]
    assert len(values) == 4
    assert values[-1] < max(values)  # else the test could not tell best from last
    assert ended["preference"] == max(values)
