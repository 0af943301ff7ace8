"""Guesses without any model: by popularity, and by what the slates give away.

Popularity ranks candidates by how often each is a target in training. The look-up is a table from target to slate and
position, learned from the other splits: slates drawn by the target give themselves away (public LastFM preprocessing),
clean ones leave it at chance. Both guess evenly among equals, so their metrics are expectations over such guesses.

Suffix: S prompts of a split.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from massdpo.data.schema import PreferenceExample, Splits
from massdpo.evaluation.metrics import ranking_values
from massdpo.store import Cache, digest, package_code, write_json

Guess = Callable[[PreferenceExample], list[float]]  # a score for each candidate of the slate


def baselines(splits: Splits, cache: Cache) -> dict[str, float]:
    """`popularity/<metric>` and `lookup/<metric>` on the test split, for `metrics.json`; computed once per dataset.

    Empty where prompts have no history: only recommendation has these baselines.
    """
    if not splits.test[0].history:
        return {}

    def build(folder: Path) -> None:
        write_json(folder / "baselines.json", guess_metrics(splits))

    folder = cache.folder("baselines", digest(package_code("data", "evaluation", "store"), splits.digest), build)
    values: dict[str, float] = json.loads((folder / "baselines.json").read_text(encoding="utf-8"))
    return values


def guess_metrics(splits: Splits) -> dict[str, float]:
    """The ranking metrics of both baselines on the test split."""
    guesses = {"popularity": popularity(splits), "lookup": lookup(splits)}
    return {
        f"{name}/{metric}": value
        for name, guess in guesses.items()
        for metric, value in guessed(guess, splits.test).metrics().items()
    }


def leak_check(splits: Splits) -> dict[str, float]:
    """How often the look-up finds the target of a test prompt.

    Returns:
        `accuracy`, the `chance` of guessing evenly, the `standard_error` of guessing so, and `matched`, the share of
        rows where something matched. All are shares of rows.
    """
    found = guessed(lookup(splits), splits.test)
    chance_S = 1 / found.size_S
    return {
        "accuracy": found.metrics()["accuracy"],
        "chance": float(chance_S.mean()),
        "standard_error": float(np.sqrt((chance_S * (1 - chance_S)).mean() / len(chance_S))),
        "matched": float((found.best_S > 0).mean()),
    }


def popularity(splits: Splits) -> Guess:
    count = Counter(example.chosen for example in splits.train)
    return lambda example: [count[candidate] for candidate in example.candidates]


def lookup(splits: Splits) -> Guess:
    """The table keeps, of each target, the place where it stood most often and the negatives beside it there first.

    A candidate matches as far as it stands at its own remembered place and among its own remembered negatives. One
    that was never a target is judged by another one's memory, so that having been a target gives nothing away: how
    often a candidate is a target is what popularity measures.
    """
    table = _remember(chain(splits.train, splits.val))
    memories = list(table.values()) or [(-1, frozenset())]

    def guess(example: PreferenceExample) -> list[float]:
        slate, scores = set(example.candidates), []
        for place, candidate in enumerate(example.candidates):
            usual, beside = table.get(candidate) or memories[crc32(candidate.encode()) % len(memories)]
            scores.append((usual == place) + len(slate & beside) / (len(slate) - 1))
        return scores

    return guess


def _remember(examples: Iterable[PreferenceExample]) -> dict[str, tuple[int, frozenset[str]]]:
    places: dict[str, Counter[int]] = {}
    beside: dict[tuple[str, int], frozenset[str]] = {}
    for example in examples:
        place = example.candidates.index(example.chosen)
        places.setdefault(example.chosen, Counter())[place] += 1
        beside.setdefault((example.chosen, place), frozenset(example.pool))
    table = {}
    for target, counter in places.items():
        usual = counter.most_common(1)[0][0]
        table[target] = (usual, beside[target, usual])
    return table


@dataclass(frozen=True)
class SlateRanks:
    """Where the target of each prompt stands among the scores of its slate."""

    above_S: NDArray[np.int64]  # candidates that score higher
    equal_S: NDArray[np.int64]  # candidates that score the same, itself included
    size_S: NDArray[np.int64]  # all candidates
    best_S: NDArray[np.float64]  # the highest score

    def metrics(self) -> dict[str, float]:
        """Expected ranking metrics, every order of equals being as likely."""
        row_R = np.repeat(np.arange(len(self.equal_S)), self.equal_S)  # R: each rank that each target can have
        first_S = np.cumsum(self.equal_S) - self.equal_S
        rank_R = 1 + self.above_S[row_R] + np.arange(len(row_R)) - first_S[row_R]
        values = ranking_values(torch.from_numpy(rank_R))
        return {
            name: float((np.add.reduceat(value_R.numpy(), first_S) / self.equal_S).mean())
            for name, value_R in values.items()
        }


def guessed(guess: Guess, examples: Iterable[PreferenceExample]) -> SlateRanks:
    above, equal, size, best = [], [], [], []
    for example in examples:
        scores = guess(example)
        target = scores[example.candidates.index(example.chosen)]
        above.append(sum(score > target for score in scores))
        equal.append(scores.count(target))
        size.append(len(scores))
        best.append(max(scores))
    return SlateRanks(np.array(above), np.array(equal), np.array(size), np.array(best, np.float64))
