"""Values of every test prompt, and the paired comparison of runs that share prompts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from massdpo.evaluation.metrics import described
from massdpo.report.reading import PerPrompt
from massdpo.report.statistics import Difference, Floats, crossed_effects

Run = tuple[Any, Any]  # its set of test prompts and its name; NaN for a line that no run made
NO_TEST = Difference(*[np.nan] * 4)
NOT_PER_PROMPT = "not recorded per prompt"


def compare(results: Mapping[str, PerPrompt], metric: str, pairs: list[tuple[Run, Run]]) -> tuple[Any, ...]:
    """(difference, low, high, p, pairs compared, note) of runs against the baseline's, one pair per seed.

    `results` are those of each run by its name. The note says why there is no test.
    """
    shared = [pair for pair in pairs if pair[0][0] == pair[1][0]]
    if not shared:
        kept = any(isinstance(run[0], str) for run, _ in pairs)
        return (*NO_TEST, 0, "no shared seeds and prompts" if kept else "start")
    if len({run[0] for run, _ in shared}) > 1:
        return (*NO_TEST, 0, "prompts differ between seeds")
    values = [prompt_values(results[name], metric) for pair in shared for _, name in pair]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return (*NO_TEST, 0, NOT_PER_PROMPT)
    difference_SP = np.array(known[::2]) - np.array(known[1::2])
    if not np.isfinite(difference_SP).all():
        return (*NO_TEST, 0, "not a number")
    found = crossed_effects(difference_SP)
    return (*found, len(shared), "the same for all prompts" if np.isnan(found.p) else "")


def prompt_values(results: PerPrompt, metric: str) -> Floats | None:
    """(prompts,) values of a metric over the test prompts of a run; None if they were not recorded."""
    known = described(metric)
    if known.column not in results:
        return None
    values = results[known.column].astype(np.float64)
    return values if known.of_rank is None else known.of_rank(torch.from_numpy(values)).double().numpy()
