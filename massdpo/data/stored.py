"""Examples on disk: one JSON object per line, and a file with the lines' offsets.

A row is read when it is asked for, so that memory does not grow with the rows; and people can read the file too.
"""

import json
import mmap
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, overload

import numpy as np

from massdpo.data.schema import PreferenceExample
from massdpo.store import writing

T = TypeVar("T")
RowNumbers = np.ndarray[Any, np.dtype[np.int64]]


class Lazy(Sequence[T]):
    """A sequence whose rows are made by `_at` when they are asked for."""

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


@dataclass(eq=False)
class Subset(Lazy[T]):
    """Some rows of another sequence."""

    examples: Sequence[T]
    rows: RowNumbers

    def __len__(self) -> int:
        return len(self.rows)

    def _at(self, row: int) -> T:
        return self.examples[int(self.rows[row])]


@dataclass(eq=False)
class NumberedSplit(Subset[PreferenceExample]):
    """Some rows as a split: those without an id are named by the split and their place in it."""

    split: str

    def _at(self, row: int) -> PreferenceExample:
        example = super()._at(row)
        return example if example.id else replace(example, id=f"{self.split}/{row}")


def spooled(examples: Iterable[tuple[float, PreferenceExample]]) -> tuple["StoredExamples", np.ndarray[Any, Any]]:
    """Write examples, as they come, to files that go when they are closed; also returns the number before each."""
    numbers: list[float] = []

    def noted() -> Iterator[PreferenceExample]:
        for number, example in examples:
            numbers.append(number)
            yield example

    # What is open stays readable when its name is gone.
    with TemporaryDirectory(prefix="massdpo.") as folder, writing(Path(folder), "free some room or set TMPDIR"):
        return StoredExamples.written(noted(), Path(folder), "rows"), np.array(numbers)


class StoredExamples(Lazy[PreferenceExample]):
    """What `written` left in a folder. Other processes open it anew, so workers can share it."""

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        self.name = name
        self.offsets = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        with open(folder / f"{name}.jsonl", "rb") as file:
            self.lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    @classmethod
    def written(cls, examples: Iterable[PreferenceExample], folder: Path, name: str) -> "StoredExamples":
        """Write `name.jsonl` and `name.npy`, each example as it comes."""
        offsets = array("q", [0])
        with open(folder / f"{name}.jsonl", "wb") as file:
            for example in examples:
                fields = vars(example) | {}
                place_of = {text: place for place, text in enumerate(example.candidates)}
                fields["places"] = [place_of[text] for text in (fields.pop("chosen"), *fields.pop("pool"))]
                offsets.append(offsets[-1] + file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n"))
        np.save(folder / f"{name}.npy", np.frombuffer(offsets, dtype=np.int64))
        return cls(folder, name)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __reduce__(self) -> tuple[type["StoredExamples"], tuple[Path, str]]:
        return StoredExamples, (self.folder, self.name)

    def _at(self, row: int) -> PreferenceExample:
        fields = json.loads(str(self.lines[self.offsets[row] : self.offsets[row + 1]], "utf-8"))
        candidates = fields.pop("candidates")
        chosen, *pool = (candidates[place] for place in fields.pop("places"))
        history = tuple(fields.pop("history"))
        return PreferenceExample(
            chosen=chosen, pool=tuple(pool), candidates=tuple(candidates), history=history, **fields
        )
