"""The rows of a recommendation split: which items are targets, and each row as a prompt and a pool when it is read.

Users or times are split; every item that a user met after `min_history` others is the target of a row.

Shapes: R rows, C = 1 + N candidates, E (user, item) pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from massdpo.data.raw import SPLITS
from massdpo.data.readers.interactions import Ints, Log
from massdpo.data.schema import PreferenceExample
from massdpo.data.slates import CleanSlates, legacy_slate
from massdpo.data.stored import Lazy
from massdpo.errors import UserError
from massdpo.store import keyed_seed

BLOCK = 4096  # rows whose slates are drawn together
SHARES = (0.8, 0.9)  # of users or of time: where training ends and where testing begins

# (before the history, the question after it); candidates, if listed, follow the question
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
    """The options of every data set of histories; `conf/dataset/lastfm.yaml` says what each does."""

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
        """The pool is the other candidates in slate order; the prompt shows the latest `max_history` items."""
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


def rows_of(log: Log, split: str, seed: int, min_history: int) -> dict[str, Ints]:
    """The rows of each split: the places of their targets in the log."""
    position_E = np.arange(len(log.item_E)) - log.start_U[log.user_E]
    target_R = np.flatnonzero(position_E >= min_history)
    part_R = _time_part(log)[target_R] if split == "time" else _user_part(log, split, seed)[log.user_E[target_R]]
    rows = {name: target_R[part_R == part] for part, name in enumerate(SPLITS)}
    for name, each in rows.items():
        if not len(each):
            raise UserError(
                f"the {name} split is empty: too few users or too short histories (min_history={min_history})"
            )
    return rows


def _user_part(log: Log, split: str, seed: int) -> Ints:
    """Each user's split as 0, 1, 2: the published one, or the users cut 8 : 1 : 1 in seeded or first-seen order."""
    if log.split_of is not None:
        return np.array([SPLITS.index(name) for name in log.split_of])
    users = len(log.users)
    if split == "first_seen":
        if log.time_E is None:
            raise UserError("dataset.split=first_seen needs times, and this data has none: use dataset.split=user")
        order = np.argsort(log.time_E[log.start_U], kind="stable")
    else:
        order = np.random.default_rng(keyed_seed("users", seed)).permutation(users)
    val = int(SHARES[0] * users)
    test = val + int((SHARES[1] - SHARES[0] + 1e-9) * users)
    part = np.zeros(users, dtype=np.int64)
    part[order[val:test]] = 1
    part[order[test:]] = 2
    return part


def _time_part(log: Log) -> Ints:
    """The split of each (user, item) pair by its time: before, between or after the 80 % and 90 % points of all."""
    if log.time_E is None:
        raise UserError("dataset.split=time needs times, and this data has none: use dataset.split=user")
    val, test = np.quantile(log.time_E, SHARES)
    return (log.time_E > val).astype(np.int64) + (log.time_E > test)


@dataclass(eq=False)
class RecommendationSplit(Lazy[PreferenceExample]):
    """The rows of one split, each made when it is asked for; reading in order draws many slates at once.

    Without `slates`, they are drawn as LastFM's were published. With `tell_met`, `meta["met"]` lists the items that the
    user met before the target.
    """

    name: str
    log: Log
    target_R: Ints  # their places in the log
    slates: CleanSlates | None
    prompting: Prompting
    tell_met: bool = False

    def __len__(self) -> int:
        return len(self.target_R)

    def _at(self, row: int) -> PreferenceExample:
        return next(self._examples(row, row + 1))

    def __iter__(self) -> Iterator[PreferenceExample]:
        for start in range(0, len(self), BLOCK):
            yield from self._examples(start, min(start + BLOCK, len(self)))

    def _examples(self, start: int, stop: int) -> Iterator[PreferenceExample]:
        log, titles = self.log, self.log.titles
        target_R = self.target_R[start:stop]
        user_R = log.user_E[target_R]
        first_R = log.start_U[user_R]
        if self.slates is not None:
            slates = self.slates.draw(start, user_R, log.item_E[target_R]).tolist()
        else:
            slates = [
                legacy_slate(len(titles), log.item_E[first : target + 1].tolist())
                for first, target in zip(first_R, target_R, strict=True)
            ]
        places = zip(user_R.tolist(), first_R.tolist(), target_R.tolist(), strict=True)
        for row, (user, first, target), slate in zip(range(start, stop), places, slates, strict=True):
            meta: dict[str, Any] = {"user": log.users[user], "position": target - first}
            if self.tell_met:
                meta["met"] = log.item_E[first:target].tolist()
            shown = log.item_E[max(first, target - self.prompting.max_history) : target]
            yield self.prompting.example(
                f"{self.name}/{row}",
                [titles[item] for item in shown],
                titles[log.item_E[target]],
                [titles[item] for item in slate],
                meta,
            )
