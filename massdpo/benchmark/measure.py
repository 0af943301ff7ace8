"""How the benchmarks measure: sides in alternation, medians, peak memory of a fresh process, and on which machine."""

import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, a round at a time, so that what else the machine does falls on all of them alike.

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
    return max(0, _peak_resident() - before)


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the peak of the process that started this one into ru_maxrss
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fresh_process(module: str, *arguments: str) -> str:
    """What `python -m module arguments` prints last."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def commit() -> str:
    """The commit of the code that runs, `+changes` where files differ from it, `unknown` outside a checkout."""
    try:
        root = Path(__file__).parent
        name = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+changes" if changes.strip() else "")


def machine() -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the computer."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def in_words(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
