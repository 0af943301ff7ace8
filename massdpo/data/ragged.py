"""Rows of different lengths in one flat array, in memory or mapped from a file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Ragged:
    """Rows of int32 numbers, end to end in `flat`; row i is `flat[offsets[i] : offsets[i + 1]]`."""

    def __init__(self, flat: NDArray[np.int32], offsets: NDArray[np.int64]):
        self.flat = flat
        self.offsets = offsets

    @classmethod
    def of(cls, rows: Iterable[NDArray[np.int32]]) -> "Ragged":
        parts = list(rows)
        flat = np.concatenate([np.zeros(0, np.int32), *parts])
        return cls(flat, np.cumsum([0, *map(len, parts)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def save(self, folder: Path, name: str) -> None:
        """Write `name.npy` and `name_offsets.npy`."""
        np.save(folder / f"{name}.npy", self.flat)
        np.save(folder / f"{name}_offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Ragged":
        """What `save` wrote; only the rows that are read come into memory."""
        # a plain view of the mapped file: slicing numpy's own class for it takes ten times as long
        flat = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        return cls(flat, np.load(folder / f"{name}_offsets.npy"))
