"""How the benchmarks measure: sides in alternation, medians, peak memory of a fresh process."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import torch

from massdpo.runs.machine import commit, in_words, machine, peak_resident


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


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """What a function returns in a new process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def origin() -> dict[str, Any]:
    """What a report's numbers depend on besides its setting."""
    return {"commit": commit(), "machine": machine()}


def origin_in_words(report: Mapping[str, Any]) -> str:
    return f"Machine: {in_words(report['machine'])}.\nCommit: {report['commit']}.\n"
