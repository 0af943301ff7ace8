"""Tables of interactions and of titles, in the layouts that people have, read into a `Log`.

Columns are given or found by their usual names; times are numbers of any unit, ISO dates or dates of a given format.
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
INTERACTIONS = (
    "interactions",
    "ratings",
    "events",
    "behaviors",
    "transactions",
    "purchases",
    "orders",
    "clicks",
    "log",
)
ITEMS = (
    "items",
    "titles",
    "movies",
    "products",
    "news",
    "books",
    "artists",
    "catalogue",
    "catalog",
    "metadata",
    "meta",
)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How tables are to be read; `conf/dataset/sequences.yaml` says what each option does."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    header: list[str] | None = None
    items_header: list[str] | None = None
    separator: str | None = None
    encoding: str = "utf-8"
    rows: str | None = None
    time_format: str | None = None
    missing_titles: Literal["error", "skip", "id"] = "error"

    def reading(self, header: list[str] | None = None) -> Reading:
        return Reading(self.separator, self.encoding, self.rows, tuple(header) if header else None)

    def columns_given(self, parts: tuple[str, ...]) -> dict[str, Any]:
        return {part: column for part, column in self.columns.items() if part in parts}


@dataclass(frozen=True, kw_only=True)
class Tables(TableOptions):
    """Where the tables of interactions and of titles are."""

    raw_dir: str | None = None
    interactions_file: str | None = None
    items_file: str | None = None
    min_rating: float | None = None
    article_first: bool = False

    def __post_init__(self) -> None:
        Columns(USUAL, self.columns)
        self.reading()

    def interactions_path(self) -> Path:
        path = Path(self.raw_dir or "").expanduser()
        if self.raw_dir and self.interactions_file is None and path.is_file():
            return path
        return _found(self.raw_dir, self.interactions_file, INTERACTIONS, ".inter") or raw_file(
            self.raw_dir, self.interactions_file or "interactions.csv", "user, item, time"
        )

    def items_path(self) -> Path | None:
        """The file of titles; None: they stand beside the interactions."""
        if self.items_file is not None:
            return raw_file(self.raw_dir, self.items_file, "item, title")
        return _found(self.raw_dir, None, ITEMS, ".item")

    def files(self) -> list[Path]:
        """The files that are read: their content, with the options, decides the outcome."""
        return [path for path in (self.interactions_path(), self.items_path()) if path]

    def rows_of(self, path: Path, header: list[str] | None, bad: BadRows) -> Iterator[PlacedRow]:
        for where, row in placed_rows(path, bad, self.reading(header)):
            typed = header is None and suffix_of(path) in RECBOLE  # RecBole's headers tell types: user_id:token
            yield where, {name.rpartition(":")[0] or name: value for name, value in row.items()} if typed else row

    def columns_of(self, parts: tuple[str, ...]) -> Columns:
        """The columns of one of two files: of the columns named, the other file's may be missing here."""
        return Columns({part: USUAL[part] for part in parts}, self.columns_given(parts), optional=tuple(self.columns))

    def titles(self, bad: BadRows) -> tuple[dict[str, str], dict[str, Any]]:
        """The titles by item, and which columns they stand in; none where there is no file of them."""
        path, titles = self.items_path(), dict[str, str]()
        if path is None:
            return titles, {}
        columns = self.columns_of(ABOUT_ITEMS)
        for where, row in self.rows_of(path, self.items_header, bad):
            try:
                parts = needed(columns, where, row, ("item",))
                item = cell(where, "item", parts["item"])
                if item in titles:
                    raise UserError(f"{where}: item {item!r:.60} is listed twice")
                if "title" not in columns.mapped:
                    raise columns.missing(where, row, "title", ABOUT_ITEMS)
                title = str(parts.get("title") or "").strip()
                if title or self.missing_titles == "id":
                    titles[item] = self.worded(title or item)
                elif self.missing_titles == "error":
                    raise UserError(
                        f"{where}: 'title' is empty: dataset.missing_titles=skip leaves it out, id shows its id"
                    )
            except UserError as error:
                bad(error)
        return titles, {f"{path.name}, columns": columns.report().pop("columns", "")}

    def worded(self, title: str) -> str:
        return article_first(title) if self.article_first else title

    def log(self, bad: BadRows) -> Log:
        """Every user's items in order of time; among equal times, and without any, in that of the file."""
        path, (titles, about_items) = self.interactions_path(), self.titles(bad)
        in_place = self.items_path() is None  # the titles stand beside the interactions
        table, times = Interactions(titles), Times(self.time_format)
        parts_here = ("user", "item", "time", "rating", "count", *(("title",) if in_place else ()))
        columns = self.columns_of(parts_here)
        counts = {"ratings_below_minimum": 0, "counts_of_nothing": 0, "interactions_without_title": 0}
        for number, (where, row) in enumerate(self.rows_of(path, self.header, bad)):
            try:
                parts = needed(columns, where, row, ("user", "item"))
                user, item = (cell(where, part, parts[part]) for part in ("user", "item"))
                rating, count = self._rating(columns, where, row, parts), parts.get("count")
                if in_place and item not in titles:
                    self._add_title(table, item, parts, where)
                elif item not in titles and self.missing_titles == "id":
                    titles[item] = item
                    table.item_of[item] = len(table.item_of)
                time = times.of(where, parts.get("time"), number)
                if item not in titles and self.missing_titles == "error":
                    raise UserError(
                        f"{where}: item {item!r:.60} has no title in the file of titles: dataset.missing_titles=skip "
                        "leaves it out, id shows its id"
                    )
            except UserError as error:
                bad(error)
                continue
            if rating is not None and self.min_rating is not None and rating < self.min_rating:
                counts["ratings_below_minimum"] += 1
            elif count is not None and number_of(where, "count", count) <= 0:
                counts["counts_of_nothing"] += 1
            elif item not in titles:
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
        told = columns.report()
        told = {f"{path.name}, columns": told.pop("columns"), **told} if "columns" in told else told
        return table.log(path, told | about_items | report, timed=times.timed)

    def _rating(self, columns: Columns, where: str, row: dict[str, Any], parts: dict[str, Any]) -> float | None:
        if self.min_rating is None:
            return None
        if "rating" not in parts:
            raise columns.missing(where, row, "rating", ("rating",))
        return number_of(where, "rating", parts["rating"])

    def _add_title(self, table: Interactions, item: str, parts: dict[str, Any], where: str) -> None:
        title = str(parts.get("title") or "").strip() or ("" if self.missing_titles != "id" else item)
        if title:
            table.titles[item] = self.worded(title)
            table.item_of[item] = len(table.item_of)
        elif self.missing_titles == "error":
            raise UserError(
                f"{where}: item {item!r:.60} has no title: give a file of item and title (dataset.items_file), name "
                "the column (dataset.columns={title: NAME}), or set dataset.missing_titles=id"
            )


def needed(columns: Columns, where: str, row: dict[str, Any], wanted: tuple[str, ...]) -> dict[str, Any]:
    """The row's parts, of which those `wanted` must be there.

    Raises:
        UserError: one is not; names the columns that are there.
    """
    parts = columns.parts(where, row)
    for part in wanted:
        if part not in parts and part not in columns.mapped:
            raise columns.missing(where, row, part, wanted)
    return {part: None for part in wanted} | parts


def _found(raw_dir: str | None, name: str | None, usual: tuple[str, ...], suffix: str) -> Path | None:
    """The one file of the folder whose name is a usual one, whatever it ends in."""
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
            f"{folder} holds {', '.join(file.name for file in named[:8])}: dataset.interactions_file and "
            "dataset.items_file say which to read"
        )
    return named[0] if named else None
