"""What the functions of this package are given: checked, and defaults filled in.

Suffixes: B prompts, N pool negatives.
"""

import math
from difflib import get_close_matches

import torch
from torch import Tensor

from massdpo.errors import UserError
from massdpo.selection.logdet import limits


def check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raise UserError, with the nearest known name, where `name` is not among `known`."""
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown {what} '{name}': {hint}it is one of {', '.join(known)}")


def check_exact(pool: int, k: int) -> None:
    """Raise UserError where `exact` would have to look at more than EXACT_LIMIT subsets of a pool."""
    subsets = math.comb(pool, min(k, pool))
    if subsets > limits.EXACT_LIMIT:
        raise UserError(
            f"solver=exact would look at {subsets:,} subsets ({k} of {pool} candidates), above its limit of "
            f"{limits.EXACT_LIMIT:,}: use solver=swap or solver=greedy"
        )


def check_rows_finite(gram: Tensor) -> None:
    """Raise UserError, naming the first rows, where what belongs to a prompt (its row) is not finite."""
    if not math.isfinite(float(gram.sum())):  # one pass; only where it is not, look closer
        rows = (~gram.isfinite().flatten(1).all(-1)).nonzero()[:, 0].tolist()
        if rows:
            raise UserError(
                f"features or rewards that are not finite in {len(rows)} of {len(gram)} prompts: rows {rows[:5]}"
            )


def factor(ridge: float | Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    """scale / ridge, `(B,)` float64. Raises UserError for a ridge that is not positive."""
    ridge_B = torch.as_tensor(ridge, dtype=torch.float64, device=like.device).expand(like.shape[0])
    wrong_B = ~((ridge_B > 0) & ridge_B.isfinite())
    if bool(wrong_B.any()):
        raise UserError(f"the ridge must be a positive number, got {float(ridge_B[wrong_B][0]):g}")
    return torch.as_tensor(scale, dtype=torch.float64, device=like.device) / ridge_B


def selectable(mask_BN: Tensor | None, like_BN: Tensor) -> Tensor:
    """The mask of what can be selected: all of the pool where none is given."""
    return torch.ones_like(like_BN, dtype=torch.bool) if mask_BN is None else mask_BN
