"""FlexAttention against what texts say, dense masks and eager attention. Its CPU kernels have no backward, so gradients
go through a stand-in that takes the same masks; `test_gpu.py` has the kernels themselves."""

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as kernels

from massdpo.model import flex, packing
from massdpo.model.packing import ResponseRow, Row, attention_mask
from massdpo.model.scoring import PreferenceScorer
from tests.test_engine_families import FAMILIES
from tests.test_scoring import (
    ALL_SHORT,
    RAGGED,
    assert_all_ways_agree,
    gradient_of,
    make_batch,
    pick_all,
    pl_loss,
    plain_logp,
    tiny,
)

SEEN = tiny(FAMILIES["gemma3"]), tiny(FAMILIES["llama4"])  # all, a window of 5, a chunk of 5


@pytest.fixture(autouse=True)
def rows_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TILE", 8)
    monkeypatch.setattr(packing, "SHORT_TOKENS", 0)
    monkeypatch.setattr(flex, "LONG", 1)
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))


Token = tuple[int, int] | None  # response (0: the prompt) and place in its text; None: padding


def tokens(prompt: int, responses: list[int], width: int, with_prompt: bool, with_responses: bool) -> list[Token]:
    row: list[Token] = [(0, place) for place in range(prompt)] if with_prompt else []
    for index, length in enumerate(responses, start=1):
        row += [(index, prompt + place) for place in range(length - 1)] if with_responses else []
    return row + [None] * (width - len(row))


ALLOWED: dict[str, Callable[[int, int], bool]] = {
    "full_attention": lambda query, key: key <= query,
    "sliding_attention": lambda query, key: query - 5 < key <= query,
    "chunked_attention": lambda query, key: query // 5 == key // 5 and key <= query,
}


@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans())
def test_tiles_show_what_the_texts_say(data: st.DataObject, one_row: bool) -> None:
    prompts = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=3))
    responses = [data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)) for _ in prompts]
    batch = make_batch(prompts, responses)
    row = ResponseRow.of(batch, prompt=one_row).in_tiles()
    keys: list[Row] = [row] if one_row else [Row.prompts(batch).in_tiles(), row]
    widths = [key.ids_BL.shape[1] for key in keys]
    assert all(width % packing.TILE == 0 for width in widths)
    for model in SEEN:
        tiled, dense = (attention_mask(model, row, *keys, tiled=flag) for flag in (True, False))
        assert isinstance(tiled, dict) and isinstance(dense, dict)
        for kind, mask in tiled.items():
            b, q, k = (torch.arange(size) for size in (len(prompts), widths[-1], sum(widths)))
            seen_BQK = mask.mask_mod(b[:, None, None], torch.tensor(0), q[:, None], k)
            assert torch.equal(seen_BQK, dense[kind][:, 0] == 0) and seen_BQK.any(-1).all()
            blocks_BXY = seen_BQK.unflatten(2, (-1, packing.TILE)).unflatten(1, (-1, packing.TILE)).transpose(2, 3)
            assert torch.equal(mask.to_dense()[:, 0].bool(), blocks_BXY.flatten(3).any(-1))
            for at, (prompt, lengths) in enumerate(zip(prompts, responses, strict=True)):
                queries = tokens(prompt, lengths, widths[-1], one_row, True)
                all_keys = queries if one_row else tokens(prompt, lengths, widths[0], True, False) + queries
                for query, token in enumerate(queries):
                    if token is not None:
                        expected = [
                            key is not None and key[0] in (0, token[0]) and ALLOWED[kind](token[1], key[1])
                            for key in all_keys
                        ]
                        assert seen_BQK[at, query].tolist() == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "llama4"])
def test_log_probs_are_those_of_the_plain_way(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[tuple[int, int]] = []

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        heads.append((query.shape[1], key.shape[1]))
        return kernels.flex_attention(query, key, value, **options)

    monkeypatch.setattr(kernels, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(transformers.integrations.flex_attention, "compile_friendly_flex_attention", uncompiled)
    model = tiny(FAMILIES[family])
    monkeypatch.setattr(PreferenceScorer, "_misfit", lambda scorer, times=1: "")  # it asks for gradients
    scorer = PreferenceScorer(model, "mean", layout="packed")
    with torch.no_grad():
        expected_BC = plain_logp(model, RAGGED)
        for short in (0, ALL_SHORT):
            monkeypatch.setattr(packing, "SHORT_TOKENS", short)
            found_BC = scorer(RAGGED, pick_all).scores.logp_BC
            torch.testing.assert_close(found_BC, expected_BC, rtol=1e-5, atol=1e-5)
            alone_B1 = scorer(RAGGED.chosen_only()).scores.logp_BC
            torch.testing.assert_close(alone_B1, expected_BC[:, :1], rtol=1e-5, atol=1e-5)
        # The pool and the picks, in either layout; capped scores: prompts and the chosen responses alone, too.
        passes = 7 if family == "gemma2" else 4
        assert heads == [(4, 2)] * passes * model.config.num_hidden_layers  # grouped keys are not repeated
        assert torch.equal(plain_logp(model, RAGGED), expected_BC)  # the model's own forward is as it was
        with torch.autocast("cpu", torch.bfloat16):
            rough_BC = scorer(RAGGED).scores.logp_BC
    error_BC = (rough_BC - expected_BC).abs()
    assert (error_BC <= 0.1 * RAGGED.length_BC).all() and error_BC.max() > 0


def stand_in(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: kernels.BlockMask, **options: Any
) -> tuple[Tensor, None]:
    """Attention by a `BlockMask` with a backward."""
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    score_BHQK = query @ key.transpose(-1, -2) * options["scaling"]
    if cap := options.get("softcap"):
        score_BHQK = cap * (score_BHQK / cap).tanh()
    b, q, k = (torch.arange(size) for size in (len(query), query.shape[2], key.shape[2]))
    seen_BHQK = mask.mask_mod(b[:, None, None, None], torch.tensor(0), q[:, None], k)
    return (score_BHQK.masked_fill(~seen_BHQK, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_gradients_pass_through_rows_in_tiles(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe among them, which lets the stand-in pass."""
    monkeypatch.setattr(flex, "flex_attention_forward", stand_in)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlexAttention is not used")
        assert_all_ways_agree(tiny(FAMILIES[family]), RAGGED, 1e-5)


@pytest.mark.parametrize(
    "wrong", [flex.flex_attention_forward, lambda *given, softcap, **options: stand_in(*given, **options)]
)
def test_where_it_fails_or_differs_attention_stays(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no backward here; a dropped cap is silently wrong."""
    monkeypatch.setattr(flex, "flex_attention_forward", wrong)
    model = tiny(FAMILIES["gemma2"])
    with patch.object(flex, "DEVICES", ()):
        scorer = PreferenceScorer(model, layout="packed")
        expected = scorer(RAGGED, pick_all).scores
    with pytest.warns(UserWarning, match=r"FlexAttention is not used \(.+\): attention stays eager") as caught:
        found = [scorer(RAGGED, pick_all).scores for _ in range(2)]
    assert sum("FlexAttention is" in str(each.message) for each in caught) == 1
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(scores.logp_BC, expected.logp_BC) for scores in found)
    gradient, right = (gradient_of(model, pl_loss(each.logp_BC, each.mask_BC)) for each in (found[0], expected))
    assert torch.equal(gradient, right)


def test_short_rows_and_other_devices_have_dense_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried, compiled or told; families that cap scores go by tiles at any length."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family, devices, long in (("llama", ("cpu",), 1024), ("gemma2", ("cuda",), 1)):
            monkeypatch.setattr(flex, "DEVICES", devices)
            monkeypatch.setattr(flex, "LONG", long)
            scorer = PreferenceScorer(tiny(FAMILIES[family]), layout="packed")
            scorer(RAGGED, pick_all)
            assert scorer.flex.fewest is None
