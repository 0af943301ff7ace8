"""The plain way to score: every candidate behind a copy of its prompt, through the model's own forward.

The shared-prefix engine must agree with it, and families that cannot share prompts are scored by it.
Suffixes: B prompts, C candidates, T response tokens, D hidden units, R prompt-and-response pairs in rows of L tokens,
M response tokens of a whole batch end to end.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from massdpo.model.head import spread, target_logp
from massdpo.tensors import Batch, first


def repeated_prompts(
    model: nn.Module, causal_lm: PreTrainedModel, batch: Batch, states: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the response tokens `(B, C, T)`, and, if asked for, the states that predict them `(B, C, T, D)`.

    `model` is `causal_lm` or an adapter around it.
    """
    fed_BC = batch.mask_BC.clone()
    fed_BC[0, 0] = True  # at least one: prompts may all lack the candidates of a part, and no model takes no tokens
    b_R, c_R = fed_BC.nonzero(as_tuple=True)
    prompt_length_R = batch.prompt_mask_BP.sum(-1)[b_R]
    length_R = prompt_length_R + batch.length_BC[b_R, c_R]
    longest = int(length_R.max())
    ids_RL = batch.prompt_ids_BP[:, :1].repeat(1, longest)[b_R]
    r_M, p_M = batch.prompt_mask_BP[b_R].nonzero(as_tuple=True)
    ids_RL[r_M, p_M] = batch.prompt_ids_BP[b_R[r_M], p_M]
    r_M, t_M = batch.response_mask_BCT[b_R, c_R].nonzero(as_tuple=True)
    place_M = batch.response_mask_BCT.flatten().nonzero()[:, 0]
    target_M = batch.response_ids_BCT.flatten()[place_M]
    column_M = prompt_length_R[r_M] + t_M
    ids_RL[r_M, column_M] = target_M
    mask_RL = first(length_R, longest).long()
    options: dict[str, Any] = {"use_cache": False, "output_hidden_states": states}
    start = 0
    if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters:
        start = int(prompt_length_R.min()) - 1  # the shortest prompt's last token: no logits are needed before it
        options["logits_to_keep"] = longest - start
    output = model(input_ids=ids_RL, attention_mask=mask_RL, **options)
    logp_M = target_logp(output.logits[r_M, column_M - 1 - start], target_M[:, None])[:, 0]
    token_logp_BCT = spread(batch.response_mask_BCT.shape, place_M, logp_M)
    if not states:
        return token_logp_BCT, None
    return token_logp_BCT, spread(batch.response_mask_BCT.shape, place_M, output.hidden_states[-1][r_M, column_M - 1])
