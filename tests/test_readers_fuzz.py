"""Whatever a file holds, a reader gives sound examples or one UserError that names the file and, if any, the line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from massdpo.data.readers.impressions import Impressions
from massdpo.data.readers.mcqa import MultipleChoice
from massdpo.data.readers.preferences import Preferences
from massdpo.data.readers.recommendation import LastFM, UserSequences
from massdpo.errors import UserError
from tests.test_impressions import SMALL
from tests.test_impressions import mind as write_mind
from tests.test_mcqa import question
from tests.test_recommendation import MovieLens1M, MovieLens100K, write_interactions, write_movielens

LONG = "long title " * 18_182  # 200,002 characters
# what damage leads to beyond its own file: too little left for a split or a pool, items without their titles
TOLD_OTHERWISE = "split|no interaction|differ|negatives|has no wrong|has no title|no labelled"
fuzz = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_questions(folder: Path) -> None:
    for name in ("train", "test"):
        rows = [question(f"q{row}", [f"{name} {row} {place}" for place in range(3)], row % 3) for row in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ai2(folder: Path, **options: Any) -> Any:
    names = {"train_file": "train.jsonl", "val_file": None, "test_file": "test.jsonl"}
    return MultipleChoice(raw_dir=str(folder), **names, val_size=3, num_negatives=3, **options).load()


def write_medmcqa(folder: Path) -> None:
    for name in ("train", "test"):
        rows = [
            {"id": f"m{row}", "question": f"{name}{row}?", "cop": row % 4}
            | {each: f"{each} {name} {row}" for each in ("opa", "opb", "opc", "opd")}
            for row in range(12)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def medmcqa(folder: Path, **options: Any) -> Any:
    names = {"train_file": "train.jsonl", "val_file": None, "test_file": "test.jsonl"}
    return MultipleChoice(raw_dir=str(folder), **names, val_size=3, num_negatives=4, **options).load()


def write_lastfm(folder: Path) -> None:
    (folder / "id2name.txt").write_text("".join(f"{item}::Artist {item}\n" for item in range(40)))
    rows = [
        {"split": split, "user": user, "items": list(range(user, user + 8))}
        for split, users in (("train", 6), ("val", 2), ("test", 2))
        for user in range(users)
    ]
    (folder / "sequences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_ready(folder: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        rows = [
            {
                "historyList": "::".join(f"Artist {item}" for item in range(user, user + 3)),
                "itemList": [f"Artist {item}" for item in range(user + 3, user + 9)],
                "trueSelection": f"Artist {user + 3 + number}",
            }
            for user in range(5)
        ]
        (folder / f"lastfm-{split}.json").write_text(json.dumps(rows))


def write_jsonl_interactions(folder: Path) -> None:
    write_interactions(folder, users=12, length=6, items=40)
    for name in ("interactions", "items"):
        header, *lines = (folder / f"{name}.csv").read_text().splitlines()
        rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sequences(kind: str) -> Callable[..., Any]:
    def load(folder: Path, **options: Any) -> Any:
        files = {"interactions_file": f"interactions.{kind}", "items_file": f"items.{kind}"}
        return UserSequences(raw_dir=str(folder), num_negatives=3, **files, **options).load()

    return load


def write_preferences(folder: Path) -> None:
    rows = [
        {"prompt": f"question {row}", "chosen": f"right {row}", "rejected": ["a", f"wrong {row}"]} for row in range(20)
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


READERS: dict[str, tuple[Callable[[Path], None], Callable[..., Any], tuple[str, ...]]] = {
    "ai2": (write_questions, ai2, ("train.jsonl", "test.jsonl")),
    "medmcqa": (write_medmcqa, medmcqa, ("train.jsonl", "test.jsonl")),
    "lastfm": (
        write_lastfm,
        lambda folder, **options: LastFM(raw_dir=str(folder), num_negatives=3, **options).load(),
        ("sequences.jsonl", "id2name.txt"),
    ),
    "ready": (
        write_ready,
        lambda folder, **options: LastFM(raw_dir=str(folder), num_negatives=3, **options).load(),
        ("lastfm-train.json", "lastfm-test.json"),
    ),
    "movielens_100k": (
        lambda folder: write_movielens(folder, MovieLens100K),
        lambda folder, **options: MovieLens100K(raw_dir=str(folder), num_negatives=3, **options).load(),
        ("u.data", "u.item"),
    ),
    "movielens_1m": (
        lambda folder: write_movielens(folder, MovieLens1M),
        lambda folder, **options: MovieLens1M(raw_dir=str(folder), num_negatives=3, **options).load(),
        ("ratings.dat", "movies.dat"),
    ),
    "csv": (
        lambda folder: write_interactions(folder, users=12, length=6, items=40) and None,
        sequences("csv"),
        ("interactions.csv", "items.csv"),
    ),
    "jsonl": (write_jsonl_interactions, sequences("jsonl"), ("interactions.jsonl", "items.jsonl")),
    "preferences": (
        write_preferences,
        lambda folder, **options: Preferences(path=str(folder / "own.jsonl"), **options).load(),
        ("own.jsonl",),
    ),
    "impressions": (
        lambda folder: write_mind(folder, SMALL),
        lambda folder, **options: Impressions(path=str(folder), **options).load(),
        ("behaviors.tsv", "news.tsv"),
    ),
}


def check(splits: Any) -> None:
    for split in (splits.train, splits.val, splits.test):
        for example in split:
            assert example.prompt.strip() and not example.prompt.endswith(" ")
            assert example.chosen.strip() and all(text.strip() for text in example.pool)
            assert example.chosen not in example.pool and len(set(example.pool)) == len(example.pool)
            assert sorted(example.candidates) == sorted((example.chosen, *example.pool))
            (example.prompt + "".join(example.candidates)).encode("utf-8")


@fuzz
@given(st.data())
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Bytes cut out, doubled, overwritten: never another exception, never an unsound example; `skip` adds up."""
    write, load, files = READERS[name]
    write(tmp_path)
    path = tmp_path / data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(0, len(content) - 1)))
        stop = min(len(content), start + data.draw(st.integers(0, 60)))
        kind = data.draw(st.sampled_from(["cut", "truncate", "double", "overwrite"]))
        if kind == "cut":
            del content[start:stop]
        elif kind == "truncate":
            del content[start:]
        elif kind == "double":
            content[stop:stop] = content[start:stop]
        else:
            content[start:stop] = data.draw(st.binary(max_size=20))
    path.write_bytes(bytes(content))
    for policy in ("error", "skip"):
        try:
            check(load(tmp_path, bad_rows=policy))
        except UserError as error:
            assert "\n" not in str(error)
            # a damaged row is told by its file; what is then too little data, by the split or the pool
            assert path.name in str(error) or re.search(TOLD_OTHERWISE, str(error))


@pytest.mark.parametrize("name", READERS)
def test_bom_and_crlf_change_nothing(tmp_path: Path, name: str) -> None:
    write, load, files = READERS[name]
    write(tmp_path)
    before = load(tmp_path)
    before = [list(split) for split in (before.train, before.val, before.test)]
    for file in files:
        content = (tmp_path / file).read_bytes().replace(b"\n", b"\r\n")
        bom = b"" if name.startswith("movielens") else b"\xef\xbb\xbf"  # Latin-1 has no byte-order mark
        (tmp_path / file).write_bytes(bom + content)
    after = load(tmp_path)
    assert [list(split) for split in (after.train, after.val, after.test)] == before


BAD = {
    "ai2": [
        ("train.jsonl", '{"id": "cut'),
        ("train.jsonl", '{"id": "x"}'),
        ("train.jsonl", "[]"),
        ("test.jsonl", json.dumps(question("x", ["a", " ", "b"]))),
        ("test.jsonl", json.dumps(question("x", ["a", "b"]) | {"answerKey": "H"})),
        ("train.jsonl", b'{"id": "\xff"}'),
        ("train.jsonl", json.dumps(question("q0", ["a", "b"]))),
    ],
    "medmcqa": [
        ("train.jsonl", '{"question": "x?", "opa": "a", "cop": 0}'),
        ("test.jsonl", '{"cop": "1"}'),
        ("train.jsonl", '{"question": "x?", "opa": "a", "opb": "b", "opc": " ", "opd": "d", "cop": 0}'),
        ("train.jsonl", '{"question": "x?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 4}'),
        ("train.jsonl", '{"id": "m0", "question": "x?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3}'),
        ("test.jsonl", b'{"question": "\xff?"}'),
        ("test.jsonl", '{"question": "x?", "opa": "a"'),
    ],
    "lastfm": [
        ("sequences.jsonl", '{"split": "train", "user": 77, "items": [1, 99]}'),
        ("sequences.jsonl", '{"split": "train", "user": 0, "items": [1, 2]}'),
        ("sequences.jsonl", '{"split": "dev", "user": 0, "items": [1, 2]}'),
        ("sequences.jsonl", '{"user": 0, "items": [1, 2]}'),
        ("sequences.jsonl", '{"split": "train", "user": 78, "items": [true]}'),
        ("sequences.jsonl", '{"split": "train", "user": 78'),
        ("sequences.jsonl", b'{"split": "train", "user": "\xe9", "items": [1, 2]}'),
    ],
    "movielens_100k": [
        ("u.data", "1\t2\t3"),
        ("u.data", "1\t2\tgood\t100"),
        ("u.data", "1\t999\t5\t100"),
        ("u.item", "77||rest"),
        ("u.item", "5|Invented again|rest"),
    ],
    "movielens_1m": [
        ("ratings.dat", "1::2::3"),
        ("ratings.dat", "1::2::3::"),
        ("movies.dat", "77:: ::rest"),
        ("movies.dat", "5::Invented again::rest"),
    ],
    "csv": [
        ("interactions.csv", "u1,5"),
        ("interactions.csv", "u1,5,1,2"),
        ("interactions.csv", "u1,5,soon"),
        ("interactions.csv", "u1,5,nan"),
        ("interactions.csv", "u1,5,"),
        ("interactions.csv", "u1,999,5"),
        ("interactions.csv", ",5,5"),
        ("items.csv", "5,Another title"),
        ("items.csv", "900, "),
    ],
    "jsonl": [
        ("interactions.jsonl", '{"user": null, "item": "5", "time": 1}'),
        ("interactions.jsonl", '{"user": "u1", "item": "5", "time": "now"}'),
        ("items.jsonl", '{"item": "900", "title": "\\ud800"}'),
        ("items.jsonl", '{"item": "900", "title": " "}'),
        ("items.jsonl", '{"item": "5", "title": "Another title"}'),
        ("items.jsonl", '{"item": "900"'),
        ("interactions.jsonl", b'{"user": "u1", "item": "5", "time": "\xe9"}'),
    ],
    "impressions": [
        ("behaviors.tsv", "1\tU1\t11/1/2019 9:05:58 AM\tN1"),
        ("behaviors.tsv", "1\tU1\t11/1/2019 9:05:58 AM\tN1\tN2-2"),
        ("behaviors.tsv", "1\tU1\t11/1/2019 9:05:58 AM\tN1\tN99-1 N2-0"),
        ("behaviors.tsv", "1\t \t11/1/2019 9:05:58 AM\tN1\tN3-1 N2-0"),
        ("news.tsv", "N3\tsport\tsoccer\tAnother title"),
        ("news.tsv", "N99\tsport\tsoccer\t \trest"),
    ],
    "preferences": [("own.jsonl", '{"prompt": "p", "chosen": "c"}'), ("own.jsonl", b'{"prompt": "\xe9"')],
}


@pytest.mark.parametrize(("name", "file", "row"), [(name, *each) for name, rows in BAD.items() for each in rows])
def test_a_bad_row_is_told_by_file_and_line_or_counted(tmp_path: Path, name: str, file: str, row: str | bytes) -> None:
    write, load, _ = READERS[name]
    write(tmp_path)
    before = load(tmp_path)
    before_rows = [list(split) for split in (before.train, before.val, before.test)]
    lines = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(lines + (row if isinstance(row, bytes) else row.encode()) + b"\n")
    number = lines.count(b"\n") + 1
    place = f"{file}:{number}: "
    with pytest.raises(UserError, match=re.escape(place)):
        load(tmp_path)
    after = load(tmp_path, bad_rows="skip")
    assert after.report["bad_rows_skipped"] == 1 and place in after.report["first_bad_row"]
    assert [list(split) for split in (after.train, after.val, after.test)] == before_rows


@pytest.mark.parametrize(
    ("bad", "told"), [("", "9: expected '7::"), ("7:: \n", "8: expected"), ("7::\xe9\n", "8: not UTF-8")]
)
def test_a_gap_in_the_names_is_never_skipped(tmp_path: Path, bad: str, told: str) -> None:
    """Ids are places in the file: a line left out would give every later artist another's name."""
    write_lastfm(tmp_path)
    path = tmp_path / "id2name.txt"
    path.write_bytes(path.read_text().replace("7::Artist 7\n", bad or "\n", 1).encode("iso-8859-1"))
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=rf"id2name.txt:{told}"):
            LastFM(raw_dir=str(tmp_path), bad_rows=policy).load()


TITLES = {
    "ai2": ("train.jsonl", "train 3 1"),
    "medmcqa": ("train.jsonl", "opb train 3"),
    "lastfm": ("id2name.txt", "Artist 5"),
    "ready": ("lastfm-train.json", "Artist 5"),
    "movielens_100k": ("u.item", "Invented Film 20 (1920)"),
    "movielens_1m": ("movies.dat", "Invented Film 20 (1920)"),
    "csv": ("items.csv", "Thing 007"),
    "jsonl": ("items.jsonl", "Thing 007"),
    "preferences": ("own.jsonl", "wrong 3"),
    "impressions": ("news.tsv", 'Item 5: "the 5th", as told; they say|so'),
}


@pytest.mark.parametrize("name", READERS)
def test_a_very_long_title_is_kept_whole(tmp_path: Path, name: str) -> None:
    write, load, _ = READERS[name]
    write(tmp_path)
    file, title = TITLES[name]
    path = tmp_path / file
    content = path.read_bytes()
    path.write_bytes(content.replace(title.encode(), LONG.strip().encode()))
    assert path.read_bytes() != content
    splits = load(tmp_path)
    check(splits)
    assert any(LONG.strip() in example.candidates for split in (splits.train, splits.val) for example in split)
