"""The tensors that flow between the rooms: batch -> scores -> pool statistics -> picks.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected negatives,
P prompt tokens, T response tokens, D features. Masks are boolean, True where something real is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


def first(count_B: Tensor, width: int) -> Tensor:
    """`(B, width)`, True in the first `count_B` places of each row."""
    return torch.arange(width, device=count_B.device) < count_B[:, None]


def members(index_BK: Tensor, mask_BK: Tensor, width: int) -> Tensor:
    """`(B, width)`, True at the indices of each row that `mask_BK` calls real."""
    count_BW = torch.zeros(len(index_BK), width, dtype=torch.int64, device=index_BK.device)
    return count_BW.scatter_add(1, index_BK, mask_BK.long()) > 0


def rows(index: Tensor) -> Tensor:
    """0..B-1, shaped to index the first dimension beside `index`."""
    return torch.arange(len(index), device=index.device).view(-1, *[1] * (index.dim() - 1))


@dataclass
class Batch:
    """B tokenised prompts with their candidate responses, right-padded to rectangles.

    A response ends with EOS. Where a prompt has fewer candidates than others, the missing ones come last and have no
    True in `response_mask_BCT`.
    """

    ids: list[str]  # example ids, for error messages and for keyed random draws
    index_B: Tensor  # int64, row of the prompt in its split; stays on the CPU, like the tables that it indexes
    prompt_ids_BP: Tensor  # int64
    prompt_mask_BP: Tensor  # bool
    response_ids_BCT: Tensor  # int64
    response_mask_BCT: Tensor  # bool
    column_BC: Tensor | None = None  # int64, which of the prompt's candidates these are, after `take`

    @property
    def mask_BC(self) -> Tensor:
        return self.response_mask_BCT.any(-1)

    @property
    def place_BC(self) -> Tensor:
        """The place of each candidate among all of its prompt's candidates."""
        here_C = torch.arange(self.response_ids_BCT.shape[1], device=self.response_ids_BCT.device)
        return here_C.expand(len(self.ids), -1) if self.column_BC is None else self.column_BC

    @property
    def length_BC(self) -> Tensor:
        """Tokens of each response, EOS included; 0 where there is no candidate."""
        return self.response_mask_BCT.sum(-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **tensors)

    def take(self, picks: "Picks") -> "Batch":
        """The same prompts with the chosen response and the picked negatives only (C = 1 + K)."""
        column_BC = picks.column_BC
        keep_BC = torch.nn.functional.pad(picks.mask_BK, (1, 0), value=True)
        row_B1 = rows(column_BC)
        mask_BCT = self.response_mask_BCT[row_B1, column_BC] & keep_BC[..., None]
        longest = int(mask_BCT.sum(-1).max())
        ids_BCT = self.response_ids_BCT[row_B1, column_BC][..., :longest]
        place_BC = self.place_BC[row_B1, column_BC]
        return replace(self, response_ids_BCT=ids_BCT, response_mask_BCT=mask_BCT[..., :longest], column_BC=place_BC)

    def whole(self, picks: "Picks") -> "Picks":
        """Picks from the candidates of this batch, as places in the prompt's whole pool."""
        return replace(picks, index_BK=(self.place_BC.gather(1, picks.index_BK + 1) - 1) * picks.mask_BK)

    def chosen_only(self) -> "Batch":
        """The same prompts with the chosen response alone (C = 1), for SFT."""
        none_BK = self.place_BC[:, :0]
        return self.take(Picks(none_BK, none_BK.bool()))


_TENSORS = ("prompt_ids_BP", "prompt_mask_BP", "response_ids_BCT", "response_mask_BCT")


@dataclass
class Picks:
    """The negatives selected for each prompt, in pick order; `index_BK` counts negatives from 0 (column i + 1).

    Where a pool is shorter than k (`short_pool=all`) the rest of the row is False in `mask_BK` and 0 in `index_BK`.
    `info` holds per-prompt numbers a selector wants logged, each `(B,)`.
    """

    index_BK: Tensor  # int64
    mask_BK: Tensor  # bool
    info: dict[str, Tensor] = field(default_factory=dict)
    gains_BK: Tensor | None = None  # nats of log det that each pick added, for selectors that maximise it
    log_inclusion_BK: Tensor | None = None  # log of how much likelier it was drawn than the chosen one would have been
    beta_scale_BK: Tensor | None = None  # factor on beta where the pick is compared with the chosen one

    @property
    def column_BC(self) -> Tensor:
        """Columns of the chosen response and of the picks among the candidates, `(B, 1 + K)`."""
        return torch.nn.functional.pad(self.index_BK + 1, (1, 0))

    def to(self, device: torch.device | str) -> "Picks":
        """What a loss needs, without what is only logged."""
        names = ("index_BK", "mask_BK", "log_inclusion_BK", "beta_scale_BK")
        values = {name: getattr(self, name) for name in names}
        return Picks(**{name: value.to(device) for name, value in values.items() if value is not None})


class Resolution(NamedTuple):
    """How closely two passes over one policy agree, whatever their batches, layouts and processes: closer is a tie.

    Rounding errors of a response's tokens add up like a random walk. Measured on SmolLM2-135M, responses of 2 to 80
    tokens, batches of 1 to 12 and repeated prompts: at most 3.5e-5 nats times the root of the tokens in float32 and .25
    in bfloat16; cosines of centred features differ by up to 2.5e-6 and .03.
    """

    nats: float  # of a response's log-prob, per root of its tokens
    features: float  # relative, of inner products


RESOLUTION = {
    torch.float64: Resolution(1e-9, 1e-10),
    torch.float32: Resolution(1e-3, 1e-4),
    torch.float16: Resolution(0.06, 0.01),
    torch.bfloat16: Resolution(0.5, 0.05),
}


@dataclass
class CandidateScores:
    """What one pass finds of each candidate: float32 whatever the model's dtype; 0 where `mask_BC` is False."""

    logp_BC: Tensor  # sum of the response tokens' log-probs, nats
    token_logp_BCT: Tensor  # the same per token
    length_BC: Tensor  # int64, tokens of the response
    mask_BC: Tensor  # bool
    features_BCD: Tensor | None = None  # `mean` or `last` hidden state
    gram_BCC: Tensor | None = None  # inner products of the features, where only those exist (`head`)
    precision: torch.dtype = torch.float32  # what the model computed in: see RESOLUTION

    @property
    def mean_logp_BC(self) -> Tensor:
        return self.logp_BC / self.length_BC.clamp(min=1)


@dataclass
class ScorerOutput:
    """What `PreferenceScorer.forward` returns.

    `scores` covers every candidate of the batch, or, after a selection, the chosen response and the picks (C = 1 + K).
    """

    scores: CandidateScores
    pool: CandidateScores | None = None  # the whole pool, without gradients, where a selection was made
    picks: Picks | None = None
    select_seconds: float = 0.0  # scoring the pool and selecting
    fed_B: Tensor | None = None  # int64, tokens that went through the model for each prompt
    learned_B: Tensor | None = None  # int64, how many of them had gradients


@dataclass
class PoolStatistics:
    """What a selector may look at, for B prompts: tensors only, no model, no text.

    Log-probs and rewards are read at the resolution of the arithmetic that produced them, so that rounding decides no
    pick: values that differ by less are equal, and `noise_BN` decides. It is uniform in [0, 1), keyed by (seed, epoch,
    example id), and the only source of chance.
    """

    scores: CandidateScores
    ref_logp_BC: Tensor
    beta: float
    noise_BN: Tensor
    ids: Sequence[str]
    observe: bool = True  # whether numbers that are only logged are wanted

    @property
    def mask_BN(self) -> Tensor:
        return self.scores.mask_BC[:, 1:]

    @property
    def resolution(self) -> Resolution:
        return RESOLUTION[self.scores.precision]

    @property
    def logp_BC(self) -> Tensor:
        """The policy's log-probs, float64 nats."""
        return self._to_resolution(self.scores.logp_BC.double())

    @property
    def mean_logp_BC(self) -> Tensor:
        """The same per token."""
        return self.logp_BC / self.scores.length_BC.clamp(min=1)

    @property
    def rewards_BC(self) -> Tensor:
        """Implicit rewards r = beta (logp - ref_logp), float64."""
        return self.beta * self._to_resolution(self.scores.logp_BC.double() - self.ref_logp_BC)

    def _to_resolution(self, nats_BC: Tensor) -> Tensor:
        unit_BC = self.resolution.nats * self.scores.length_BC.clamp(min=1).double().sqrt()
        return (nats_BC / unit_BC).round() * unit_BC

    @property
    def advantage_BN(self) -> Tensor:
        """s_i = r_i - r_0: above 0 where the policy prefers the negative."""
        rewards_BC = self.rewards_BC
        return rewards_BC[:, 1:] - rewards_BC[:, :1]
