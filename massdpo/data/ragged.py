"""Rows of different lengths end to end: written to a file as they come, mapped from it when they are read.

Memory holds 8 bytes per row while a file is written, and of a mapped file only what is read.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from struct import unpack
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from massdpo.data.stored import Lazy

BLOCK = 4096  # rows of a block


class Ragged:
    """Rows of numbers, end to end in `flat`; row i is `flat[offsets[i] : offsets[i + 1]]`."""

    def __init__(self, flat: NDArray[Any], offsets: NDArray[np.int64]):
        self.flat = flat
        self.offsets = offsets

    @classmethod
    def written(cls, rows: Iterable[NDArray[np.int32]], folder: Path, name: str) -> "Ragged":
        """Rows of int32, each written to the file as it comes."""
        with appending(folder, name) as add:
            for row in rows:
                add(row)
        return cls.load(folder, name)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Ragged":
        """What `appending` wrote."""
        # plain views of the mapped files: slicing numpy's memmap class takes ten times as long
        return cls(*(np.asarray(np.load(folder / f"{name}{end}.npy", mmap_mode="r")) for end in ("", "_offsets")))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
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


@contextmanager
def appending(folder: Path, name: str, kind: DTypeLike = np.int32) -> Iterator[Callable[[Any], None]]:
    """Yield what adds a row (a buffer of `kind`) to the files `name.npy` and `name_offsets.npy`.

    Older ones are replaced at the end, not overwritten: they may still be mapped.
    """
    beside, ends = folder / f".{name}.npy", array("q", [0])
    with open(beside, "wb") as file:
        _header(file, kind, 0)

        def add(row: Any) -> None:
            file.write(row)
            ends.append(ends[-1] + len(row))

        yield add
        file.seek(0)
        _header(file, kind, ends[-1])
    os.replace(beside, folder / f"{name}.npy")
    np.save(beside, np.frombuffer(ends, np.int64))
    os.replace(beside, folder / f"{name}_offsets.npy")


def _header(file: Any, kind: DTypeLike, length: int) -> None:
    """A .npy header of a vector; numpy leaves room in it for any length."""
    npy.write_array_header_1_0(file, {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (length,)})


class Texts(Lazy[str]):
    """Texts in a file, from rows of their bytes in UTF-8."""

    def __init__(self, folder: Path, name: str):
        self.rows = Ragged.load(folder, name)

    def __len__(self) -> int:
        return len(self.rows)

    def _at(self, row: int) -> str:
        return self.rows[row].tobytes().decode()


class Places:
    """A number for each distinct text, in the order in which they are first met; each is added to a file then.

    Memory holds a hash of 16 bytes per distinct text and an open-addressed table of their numbers, no text.
    """

    def __init__(self, add: Callable[[bytes], None]):
        self.add = add
        self.hashes = array("Q")  # two per text
        self.table = array("i", [-1]) * 1024

    def __len__(self) -> int:
        return len(self.hashes) // 2

    def of(self, text: str) -> int:
        data = text.encode()
        low, high = unpack("2Q", blake2b(data, digest_size=16).digest())
        hashes, slot = self.hashes, self._slot(low, high)
        if (place := self.table[slot]) >= 0:
            return place
        self.add(data)
        hashes.extend((low, high))
        self.table[slot] = place = len(self) - 1
        if 3 * len(self) > 2 * len(self.table):
            self.table = array("i", [-1]) * (2 * len(self.table))
            for other in range(len(self)):
                self.table[self._slot(hashes[2 * other], hashes[2 * other + 1])] = other
        return place

    def _slot(self, low: int, high: int) -> int:
        """Where in the table this hash stands, or would stand."""
        table, hashes, last = self.table, self.hashes, len(self.table) - 1
        slot = low & last
        while (place := table[slot]) >= 0 and (hashes[2 * place] != low or hashes[2 * place + 1] != high):
            slot = (slot + 1) & last
        return slot
