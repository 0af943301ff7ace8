"""How prompts and responses lie in rows of tokens, and which token sees which.

Suffixes: B prompts, C candidates, P prompt tokens, T response tokens, L tokens of a row, Q and K query and key tokens,
D hidden units, U any positions.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from massdpo.tensors import Batch

PADDING, PROMPT = -1, 0  # segments of a row; candidate c is segment c + 1


@dataclass
class Row:
    """One row of tokens a prompt: what each is, where it stands in its text and to which segment it belongs."""

    ids_BL: Tensor
    position_BL: Tensor
    segment_BL: Tensor

    @property
    def fed_BL(self) -> Tensor:
        """The response tokens, which lie in the order (prompt, candidate, token)."""
        return self.segment_BL > PROMPT

    @classmethod
    def of(cls, batch: Batch, prompt: bool, responses: bool) -> "Row":
        """The prompt, the responses end to end without their last tokens, or the prompt and then the responses."""
        prompt_mask_BP, device = batch.prompt_mask_BP, batch.prompt_mask_BP.device
        fed_BCT = batch.response_mask_BCT[..., 1:] & responses
        there_BU = torch.cat([prompt_mask_BP & prompt, fed_BCT.flatten(1)], dim=1)
        ids_BU = torch.cat([batch.prompt_ids_BP, batch.response_ids_BCT[..., :-1].flatten(1)], dim=1)
        sizes = prompt_mask_BP.shape[1], *fed_BCT.shape[1:]
        prompt_P, candidate_C, fed_T = (torch.arange(size, device=device) for size in sizes)
        segment_U = torch.cat([torch.full_like(prompt_P, PROMPT), (candidate_C + 1).repeat_interleave(len(fed_T))])
        offset_U = torch.cat([prompt_P, fed_T.repeat(len(candidate_C))])
        # At least one token: one-token responses leave nothing to feed, and no model takes an empty row.
        length = max(1, int(there_BU.sum(-1).max()))
        column_BL = there_BU.long().argsort(dim=1, descending=True, stable=True)[:, :length]  # what is there goes first
        there_BL = there_BU.gather(1, column_BL)
        segment_BL = segment_U[column_BL].masked_fill(~there_BL, PADDING)
        start_BL = prompt_mask_BP.sum(-1, keepdim=True) * (segment_BL > PROMPT)
        position_BL = (start_BL + offset_U[column_BL]) * there_BL
        # A prompt's own first token pads it: `transformers` warns of padding tokens that no mask tells it of.
        ids_BL = torch.where(there_BL, ids_BU.gather(1, column_BL), batch.prompt_ids_BP[:, :1])
        return cls(ids_BL, position_BL, segment_BL)


@dataclass
class Prompt:
    """Encoded prompts: their last hidden states and the cache that responses continue from."""

    row: Row
    end_BD: Tensor
    cache: DynamicCache

    def branch(self) -> DynamicCache:
        """A forward grows the cache it is given, by new tensors: each gets layers of its own over the same tensors."""
        branch = copy.copy(self.cache)
        branch.layers = [copy.copy(layer) for layer in self.cache.layers]
        return branch


def attention_mask(causal_lm: PreTrainedModel, query: Row, *keys: Row) -> Tensor | dict[str, Tensor]:
    """Who sees whom, for the model's layers.

    A token sees its prompt and its own response up to itself. Padding sees padding: no row of a softmax may be empty.
    """
    position_BK = torch.cat([key.position_BL for key in keys], dim=1)[:, None, None, :]
    segment_BK = torch.cat([key.segment_BL for key in keys], dim=1)[:, None, None, :]
    position_BQ, segment_BQ = query.position_BL[:, None, :, None], query.segment_BL[:, None, :, None]
    distance_BQK = position_BQ - position_BK
    seen_BQK = ((segment_BK == PROMPT) | (segment_BK == segment_BQ)) & (distance_BQK >= 0)
    return layer_masks(causal_lm, seen_BQK, distance_BQK)


def layer_masks(causal_lm: PreTrainedModel, seen_BQK: Tensor, distance_BQK: Tensor) -> Tensor | dict[str, Tensor]:
    """Who sees whom `(B, 1, Q, K)` in the form in which the model's layers want it: one mask, or one per layer type."""
    config = causal_lm.config.get_text_config()

    def shaped(visible_BQK: Tensor) -> Tensor:
        if causal_lm.config._attn_implementation != "eager":
            return visible_BQK
        additive_BQK = torch.zeros(visible_BQK.shape, dtype=causal_lm.dtype, device=visible_BQK.device)
        return additive_BQK.masked_fill(~visible_BQK, torch.finfo(causal_lm.dtype).min)

    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    full = shaped(seen_BQK)
    windowed = full if window is None else shaped(seen_BQK & (distance_BQK < window))
    if kinds is None:
        return windowed
    return {kind: {"full_attention": full, "sliding_attention": windowed}[kind] for kind in set(kinds)}
