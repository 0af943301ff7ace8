"""`python run.py ...` as a process of its own, forked from one that has the seconds of importing behind it."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["massdpo.runs.pipeline", "massdpo.tasks", "tests.processes"])


def start(*arguments: str, log: Path, before: Callable[[], None] | None = None) -> BaseProcess:
    """Start it; what it says goes to the end of `log`. `before`: what to do in the process first."""
    process = CONTEXT.Process(target=_run, args=(arguments, log, before))
    process.start()
    return process


def _run(arguments: tuple[str, ...], log: Path, before: Callable[[], None] | None) -> None:
    os.setpgid(0, 0)  # a group of its own, as a terminal's foreground process has
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # of its own children: the platform's, as from a shell
    if before:
        before()
    sys.argv = ["run.py", *arguments]
    runpy.run_path("run.py", run_name="__main__")
