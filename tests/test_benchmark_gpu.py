"""The card's benchmark, dry-run on the CPU at a toy size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from massdpo.benchmark import gpu
from massdpo.benchmark.sides import Setting
from massdpo.errors import UserError
from tests.test_benchmark_engine import SMALL


def test_a_wrong_engine_is_told_before_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(gpu, "BFLOAT16_ERROR", 0.0)
    rough = replace(SMALL, dtype="bfloat16")
    with pytest.raises(UserError, match="packed log-probs are wrong"):
        gpu.run(tmp_path, {"short": rough, "long": rough}, rounds=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three settings, one of which does not fit."""
    pytest.importorskip("trl")
    sides = gpu.build_sides

    def too_large(setting: Setting, *arguments: Any, **options: Any) -> Any:
        if setting.prompt == 20:
            raise torch.OutOfMemoryError
        return sides(setting, *arguments, **options)

    monkeypatch.setattr(gpu, "build_sides", too_large)
    settings = {str(prompt): replace(SMALL, prompt=prompt) for prompt in (12, 16, 20)}
    gpu.run(tmp_path, settings, rounds=1)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [*report["rows"]] == ["12", "16"] and report["too_large"] == ["20"]
    assert report["rows"]["12"]["token_bound"] == pytest.approx(6 * 16 / (12 + 6 * 4))
    for row in report["rows"].values():
        assert all(row[name] > 0 for name in gpu.NUMBERS) and all(row["share_of_matrix_rate"].values())
    assert report["error_per_token"]["float32"] < 1e-4
    table = (tmp_path / "gpu.md").read_text()
    assert "MASS over random k" in table and "Too large for this GPU: 20." in table
    with pytest.raises(UserError, match="no setting"):
        gpu.run(tmp_path, {name: settings["20"] for name in ("first", "second")}, rounds=1)
