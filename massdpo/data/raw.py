"""The one door for data from outside: a file, a folder or a hub data set becomes splits of rows, each with its place.

Which files belong to which split is decided here, once; exactly the `Source.files` are read. No code that comes with a
data set is run, and nothing outside its folder is read.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from massdpo.data.containers import SUFFIXES, USUAL_READING, PlacedRow, Reading, placed_rows
from massdpo.data.text import reading_errors
from massdpo.errors import UserError, one_line
from massdpo.store import plain_yaml

SPLITS = ("train", "val", "test")
# the usual names of splits, the clearest first; names of one word are also found inside longer ones
NAMES = {
    "train": ("train", "train_prefs", "training"),
    "val": ("validation", "val", "valid", "dev", "eval", "validation_prefs", "val_prefs"),
    "test": ("test", "test_prefs", "testing"),
}
WORDS = {word: split for split, words in NAMES.items() for word in words if "_" not in word}
WORD = re.compile(rf"(?<![a-z0-9])({'|'.join(WORDS)})(?![a-z0-9])")
SHARD = re.compile(r"[-_.]\d{5}[-_]of[-_]\d{5}.*$")


class BadRows:
    """What to do about a row that cannot be read: `error` raises what is wrong with it, `skip` counts it."""

    def __init__(self, policy: str):
        self.policy = policy
        self.count = 0
        self.first = ""

    def __call__(self, error: UserError) -> None:
        if self.policy == "error":
            raise error
        self.count += 1
        self.first = self.first or str(error)

    def report(self) -> dict[str, Any]:
        return {"bad_rows_skipped": self.count, "first_bad_row": self.first} if self.count else {}


@dataclass
class Source:
    """The rows at a path, by split.

    `place` is a file; a folder of files, whose splits are in their names, in their folders' names or in the card
    README.md (with several configurations, `subset` is one of them); or what `datasets.save_to_disk` wrote. `names`
    says which of the splits found there are train, val and test; without it, those with the usual names are. Files
    whose names contain no split are train. `outside`: links, or lists of files in the folder, may lead elsewhere.
    `parts`: the files of each split, where they are known already.

    Raises:
        UserError: there is nothing, or nothing that could hold rows; a file is outside the folder; a split is missing.
    """

    place: Path
    reading: Reading = USUAL_READING
    subset: str | None = None
    names: Mapping[str, str] | None = None
    outside: bool = False
    parts: Mapping[str, list[Path]] | None = None
    cards: list[Path] = field(default_factory=list, init=False)  # files that say which files belong to which split

    def __post_init__(self) -> None:
        self.place = self.place.expanduser()
        _check_name(self.place)
        if unknown := [name for name in self.names or () if name not in SPLITS]:
            raise UserError(f"dataset.splits.{unknown[0]} is not allowed: use {', '.join(SPLITS)}")

    @cached_property
    def found(self) -> dict[str, list[Path]]:
        """The files of every split, by the name that the split has here."""
        shown = str(self.place) if str(self.place).isprintable() else repr(str(self.place))
        with reading_errors(shown):
            if not self.place.exists():
                raise UserError(f"{shown} cannot be read: No such file or directory")
            if self.place.is_file():
                return {"train": [self.place]}
            if not self.place.is_dir():
                raise UserError(f"{shown} cannot be read: neither a file nor a folder")
        parts = dict(self.parts or self._saved() or self._by_card() or self._by_name())
        for files in parts.values():
            for file in files:
                _check_name(file)
                self._check_inside(file)
                if not file.is_file():
                    raise UserError(f"{file} is missing, although {self.place} lists it")
        return parts

    @cached_property
    def splits(self) -> dict[str, str]:
        """Which of train, val and test there are, and what each is called here."""
        if self.names:
            for split, name in self.names.items():
                if name not in self.found:
                    raise UserError(f"dataset.splits.{split}={name}: {self.place} has {', '.join(self.found)}")
            return dict(self.names)
        lower = {name.lower(): name for name in reversed(self.found)}
        usual = {split: next((lower[name] for name in names if name in lower), "") for split, names in NAMES.items()}
        for name in self.found:
            if (word := WORD.search(name.lower())) and not usual[WORDS[word[1]]]:
                usual[WORDS[word[1]]] = name
        return {split: name for split, name in usual.items() if name}

    @property
    def files(self) -> list[Path]:
        """Every file that is read: their content decides what the rows are."""
        return [*self.cards, *(file for name in self.splits.values() for file in self.found[name])]

    @property
    def ignored(self) -> list[str]:
        """The splits that are there but are not used."""
        return [name for name in self.found if name not in self.splits.values()]

    def rows(self, split: str, bad: BadRows) -> Iterator[PlacedRow]:
        for file in self.found[self.splits[split]]:
            yield from placed_rows(file, bad, self.reading)

    def inside(self, where: str) -> str:
        """A row's file and line, without the folder: what is kept must not change when the folder is moved."""
        return where.removeprefix(f"{self.place if self.place.is_dir() else self.place.parent}/")

    def _check_inside(self, file: Path) -> None:
        root = self.place.resolve()
        if root.parent.name == "snapshots":
            root = root.parents[1]  # the hub's cache: the files of a snapshot are links to a folder beside it
        leads_to = Path(os.path.realpath(str(file).replace("\0", "")))  # also resolves links that go in circles
        if not self.outside and not leads_to.is_relative_to(root):
            raise UserError(
                f"{file} lies outside {self.place}: set dataset.outside=true to read it, if you trust the folder"
            )

    def _saved(self) -> dict[str, list[Path]]:
        """The files of a folder that `save_to_disk` wrote."""
        whole, single = self.place / "dataset_dict.json", self.place / "state.json"
        if whole.is_file():
            self.cards.append(whole)
            names = _json_list(whole, "splits")
            return {str(name): self._saved_files(self.place / str(name) / "state.json") for name in names}
        return {"train": self._saved_files(single)} if single.is_file() else {}

    def _saved_files(self, state: Path) -> list[Path]:
        self._check_inside(state)
        self.cards.append(state)
        entries = _json_list(state, "_data_files")
        if not all(isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in entries):
            raise UserError(f'{state}: "_data_files" must be a list of {{"filename"}}')
        return [state.parent / entry["filename"] for entry in entries]

    def _by_card(self) -> dict[str, list[Path]]:
        """The files that a data set's card (README.md, as on the hub) assigns to its splits."""
        card = self.place / "README.md"
        configs = _card_configs(card) if card.is_file() else []
        if not configs:
            return {}
        self.cards.append(card)
        by_name = {str(config.get("config_name", "default")): config for config in configs}
        default = next((name for name, config in by_name.items() if config.get("default")), "default")
        name = self.subset or (next(iter(by_name)) if len(by_name) == 1 else default)
        if name not in by_name:
            raise UserError(f"{self.place}: dataset.subset must name one of {', '.join(by_name)}")
        data_files = by_name[name].get("data_files")
        if not isinstance(data_files, list) or not all(isinstance(part, dict) for part in data_files):
            data_files = [{"split": "train", "path": data_files}]
        parts: dict[str, list[Path]] = {}
        for part in data_files:
            paths = part.get("path")
            patterns = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
            parts[str(part.get("split", "train"))] = [file for each in patterns for file in self._matching(each)]
        return parts

    def _matching(self, pattern: str) -> list[Path]:
        if (self.place / pattern).is_file():
            return [self.place / pattern]
        self._check_inside(self.place / pattern)  # a ** elsewhere could search a whole disk
        found = sorted(glob.glob(pattern, root_dir=self.place, recursive=True))
        files = [self.place / name for name in found if (self.place / name).is_file()]
        if not files:
            raise UserError(f"{self.place} has no file {pattern}, although its README.md lists it")
        return files

    def _by_name(self) -> dict[str, list[Path]]:
        """The files that could hold rows, by the split in their name or their folder's."""
        root = self.place / (self.subset or "")
        if not root.is_dir():
            raise UserError(f"dataset.subset={self.subset}: {self.place} has no such folder")
        parts: dict[str, list[Path]] = {}
        for file in sorted(root.rglob("*")):
            relative = file.relative_to(root)
            if file.name.endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in relative.parts):
                parts.setdefault(_split_name(relative), []).append(file)
        if not parts:
            raise UserError(
                f"{root} holds no file of rows: JSON, JSON Lines, CSV, TSV, Parquet, Arrow, or what save_to_disk wrote"
            )
        named = {WORDS[word[1]] for name in parts if (word := WORD.search(name.lower()))}
        return {name or ("(no split)" if "train" in named else "train"): files for name, files in parts.items()}


def ignored_note(splits: Iterable[str]) -> list[str]:
    """The note on splits that are ignored, if there are some."""
    names = ", ".join(sorted(set(splits)))
    return [f"splits that were ignored: {names} (dataset.splits)"] if names else []


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # Linux takes any bytes as a name
        raise UserError(f"{str(path)!r} is not a name in UTF-8: rename it") from error


def _split_name(file: Path) -> str:
    """The split that a path names: train_prefs for `a/train_prefs-00000-of-00001.parquet`, test for `my.test.csv`."""
    for part in (*SHARD.sub("", file.name).split("."), *reversed(file.parts[:-1])):
        if WORD.search(part.lower()):
            return part
    return ""


def _json_list(file: Path, key: str) -> list[Any]:
    """The list below `key` in a small JSON file."""
    try:
        value = json.loads(file.read_bytes())[key]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): it may be damaged") from error
    if not isinstance(value, list):
        raise UserError(f'{file}: "{key}" must be a list')
    return value


def _card_configs(card: Path) -> list[dict[str, Any]]:
    """The configurations in a card's YAML head; none where it has no head, or one that is not YAML."""
    head = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        about = plain_yaml(head[1]) if head else None
    except ValueError:
        return []
    configs = about.get("configs") if isinstance(about, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
