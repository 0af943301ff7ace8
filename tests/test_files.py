"""Whatever a preference is written in, it is read as it was; what cannot be read is refused in one line."""

import csv
import gzip
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from massdpo.config import compose
from massdpo.data.prepare import read as look_at
from massdpo.data.raw import BadRows
from massdpo.data.readers.preferences import Preferences
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
    splits = Preferences(str(path), **options).load()
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
TABLES = {  # a dataset's reader, the option that names its file, and columns that it reads
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
@pytest.mark.parametrize("name", TABLES)
def test_a_separator_that_is_not_the_names_own_is_told_once(tmp_path, capsys, name, separator, given, told):
    option, rows = TABLES[name]
    (tmp_path / "interactions.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    node = OmegaConf.to_container(compose([f"dataset={name}", f"dataset.{option}={tmp_path}"]).dataset, resolve=True)
    fewer = {"num_negatives": 1} if "num_negatives" in node else {}
    look_at(node | fewer | {"separator": given}, Cache(tmp_path / "cache"))
    said = [line for line in capsys.readouterr().err.splitlines() if "separated" in line]
    assert len(said) == bool(told) and all(line.endswith(f"by: {told}") for line in said)


def test_holding_out_takes_time_in_proportion(tmp_path):
    """Against twice as many prompts: a quadratic way would take four times as long."""
    dataset = Preferences("x")
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
            "Preferences(sys.argv[1]).load()",
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
    splits = Preferences(str(SHARED_CASES / name)).load()
    examples = [*splits.train, *splits.val, *splits.test]
    assert len(examples) == READ[name]
    assert all(row.prompt.strip() and row.chosen.strip() and row.pool and Path(row.where).name for row in examples)
