"""The plan of a run: it costs the run nothing, and what it says of steps, tokens, memory and time is what happens."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from massdpo import tasks
from massdpo.config import compose, instantiate
from massdpo.data.prepare import limited
from massdpo.evaluation.logps import SplitScorer
from massdpo.runs import launch, machine, pipeline, start
from massdpo.runs.plan import Plan, doubts, plan, what_is_kept
from massdpo.runs.timing import Timing
from massdpo.store import Cache
from massdpo.training import loop
from tests.test_experiment import TINY, cache, metrics, places, steps, timeless, train  # noqa: F401  fixtures too


def planned(config: DictConfig) -> tuple[Plan, nn.Module]:
    """The plan of a run that has no SFT start yet, and its policy."""
    accelerator = launch.start(config)
    data, model = start.load(config, Cache(Path(config.cache_dir)))
    score_split = SplitScorer(accelerator, config.trainer.eval_batch_size, data.pad_id)
    rows = limited(data.train, config.trainer.preference.limit, 0, "preference")
    policy = start.trainable(config, model)
    return plan(config, data, policy, rows, instantiate(config.selector), score_split, ()), policy


@pytest.mark.parametrize(
    "options", [(), ("refresh=epoch",), ("trainer.adapter={r: 2, alpha: 4, targets: all-linear, stages: one}",)]
)
def test_a_plan_changes_nothing_of_the_run(options: tuple[str, ...], places: list[str], tmp_path: Path) -> None:  # noqa: F811
    """To the last digit: the same weights and history as in a run that plans nothing."""
    kept = ["trainer.save_policy=true", "trainer.preference.epochs=2", *options]
    found = []
    for verbosity in ("quiet", "normal"):
        of_its_own = [*places, f"cache_dir={tmp_path / verbosity}", f"name={verbosity}", f"verbosity={verbosity}"]
        run = train(*of_its_own, *kept)
        weights = next((run / "policy").glob("*model.safetensors")).read_bytes()
        found.append((weights, steps(run), timeless(run), (run / "picks.jsonl").read_bytes()))
    assert found[0] == found[1]


def test_steps_that_are_timed_move_no_weight(places: list[str]) -> None:  # noqa: F811
    """Nor does a step whose gradients are not finite, which would carry NaN into every weight."""
    config = compose([*TINY, *places, "model.config.hidden_size=32"])
    accelerator = launch.start(config)
    data, model = start.load(config, Cache(Path(config.cache_dir)))
    score_split = SplitScorer(accelerator, 8, data.pad_id)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    chance = torch.get_rng_state()
    timing = Timing(config, model, instantiate(config.selector), score_split)
    timing.stage("sft", data.train, 1)
    timing.stage("preference", data.train, 1)
    broken = compose([*TINY, *places, "model.config.hidden_size=32", "beta=1e38"])
    Timing(broken, model, instantiate(config.selector), score_split).stage("preference", data.train, 1)
    assert torch.equal(chance, torch.get_rng_state())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None, name


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("trainer.batch_size=8", "trainer.accumulate=3", "selector=random", "trainer.preference.limit=30"),
        ("trainer.adapter={r: 2, alpha: 4, targets: all-linear, stages: one}", "selector=full"),
    ],
)
def test_steps_tokens_and_memory_are_those_of_the_run(
    options: tuple[str, ...],
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What AdamW, gradients and weights took when the run ended, to the byte but for AdamW's counts of steps."""
    config = compose([*TINY, *places, *options, "trainer.sft.epochs=2"])
    found, policy = planned(config)
    of_stage = {row["stage"]: row for row in found.stages}
    held: list[int] = []
    epoch = loop.Training.validate

    def spy(training: Any) -> None:
        weights = list(training.scorer.parameters())
        state = [value for values in training.optimizer.state.values() for value in values.values()]
        tensors = [*weights, *(value for value in state if value.numel() > 1 or value.dim()), *trained_by(weights)]
        held.append(sum(tensor.nbytes for tensor in tensors))
        epoch(training)

    monkeypatch.setattr(loop.Training, "validate", spy)
    run = pipeline.train(config)
    assert held[-1] == machine.training_bytes(policy, launch.start(config))
    history = json.loads(steps(run))
    for stage in ("sft", "preference"):
        assert of_stage[stage]["steps"] == max(int(row["step"]) for row in history if row["stage"] == stage)
    number, unit = of_stage["preference"]["tokens"].split()
    tokens = float(number) * {"k": 1e3, "M": 1e6}[unit]
    assert tokens == pytest.approx(metrics(run)["fed_tokens"], rel=0.1)


def trained_by(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their gradients, as large as they are."""
    return [weight for weight in weights if weight.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("model=tiny_llama", "dataset.num_train=400"),
        ("model=tiny_gemma", "selector=random", "trainer.accumulate=2", "dataset.num_train=400"),
        ("model=tiny_qwen", "refresh=epoch", "dataset=synthetic_rec", "dataset.num_train=300"),
    ],
)
def test_a_plans_time_is_what_a_run_takes(
    options: tuple[str, ...],
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In seconds of this process alone, as a busy machine makes others of them: within a factor of two.

    These stages take two seconds, of which what is done once per epoch and not planned is a part.
    """
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    sizes = [option for option in TINY if not option.startswith("dataset.")]
    config = compose([*sizes, *places, *options, "trainer.sft.epochs=2", "trainer.preference.epochs=2"])
    found, _ = planned(config)
    own = metrics(pipeline.train(config))
    for stage, seconds in (("sft", own["sft_seconds"]), ("preference", own["train_seconds"])):
        extra = 2 * found.seconds["reference val"]
        if stage == "preference" and len(options) == 3:  # pools that are scored for the log, at every step here
            extra += 2 * found.seconds["reference train"]
        assert 0.5 < (found.seconds[stage] - extra) / seconds < 2, stage
    reference = sum(seconds for name, seconds in found.seconds.items() if name.startswith("reference"))
    assert 0.5 < reference / own["reference_seconds"] < 2


# Doubts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["trainer.preference.epochs=9"], r"sft: 64 prompts, 16 at once, are 4 optimiser steps"),
        (
            ["trainer.sft.epochs=9", "trainer.preference.limit=40"],
            r"preference: 40 prompts, 16 at once, are 3 optimiser",
        ),
        (["trainer.sft.epochs=9", "trainer.preference.epochs=9"], r"32 test prompts: chance alone .* 0\.09"),
        (["dataset.num_negatives=3", "k=3"], r"no pool has more than k=3 negatives"),
        ([], None),
    ],
)
def test_what_cannot_work_is_told_before_it_is_tried(options: list[str], said: str | None, places: list[str]) -> None:  # noqa: F811
    enough = [] if said else ["trainer.sft.epochs=9", "trainer.preference.epochs=9", "dataset.num_test=50"]
    config = compose([*TINY, *places, *enough, *options])
    data = start.load(config, Cache(Path(config.cache_dir)))[0]
    rows = limited(data.train, config.trainer.preference.limit, 0, "preference")
    found = list(doubts(config, data, rows, processes=1))
    assert found == [] if said is None else any(re.search(said, line) for line in found), found


def test_rates_for_tiny_models_are_told_where_weights_are_pretrained(places: list[str]) -> None:  # noqa: F811
    config = compose([*TINY, *places])
    data = start.load(config, Cache(Path(config.cache_dir)))[0]
    real = compose(["model=pretrained", "model.path=there", "trainer.preference.learning_rate=1e-5"])
    found = [line for line in doubts(real, data, data.train, 1) if "learning_rate" in line]
    assert len(found) == 1 and found[0].startswith("trainer.sft.learning_rate=0.003 is for tiny models")
    for right in (["trainer=cpu_pretrained"], ["trainer=lora"], ["trainer=gpu"], ["trainer=paper"]):
        config = compose(["model=pretrained", "model.path=there", *right])
        assert not [line for line in doubts(config, data, data.train, 1) if "learning_rate" in line]


def test_task_plan_prints_the_plan_and_makes_no_run(
    places: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks.run(compose(["task=plan", *TINY, *places, f"cache_dir={tmp_path / 'cache'}"]))
    told = capsys.readouterr()
    assert re.search(r"│ preference +│ +64 │ 1 +│ 4 +│ [\d.]+ k +│ \d+ s", told.out), told.out
    assert "GB are free; all of it takes about" in told.out and "warning: sft: 64 prompts" in told.err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache" / "sft").exists()


def test_a_start_of_other_threads_is_told(
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = compose([*TINY, *places, "seed=7", "verbosity=normal"])
    train(*places, "seed=7", "name=one")
    data = start.load(config, Cache(Path(config.cache_dir)))[0]
    capsys.readouterr()
    accelerator = launch.start(config)
    assert what_is_kept(config, data, Cache(Path(config.cache_dir)), accelerator) == {"sft", "reference"}
    fewer = compose([*TINY, *places, "seed=7", "trainer.preference.limit=9"])  # has another reference
    assert what_is_kept(fewer, data, Cache(Path(config.cache_dir)), accelerator) == {"sft"}
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert not what_is_kept(config, data, Cache(Path(config.cache_dir)), accelerator)
    assert "computed with 1 threads" in (said := capsys.readouterr().err) and "anew with 3: trainer.threads=1" in said
