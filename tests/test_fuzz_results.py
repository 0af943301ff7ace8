"""Damaged results of runs: the report reads them as they are, or says in one line which file it cannot read."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from massdpo.errors import UserError
from massdpo.report.__main__ import main, tables_of
from massdpo.report.reading import read_histories, read_history
from massdpo.report.rows import RunRows, collect
from massdpo.report.status import sweep_status
from tests.test_fuzz_data import limits, mutated, places
from tests.test_report import make_run

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "NaN",
    "é\r\n\0",
    "\ud800",
    [],
    [1],
    {},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two selectors and seeds, one that failed, one expected; and a report on them."""
    root = tmp_path_factory.mktemp("base")
    sweep = root / "runs" / "fuzz"
    for selector in ("mass", "random"):
        for seed in range(2):
            make_run(sweep, selector, seed, prompts=6)
    failed = make_run(sweep, "full", 0, status="failed")
    expected = {"job": "selector=dpp", "command": "python run.py -m x"}
    config = yaml.safe_load((failed / "config.yaml").read_text())
    config["choices"]["selector"] = "dpp"
    (sweep / "expected.json").write_text(json.dumps({"never": expected | {"config": config}}))
    assert main(["fuzz", "--runs", str(root / "runs"), "--out", str(root / "out")]) == 0
    histories = "step,margin,dataset,model,label,seed\n0,0.5,d,m,mass,0\n10,0.7,d,m,mass,0\n"
    (root / "out" / "fuzz" / "histories.csv").write_text(histories)
    return root


@pytest.fixture
def results(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "results")


def test_the_undamaged_results_are_read(results: Path) -> None:
    use(results)


def use(root: Path) -> None:
    """Everything that is done with what was read, but for drawing."""
    rows = collect(root / "runs" / "fuzz")
    sweep_status(root / "runs" / "fuzz")
    for row in rows.frame[rows.frame["status"] == "finished"].to_dict("records"):
        read_history(root / "runs" / "fuzz" / row["name"] / "history.csv", ("margin", "loss"))
    read_histories(root / "out" / "fuzz" / "histories.csv")
    for read in (rows, RunRows.read(root / "out" / "fuzz")):
        tables_of(read, "fuzz")


def survives(root: Path) -> None:
    try:
        use(root)
    except UserError as error:
        assert "\n" not in str(error)


def files(root: Path) -> list[Path]:
    names = ("config.yaml", "metrics.json", "predictions.jsonl", "status.json", "history.csv", "expected.json")
    names += ("rows.csv", "prompts.npz", "histories.csv")
    return sorted(path for path in root.rglob("*") if path.name in names)


def damaged_bytes(root: Path, seed: int) -> None:
    file = random.Random(seed).choice(files(root))
    before = file.read_bytes()
    file.write_bytes(mutated(before, seed))
    try:
        survives(root)
    finally:
        file.write_bytes(before)


def damaged_values(root: Path, seed: int) -> None:
    """Sound JSON and YAML, with one value of another kind, one missing or one added."""
    chance = random.Random(seed)
    file = chance.choice([path for path in files(root) if path.suffix in (".yaml", ".json", ".jsonl")])
    before = file.read_text()
    lines = before.splitlines() if file.suffix == ".jsonl" else [before]
    number = chance.randrange(len(lines))
    value = yaml.safe_load(lines[number]) if file.suffix == ".yaml" else json.loads(lines[number])
    holder, key = chance.choice(list(places(value)))
    kind = chance.choice(("other", "missing", "added", "whole"))
    if kind == "other":
        holder[key] = chance.choice(ODD)
    elif kind == "missing":
        del holder[key]
    elif kind == "added" and isinstance(holder, dict):
        holder[chance.choice(["place", "option/k", "x", "", "why", "a,b"])] = chance.choice(ODD)
    else:
        value = chance.choice(ODD)
    text = yaml.safe_dump(value) if file.suffix == ".yaml" else json.dumps(value)
    lines[number] = text
    file.write_text("\n".join(lines))
    try:
        survives(root)
    finally:
        file.write_text(before)


@limits(150)
@given(seed=st.integers(0, 2**32))
def test_damaged_bytes(results: Path, seed: int) -> None:
    damaged_bytes(results, seed)


@limits(150)
@given(seed=st.integers(0, 2**32))
def test_damaged_values(results: Path, seed: int) -> None:
    damaged_values(results, seed)


@pytest.mark.slow
@limits(600)
@given(seed=st.integers(0, 2**32))
def test_many_damaged_bytes(results: Path, seed: int) -> None:
    damaged_bytes(results, seed)


@pytest.mark.slow
@limits(600)
@given(seed=st.integers(0, 2**32))
def test_many_damaged_values(results: Path, seed: int) -> None:
    damaged_values(results, seed)


@pytest.mark.parametrize("name", ["metrics.json", "predictions.jsonl"])
def test_a_finished_run_without_a_file_is_told_by_that_file(
    results: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (file, *_) = results.glob(f"runs/fuzz/*mass*/{name}")
    file.unlink()
    assert main(["fuzz", "--runs", str(results / "runs"), "--out", str(results / "other")]) == 2
    assert str(file) in capsys.readouterr().err
