"""Whether a model can share prompts: packed rows against the model's own forward, on a tiny batch, gradients included.

Suffixes: B prompts, C candidates, P prompt tokens, T response tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from massdpo.tensors import Batch

GRADIENT_ELEMENTS = 2**22  # gradients of at most this many weights are compared

Way = Callable[[Batch], Tensor]  # to log-probs (B, C)


def misfit(model: nn.Module, causal_lm: PreTrainedModel, plain: Way, packed: Sequence[Way], times: int) -> str:
    """Why the packed ways miss the plain way's log-probs or gradients on a tiny batch; empty if they do not.

    `model` is `causal_lm` or an adapter around it; texts are `times` as long as they need to be.
    """
    device, training = causal_lm.device, model.training
    batch = _batch(causal_lm.config.get_text_config().vocab_size, times).to(device)
    weight_BC = torch.linspace(1, 2, batch.mask_BC.numel(), device=device).view(batch.mask_BC.shape)
    # The smallest weights are enough: their gradients have passed through all that lies above them.
    weights: list[Tensor] = []
    for weight in sorted((w for w in model.parameters() if w.requires_grad), key=torch.numel):
        if not weights or sum(w.numel() for w in weights) + weight.numel() <= GRADIENT_ELEMENTS:
            weights.append(weight)

    def outcome(way: Way) -> list[Tensor]:
        logp_BC = way(batch)
        if not weights:
            return [logp_BC]
        gradients = torch.autograd.grad((logp_BC * weight_BC).sum(), weights, materialize_grads=True)
        return [logp_BC.detach(), torch.cat([gradient.flatten() for gradient in gradients])]

    tolerance = max(torch.finfo(causal_lm.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    model.eval()
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            own = outcome(plain)
            try:
                found = [outcome(way) for way in packed]
            except Exception as error:  # whatever a stranger's forward raises when handed a mask that it does not know
                return f"{type(error).__name__}: {error}".splitlines()[0]
            # A new adapter changes nothing yet, so the gradients of half of its weights are 0 either way.
            tiny = torch.finfo(torch.float32).tiny
            pairs = [pair for way in found for pair in zip(way, own, strict=True)]
            errors = [((a - b).norm() / b.norm().clamp(min=tiny)).item() for a, b in pairs]
            return "" if all(error <= tolerance for error in errors) else f"relative error {max(errors):.1g}"
    finally:
        model.train(training)


def _batch(vocabulary: int, times: int) -> Batch:
    """Two ragged prompts with three and two ragged responses; the longest text has 8 tokens, times `times`."""
    prompt_mask_BP = torch.arange(5 * times) < torch.tensor([[5], [3]]) * times
    response_mask_BCT = torch.arange(3 * times) < torch.tensor([[3, 1, 2], [2, 3, 0]])[..., None] * times
    ids = (torch.arange(28 * times) * 7 + 3) % vocabulary
    ids_BP, ids_BCT = ids[: 10 * times].view(2, -1), ids[10 * times :].view(2, 3, -1)
    names = ["first prompt of the probe", "second prompt of the probe"]
    return Batch(names, torch.arange(2), ids_BP, prompt_mask_BP, ids_BCT, response_mask_BCT)
