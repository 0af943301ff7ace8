"""Arguments of this package's functions: names and limits checked, defaults filled in.

Suffixes: B prompts, N pool negatives.
"""

import math

import torch
from torch import Tensor

from massdpo.config.messages import nearest
from massdpo.errors import UserError
from massdpo.selection.logdet import limits


def check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raise UserError, with the nearest known name, where `name` is not among `known`."""
    if name not in known:
        raise UserError(f"unknown {what} '{name}'{nearest(str(name), known)}")


def check_exact(pool: int, k: int) -> None:
    """Raise UserError where `exact` would have to look at more than EXACT_LIMIT subsets of a pool."""
    subsets = math.comb(pool, min(k, pool))
    if subsets > limits.EXACT_LIMIT:
        raise UserError(
            f"solver=exact would look at {subsets:,} subsets ({k} of {pool} candidates), above its limit of "
            f"{limits.EXACT_LIMIT:,}: use solver=swap or solver=greedy"
        )


def factor(ridge: float | Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    """scale / ridge, `(B,)` float64."""
    ridge_B = torch.as_tensor(ridge, dtype=torch.float64, device=like.device).expand(like.shape[0])
    return torch.as_tensor(scale, dtype=torch.float64, device=like.device) / ridge_B


def selectable(mask_BN: Tensor | None, like_BN: Tensor) -> Tensor:
    """The mask of what can be selected: the whole pool where none is given."""
    return torch.ones_like(like_BN, dtype=torch.bool) if mask_BN is None else mask_BN
