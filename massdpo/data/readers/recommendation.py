"""Recommendation: a user's items so far are the prompt, the next one is the chosen response, others are the pool.

Rows are made when they are read (`histories.py`), so memory does not grow with their number.

Shapes: E (user, item) pairs.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from massdpo.data.raw import SPLITS, BadRows
from massdpo.data.readers import public_logs
from massdpo.data.readers.histories import Prompting, RecommendationSplit, rows_of
from massdpo.data.readers.interactions import Log, raw_file, tidy
from massdpo.data.readers.tables import Tables
from massdpo.data.schema import Splits
from massdpo.data.slates import LEGACY_HISTORY, LEGACY_NEGATIVES, CleanSlates
from massdpo.data.text import normalise
from massdpo.errors import UserError


def near_key(title: str) -> str:
    """The same for titles that differ only in case, spacing, punctuation or a leading article."""
    words = re.sub(r"[^\w\s]", " ", normalise(title).replace("&", " and ")).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words) or title


LEGACY_ITEMS = LEGACY_HISTORY + 1 + LEGACY_NEGATIVES
MERGES: dict[str, Callable[[str], str]] = {"equal": normalise, "near": near_key}


@dataclass(frozen=True, kw_only=True)
class Recommendation(Prompting, ABC):
    """The options of every recommendation dataset; `conf/dataset/lastfm.yaml` says what each does."""

    raw_dir: str | None = None
    num_negatives: int = 19
    split: Literal["user", "first_seen", "time"] = "user"
    negatives: Literal["uniform", "popularity"] = "uniform"
    candidates: Literal["sampled", "all"] = "sampled"
    merge_titles: Literal["equal", "near"] = "equal"

    def __post_init__(self) -> None:
        if self.candidates == "all" and self.list_candidates:
            raise UserError(
                "dataset.candidates=all ranks every item, so no prompt may list some: set dataset.list_candidates=false"
            )

    @property
    def legacy(self) -> bool:
        """Are slates drawn as LastFM's were published, which gives targets away?"""
        return False

    @abstractmethod
    def files(self) -> list[Path]:
        """The raw files that `load` reads: their content and the options decide the outcome."""

    @abstractmethod
    def log(self, bad: BadRows) -> Log: ...

    def load(self) -> Splits:
        """Raises UserError for a missing or damaged raw file, or a pool that cannot be filled."""
        bad = BadRows(self.bad_rows)
        log = self.log(bad)
        if not len(log.item_E):
            raise UserError(f"{self.files()[0]}: no interaction is left to learn from")
        if not self.legacy:
            log = tidy(log, MERGES[self.merge_titles])
        elif len({normalise(title) for title in log.titles}) < max(len(log.titles), LEGACY_ITEMS):
            raise UserError(
                f"dataset.slate=legacy needs at least {LEGACY_ITEMS} different titles, and none twice: use "
                "dataset.slate=clean"
            )
        rows = rows_of(log, self.split, self.seed, self.min_history)
        weights_I = None
        if self.negatives == "popularity":  # plus one: an item that is never a target could not be a negative
            weights_I = np.bincount(log.item_E[rows["train"]], minlength=len(log.titles)).astype(np.float64) + 1
        seen_E = np.unique(log.user_E * len(log.titles) + log.item_E)

        def split_of(name: str) -> RecommendationSplit:
            clean = CleanSlates(self.seed, name, self.num_negatives, len(log.titles), seen_E, weights_I)
            return RecommendationSplit(
                name,
                log,
                rows[name],
                None if self.legacy else clean,
                self,
                tell_met=name == "test" and self.candidates == "all",
            )

        splits = {name: split_of(name) for name in SPLITS}
        report = {
            "users": len(log.users),
            "items": len(log.titles),
            "interactions": len(log.item_E),
            **{f"{split}_rows": len(splits[split]) for split in SPLITS},
            **log.report,
            **bad.report(),
        }
        catalogue = tuple(log.titles) if self.candidates == "all" else ()
        return Splits(splits["train"], splits["val"], splits["test"], report, catalogue=catalogue)


@dataclass(frozen=True, kw_only=True)
class LastFM(Recommendation):
    """Next artist on Last.fm (HetRec 2011, as cut by LLaRA and S-DPO): 976 / 122 / 122 users as published.

    The folder holds either `sequences.jsonl` and `id2name.txt`, or S-DPO's three ready-made `lastfm-*.json`, of which
    only the sequences are used. LLaRA's tables are pickles, which can run code: they are never loaded, and
    `conf/dataset/lastfm.yaml` says how to turn them into `sequences.jsonl`.
    """

    noun: Literal["item", "film", "artist"] = "artist"
    slate: Literal["clean", "legacy"] = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.legacy and self.num_negatives != LEGACY_NEGATIVES:
            raise UserError(f"dataset.slate=legacy has {LEGACY_NEGATIVES} negatives: set dataset.num_negatives=19")
        if self.split != "user":
            raise UserError(f"dataset.split={self.split}: LastFM has no times, only its published split by user")

    @property
    def legacy(self) -> bool:
        return self.slate == "legacy"

    def _is_ready_made(self) -> bool:
        folder = Path(self.raw_dir or "")
        return not (folder / "sequences.jsonl").is_file() and any(folder.glob("lastfm-*.json"))

    def _ready(self) -> dict[str, Path]:
        what = "S-DPO's ready-made 20-candidate rows"
        return {split: raw_file(self.raw_dir, f"lastfm-{split}.json", what) for split in SPLITS}

    def files(self) -> list[Path]:
        if self._is_ready_made():
            return list(self._ready().values())
        folder = Path(self.raw_dir or "")
        if not (folder / "sequences.jsonl").is_file() and (tables := sorted(folder.glob("*.df"))):
            raise UserError(
                f"{tables[0]} is one of LLaRA's pickled tables, which can run code and are never loaded: "
                "conf/dataset/lastfm.yaml has the lines that turn them into sequences.jsonl"
            )
        return [
            raw_file(self.raw_dir, "sequences.jsonl", "split, user and items of every user, or S-DPO's lastfm-*.json"),
            raw_file(self.raw_dir, "id2name.txt", "lines <id>::<artist>"),
        ]

    def log(self, bad: BadRows) -> Log:
        if self._is_ready_made():
            return public_logs.chain_ready_rows(self._ready(), bad)
        sequences, names = self.files()
        return public_logs.read_lastfm_sequences(sequences, names, bad)


@dataclass(frozen=True, kw_only=True)
class UserSequences(Tables, Recommendation):
    """Your own interactions, or MovieLens: a table of user, item, time and one of item, title (`tables.py`)."""

    def __post_init__(self) -> None:
        Tables.__post_init__(self)
        Recommendation.__post_init__(self)
