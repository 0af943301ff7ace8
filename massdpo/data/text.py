"""Lines of text from outside: JSON Lines read with the place of every mistake, and when two texts are the same."""

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from massdpo.errors import UserError

BOM = b"\xef\xbb\xbf"


def normalise(text: str) -> str:
    """What two texts share when a reader would call them equal: compatibility forms, case and spacing are levelled."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_lines(path: Path, bad: Callable[[UserError], None] | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) for every line of a UTF-8 file that is not blank.

    A byte-order mark and CRLF line ends are accepted. A line that is not UTF-8 is a UserError that names file and line;
    with `bad` the error is handed over and the line left out.

    Raises:
        UserError: the file is missing, a folder, unreadable, or has no line that is not blank.
    """
    empty = True
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                raw = raw.removeprefix(BOM) if number == 1 else raw
                if not raw.strip():
                    continue
                empty = False
                try:
                    yield number, raw.rstrip(b"\r\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    _report(
                        f"{path}:{number}: not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}); "
                        "save the file as UTF-8",
                        bad,
                    )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise UserError(f"{path} is empty: at least one line is needed")


def read_jsonl(path: Path, bad: Callable[[UserError], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line of a JSON Lines file that is not blank.

    Raises:
        UserError: as `read_lines`; and for a line that is no JSON object, naming file, line and mistake (or, with
            `bad`, the error is handed over and the line left out).
    """
    for number, line in read_lines(path, bad):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            _report(f"{path}:{number}: not JSON ({error}); one JSON object a line is needed", bad)
            continue
        if not isinstance(row, dict):
            _report(f"{path}:{number}: a JSON object is needed, found {type(row).__name__}", bad)
        elif "\\ud" in line.lower() and not _is_text(row):
            _report(f"{path}:{number}: a lone surrogate (half a character, \\ud8.. to \\udf..) is not text", bad)
        else:
            yield number, row


def _is_text(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _report(message: str, bad: Callable[[UserError], None] | None) -> None:
    if bad is None:
        raise UserError(message)
    bad(UserError(message))
