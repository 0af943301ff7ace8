"""The benchmark compares like with like, and the engine keeps at least half of its advantage."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from massdpo.benchmark import engine, measure
from massdpo.benchmark.engine import AT_LEAST, AT_MOST, SIDES
from massdpo.benchmark.sides import CPU, build_batch, build_model, build_sides, everywhere, lean
from massdpo.model.scoring import PreferenceScorer

SMALL = replace(
    CPU, layers=2, width=32, inner=48, heads=2, key_value_heads=2, vocabulary=101, prompt=12, response=4,
    negatives=5, k=2, prompts=2,
)  # fmt: skip


def test_usual_ways_and_ours_give_the_same_log_probs() -> None:
    model, batch = build_model(SMALL), build_batch(SMALL)
    with torch.no_grad():
        ours_BC = PreferenceScorer(model, layout="packed")(batch).scores.logp_BC
        torch.testing.assert_close(everywhere(model, batch), ours_BC, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(lean(model, batch), ours_BC, rtol=1e-5, atol=1e-4)


def test_random_sides_have_the_same_gradient() -> None:
    model = build_model(SMALL)
    sides = build_sides(SMALL, model)
    assert list(sides) == list(SIDES)
    gradients = {}
    for side in ("random_everywhere", "random_lean", "random_packed"):
        sides[side]()
        gradients[side] = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    for gradient in gradients.values():
        assert (gradient - gradients["random_lean"]).norm() <= 1e-5 * gradients["random_lean"].norm()


def test_sides_alternate_and_may_time_themselves() -> None:
    order: list[str] = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 3.0}
    seconds = measure.alternate(sides, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert seconds["b"] == [3.0] * 3 and len(seconds["a"]) == 3 and max(seconds["a"]) < 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU's memory there")
def test_peak_memory_counts_what_is_gone_again() -> None:
    """400 MB that live only inside the step, in a process of its own; the peak of its parent's must not count."""
    torch.ones(300_000_000)
    assert 3.9e8 < measure.in_fresh_process(measure.peak_bytes, step_of_400_mb) < 4.8e8


def step_of_400_mb() -> None:
    torch.ones(100_000_000).sum()


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(engine, "GROWTH", {"negatives": (5, 6), "k": (1, 2), "prompt": (8, 12)})
    engine.run(tmp_path, SMALL, rounds=1)
    report = json.loads((tmp_path / "engine.json").read_text())
    for name in (*AT_LEAST, *AT_MOST):
        assert report[name] > 0
    assert set(report["seconds"]) == {*SIDES, "trl_pairs", "packed_pairs"} and set(report["peak_bytes"]) == set(SIDES)
    assert report["setting"] == asdict(SMALL) and report["commit"] and report["machine"]["torch"]
    assert len(report["growth"]) == 6
    for name in ("engine.md", "engine_growth.csv", "engine_growth.png", "engine_growth.svg"):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_of_the_goals() -> None:
    """A quarter of the benchmark's batch, so that the usual ways fit a small machine; medians of three rounds.

    Other work on the machine disturbs the short sides most. Where three rounds miss, those of nine are decisive.
    """
    setting = replace(CPU, prompts=2)
    sides = build_sides(setting, build_model(setting))
    memory = {
        side: measure.in_fresh_process(engine.memory_of, side, setting) for side in ("full_everywhere", "full_packed")
    }

    def missed(seconds: dict[str, list[float]]) -> dict[str, float]:
        found = engine.ratios(measure.medians(seconds), memory)
        low = {name: found[name] for name, goal in AT_LEAST.items() if name in found and found[name] < goal / 2}
        return low | {name: found[name] for name, goal in AT_MOST.items() if found[name] > goal * 2}

    seconds = measure.alternate(sides, rounds=3)
    if missed(seconds):
        more = measure.alternate(sides, rounds=6)
        seconds = {side: seconds[side] + more[side] for side in seconds}
    assert not missed(seconds)


@pytest.mark.slow
def test_half_of_the_goal_against_trl() -> None:
    pytest.importorskip("trl")
    seconds = measure.medians(engine.against_trl(CPU, rounds=2, steps=3))
    assert seconds["trl_pairs"] / seconds["packed_pairs"] >= AT_LEAST["trl_pairs_speedup"] / 2
