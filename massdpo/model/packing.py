"""How prompts and responses lie in rows of tokens, and which token sees which.

Suffixes: B prompts, C candidates, P prompt tokens, T response tokens, L tokens of a row, Q and K query and key tokens,
D hidden units, M fed response tokens of a whole batch end to end, U any positions.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from massdpo.tensors import Batch

PADDING, PROMPT = -1, 0  # segments of a row; candidate c is segment c + 1
ROW_TOKENS = 1024  # of responses in a row; one response may be longer
SHORT_TOKENS = 256  # a batch's prompts with fewer tokens cost less beside the responses than in a pass of their own
ALIGNED = 16  # kernels copy a mask whose rows don't begin at multiples of so many numbers, in every layer


@dataclass
class Row:
    """One row of tokens per prompt: what each is, where it stands in its text and to which segment it belongs."""

    ids_BL: Tensor
    position_BL: Tensor
    segment_BL: Tensor

    @classmethod
    def prompts(cls, batch: Batch) -> "Row":
        mask_BP = batch.prompt_mask_BP
        position_BP = torch.arange(mask_BP.shape[1], device=mask_BP.device) * mask_BP
        segment_BP = torch.full_like(position_BP, PROMPT).masked_fill(~mask_BP, PADDING)
        return cls(_padded(batch, batch.prompt_ids_BP, mask_BP), position_BP, segment_BP)


@dataclass
class ResponseRow(Row):
    """A row of a prompt's responses without their last tokens, which predict nothing.

    `place_M` is where each of their tokens lies among the flattened `(B, L)`, and `next_M` where the token that it
    predicts lies among the responses' tokens after their first, the flattened `(B, C, T - 1)`; both in the order
    (prompt, candidate, token).
    """

    place_M: Tensor
    next_M: Tensor

    @classmethod
    def of(cls, batch: Batch, prompt: bool) -> "ResponseRow":
        """All responses of a prompt end to end, behind the prompt itself if asked for."""
        prompt_mask_BP, device = batch.prompt_mask_BP, batch.prompt_mask_BP.device
        fed_BCT = batch.response_mask_BCT[..., 1:]
        there_BU = torch.cat([prompt_mask_BP & prompt, fed_BCT.flatten(1)], dim=1)
        ids_BU = torch.cat([batch.prompt_ids_BP, batch.response_ids_BCT[..., :-1].flatten(1)], dim=1)
        sizes = prompt_mask_BP.shape[1], *fed_BCT.shape[1:]
        prompt_P, candidate_C, fed_T = (torch.arange(size, device=device) for size in sizes)
        segment_U = torch.cat([torch.full_like(prompt_P, PROMPT), (candidate_C + 1).repeat_interleave(len(fed_T))])
        offset_U = torch.cat([prompt_P, fed_T.repeat(len(candidate_C))])
        # The only time that the device is waited for.
        longest, fed = torch.stack([there_BU.sum(-1).max(), fed_BCT.sum()]).tolist()
        # What is there goes first. At least one token: one-token responses leave nothing to feed, and no model takes an
        # empty row.
        column_BL = there_BU.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, longest)]
        there_BL = there_BU.gather(1, column_BL)
        segment_BL = segment_U[column_BL].masked_fill(~there_BL, PADDING)
        start_BL = prompt_mask_BP.sum(-1, keepdim=True) * (segment_BL > PROMPT)
        position_BL = (start_BL + offset_U[column_BL]) * there_BL
        ids_BL = _padded(batch, ids_BU.gather(1, column_BL), there_BL)
        return cls(ids_BL, position_BL, segment_BL, _places(segment_BL > PROMPT, fed), _places(fed_BCT, fed))


def in_parts(batch: Batch, sharded: bool) -> list[Batch]:
    """The batch in parts of some candidates each, as many as a row takes.

    Weights that are sharded layer by layer want as many passes from every process, hence as many parts.
    """
    candidates, longest = batch.response_ids_BCT.shape[1:]
    parts = -(-candidates // max(1, ROW_TOKENS // longest))
    if sharded:
        most = torch.tensor(parts, device=batch.prompt_ids_BP.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        parts = int(most)
    if parts == 1:
        return [batch]
    ids, masks = (t.tensor_split(parts, dim=1) for t in (batch.response_ids_BCT, batch.response_mask_BCT))
    return [replace(batch, response_ids_BCT=i, response_mask_BCT=m) for i, m in zip(ids, masks, strict=True)]


def worth_a_pass(batch: Batch) -> bool:
    """Whether to encode the prompts once, ahead of their responses; several processes answer alike, as above."""
    if batch.response_ids_BCT.shape[1] == 1:
        return False
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several or batch.prompt_ids_BP.numel() >= SHORT_TOKENS


def _padded(batch: Batch, ids_BL: Tensor, there_BL: Tensor) -> Tensor:
    """A prompt's own first token pads it: `transformers` warns of padding tokens that no mask covers."""
    return torch.where(there_BL, ids_BL, batch.prompt_ids_BP[:, :1])


def _places(mask: Tensor, count: int) -> Tensor:
    """Where the mask is True, flattened, without asking the device how often that is."""
    return mask.flatten().long().argsort(descending=True, stable=True)[:count]


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
    """A token sees its prompt and its own response up to itself, in the form in which the model's layers want it.

    Padding sees padding: no row of a softmax may be empty.
    """
    position_BK = torch.cat([key.position_BL for key in keys], dim=1)
    segment_BK = torch.cat([key.segment_BL for key in keys], dim=1)[:, None, None, :]
    own_BQK = (segment_BK == PROMPT) | (segment_BK == query.segment_BL[:, None, :, None])
    seen_BQK = own_BQK & (query.position_BL[:, None, :, None] >= position_BK[:, None, None, :])
    return layer_masks(causal_lm, seen_BQK, query.position_BL, position_BK)


def layer_masks(
    causal_lm: PreTrainedModel, seen_BQK: Tensor, position_BQ: Tensor, position_BK: Tensor
) -> Tensor | dict[str, Tensor]:
    """Masks that are added to attention's scores: one, or one a layer type where the family has several.

    They come in the type that attention is computed in: SDPA would turn a boolean mask into that in every layer, and
    eager attention would add it as it is, which is silently wrong. Raises `KeyError` for a kind of layer that no mask
    is known for.
    """
    config = causal_lm.config.get_text_config()
    query_BQ1, key_B1K = position_BQ[:, None, :, None], position_BK[:, None, None, :]
    device = seen_BQK.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else causal_lm.dtype
    width = -(-seen_BQK.shape[-1] // ALIGNED) * ALIGNED

    def additive(visible_BQK: Tensor) -> Tensor:
        mask_BQK = torch.zeros(*visible_BQK.shape[:-1], width, dtype=dtype, device=visible_BQK.device)
        return mask_BQK[..., : visible_BQK.shape[-1]].masked_fill_(~visible_BQK, torch.finfo(dtype).min)

    def windowed() -> Tensor:
        window = getattr(config, "sliding_window", None)
        return additive(seen_BQK if window is None else seen_BQK & (query_BQ1 - window < key_B1K))

    def chunked() -> Tensor:
        return additive(seen_BQK & (query_BQ1 // config.attention_chunk_size == key_B1K // config.attention_chunk_size))

    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # GPT-Neo's name
    if kinds is None:
        return windowed()
    known = {
        "full_attention": lambda: additive(seen_BQK),
        "sliding_attention": windowed,
        "chunked_attention": chunked,
    }
    return {kind: known[kind]() for kind in set(kinds)}
