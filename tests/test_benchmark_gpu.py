"""The card's benchmark, dry-run on the CPU at a toy size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from massdpo.benchmark import gpu
from massdpo.errors import UserError
from tests.test_benchmark_engine import SMALL


def test_a_wrong_engine_is_told_before_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(gpu, "BFLOAT16_ERROR", 0.0)
    with pytest.raises(UserError, match="packed log-probs are wrong"):
        gpu.run(tmp_path, replace(SMALL, dtype="bfloat16"), (12,), rounds=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    gpu.run(tmp_path, SMALL, prompts=(12, 20), rounds=1)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["prompt"] for row in report["rows"]] == [12, 20]
    assert report["rows"][0]["token_bound"] == pytest.approx(6 * 16 / (12 + 6 * 4))
    for row in report["rows"]:
        assert all(row[name] > 0 for name in gpu.NUMBERS) and all(row["share_of_matrix_rate"].values())
    assert report["error_per_token"]["float32"] < 1e-4
    assert "MASS over random k" in (tmp_path / "gpu.md").read_text()
