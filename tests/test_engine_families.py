"""Packed, two-phase and repeated scoring agree with each family's own forward, under both kinds of mask."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    BloomConfig,
    CodeGenConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    T5Config,
)

from massdpo.errors import UserError
from massdpo.model.load import load_model, warn_of_long_rope
from massdpo.model.scoring import PreferenceScorer
from tests.conftest import ROOT
from tests.test_scoring import (
    GPT2,
    RAGGED,
    VOCABULARY,
    assert_all_ways_agree,
    gradient_of,
    make_batch,
    pick_all,
    pl_loss,
    plain_logp,
    tiny,
)

BATCHED = ("index_B", "prompt_ids_BP", "prompt_mask_BP", "response_ids_BCT", "response_mask_BCT")
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
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
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
    # Mixtures of experts: what a decoder returns has fields of its own.
    "mixtral": MixtralConfig(**GROUPED, **EXPERTS, sliding_window=5),
    "qwen2_moe": Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, **EXPERTS),
    "olmoe": OlmoeConfig(**GROUPED, **EXPERTS),
    "phimoe": PhimoeConfig(**GROUPED, **EXPERTS),
    "granitemoe": GraniteMoeConfig(**GROUPED, **EXPERTS),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE, **ROUTED, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8
    ),
    "glm4_moe": Glm4MoeConfig(**GROUPED, **ROUTED),
    "llama4": Llama4TextConfig(**GROUPED, **EXPERTS, intermediate_size_mlp=48, attention_chunk_size=5),
    "opt": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.1,
    ),
    # Without SDPA
    "gpt_oss": GptOssConfig(**GROUPED, **EXPERTS, sliding_window=5),
    "gptj": GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, initializer_range=0.1
    ),
    "codegen": CodeGenConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, initializer_range=0.1
    ),
}  # fmt: skip
# Attention by the place in the row (with a window wider than any test), by ALiBi, by no attention: none can be packed.
ALONE: dict[str, PretrainedConfig] = {
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2, initializer_range=0.1),
    "mpt": MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, initializer_range=0.1),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=256,
        attention_types=[[["global", "local"], 1]], initializer_range=0.1,
    ),
    "mamba": MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.1
    ),
}  # fmt: skip


TABLE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def test_the_table_of_families_has_them_all() -> None:
    """What it says of each, the tests below check."""
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|$", TABLE, flags=re.MULTILINE)
    packed = {(config.model_type, "packed") for config in FAMILIES.values()}
    alone = {(config.model_type, "repeated") for config in ALONE.values()}
    assert len(listed) == len(set(listed)) and f"transformers {transformers.__version__} " in TABLE
    assert set(listed) == packed | alone | {("t5", "refused")}


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=VOCABULARY).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_model(tmp_path, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str) -> None:
    assert_all_ways_agree(tiny(FAMILIES[family]), RAGGED, 1e-5)


@pytest.mark.parametrize("family", ALONE)
def test_a_family_that_cannot_be_packed_is_scored_the_plain_way(family: str) -> None:
    model = tiny(ALONE[family])
    with pytest.raises(UserError, match="cannot share prompts"):
        PreferenceScorer(model, layout="packed")
    with pytest.warns(UserWarning, match="cannot share prompts") as caught:
        scorer = PreferenceScorer(model)
        scores = scorer(RAGGED, pick_all).scores
    assert len(caught) == 1 and not scorer.packed
    expected_BC = plain_logp(model, RAGGED)
    torch.testing.assert_close(scores.logp_BC, expected_BC, rtol=1e-5, atol=1e-5)
    expected = gradient_of(model, pl_loss(expected_BC, RAGGED.mask_BC))
    assert (gradient_of(model, pl_loss(scores.logp_BC, scores.mask_BC)) - expected).norm() <= 1e-5 * expected.norm()


def test_a_family_without_sdpa_is_loaded_with_eager_attention(tmp_path: Path) -> None:
    for family in ("gpt_oss", "gptj", "llama"):
        tiny(FAMILIES[family]).save_pretrained(tmp_path / family)
    kinds = {place.name: load_model(place, "float32").config._attn_implementation for place in tmp_path.iterdir()}
    assert kinds == {"gpt_oss": "eager", "gptj": "eager", "llama": "sdpa"}


def test_long_rope_goes_by_the_longest_row_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond what is warned of a row's log-probs depend on its neighbours, below it they do not."""
    scales = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **scales}
    config = Phi3Config(**GROUPED, original_max_position_embeddings=16, rope_parameters=rope)
    for told, length in ((FAMILIES["phi3"], 64), (config, 16), (config, 17)):
        assert capsys.readouterr().err == ""
        warn_of_long_rope(told, length)
    assert re.fullmatch(
        r"warning: a row of more than 16 tokens .* trainer\.max_length=16 avoids that\n", capsys.readouterr().err
    )
    scorer = PreferenceScorer(tiny(config))
    for longest, alike in ((10, True), (20, False)):
        batch = make_batch([5, longest], [[2, 3], [2, 3]])
        own = {name: getattr(batch, name)[:1] for name in BATCHED}
        own |= {name: own[name][:, :5] for name in ("prompt_ids_BP", "prompt_mask_BP")}
        one = replace(batch, **own, ids=batch.ids[:1])
        with torch.no_grad():
            alone_C, beside_C = scorer(one).scores.logp_BC[0], scorer(batch).scores.logp_BC[0]
        assert torch.allclose(alone_C, beside_C, atol=1e-5) == alike


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "mistral", "gpt2"])
def test_eager_attention(family: str) -> None:
    """The additive form of the masks; what a family cannot run under SDPA (Gemma 2) is eager above already."""
    assert_all_ways_agree(tiny(FAMILIES[family], "eager"), RAGGED, 1e-5)
