"""Values of every test prompt, and the paired comparison of runs that share prompts."""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from massdpo.evaluation.metrics import described
from massdpo.report.rows import Prompts
from massdpo.report.statistics import Difference, crossed_effects

Floats = NDArray[np.float64]
# A run's place: its set of test prompts (not a string: it has none) and its place in the arrays of that set
RunPlace = tuple[Any, int]
NO_TEST = Difference(*[np.nan] * 4)
NOT_PER_PROMPT = "not kept per prompt"


class PerPrompt:
    """Values of every test prompt, and their paired comparison."""

    def __init__(self, prompts: Prompts):
        self._values = cache(partial(prompt_values, prompts))

    def compare(self, metric: str, pairs: list[tuple[RunPlace, RunPlace]]) -> tuple[Any, ...]:
        """(difference, low, high, p, pairs compared, note) of runs and those of the baseline, one pair per seed.

        The note says why there is no test.
        """
        shared = [(run, base) for run, base in pairs if isinstance(run[0], str) and run[0] == base[0]]
        if not shared:
            kept = any(isinstance(run[0], str) for run, _ in pairs)
            return (*NO_TEST, 0, "no shared seeds and prompts" if kept else "start")
        prompt_sets = {run[0] for run, _ in shared}
        if len(prompt_sets) > 1:
            return (*NO_TEST, 0, "prompts differ between seeds")
        values = self._values(prompt_sets.pop(), metric)
        if values is None:
            return (*NO_TEST, 0, NOT_PER_PROMPT)
        difference_SP = np.array([values[run[1]] - values[base[1]] for run, base in shared])
        if not np.isfinite(difference_SP).all():
            return (*NO_TEST, 0, "not a number")
        found = crossed_effects(difference_SP)
        return (*found, len(shared), "the same for all prompts" if np.isnan(found.p) else "")


def prompt_values(prompts: Prompts, key: str, metric: str) -> Floats | None:
    """(runs, prompts) values of a metric over one set of test prompts; None where they were not kept."""
    known = described(metric)
    kept = prompts.get(f"{key}/{known.column}")
    if not known.column or kept is None:
        return None
    if known.of_rank is None:
        return kept.astype(np.float64)
    return known.of_rank(torch.from_numpy(kept.astype(np.float64))).double().numpy()
