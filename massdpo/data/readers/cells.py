"""Reads the cells of a table of interactions: names, numbers, titles, and times in any form."""

from datetime import UTC, datetime, timedelta
from typing import Any

from massdpo.errors import UserError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def cell(where: str, name: str, value: Any) -> str:
    """A name from a cell: a text or a whole number (also one that is stored as 3.0)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: {name!r} must be a text or a whole number, found {value!r:.80}")
    if not str(value).strip():
        raise UserError(f"{where}: {name!r} is empty")
    return str(value).strip()


def article_first(title: str) -> str:
    """`An Affair to Remember (1957)` for `Affair to Remember, An (1957)`."""
    name, bracket, year = title.rpartition(" (")
    name, year = (name, bracket + year) if bracket else (title, "")
    head, comma, article = name.rpartition(", ")
    if comma and article in ("A", "An", "The"):
        return f"{article} {head}{year}"
    return title


class Times:
    """Times as comparable numbers: numbers as they are, dates as microseconds since 1970, or else row numbers."""

    def __init__(self, form: str | None):
        self.form = form
        self.kind = ""

    @property
    def timed(self) -> bool:
        return self.kind != "order"

    def of(self, where: str, value: Any, number: int) -> float:
        kind, time = self._read(where, value, number)
        if self.kind and kind != self.kind:
            if "order" in (kind, self.kind):
                raise UserError(f"{where}: only some rows have a 'time'; give one to all rows or to none")
            raise UserError(f"{where}: 'time' is {value!r:.40}, but the rows before have a {self.kind}")
        self.kind = kind
        return time

    def _read(self, where: str, value: Any, number: int) -> tuple[str, float]:
        if value is None or value == "":
            return "order", number
        if isinstance(value, datetime):
            return "date", _microseconds(value)
        text = str(value).strip()
        if self.form is None and not isinstance(value, bool):
            try:
                return "number", int(text) if text.lstrip("+-").isdecimal() else _finite(float(text))
            except ValueError:
                pass
        try:
            return "date", _microseconds(
                datetime.strptime(text, self.form) if self.form else datetime.fromisoformat(text)
            )
        except ValueError:
            how = f"as dataset.time_format={self.form}" if self.form else "a number (seconds, say) or an ISO date"
            raise UserError(
                f"{where}: 'time' must be {how}, found {text!r:.40}; for dates in another format set "
                "dataset.time_format, as in %d/%m/%Y %H:%M"
            ) from None


def _microseconds(time: datetime) -> int:
    return (time.replace(tzinfo=time.tzinfo or UTC) - EPOCH) // timedelta(microseconds=1)


def _finite(value: float) -> float:
    if value - value != 0:
        raise ValueError("not finite")
    return value


def number_of(where: str, name: str, value: Any) -> float:
    try:
        return _finite(float(value))
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name!r} must be a number, found {value!r:.60}") from None
