"""FlexAttention on GPUs, next to the attention that a model was loaded with: the mask's type decides between them.

FlexAttention skips the tiles of a row in which nothing is seen, reads grouped keys without repeating them, and caps
scores, which SDPA cannot. A model's own forward and generation pass no `BlockMask`, so they are unaffected.
"""

import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DEVICES = ("cuda",)  # its CPU kernels have no backward
LONG = 1024  # keys of a row: with fewer, SDPA and its dense mask are no slower
RECOMPILES = 64  # two kinds of layers with and without gradients, in the probe's precision and in training's, ...
PREFIX = "flex_attention_or_"


class Flex:
    """Decides which rows of a model go through FlexAttention: those with at least `fewest` keys.

    The first such row triggers a comparison with the model's own forward; until then `fewest` is None.
    """

    def __init__(self) -> None:
        self.fewest: float | None = None

    def takes(self, causal_lm: PreTrainedModel, keys: int, misfit: Callable[[int], str]) -> bool:
        """Whether a row with this many keys goes through it; plain text, which needs no mask, counts as 0 keys."""
        if self.fewest is None and keys >= (fewest := _fewest_keys(causal_lm)):
            plain = causal_lm.config._attn_implementation
            _put_beside(causal_lm, plain.removeprefix(PREFIX))
            self.fewest = 0  # the probe's short rows go through it too, at several lengths in tiles
            reason = misfit(min(24, causal_lm.config.get_text_config().max_position_embeddings // 8))
            self.fewest = math.inf if reason else fewest
            if reason:
                causal_lm.set_attn_implementation(plain)
                warnings.warn(f"FlexAttention is not used ({reason}): attention stays {plain}", stacklevel=1)
        return self.fewest is not None and keys >= self.fewest


def _fewest_keys(causal_lm: PreTrainedModel) -> float:
    """The fewest keys of a row from which FlexAttention is worth trying."""
    if causal_lm.device.type not in DEVICES or not causal_lm._supports_flex_attn:
        return math.inf
    if isinstance(next(causal_lm.parameters()), DTensor):  # processes would try it at different steps and wait forever
        return math.inf
    if getattr(causal_lm.config.get_text_config(), "attn_logit_softcapping", None):
        return 0
    return LONG if causal_lm.config._attn_implementation.removeprefix(PREFIX) == "sdpa" else math.inf


def _put_beside(causal_lm: PreTrainedModel, plain: str) -> None:
    AttentionInterface.register(PREFIX + plain, partial(_attend, plain))
    AttentionMaskInterface.register(PREFIX + plain, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    causal_lm.set_attn_implementation(PREFIX + plain)
    limit = torch._dynamo.config.recompile_limit  # beyond it attention would silently hold all scores
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILES)


def _attend(
    plain: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, by the kind of its mask."""
    if not isinstance(attention_mask, BlockMask):
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(plain, eager)(module, query, key, value, attention_mask, **options)
    if torch.is_autocast_enabled(query.device.type):  # rotations leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **options)
