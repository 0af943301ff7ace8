"""How much likelier a pick was to be drawn than the chosen response would have been: what the loss `is_pl` corrects.

A Plackett-Luce choice seen among D = {chosen} + S alone, S drawn by a rule, follows P(j given D) ~ exp(r_j) P(D less j
is drawn, were j the chosen one) (McFadden 1978, "Modelling the choice of residential location"). Without the second
factor the choice is fitted wrongly however many prompts there are, unless the rule is uniform. Where candidates are
drawn independently, that factor is one over the chance that j is drawn: the correction of sampled softmax.

Suffixes: B prompts, C = 1 + N candidates (column 0 is the chosen one), K selected, J = 1 + K candidates of D, X nodes.
"""

import math

import torch
from torch import Tensor

from massdpo.tensors import Picks, members


def of_successive_draws(rewards_BC: Tensor, mask_BC: Tensor, picks: Picks) -> Tensor:
    """Log of how much likelier each pick was, `(B, K)`, for draws one after the other in proportion to exp(r).

    The K first of clocks that ring at rates w = exp(r): with W what the others' rates sum to, the chance of D less j is
    the integral of W exp(-W t) prod_i (1 - exp(-w_i t)) over t > 0 and i in D less j. In x = log(W t) the integrand is
    smooth and dies away on both sides, where equal steps integrate to float64's precision.
    """
    member_BJ, real_BJ, taken_BC = _members(rewards_BC.double(), mask_BC, picks)
    others_B1 = rewards_BC.double().masked_fill(taken_BC | ~mask_BC, -torch.inf).logsumexp(-1, keepdim=True)
    none_left_B1 = others_B1.isinf()
    size = member_BJ.shape[1]  # the integrand peaks at x = log(size) at most, and no narrower than 1 / root of size
    end, step = math.log(size + 8 * size**0.5 + 40), min(0.25, 0.8 / size**0.5)
    x_X = torch.arange(-32.0, end, step, dtype=torch.float64, device=rewards_BC.device)
    log_rate_BJ = member_BJ - others_B1.masked_fill(none_left_B1, 0.0)
    log_rung_BJX = _log_rung(log_rate_BJ[..., None] + x_X) * real_BJ[..., None]
    without_BJX = log_rung_BJX.sum(1, keepdim=True) - log_rung_BJX
    log_chance_BJ = (x_X - x_X.exp() + without_BJX).logsumexp(-1)
    return (log_chance_BJ[:, :1] - log_chance_BJ[:, 1:]).masked_fill(none_left_B1 | ~picks.mask_BK, 0.0)


def of_draws_from_the_top(value_BC: Tensor, mask_BC: Tensor, picks: Picks, top: int) -> Tensor:
    """The same for uniform draws from the `top` largest values, of which chance takes the last where they tie.

    Infinite for a pick where the chosen one would not have been among the largest: seen there, it was sure to win.
    """
    _, _, taken_BC = _members(value_BC, mask_BC, picks)
    column_BJ1 = picks.column_BC[..., None]
    others_BJC = mask_BC[:, None].expand(-1, column_BJ1.shape[1], -1).scatter(2, column_BJ1, False)
    drawn_BJC = taken_BC[:, None] & others_BJC
    value_BJC = value_BC[:, None].expand_as(others_BJC).masked_fill(~others_BJC, -torch.inf)
    size_B1 = (mask_BC.sum(-1, keepdim=True) - 1).clamp(max=top)
    last_BJ1 = size_B1[:, None].expand(-1, column_BJ1.shape[1], 1) - 1
    least_BJ1 = value_BJC.sort(-1, descending=True).values.gather(2, last_BJ1)
    tied_BJC = (value_BJC == least_BJ1) & others_BJC
    tied_BJ, drawn_BJ = tied_BJC.sum(-1), (drawn_BJC & tied_BJC).sum(-1)
    room_BJ = size_B1 - (value_BJC > least_BJ1).sum(-1)
    impossible_BJ = (drawn_BJC & (value_BJC < least_BJ1)).any(-1) | (drawn_BJ > room_BJ)
    left_BJ = (room_BJ - drawn_BJ).clamp(min=0)
    log_chance_BJ = _log_choices(tied_BJ - drawn_BJ, left_BJ) - _log_choices(tied_BJ, room_BJ)
    log_chance_BJ = log_chance_BJ.masked_fill(impossible_BJ, -torch.inf)
    return (log_chance_BJ[:, :1] - log_chance_BJ[:, 1:]).masked_fill(~picks.mask_BK, 0.0)


def _members(value_BC: Tensor, mask_BC: Tensor, picks: Picks) -> tuple[Tensor, Tensor, Tensor]:
    """Values of D, which of them are real, and where D lies among the candidates."""
    column_BJ = picks.column_BC
    real_BJ = torch.nn.functional.pad(picks.mask_BK, (1, 0), value=True)
    return value_BC.gather(1, column_BJ), real_BJ, members(column_BJ, real_BJ, mask_BC.shape[1])


def _log_rung(log_time: Tensor) -> Tensor:
    """log(1 - exp(-t)) from log t, where t may leave float64's range."""
    return torch.where(log_time < -30, log_time, (-torch.expm1(-log_time.clamp(max=700).exp())).log())


def _log_choices(all_: Tensor, taken: Tensor) -> Tensor:
    """log of the binomial coefficient."""
    all_, taken = all_.double(), taken.double()
    return (all_ + 1).lgamma() - (taken + 1).lgamma() - (all_ - taken + 1).lgamma()
