"""The progress of a sweep: which runs are finished, running, failed (and why) or missing, and the time left."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from massdpo.console import spell
from massdpo.report.reading import STATES, run_status
from massdpo.report.rows import expected_runs, no_runs

KNOWN = ("config.yaml", "status.json")  # files of a run; one that failed early has only the second


def sweep_status(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """A line per run (run, state, seconds, note), and one sentence with counts and the time left."""
    expected = expected_runs(folder)
    names = sorted({path.parent.name for path in folder.glob("*/*.*") if path.name in KNOWN} | set(expected))
    if not names:
        raise no_runs(folder)
    lines = [_line(folder / name, expected[name]["job"] if name in expected else "") for name in names]
    lines.sort(key=lambda line: STATES.index(line["state"]))
    counts = {state: sum(line["state"] == state for line in lines) for state in STATES}
    took = [line["seconds"] for line in lines if line["state"] == "finished"]
    left = len(lines) - counts["finished"]
    told = {state: count for state, count in counts.items() if count or state != "interrupted"}
    sentence = ", ".join(f"{count} {state}" for state, count in told.items())
    if left and took:
        at_once = max(1, counts["running"])
        each = median(took)  # not the mean: one run on a machine that slept overnight would spoil it
        sentence += f"; about {spell(left * each / at_once)} left at {spell(each)} per run, {at_once} at once"
    return lines, sentence


def _line(folder: Path, job: str) -> dict[str, Any]:
    """Times are those of the files: the config is the first that a run writes, metrics.json the last."""
    if not any((folder / name).exists() for name in KNOWN):
        return {"run": folder.name, "state": "missing", "seconds": 0, "note": job}
    state, why = run_status(folder)
    times = {path.name: path.stat().st_mtime for path in folder.iterdir()}
    last = max(times.values())
    if state == "running":
        why = f"last file written {spell(time.time() - last)} ago"
    end = times["metrics.json"] if state == "finished" and "metrics.json" in times else last
    return {"run": folder.name, "state": state, "seconds": round(end - times.get("config.yaml", last)), "note": why}
