"""One quiz in every layout and container gives the same questions; what is not certain is asked."""

import csv
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from massdpo.data.readers.mcqa import MultipleChoice
from massdpo.errors import UserError
from tests.conftest import SHARED_CASES, needs_shared_cases

Quiz = list[tuple[str, list[str], int]]  # question, options, place of the right one
WORD = st.text("abcdefghij xyzäß,;|\"'", min_size=2, max_size=12).filter(lambda text: len(text.strip()) > 1)


@st.composite
def quizzes(draw: st.DrawFn) -> Quiz:
    size = draw(st.integers(2, 5))
    stems = draw(st.lists(WORD.map(str.strip), min_size=12, max_size=16, unique_by=str.casefold))
    options = st.lists(WORD.map(str.strip), min_size=size, max_size=size, unique_by=lambda text: " ".join(text.split()))
    # the first and the last option are right somewhere, so that numbers from 0 and from 1 are told apart
    places = [0, size - 1, *draw(st.lists(st.integers(0, size - 1), min_size=len(stems) - 2, max_size=len(stems) - 2))]
    return [(stem, draw(options), place) for stem, place in zip(stems, places, strict=True)]


LAYOUTS: dict[str, Callable[[str, list[str], int], dict[str, Any]]] = {
    "ai2": lambda stem, options, place: {
        "question": {
            "stem": stem,
            "choices": [{"label": "ABCDE"[at], "text": text} for at, text in enumerate(options)],
        },
        "answerKey": "ABCDE"[place],
    },
    "hub arc": lambda stem, options, place: {
        "question": stem,
        "choices": {"text": options, "label": list("12345"[: len(options)])},
        "answerKey": "12345"[place],
    },
    "hub openbookqa": lambda stem, options, place: {
        "question_stem": stem,
        "choices": {"text": options, "label": list("ABCDE"[: len(options)])},
        "answerKey": "ABCDE"[place],
    },
    "mmlu": lambda stem, options, place: {"question": stem, "subject": "x", "choices": options, "answer": place},
    "hellaswag": lambda stem, options, place: {"ctx": stem, "endings": options, "label": str(place)},
    "text": lambda stem, options, place: {"question": stem, "options": options, "answer": options[place]},
    "cell": lambda stem, options, place: {"question": stem, "options": json.dumps(options), "answer": "abcde"[place]},
    "lettered": lambda stem, options, place: {
        "Question": stem,
        **{"ABCDE"[at]: text for at, text in enumerate(options)},
        "Answer": "ABCDE"[place],
    },
    "numbered": lambda stem, options, place: {
        "question": stem,
        **{f"option {at + 1}": text for at, text in enumerate(options)},
        "correct": str(place + 1),
    },
    "medmcqa": lambda stem, options, place: {
        "question": stem,
        **{f"op{'abcde'[at]}": text for at, text in enumerate(options)},
        "cop": place,
    },
}
FLAT = {"cell", "lettered", "numbered", "medmcqa"}  # what fits into a table of text


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    (file := path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_gz(path: Path, rows: list[dict[str, Any]]) -> Path:
    (file := path / "quiz.json.gz").write_bytes(gzip.compress(json.dumps({"data": rows}).encode()))
    return file


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file := path / "quiz.parquet")
    return file


def write_saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(place := path / "saved")
    return place


def write_columns(separator: str, suffix: str) -> Callable[[Path, list[dict[str, Any]]], Path]:
    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        with open(file := path / f"quiz{suffix}", "w", encoding="utf-16", newline="") as sink:
            table = csv.DictWriter(sink, list(rows[0]), delimiter=separator)
            table.writeheader()
            table.writerows(rows)
        return file

    return write


CONTAINERS = {"jsonl": write_jsonl, "gz": write_gz, "parquet": write_parquet, "save_to_disk": write_saved}
COLUMNS = {
    "csv": write_columns(",", ".csv"),
    "semicolon": write_columns(";", ".csv"),
    "tsv": write_columns("\t", ".tsv"),
}


def read(path: Path, **options: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    splits = MultipleChoice(path=str(path), **{"num_negatives": "own", "val_size": 0.1} | options).load()
    examples = [example for split in (splits.train, splits.val, splits.test) for example in split]
    return sorted((example.prompt, example.chosen, example.pool) for example in examples)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(quiz=quizzes(), data=st.data())
@pytest.mark.parametrize("container", CONTAINERS | COLUMNS)
def test_every_layout_gives_the_same_questions(tmp_path: Path, container: str, quiz: Quiz, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(FLAT) if container in COLUMNS else list(LAYOUTS)))
    expected = sorted(
        (
            f"Question: {stem}\nOptions: {'; '.join(options)}\nAnswer:",
            options[place],
            tuple(text for text in options if text != options[place]),
        )
        for stem, options, place in quiz
    )
    rows = [LAYOUTS[layout](*each) for each in quiz]
    assert read((CONTAINERS | COLUMNS)[container](tmp_path, rows)) == expected


def test_wrong_answers_beside_the_right_one_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    """SciQ's form: the right option has no place of its own, and must not always come first."""
    rows = [
        {"question": f"q{row}?", "correct_answer": f"right {row}", "support": "because"}
        | {f"distractor{each}": f"wrong {row}.{each}" for each in (1, 2, 3)}
        for row in range(60)
    ]
    read(path := write_jsonl(tmp_path, rows))
    splits = MultipleChoice(path=str(path), val_size=0.1).load()
    places = []
    for example in splits.train:
        listed = example.prompt.split("Options: ")[1].removesuffix("\nAnswer:").split("; ")
        assert {text.split()[0] for text in listed} == {"right", "wrong"} and len(listed) == 4
        places.append(listed.index(example.chosen))
    assert len(splits.train) == 48 and min(map(places.count, range(4))) >= 4  # of 12 expected
    assert splits.report["ignored_column_support"] == 60
    again = MultipleChoice(path=str(path), val_size=0.1).load()
    assert [example.prompt for example in again.train] == [example.prompt for example in splits.train]
    other = MultipleChoice(path=str(path), val_size=0.1, seed=1).load()
    assert sorted(each.prompt for each in other.train) != sorted(each.prompt for each in splits.train)


def test_what_an_answer_means_is_asked_where_it_is_not_certain(tmp_path: Path) -> None:
    rows = [{"question": f"q{row}", "options": ["w", "x", "y", "z"], "answer": 1 + row % 3} for row in range(20)]
    path = write_jsonl(tmp_path, rows)
    with pytest.raises(
        UserError, match=r"quiz.jsonl:1: the answer '1' can be read as index0 or as index1.*set dataset"
    ):
        read(path)
    for way, base in (("index0", 0), ("index1", 1)):
        chosen = {prompt: chosen for prompt, chosen, _ in read(path, answer=way)}
        assert chosen["Question: q1\nOptions: w; x; y; z\nAnswer:"] == "wxyz"[2 - base]
    numbers = [{"question": f"q{row}", "options": ["2", "0", "1"], "answer": str(row % 3)} for row in range(20)]
    with pytest.raises(UserError, match=r"can be read as index0 or as text"):
        read(write_jsonl(tmp_path, numbers))


def test_one_answer_that_is_no_option_does_not_change_how_the_others_are_read(tmp_path: Path) -> None:
    rows = [{"question": f"q{row}", "options": ["w", "x", "y"], "answer": row % 3} for row in range(20)]
    path = write_jsonl(tmp_path, [*rows, {"question": "bad", "options": ["w", "x"], "answer": 3}])
    with pytest.raises(UserError, match=r"quiz.jsonl:21: the answer '3' is none of the 2 options"):
        read(path)
    assert len(read(path, bad_rows="skip")) == 20


@pytest.mark.parametrize("names", [list("ABCD"), ["option1", "option2", "option3", "option4"]])
def test_an_empty_column_makes_no_other_option_the_right_one(tmp_path: Path, names: list[str]) -> None:
    """Whichever of four options are empty: a row is read right, or refused."""
    texts = ["one", "two", "three", "four"]
    rows = [
        {"question": f"{right} {''.join('x' if at in empty else 'o' for at in range(4))}"}
        | {name: "" if at in empty else texts[at] for at, name in enumerate(names)}
        | {"answer": "ABCD"[right] if names[0] == "A" else str(right + 1)}
        for size in range(3)
        for empty in itertools.combinations(range(4), size)
        for right in range(4)
        if right not in empty
    ]
    file = write_columns(",", ".csv")(tmp_path, rows)
    found = read(file, bad_rows="skip", answer=None if names[0] == "A" else "index1")
    assert found and all(chosen == texts[int(prompt.removeprefix("Question: ")[0])] for prompt, chosen, _ in found)
    assert sum(len(pool) == 3 for _, _, pool in found) == 4


@pytest.mark.parametrize("letter", ["ß", "ŉ", "é", "Σ"])
def test_an_answer_of_one_letter_may_be_an_options_text(tmp_path: Path, letter: str) -> None:
    rows = [{"question": f"q{row}", "options": ["s", letter], "answer": letter} for row in range(12)]
    assert {chosen for _, chosen, _ in read(write_jsonl(tmp_path, rows))} == {letter}


def test_what_is_not_read_of_a_folder_is_told(tmp_path: Path) -> None:
    rows = [{"question": f"q{row}", "options": ["a", "b"], "answer": "a"} for row in range(12)]
    for part in (0, 1):
        write_jsonl(tmp_path, rows).rename(tmp_path / f"train_{part}.jsonl")
    splits = MultipleChoice(path=str(tmp_path), num_negatives="own", val_size=1).load()
    assert splits.report["notes"] == ["splits that were ignored: train_1 (dataset.splits)"]


def test_columns_are_told_or_asked_for(tmp_path: Path) -> None:
    rows = [{"Frage": f"q{row}", "gut": f"g{row}", "schlecht": f"s{row}", "egal": f"e{row}"} for row in range(20)]
    path = write_columns(";", ".csv")(tmp_path, rows)
    with pytest.raises(UserError, match=r'quiz.csv:2: no "question" in the columns Frage, gut, .*dataset.columns={'):
        read(path)
    found = read(path, columns={"question": "Frage", "answer": "gut", "wrong": ["schlecht", "egal"]})

    assert all(set(pool) == {f"s{chosen[1:]}", f"e{chosen[1:]}"} for _, chosen, pool in found)
    with pytest.raises(UserError, match=r"no column gutt \(dataset.columns.answer\) among Frage, gut"):
        read(path, columns={"question": "Frage", "answer": "gutt", "wrong": "schlecht"})
    with pytest.raises(UserError, match=r"needs either dataset.path=FILE"):
        MultipleChoice().load()


def test_splits_are_found_or_told_and_missing_ones_are_held_out(tmp_path: Path) -> None:
    for name, count in (("auxiliary_train", 30), ("dev", 5), ("test", 8)):
        rows = [{"question": f"{name} {row}", "choices": ["a", "b"], "answer": row % 2} for row in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = MultipleChoice(path=str(tmp_path), num_negatives="own").load()
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [30, 5, 8]
    told = MultipleChoice(
        path=str(tmp_path), splits={"train": "auxiliary_train"}, num_negatives="own", val_size=4
    ).load()
    assert [len(split) for split in (told.train, told.val, told.test)] == [23, 4, 3]
    assert "held out" in told.report["val_is"] and "held out" in told.report["test_is"]


@needs_shared_cases
@pytest.mark.parametrize("name", ["hub_arc", "hub_obqa"])
def test_the_hubs_forms(name: str) -> None:
    files = sorted((SHARED_CASES / name).glob("*.jsonl"))
    splits = MultipleChoice(path=str(SHARED_CASES / name), num_negatives="own").load()
    for file, split in zip(files, (splits.val, splits.test, splits.train), strict=True):
        raw = [json.loads(line) for line in file.open()]
        expected = [row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])] for row in raw]
        assert [example.chosen for example in split] == expected
