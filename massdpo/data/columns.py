"""Which column is which: given by a mapping, or found by its usual names."""

import re
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from massdpo.errors import UserError


class Columns:
    """The parts that a row is made of, and the columns that hold them.

    `usual` has the usual column names of each part, the most usual first; `given` names the column (or columns) of a
    part, and takes precedence. A part in `several` may also be spread over numbered columns, as rejected_1, rejected_2.
    Of a part in `aligned`, whose places count, an empty cell before others is kept, as None. A part in `optional` may
    be missing even if its column is given. `mapped` says what was found, `ignored` counts the
    columns that mean nothing here.

    Raises:
        UserError: `given` has an unknown part.
    """

    def __init__(
        self,
        usual: Mapping[str, tuple[str, ...]],
        given: Mapping[str, str | list[str]] | None = None,
        several: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        aligned: tuple[str, ...] = (),
    ):
        self.usual, self.given, self.several, self.optional = usual, given or {}, several, optional
        self.aligned = aligned
        for part in self.given:
            if part not in usual:
                raise UserError(f"dataset.columns.{part} is not allowed: use {', '.join(usual)}")
        self.mapped: dict[str, str] = {}
        self.ignored: Counter[str] = Counter()
        self._known: dict[tuple[str, ...], dict[str, list[str]]] = {}

    def parts(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's value for each part, or a list of values from several columns; nulls are left out."""
        keys = tuple(row)
        if keys not in self._known:
            self._known[keys] = self._found(where, keys)
        parts: dict[str, Any] = {}
        for part, columns in self._known[keys].items():
            if len(columns) == 1:
                if row[columns[0]] is not None:
                    parts[part] = row[columns[0]]
                continue
            cells = [None if row[column] == "" else row[column] for column in columns]
            while cells and cells[-1] is None:
                cells.pop()
            if cells:
                parts[part] = [cell for cell in cells if cell is not None or part in self.aligned]
        read = {column for columns in self._known[keys].values() for column in columns}
        self.ignored.update(key for key in keys if key not in read and row[key] is not None)
        return parts

    def missing(self, where: str, row: Mapping[str, Any], part: str, needed: tuple[str, ...]) -> UserError:
        """The error for a row without `part`: lists its columns, and guesses which of them are the `needed` ones."""
        named = self._known[tuple(row)]
        if part in named:
            return UserError(f'{where}: no "{part}": nothing stands in {shown(named[part])}')
        free = [key for key in row if all(key not in columns for columns in named.values())]
        guess = {}
        for wanted in needed:
            if wanted not in named and free:
                close = [key for name in self.usual[wanted] for key in get_close_matches(name, free, 1)]
                guess[wanted] = (close or free)[0]
                free.remove(guess[wanted])
        mapping = ", ".join(f"{wanted}: {safe(column)}" for wanted, column in (guess or {part: "NAME"}).items())
        return UserError(
            f'{where}: no "{part}" in the columns {shown(row)}; name them with dataset.columns={{{mapping}}}'
        )

    def report(self) -> dict[str, Any]:
        """Which column was taken for which part, and which were ignored."""
        found = {"columns": ", ".join(f"{part} = {names}" for part, names in self.mapped.items())}
        return found | {f"ignored_column_{safe(name)}": count for name, count in self.ignored.most_common(20)}

    def _found(self, where: str, keys: tuple[str, ...]) -> dict[str, list[str]]:
        lower = {key.strip().lower(): key for key in reversed(keys)}
        named: dict[str, list[str]] = {}
        for part, given in self.given.items():
            columns = [given] if isinstance(given, str) else list(given)
            if all(column in keys for column in columns):
                named[part] = columns
            elif part not in self.optional:
                raise UserError(
                    f"{where}: no column {safe(' or '.join(columns))} (dataset.columns.{part}) among {shown(keys)}"
                )
        for part, names in self.usual.items():
            if part in self.given:
                continue
            taken = {column for columns in named.values() for column in columns}
            free = {name: key for name, key in lower.items() if key not in taken}
            if here := [free[name] for name in names if name in free]:
                named[part] = here[:1]
            elif part in self.several:
                pattern = re.compile(rf"(?:{'|'.join(names)})[ _-]?(\d{{1,4}})")
                numbered = {int(number[1]): free[name] for name in free if (number := pattern.fullmatch(name))}
                if numbered:
                    named[part] = [numbered[number] for number in sorted(numbered)]
        self.mapped |= {part: " + ".join(map(safe, columns)) for part, columns in named.items()}
        return named


def safe(name: str) -> str:
    """A name from outside as a message can show it: without control characters, and not too long."""
    return repr(name)[1:-1][:60]


def shown(names: Any) -> str:
    names = list(names)
    return ", ".join(map(safe, names[:12])) + (", ..." if len(names) > 12 else "") if names else "(none)"
