"""The rows of one file, each with its place: JSON in its forms, columns of text, Parquet or Arrow.

Only formats that hold nothing but data are read, and piece by piece: memory does not grow with the file.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from massdpo.data.json_text import JsonText
from massdpo.data.text import COMPRESSED, Bad, json_object, read_jsonl, read_lines, refuse
from massdpo.errors import UserError, one_line

PlacedRow = tuple[str, dict[str, Any]]  # where it stands (for messages), and its fields

JSON = (".jsonl", ".json", ".ndjson")
RECBOLE = (".inter", ".item", ".user")  # tabs, and quotation marks that mean nothing
COLUMNS = (".csv", ".tsv", ".tab", ".psv", *RECBOLE)
PARQUET = (".parquet",)
ARROW = (".arrow", ".feather")
SUFFIXES = tuple(f"{kind}{end}" for kind in (*JSON, *COLUMNS) for end in ("", *COMPRESSED)) + PARQUET + ARROW
ARRAY_KEYS = ("data", "rows", "examples", "instances", "records", "train")  # where an array of rows usually stands
SEPARATORS = (",", "\t", ";", "|")
# What pyarrow raises of damaged files: beside its own errors, whatever a wrong offset leads to.
DAMAGED = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What files do not say about themselves.

    `separator` None: found from a table's first line; `rows`: the key of the array in a JSON file.
    """

    separator: str | None = None
    encoding: str = "utf-8"
    rows: str | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("dataset.separator is empty: set it to the text between two columns, or null")
        try:
            "\n".encode(self.encoding)
        except (LookupError, TypeError) as error:
            raise UserError(
                f"dataset.encoding={self.encoding} is unknown: use utf-8, latin-1, cp1252, utf-16, ..."
            ) from error


USUAL_READING = Reading()


def suffix_of(path: Path) -> str:
    """The ending of the name, without .gz or .zst."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix.lower()


def placed_rows(
    path: Path, bad: Bad, reading: Reading = USUAL_READING, header: Sequence[str] = ()
) -> Iterator[PlacedRow]:
    """The rows of a file, read by its name's ending or, where that says nothing, by its first character.

    `header` names the first columns of a table without a header; quotation marks mean nothing there, and further
    columns are left out.

    Raises:
        UserError: the file is missing, empty, damaged, or not what its name says; what is wrong with a single row is
            handed to `bad`.
    """
    suffix = suffix_of(path)
    if suffix in PARQUET + ARROW:
        return _table_rows(path, _parquet_batches(path) if suffix in PARQUET else _arrow_batches(path))
    if not _has_columns(path):
        return _json_rows(path, bad, reading)
    return _column_rows(path, bad, reading, header)


def _has_columns(path: Path) -> bool:
    """Whether a text file holds separated columns, by its name or else its first character."""
    if (suffix := suffix_of(path)) in JSON + COLUMNS:
        return suffix in COLUMNS
    return next((line.lstrip()[:1] not in "{[" for _, line in read_lines(path, encoding="latin-1")), False)


def _json_rows(path: Path, bad: Bad, reading: Reading) -> Iterator[PlacedRow]:
    with JsonText(path, reading.encoding) as text:
        usual = ARRAY_KEYS if suffix_of(path) == ".json" else ()
        if text.seek((reading.rows,) if reading.rows else usual):
            for element, (line, row) in enumerate(text.elements(), start=1):
                where = f"{path}:{line} (row {element})"  # there may be many in one line
                if checked := json_object(row, where, bad):
                    yield where, checked
            text.end()
            return
        if reading.rows or text.is_one_object:
            raise UserError(
                f"{path} is one JSON object with the keys {', '.join(text.keys)[:200] or '(none)'}: "
                "set dataset.rows=KEY to the one that holds the array of rows"
            )
    for number, row in read_jsonl(path, bad, reading.encoding):
        yield f"{path}:{number}", row


def _column_rows(path: Path, bad: Bad, reading: Reading, header: Sequence[str]) -> Iterator[PlacedRow]:
    """Rows of separated columns, named by `header` or the first line. Every cell is a text, whatever it looks like."""
    names = list(header)
    for number, cells, undecoded in _cells(path, reading, quoted=not header and suffix_of(path) not in RECBOLE):
        where = f"{path}:{number}"
        if undecoded:
            (bad if names else refuse)(undecoded)
        elif not names:
            names = [name.strip() for name in cells]
            if len(set(names)) < len(names):
                raise UserError(f"{where}: the header has the same name twice: {', '.join(names)[:200]}")
        elif len(cells) < len(names) or (len(cells) > len(names) and not header):
            bad(UserError(f"{where}: {len(cells)} fields, but the header has {len(names)} (see dataset.separator)"))
        else:
            yield where, dict(zip(names, cells, strict=not header))


def _cells(path: Path, reading: Reading, quoted: bool) -> Iterator[tuple[int, list[str], UserError | None]]:
    """Of every row that is not blank: the line in which it begins, its cells, and what cannot be decoded in it."""
    undecoded: list[UserError] = []  # since the last row
    lines = (line for _, line in read_lines(path, undecoded.append, reading.encoding, whole=True))

    def first_undecoded() -> UserError | None:
        error = undecoded[0] if undecoded else None
        undecoded.clear()
        return error

    begun = [next(lines)]
    while not begun[-1].strip():
        begun.append(next(lines))
    csv.field_size_limit(1 << 24)  # a cell may be long; Python's own limit is 131,072 characters
    separator = reading.separator or separator_of(begun[-1])
    if len(separator) > 1:
        for number, line in enumerate(chain(begun, lines), start=1):
            if line.strip():
                yield number, line.rstrip("\r\n").split(separator), first_undecoded()
        return
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(chain(begun, lines), delimiter=separator, strict=True, quoting=quoting)
    while True:
        number = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{path}:{number}: not CSV ({error})") from error
        if cells is None:
            return
        if cells:
            yield number, cells, first_undecoded()


def unusual_separators(files: list[Path], encoding: str) -> list[str]:
    """The separators found that the files' names do not suggest, such as `;` in a .csv."""
    found = {}
    for path in files:
        if suffix_of(path) in COLUMNS:
            lines = (line for _, line in read_lines(path, encoding=encoding, whole=True))
            header = next(line for line in lines if line.strip())
            found[separator_of(header)] = "," if suffix_of(path) == ".csv" else "\t"
    return [separator for separator, usual in found.items() if separator != usual]


def separator_of(header: str) -> str:
    """Of the usual separators, the one that divides a header into the most columns."""
    line = header.replace("\r", " ")  # a bare carriage return does not end a line here, but csv refuses it inside one
    return max(SEPARATORS, key=lambda separator: len(next(csv.reader([line], delimiter=separator))))


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq  # half a second, and only needed here

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1024)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches with their offsets and texts checked: Arrow itself reads what is in the file without checking."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as source:  # not mapped: a file that is cut short meanwhile would kill the process
        try:
            stream = pa.ipc.open_stream(source)  # what `datasets` writes
        except pa.ArrowInvalid:
            source.seek(0)
            whole = pa.ipc.open_file(source)
            stream = map(whole.get_batch, range(whole.num_record_batches))
        for batch in stream:
            batch.validate(full=True)
            yield batch


def _table_rows(path: Path, batches: Iterator[Any]) -> Iterator[PlacedRow]:
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path} (row {number})", row
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read after row {number} ({one_line(error)}): it may be damaged") from error
