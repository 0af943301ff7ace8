"""A mean paired difference over seeds and prompts, with its interval and p value, and Holm's correction.

Suffixes: S seeds, P test prompts, Q quadrature nodes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Floats = NDArray[np.float64]
LEVEL = 0.95


class Difference(NamedTuple):
    """A mean paired difference, its 95% interval and two-sided p value (NaN: not estimable)."""

    mean: float
    low: float
    high: float
    p: float


def crossed_effects(difference_SP: Floats) -> Difference:
    """Mean of paired differences under crossed random effects: seeds (rows) and prompts (columns) are both samples.

    All seeds answer the same prompts: difference = mean + seed + prompt + seed x prompt. Components come from the mean
    squares of the two-way analysis of variance, negative ones set to 0. A few seeds say little about the seeds' mean
    square, so p is averaged over what it may truly be, (S - 1) MS / chi2(S - 1), never less than the interaction's: a
    generalised p value (Tsui and Weerahandi 1989; Weerahandi 1993). Where seeds dominate, it is the t test over seeds;
    where they do not matter, nearly the t test over prompts. Satterthwaite's degrees of freedom, the usual way, give
    p < .001 up to 28 times too often with 3 seeds: a mean square of 2 degrees of freedom is often near 0 by chance.

    One seed gives the t test over prompts, which says nothing about other seeds, and one prompt that over seeds. If all
    differences are 0, p is 1; if all are another number, there is no spread to judge by and the rest is NaN.
    """
    seeds, prompts = difference_SP.shape
    mean = float(difference_SP.mean())
    if np.ptp(difference_SP) <= 1e-12 * abs(mean):
        return Difference(mean, *((0.0, 0.0, 1.0) if mean == 0 else (np.nan,) * 3))
    if prompts == 1:
        return crossed_effects(difference_SP.T)
    by_prompt = seeds * difference_SP.mean(0).var(ddof=1)  # mean squares
    if seeds == 1:
        error_Q, weight_Q = np.array([np.sqrt(by_prompt / prompts)]), np.ones(1)
    else:
        by_seed = prompts * difference_SP.mean(1).var(ddof=1)
        rest_SP = difference_SP - difference_SP.mean(0) - difference_SP.mean(1, keepdims=True) + mean
        rest = (rest_SP**2).sum() / ((seeds - 1) * (prompts - 1))
        error_Q, weight_Q = possible_errors(by_seed, by_prompt, rest, seeds, prompts)
    # Errors fall from node to node: so far out p is below 0.02 for those before this one and 0.022 for the others.
    far = 30 * error_Q[np.searchsorted(weight_Q.cumsum(), 0.02)]
    half = optimize.brentq(lambda at: p_value(at, error_Q, weight_Q, prompts) - (1 - LEVEL), 0, far, xtol=1e-9 * far)
    return Difference(mean, mean - half, mean + half, float(p_value(abs(mean), error_Q, weight_Q, prompts)))


def possible_errors(by_seed: Any, by_prompt: Any, rest: Any, seeds: int, prompts: int) -> tuple[Floats, Floats]:
    """Possible standard errors of the mean, given the three mean squares, and the probability of each.

    Mean squares may be arrays whose last axis, of length 1, takes the values.
    """
    quantile_Q, weight_Q = _chi_square(seeds - 1)
    of_seeds_Q = np.maximum((seeds - 1) * by_seed / quantile_Q - rest, 0)
    return np.sqrt((of_seeds_Q + np.maximum(by_prompt, rest)) / (seeds * prompts)), weight_Q


def p_value(distance: Any, error_Q: Floats, weight_Q: Floats, prompts: int) -> Any:
    """Two-sided: the probability of a mean at least this far from the true one."""
    return 2 * special.stdtr(prompts - 1, -distance / error_Q) @ weight_Q


@lru_cache
def _chi_square(freedom: int) -> tuple[Floats, Floats]:
    """Quantiles of the chi-square distribution, and the probability around each; dense towards 0, where errors are
    largest, so that even a p value of 1e-9 is made up of several nodes."""
    edges = np.concatenate([np.geomspace(1e-14, 0.1, 300), np.linspace(0.1, 1, 301)[1:]])
    return 2 * special.gammaincinv(freedom / 2, np.sqrt(edges[1:] * edges[:-1])), np.diff(edges)


def holm(p_values: Sequence[float]) -> Floats:
    """p values adjusted by Holm's step-down method (Holm 1979), in the order given; NaN (not tested) stays NaN."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted
