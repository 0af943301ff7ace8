"""Selection as a function of tensors, for code that brings its own log-probs and features.

Suffixes: B prompts, N pool negatives, C = 1 + N candidates (column 0 is the chosen one), K selected, D features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from massdpo import selection
from massdpo.errors import UserError
from massdpo.tensors import CandidateScores, PoolStatistics


class Selection(NamedTuple):
    """The picked negatives in pick order; column i of the negatives is column i + 1 of the candidates."""

    indices_BK: Tensor  # int64, 0 where `mask_BK` is False
    mask_BK: Tensor  # bool, False where a pool had fewer than k
    gains_BK: Tensor | None  # nats of log det that each pick added; None for selectors that do not maximise it
    certificate_B: Tensor | None  # a proved lower bound on the share of the best log det, 0 to 1; None likewise


def select(
    logp_BC: Tensor,
    ref_logp_BC: Tensor,
    features_BCD: Tensor,
    k: int = 4,
    beta: float = 0.1,
    mask_BC: Tensor | None = None,
    selector: str = "mass",
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Pick k of each prompt's N rejected responses: MASS-DPO (arXiv 2605.10784), or another selector by its name.

    `logp_BC`, `ref_logp_BC`: summed log-probs of the responses under the policy and the reference, nats, the chosen
    response in column 0; equal ones (no training yet) leave diversity to decide. `features_BCD`: a vector per response,
    such as its mean last hidden state or any embedding. `mask_BC`: True where a candidate exists. `options`: those of
    conf/selector (`ridge`, `solver`, ...). Ties are decided by `seed`.

    Raises:
        UserError: an unknown selector or option, features=head, a pool below k, values that are not finite.
    """
    pick = selector_named(selector, k, **options)
    if pick.features == "head":
        raise UserError("features=head are a model's gradients: give vectors as features_BCD and leave `features` out")
    mask_BC = torch.ones_like(logp_BC, dtype=torch.bool) if mask_BC is None else mask_BC
    # The tokens are not known here: log-probs are read at the resolution of a single one (1e-3 nats).
    scores = CandidateScores(logp_BC, logp_BC[..., None], mask_BC.long(), mask_BC, features_BCD)
    generator = torch.Generator().manual_seed(seed)
    noise_BN = torch.rand(logp_BC.shape[0], logp_BC.shape[1] - 1, generator=generator, dtype=torch.float64)
    ids = [str(row) for row in range(len(logp_BC))]
    picks = pick(PoolStatistics(scores, ref_logp_BC, beta, noise_BN.to(logp_BC.device), ids))
    return Selection(picks.index_BK, picks.mask_BK, picks.gains_BK, picks.info.get("certified_ratio"))


def selector_named(name: str, k: int, **options: Any) -> selection.Selector:
    """The selector of that name in conf/selector, built to pick k and with these options.

    Raises:
        UserError: there is no selector of that name, or it has no such option.
    """
    kind = getattr(selection, "".join(part.title() for part in name.split("_")), None)
    if not isinstance(kind, type):
        raise UserError(f"unknown selector {name!r}: use mass, or another name in conf/selector")
    try:
        return kind(k=k, **options) if name != "full" else kind(**options)
    except TypeError as error:
        raise UserError(f"selector {name}: {error}") from error
