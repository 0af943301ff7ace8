"""A run's folder from outside: who holds it, whether it is done, what it used, and the table at its end."""

import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from massdpo.errors import UserError
from massdpo.store import replacing, write_json
from massdpo.tracking import summary_table

SHOWN = (  # metrics in the table at the end of a run
    *("accuracy", "ndcg@5", "mrr", "accuracy_sum", "ndcg@5_sum"),
    *("reward_accuracy", "reward_accuracy_pairwise", "margin", "margin_max", "chosen_logp_change"),
)


@contextmanager
def holding(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run's folder: a second run of the same config waits. The lock goes with the process that holds it."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{folder} is being computed by process {status(folder).get('pid', '?')}: waiting", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): set runs_dir") from error
    accelerator.wait_for_everyone()
    with lock:
        yield
    lock.release(force=True)


def status(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def tell(folder: Path, what: dict[str, Any], accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        write_json(folder / "status.json", what)


def claim(folder: Path, key: str, force: bool, accelerator: Accelerator) -> bool:
    """May this run be computed into the folder? False, with a line that says so, where it is finished already.

    Raises `UserError` where the folder holds a run of another config or other data.
    """
    before = status(folder)
    if before and before["key"] != key and not force:
        raise UserError(f"{folder} holds a run of another config, data or version: set another name=, or force=true")
    if before.get("status") == "finished" and not force:
        if accelerator.is_main_process:
            print(f"{folder} is finished already: skipped (force=true computes it again)")
        return False
    if accelerator.is_main_process and before and (before["key"] != key or before["status"] == "finished"):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
    return True


def reset_peak_memory() -> None:
    """Several jobs run in one process: each counts its own peak, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux: the peak of the whole process is reported


def peak_memory_mb() -> float:
    """Peak memory of this job: of the GPU where there is one, else resident memory of the process, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    proc = Path("/proc/self/status")
    if proc.exists():
        line = next(line for line in proc.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def show(folder: Path, metrics: dict[str, Any], sync: str | None) -> None:
    """The table at the end: the SFT start against the trained policy, where the files are, and what to try next."""
    rows = []
    for name in SHOWN:
        before = metrics.get(f"sft/{name}", 0.0)  # rewards, margins and changes are 0 at the start, by definition
        rows.append({"test metric": name, "SFT start": _number(before), "trained": _number(metrics[name])})
    summary_table("SFT start against the trained policy, test split", rows)
    seconds = [f"{metrics[f'{name}_seconds']:.0f} s" for name in ("sft", "train", "select")]
    print(f"time:  SFT {seconds[0]}, preference stage {seconds[1]}, of which selection {seconds[2]}")
    print(f"files: {os.path.relpath(folder)}  (metrics.json, history.csv, predictions.jsonl, history.png, policy/)")
    if sync:
        print(f"W&B:   {sync}")
    print("next:  python run.py -m selector=mass,random,hardest,full seed=0,1,2   # compare selectors over seeds")


def _number(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) and value < 0 else f"{value:.3f}"


def draw_history(history: Sequence[dict[str, Any]], file: Path) -> None:
    """Loss, margin and log-probs of the preference stage over its steps, as a PNG."""
    from matplotlib.figure import Figure  # takes half a second to import; no global state

    panels = {
        "loss": ["loss"],
        "margin (reward units)": ["margin", "margin_max"],
        "log-prob (nats)": ["chosen_logp", "rejected_logp"],
    }
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            axes.plot(*zip(*points, strict=True), label=name) if points else None
        axes.set(title=title, xlabel="optimiser step")
        if len(names) > 1:
            axes.legend(frameon=False)
    with replacing(file) as beside:
        figure.savefig(beside, format="png", dpi=120)
