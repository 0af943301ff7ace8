"""Values of every test prompt, and the paired comparison of runs that share prompts."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from massdpo.evaluation.metrics import described
from massdpo.report.rows import Prompts
from massdpo.report.statistics import Difference, crossed_effects

Floats = NDArray[np.float64]
Run = tuple[Any, Any]  # its set of test prompts and its name; NaN for a line that no run made
NO_TEST = Difference(*[np.nan] * 4)
NOT_PER_PROMPT = "not recorded per prompt"


class PerPrompt:
    """Values of every test prompt, and their paired comparison."""

    def __init__(self, prompts: dict[str, Prompts]):
        def values(name: str, metric: str) -> Floats | None:
            return prompt_values(prompts[name], metric)

        self._values = cache(values)

    def compare(self, metric: str, pairs: list[tuple[Run, Run]]) -> tuple[Any, ...]:
        """(difference, low, high, p, pairs compared, note) of runs against the baseline's, one pair per seed.

        The note says why there is no test.
        """
        shared = [(run, base) for run, base in pairs if isinstance(run[0], str) and run[0] == base[0]]
        if not shared:
            kept = any(isinstance(run[0], str) for run, _ in pairs)
            return (*NO_TEST, 0, "no shared seeds and prompts" if kept else "start")
        if len({run[0] for run, _ in shared}) > 1:
            return (*NO_TEST, 0, "prompts differ between seeds")
        values = [self._values(name, metric) for pair in shared for _, name in pair]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return (*NO_TEST, 0, NOT_PER_PROMPT)
        difference_SP = np.array(known[::2]) - np.array(known[1::2])
        if not np.isfinite(difference_SP).all():
            return (*NO_TEST, 0, "not a number")
        found = crossed_effects(difference_SP)
        return (*found, len(shared), "the same for all prompts" if np.isnan(found.p) else "")


def prompt_values(prompts: Prompts, metric: str) -> Floats | None:
    """(prompts,) values of a metric over the test prompts of a run; None if they were not recorded."""
    known = described(metric)
    if (kept := prompts.get(known.column)) is None:
        return None
    if known.of_rank is None:
        return kept.astype(np.float64)
    return known.of_rank(torch.from_numpy(kept.astype(np.float64))).double().numpy()
