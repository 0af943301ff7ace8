"""How prompts and responses lie in rows of tokens, and which token sees which.

Suffixes: B prompts, C candidates, P prompt tokens, T response tokens, L tokens of a row, Q and K query and key tokens,
D hidden units, M fed response tokens of a whole batch end to end, U any positions.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache, PreTrainedModel

from massdpo.tensors import Batch

PADDING, PROMPT = -1, 0  # segments of a row; candidate c is segment c + 1
ROW_TOKENS = 1024  # of responses in a row; one response may be longer
SHORT_TOKENS = 256  # a batch's prompts, if fewer tokens in all, cost less beside the responses than in their own pass
ON_A_GPU = 32  # times as many there, where a pass costs at least the launches of its kernels
ALIGNED = 16  # kernels copy a mask whose rows don't begin at multiples of so many numbers, in every layer
TILE = 128  # FlexAttention goes by tiles of so many queries and keys, and skips those in which nothing is seen

Sees = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # prompt, head, place of a query and of a key -> bool
Mask = Tensor | BlockMask
Masks = Mask | dict[str, Mask]  # the latter: one per layer type


@dataclass
class Row:
    """One row of tokens per prompt: what each token is, where it stands in its text, and its segment."""

    ids_BL: Tensor
    position_BL: Tensor
    segment_BL: Tensor

    @classmethod
    def prompts(cls, batch: Batch) -> "Row":
        mask_BP = batch.prompt_mask_BP
        position_BP = torch.arange(mask_BP.shape[1], device=mask_BP.device) * mask_BP
        segment_BP = torch.full_like(position_BP, PROMPT).masked_fill(~mask_BP, PADDING)
        return cls(_padded(batch, batch.prompt_ids_BP, mask_BP), position_BP, segment_BP)

    def in_tiles(self) -> Self:
        """The row with padding up to whole tiles."""
        more = -self.ids_BL.shape[1] % TILE
        first_B1 = self.ids_BL[:, :1]  # as everywhere in padding
        ids_BL = torch.cat([self.ids_BL, first_B1.expand(-1, more)], dim=1)
        position_BL = torch.nn.functional.pad(self.position_BL, (0, more))
        segment_BL = torch.nn.functional.pad(self.segment_BL, (0, more), value=PADDING)
        return replace(self, ids_BL=ids_BL, position_BL=position_BL, segment_BL=segment_BL)


@dataclass
class ResponseRow(Row):
    """A row of a prompt's responses without their last tokens, which predict nothing.

    `place_M` is where each of their tokens lies among the flattened `(B, L)`, and `next_M` where the token that it
    predicts lies among the responses' tokens after their first, the flattened `(B, C, T - 1)`; both in the order
    (prompt, candidate, token).
    """

    place_M: Tensor
    next_M: Tensor

    def in_tiles(self) -> Self:
        row, length = super().in_tiles(), self.ids_BL.shape[1]
        more = row.ids_BL.shape[1] - length
        return replace(row, place_M=self.place_M + self.place_M // length * more)

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
        # The only wait for the device.
        longest, fed = torch.stack([there_BU.sum(-1).max(), fed_BCT.sum()]).tolist()
        # Tokens that exist go first. At least one: one-token responses leave nothing to feed, and no model takes no
        # tokens.
        column_BL = there_BU.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, longest)]
        there_BL = there_BU.gather(1, column_BL)
        segment_BL = segment_U[column_BL].masked_fill(~there_BL, PADDING)
        start_BL = prompt_mask_BP.sum(-1, keepdim=True) * (segment_BL > PROMPT)
        position_BL = (start_BL + offset_U[column_BL]) * there_BL
        ids_BL = _padded(batch, ids_BU.gather(1, column_BL), there_BL)
        return cls(ids_BL, position_BL, segment_BL, _places(segment_BL > PROMPT, fed), _places(fed_BCT, fed))


def in_parts(batch: Batch, sharded: bool) -> list[Batch]:
    """The batch in parts of some candidates each, as many as a row takes.

    Weights sharded layer by layer need the same number of passes from every process, hence of parts.
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
    """Whether to encode the prompts once, ahead of their responses; several processes have to agree, as above."""
    if batch.response_ids_BCT.shape[1] == 1:
        return False
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    times = ON_A_GPU if batch.prompt_ids_BP.is_cuda else 1
    return several or batch.prompt_ids_BP.numel() >= SHORT_TOKENS * times


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
        """A cache for one forward, which grows the cache it is given: layers of its own over the same tensors."""
        branch = copy.copy(self.cache)
        branch.layers = [copy.copy(layer) for layer in self.cache.layers]
        return branch


def attention_mask(causal_lm: PreTrainedModel, query: Row, *keys: Row, tiled: bool = False) -> Masks:
    """A token sees its prompt and its own response up to itself, in the form in which the model's layers want it.

    Padding sees padding: no row of a softmax may be empty.
    """
    position_BQ, segment_BQ = query.position_BL, query.segment_BL
    position_BK = torch.cat([key.position_BL for key in keys], dim=1)
    segment_BK = torch.cat([key.segment_BL for key in keys], dim=1)

    def sees(b: Tensor, _head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        own = (segment_BK[b, k] == PROMPT) | (segment_BK[b, k] == segment_BQ[b, q])
        return own & (position_BQ[b, q] >= position_BK[b, k])

    return layer_masks(causal_lm, sees, position_BQ, position_BK, tiled)


def layer_masks(
    causal_lm: PreTrainedModel, sees: Sees, position_BQ: Tensor, position_BK: Tensor, tiled: bool = False
) -> Masks:
    """What `sees` and the model's windows allow, as masks: one, or one per layer type where the family has several.

    Each is made once for all layers: `tiled` for FlexAttention, else to be added to attention's scores. Raises
    `KeyError` for a kind of layer that no mask is known for.
    """
    config = causal_lm.config.get_text_config()
    window: Any = getattr(config, "sliding_window", None)

    def windowed(b: Tensor, head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        return sees(b, head, q, k) & (position_BQ[b, q] - window < position_BK[b, k])

    def chunked(b: Tensor, head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        size = config.attention_chunk_size
        return sees(b, head, q, k) & (position_BQ[b, q] // size == position_BK[b, k] // size)

    def mask(sees: Sees) -> Mask:
        sizes = len(position_BQ), position_BQ.shape[1], position_BK.shape[1]
        if tiled:
            return create_block_mask(sees, sizes[0], None, *sizes[1:], position_BQ.device, TILE)
        return _additive(causal_lm, sees, *(torch.arange(size, device=position_BQ.device) for size in sizes))

    known = {
        "full_attention": sees,
        "sliding_attention": sees if window is None else windowed,
        "chunked_attention": chunked,
    }
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # GPT-Neo's name
    if kinds is None:
        return mask(known["sliding_attention"])
    return {kind: mask(known[kind]) for kind in set(kinds)}


def _additive(causal_lm: PreTrainedModel, sees: Sees, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask in the type that attention is computed in: SDPA would turn a boolean one into that in every layer, and
    eager and flex attention would add it as it is, which is silently wrong."""
    dtype = precision(causal_lm)
    visible_BQK = sees(b[:, None, None, None], None, q[:, None], k)
    width = -(-len(k) // ALIGNED) * ALIGNED
    mask_BQK = torch.zeros(*visible_BQK.shape[:-1], width, dtype=dtype, device=k.device)
    return mask_BQK[..., : len(k)].masked_fill_(~visible_BQK, torch.finfo(dtype).min)


def precision(causal_lm: PreTrainedModel) -> torch.dtype:
    """What the layers compute in: the weights' dtype, or that of autocast."""
    device = causal_lm.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else causal_lm.dtype
