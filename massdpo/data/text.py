"""Lines of text from outside, with the place of every mistake; and when two texts count as equal."""

import codecs
import gzip
import io
import json
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from massdpo.errors import UserError

COMPRESSED = (".gz", ".zst")
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

Bad = Callable[[UserError], None]  # called with what is wrong with a row that cannot be read


def refuse(error: UserError) -> None:
    raise error


def normalise(text: str) -> str:
    """The same for texts that a reader would call equal: without differences of case, spacing or Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def opened(path: Path) -> io.BufferedReader:
    """A file's bytes, decompressed if its name ends in .gz or .zst; `-` is standard input."""
    if str(path) == "-":
        return open(0, "rb", closefd=False)  # not as /dev/stdin: a socket cannot be opened by name
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".zst":
        import pyarrow as pa  # half a second, and rarely needed

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


@contextmanager
def reading_errors(path: Path | str) -> Iterator[None]:
    """Say in one line why a file cannot be read: it is missing, a folder, or damaged."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def encoding_of(file: io.BufferedReader, encoding: str) -> str:
    """The encoding that a byte-order mark tells, or else the one asked for."""
    start = file.peek(3)
    return next((name for bom, name in BOMS.items() if start.startswith(bom)), encoding)


def read_lines(
    path: Path, bad: Bad = refuse, encoding: str = "utf-8", whole: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) for every line of a file that is not blank.

    CRLF line ends are accepted, and a byte-order mark decides the encoding. A line that cannot be decoded is left out,
    and `bad` gets an error that names file and line. With `whole`, blank lines and line ends are kept, and those lines
    too, with replacement characters: they may be the middle of a quoted cell.

    Raises:
        UserError: the file is missing, a folder, unreadable, or has no line that is not blank.
    """
    empty = True
    with reading_errors(path), opened(path) as file:
        encoding = encoding_of(file, encoding)
        for number, line in enumerate(_decoded(path, file, encoding, bad, whole), start=1):
            if not (whole or line.strip()):
                continue
            empty = empty and not line.strip()
            yield number, line if whole else line.rstrip("\r\n")
    if empty:
        raise UserError(f"{path} is empty: at least one line is needed")


def _decoded(path: Path, file: io.BufferedReader, encoding: str, bad: Bad, whole: bool) -> Iterator[str]:
    """Every line with its end; in place of one that was handed to `bad`, what can be read of it, or nothing."""
    if "\n".encode(encoding.removesuffix("-sig")) != b"\n":  # more than one byte per character
        try:
            yield from io.TextIOWrapper(file, encoding, newline="\n")
        except UnicodeError as error:
            raise UserError(f"{path} is not {encoding.upper()}, although it begins as such ({error})") from error
        return
    for number, raw in enumerate(file, start=1):
        try:
            yield raw.decode(encoding if number == 1 else encoding.removesuffix("-sig"))
        except UnicodeDecodeError as error:
            bad(
                UserError(
                    f"{path}:{number}: not {encoding.removesuffix('-sig').upper()} (byte {raw[error.start]:#04x} at "
                    f"column {error.start + 1}); save the file as UTF-8, or set dataset.encoding"
                )
            )
            yield raw.decode(encoding, errors="replace") if whole else ""


def read_jsonl(path: Path, bad: Bad = refuse, encoding: str = "utf-8") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line of a JSON Lines file that is not blank.

    Raises:
        UserError: as `read_lines`. A line that is not a JSON object is also left out and handed to `bad`.
    """
    for number, line in read_lines(path, bad, encoding):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad(UserError(f"{path}:{number}: not JSON ({error}); each line must be a JSON object"))
            continue
        if checked := json_object(row, f"{path}:{number}", bad, "\\ud" in line.lower()):
            yield number, checked


def json_object(row: Any, where: str, bad: Bad, escapes: bool = True) -> dict[str, Any] | None:
    """The row, if it is an object of proper text. `escapes`: it may have an escape that is half a character."""
    if not isinstance(row, dict):
        bad(UserError(f"{where}: expected a JSON object, found {type(row).__name__}"))
    elif escapes and not _is_text(row):
        bad(UserError(f"{where}: a lone surrogate (half a character, \\ud8.. to \\udf..) is not text"))
    else:
        return row
    return None


def _is_text(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
