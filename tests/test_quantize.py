"""An adapter on frozen weights in 4 or 8 bits: trained, stopped, saved and loaded again; refused where it cannot be."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from massdpo import tasks
from massdpo.config import compose, run_name, validate
from massdpo.errors import UserError
from massdpo.model.load import PretrainedModel
from massdpo.model.quantize import bits_of, quantized
from massdpo.runs import pipeline
from massdpo.store import Cache
from massdpo.training import checkpoints
from tests.test_pretrained import RUN, data, home, splits, stand_in  # noqa: F401  fixtures

needs_bitsandbytes = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes, the extra `quantized`, is not installed"
)
LORA = ["model=qwen3_0_6b", "model.path=somewhere", "trainer=lora"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*LORA, "trainer.adapter.quantize=4bit", "trainer.adapter.stages=two"], r"use trainer\.adapter\.stages=one"),
        (["trainer=lora", "trainer.adapter.quantize=8bit"], "needs a model from the hub or a folder"),
        ([*LORA, "model.path=a.gguf", "trainer.adapter.quantize=8bit"], "needs a model from the hub or a folder"),
        ([*LORA, "trainer.adapter.quantize=8bit", "trainer.device=cpu"], "needs a GPU: on a CPU, training"),
        (
            [*LORA, "trainer.adapter.quantize=3bit"],
            r"^trainer.adapter.quantize='3bit' is not allowed: use 4bit \| 8bit",
        ),
        (["trainer.adapter.quantize=4bit"], r"the trainer chosen has no 'trainer.adapter.quantize': trainer=lora has"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(
    overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=said):
        validate(compose(overrides))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    validate(compose(LORA))
    with pytest.raises(
        UserError, match=r"^trainer.adapter.quantize=4bit needs bitsandbytes, .*\.\[quantized\]"
    ) as told:
        validate(compose([*LORA, "trainer.adapter.quantize=4bit"]))
    assert "\n" not in str(told.value)


def test_bits_make_another_run_and_their_absence_the_same_as_before() -> None:
    names = {run_name(compose([*LORA, f"trainer.adapter.quantize={bits}"])) for bits in ("null", "4bit", "8bit")}
    before = "trainer.adapter={r: 16, alpha: 32, targets: all-linear, stages: one}"
    options = [option for option in LORA if option != "trainer=lora"]
    older = compose([*options, "trainer=lora", "~trainer.adapter", f"+{before}"])
    assert len(names) == 3 and run_name(older) in names


@needs_bitsandbytes
def test_the_weights_are_those_that_bitsandbytes_gives_back(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    """The quantised model computes what a plain one does with its weights as they are dequantised."""
    from bitsandbytes.functional import dequantize_4bit

    model, _ = PretrainedModel("a/b", str(stand_in)).load([], 0, Cache(tmp_path))
    few = quantized(model, "4bit")
    assert bits_of(few) == "4bit" and bits_of(model) is None and few.name_or_path == str(stand_in)
    plain = copy.deepcopy(model)
    for name, weight in few.named_parameters():
        assert not weight.requires_grad
        if state := getattr(weight, "quant_state", None):
            plain.get_parameter(name).data = dequantize_4bit(weight.data, state)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(few(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert (few(ids).logits - model(ids).logits).abs().max() > 1e-3, "the bits are fewer"


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_from_start_to_policy(
    bits: str,
    stand_in: Path,  # noqa: F811
    data: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped twice and gone on with it is the same; what it wrote is loaded in the same bits, and not merged."""
    options = [
        *(*RUN, *data, f"model.path={stand_in}", "trainer.device=cpu", "trainer.precision=float32"),
        *("trainer.keep=best", "trainer.sft.epochs=2", f"trainer.adapter.quantize={bits}", "trainer.layout=packed"),
    ]

    def train(name: str) -> Path:
        places = [f"cache_dir={tmp_path / name}", f"runs_dir={tmp_path / 'runs'}", f"name={name}"]
        return pipeline.train(compose([*options, *places]))

    whole = train("whole")
    save, stops = checkpoints.save, [2, 1]

    def stopping(*given: Any) -> None:
        save(*given)
        if stops and not (stops.__setitem__(0, stops[0] - 1) or stops[0]):
            stops.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", stopping)
    for _ in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    again = train("stopped")
    weights = [load_file(run / "policy" / "adapter_model.safetensors") for run in (whole, again)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (whole / "policy" / "model.safetensors").exists()
    assert f"quantised to {bits} by bitsandbytes" in (whole / "policy" / "README.md").read_text()

    tasks.run(compose(["task=evaluate", *options, f"in={whole}", f"out={tmp_path / 'again.json'}"]))
    found, before = (json.loads(file.read_text()) for file in (tmp_path / "again.json", whole / "metrics.json"))
    assert {name: found[name] for name in ("accuracy", "mrr")} == {name: before[name] for name in ("accuracy", "mrr")}
    with pytest.raises(UserError, match=f"trained on weights in {bits}"):
        tasks.run(compose(["task=merge", f"policy={whole / 'policy'}", f"out={tmp_path / 'merged'}"]))
