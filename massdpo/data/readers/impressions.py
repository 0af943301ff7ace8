"""Impressions: what a user was shown at once, and what of it was clicked. The rest are real negatives.

Each click is an example: the user's history is the prompt, the clicked item the chosen response, and what was shown
but not clicked the pool. MIND's folders (Wu et al., ACL 2020) are read as they are, and so is any table with the
columns history, shown and clicked (`impression_tables.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from massdpo.data.columns import Columns
from massdpo.data.raw import SPLITS, BadRows, Source, ignored_note
from massdpo.data.readers.histories import Prompting
from massdpo.data.readers.impression_tables import USUAL, Impression, ImpressionTables, is_about_items
from massdpo.data.readers.interactions import Ints
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.stored import NumberedSplit, StoredExamples, spooled
from massdpo.data.text import normalise
from massdpo.errors import UserError
from massdpo.store import keyed_seed

HELD_OUT = 0.1  # of the users, or of the impressions (the latest), for each split that has no file of its own

NOTES = {
    "several_clicks": "{} impressions have several clicks: an example for each, none the other's negative",
    "without_click": "{} impressions without a click were left out",
    "short_history": "{} impressions whose history is shorter than dataset.min_history were left out",
    "clicks_without_negative": "{} clicks without a negative (all that was shown was clicked) were left out",
    "clicks_not_shown": "{} clicks are not among what was shown; they count as clicks",
    "titles_shown_again": "{} shown items were left out: another item of the impression has the same title",
    "without_title": "{} mentions of items without a title were left out (dataset.missing_titles)",
    "without_file_of_titles": "there is no file of titles: items are called as the {} impressions call them",
}


@dataclass(frozen=True, kw_only=True)
class Impressions(ImpressionTables, Prompting):
    """Impressions from `path`, with validation and test rows of their own or held out by the seed or by time."""

    path: str | None = None
    splits: Mapping[str, str] | None = None
    split: Literal["user", "time"] = "user"
    min_history: int = 1
    list_candidates: bool = False

    @cached_property
    def _source(self) -> Source:
        if not self.path:
            raise UserError("dataset=impressions needs dataset.path: a table of history, shown, clicked, or a folder")
        return Source(Path(self.path), names=self.splits)

    @cached_property
    def _files(self) -> tuple[dict[str, list[Path]], list[Path]]:
        """The files of impressions by split, and those of titles."""
        source = self._source
        parts = {
            split: [file for file in source.found[name] if not is_about_items(file)]
            for split, name in source.splits.items()
        }
        if not parts.get("train"):
            raise UserError(
                f"{self.path} has no impressions to train on, only {', '.join(source.found)}: "
                "dataset.splits={train: NAME} names the split"
            )
        about_items = [file for files in source.found.values() for file in files if is_about_items(file)]
        return {split: files for split, files in parts.items() if files}, about_items

    def files(self) -> list[Path]:
        """The files that `load` reads: their content and the options decide the outcome."""
        parts, about_items = self._files
        return [*self._source.cards, *(file for files in parts.values() for file in files), *about_items]

    def load(self) -> Splits:
        """Raises UserError for a missing or damaged file, a row that cannot be read, or a split without examples."""
        files, about_items = self._files
        bad, counts, columns = BadRows(self.bad_rows), Counter[str](), Columns(USUAL, self.columns_given(tuple(USUAL)))
        titles = self.titles_in(about_items, bad) if about_items else None
        given: dict[str, StoredExamples] = {}
        keys: dict[str, np.ndarray[Any, Any]] = {}
        for split, tables in files.items():
            impressions = self.impressions(tables, columns, titles, self.split == "time", counts, bad)
            given[split], keys[split] = spooled(self._examples(impressions, counts))
        rows = {split: np.arange(len(each)) for split, each in keys.items()}
        rows |= self._held_out(keys["train"], [split for split in SPLITS if split not in given])
        counts["without_file_of_titles"] = 0 if about_items else counts["impressions"]
        notes = [text.format(counts[name]) for name, text in NOTES.items() if counts[name]]
        found = self._source.found
        notes += ignored_note(name for name in self._source.ignored if not all(map(is_about_items, found[name])))
        for split in SPLITS:
            if not len(rows[split]):
                raise UserError(f"{self.path}: no example for the split {split!r}: {'; '.join(notes) or 'too few'}")
        train, val, test = (NumberedSplit(given.get(split, given["train"]), rows[split], split) for split in SPLITS)
        report = {f"{split}_rows": len(rows[split]) for split in SPLITS} | dict(+counts) | bad.report()
        return Splits(train, val, test, columns.report() | report | {"notes": notes})

    def _held_out(self, keys: np.ndarray[Any, Any], missing: list[str]) -> dict[str, Ints]:
        """The rows of train and of the `missing` splits: by time, or whole users in seeded order."""
        shares = [1 - HELD_OUT * left for left in range(len(missing), 0, -1)]
        spread = keys  # the shares are of these: every row's time, or every user's place once
        if self.split == "user":
            users, user_of = np.unique(keys, return_inverse=True)
            spread = np.random.default_rng(keyed_seed("users", self.seed)).permutation(len(users))
            keys = spread[user_of]
        edges = np.quantile(spread, shares) if len(keys) else np.empty(0)
        part = (keys[:, None] > edges).sum(axis=1)
        return {split: np.flatnonzero(part == number) for number, split in enumerate(["train", *missing])}

    def _examples(
        self, impressions: Iterator[Impression], counts: Counter[str]
    ) -> Iterator[tuple[float, PreferenceExample]]:
        """The examples of all clicks, each with its time, or else a number of its user (or history)."""
        for impression in impressions:
            counts["impressions"] += 1
            user = keyed_seed("user", impression.user or repr(impression.history))
            for example in self._of_impression(impression, counts):
                yield user if impression.time is None else impression.time, example

    def _of_impression(self, impression: Impression, counts: Counter[str]) -> list[PreferenceExample]:
        """One example per click, all with the same pool, in which titles that a reader would call equal are merged."""
        clicked = {normalise(title): title for title in impression.clicked}
        shown = {normalise(title): title for title in impression.shown}
        negatives = [title for key, title in shown.items() if key not in clicked]
        counts["titles_shown_again"] += len(impression.shown) - len(shown)
        counts["clicks_not_shown"] += len(clicked.keys() - shown.keys())
        counts["without_click"] += not clicked
        if not clicked:
            return []
        if len(impression.history) < self.min_history:
            counts["short_history"] += 1
            return []
        if not negatives:
            counts["clicks_without_negative"] += len(clicked)
            return []
        counts["several_clicks"] += len(clicked) > 1
        return [self._example(impression, chosen, negatives) for chosen in clicked.values()]

    def _example(self, impression: Impression, chosen: str, negatives: list[str]) -> PreferenceExample:
        slate = sorted([chosen, *negatives])  # so that the order drawn next does not give the chosen one away
        key = repr((impression.history, slate))
        Random(keyed_seed("impression slate", self.seed, key)).shuffle(slate)
        meta = {} if impression.user is None else {"user": impression.user}
        example = self.example(key, impression.history, chosen, slate, meta)
        return replace(example, id="", where=self._source.inside(impression.where))
