"""The history keeps every digit; W&B's offline file holds what was logged; a W&B that fails stops nothing."""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from massdpo.console import progress, summary_table
from massdpo.errors import UserError
from massdpo.runs.trackers import NoLogger, Wandb
from massdpo.training.history import History
from tests.conftest import ROOT


def test_history_is_written_to_the_last_digit(tmp_path: Path) -> None:
    history = History(tmp_path / "history.csv")
    history.append({"step": 1, "loss": 0.1 + 0.2})
    history.append({"step": 2, "loss": math.nan, "val/accuracy": 1e-17})
    history.append({"step": 3, "lr": math.inf})
    history.write()
    assert (tmp_path / "history.csv").read_text().splitlines()[0] == "step,loss,val/accuracy,lr"
    with open(tmp_path / "history.csv", newline="") as file:
        cells = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    assert cells == [{name: repr(value) for name, value in row.items()} for row in history.rows]


def test_history_is_written_while_rows_are_added(tmp_path: Path) -> None:
    history = History(tmp_path / "history.csv", write_every=0.0)
    history.append({"step": 1})
    assert (tmp_path / "history.csv").read_text() == "step\n1\n"


BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """The records of an offline W&B file: LevelDB's log (blocks of 32 KiB, 7-byte headers) after 7 bytes of magic."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        room = BLOCK - at % BLOCK
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):  # still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def build(name: str, **overrides: Any) -> Any:
    return hydra.utils.instantiate(OmegaConf.load(ROOT / "conf" / "logger" / f"{name}.yaml"), **overrides)


def test_offline_file_holds_config_steps_and_final_metrics(
    tmp_path: Path, no_account: None, capfd: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "metrics.json"
    result.write_text("{}")
    tracker = build("wandb")
    choices = {"selector": "mass", "method": None, "dataset": "x" * 99}
    tracker.start({"loss": {"name": "pl"}, "k": 4, "sweep": "main", "choices": choices}, tmp_path / "a run")
    steps = [{"loss": 1 / (1 + i), "margin": i * 0.1} for i in range(3000)]  # enough to cross blocks of the file
    for step, row in enumerate(steps):
        tracker.log(step, row)
    tracker.table("picks", [{"prompt": "a", "picked": "b"}, {"prompt": "c", "picked": "d"}])
    command = tracker.finish({"accuracy": 0.25, "sft/accuracy": 0.125}, files=[result])
    out, err = capfd.readouterr()
    assert out == err == ""

    assert command.startswith("wandb sync ")
    (path,) = (tmp_path / "a run" / "wandb").glob("offline-run-*/*.wandb")
    kinds: dict[str, list[Any]] = {}
    while "exit" not in kinds:  # W&B's service writes the end of the file when the run has ended
        time.sleep(0.1)
        kinds = {}
        for record in records(path):
            kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
    (run,) = kinds["run"]
    config = {item.key: json.loads(item.value_json) for item in run.run.config.update}
    assert config["loss"] == {"name": "pl"} and config["k"] == 4
    assert (run.run.project, run.run.display_name, run.run.run_group) == ("massdpo", "a run", "main")
    assert list(run.run.tags) == ["mass", "x" * 64]
    assert not run.run.git.remote_url and not run.run.git.commit
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in kinds["history"]
    ]
    logged = [{name: row[name] for name in ("loss", "margin")} for row in history if "loss" in row]
    assert logged == steps
    assert [row["_step"] for row in history if "loss" in row] == list(range(3000))
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in kinds["summary"]
        for item in record.summary.update
    }
    assert summary["accuracy"] == 0.25 and summary["sft/accuracy"] == 0.125
    assert summary["picks.nrows"] == 2
    assert {record.artifact.type for record in kinds["artifact"]} >= {"results"}


def test_tensorboards_files_hold_config_steps_tables_and_final_metrics(tmp_path: Path) -> None:
    """As TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = build("tensorboard")
    tracker.start({"loss": {"name": "pl"}, "k": 4}, tmp_path)
    for step in range(3):
        tracker.log(step, {"loss": 1 / (1 + step)})
    tracker.table("picks", [{"prompt": "a|b", "picked": "c"}])
    assert tracker.finish({"accuracy": 0.25, "split": "test"}) is None
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(row.step, row.value) for row in found.Scalars("loss")] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert [row.value for row in found.Scalars("test/accuracy")] == [0.25]
    text = {
        name: found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("config", "picks")
    }
    assert "k: 4" in text["config"] and "| a\\|b | c |" in text["picks"]


def test_tensorboard_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tracker = build("tensorboard")
    with pytest.raises(UserError, match=r"pip install '.\[loggers\]'"):
        tracker.start({}, tmp_path)
    assert tracker.finish() is None


def test_online_without_credentials_records_offline(
    tmp_path: Path, no_account: None, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = build("wandb", mode="online")
    tracker.start({}, tmp_path / "run")
    tracker.log(0, {"loss": 1.0})
    assert tracker.finish({}).startswith("wandb sync ")
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "without W&B credentials" in err
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_wandb_that_fails_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # every import of it raises
    tracker = Wandb("p", "offline")
    tracker.start({}, tmp_path)
    tracker.log(0, {"loss": 1.0})
    assert tracker.finish({"accuracy": 1.0}) is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "W&B stopped recording" in error


def test_a_run_that_fails_before_it_is_announced_ends_quietly() -> None:
    assert build("wandb").finish(None) is None


def test_a_run_that_was_stopped_is_one_run_when_it_goes_on(tmp_path: Path, no_account: None) -> None:
    folders, command = [], ""
    for _ in range(2):
        tracker = build("wandb")
        tracker.start({}, tmp_path)
        tracker.log(1, {"loss": 1.0})
        command = tracker.finish(None)
        folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
        time.sleep(1.1)  # W&B names folders by the second
    assert len(folders) == 2 and len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1
    assert all(folder.name in command for folder in folders)


def test_a_wandb_that_hangs_costs_its_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Wandb, "_init", lambda *_: time.sleep(20))
    tracker = Wandb("p", "offline", timeout=1)
    begin = time.monotonic()
    tracker.start({}, tmp_path)
    tracker.log(0, {"loss": 1.0})
    assert time.monotonic() - begin < 0.9  # nothing waits before the end
    assert tracker.finish({}) is None
    assert time.monotonic() - begin < 10  # far below the hang, far above the timeout
    assert "no answer within 1 s" in capsys.readouterr().err


def test_none_logs_nothing(tmp_path: Path) -> None:
    tracker = build("none")
    assert isinstance(tracker, NoLogger)
    tracker.start({}, tmp_path / "run")
    tracker.log(0, {"loss": 1.0})
    assert tracker.finish({}) is None and not (tmp_path / "run").exists()


def test_progress_without_a_terminal_is_sparse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(100, "quick") as advance:
        for _ in range(100):
            advance()
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 10_000, 4))  # seconds: every step takes 4
    monkeypatch.setattr("massdpo.console.time.monotonic", lambda: float(next(clock)))
    with progress(10, "slow") as advance:
        for _ in range(10):
            advance(note="loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "slow: 4 of 10 in 16 s, about 24 s left  loss 1.0",
        "slow: 8 of 10 in 32 s, about 8 s left  loss 1.0",
    ]


def test_summary_table_shows_text_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=100)
    summary_table("results [bold]", [{"metric": "[red]x", "SFT": 0.123456, "trained": 7}], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x" in text and "0.1235" in text and "results [bold]" in text
