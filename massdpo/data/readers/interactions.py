"""Who met which items in which order: a `Log`.

Shapes: E (user, item) pairs, U users.
"""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from massdpo.data.text import normalise
from massdpo.errors import UserError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Log:
    """The items that users met: user after user, and each user's oldest first."""

    titles: list[str]  # by item number
    users: list[str]  # by user number, as their file names them
    user_E: Ints
    item_E: Ints
    time_E: NDArray[Any] | None = None  # None: the data has no times
    split_of: list[str] | None = None  # the published split of each user; None: there is none
    report: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def start_U(self) -> Ints:
        """Where the items of each user begin."""
        return np.searchsorted(self.user_E, np.arange(len(self.users)))


def raw_file(raw_dir: str | None, name: str, what: str) -> Path:
    """The file `name` of the raw folder.

    Raises:
        UserError: there is no such file; says what it should hold and what the folder has instead.
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
    """Collects interactions one by one; users and items are numbered in order of first appearance.

    Times stay whole numbers as long as all of them are: nanoseconds since 1970 have more digits than a float keeps.
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
        except (TypeError, OverflowError):  # the first time that is not a whole number, or too large
            self.time = array("d", self.time)
            self.time.append(float(time))

    def log(self, path: Path, report: dict[str, Any], timed: bool = True) -> Log:
        if not self.user:
            raise UserError(f"{path}: no interaction is left to learn from")
        order = np.lexsort((np.array(self.time), np.array(self.user)))  # stable: ties keep the file's order
        user_E, item_E, time_E = (np.array(column)[order] for column in (self.user, self.item, self.time))
        if timed:
            neighbours = user_E[1:] == user_E[:-1]
            ties, pairs = int((neighbours & (time_E[1:] == time_E[:-1])).sum()), int(neighbours.sum())
            if ties:
                order_of_ties = f"{ties} of {pairs} neighbours ({ties / pairs:.0%}): their order is the file's"
                report = report | {"equal_times": order_of_ties}
        return Log(self.titles, list(self.user_of), user_E, item_E, time_E if timed else None, report=report)


def tidy(log: Log, same: Callable[[str], str] = normalise) -> Log:
    """Merge items whose titles are the `same`; leave out, and count, items that nobody met and a user's repeats.

    Items are numbered by title, so that slates do not depend on how a source numbers them.
    """
    keys = [same(title) for title in log.titles]
    title_of: dict[str, str] = {}
    for key, title in sorted(zip(keys, log.titles, strict=True)):
        title_of.setdefault(key, title)
    titles, number_of = list(title_of.values()), {key: number for number, key in enumerate(title_of)}
    merged_E = np.array([number_of[key] for key in keys])[log.item_E]
    first = np.sort(np.unique(log.user_E * len(titles) + merged_E, return_index=True)[1])
    met, item_E = np.unique(merged_E[first], return_inverse=True)
    report = log.report | {
        "items_merged_by_title": len(log.titles) - len(titles),
        "items_without_interactions": len(titles) - len(met),
        "repeats_left_out": len(merged_E) - len(first),
    }
    time_E = None if log.time_E is None else log.time_E[first]
    return Log([titles[number] for number in met], log.users, log.user_E[first], item_E, time_E, log.split_of, report)
