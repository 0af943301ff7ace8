"""The benchmark on real weights, dry-run at a toy size: like is compared with like, and every number is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from massdpo.benchmark import real
from massdpo.benchmark.sides import build_model
from tests.test_benchmark_engine import SMALL

TOY = replace(SMALL, dtype="bfloat16")


def test_both_sft_steps_have_the_same_gradient() -> None:
    """Every response is as long, so that the mean over tokens is the mean over prompts."""
    model = build_model(SMALL)
    sides = real.sides_of(model, SMALL)
    gradients = []
    for side in ("sft_plain", "sft"):
        sides[side]()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    real.run(tmp_path, model="", short=[TOY], long=[], rounds=1)
    report = json.loads((tmp_path / "real.json").read_text())
    (row,) = report["short"]
    assert set(row["seconds"]) == set(real.SIDES) and set(row["peak_bytes"]) == set(real.KEPT_IN_MEMORY)
    assert all(row[name] > 0 for name in (*real.AT_MOST, "full_over_mass", "pool_share_of_mass"))
    assert row["token_bound"] == pytest.approx(6 * 16 / (12 + 6 * 4))
    assert "MASS over random k" in (tmp_path / "real.md").read_text()
