"""Whatever a preference is written in, it is read as it was; what cannot be read is refused in one line."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from massdpo.config import compose
from massdpo.data.containers import Reading, placed_rows
from massdpo.data.prepare import read as look_at
from massdpo.data.raw import BadRows, Source
from massdpo.data.readers.preferences import Preferences
from massdpo.data.schema import PreferenceExample
from massdpo.errors import UserError
from massdpo.store import Cache
from tests.conftest import ROOT, SHARED_CASES, needs_shared_cases

STRICT = BadRows("error")
PLAIN = [{"prompt": f"q{row}", "chosen": "a", "rejected": "b"} for row in range(3)]
characters = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), include_characters="\n\t\"',;|\\")
text = st.text(characters, min_size=1, max_size=12).filter(lambda each: each.strip())
table = st.lists(
    st.tuples(text, st.lists(text, min_size=2, max_size=5, unique=True)),
    min_size=3,
    max_size=6,
    unique_by=lambda row: row[0],
)  # of each row the prompt, then the responses, the chosen one first


def read(path, **options):
    splits = Preferences(path=str(path), **options).load()
    return {(row.prompt, row.chosen, row.pool) for part in (splits.train, splits.val, splits.test) for row in part}


def expected(rows):
    return {(prompt, chosen, tuple(rejected)) for prompt, (chosen, *rejected) in rows}


def said(content, role="assistant"):
    return {"role": role, "content": content}


def turn(value, speaker="gpt"):
    return {"from": speaker, "value": value}


LAYOUTS = {
    "plain": lambda prompt, chosen, *rejected: {"prompt": prompt, "chosen": chosen, "rejected": rejected},
    "question": lambda prompt, chosen, *rejected: {"question": prompt, "chosen": chosen, "rejected": rejected},
    "alpaca": lambda prompt, chosen, *rejected: {
        "instruction": prompt,
        "input": "",
        "chosen": chosen,
        "rejected": rejected,
    },
    "numbered": lambda prompt, chosen, *rejected: (
        {"prompt": prompt, "chosen": chosen} | {f"rejected_{place}": each for place, each in enumerate(rejected)}
    ),
    "messages": lambda prompt, chosen, *rejected: {
        "prompt": [said(prompt, "user")],
        "chosen": [said(chosen)],
        "rejected": [[said(each)] for each in rejected],
    },
    "conversations": lambda prompt, chosen, *rejected: {
        "prompt": prompt,
        "chosen": [said(prompt, "user"), said(chosen)],
        "rejected": [[said(prompt, "user"), said(each)] for each in rejected],
    },
    "conversations alone": lambda prompt, chosen, *rejected: {
        "chosen": [said(prompt, "user"), said(chosen)],
        "rejected": [[said(prompt, "user"), said(each)] for each in rejected],
    },
    "sharegpt": lambda prompt, chosen, *rejected: {
        "conversations": [turn(prompt, "human")],
        "chosen": turn(chosen),
        "rejected": list(map(turn, rejected)),
    },
    "openai": lambda prompt, chosen, *rejected: {
        "input": {"messages": [said([{"type": "text", "text": prompt}], "user")]},
        "preferred_output": [said(chosen)],
        "non_preferred_output": [[said(each)] for each in rejected],
    },
    "nectar": lambda prompt, chosen, *rejected: {
        "prompt": prompt,
        "answers": [
            {"answer": each, "model": "m", "rank": 1.0 + rank}
            for rank, each in reversed(list(enumerate((chosen, *rejected))))
        ],
    },
    "ultrafeedback": lambda prompt, chosen, *rejected: {
        "instruction": prompt,
        "completions": [
            {"response": each, "overall_score": 9.5 - rank} for rank, each in enumerate((chosen, *rejected))
        ],
    },
    "parallel lists": lambda prompt, chosen, *rejected: {
        "prompt": prompt,
        "responses": [*rejected, chosen],
        "scores": [0] * len(rejected) + [1],
    },
    "in order": lambda prompt, chosen, *rejected: {"prompt": prompt, "responses": [chosen, *rejected]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=15)
@given(rows=table)
def test_a_layout_reads_as_it_was_written(tmp_path_factory, layout, rows):
    path = tmp_path_factory.mktemp("layout") / "own.jsonl"
    lines = (json.dumps(LAYOUTS[layout](prompt, *texts)) for prompt, texts in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    found = {(prompt, chosen, frozenset(pool)) for prompt, chosen, pool in read(path)}
    assert found == {(prompt, chosen, frozenset(pool)) for prompt, chosen, pool in expected(rows)}


def as_columns(path, rows, separator):
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["prompt", "chosen", *(f"rejected_{place}" for place in range(4))])
        writer.writerows([prompt, *texts, *[""] * (5 - len(texts))] for prompt, texts in rows)
        path.write_bytes(file.getvalue().encode())


def as_arrow(path, plain):
    batch = pa.RecordBatch.from_pylist(plain)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def saved(path, plain):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(plain).save_to_disk(path)


def lines_of(plain):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain)


def in_container(path, plain, rows):
    """The rows in the container that the name means."""
    path = Path(path)
    if path.name in SEPARATED:
        as_columns(path, rows, SEPARATED[path.name])
        if path.name == "bom.csv":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    elif path.name == "folder":
        path.mkdir()
        (path / "p[1].json").write_text(json.dumps(plain))
    else:
        TEXTS.get(path.name, TABLES.get(path.name))(path, plain)


SEPARATED = {"bom.csv": ",", "semicolon.csv": ";", "own.tsv": "\t", "bars.csv": "|"}
TEXTS = {
    "own.jsonl": lambda path, plain: path.write_text(lines_of(plain), encoding="utf-8"),
    "utf16.jsonl": lambda path, plain: path.write_text(lines_of(plain), encoding="utf-16"),
    "own.jsonl.gz": lambda path, plain: path.write_bytes(gzip.compress(lines_of(plain).encode())),
    "own.jsonl.zst": lambda path, plain: path.write_bytes(pa.compress(lines_of(plain).encode(), "zstd", asbytes=True)),
    "array.json": lambda path, plain: path.write_text(json.dumps(plain)),
    "indented.json": lambda path, plain: path.write_text(json.dumps(plain, indent=1, ensure_ascii=False), "utf-8"),
    "wrapped.json": lambda path, plain: path.write_text(json.dumps({"version": [1], "data": plain, "n": 1})),
    "keyed.json": lambda path, plain: path.write_text(json.dumps({"data": [1], "mine": plain})),
}
TABLES = {
    "own.parquet": lambda path, plain: pq.write_table(pa.Table.from_pylist(plain), path),
    "own.arrow": as_arrow,
    "saved": saved,
}


@pytest.mark.parametrize("name", [*SEPARATED, *TEXTS, *TABLES, "folder"])
@settings(deadline=None, max_examples=15)
@given(rows=table)
def test_a_container_reads_as_it_was_written(tmp_path_factory, name, rows):
    path = tmp_path_factory.mktemp("container") / name
    plain = [LAYOUTS["plain"](prompt, *texts) for prompt, texts in rows]
    in_container(path, plain, rows)
    assert read(path, rows="mine" if name == "keyed.json" else None) == expected(rows)


@given(st.integers(1, 9), st.integers(0, 3), st.integers(2, 40))
@settings(deadline=None, max_examples=20)
def test_an_array_larger_than_a_block_is_read_with_the_line_of_each_element(tmp_path_factory, size, blank, block):
    rows = [{"n": row, "text": "x\n" * size, "list": [[], {}]} for row in range(20)]
    content = "\n" * blank + json.dumps(rows, indent=1)
    path = tmp_path_factory.mktemp("array") / "own.json"
    path.write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("massdpo.data.json_text.BLOCK", block)
        found = list(placed_rows(path, STRICT))
    assert [row for _, row in found] == rows
    lines = [number for number, line in enumerate(content.split("\n"), start=1) if line == " {"]
    assert [int(where.split(":")[-1].split()[0]) for where, _ in found] == lines


def test_latin_1_is_read_where_it_is_named_and_told_otherwise(tmp_path):
    path = tmp_path / "own.csv"
    path.write_bytes("prompt,chosen,rejected\nCafé?,oui,non\nThé?,oui,non\nA?,oui,non\n".encode("latin-1"))
    assert ("Café?", "oui", ("non",)) in read(path, encoding="latin-1")
    with pytest.raises(UserError, match=r"own.csv:2: not UTF-8 .*set dataset.encoding"):
        read(path)


@given(st.sets(st.integers(1, 8)), st.integers(0, 2), st.sampled_from([",", "\t", "::"]))
@settings(deadline=None, max_examples=30)
def test_a_row_of_a_table_that_cannot_be_decoded_is_skipped_whole_and_counted(tmp_path_factory, wrong, line, separator):
    """Also where one of the lines that a quoted cell goes over is wrong: no half of it is taken for a row."""
    lines = ["a"] * 3 if separator != "::" else ["a"]  # that has no quotation marks
    rows = []
    for number in range(1, 9):
        cell = [f"{text}{number}".encode() for text in lines]
        if number in wrong:
            cell[min(line, len(cell) - 1)] += b"\xe9"
        rows.append(separator.encode().join([b"%d" % number, b'"%s"' % b"\n".join(cell)]))
    path = tmp_path_factory.mktemp("table") / "own.csv"
    path.write_bytes(b"\n".join([separator.join(["n", "text"]).encode(), *rows, b""]))
    bad = BadRows("skip")
    found = list(placed_rows(path, bad, Reading(separator=separator)))
    assert {int(row["n"]) for _, row in found} == set(range(1, 9)) - wrong and bad.count == len(wrong)
    if wrong:
        first = 1 + (min(wrong) - 1) * len(lines) + 1 + min(line, len(lines) - 1)
        assert f"own.csv:{first}: not UTF-8" in bad.first
        with pytest.raises(UserError, match=f"own.csv:{first}: not UTF-8"):
            list(placed_rows(path, STRICT, Reading(separator=separator)))


def test_a_header_that_cannot_be_decoded_is_never_skipped(tmp_path):
    path = tmp_path / "own.csv"
    path.write_bytes(b"prompt,chosen,rejected\xe9\nq,a,b\nq,a,b\n")
    with pytest.raises(UserError, match=r"own.csv:1: not UTF-8"):
        list(placed_rows(path, BadRows("skip")))


@pytest.mark.parametrize("cell", ["NA", "None", "null", "1", "007", "1.50", "True", "nan", "-inf", " x "])
def test_a_cell_is_a_text_alone_or_in_a_folder(tmp_path, cell):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "own.csv", tmp_path / "folder" / "train.csv"):
        path.write_text("prompt,chosen,rejected\n" + "".join(f"q{row},{cell},other\n" for row in range(3)))
    assert {chosen for _, chosen, _ in read(tmp_path / "own.csv") | read(tmp_path / "folder")} == {cell}


TIES = [{"text": "a", "score": 3}, {"text": "b", "score": 3}, {"text": "c", "score": 2.5}, {"text": "d", "score": 1}]


@pytest.mark.parametrize(
    ("options", "pool"),
    [({}, "cd"), ({"ties": "keep"}, "bcd"), ({"min_margin": 1.0}, "d"), ({"min_margin": 0.5}, "cd")],
)
def test_ties_and_margins(tmp_path, options, pool):
    (tmp_path / "own.jsonl").write_text(lines_of({"prompt": f"q{row}", "answers": TIES} for row in range(3)))
    assert read(tmp_path / "own.jsonl", **options) == {(f"q{row}", "a", tuple(pool)) for row in range(3)}


def test_several_chosen_are_an_example_each_or_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(
        lines_of({"prompt": f"q{row}", "chosen": ["a", "b"], "rejected": "c", "id": row} for row in range(4))
    )
    splits = Preferences(path=str(path)).load()
    examples = [*splits.train, *splits.val, *splits.test]
    assert sorted((row.id, row.chosen, row.pool) for row in examples) == [
        (f"{row}/{place}", text, ("c",)) for row in range(4) for place, text in enumerate("ab")
    ]
    assert "4 rows have several chosen" in splits.report["notes"][0]
    with pytest.raises(UserError, match=r"own.jsonl:1: 2 chosen responses; dataset.several_chosen=each"):
        Preferences(path=str(path), several_chosen="error").load()


def test_dialogues_in_one_text_are_cut_at_the_assistants_last_turn(tmp_path):
    # a space and a line end more than the marks have are the turns' own
    start = "\n\nHuman: Hi, {}!\n\nAssistant:  Hello.\n\nHuman: Why?\n\n\nAssistant:"
    rows = [
        {name: f"{start.format(row)} {answer}" for name, answer in (("chosen", "So."), ("rejected", "Sad."))}
        for row in range(4)
    ]
    (tmp_path / "own.jsonl").write_text(lines_of(rows))
    splits = Preferences(path=str(tmp_path / "own.jsonl")).load()
    row = splits.test[0]
    assert (row.prompt[: -len(start)] in start or row.prompt.endswith("Assistant:")) and (row.chosen, row.pool) == (
        "So.",
        ("Sad.",),
    )
    assert [message["role"] for message in row.meta["messages"]] == ["user", "assistant", "user"]
    assert row.meta["messages"][1:] == [said(" Hello."), said("Why?\n", "user")]


def test_splits_by_their_names(tmp_path):
    parts = {"train_sft": 3, "train_prefs": 5, "test_prefs": 2, "extra": 1}
    for name, count in parts.items():
        rows = [{"prompt": f"{name} {row}", "chosen": "a", "rejected": "b"} for row in range(count)]
        (tmp_path / f"{name}.jsonl").write_text(lines_of(rows))
    splits = Preferences(path=str(tmp_path)).load()
    assert {row.prompt.split()[0] for row in splits.train} == {"train_prefs"} and len(splits.test) == 2
    assert "train_sft" in splits.report["notes"][-1]
    other = Preferences(path=str(tmp_path), splits={"train": "train_sft", "val": "test_prefs"}).load()
    assert {row.prompt.split()[0] for row in other.train} == {"train_sft"} and len(other.val) == 2
    with pytest.raises(UserError, match=r"dataset.splits.train=nothing: .* has .*train_prefs"):
        Preferences(path=str(tmp_path), splits={"train": "nothing"}).load()


def test_what_stands_beside_an_array_of_rows_is_passed_by(tmp_path):
    beside = {"a": 1, "data": PLAIN, "b": [[1], {"c": "]"}, []], "d": {"e": []}, "f": []}
    (tmp_path / "own.json").write_text(json.dumps(beside, indent=1) + "\n")
    assert read(tmp_path / "own.json") == expected([(row["prompt"], ("a", "b")) for row in PLAIN])


@pytest.mark.parametrize("name", ["{}.jsonl", "my.{}.jsonl", "my.v1.{}.jsonl", "my.{}.1.jsonl.gz", "my_{}-v1.jsonl"])
def test_the_word_for_a_split_may_stand_anywhere_in_a_name(tmp_path, name):
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"{split} {row}", "chosen": "a", "rejected": "b"} for row in range(3)]
        content = lines_of(rows).encode()
        (tmp_path / name.format(split)).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    splits = Preferences(path=str(tmp_path)).load()
    found = [{row.prompt.split()[0] for row in part} for part in (splits.train, splits.val, splits.test)]
    assert found == [{"train"}, {"validation"}, {"test"}]


@pytest.mark.parametrize("left_out", [(), (0,), (1,), (2,), (0, 1), (1, 2)])
def test_an_empty_answer_or_score_moves_no_other_answers_score(tmp_path, left_out):
    """In columns, and in a list of entries: in both, the best of those that have both is chosen."""
    answers, scores = ["poor", "fair", "good", "worst"], [2, 3, 4, 1]
    cells = {f"answer_{place}": "" if place in left_out else text for place, text in enumerate(answers)}
    row = {"prompt": "q", **cells, **{f"score_{place}": score for place, score in enumerate(scores)}}
    columns = {part: [f"{part[:-1]}_{place}" for place in range(4)] for part in ("answers", "scores")}
    entries = [
        None if place in left_out else {"text": text, "score": scores[place]} for place, text in enumerate(answers)
    ]
    best = max((place for place in range(4) if place not in left_out), key=scores.__getitem__)
    for each, options in ((row, {"columns": columns}), ({"prompt": "q", "answers": entries}, {})):
        (tmp_path / "own.jsonl").write_text(lines_of([each | {"prompt": f"q{row}"} for row in range(3)]))
        ((chosen, pool),) = {example[1:] for example in read(tmp_path / "own.jsonl", **options)}
        assert chosen == answers[best]
        assert set(pool) == {text for place, text in enumerate(answers) if place not in (*left_out, best)}


@pytest.mark.parametrize(
    ("row", "options", "told"),
    [
        ({"ask": "q", "good": "a", "bad": "b"}, {}, r'no "chosen" in the columns ask, good, bad; .*dataset.columns=\{'),
        ({"question": "q", "best_answer": "a", "wrong": "b"}, {}, r"chosen: best_answer, rejected: wrong"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"columns": {"chosen": "x"}},
            "no column x .*among prompt, chosen",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"columns": {"odd": "x"}},
            "dataset.columns.odd is not allowed",
        ),
        ({"prompt": "q", "answers": [{"text": "a", "model": "m"}]}, {}, "text, model, but no score or rank"),
        ({"prompt": "q", "answers": [None, {"text": "a"}]}, {}, "text, but no score or rank"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1]}, {}, '"scores" must be a list of 2 numbers'),
        ({"prompt": "q", "chosen": "a", "rejected": None}, {}, 'no "rejected": nothing stands in rejected$'),
        ({"prompt": "q", "chosen": [said(None)], "rejected": "b"}, {}, "content is not a text: null"),
        ({"prompt": "q", "chosen": [said(None) | {"tool_calls": [1]}], "rejected": "b"}, {}, "only calls a tool"),
        ({"prompt": [said([{"type": "image_url"}], "user")], "chosen": "a", "rejected": "b"}, {}, "type image_url"),
        (
            {"prompt": [said("q", "user"), said("r")], "chosen": "a", "rejected": "b"},
            {},
            "ends with a message of the assistant",
        ),
        (
            {"prompt": "x", "chosen": [said("q", "user"), said("a")], "rejected": [said("q", "user"), said("b")]},
            {},
            "not among",
        ),
        ({"a\x1b[2Jb": 1, "chosen": "a"}, {}, r"a\\x1b\[2Jb"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line_that_helps(tmp_path, row, options, told):
    path = tmp_path / "own.jsonl"
    path.write_text(lines_of([row] * 3))
    with pytest.raises(UserError, match=told) as error:
        Preferences(path=str(path), **options).load()
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


DEEP = "[" * 100_000
BOMB = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
BOMB += "\nconfigs:\n- data_files: *a29"
ROW = '{"prompt": "q", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("own.json", f'[{{"prompt": {DEEP}', "nested too deeply|not JSON"),
        ("own.jsonl", f'{{"prompt": {DEEP}', "not JSON"),
        ("train.json", '{"a": 1,\n"b": [{"prompt": "q"}]}', "keys a, b: set dataset.rows=KEY"),
        ("own.json", f"[{ROW} {ROW}]", r"own.json:1: not JSON \(a comma"),
        ("own.json", f'[{ROW},\n\n{{"prompt": }}]', "own.json:3: not JSON"),
        ("own.json", f"[{ROW}]\n[{ROW}]", r"own.json:2: not JSON \(something follows the array"),
        ("own.json", f'{{"data": [{ROW}], "a": [[], {{}}]}}\n{{"data": []}}', r"own.json:2: .*the object whose 'data'"),
        ("own.json", f'{{"data": [{ROW}], "a": [', r"own.json:1: not JSON"),
        (os.fsdecode(b"caf\xe9.jsonl"), ROW, r"caf\\udce9.jsonl' is not a name in UTF-8"),
        ("own.csv", "prompt,chosen,prompt\na,b,c\n", "the header has the same name twice"),
        ("own.csv", "prompt,chosen,rejected\na,b\n", r"own.csv:2: 2 fields, but the header has 3"),
        ("own.csv", 'prompt,chosen,rejected\na,"b"c,d\n', r"own.csv:2: not CSV"),
        ("own.gz", "no gzip", "cannot be read"),
        ("own.jsonl.zst", "no zstd", "cannot be read"),
        ("own.feather", "no arrow", "cannot be read"),
        ("README.md", f"---\n{BOMB}\n---\n", "holds no file of rows"),
        ("a\0b", None, r"a\\x00b' cannot be read: No such file"),
        ("x" * 300, None, "cannot be read: File name too long"),
    ],
)
def test_damaged_files_are_refused_in_a_line(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_text(content)
    single = [tmp_path / name] * (name != "README.md")
    for path in single + [tmp_path] * (content is not None and name != "own.gz"):
        with pytest.raises(UserError, match=told) as error:
            Preferences(path=str(path)).load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "named", ["../outside.arrow", "/etc/hostname", "http://127.0.0.1:9/a.arrow", "absent.arrow", "a\0b"]
)
def test_a_folder_reads_nothing_outside_itself(tmp_path, named):
    saved(tmp_path / "saved", PLAIN)
    (tmp_path / "outside.arrow").write_bytes((tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes())
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": named}]}))
    with pytest.raises(UserError, match=r"lies outside .*dataset.outside=true|is missing"):
        Preferences(path=str(tmp_path / "saved")).load()
    if named == "../outside.arrow":
        assert len(read(tmp_path / "saved", outside=True)) == 3


def test_links_and_cards_do_not_lead_outside_either(tmp_path):
    (tmp_path / "own.jsonl").write_text(lines_of(PLAIN))
    for name in ("linked", "carded", "starred"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / "train.jsonl").symlink_to(tmp_path / "own.jsonl")
    (tmp_path / "carded" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: ../own.jsonl\n---\n"
    )
    (tmp_path / "starred" / "README.md").write_text("---\nconfigs:\n- data_files: ../*.jsonl\n---\n")
    for name in ("linked", "carded", "starred"):
        with pytest.raises(UserError, match=r"lies outside .*dataset.outside=true"):
            Preferences(path=str(tmp_path / name)).files()
        assert len(read(tmp_path / name, outside=True)) == 3


def test_every_file_that_decides_the_rows_is_named(tmp_path):
    """The card too, and compressed ones: a change in any of them makes the data anew."""
    (tmp_path / "a[1].jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'))
    (tmp_path / "b.jsonl").write_text("not read")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: 'a[1].jsonl.gz'\n---\n")
    assert [file.name for file in Preferences(path=str(tmp_path)).files()] == ["README.md", "a[1].jsonl.gz"]
    assert len(list(Source(tmp_path).rows("train", STRICT))) == 1


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.jsonl").write_text(lines_of(PLAIN))
    assert len(read("~/own.jsonl")) == 3


def test_an_example_whose_slate_is_another_is_refused_where_it_is_made():
    with pytest.raises(UserError, match=r"own.jsonl:3: candidates must be the chosen response and the pool"):
        PreferenceExample("0", "q", "a", ("b",), ("b", "c"), where="own.jsonl:3")


def test_unknown_encodings_and_empty_separators():
    for options in ({"encoding": "utf-9"}, {"encoding": "rot13"}, {"separator": ""}):
        with pytest.raises(UserError, match=r"dataset\.(encoding|separator)"):
            Reading(**options)


@pytest.mark.parametrize(
    "header", ["prompt\rtext,chosen,rejected", "prompt,chosen,rejected," + 200_000 * "x", '"prompt,"x']
)
def test_an_odd_header_is_read_or_refused_in_one_line(tmp_path, header):
    file = tmp_path / "odd.csv"
    file.write_text(f"{header}\na,b,c\n", newline="")
    try:
        list(placed_rows(file, lambda error: None))
    except UserError as error:
        assert "\n" not in str(error)


SEPARABLE = {  # a dataset's reader, the option that names its file, and columns that it reads
    "preferences": (
        "path",
        [("prompt", "chosen", "rejected"), *((f"q {n}", f"r {n}", f"w {n}") for n in range(9))],
    ),
    "mcqa": (
        "path",
        [("question", "A", "B", "answer"), *((f"q {n}", f"a {n}", f"b {n}", "AB"[n % 2]) for n in range(40))],
    ),
    "sequences": (
        "raw_dir",
        [("user", "item", "time", "title")]
        + [(f"u{user}", f"i{n % 30}", f"{n}", f"t {n % 30}") for user in range(30) for n in range(user, user + 9)],
    ),
}


@pytest.mark.parametrize(("separator", "given", "told"), [(";", None, "';'"), (";", ";", ""), (",", None, "")])
@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separator_that_is_not_the_names_own_is_told_once(tmp_path, capsys, name, separator, given, told):
    option, rows = SEPARABLE[name]
    (tmp_path / "interactions.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    node = OmegaConf.to_container(compose([f"dataset={name}", f"dataset.{option}={tmp_path}"]).dataset, resolve=True)
    fewer = {"num_negatives": 1} if "num_negatives" in node else {}
    look_at(node | fewer | {"separator": given}, Cache(tmp_path / "cache"))
    said = [line for line in capsys.readouterr().err.splitlines() if "separated" in line]
    assert len(said) == bool(told) and all(line.endswith(f"by: {told}") for line in said)


def test_holding_out_takes_time_in_proportion(tmp_path):
    """Against twice as many prompts: a quadratic way would take four times as long."""
    dataset = Preferences(path="x")
    times = []
    for count in (200_000, 400_000):
        prompts = {"train": np.random.default_rng(0).integers(0, 1 << 62, count)}
        started = time.process_time()
        rows = dataset._held_out(prompts)
        times.append(time.process_time() - started)
        assert len(rows["test"]) == len(rows["val"]) == count // 10
    assert times[1] < 3.5 * times[0] + 0.1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Two million rows must fit in 2 GB: what each further row takes, measured, leaves room for that many."""
    program = "\n".join(
        [
            "import sys",
            "from massdpo.data.readers.preferences import Preferences",
            "from massdpo.runs.machine import peak_resident",
            "before = peak_resident()",
            "Preferences(path=sys.argv[1]).load()",
            "print(before, peak_resident())",
        ]
    )
    peak = []
    for count in (10_000, 60_000):
        with open(tmp_path / f"{count}.jsonl", "w") as file:
            for row in range(count):
                answers = [f"answer {row} number {place}" for place in range(5)]
                file.write(
                    json.dumps({"prompt": f"question {row}?", "chosen": answers[0], "rejected": answers[1:]}) + "\n"
                )
        command = [sys.executable, "-c", program, str(tmp_path / f"{count}.jsonl")]
        before, after = map(
            int, subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT).stdout.split()
        )
        assert after > before  # the rows are what is measured
        peak.append(after)
    a_row = (peak[1] - peak[0]) / 50_000
    assert a_row > 0 and peak[0] + 2_000_000 * a_row < 2e9, a_row


READ = {
    "alpaca_dpo.jsonl": 30, "sharegpt_dpo.json": 30, "array.json": 60, "wrapped_array.json": 60, "hh_style.jsonl": 30,
    "uf_binarized.jsonl": 30, "uf_saved": 36, "orca_style.jsonl": 30, "system_field.jsonl": 30, "system_chat.jsonl": 30,
    "preformatted_chatml.jsonl": 30, "code.jsonl": 30, "multi_chosen.jsonl": 60, "one_long.jsonl": 30,
    "long_responses.jsonl": 12, "numeric.jsonl": 30, "pairs.csv": 60, "csv_bool": 30, "csv_na": 30, "csv_none": 30,
    "csv_null": 30,
}  # fmt: skip
OTHERS = {
    "README.md",
    "hub_arc",
    "hub_obqa",
    "semicolon",
    "tsv",
    "latin1",
    "iso_dates",
    "float_times",
    "nanoseconds",
    "missing_titles",
}


@needs_shared_cases
def test_every_case_is_known():
    assert {path.name for path in SHARED_CASES.iterdir()} == READ.keys() | OTHERS


@needs_shared_cases
@pytest.mark.parametrize("name", READ)
def test_a_case_is_read(name):
    splits = Preferences(path=str(SHARED_CASES / name)).load()
    examples = [*splits.train, *splits.val, *splits.test]
    assert len(examples) == READ[name]
    assert all(row.prompt.strip() and row.chosen.strip() and row.pool and Path(row.where).name for row in examples)
