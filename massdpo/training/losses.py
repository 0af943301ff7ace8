"""Preference losses: one pure function each, rewards in, per-prompt loss out.

Every loss has the signature `loss(rewards_BC, mean_logp_BC, mask_BC) -> loss_B`:
    rewards_BC    implicit rewards r = beta (log pi - log pi_ref) of the chosen response (column 0) and the negatives
    mean_logp_BC  mean token log-prob of each response under the policy, nats; only `mppo` uses it
    mask_BC       True where a candidate exists; column 0 always does
A loss with a fourth parameter, log_inclusion_BK, is given that of the picks: see `is_pl`.
Shapes: B prompts, C = 1 + K candidates.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from massdpo.errors import UserError

TIE = 0.01  # rewards that differ by less rank alike in `lipo`: at the start all do, but for rounding


def pl(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """Plackett-Luce: -log P(chosen wins) = log(1 + sum_i exp(r_i - r_0)) (S-DPO, 2406.09215; MASS-DPO, 2605.10784)."""
    rejected_B = torch.logsumexp(rewards_BC[:, 1:].masked_fill(~mask_BC[:, 1:], -torch.inf), dim=-1)
    return -F.logsigmoid(rewards_BC[:, 0] - rejected_B)  # 1 - softmax would round to 0 where the chosen one is ahead


def is_pl(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor, log_inclusion_BK: Tensor) -> Tensor:
    """Plackett-Luce corrected for how its negatives were drawn: log(1 + sum_i exp(r_i - r_0) / inclusion_i).

    `log_inclusion_BK`: how much likelier each was to be drawn than the chosen one, had that been a negative (McFadden
    1978; sampled softmax, Bengio and Senecal 2008; IS-DPO, arXiv 2509.25717). As prompts grow its minimum is that of
    the whole pool's loss; that of `pl` is so for uniform draws only.
    """
    log_inclusion_BK = log_inclusion_BK.clamp(max=1e4)  # infinite where a pick says nothing: its term is 0 either way
    return pl(torch.cat([rewards_BC[:, :1], rewards_BC[:, 1:] - log_inclusion_BK], dim=1), mean_logp_BC, mask_BC)


def dpo(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """DPO on one negative: -log sigma(r_0 - r_1) (arXiv 2305.18290, Eq. 7).

    Raises:
        UserError: there are several.
    """
    if rewards_BC.shape[1] != 2:
        raise UserError("loss=dpo takes one negative per prompt: use k=1, or loss=pl or pairwise")
    chosen_B, rejected_B = rewards_BC.unbind(-1)
    return -F.logsigmoid(chosen_B - rejected_B)


def dmpo(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """Direct multi-preference optimisation: -log sigma(r_0 - mean_i r_i) (arXiv 2405.16127)."""
    return -F.logsigmoid(rewards_BC[:, 0] - _mean_of_negatives(rewards_BC, mask_BC))


def mppo(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """Multi pair-wise preference optimisation, without a reference (arXiv 2412.15244):
    -log sigma(K p_0 - sum_i p_i), p = exp(mean token log-prob)."""
    probability_BC = mean_logp_BC.exp() * mask_BC
    count_B = mask_BC[:, 1:].sum(-1)
    return -F.logsigmoid(count_B * probability_BC[:, 0] - probability_BC[:, 1:].sum(-1))


def pairwise(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """The mean of K DPO terms: mean_i -log sigma(r_0 - r_i)."""
    return _mean_of_negatives(-F.logsigmoid(rewards_BC[:, :1] - rewards_BC), mask_BC)


def lipo(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """LiPO-lambda (arXiv 2402.01878) with labels 1 and 0: sum_i |1/D(rank_0) - 1/D(rank_i)| -log sigma(r_0 - r_i).

    D(rank) = log2(1 + rank); ranks are by the rewards in steps of TIE, without gradients. Ties count against the chosen
    one, and tied negatives share the mean of 1/D over the ranks that they hold.
    """
    value_BC = (rewards_BC.detach() / TIE).round().masked_fill(~mask_BC, -torch.inf)
    chosen_B1, value_BK = value_BC[:, :1], value_BC[:, 1:]
    above_BK = (value_BK[:, None] > value_BK[..., None]).sum(-1) + (chosen_B1 > value_BK)
    tied_BK = (value_BK[:, None] == value_BK[..., None]).sum(-1)
    rank_C = torch.arange(1, value_BC.shape[1] + 1, device=value_BC.device)
    discount_C = 1 / (1 + rank_C).to(rewards_BC.dtype).log2()
    until_C = F.pad(discount_C.cumsum(0), (1, 0))
    shared_BK = (until_C[above_BK + tied_BK] - until_C[above_BK]) / tied_BK
    weight_BK = (discount_C[(value_BK >= chosen_B1).sum(-1, keepdim=True)] - shared_BK).abs() * mask_BC[:, 1:]
    return -(weight_BK * F.logsigmoid(rewards_BC[:, :1] - rewards_BC[:, 1:])).sum(-1)


def ndcg(rewards_BC: Tensor, mean_logp_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """1 - NDCG of the chosen response at its smooth rank, 1 + sum_i sigma(r_i - r_0) (ApproxNDCG, Qin et al. 2010)."""
    above_BC = torch.sigmoid(rewards_BC - rewards_BC[:, :1]) * mask_BC
    return 1 - 1 / torch.log2(2 + above_BC[:, 1:].sum(-1))


def _mean_of_negatives(value_BC: Tensor, mask_BC: Tensor) -> Tensor:
    mask_BK = mask_BC[:, 1:]
    return torch.where(mask_BK, value_BC[:, 1:], 0.0).sum(-1) / mask_BK.sum(-1)
