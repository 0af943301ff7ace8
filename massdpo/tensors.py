"""The tensors that flow between the rooms: batch -> scores -> pool statistics -> picks.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected negatives,
P prompt tokens, T response tokens, D features. Masks are boolean, True where something real is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Batch:
    """B tokenised prompts with their candidate responses, right-padded to rectangles.

    A response ends with EOS. A candidate that a prompt does not have has no True in `response_mask_BCT`; candidates
    that exist come first.
    """

    ids: list[str]  # example ids, for error messages and for keyed random draws
    index_B: Tensor  # int64, row of the prompt in its split
    prompt_ids_BP: Tensor  # int64
    prompt_mask_BP: Tensor  # bool
    response_ids_BCT: Tensor  # int64
    response_mask_BCT: Tensor  # bool

    @property
    def mask_BC(self) -> Tensor:
        return self.response_mask_BCT.any(-1)

    @property
    def length_BC(self) -> Tensor:
        """Tokens of each response, EOS included; 0 where there is no candidate."""
        return self.response_mask_BCT.sum(-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **tensors)

    def take(self, picks: "Picks") -> "Batch":
        """The same prompts with the chosen response and the picked negatives only (C = 1 + K)."""
        column_BC = torch.nn.functional.pad(picks.index_BK + 1, (1, 0), value=0)
        keep_BC = torch.nn.functional.pad(picks.mask_BK, (1, 0), value=True)
        row_B1 = torch.arange(len(self.ids), device=column_BC.device)[:, None]
        mask_BCT = self.response_mask_BCT[row_B1, column_BC] & keep_BC[..., None]
        longest = int(mask_BCT.sum(-1).max())
        ids_BCT = self.response_ids_BCT[row_B1, column_BC]
        return replace(self, response_ids_BCT=ids_BCT[..., :longest], response_mask_BCT=mask_BCT[..., :longest])

    def chosen_only(self) -> "Batch":
        """The same prompts with the chosen response alone (C = 1), for SFT."""
        longest = int(self.length_BC[:, 0].max())
        return replace(
            self,
            response_ids_BCT=self.response_ids_BCT[:, :1, :longest],
            response_mask_BCT=self.response_mask_BCT[:, :1, :longest],
        )


_TENSORS = ("index_B", "prompt_ids_BP", "prompt_mask_BP", "response_ids_BCT", "response_mask_BCT")


@dataclass
class Picks:
    """The negatives selected for each prompt, in pick order; `index_BK` counts negatives from 0 (column i + 1).

    Where a pool is shorter than k (`short_pool=all`) the rest of the row is False in `mask_BK` and 0 in `index_BK`.
    `info` holds per-prompt numbers a selector wants logged, each `(B,)`.
    """

    index_BK: Tensor  # int64
    mask_BK: Tensor  # bool
    info: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Scores:
    """What one pass says of each candidate: float32 whatever the model's dtype; 0 where `mask_BC` is False."""

    logp_BC: Tensor  # sum of the response tokens' log-probs, nats
    token_logp_BCT: Tensor  # the same a token
    length_BC: Tensor  # int64, tokens of the response
    mask_BC: Tensor  # bool
    features_BCD: Tensor | None = None  # `mean` or `last` hidden state
    gram_BCC: Tensor | None = None  # inner products of the features, where only those exist (`head`)

    @property
    def mean_logp_BC(self) -> Tensor:
        return self.logp_BC / self.length_BC.clamp(min=1)


@dataclass
class Scored:
    """What `PreferenceScorer.forward` returns.

    `scores` covers every candidate of the batch, or, after a selection, the chosen response and the picks (C = 1 + K).
    """

    scores: Scores
    pool: Scores | None = None  # the whole pool, without gradients, where a selection was made
    picks: Picks | None = None
    select_seconds: float = 0.0  # scoring the pool and selecting
    fed_B: Tensor | None = None  # int64, tokens that went through the model for each prompt
    learned_B: Tensor | None = None  # int64, those among them that have gradients


@dataclass
class PoolStatistics:
    """What a selector may look at, for B prompts: tensors only, no model, no text.

    `noise_BN` is uniform in [0, 1), keyed by (seed, epoch, example id): the only source of chance.
    """

    scores: Scores
    ref_logp_BC: Tensor
    beta: float
    noise_BN: Tensor
    ids: Sequence[str]
    observe: bool = True  # are numbers wanted that are only logged?

    @property
    def mask_BN(self) -> Tensor:
        return self.scores.mask_BC[:, 1:]

    @property
    def rewards_BC(self) -> Tensor:
        """Implicit rewards r = beta (logp - ref_logp)."""
        return self.beta * (self.scores.logp_BC - self.ref_logp_BC)

    @property
    def advantage_BN(self) -> Tensor:
        """s_i = r_i - r_0: above 0 where the policy prefers the negative."""
        rewards_BC = self.rewards_BC
        return rewards_BC[:, 1:] - rewards_BC[:, :1]
