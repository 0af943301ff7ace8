"""The presets of pretrained models compute in what the machine is fast in, and a slow choice is told."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from massdpo.config import compose, fast_precision
from massdpo.runs import start
from massdpo.runs.plan import doubts
from massdpo.store import Cache
from tests.test_experiment import TINY

PRESETS = ["cpu_pretrained", "lora"]


def on_cpu(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)


def seconds(dtype: torch.dtype) -> float:
    """The fastest of five products of the size that a small model's layers have."""
    left, right, found = torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype), []
    for _ in range(5):
        begun = time.perf_counter()
        left @ right
        found.append(time.perf_counter() - begun)
    return min(found)


def test_what_is_taken_on_this_cpu_is_not_the_slow_one() -> None:
    """By the clock: where the CPU lacks bfloat16, the ratio is 20 and more; where it has it, it is the faster one."""
    taken = {"bfloat16": torch.bfloat16, "float32": torch.float32}[fast_precision("cpu")]
    (other,) = {torch.bfloat16, torch.float32} - {taken}
    assert seconds(taken) < 4 * seconds(other)


@pytest.mark.parametrize("trainer", PRESETS)
@pytest.mark.parametrize(("fast", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_presets_take_what_the_cpu_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, trainer: str, fast: bool, precision: str
) -> None:
    on_cpu(monkeypatch, fast)
    assert compose([f"trainer={trainer}"]).trainer.precision == precision
    assert compose([f"trainer={trainer}", "trainer.precision=bfloat16"]).trainer.precision == "bfloat16"


@pytest.mark.parametrize(("fast", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_on_a_gpu_the_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str) -> None:
    on_cpu(monkeypatch, not fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert compose(["trainer=lora"]).trainer.precision == precision
    assert compose(["trainer=cpu_pretrained", "trainer.device=auto"]).trainer.precision == precision
    assert compose(["trainer=cpu_pretrained"]).trainer.precision != precision  # that stays on the CPU


@pytest.mark.parametrize(("fast", "told"), [(True, 0), (False, 1)])
def test_bfloat16_is_doubted_where_it_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, told: int
) -> None:
    on_cpu(monkeypatch, fast)
    config: Any = compose([*TINY, f"cache_dir={tmp_path}"])
    data = start.load(config, Cache(tmp_path))[0]
    for precision, expected in (("float32", 0), ("bfloat16", told)):
        config.trainer.precision = precision
        assert sum("no fast bfloat16" in line for line in doubts(config, data, data.rows, 1)) == expected
