"""Rows of different lengths in one flat array, in memory or mapped from a file."""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from massdpo.store import replacing

BLOCK = 4096  # rows of a block


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

    @classmethod
    def written(cls, rows: Iterable[NDArray[np.int32]], folder: Path, name: str) -> "Ragged":
        """The same, each row written to its file as it comes, so that memory holds the offsets alone."""
        ends = array("q", [0])
        with replacing(folder / f"{name}.npy") as beside, open(beside, "r+b") as file:
            _header(file, 0)
            for row in rows:
                file.write(row.tobytes())
                ends.append(ends[-1] + len(row))
            file.seek(0)
            _header(file, ends[-1])
        np.save(folder / f"{name}_offsets.npy", np.array(ends))
        return cls.load(folder, name)

    def save(self, folder: Path, name: str) -> None:
        """Write `name.npy` and `name_offsets.npy`."""
        np.save(folder / f"{name}.npy", self.flat)
        np.save(folder / f"{name}_offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Ragged":
        """What `save` or `written` wrote; of the file, only what is read comes into memory."""
        # a plain view of the mapped file: slicing numpy's own class for it takes ten times as long
        flat = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        return cls(flat, np.load(folder / f"{name}_offsets.npy"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def blocks(self) -> Iterator[tuple[slice, "Ragged"]]:
        """The rows by the block: which, and they themselves."""
        for start in range(0, len(self), BLOCK):
            offsets = self.offsets[start : start + BLOCK + 1]
            yield (
                slice(start, start + len(offsets) - 1),
                Ragged(self.flat[offsets[0] : offsets[-1]], offsets - offsets[0]),
            )


def _header(file: object, length: int) -> None:
    """A .npy header of an int32 vector; numpy leaves room in it for any length."""
    npy.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (length,)})  # type: ignore[arg-type]
