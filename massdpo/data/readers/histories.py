"""The rows of a recommendation split: which (user, position) pairs they are, and each as a prompt and a pool when read.

Users or times are split; then every position from `min_history` on of a sequence is a row, the item there its target.

Shapes: R rows, C = 1 + N candidates, E interactions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from massdpo.data.raw import SPLITS
from massdpo.data.readers.interactions import Ints, Log
from massdpo.data.schema import PreferenceExample
from massdpo.data.slates import CleanSlates, legacy_slate
from massdpo.data.stored import Lazy
from massdpo.errors import UserError
from massdpo.store import keyed_seed

BLOCK = 4096  # rows whose slates are drawn at once
SHARES = (0.8, 0.9)  # where training ends and testing begins, of users or of time

# Wordings: (what stands before the history, the question after it). Candidates, if listed, follow the question.
WORDINGS = {
    "artist": (
        ("Artists a listener has played, oldest first: ", ". Which artist is played next?"),
        ("Here is the recent listening of one person: ", ". Name the artist that comes next."),
        ("After playing ", ", a listener puts on one more artist. Which one?"),
        ("A listening history reads ", ". Continue it with one artist."),
    ),
    "film": (
        ("Films a viewer has watched, oldest first: ", ". Which film is watched next?"),
        ("Here is the recent viewing of one person: ", ". Name the film that comes next."),
        ("After watching ", ", a viewer picks one more film. Which one?"),
        ("A viewing history reads ", ". Continue it with one film."),
    ),
    "item": (
        ("Items a user has chosen, oldest first: ", ". Which item is chosen next?"),
        ("Here are the recent choices of one person: ", ". Name the item that comes next."),
        ("After choosing ", ", a user takes one more item. Which one?"),
        ("A history of choices reads ", ". Continue it with one item."),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """The options that every data set of histories has; `conf/dataset/lastfm.yaml` says what each does."""

    noun: Literal["item", "film", "artist"] = "item"
    seed: int = 0
    prompts: Literal["one", "several"] = "one"
    list_candidates: bool = True
    min_history: int = 3
    max_history: int = 10
    bad_rows: Literal["error", "skip"] = "error"

    def example(
        self, id: str, history: list[str], chosen: str, candidates: list[str], meta: dict[str, Any]
    ) -> PreferenceExample:
        """The pool is the other candidates in slate order; only the latest `max_history` items are shown."""
        wordings = WORDINGS[self.noun]
        place = keyed_seed("wording", self.seed, id) % len(wordings) if self.prompts == "several" else 0
        before, question = wordings[place]
        history = history[-self.max_history :]
        listed = f" Choices: {'; '.join(candidates)}." if self.list_candidates else ""
        return PreferenceExample(
            id=id,
            prompt=f"{before}{', '.join(history)}{question}{listed} Answer:",
            chosen=chosen,
            pool=tuple(title for title in candidates if title != chosen),
            candidates=tuple(candidates),
            history=tuple(history),
            history_start=len(before),
            meta=meta,
        )


@dataclass(frozen=True)
class Targets:
    """Which (user, position) pairs are the rows of a split, in order."""

    user_R: Ints
    position_R: Ints


def rows_of(log: Log, split: str, seed: int, min_history: int) -> dict[str, Targets]:
    length = np.array([len(sequence) for sequence in log.sequences])
    count = np.maximum(length - min_history, 0)
    user_R = np.repeat(np.arange(len(length)), count)
    position_R = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + min_history
    part_R = _time_part(log, user_R, position_R) if split == "time" else _user_part(log, split, seed)[user_R]
    rows = {name: Targets(user_R[part_R == part], position_R[part_R == part]) for part, name in enumerate(SPLITS)}
    for name, each in rows.items():
        if not len(each.user_R):
            raise UserError(
                f"the {name} split is empty: too few users or too short histories (min_history={min_history})"
            )
    return rows


def _user_part(log: Log, split: str, seed: int) -> Ints:
    """Each user's split as 0, 1, 2: the published one, or 8 : 1 : 1 of the users in seeded or first-seen order."""
    if log.split_of is not None:
        return np.array([SPLITS.index(name) for name in log.split_of])
    users = len(log.users)
    if split == "first_seen":
        if log.times is None:
            raise UserError("dataset.split=first_seen needs times, and this data has none: use dataset.split=user")
        order = np.argsort([times[0] for times in log.times], kind="stable")
    else:
        order = np.random.default_rng(keyed_seed("users", seed)).permutation(users)
    val = int(SHARES[0] * users)
    test = val + int((SHARES[1] - SHARES[0] + 1e-9) * users)
    part = np.zeros(users, dtype=np.int64)
    part[order[val:test]] = 1
    part[order[test:]] = 2
    return part


def _time_part(log: Log, user_R: Ints, position_R: Ints) -> Ints:
    """Each row's split by when its target was met: before, between or after the 80 % and 90 % points of all times."""
    if log.times is None:
        raise UserError("dataset.split=time needs times, and this data has none: use dataset.split=user")
    time_E = np.concatenate(log.times)
    start = np.concatenate([[0], np.cumsum([len(times) for times in log.times])[:-1]])
    val, test = np.quantile(time_E, SHARES)
    time_R = time_E[start[user_R] + position_R]
    return (time_R > val).astype(np.int64) + (time_R > test)


def times_met(log: Log, train: Targets) -> NDArray[np.float64]:
    """How often each item is a training target, plus one: an item that is never drawn could not be a negative."""
    target_R = targets(log, train.user_R, train.position_R)
    return np.bincount(target_R, minlength=len(log.titles)).astype(np.float64) + 1


@dataclass(eq=False)
class RecommendationSplit(Lazy[PreferenceExample]):
    """The rows of one split, each made when it is asked for; reading in order draws slates by the block.

    Without `slates` they are drawn as LastFM's were published. With `tell_met`, `meta["met"]` has the items that the
    user met before the target.
    """

    name: str
    log: Log
    rows: Targets
    slates: CleanSlates | None
    prompting: Prompting
    tell_met: bool = False

    def __len__(self) -> int:
        return len(self.rows.user_R)

    def _at(self, row: int) -> PreferenceExample:
        return next(self._examples(row, row + 1))

    def __iter__(self) -> Iterator[PreferenceExample]:
        for start in range(0, len(self), BLOCK):
            yield from self._examples(start, min(start + BLOCK, len(self)))

    def _examples(self, start: int, stop: int) -> Iterator[PreferenceExample]:
        user_R, position_R = self.rows.user_R[start:stop], self.rows.position_R[start:stop]
        slates = self._slates(start, user_R, position_R)
        titles = self.log.titles
        for row, user, position, slate in zip(
            range(start, stop), user_R.tolist(), position_R.tolist(), slates, strict=True
        ):
            meta: dict[str, Any] = {"user": self.log.users[user], "position": position}
            if self.tell_met:
                meta["met"] = self.log.sequences[user][:position].tolist()
            yield self.prompting.example(
                f"{self.name}/{row}",
                [titles[item] for item in self.log.sequences[user][:position][-self.prompting.max_history :].tolist()],
                titles[self.log.sequences[user][position]],
                [titles[item] for item in slate],
                meta,
            )

    def _slates(self, start: int, user_R: Ints, position_R: Ints) -> list[list[int]]:
        if self.slates is not None:
            slate_RC: list[list[int]] = self.slates.draw(start, user_R, targets(self.log, user_R, position_R)).tolist()
            return slate_RC
        return [
            legacy_slate(len(self.log.titles), self.log.sequences[user][: position + 1].tolist())
            for user, position in zip(user_R.tolist(), position_R.tolist(), strict=True)
        ]


def targets(log: Log, user_R: Ints, position_R: Ints) -> Ints:
    """The item at each (user, position)."""
    return np.array([log.sequences[user][position] for user, position in zip(user_R, position_R, strict=True)])
