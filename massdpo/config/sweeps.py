"""A multirun from outside: what it is about to do, a line per job that is over, one table at the end.

The names of its runs are noted where `python -m massdpo.report --status` finds them.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from massdpo.config import EXPECTED, RULES, as_composed, resolved, run_name, without_secrets
from massdpo.console import patiently, summary_table
from massdpo.errors import UserError
from massdpo.store import write_json, write_text

TOLD = ("accuracy", "mrr", "reward_accuracy", "margin", "train_seconds")  # means over seeds, in the table at the end


class NoteExpected(Callback):
    """Hydra calls this in the parent around a multirun, and in each job's process around that job."""

    jobs = 0
    varying: frozenset[str] = frozenset()  # overrides that not every job has
    runs: dict[str, str] = {}  # noqa: RUF012  a run's folder -> its job's overrides; set anew for each multirun
    began = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if int(os.environ.get("RANK", 0)) > 0:  # torchrun: every process starts the same multirun
            return
        try:
            jobs = jobs_of(config)
            print(f"sweep {config.sweep}: {len(jobs)} jobs", file=sys.stderr)
            with patiently("composing the jobs"):
                expected = runs_of(config, jobs)
        except (UserError, HydraException, OmegaConfBaseException, ValueError):
            return  # the sweep composes the same jobs in a moment, and reports it
        self.jobs = len(jobs)
        self.varying = frozenset().union(*jobs) - frozenset(jobs[0]).intersection(*jobs)
        self.runs = {str(folder / name): run["job"] for folder, runs in expected.items() for name, run in runs.items()}
        for folder, runs in expected.items():
            file = folder / EXPECTED
            before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            asked = {run["job"] for run in runs.values()}  # before an edit of conf/, the same job had another name
            write_json(file, {name: run for name, run in before.items() if run["job"] not in asked} | runs)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra has kept the command as it was typed, secrets and all."""
        self.began = time.time()
        file = Path(config.hydra.sweep.dir) / "multirun.yaml"
        if config.hydra.mode == RunMode.MULTIRUN and file.exists():
            write_text(file, yaml.safe_dump(without_secrets(yaml.safe_load(file.read_text(encoding="utf-8")))))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN or int(os.environ.get("RANK", 0)) > 0:
            return
        label = self._label(config.hydra.overrides.task)
        result = job_return._return_value  # the property raises a failed job's
        seconds = time.time() - self.began
        told = "failed" if isinstance(result, BaseException) else f"{seconds:.0f} s"
        if isinstance(result, Path) and (file := result / METRICS).is_file():
            told = told if file.stat().st_mtime >= self.began else "finished before"
            told = f"accuracy {_metrics(file)['accuracy']:.3f}, {told}"
        print(f"job {config.hydra.job.num + 1} of {self.jobs}: {', '.join(filter(None, [label, told]))}", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """One table of what there is, seeds together, and the command that reports it in full."""
        found: dict[str, list[dict[str, Any]]] = {}
        for folder, job in self.runs.items():
            if (file := Path(folder) / METRICS).is_file():
                words = [word for word in shlex.split(job) if not word.startswith("seed=")]
                found.setdefault(self._label(words), []).append(_metrics(file))
        if not found:
            return
        means = {
            label: {name: sum(run[name] for run in runs) / len(runs) for name in TOLD} for label, runs in found.items()
        }
        rows = [{"job": label, "runs": len(found[label])} | mean for label, mean in means.items()]
        summary_table(f"sweep {config.sweep}: means over seeds, test split", rows, whole=1)
        sweep = config.hydra.runtime.choices.get("sweeps") or config.sweep
        places = [] if config.runs_dir == "results/runs" else ["--runs", config.runs_dir]
        print(f"report: {shlex.join(['python', '-m', 'massdpo.report', sweep, *places])}")

    def _label(self, overrides: Iterable[str]) -> str:
        return " ".join(str(without_secrets(word)) for word in overrides if word in self.varying)


METRICS = "metrics.json"  # in a run's folder


def _metrics(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def jobs_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each job that a multirun of this config makes: the sweep's options, then the command line's."""
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*given, *config.hydra.overrides.task])
    jobs: list[list[str]] = BasicSweeper.split_arguments(overrides, None)[0]
    return jobs


def runs_of(config: DictConfig, jobs: list[list[str]]) -> dict[Path, dict[str, Any]]:
    """By a sweep's folder, name -> {"job", "command", "config"} of the runs that the jobs of a multirun make."""
    loader = GlobalHydra.instance().config_loader()
    command = shlex.join(["python", "run.py", "-m", *config.hydra.overrides.task])
    expected: dict[Path, dict[str, Any]] = {}
    for job in jobs:
        composed = as_composed(loader.load_configuration("config", job, RunMode.RUN))
        for key in ("sweep", "name"):
            if not RULES[key].holds(composed[key]):
                raise UserError(f"{key}={composed[key]}: {RULES[key].allowed}")  # before a file goes where it says
        if composed.task == "train":
            told = without_secrets({"job": shlex.join(job), "command": command})
            run = {**told, "config": resolved(composed)}
            expected.setdefault(Path(composed.runs_dir) / composed.sweep, {})[composed.name or run_name(composed)] = run
    return expected
