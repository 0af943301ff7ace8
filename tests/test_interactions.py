"""One log of interactions gives the same sequences in every layout; what is left out is counted and told."""

import csv
import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from massdpo.data.prepare import prepare
from massdpo.data.readers.recommendation import UserSequences
from massdpo.errors import UserError
from massdpo.store import Cache
from tests.conftest import SHARED_CASES, needs_shared_cases

Rows = list[dict[str, Any]]
START = datetime(2019, 11, 1, 9, tzinfo=UTC)
TITLE = 'The "{}"; one, two|three'  # what separators and quotation marks could cut


def write_table(separator: str, encoding: str = "utf-8", quoting: Any = csv.QUOTE_MINIMAL, header: bool = True) -> Any:
    def write(file: Path, rows: Rows) -> None:
        with open(file, "w", encoding=encoding, newline="") as sink:
            if quoting == csv.QUOTE_NONE:
                lines = [*([list(rows[0])] if header else []), *(row.values() for row in rows)]
                sink.writelines(separator.join(map(str, line)) + "\n" for line in lines)
                return
            table = csv.DictWriter(sink, list(rows[0]), delimiter=separator, quoting=quoting)
            table.writeheader()
            table.writerows(rows)

    return write


def write_gz(file: Path, rows: Rows) -> None:
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


LAYOUTS: dict[str, tuple[Callable[[Path, Rows], None], str, str, dict[str, Any], dict[str, str]]] = {
    # how, the two files, options, and what columns are called
    "csv": (write_table(","), "interactions.csv", "items.csv", {}, {}),
    "semicolon": (write_table(";", "utf-16"), "ratings.csv", "movies.csv", {}, {"user": "userId", "item": "movieId"}),
    "tsv": (write_table("\t"), "interactions.tsv", "items.tsv", {}, {"time": "timestamp"}),
    "recbole": (
        write_table("\t", quoting=csv.QUOTE_NONE),
        "own.inter",
        "own.item",
        {},
        {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float", "title": "movie_title:token_seq"},
    ),
    "no header": (
        write_table("::", "latin-1", csv.QUOTE_NONE, header=False),
        "ratings.dat",
        "movies.dat",
        {
            **{
                "interactions_file": "ratings.dat",
                "items_file": "movies.dat",
                "separator": "::",
                "encoding": "latin-1",
            },
            **{"header": ["user", "item", "time"], "items_header": ["item", "title"]},
        },
        {},
    ),
    "told": (
        write_table(","),
        "a.csv",
        "b.csv",
        {
            **{"interactions_file": "a.csv", "items_file": "b.csv"},
            "columns": {"user": "wer", "item": "was", "time": "wann", "title": "wie"},
        },
        {"user": "wer", "item": "was", "time": "wann", "title": "wie"},
    ),
    "parquet": (
        lambda file, rows: pq.write_table(pa.Table.from_pylist(rows), file),
        "interactions.parquet",
        "items.parquet",
        {},
        {},
    ),
    "gz": (write_gz, "interactions.jsonl.gz", "items.jsonl.gz", {}, {"item": "asin"}),
}
TIMES: dict[str, Callable[[int], Any]] = {
    "seconds": lambda rank: 1387670400 + rank,
    "fractions": lambda rank: f"{1387670400 + rank}.0",
    "nanoseconds": lambda rank: 1600000000000000000 + 100 * rank,
    "iso": lambda rank: (START + timedelta(hours=rank)).strftime("%Y-%m-%d %H:%M:%S"),
    "iso with a zone": lambda rank: (START + timedelta(hours=rank)).strftime("%Y-%m-%dT%H:%M:%SZ"),
}


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """(user, item, rank in time) in the order of the file: every user's items are distinct, and so are its ranks."""
    rows = []
    for user in range(draw(st.integers(10, 12))):
        items = draw(st.permutations(range(30)))[: draw(st.integers(4, 6))]
        # moved on for each user, so that everyone has items left that are new to them
        rows += [(f"u{user}", (item + 3 * user) % 30, rank) for rank, item in enumerate(items)]
    return draw(st.permutations(rows))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs(), data=st.data())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_sequences(tmp_path: Path, layout: str, log: Any, data: st.DataObject) -> None:
    write, interactions, items, options, called = LAYOUTS[layout]
    time = TIMES[data.draw(st.sampled_from(sorted(TIMES)))]
    name = {part: called.get(part, part) for part in ("user", "item", "time", "title")}
    write(
        tmp_path / interactions,
        [{name["user"]: user, name["item"]: f"{item:04d}", name["time"]: time(rank)} for user, item, rank in log],
    )
    write(tmp_path / items, [{name["item"]: f"{item:04d}", name["title"]: TITLE.format(item)} for item in range(30)])
    splits = UserSequences(raw_dir=str(tmp_path), num_negatives=2, **options).load()
    found: dict[str, list[str]] = {}
    for split in (splits.train, splits.val, splits.test):
        for example in split:
            found[example.meta["user"]] = [*example.history, example.chosen]  # the last row of a user has the most
    expected: dict[str, dict[int, str]] = {}
    for user, item, rank in log:
        expected.setdefault(user, {})[rank] = TITLE.format(item)
    assert found == {user: [titles[rank] for rank in sorted(titles)] for user, titles in expected.items()}
    assert "equal_times" not in splits.report


def small(folder: Path, rows: list[str], header: str = "user,item,time", titles: int = 40) -> UserSequences:
    (folder / "interactions.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{item},Thing {item}\n" for item in range(titles)))
    return UserSequences(raw_dir=str(folder), num_negatives=2)


def test_equal_times_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = [0, 1, 1, 2, 2, 2]
    small(tmp_path, [f"u{user},{user + place},{time}" for user in range(20) for place, time in enumerate(times)])
    node = {"_target_": "massdpo.data.readers.recommendation.UserSequences", "name": "own", "num_negatives": 2}
    splits = prepare(node | {"raw_dir": str(tmp_path)}, Cache(tmp_path / "cache"))
    assert splits.report["equal_times"] == "60 of 100 neighbours (60%): their order is the file's"
    assert "note: own: equal times: 60 of 100" in capsys.readouterr().err
    assert splits.train[0].history[:2] == tuple(f"Thing {int(splits.train[0].meta['user'][1:]) + at}" for at in (0, 1))


def test_ratings_are_ignored_aloud_or_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"u{user},{user + place},{place},{0.5 + place % 5}" for user in range(20) for place in range(10)]
    base = small(tmp_path, rows, "user,item,time,rating")
    assert "dataset.min_rating=N leaves out" in base.load().report["rating_is_ignored"]
    kept = UserSequences(raw_dir=str(tmp_path), num_negatives=2, min_rating=2.5).load()
    assert kept.report["ratings_below_minimum"] == 80 and kept.report["interactions"] == 120
    assert "rating_is_ignored" not in kept.report
    small(tmp_path, [row.rsplit(",", 1)[0] for row in rows])
    with pytest.raises(UserError, match=r'interactions.csv:2: no "rating" in the columns user, item, time'):
        UserSequences(raw_dir=str(tmp_path), min_rating=2).load()


def test_what_was_bought_no_time_is_left_out(tmp_path: Path) -> None:
    rows = [f"u{user},{user + place},{place},{place % 3}" for user in range(20) for place in range(9)]
    splits = small(tmp_path, rows, "user,item,time,quantity").load()
    assert splits.report["counts_of_nothing"] == 60 and splits.report["interactions"] == 120


def test_titles_beside_the_interactions_and_titles_that_are_missing(tmp_path: Path) -> None:
    rows = [f"u{user},{user + place},{place}" for user in range(20) for place in range(8)]
    base = small(tmp_path, rows, titles=20)
    with pytest.raises(UserError, match=r"interactions.csv:\d+: item '20' has no title, .*dataset.missing_titles=skip"):
        base.load()
    left_out = UserSequences(raw_dir=str(tmp_path), num_negatives=2, missing_titles="skip").load()
    assert left_out.report["interactions_without_title"] == sum(
        user + place >= 20 for user in range(20) for place in range(8)
    )
    by_id = UserSequences(raw_dir=str(tmp_path), num_negatives=2, missing_titles="id").load()
    assert by_id.report["interactions"] == 160 and by_id.report["items"] == 27
    assert {"Thing 19", "20"} <= {title for example in by_id.train for title in (*example.history, *example.candidates)}

    (alone := tmp_path / "alone.csv").write_text(
        "customer_id,product_id,product_name,order_date\n"
        + "".join(f"u{u},{u + at},Thing {u + at},2020-01-{1 + at:02d}\n" for u in range(20) for at in range(8))
    )
    whole = UserSequences(raw_dir=str(alone), num_negatives=2).load()
    assert whole.report["interactions"] == 160 and whole.report["items"] == 27
    assert whole.train[0].chosen.startswith("Thing ")
    alone.write_text(alone.read_text().replace("product_name", "x"))
    with pytest.raises(UserError, match=r"alone.csv:2: item '0' has no title, .*dataset.columns={title: NAME}"):
        UserSequences(raw_dir=str(alone)).load()


@pytest.mark.parametrize(
    ("header", "row", "says"),
    [
        (
            "buyer_no,sku,time",
            "u,1,5",
            r'no "user" in the columns buyer_no, sku, time; .*dataset.columns={user: buyer_no}',
        ),
        ("user,item,time", "u,1,03/04/2019", r"'time' must be a number .* or an ISO date, .*dataset.time_format"),
        ("user,item,time", "u,1,2019-11-01", r"'time' is '2019-11-01', but the rows before have a number"),
        ("user,item,time", "u,1,", r"only some rows have a 'time'"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, header: str, row: str, says: str) -> None:
    first = ["u,0,1"] if header.startswith("user") else []
    with pytest.raises(UserError, match=rf"interactions.csv:{2 + len(first)}: {says}"):
        small(tmp_path, [*first, row], header).load()


def test_dates_of_a_told_format_and_two_candidates_for_a_file(tmp_path: Path) -> None:
    rows = [f"u{user},{user + place},{28 - place:02d}/02/2019 9:00 PM" for user in range(20) for place in range(6)]
    small(tmp_path, rows)
    options: dict[str, Any] = {"raw_dir": str(tmp_path), "num_negatives": 2}
    splits = UserSequences(**options, time_format="%d/%m/%Y %I:%M %p").load()
    user = int(splits.train[0].meta["user"][1:])
    assert splits.train[0].history == tuple(f"Thing {user + at}" for at in (5, 4, 3))
    (tmp_path / "ratings.csv").write_text("x")
    with pytest.raises(
        UserError, match=r"holds interactions.csv, ratings.csv: say which to read with dataset.interactions_file"
    ):
        UserSequences(**options).load()


@needs_shared_cases
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("semicolon", "tsv", "iso_dates", "float_times", "nanoseconds")),
        ("latin1", {"encoding": "latin-1"}),
        ("missing_titles", {"missing_titles": "skip"}),
        ("missing_titles", {"missing_titles": "id"}),
    ],
)
def test_the_cases(name: str, options: dict[str, Any]) -> None:
    """Every user's items in the order of the file, which is that of time in all of them."""
    splits = UserSequences(raw_dir=str(SHARED_CASES / name), num_negatives=2, **options).load()
    titles, separator = {}, {"semicolon": ";", "tsv": "\t"}.get(name, ",")
    for line in next((SHARED_CASES / name).glob("items.*")).read_text("latin-1").splitlines()[1:]:
        item, title = line.split(separator)
        titles[item] = title.strip() or (item if options.get("missing_titles") == "id" else "")
    expected: dict[str, list[str]] = {}
    for line in next((SHARED_CASES / name).glob("interactions.*")).read_text().splitlines()[1:]:
        user, item, _ = line.split(separator)
        if title := titles.get(item, item if options.get("missing_titles") == "id" else ""):
            expected.setdefault(user, []).append(title)
    found = {}
    for split in (splits.train, splits.val, splits.test):
        for example in split:
            found[example.meta["user"]] = [*example.history, example.chosen]
    assert found == {user: rows for user, rows in expected.items() if len(rows) > 3}


@needs_shared_cases
@pytest.mark.parametrize(("name", "says"), [("latin1", "not UTF-8 .*dataset.encoding"), ("missing_titles", "title")])
def test_cases_that_need_an_option_say_which(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        UserSequences(raw_dir=str(SHARED_CASES / name), num_negatives=2).load()
