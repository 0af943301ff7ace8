"""Tables of impressions and of their items' titles: MIND's, or any with the right columns."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from massdpo.data.columns import Columns
from massdpo.data.containers import suffix_of
from massdpo.data.raw import BadRows
from massdpo.data.readers.cells import Times, cell
from massdpo.data.readers.tables import ABOUT_ITEMS, ITEMS, TableOptions, needed
from massdpo.data.readers.tables import USUAL as USUAL_TABLES
from massdpo.data.text import read_lines
from massdpo.errors import UserError

USUAL = {
    "history": ("history", "clicked_before", "past"),
    "shown": ("shown", "impressions", "impression", "candidates"),
    "clicked": ("clicked", "clicks", "click", "clicked_item"),
    **{part: USUAL_TABLES[part] for part in ("user", "time")},
}
MIND = {  # behaviors.tsv and news.tsv have no header; the columns after these are not needed
    "behaviors": ("impression_id", "user", "time", "history", "shown"),
    "news": ("item", "category", "subcategory", "title"),
}
MIND_TIME = "%m/%d/%Y %I:%M:%S %p"


@dataclass(frozen=True)
class Impression:
    """What was shown at once, as titles; `shown` includes what was clicked, if the table lists it there."""

    where: str
    user: str | None
    time: float | None
    history: list[str]
    shown: list[str]
    clicked: list[str]


@dataclass(frozen=True, kw_only=True)
class ImpressionTables(TableOptions):
    """How tables are read; `conf/dataset/impressions.yaml` says what each option does."""

    item_separator: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Columns(USUAL | {part: USUAL_TABLES[part] for part in ABOUT_ITEMS}, self.columns)
        if self.item_separator == "":
            raise UserError("dataset.item_separator is empty: set it to the text between two items, or null for spaces")

    def titles_in(self, files: list[Path], bad: BadRows) -> dict[str, str]:
        """The titles by item, from all files together."""
        titles: dict[str, str] = {}
        for file in files:
            titles |= self.titles(file, self.items_header or self._mind_header(file, "title"), bad)[0]
        return titles

    def impressions(
        self,
        files: list[Path],
        columns: Columns,
        titles: Mapping[str, str] | None,
        timed: bool,
        counts: Counter[str],
        bad: BadRows,
    ) -> Iterator[Impression]:
        """Every row of `files`. Without `titles`, items are their own; else `counts` counts the items that have none.

        A row that cannot be read, or lacks a time where `timed`, is handed to `bad`.
        """
        for file in files:
            mind = None if self.header else self._mind_header(file, "history")
            times = Times(self.time_format or (MIND_TIME if mind else None))
            for where, row in self.rows_of(file, self.header or mind, bad):
                try:
                    parts = needed(columns, where, row, ("history", "shown"))
                    lists = self._lists(where, parts, by_column="clicked" in columns.mapped)
                    history, shown, clicked = (self._titled(where, items, titles, counts) for items in lists)
                    user = cell(where, "user", parts["user"]) if "user" in parts else None
                    time = times.of(where, parts.get("time"), 0) if timed else None
                    if timed and not times.timed:
                        raise UserError(f"{where}: dataset.split=time needs a time in each row: use dataset.split=user")
                except UserError as error:
                    bad(error)
                else:
                    yield Impression(where, user, time, history, shown, clicked)

    def _lists(self, where: str, parts: dict[str, Any], by_column: bool) -> tuple[list[str], list[str], list[str]]:
        """The history, all that was shown, and what was clicked: by its column, or by endings as in `N12-1 N34-0`."""
        history, shown, clicked = (
            self._items(where, part, parts.get(part)) for part in ("history", "shown", "clicked")
        )
        if by_column:
            return history, shown, clicked
        for item in shown:
            if item[-2:] not in ("-0", "-1"):
                raise UserError(
                    f"{where}: {item!r:.60} in 'shown' ends in neither -1 (clicked) nor -0, and no column says what "
                    "was clicked: name it with dataset.columns={clicked: NAME}"
                )
        return history, [item[:-2] for item in shown], [item[:-2] for item in shown if item.endswith("-1")]

    def _items(self, where: str, part: str, value: Any) -> list[str]:
        """The items in a cell: a list, or a text that is split at `item_separator` (at white space without one)."""
        if isinstance(value, str):
            return [item.strip() for item in value.split(self.item_separator) if item.strip()]
        if value is None:
            return []
        return [cell(where, part, item) for item in (value if isinstance(value, list) else [value])]

    def _titled(
        self, where: str, items: list[str], titles: Mapping[str, str] | None, counts: Counter[str]
    ) -> list[str]:
        if titles is None:
            return items
        found = [self.title_of(where, item, titles.get(item)) for item in items]
        counts["without_title"] += found.count("")
        return [title for title in found if title]

    def _mind_header(self, file: Path, column: str) -> list[str] | None:
        """The columns of one of MIND's files; None for others, and where the first line names the `column` column."""
        name = file.name.split(".")[0]
        if name not in MIND or suffix_of(file) != ".tsv":
            return None
        _, line = next(read_lines(file, encoding=self.encoding))
        known = {*(USUAL | USUAL_TABLES)[column], str(self.columns.get(column)).lower()}
        return None if known & set(line.lower().split("\t")) else list(MIND[name])


def is_about_items(file: Path) -> bool:
    return file.name.endswith(".item") or file.name.split(".")[0].lower() in ITEMS
