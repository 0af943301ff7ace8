"""The studies' arithmetic against other ways to the same numbers, and small runs of all four."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from massdpo.selection import Full, Mass, Random, Sampled
from massdpo.tasks.studies.features import features
from massdpo.tasks.studies.loglinear import LoglinearWorld, loglinear, maximum_likelihood
from massdpo.tasks.studies.optimality import optimality
from massdpo.tasks.studies.pools import clustered_pools, mass_design, value_of
from massdpo.tasks.studies.publish import with_interval
from massdpo.tasks.studies.refresh import MEASURED
from massdpo.tasks.studies.refresh import refresh as refresh_study
from massdpo.tensors import Batch


def assert_published(out: Path, name: str, rows: int) -> None:
    assert len(pd.read_csv(out / f"{name}.csv")) == rows
    assert (out / f"{name}.md").read_text().count("\n| ") > 2
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / f"{name}.svg").read_text()


def test_maximum_likelihood_is_stationary_under_autograd() -> None:
    noise = torch.Generator().manual_seed(0)
    features_BCD = torch.randn(40, 5, 3, generator=noise, dtype=torch.float64)
    separable_BCD = features_BCD.clone()
    separable_BCD[:, 0, 0] += 100.0  # no finite maximum without the prior
    for data_BCD in (features_BCD, separable_BCD):

        def loss(theta_D: torch.Tensor, data_BCD: torch.Tensor = data_BCD) -> torch.Tensor:
            picked_B = (data_BCD @ theta_D).log_softmax(-1)[:, 0]
            return -picked_B.sum() + 0.01 / 2 * theta_D.square().sum()

        gradient_D = torch.func.grad(loss)(maximum_likelihood(data_BCD))
        assert float(gradient_D.abs().max()) < 1e-5  # the loss is convex: stationary is optimal


def test_value_of_a_selection() -> None:
    pool = clustered_pools(4, 6, seed=1)
    gram_BNN, ridge_B = mass_design(pool)
    picks = Random(3)(pool)
    value_B = value_of(gram_BNN, ridge_B, picks)
    for row in range(4):
        members = picks.index_BK[row]
        inner_KK = gram_BNN[row][members][:, members] / ridge_B[row]
        assert float(value_B[row]) == pytest.approx(float(torch.logdet(torch.eye(3) + inner_KK)))


def test_intervals_against_scipy() -> None:
    values = [0.3, 0.5, 0.9, 0.1]
    frame = pd.DataFrame({"kind": ["a"] * 4 + ["b"] * 2, "x": [*values, 1.0, 1.0]})
    table = with_interval(frame, ["kind"], ["x"])
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert table["x"][0] == pytest.approx((low + high) / 2)
    assert table["x ±"][0] == pytest.approx((high - low) / 2)
    assert table["x ±"][1] == 0.0


def test_the_design_is_that_of_the_selector() -> None:
    """What the studies measure is what `selector=mass` maximises by default: same picks, same log-det."""
    pool = clustered_pools(20, 9, seed=2)
    gram_BNN, ridge_B = mass_design(pool)
    picks = Mass(3)(pool)
    torch.testing.assert_close(value_of(gram_BNN, ridge_B, picks).float(), picks.info["logdet"])


def test_optimality(tmp_path: Path) -> None:
    table = optimality(tmp_path, ks=(1, 2, 3), pools=(5, 7), ridges=(1.0, 0.1), prompts=30)
    assert_published(tmp_path, "optimality", rows=2 * 2 * 3 * 4)
    by = table.set_index(["ridge", "N", "k", "solver"])
    for case in itertools.product((1.0, 0.1), (5, 7), (1, 2, 3)):
        exact, greedy, swap, chance = (by.loc[*case, solver] for solver in ("exact", "greedy", "swap", "random"))
        assert 1 - 1 / math.e <= greedy["worst_ratio"] <= swap["worst_ratio"] + 1e-12 <= 1 + 1e-9
        assert greedy["certified_ratio"] <= greedy["true_ratio"] + 1e-12
        assert exact["true_ratio"] == exact["worst_ratio"] == exact["optimal_share"] == exact["certified_ratio"] == 1.0
        assert chance["logdet"] < greedy["logdet"] <= swap["logdet"] + 1e-12 <= exact["logdet"] + 1e-9
        assert math.isnan(chance["certified_ratio"])


def test_loglinear_world_is_what_it_says() -> None:
    """Maximum likelihood on the whole pools finds theta* again, and the errors have the unit they claim."""
    world = LoglinearWorld(4_000, 5, seed=0, strength=2.0)
    (theta_D,) = world.fits(Full(), rounds=[1])
    assert world.errors(world.theta_D) == {"max_error": 0.0, "mean_error": 0.0}
    assert world.errors(torch.zeros_like(theta_D)) == {"max_error": 1.0, "mean_error": 1.0}
    # 10 weights from 4,000 choices among 6: the standard error of a logit is near 5% of its scale.
    assert world.errors(theta_D)["mean_error"] < 0.15


def test_loglinear(tmp_path: Path) -> None:
    frame = loglinear(tmp_path, seeds=2, prompts=(30, 300), ks=(2, 4), middle=(30, 2), rounds=(1, 2), size=6)
    assert_published(tmp_path, "loglinear", rows=2 * 3 * 2 * 7)
    full = frame[frame["selector"] == "full"].groupby("prompts")["max_error"].mean()
    assert full[300] < full[30]
    # Under the uniform reference all scores tie, so hardest is random; a full pool never changes.
    once = frame[frame["rounds"] == 1].pivot(index=["prompts", "k", "seed"], columns="selector", values="max_error")
    assert (once["hardest"] == once["random"]).all()
    whole = frame[frame["selector"] == "full"].pivot(
        index=["prompts", "k", "seed"], columns="rounds", values="max_error"
    )
    assert (whole[1] - whole[2]).abs().max() < 1e-9
    error = frame.set_index(["rounds", "prompts", "k", "seed", "selector"])["max_error"]
    for row in frame.to_dict("records"):  # the difference is to random's error in the same world
        random = error[row["rounds"], row["prompts"], row["k"], row["seed"], "random"]
        assert row["max_error less random"] == row["max_error"] - random


def test_corrected_draws_find_the_truth_as_prompts_grow() -> None:
    """Sixteen times the prompts, a quarter of the error; that of the uncorrected fit stays."""
    errors: dict[bool, list[float]] = {}
    for corrected in (False, True):
        errors[corrected] = []
        for prompts in (500, 8_000):
            world = LoglinearWorld(prompts, 12, seed=1, strength=3.0)
            (theta_D,) = world.fits(Sampled(2), [4], corrected)
            errors[corrected].append(world.errors(theta_D)["mean_error"])
    assert errors[True][1] < min(0.04, 0.5 * errors[True][0]) < 0.3 < min(errors[False])


def test_features(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(2)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, attn_implementation="sdpa")

    def models(seed: int) -> Mapping[str, LlamaForCausalLM]:
        torch.manual_seed(seed)
        return {"before": LlamaForCausalLM(config), "after": LlamaForCausalLM(config)}

    batches = [
        Batch(
            ids=[f"{place}-{row}" for row in range(2)],
            index_B=torch.arange(2),
            prompt_ids_BP=torch.randint(1, 40, (2, 5), generator=noise),
            prompt_mask_BP=torch.ones(2, 5, dtype=torch.bool),
            response_ids_BCT=torch.randint(1, 40, (2, 7, 3), generator=noise),
            response_mask_BCT=torch.ones(2, 7, 3, dtype=torch.bool),
        )
        for place in range(2)
    ]
    frame = features(tmp_path, models, batches, beta=0.5, k=2, seeds=[0, 1], sketch=512)
    assert_published(tmp_path, "features", rows=2 * 2 * 2 * 5 * 4)
    gradient = frame[frame["features"] == "gradient"]
    assert (gradient["overlap"] == 1.0).all()
    assert (frame["logdet_share"] > 0).all() and (frame["logdet_share"] <= 1 + 1e-9).mean() > 0.95
    means = frame.groupby("features")["logdet_share"].mean()
    assert means["gradient"] > means["random"]


def test_refresh(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def run(refresh: str, seed: int) -> Mapping[str, float]:
        asked.append((refresh, seed))
        accuracy = 0.1 * seed + {"once": 0.0, "epoch": 0.2, "step": 0.5}[refresh]
        return dict.fromkeys(MEASURED, 1.0) | {"accuracy": accuracy, "not shown": 7.0}

    frame = refresh_study(tmp_path, run, seeds=[1, 2])
    assert list(frame) == ["refresh", "seed", *MEASURED]
    assert_published(tmp_path, "refresh", rows=6)
    assert asked == [(refresh, seed) for seed in (1, 2) for refresh in ("once", "epoch", "step")]
    assert frame.groupby("refresh")["accuracy"].mean().to_dict() == pytest.approx(
        {"once": 0.15, "epoch": 0.35, "step": 0.65}
    )
    page = (tmp_path / "refresh.md").read_text()
    # Seeds differ by 0.1, so each kind has an interval: t(0.975, 1) 0.1 / sqrt(2) / sqrt(2) = 0.635. Pairs do not.
    assert "| step | 0.650 ± 0.635 | 1.000 ± 0.000 |" in page
    assert "| once less step | -0.500 ± 0.000 | 0.000 ± 0.000 |" in page
