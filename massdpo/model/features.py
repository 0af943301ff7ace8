"""How selectors see a response: hidden-state features, the output matrix's gradient kernel, projected gradients.

Hidden states are those that predict the response's tokens; all are read in float32 whatever the model's dtype.
Suffixes: B prompts, C candidates, T response tokens, D hidden size, V vocabulary (W of it in a chunk), M real tokens of
one prompt, S size of a sketch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FEATURES = ("mean", "last", "head")  # what a selector can ask the scorer for
CHUNK = 8_192  # vocabulary columns of the head kernel held at a time


def mean_features(hidden_BCTD: Tensor, mask_BCT: Tensor) -> Tensor:
    """Mean of the hidden states that predict the response, `(B, C, D)` float32; zeros where there is no candidate."""
    weight_BCT = mask_BCT.float() / mask_BCT.sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bctd,bct->bcd", hidden_BCTD.float(), weight_BCT)


def last_features(hidden_BCTD: Tensor, mask_BCT: Tensor) -> Tensor:
    """The hidden state that predicts the last token, `(B, C, D)` float32; zeros where there is no candidate."""
    steps_T = torch.arange(mask_BCT.shape[-1], device=mask_BCT.device)
    last_BC = (mask_BCT * steps_T).amax(-1)
    index_BC1D = last_BC[..., None, None].expand(*last_BC.shape, 1, hidden_BCTD.shape[-1])
    return hidden_BCTD.gather(2, index_BC1D)[:, :, 0].float() * mask_BCT.any(-1)[..., None]


@torch.no_grad()
def head_kernel(
    hidden_BCTD: Tensor,
    mask_BCT: Tensor,
    targets_BCT: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Inner products `(B, C, C)`, float64, of the gradients of log pi(y|x) with respect to the output matrix.

    The gradient is sum_t e_t h_t^T with e_t = (1[y_t] - P_t) f'(W h_t): P_t the next-token distribution of the logits
    f(W h_t + b), f the model's elementwise logit transform (soft-cap, scale; identity if None). So
    K_ij = sum_{t in i, u in j} <h_t, h_u> <e_t, e_u>, e computed `chunk` columns at a time: no D x V gradient is built.
    With tied embeddings, only the gradient at the output counts. Candidates without tokens have zero rows.
    """
    batch, candidates, _ = mask_BCT.shape
    kernel_BCC = torch.zeros(batch, candidates, candidates, dtype=torch.float64, device=hidden_BCTD.device)
    for prompt in range(batch):
        mask_CT = mask_BCT[prompt]
        hidden_MD = hidden_BCTD[prompt][mask_CT].float()
        residual_MM = _residual_kernel(hidden_MD, targets_BCT[prompt][mask_CT], weight_VD, bias_V, transform, chunk)
        token_MM = (hidden_MD @ hidden_MD.T).double() * residual_MM
        owner_M = mask_CT.nonzero()[:, 0]
        rows_CM = token_MM.new_zeros(candidates, len(owner_M)).index_add(0, owner_M, token_MM)
        kernel_BCC[prompt].index_add_(1, owner_M, rows_CM)
    return kernel_BCC


def _residual_kernel(
    hidden_MD: Tensor,
    target_M: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    transform: Callable[[Tensor], Tensor] | None,
    chunk: int,
) -> Tensor:
    """<e_t, e_u> for all tokens of a prompt, `(M, M)` float64: one pass over V to normalise, one for the products."""
    vocabulary = weight_VD.shape[0]
    starts = range(0, vocabulary, chunk)

    def logits(start: int) -> Tensor:
        columns = slice(start, start + chunk)
        bias_W = None if bias_V is None else bias_V[columns].float()
        return torch.nn.functional.linear(hidden_MD, weight_VD[columns].float(), bias_W)

    def transformed(raw_MW: Tensor) -> tuple[Tensor, Tensor | None]:
        if transform is None:
            return raw_MW, None
        with torch.enable_grad():  # the transform is elementwise, so the gradient of the sum is its derivative
            raw_MW = raw_MW.requires_grad_()
            logits_MW = transform(raw_MW)
            (slope_MW,) = torch.autograd.grad(logits_MW.sum(), raw_MW)
        return logits_MW.detach(), slope_MW

    normaliser_M = torch.full_like(hidden_MD[:, 0], -torch.inf)
    for start in starts:
        normaliser_M = torch.logaddexp(normaliser_M, transformed(logits(start))[0].logsumexp(-1))
    kernel_MM = torch.zeros(len(hidden_MD), len(hidden_MD), dtype=torch.float64, device=hidden_MD.device)
    for start in starts:
        logits_MW, slope_MW = transformed(logits(start))
        residual_MW = -(logits_MW - normaliser_M[:, None]).exp()
        here_M = (target_M >= start) & (target_M < start + chunk)
        residual_MW[here_M, target_M[here_M] - start] += 1.0
        if slope_MW is not None:
            residual_MW = residual_MW * slope_MW
        kernel_MM += (residual_MW @ residual_MW.T).double()
    return kernel_MM


def projected_gradients(logp_C: Tensor, parameters: Sequence[Tensor], size: int, seed: int) -> Tensor:
    """Gradients of each log-probability through the network, projected to `size` numbers: `(C, size)` float32.

    A count sketch: every weight falls into one bucket with a random sign, so inner products are unbiased with a
    relative spread of about 1 / sqrt(size), and no projection matrix is built. Slow: one backward pass per candidate.
    """
    sketch_CS = torch.zeros(len(logp_C), size, device=logp_C.device)
    for candidate in range(len(logp_C)):
        gradients = torch.autograd.grad(logp_C[candidate], parameters, retain_graph=True, allow_unused=True)
        generator = torch.Generator().manual_seed(seed)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            drawn = torch.randint(2 * size, (parameter.numel(),), generator=generator)
            bucket, sign = drawn // 2, drawn % 2 * 2 - 1
            if gradient is not None:  # a parameter this response does not touch, such as an expert's
                signed = gradient.detach().float().flatten() * sign.to(gradient.device)
                sketch_CS[candidate].index_add_(0, bucket.to(gradient.device), signed)
    return sketch_CS
