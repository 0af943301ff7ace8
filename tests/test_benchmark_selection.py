"""The comparison itself: the published algorithm picks what its definition says, and the files appear whole."""

import csv
import json
from pathlib import Path

import pytest
import torch

from massdpo.benchmark import selection
from massdpo.benchmark.selection import compare, growth, problem, sherman_morrison, sherman_morrison_batched


def test_sherman_morrison_follows_its_definition() -> None:
    """argmax_i v_i^T H^-1 v_i with H inverted anew at every step."""
    vectors_BND, ridge = problem(batch=5, pool=8, size=6)
    vectors_BND = vectors_BND.double()
    picks_BK = sherman_morrison(vectors_BND, 3, ridge)
    for row in range(5):
        taken: list[int] = []
        for _ in range(3):
            information_DD = ridge * torch.eye(6, dtype=torch.float64)
            information_DD = information_DD + vectors_BND[row, taken].T @ vectors_BND[row, taken]
            gain_N = torch.einsum("nd,de,ne->n", vectors_BND[row], information_DD.inverse(), vectors_BND[row])
            gain_N[taken] = -1.0
            taken.append(int(gain_N.argmax()))
        assert picks_BK[row].tolist() == taken
    assert torch.equal(picks_BK, sherman_morrison_batched(vectors_BND, 3, ridge))


def test_both_ways_pick_the_same() -> None:
    result = compare(batch=4, pool=10, size=32, k=3, rounds=1)
    assert result["same_picks"] is True
    assert all(isinstance(value, (int, float, bool)) and value > 0 for value in result.values())


def test_run_writes_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "compare", lambda: compare(batch=4, pool=10, size=32, k=3, rounds=1))
    monkeypatch.setattr(selection, "growth", lambda batch: growth(2, (8, 16), (8, 16), (1, 2), rounds=1))
    selection.run(tmp_path)
    result = json.loads((tmp_path / "selection.json").read_text())
    assert {"same_picks", "speedup_vs_sherman_morrison", "exact_ms_per_prompt", "commit", "machine"} <= set(result)
    rows = list(csv.DictReader((tmp_path / "selection_growth.csv").open()))
    assert len(rows) == 2 * 6
    assert (tmp_path / "selection_growth.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "selection_growth.svg").read_text()
