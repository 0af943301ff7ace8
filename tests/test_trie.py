"""A catalogue behind one prompt, against each response alone behind its prompt through the model's own forward."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, GraniteConfig, PretrainedConfig

from massdpo.config import compose, instantiate
from massdpo.data.batches import collate
from massdpo.data.readers.recommendation import LastFM
from massdpo.data.tokenize import tokenize_catalogue, tokenize_split
from massdpo.model import trie
from massdpo.model.scoring import PreferenceScorer
from massdpo.model.trie import Catalogue
from massdpo.store import Cache
from tests.conftest import SHARED_DATA, needs_real_models, needs_shared_data
from tests.test_scoring import GPT2, LLAMA, SHAPE, VOCABULARY, make_batch, tiny

SIZES = {name: getattr(LLAMA, name) for name in SHAPE}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LLAMA,
    "qwen2": AutoConfig.for_model("qwen2", **SIZES),
    "phi3": AutoConfig.for_model("phi3", **SIZES, pad_token_id=0, sliding_window=6),
    "gemma2": AutoConfig.for_model(
        "gemma2", **SIZES, head_dim=8, sliding_window=6
    ),  # soft-caps and two kinds of layers
    "gemma3": AutoConfig.for_model("gemma3_text", **SIZES, head_dim=8, sliding_window=6, sliding_window_pattern=2),
    "granite": GraniteConfig(**SIZES, logits_scaling=0.5, embedding_multiplier=2.0),
    "gpt2": GPT2,
}


def alone(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """The sum of a response's log-probs in one plain sequence, in float64."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + response])).logits[0].double()
    logp_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logp_TV.gather(1, torch.tensor(response)[:, None]).sum())


def responses(count: int, seed: int, letters: int = 5) -> list[list[int]]:
    """Few letters, so that many begin alike; some are equal, one is the beginning of another."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (count,), generator=chance).tolist()
    made = [[*torch.randint(3, 3 + letters, (length,), generator=chance).tolist(), 2] for length in lengths]
    return [*made, made[0], [*made[1][:-1], 3, 2]]


def assert_agrees(scorer: PreferenceScorer, prompts: list[int], texts: list[list[int]], part_tokens: int) -> None:
    batch = make_batch(prompts, [[2]] * len(prompts))
    with torch.no_grad():
        scores = scorer(batch, catalogue=Catalogue.of(texts, part_tokens)).scores
    assert scores.length_BC.tolist() == [[len(text) for text in texts]] * len(prompts)
    for row, mask_P in enumerate(batch.prompt_mask_BP):
        prompt = batch.prompt_ids_BP[row][mask_P].tolist()
        expected = torch.tensor([alone(scorer.model, prompt, text) for text in texts])
        torch.testing.assert_close(scores.logp_BC[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_catalogue_scores_as_each_response_alone(family: str) -> None:
    scorer = PreferenceScorer(tiny(FAMILIES[family]), layout="packed").eval()
    assert_agrees(scorer, [9, 3, 12], responses(30, seed=0), part_tokens=16)


SCORER = PreferenceScorer(tiny(LLAMA), layout="packed").eval()


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=6).map(lambda ids: [*ids, 2]), min_size=1),
    prompts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    part_tokens=st.integers(1, 40),
)
def test_any_catalogue_in_any_parts(texts: list[list[int]], prompts: list[int], part_tokens: int) -> None:
    assert_agrees(SCORER, prompts, texts, part_tokens)


def test_a_model_that_packs_nothing_repeats_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie, "PLAIN", 7)
    scorer = PreferenceScorer(tiny(LLAMA), layout="repeated").eval()
    assert_agrees(scorer, [9, 3], responses(20, seed=1), part_tokens=16)


def test_parts_stay_within_their_bound_and_little_is_fed_twice() -> None:
    texts = responses(400, seed=2, letters=20)
    parts = Catalogue.of(texts, part_tokens=64).parts
    assert sorted(torch.cat([part.index_N for part in parts]).tolist()) == list(range(len(texts)))
    assert max(len(part.ids_M) for part in parts) <= 64
    distinct = {tuple(text[:end]) for text in texts for end in range(1, len(text))}
    fed = sum(len(part.ids_M) for part in parts)
    assert len(distinct) <= fed <= len(distinct) + len(parts) * 5  # a path of five at most is fed again in each part
    assert fed < 0.8 * sum(len(text) - 1 for text in texts)


def test_logits_of_a_part_exist_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory bound: at most CHUNK_ELEMENTS logits, whatever the catalogue's size."""
    from massdpo.model import head

    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 10 * VOCABULARY)
    monkeypatch.setattr(head, "STORED_ELEMENTS", 0)
    seen: list[int] = []
    plain = head.target_logp

    def watched(logits_UV: torch.Tensor, target_UC: torch.Tensor) -> torch.Tensor:
        seen.append(logits_UV.numel())
        return plain(logits_UV, target_UC)

    monkeypatch.setattr(head, "target_logp", watched)
    assert_agrees(SCORER, [4], responses(60, seed=3), part_tokens=32)
    assert len(seen) > 10 and max(seen) <= 10 * VOCABULARY


@needs_shared_data
@pytest.mark.slow
@needs_real_models
def test_smollm2_scores_all_artists_of_lastfm_as_each_alone(tmp_path: Path) -> None:
    source = instantiate(compose(["model=smollm2_135m_q4", "logger=none"]).model)
    model, tokenizer = source.load(lambda: [], 0, Cache(tmp_path))
    splits = LastFM(raw_dir=str(SHARED_DATA / "lastfm"), candidates="all", list_candidates=False).load()
    rows = tokenize_split(splits.test[:1], tokenizer, 512)
    titles = tokenize_catalogue(splits.catalogue, tokenizer, rows, 512)
    batch = collate([(0, rows[0])], tokenizer.pad_token_id)
    with torch.no_grad():
        found_I = (
            PreferenceScorer(model, layout="packed").eval()(batch, catalogue=Catalogue.of(titles)).scores.logp_BC[0]
        )
    assert len(found_I) == 4606
    for item in random.Random(0).sample(range(len(titles)), 30):
        assert float(found_I[item]) == pytest.approx(alone(model, rows[0].prompt_ids, titles[item]), rel=1e-5)
