"""Who met which items in which order: a `Log`; and what all readers share."""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from massdpo.data.text import normalise
from massdpo.errors import UserError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Log:
    """Every user's items, oldest first. `titles` are by item number; users keep the names their file gives them."""

    titles: list[str]
    users: list[str]
    sequences: list[Ints]
    times: list[NDArray[Any]] | None = None  # of each item of each sequence; None: the data has none
    split_of: list[str] | None = None  # the published split of each user; None: there is none
    report: dict[str, Any] = field(default_factory=dict)


def raw_file(raw_dir: str | None, name: str, what: str) -> Path:
    """The file `name` of the raw folder.

    Raises:
        UserError: there is no such file; says what it is and what the folder holds instead.
    """
    if raw_dir is None:
        raise UserError(f"dataset.raw_dir is not set: give the folder that holds {name} ({what})")
    path = Path(raw_dir) / name
    if not path.is_file():
        beside = sorted(each.name for each in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        found = f"the folder holds {', '.join(beside)}" if beside else "the folder is empty or missing"
        raise UserError(f"{path} is missing ({what}): dataset.raw_dir names the folder that holds it; {found}")
    return path


class Interactions:
    """Interactions as they come, kept as numbers; users and items are numbered in order of first appearance.

    Times are whole numbers as long as all are: nanoseconds since 1970 have more digits than a float keeps.
    """

    def __init__(self, titles: Mapping[str, str]):
        self.titles = list(titles.values())
        self.item_of = {item: number for number, item in enumerate(titles)}
        self.user_of: dict[str, int] = {}
        self.user, self.item = array("q"), array("q")
        self.time: Any = array("q")

    def name(self, item: str, title: str) -> None:
        self.item_of[item] = len(self.titles)
        self.titles.append(title)

    def add(self, user: str, item: str, time: float) -> None:
        self.user.append(self.user_of.setdefault(user, len(self.user_of)))
        self.item.append(self.item_of[item])
        try:
            self.time.append(time)
        except (TypeError, OverflowError):  # the first that is no whole number, or too large a one
            self.time = array("d", self.time)
            self.time.append(float(time))

    def log(self, path: Path, report: dict[str, Any], timed: bool = True) -> Log:
        if not self.user:
            raise UserError(f"{path}: no interaction is left to learn from")
        user, item, time = (np.array(column) for column in (self.user, self.item, self.time))
        order = np.lexsort((np.arange(len(user)), time, user))
        ends = np.cumsum(np.bincount(user))[:-1]
        sequences, times = (np.split(column[order], ends) for column in (item, time))
        if timed and (told := _ties(times)):
            report = report | {"equal_times": told}
        return Log(self.titles, list(self.user_of), sequences, times if timed else None, report=report)


def _ties(times: list[NDArray[Any]]) -> str:
    """How many neighbours in the users' sequences have one time: only the file's order says which came first."""
    equal, all_of_them = sum(int((np.diff(each) == 0).sum()) for each in times), sum(len(each) - 1 for each in times)
    return (
        f"{equal} of {all_of_them} neighbours ({equal / all_of_them:.0%}): their order is the file's" if equal else ""
    )


def tidy(log: Log, same: Callable[[str], str] = normalise) -> Log:
    """One number for items of the `same` title; items no one met, and a user's repeats, are left out and counted.

    Numbers go by title, so that slates do not depend on how a source numbers its items.
    """
    keys = [same(title) for title in log.titles]
    title_of: dict[str, str] = {}
    for key, title in sorted(zip(keys, log.titles, strict=True)):
        title_of.setdefault(key, title)
    number_of = {key: number for number, key in enumerate(title_of)}
    canonical = np.array([number_of[key] for key in keys])
    merged = [canonical[sequence] for sequence in log.sequences]
    met = np.unique(np.concatenate(merged))
    kept = [np.sort(np.unique(sequence, return_index=True)[1]) for sequence in merged]
    sequences = [np.searchsorted(met, sequence[keep]) for sequence, keep in zip(merged, kept, strict=True)]
    times = None if log.times is None else [time[keep] for time, keep in zip(log.times, kept, strict=True)]
    report = log.report | {
        "items_merged_by_title": len(log.titles) - len(title_of),
        "items_without_interactions": len(title_of) - len(met),
        "repeats_left_out": sum(map(len, merged)) - sum(map(len, sequences)),
    }
    titles = list(title_of.values())
    return Log([titles[number] for number in met], log.users, sequences, times, log.split_of, report)
