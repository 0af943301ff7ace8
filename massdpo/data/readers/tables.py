"""Tables of interactions and of titles, in the layouts that people have, read into a `Log`.

Columns are given, or found by their usual names; times are numbers in any unit, ISO dates, or dates in a given format.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from massdpo.data.columns import Columns
from massdpo.data.containers import RECBOLE, SUFFIXES, PlacedRow, Reading, placed_rows, suffix_of
from massdpo.data.raw import BadRows
from massdpo.data.readers.cells import Times, article_first, cell, number_of
from massdpo.data.readers.interactions import Interactions, Log, raw_file
from massdpo.errors import UserError

USUAL = {
    "user": (
        *("user", "user_id", "userid", "uid", "user_name", "username", "reviewerid", "customer_id", "customerid"),
        *("customer", "visitorid", "visitor_id", "viewer", "listener", "session_id", "sessionid", "session"),
    ),
    "item": (
        *("item", "item_id", "itemid", "iid", "movie_id", "movieid", "product_id", "productid", "product", "asin"),
        *("parent_asin", "artist_id", "artistid", "track_id", "song_id", "book_id", "isbn", "news_id", "business_id"),
        *("game_id", "appid", "sku", "stockcode", "id"),
    ),
    "time": (
        *("time", "timestamp", "unixreviewtime", "datetime", "date", "event_time", "created_at", "rated_at"),
        *("purchase_date", "order_date", "invoicedate", "ts"),
    ),
    "title": (
        *("title", "name", "item_name", "item_title", "product_name", "product_title", "movie_title", "artist_name"),
        *("artist", "track_name", "song", "book_title", "game", "description"),
    ),
    "rating": ("rating", "stars", "overall", "score"),
    "count": ("count", "quantity", "purchases", "plays", "play_count", "playcount"),
}
ABOUT_ITEMS = ("item", "title")
# what files are usually called, whatever their ending
INTERACTIONS = (
    *("interactions", "ratings", "events", "behaviors", "transactions", "purchases", "orders", "clicks", "log"),
)
ITEMS = (
    *("items", "titles", "movies", "products", "news", "books", "artists", "catalogue", "catalog", "metadata", "meta"),
)


@dataclass(frozen=True, kw_only=True)
class TableOptions(Reading):
    """How tables are read; `conf/dataset/sequences.yaml` says what each option does."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    header: list[str] | None = None
    items_header: list[str] | None = None
    time_format: str | None = None
    missing_titles: Literal["error", "skip", "id"] = "error"

    def columns_given(self, parts: tuple[str, ...]) -> dict[str, Any]:
        return {part: column for part, column in self.columns.items() if part in parts}

    def columns_of(self, parts: tuple[str, ...]) -> Columns:
        """The columns of one of two files: a column that the user names may be in the other one."""
        return Columns({part: USUAL[part] for part in parts}, self.columns_given(parts), optional=tuple(self.columns))

    def rows_of(self, path: Path, header: list[str] | None, bad: BadRows) -> Iterator[PlacedRow]:
        for where, row in placed_rows(path, bad, self, header or ()):
            typed = not header and suffix_of(path) in RECBOLE  # RecBole's headers have types: user_id:token
            yield where, {name.rpartition(":")[0] or name: value for name, value in row.items()} if typed else row

    def titles(self, path: Path, header: list[str] | None, bad: BadRows) -> tuple[dict[str, str], dict[str, Any]]:
        """The titles by item in a file of titles, and the columns that they were found in."""
        titles: dict[str, str] = {}
        columns = self.columns_of(ABOUT_ITEMS)
        for where, row in self.rows_of(path, header, bad):
            try:
                parts = needed(columns, where, row, ("item",))
                item = cell(where, "item", parts["item"])
                if item in titles:
                    raise UserError(f"{where}: item {item!r:.60} is listed twice")
                if "title" not in columns.mapped:
                    raise columns.missing(where, row, "title", ABOUT_ITEMS)
                if title := self.title_of(where, item, parts.get("title")):
                    titles[item] = title
            except UserError as error:
                bad(error)
        return titles, {f"{path.name}, columns": columns.report()["columns"]}

    def title_of(self, where: str, item: str, given: Any) -> str:
        """The title of an item, or what takes its place by `missing_titles`; empty where the item is left out.

        Raises:
            UserError: there is no title, and `missing_titles` is error.
        """
        title = str(given or "").strip()
        if not title and self.missing_titles == "error":
            raise UserError(
                f"{where}: item {item!r:.60} has no title, neither in a file of titles nor in a column here "
                "(dataset.columns={title: NAME}): dataset.missing_titles=skip leaves it out, id shows its id"
            )
        return title or (item if self.missing_titles == "id" else "")


@dataclass(frozen=True, kw_only=True)
class Tables(TableOptions):
    """Where the tables of interactions and of titles are."""

    raw_dir: str | None = None
    interactions_file: str | None = None
    items_file: str | None = None
    min_rating: float | None = None
    article_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        Columns(USUAL, self.columns)

    def interactions_path(self) -> Path:
        path = Path(self.raw_dir or "").expanduser()
        if self.raw_dir and self.interactions_file is None and path.is_file():
            return path
        return _found(self.raw_dir, self.interactions_file, INTERACTIONS, ".inter") or raw_file(
            self.raw_dir, self.interactions_file or "interactions.csv", "user, item, time"
        )

    def items_path(self) -> Path | None:
        """The file of titles; None: they are in the table of interactions."""
        if self.items_file is not None:
            return raw_file(self.raw_dir, self.items_file, "item, title")
        return _found(self.raw_dir, None, ITEMS, ".item")

    def files(self) -> list[Path]:
        """The files that are read: their content and the options decide the outcome."""
        return [path for path in (self.interactions_path(), self.items_path()) if path]

    def worded(self, title: str) -> str:
        return article_first(title) if self.article_first else title

    def log(self, bad: BadRows) -> Log:
        """Every user's items in order of time; where times are equal or missing, in the file's order."""
        path, about = self.interactions_path(), self.items_path()
        titles, about_items = self.titles(about, self.items_header, bad) if about else ({}, {})
        table = Interactions({item: self.worded(title) for item, title in titles.items()})
        times = Times(self.time_format)
        columns = self.columns_of(("user", "item", "time", "rating", "count", *(() if about else ("title",))))
        counts = {"ratings_below_minimum": 0, "counts_of_nothing": 0, "interactions_without_title": 0}
        for number, (where, row) in enumerate(self.rows_of(path, self.header, bad)):
            try:
                parts = needed(columns, where, row, ("user", "item"))
                user, item = (cell(where, part, parts[part]) for part in ("user", "item"))
                too_low = self._rated_too_low(columns, where, row, parts)
                count = number_of(where, "count", parts["count"]) if "count" in parts else 1
                if item not in table.item_of and (title := self.title_of(where, item, parts.get("title"))):
                    table.name(item, self.worded(title))
                time = times.of(where, parts.get("time"), number)
            except UserError as error:
                bad(error)
                continue
            if too_low:
                counts["ratings_below_minimum"] += 1
            elif count <= 0:
                counts["counts_of_nothing"] += 1
            elif item not in table.item_of:
                counts["interactions_without_title"] += 1
            else:
                table.add(user, item, time)
        report: dict[str, Any] = {
            name: count
            for name, count in counts.items()
            if count or (name == "ratings_below_minimum" and self.min_rating)
        }
        if "rating" in columns.mapped and self.min_rating is None:
            report["rating_is_ignored"] = (
                "every rating counts, low ones too: dataset.min_rating=N leaves out those below N"
            )
        read = columns.report()
        read = {f"{path.name}, columns": read.pop("columns"), **read}
        return table.log(path, read | about_items | report, timed=times.timed)

    def _rated_too_low(self, columns: Columns, where: str, row: dict[str, Any], parts: dict[str, Any]) -> bool:
        if self.min_rating is None:
            return False
        if "rating" not in parts:
            raise columns.missing(where, row, "rating", ("rating",))
        return number_of(where, "rating", parts["rating"]) < self.min_rating


def needed(columns: Columns, where: str, row: dict[str, Any], wanted: tuple[str, ...]) -> dict[str, Any]:
    """The row's parts, with None for a `wanted` one that this row leaves empty.

    Raises:
        UserError: no column holds one of those `wanted`; the message lists the columns.
    """
    parts = columns.parts(where, row)
    for part in wanted:
        if part not in parts and part not in columns.mapped:
            raise columns.missing(where, row, part, wanted)
    return {part: None for part in wanted} | parts


def _found(raw_dir: str | None, name: str | None, usual: tuple[str, ...], suffix: str) -> Path | None:
    """The one file of the folder with a usual name, whatever its ending."""
    folder = Path(raw_dir or "").expanduser()
    if raw_dir is None or name is not None or not folder.is_dir():
        return None
    named = [
        file
        for file in filter(Path.is_file, sorted(folder.iterdir()))
        if file.name.endswith(suffix) or (file.name.split(".")[0].lower() in usual and file.name.endswith(SUFFIXES))
    ]
    if len(named) > 1:
        raise UserError(
            f"{folder} holds {', '.join(file.name for file in named[:8])}: say which to read with "
            "dataset.interactions_file and dataset.items_file"
        )
    return named[0] if named else None
