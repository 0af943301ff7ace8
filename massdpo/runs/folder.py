"""A run's folder from outside: who holds it, whether it is finished, what it was computed from."""

import glob
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from massdpo.config import EXPECTED, run_name, without_secrets
from massdpo.console import screen
from massdpo.errors import UserError
from massdpo.store import digest, locked, mapping_in, remove_unfinished, set_aside, write_json, writing

Parts = Mapping[str, str]  # what decides the run, by name; see provenance.py
CHECKPOINTS = "checkpoints"  # in a run's folder until the run is finished


@contextmanager
def alone(
    accelerator: Accelerator, lock: Callable[[Callable[[], object]], AbstractContextManager[None]]
) -> Iterator[None]:
    """The main process takes a lock; the others wait in short rounds, since one long collective would time out."""

    def told(taken: bool) -> bool:
        return bool(accelerator.reduce(torch.tensor(float(taken), device=accelerator.device), "sum") > 0)

    if not accelerator.is_main_process:
        while not told(False):
            pass
        yield
        return
    with lock(lambda: told(False)):
        told(True)
        yield


@contextmanager
def holding(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run's folder: a second run of the same config waits. The lock ends with the process that holds it."""

    def waiting() -> str:
        return f"{folder} is being computed by process {status(folder).get('pid', '?')}: waiting"

    with alone(accelerator, lambda meanwhile: locked(folder / ".lock", "set runs_dir", waiting, meanwhile)):
        yield


def status(folder: Path) -> dict[str, Any]:
    """What status.json says; empty if it is missing or damaged."""
    found = mapping_in(folder / "status.json")
    return found if {"status", "key"} <= found.keys() else {}


@contextmanager
def telling(folder: Path, parts: Parts, accelerator: Accelerator) -> Iterator[None]:
    """Keep status.json true: `running`, then `finished`, `interrupted` or `failed` (and why), however the run ends.

    SIGTERM, as sent by a cluster that preempts a job, ends a run as Ctrl-C does. Raises `UserError` if the folder can
    no longer be written to.
    """

    def tell(state: str, **more: Any) -> None:
        if accelerator.is_main_process:
            found = {"status": state, "key": digest(parts), "parts": parts, **more}
            write_json(folder / "status.json", without_secrets(found))

    try:
        with writing(folder, "free some space or set runs_dir; the last checkpoint is good"), _terminable():
            tell("running", pid=os.getpid())
            yield
            tell("finished")
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    except BaseException as error:
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        said = isinstance(error, UserError | KeyboardInterrupt)
        try:
            tell(state, why=str(error) or "Ctrl-C" if said else f"{type(error).__name__}: {error}")
        except OSError:  # a full disk: what stopped the run matters more
            print(f"warning: {folder / 'status.json'} could not be written either", file=sys.stderr)
        raise


def note_failed(sweep: Path, config: DictConfig, error: Exception) -> None:
    """Let `--status` show a run that a multirun expected even if it failed before its folder held anything."""
    if not (expected := mapping_in(sweep / EXPECTED)):
        return
    try:
        folder = sweep / (config.get("name") or run_name(config))
    except Exception:  # options of which no name can be made, and so none that was expected
        return
    if not (folder / "config.yaml").exists() and folder.name in expected:
        write_json(folder / "status.json", without_secrets({"status": "failed", "why": str(error)}))


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM; the same command resumes it")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def claim(folder: Path, parts: Parts, force: bool, accelerator: Accelerator) -> bool:
    """May this run be computed into the folder? False, with a line that says so, if it is finished already.

    Raises `UserError` if the folder holds a run of other code, data or options.
    """
    before, key = status(folder), digest(parts)
    if before and before["key"] != key and not force:
        raise UserError(f"{folder} holds a run {_otherwise(before, parts)}: set another name=, or force=true")
    if before.get("status") == "finished" and not force:
        if accelerator.is_main_process:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # it was killed before it could
        if accelerator.is_main_process and screen.level != "sweep":  # that has a line per job
            same = ", ".join(parts)
            print(f"{folder} is finished already: skipped, with the same {same} (force=true computes it again)")
        return False
    if accelerator.is_main_process:
        remove_unfinished(folder)
        if not before and (folder / CHECKPOINTS).is_dir():
            set_aside(folder / CHECKPOINTS)  # status.json is lost: their config is unknown
        if before and (before["key"] != key or before["status"] == "finished"):
            (folder / "status.json").unlink()  # first: take_over looks there before and after it copies
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
    return True


def _otherwise(before: Mapping[str, Any], parts: Parts) -> str:
    known = before.get("parts")
    if not isinstance(known, dict):
        return "of another version"
    return f"with other {' and '.join(name for name, key in parts.items() if known.get(name) != key)}"


def take_over(folder: Path, parts: Parts) -> None:
    """Copy the same run from a sibling sweep, if it is finished there: tables share many runs."""
    others = sorted(folder.parent.parent.glob(f"*/{glob.escape(folder.name)}"))
    finished = {"status": "finished", "key": digest(parts), "parts": parts}
    if status(folder) or not (other := next((path for path in others if status(path) == finished), None)):
        return
    ignored = shutil.ignore_patterns(".lock", "wandb", "status.json", CHECKPOINTS)
    with suppress(FileNotFoundError, shutil.Error):  # force=true is clearing it at this moment
        shutil.copytree(other, folder, ignore=ignored, dirs_exist_ok=True)
        if status(other) == finished:
            write_json(folder / "status.json", finished)  # last: everything else is in place
            print(f"{folder}: taken over from {other}")
