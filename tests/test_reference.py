"""The stored reference: the policy's own in any precision and batch size, and never another policy's."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from massdpo.config import compose
from massdpo.data.batches import by_length
from massdpo.data.tokens import TokenizedExample
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitScorer, check_reference
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch, pipeline, start
from massdpo.store import Cache
from tests.test_models import load_tiny

SIZES = (8, 16, 64)


def long_rows(count: int = 20) -> list[TokenizedExample]:
    """Prompts of unequal length with five responses of about 80 tokens, what 60 words make."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    return [
        TokenizedExample(f"train/{row}", ids(5 + row * 7 % 23), [ids(76 + row * place % 9) for place in range(1, 6)])
        for row in range(count)
    ]


def rounded(precision: str) -> Accelerator:
    return launch.start(compose([f"trainer.precision={precision}", "trainer.threads=1"]))


@pytest.fixture
def sharp(tmp_path: Path) -> PreferenceScorer:
    """A model with weights of the size of trained ones: logits that spread, and so round, as a real model's."""
    model, _ = load_tiny("llama", tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
    return PreferenceScorer(model).eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_reference_is_its_policys_own_in_any_batches_and_no_others(precision: str, sharp: PreferenceScorer) -> None:
    """The same batches: to the last digit. Weights that moved by a little: refused."""
    rows, accelerator, dtype = long_rows(), rounded(precision), getattr(torch, precision)
    stored = {size: SplitScorer(accelerator, size, 0)(sharp, rows, "") for size in SIZES}
    assert not torch.equal(stored[8].logp_SC, stored[64].logp_SC), "batches of another shape round otherwise"
    own = {name: weight.clone() for name, weight in sharp.state_dict().items()}
    for size in SIZES:
        first = by_length(rows, size)[0]
        some = [rows[row] for row in first]
        now = SplitScorer(accelerator, size, 0)(sharp, some, "")
        assert torch.equal(now.logp_SC, stored[size].logp_SC[first])
        for other in SIZES:  # what rounding explains passes: another machine's
            check_reference(now, stored[other].logp_SC[first], dtype)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in sharp.parameters():
                weight.mul_(1 + {"float32": 1e-5, "bfloat16": 0.1}[precision] * torch.randn_like(weight))
        moved = SplitScorer(accelerator, size, 0)(sharp, some, "")
        with pytest.raises(UserError, match="stored reference log-probs do not belong to this policy"):
            check_reference(moved, stored[size].logp_SC[first], dtype)
        sharp.load_state_dict(own)
    with pytest.raises(UserError, match="do not belong"):
        check_reference(now, torch.full_like(now.logp_SC, torch.nan), dtype)


def test_what_a_cache_keeps_under_a_wrong_key_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the run's own way to its reference: the same policy in batches of any size, then swapped weights."""
    sizes = ["dataset.num_train=24", "dataset.num_val=4", "dataset.num_test=4", "trainer.threads=1"]
    cache = Cache(tmp_path)

    def composed(size: int) -> DictConfig:
        return compose([*sizes, "trainer.precision=bfloat16", f"trainer.eval_batch_size={size}"])

    accelerator = launch.start(composed(8))
    data, model = start.load(composed(8), cache)
    scorer = PreferenceScorer(model)

    def reference(size: int) -> Any:
        config = composed(size)
        score_split = SplitScorer(accelerator, size, data.pad_id)
        key = start.start_key(config, data.key, data.model_key, accelerator)
        folder = cache.folder("sft", key, lambda folder: None)
        return start.reference_logps(config, data, folder, scorer, cache, score_split)

    found = [reference(size) for size in SIZES for _ in range(2)]
    assert len(list((tmp_path / "reference").iterdir())) >= len(SIZES)
    for first, again in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(first["test"].logp_SC, again["test"].logp_SC)
    monkeypatch.setattr(start, "reference_key", lambda *_: "one for all")
    reference(8)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    with pytest.raises(UserError, match="do not belong to this policy"):
        reference(8)


def test_what_the_preference_stage_needs_is_asked_before_the_sft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    """Gradients at the output matrix, where an adapter lies on it."""
    sizes = ["dataset.num_train=16", "dataset.num_val=4", "dataset.num_test=4", "trainer.threads=1"]
    adapter = "trainer.adapter={r: 2, alpha: 4, targets: [lm_head], stages: one}"
    config = compose([*sizes, adapter, "model.config.tie_word_embeddings=false", f"runs_dir={tmp_path / 'runs'}"])
    config.cache_dir, config.selector.features, config.logger = str(tmp_path), "head", compose([logger]).logger

    def began(*_: Any) -> Any:
        pytest.fail("the SFT began")

    monkeypatch.setattr(start, "fit", began)
    with pytest.raises(UserError, match="features=head needs an output matrix without an adapter"):
        pipeline.train(config)


def test_what_cannot_fit_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    """A machine with less memory free than gradients and moments take."""
    free = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr("massdpo.runs.machine.psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("massdpo.runs.start.fit", lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError, match=r"needs .* GB more \(gradients and AdamW\).*trainer=lora"):
        pipeline.train(compose([logger, f"runs_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"]))
