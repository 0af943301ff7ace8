"""How the benchmarks measure: sides in alternation, medians, peak memory of a fresh process."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import psutil
import torch

from massdpo.runs.machine import peak_resident


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, in alternating rounds, so that other load on the machine affects all of them alike.

    A side that returns a float has timed itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, side in sides.items():
            synchronize()
            started = time.perf_counter()
            own = side()
            synchronize()
            if turn >= warmup:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - started)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], object]) -> int:
    """Memory that one step adds at its peak; only the first measurement of a process is right on a CPU."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    step()
    return max(0, peak_resident() - before)


def fresh_process(module: str, *arguments: str) -> str:
    """What `python -m module arguments` prints last."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]
