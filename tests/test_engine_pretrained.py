"""The engine on real weights: packed, two-phase and repeated agree where attention has learned to look far back."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel

from massdpo.model import packing
from massdpo.model.load import PackagedModel
from massdpo.model.scoring import PreferenceScorer
from massdpo.store import Cache
from tests.conftest import ROOT, needs_real_models
from tests.test_scoring import gradient_of, make_batch, pick_all, pl_loss


@pytest.fixture(scope="module", params=["smollm2_135m_q4", "gemma3_270m_q4"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    node = OmegaConf.load(ROOT / "conf" / "model" / f"{request.param}.yaml")
    return PackagedModel(node.packages, node.terms).load([], 0, Cache(tmp_path_factory.mktemp("cache")))[0].eval()


@needs_real_models
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_ways_agree(pretrained: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt beyond Gemma's window of 512, so that its responses have lost sight of the prompt's start."""
    monkeypatch.setattr(packing, "SHORT_TOKENS", 0)
    prompt = 530 if pretrained.config.model_type == "gemma3_text" else 150
    batch = make_batch([prompt, 40], [[9, 4], [1, 12]], vocabulary=pretrained.config.vocab_size)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for way, select, tokens in (
        ("repeated", None, 1024),
        ("packed", None, 1024),
        ("two-phase", pick_all, 1024),
        ("some at a time", pick_all, 12),
    ):
        monkeypatch.setattr(packing, "ROW_TOKENS", tokens)
        layout = "repeated" if way == "repeated" else "packed"
        scores = PreferenceScorer(pretrained, "mean", layout)(batch, select).scores
        found[way] = scores.logp_BC.detach(), gradient_of(pretrained, pl_loss(scores.logp_BC, scores.mask_BC))
    expected_BC, expected = found.pop("repeated")
    assert torch.isfinite(expected).all() and expected.norm() > 0
    for way, (logp_BC, gradient) in found.items():
        assert (logp_BC - expected_BC).abs().max() <= 1e-5 * expected_BC.abs().max(), way
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), way
