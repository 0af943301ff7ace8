"""From hidden states to log-probs, by the model's own output layer: bias, scale and soft-cap belong to it.

Suffixes: B prompts, C candidates, T response tokens, D hidden units, V vocabulary (W columns of it), M fed response
tokens of a whole batch end to end, U any positions.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from massdpo.model.packing import ResponseRow
from massdpo.tensors import Batch

CHUNK_ELEMENTS = 2**24  # at most this many logits exist at a time: 64 MB in float32
STORED_ELEMENTS = 2**22  # this many are kept for backward, 16 MB, which is cheaper than computing them again


def token_logp(causal_lm: PreTrainedModel, batch: Batch, row: ResponseRow, end_BD: Tensor, rest_MD: Tensor) -> Tensor:
    """Log-probs of the response tokens `(B, C, T)`, 0 where there is none. Each position is scored once.

    A prompt's last state predicts the first tokens of all its responses, every other state one token.
    """
    ids_BCT = batch.response_ids_BCT
    rest_M = ids_BCT[..., 1:].flatten()[row.next_M]
    target_UC = torch.cat([ids_BCT[..., 0], rest_M[:, None].expand(-1, ids_BCT.shape[1])])
    logp_UC = states_logp(causal_lm, torch.cat([end_BD, rest_MD]), target_UC)
    first_BC = logp_UC[: len(end_BD)].masked_fill(~batch.mask_BC, 0.0)
    rest_BCT = spread(ids_BCT[..., 1:].shape, row.next_M, logp_UC[len(end_BD) :, 0])
    return torch.cat([first_BC[..., None], rest_BCT], dim=-1)


def prompt_end(batch: Batch, hidden_BLD: Tensor) -> Tensor:
    """The hidden state of each prompt's last token, `(B, D)`."""
    return hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), batch.prompt_mask_BP.sum(-1) - 1]


def predicting_states(batch: Batch, row: ResponseRow, end_BD: Tensor, rest_MD: Tensor) -> Tensor:
    """The hidden states that predict each response token, `(B, C, T, D)`."""
    first_BCD = as_float(end_BD)[:, None].expand(*batch.mask_BC.shape, -1)
    rest_BCTD = spread(batch.response_ids_BCT[..., 1:].shape, row.next_M, rest_MD)
    return torch.cat([first_BCD[:, :, None], rest_BCTD], dim=2)


def target_logp(logits_UV: Tensor, target_UC: Tensor) -> Tensor:
    return as_float(logits_UV).log_softmax(-1).gather(-1, target_UC)


def logit_transform(causal_lm: PreTrainedModel, raw_UW: Tensor) -> Tensor:
    """What the model does to the products with some columns of its output matrix: soft-cap, scale."""
    output = causal_lm.get_output_embeddings()
    name = next(name for name, child in causal_lm.named_children() if child is output)
    return _logits(causal_lm, raw_UW, {name: nn.Identity()})


def decoder_name(causal_lm: PreTrainedModel) -> str:
    """The child that turns tokens into hidden states. Not `base_model`: Llama 4's says that it is the whole model."""
    embeddings = causal_lm.get_input_embeddings()
    children = causal_lm.named_children()
    return next(name for name, child in children if any(module is embeddings for module in child.modules()))


def spread(shape: torch.Size, place_M: Tensor, value_M: Tensor) -> Tensor:
    """Values at their places in a tensor of that shape, 0 elsewhere; a value may have further dimensions."""
    value_M = as_float(value_M)
    tail = value_M.shape[1:]
    return value_M.new_zeros(shape.numel(), *tail).index_copy(0, place_M, value_M).view(*shape, *tail)


def as_float(value: Tensor) -> Tensor:
    """Float32, or finer where the model is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def states_logp(causal_lm: PreTrainedModel, hidden_UD: Tensor, target_UC: Tensor) -> Tensor:
    """Log-probs of targets at each position; where logits are many, only a chunk exists at a time, in backward too."""

    def chunk_logp(hidden_UD: Tensor, target_UC: Tensor) -> Tensor:
        return target_logp(_logits(causal_lm, hidden_UD, {}), target_UC)

    vocabulary = causal_lm.config.get_text_config().vocab_size
    if len(hidden_UD) * vocabulary <= STORED_ELEMENTS:
        return chunk_logp(hidden_UD, target_UC)
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    chunks = zip(hidden_UD.split(size), target_UC.split(size), strict=True)
    return torch.cat([checkpoint(chunk_logp, *chunk, use_reentrant=False) for chunk in chunks])


def _logits(causal_lm: PreTrainedModel, hidden_UD: Tensor, replaced: dict[str, nn.Module]) -> Tensor:
    """Logits by the model's own forward over its own weights, but with its decoder's output given."""
    head = copy.copy(causal_lm)
    vars(head).pop("forward", None)  # Accelerate may have wrapped it, bound to the model that was copied
    head._modules = {**causal_lm._modules, decoder_name(causal_lm): _Given(), **replaced}
    return head(inputs_embeds=hidden_UD[None]).logits[0]


class _Given(nn.Module):
    """Stands in for a decoder whose output is already known."""

    def forward(self, input_ids: None = None, inputs_embeds: Tensor | None = None, **_: Any) -> Any:
        return _States(last_hidden_state=cast(Any, inputs_embeds))

    @property
    def decoder(self) -> nn.Module:
        """OPT's forward asks its model for the decoder within."""
        return self


class _States(BaseModelOutputWithPast):
    """Hidden states alone: whatever else a family passes on, such as the router logits of experts, is None."""

    def __getattr__(self, name: str) -> None:
        return None
