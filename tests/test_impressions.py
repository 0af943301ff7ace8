"""Random impressions come back as the same examples from every layout; what is left out is counted and told."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from massdpo.data.prepare import prepare
from massdpo.data.readers.impressions import Impressions
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.store import Cache

Impression = tuple[str, list[int], dict[int, bool]]  # user, history, and what was shown: clicked or not
TITLES = [f'Item {item}: "the {item}th", as told; they say|so' for item in range(12)]
MIND_TIME = "11/{:02d}/2019 {}:05:58 {}"


def mind(folder: Path, log: list[Impression], hours: list[int] | None = None) -> None:
    """A folder as Microsoft publishes it: no headers, tabs, quotation marks that mean nothing, more columns."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, (user, history, shown) in enumerate(log):
        hour = hours[number] if hours else number
        time = MIND_TIME.format(1 + hour // 24 % 28, hour % 12 or 12, "AM" if hour % 24 < 12 else "PM")
        marked = " ".join(f"N{item}-{int(clicked)}" for item, clicked in shown.items())
        lines.append("\t".join([str(number), user, time, " ".join(f"N{item}" for item in history), marked]))
    (folder / "behaviors.tsv").write_text("\n".join(lines) + "\n")
    news = [
        f'N{item}\tsport\tsoccer\t{title}\tAbstract "{item}\thttps://x\t[]\t[]' for item, title in enumerate(TITLES)
    ]
    (folder / "news.tsv").write_text("\n".join(news) + "\n")
    (folder / "entity_embedding.vec").write_text("Q1\t0.5\n")


def as_rows(log: list[Impression]) -> list[dict[str, Any]]:
    return [
        {
            "user": user,
            "history": [TITLES[item] for item in history],
            "shown": [TITLES[item] for item in shown],
            "clicked": [TITLES[item] for item, clicked in shown.items() if clicked],
        }
        for user, history, shown in log
    ]


def json_lines(folder: Path, log: list[Impression]) -> None:
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_rows(log)))


def parquet(folder: Path, log: list[Impression]) -> None:
    pq.write_table(pa.Table.from_pylist(as_rows(log)), folder / "own.parquet")


def csv_of_ids(folder: Path, log: list[Impression]) -> None:
    """Ids in cells, under names of one's own, the titles in a second file."""
    with open(folder / "own.csv", "w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["who", "before", "listed", "taken"])
        for user, history, shown in log:
            cells = history, shown, [item for item, clicked in shown.items() if clicked]
            table.writerow([user, *("|".join(map(str, items)) for items in cells)])
    with open(folder / "items.csv", "w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerows([("item", "title"), *enumerate(TITLES)])


LAYOUTS: dict[str, tuple[Callable[[Path, list[Impression]], None], dict[str, Any]]] = {
    "mind": (mind, {}),
    "json lines": (json_lines, {}),
    "parquet": (parquet, {}),
    "csv": (
        csv_of_ids,
        {
            "item_separator": "|",
            "columns": {"user": "who", "history": "before", "shown": "listed", "clicked": "taken"},
        },
    ),
}


@st.composite
def logs(draw: st.DrawFn) -> list[Impression]:
    """Users enough to be held out, who each click at least once beside a negative; whatever else may happen to them."""
    items = st.integers(0, len(TITLES) - 1)
    log = []
    for user in range(20):
        history = draw(st.lists(items, min_size=1, max_size=4))
        clicked, other = draw(st.lists(items, min_size=2, max_size=2, unique=True))
        log.append((f"U{user}", history, {clicked: True, other: False}))
        shown = draw(st.dictionaries(items, st.booleans(), min_size=1, max_size=6))
        log.append((f"U{user}", draw(st.lists(items, max_size=4)), shown))
    return draw(st.permutations(log))


def expected(log: list[Impression]) -> Counter[Any]:
    examples: Counter[Any] = Counter()
    for user, history, shown in log:
        negatives = frozenset(TITLES[item] for item, clicked in shown.items() if not clicked)
        if history and negatives:
            past = tuple(TITLES[item] for item in history)
            examples.update((user, past, TITLES[item], negatives) for item, clicked in shown.items() if clicked)
    return examples


def every(splits: Splits) -> list[PreferenceExample]:
    return [example for split in (splits.train, splits.val, splits.test) for example in split]


def seen(splits: Splits) -> Counter[Any]:
    return Counter((each.meta["user"], each.history, each.chosen, frozenset(each.pool)) for each in every(splits))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_examples(tmp_path: Path, layout: str, log: list[Impression]) -> None:
    write, options = LAYOUTS[layout]
    write(tmp_path, log)
    splits = Impressions(path=str(tmp_path), **options).load()
    assert seen(splits) == expected(log)
    users = [{example.meta["user"] for example in split} for split in (splits.train, splits.val, splits.test)]
    assert not users[0] & users[1] and not users[1] & users[2] and not users[0] & users[2]
    counted = {
        "without_click": sum(not any(shown.values()) for _, _, shown in log),
        "several_clicks": sum(sum(s.values()) > 1 and not all(s.values()) and bool(h) for _, h, s in log),
        "short_history": sum(any(shown.values()) and not history for _, history, shown in log),
        "clicks_without_negative": sum(sum(s.values()) for _, h, s in log if all(s.values()) and h),
    }
    assert {name: splits.report.get(name, 0) for name in counted} == counted
    for name, count in counted.items():  # and told
        assert any(note.startswith(f"{count} ") for note in splits.report["notes"]) or not count, name


SMALL: list[Impression] = [(f"U{row}", [row % 12], {(row + 1) % 12: True, (row + 2) % 12: False}) for row in range(40)]


def test_splits_by_folder_are_kept_and_the_missing_one_is_held_out(tmp_path: Path) -> None:
    """As MINDsmall comes: the public test part has no clicks, so dev may be told to be the test split."""
    mind(tmp_path / "MINDsmall_train", SMALL[:30])
    mind(tmp_path / "MINDsmall_dev", SMALL[30:])
    found = Impressions(path=str(tmp_path)).load()
    assert {each.meta["user"] for each in found.val} == {f"U{row}" for row in range(30, 40)}
    assert (len(found.train), len(found.test)) == (27, 3)
    told = Impressions(path=str(tmp_path), splits={"train": "MINDsmall_train", "test": "MINDsmall_dev"}).load()
    assert {each.meta["user"] for each in told.test} == {f"U{row}" for row in range(30, 40)} and len(told.val) == 3
    assert seen(found) == seen(told) == expected(SMALL)
    assert [each.id for each in told.val] == ["val/0", "val/1", "val/2"]
    assert told.test[0].where == "MINDsmall_dev/behaviors.tsv:1"


def test_splits_by_time_take_the_latest(tmp_path: Path) -> None:
    hours = [(7 * row) % 40 for row in range(40)]  # 7 and 40 have no common divisor: each hour once
    mind(tmp_path, SMALL, hours)
    splits = Impressions(path=str(tmp_path), split="time").load()
    found = [[hours[int(each.meta["user"][1:])] for each in split] for split in (splits.train, splits.val, splits.test)]
    assert [sorted(each) for each in found] == [[*range(32)], [*range(32, 36)], [*range(36, 40)]]


def test_the_slate_does_not_tell_what_was_clicked(tmp_path: Path) -> None:
    """The chosen one was shown first everywhere; here it stands in either place about as often, by the seed."""
    mind(tmp_path, [(f"U{row}", [row % 12], {(row // 12 + 1) % 12: True, 0: False}) for row in range(120)])
    places = [
        [each.candidates.index(each.chosen) for each in every(Impressions(path=str(tmp_path), seed=seed).load())]
        for seed in (0, 1)
    ]
    assert 35 < sum(places[0]) < 85 and places[0] != places[1]  # 4.6 standard deviations


def test_titles_that_are_equal_or_missing(tmp_path: Path) -> None:
    rows = [f"U{row},a b,a-1 b-0 c-0 d-0" for row in range(20)]
    (tmp_path / "own.csv").write_text("user,history,impressions\n" + "\n".join(rows) + "\n")
    (tmp_path / "news.csv").write_text("item,title\na,Alpha\nb,Beta\nc, BETA\n")
    with pytest.raises(UserError, match=r"own.csv:2: item 'd' has no title, .*dataset.missing_titles=skip"):
        Impressions(path=str(tmp_path)).load()
    skipped = Impressions(path=str(tmp_path), missing_titles="skip").load()
    assert {len(each.pool) for each in every(skipped)} == {1}
    assert (skipped.report["titles_shown_again"], skipped.report["without_title"]) == (20, 20)
    by_id = Impressions(path=str(tmp_path), missing_titles="id").load()
    assert {"d"} < set(by_id.train[0].pool) and len(by_id.train[0].pool) == 2
    (tmp_path / "news.csv").unlink()
    bare = Impressions(path=str(tmp_path)).load()
    assert bare.train[0].chosen == "a" and any("no file of titles" in note for note in bare.report["notes"])


def test_prepared_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mind(tmp_path / "data", [(user, history, shown | {11: True, 10: False}) for user, history, shown in SMALL])
    node = {"_target_": "massdpo.data.readers.impressions.Impressions", "name": "impressions"}
    splits = prepare(node | {"path": str(tmp_path / "data")}, Cache(tmp_path / "cache"))
    assert len(every(splits)) > 70
    several = sum(
        next(iter(shown)) not in (10, 11) for _, _, shown in SMALL
    )  # 11 is clicked in all of them, 10 in none
    assert (
        f"note: impressions: {several} impressions have several clicks: an example for each" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("user,history,shown\nu,a,b c-0\n", {}, r"own.csv:2: 'b' in 'shown' ends in neither -1 .*dataset.columns={cli"),
        ("user,past_ones,list\nu,a,b-1 c-0\n", {}, r'own.csv:2: no "history" in the columns user, past_ones, list'),
        (
            "history,shown,clicked\na,b c,b\n",
            {"columns": {"clicked": "took"}},
            r"no column took \(dataset.columns.clicke",
        ),
        ("history,shown,clicked\na,b c,b\n", {"split": "time"}, r"own.csv:2: dataset.split=time needs a time in each"),
        ("history,shown,clicked\na,b c,\n", {}, r"no example for the split 'train': 1 impressions without a click"),
        ("history,shown,clicked\na,b c,b\n", {}, r"no example for the split 'val'"),
        ("history,shown,clicked\na,b c,b\n", {"splits": {"test": "own"}}, r"dataset.splits.test=own: .* has train"),
        ("history,shown\n", {}, r"no example for the split 'train'"),
        ("", {}, r"own.csv is empty"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, text: str, options: dict[str, Any], says: str) -> None:
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        Impressions(path=str(tmp_path / "own.csv"), **options).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs dataset.path"),
        ({"path": "/nowhere"}, "cannot be read"),
        ({"item_separator": ""}, "dataset.item_separator is empty"),
        ({"columns": {"rating": "x"}}, "dataset.columns.rating is not allowed: use history, shown"),
        ({"path": "/nowhere", "splits": {"dev": "x"}}, "dataset.splits.dev is not allowed: use train, val, test"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Impressions(**options).load()


def test_a_bad_row_is_counted_where_asked(tmp_path: Path) -> None:
    mind(tmp_path, SMALL)
    with open(tmp_path / "behaviors.tsv", "a") as file:
        file.write("41\tU41\t11/1/2019 9:05:58 AM\tN1\tN2 N3\n")
    with pytest.raises(UserError, match=r"behaviors.tsv:41: 'N2' in 'shown'"):
        Impressions(path=str(tmp_path)).load()
    splits = Impressions(path=str(tmp_path), bad_rows="skip").load()
    assert splits.report["bad_rows_skipped"] == 1 and seen(splits) == expected(SMALL)
