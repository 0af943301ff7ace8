"""From a dataset's config node to splits: fetched if need be, prepared once, kept by content, read from the disk.

A prepared split is one JSON object a line, and a file with the lines' offsets: a row is read when it is asked for, so
that memory does not grow with the number of rows, and a person can read the file too.
"""

import json
import mmap
import sys
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import hydra.errors
import hydra.utils
import numpy as np

from massdpo.data.download import fetch
from massdpo.data.raw import SPLITS
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.store import MANIFEST, Cache, digest, keyed_seed, package_code, target_code, write_json

T = TypeVar("T")


def prepare(dataset: Mapping[str, Any], cache: Cache) -> Splits:
    """The splits of a dataset node (`_target_`, its options, `name`, `terms`, `limit_train|val|test`).

    The class it names has `files()`, the raw files that it reads, and `load()`, which makes the splits.

    Raises:
        UserError: from the dataset's own reader, the download, or a limit that is no count.
    """
    node = dict(dataset)
    limits = {split: node.pop(f"limit_{split}", None) for split in SPLITS}
    name, terms = node.pop("name", ""), node.pop("terms", None)
    if "raw_dir" in node and node["raw_dir"] is None:
        node["raw_dir"] = str(fetch(name, cache))
    try:
        source = hydra.utils.instantiate(node)
    except hydra.errors.InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    options = {key: value for key, value in node.items() if key != "raw_dir"}
    key = digest(package_code("data", "store"), target_code(node), options, *source.files())

    def build(folder: Path) -> None:
        if terms:
            print(f"{name or node['_target_']}: {terms}", file=sys.stderr)
        splits = source.load()
        for split in SPLITS:
            _write(getattr(splits, split), folder, split)
        write_json(folder / "report.json", splits.report)
        write_json(folder / "catalogue.json", splits.catalogue)

    folder = cache.folder("prepared", key, build)
    train, val, test = (MappedSplit(folder, split) for split in SPLITS)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    catalogue = tuple(json.loads((folder / "catalogue.json").read_text(encoding="utf-8")))
    for line in _notes(name, report):
        print(line, file=sys.stderr)
    content = digest((folder / MANIFEST).read_text(encoding="utf-8"))
    return _limit(Splits(train, val, test, report, content, catalogue), limits, node)


def _notes(name: str, report: dict[str, Any]) -> list[str]:
    """What a user should know of the preparation whenever the data is used, made anew or not."""
    notes = [f"note: {name}: {split} is {report[f'{split}_is']}" for split in SPLITS if f"{split}_is" in report]
    if count := report.get("bad_rows_skipped"):
        notes.append(f"warning: {name}: {count} rows skipped, the first: {report['first_bad_row']}")
    return notes


def _limit(splits: Splits, limits: dict[str, int | None], node: Mapping[str, Any]) -> Splits:
    seed = node.get("seed", 0)
    train, val, test = (limited(getattr(splits, split), limits[split], seed, split) for split in SPLITS)
    return replace(splits, train=train, val=val, test=test, digest=digest(splits.digest, limits, seed))


def limited(examples: Sequence[T], limit: int | None, seed: int, split: str) -> Sequence[T]:
    """A seeded subset of at most `limit` examples, in their order; a smaller subset is part of a larger one."""
    if limit is None:
        return examples
    if type(limit) is not int or limit < 1:
        raise UserError(f"dataset.limit_{split} must be a whole number of at least 1, or null; not {limit!r}")
    order = np.random.default_rng(keyed_seed("limit", seed, split)).permutation(len(examples))
    return Subset(examples, np.sort(order[:limit]))


class _Lazy(Sequence[T]):
    """A sequence by its length and its `_at`."""

    @abstractmethod
    def _at(self, row: int) -> T: ...

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        rows = range(len(self))[index]
        return self._at(rows) if isinstance(rows, int) else [self._at(row) for row in rows]

    def __iter__(self) -> Iterator[T]:
        return map(self._at, range(len(self)))


class Subset(_Lazy[T]):
    """Chosen rows of another sequence."""

    def __init__(self, examples: Sequence[T], rows: np.ndarray[Any, np.dtype[np.int64]]):
        self.examples = examples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def _at(self, row: int) -> T:
        return self.examples[int(self.rows[row])]


class MappedSplit(_Lazy[PreferenceExample]):
    """A prepared split on the disk. It is opened anew in another process, so workers can share it."""

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.split = split
        self.offsets = np.asarray(np.load(folder / f"{split}.npy", mmap_mode="r"))
        with open(folder / f"{split}.jsonl", "rb") as file:
            self.lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __reduce__(self) -> tuple[type["MappedSplit"], tuple[Path, str]]:
        return MappedSplit, (self.folder, self.split)

    def _at(self, row: int) -> PreferenceExample:
        fields = json.loads(str(self.lines[self.offsets[row] : self.offsets[row + 1]], "utf-8"))
        candidates = fields.pop("candidates")
        chosen, *pool = (candidates[place] for place in fields.pop("places"))
        history = tuple(fields.pop("history"))
        return PreferenceExample(
            chosen=chosen, pool=tuple(pool), candidates=tuple(candidates), history=history, **fields
        )


def _write(examples: Sequence[PreferenceExample], folder: Path, split: str) -> None:
    offsets = array("q", [0])
    with open(folder / f"{split}.jsonl", "wb") as file:
        for example in examples:
            fields = vars(example) | {}
            place_of = {text: place for place, text in enumerate(example.candidates)}
            fields["places"] = [place_of[text] for text in (fields.pop("chosen"), *fields.pop("pool"))]
            offsets.append(offsets[-1] + file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n"))
    np.save(folder / f"{split}.npy", np.frombuffer(offsets, dtype=np.int64))
