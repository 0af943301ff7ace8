"""The engine, selection and a whole run on a card against the CPU: `make gpu`. DEVICE=cpu tries them without one."""

import json
import math
import os
import subprocess
import sys
import time
import warnings
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from massdpo.model import flex
from tests.conftest import ROOT
from tests.test_engine_families import FAMILIES
from tests.test_scoring import LLAMA, RAGGED, assert_all_ways_agree, make_batch, plain_logp, tiny
from tests.test_selectors import EVERY, make_pool

DEVICE = os.environ.get("DEVICE", "cuda")
on_a_card = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here")


def moved(value: Any) -> Any:
    """The same with every tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name)) for field in fields(value)})
    return value


@on_a_card
def test_all_ways_agree_there_and_with_the_cpu() -> None:
    model = tiny(LLAMA)
    with torch.no_grad():
        expected_BC = plain_logp(model, RAGGED)
        found_BC = plain_logp(model.to(DEVICE), RAGGED.to(DEVICE)).cpu()
    assert (found_BC - expected_BC).abs().max() < 1e-4
    assert_all_ways_agree(model, RAGGED.to(DEVICE), 1e-4)


@on_a_card
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_all_ways_agree_by_flex_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows of several tiles, under a cap on scores and windows; gradients are compared."""
    monkeypatch.setattr(flex, "LONG", 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlexAttention is not used")
        batch = make_batch([1300, 700], [[90, 200, 40], [129, 60]])
        assert_all_ways_agree(tiny(FAMILIES[family]).to(DEVICE), batch.to(DEVICE), 1e-3)


@on_a_card
@pytest.mark.parametrize("kind", EVERY)
def test_picks_are_those_of_the_cpu(kind: type) -> None:
    pool = make_pool()
    there, here = kind(k=3)(moved(pool)), kind(k=3)(pool)
    assert there.index_BK.device.type == DEVICE
    assert there.index_BK.tolist() == here.index_BK.tolist()


@on_a_card
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run(tmp_path: Path, precision: str) -> None:
    options = [f"trainer.device={DEVICE}", f"trainer.precision={precision}", f"runs_dir={tmp_path}", "logger=none"]
    few = ["dataset.limit_train=64", "dataset.limit_test=32", "trainer.sft.epochs=1", "trainer.preference.epochs=1"]
    environment = os.environ | {"MASSDPO_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "run.py", *options, *few], cwd=ROOT, env=environment, check=True)
    (written,) = tmp_path.glob("single/*/metrics.json")
    metrics = json.loads(written.read_text())
    assert math.isfinite(metrics["margin"]) and 0 < metrics["accuracy"] <= 1


@pytest.mark.slow
def test_the_script_keeps_what_it_finished_within_its_minutes(tmp_path: Path) -> None:
    """On the CPU, with the tiny model, in two minutes: some runs, their rows, and no process left."""
    few = "dataset.limit_train=48 dataset.limit_test=16 trainer.sft.epochs=1 trainer.preference.epochs=1"
    options = {
        "ARGS": f"setting=mini/synthetic_mcqa method=sdpo,mass seed=0 {few}",
        "DEVICE": "cpu",
        "JOBS": "1",
        "MASSDPO_CACHE": str(tmp_path / "cache"),
        "MINUTES": "2",
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "RESULTS": str(tmp_path / "results"),
        "RUNS": str(tmp_path / "runs"),
    }
    started = time.monotonic()
    done = subprocess.run([ROOT / "sweeps" / "gpu.sh"], env=os.environ | options, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 150
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert rows["status"].tolist() == ["finished"] * 2 and set(rows["label"]) == {"sdpo", "mass"}, done.stdout
