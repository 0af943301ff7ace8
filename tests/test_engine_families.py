"""Packed, two-phase and repeated scoring agree with each family's own forward, under both kinds of mask."""

import pytest
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tests.test_scoring import GPT2, RAGGED, VOCABULARY, assert_all_ways_agree, tiny

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
# Windows shorter than most prompts, so that responses lose sight of their prompt's start.
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "gemma": GemmaConfig(**GROUPED),
    # Caps low enough to bend these models' scores and logits.
    "gemma2": Gemma2Config(
        **GROUPED, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **GROUPED,
        sliding_window=5,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": PhiConfig(**SHAPE),  # its output matrix has a bias
    "phi3": Phi3Config(**GROUPED, sliding_window=6),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2_windowed": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=5),
    "granite": GraniteConfig(**GROUPED, logits_scaling=3.0, attention_multiplier=0.5, embedding_multiplier=2.0),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.3),
    "olmo2": Olmo2Config(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "gpt2": GPT2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str) -> None:
    assert_all_ways_agree(tiny(FAMILIES[family]), RAGGED, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "mistral", "gpt2"])
def test_eager_attention(family: str) -> None:
    """The additive form of the masks; what a family cannot run under SDPA (Gemma 2) is eager above already."""
    assert_all_ways_agree(tiny(FAMILIES[family], "eager"), RAGGED, 1e-5)
