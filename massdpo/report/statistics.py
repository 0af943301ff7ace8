"""Paired bootstrap over seeds and prompts, its cache, and Holm's correction.

Suffixes: S seeds, P test prompts, R resamples.
"""

import csv
import io
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from massdpo import store

Floats = NDArray[np.float64]
RESAMPLES = 10_000
CHUNK = 1000  # resamples at once: keeps the floating copy of the (R, P) counts small


class Difference(NamedTuple):
    """A mean paired difference, its 95% interval and two-sided p value."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(difference_SP: Floats, seed: int, resamples: int = RESAMPLES) -> Difference:
    """Mean of paired differences that share seeds (rows) and test prompts (columns), by resampling both.

    All seeds answer the same prompts, so rows and columns are drawn independently of each other (Owen 2007, "The
    pigeonhole bootstrap"): drawing prompts anew within each seed would take prompts for independent that are not, and
    give too narrow an interval. The seeds' deviations are stretched by sqrt(S / (S - 1)), without which the spread over
    few seeds comes out too small. With one seed only prompts are drawn, and the result says nothing of other seeds.
    p is two-sided, of the normal distribution with the resamples' standard deviation: shares of the resamples end at
    1 / R, and no difference in a table of some hundreds could stay below 0.05 after Holm's correction.
    """
    seeds, prompts = difference_SP.shape
    mean = difference_SP.mean()
    stretch = np.sqrt(seeds / (seeds - 1)) - 1 if seeds > 1 else 0.0
    stretched_SP = difference_SP + stretch * (difference_SP.mean(1, keepdims=True) - mean)
    count_RS, count_RP = _draws(seed, seeds, prompts, resamples)
    parts = []
    for start in range(0, resamples, CHUNK):
        of_prompts_RS = count_RP[start : start + CHUNK].astype(np.float64) @ stretched_SP.T
        parts.append((count_RS[start : start + CHUNK] * of_prompts_RS).sum(1) / difference_SP.size)
    mean_R = np.concatenate(parts)
    low, high = np.quantile(mean_R, [0.025, 0.975])
    spread = mean_R.std()
    same = 1.0 if mean == 0 else 1 / resamples  # where all differences are equal
    p = 2 * stats.norm.sf(abs(mean) / spread) if spread > 1e-12 * abs(mean) else same
    return Difference(float(mean), float(low), float(high), float(p))


@lru_cache(maxsize=4)  # the comparisons of a table have few shapes, and may share their draws
def _draws(seed: int, seeds: int, prompts: int, resamples: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """How often each seed and each prompt is drawn in each resample."""
    generator = np.random.default_rng(seed)
    count_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples).astype(np.uint16)
    count_RP = np.empty((resamples, prompts), dtype=np.uint16)
    for resample in range(resamples):
        count_RP[resample] = np.bincount(generator.integers(prompts, size=prompts), minlength=prompts)
    return count_RS, count_RP


def holm(p_values: Sequence[float]) -> Floats:
    """p values adjusted by Holm's step-down method (Holm 1979), in the order given; NaN (not tested) stays NaN."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted


class BootstrapCache:
    """Results of `paired_bootstrap` by the content of their data, in a CSV file that is committed beside the rows."""

    def __init__(self, path: Path):
        self.path = path
        self.computed = 0
        self._known: dict[str, Difference] = {}
        self._used: dict[str, Difference] = {}
        if path.exists():
            lines = list(csv.reader(path.read_text(encoding="utf-8", errors="replace").splitlines()))[1:]
            sound = [line for line in lines if len(line) == 6 and line[5] == _checksum(line[:5])]
            self._known = {key: Difference(*map(float, numbers)) for key, *numbers, _ in sound}
            if len(sound) < len(lines):
                told = f"{path}: {len(lines) - len(sound)} damaged line(s) are left out and computed again"
                print(f"warning: {told}", file=sys.stderr)

    def difference(self, difference_SP: Floats) -> Difference:
        key = store.digest("pigeonhole, normal p", RESAMPLES, list(difference_SP.shape), difference_SP.tobytes())
        if key not in self._known:
            self._known[key] = paired_bootstrap(difference_SP, store.keyed_seed("pigeonhole"))
            self.computed += 1
        self._used[key] = self._known[key]
        return self._used[key]

    def write(self) -> None:
        """Keep what was used since reading, so that the file holds what its tables need and no more."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["key", *Difference._fields, "checksum"])
        for key, difference in sorted(self._used.items()):
            line = [key, *map(repr, difference)]
            writer.writerow([*line, _checksum(line)])
        store.write_text(self.path, text.getvalue())


def _checksum(line: Sequence[str]) -> str:
    return store.digest(list(line))[:8]
