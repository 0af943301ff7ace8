"""What a multirun prints: what it is about to do, a line per finished job, and one table at the end.

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
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from massdpo.config import EXPECTED, RULES, as_composed, resolved, run_name, without_secrets
from massdpo.console import patiently, summary_table
from massdpo.errors import UserError
from massdpo.store import mapping_in, write_json, write_text

MEANS = ("accuracy", "mrr", "reward_accuracy", "margin", "train_seconds")  # means over seeds, in the table at the end
METRICS = "metrics.json"  # in a run's folder
BEST = "optimization_results.yaml"  # the result of a sweeper that searches, in Hydra's folder


class NoteExpected(Callback):
    """Hydra calls this in the parent process when a multirun begins, and in each job's process around the job."""

    jobs = 0
    fixed: frozenset[str] = frozenset()  # overrides that every job has
    runs: dict[str, str] = {}  # noqa: RUF012  a run's folder -> its job's overrides; set anew for each multirun
    began = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if int(os.environ.get("RANK", 0)) > 0:  # torchrun: every process starts the same multirun
            return
        try:
            jobs = [] if _searches(config) else jobs_of(config)
            self.jobs = len(jobs) or config.hydra.sweeper.n_trials
            print(f"sweep {config.sweep}: {self.jobs} jobs", file=sys.stderr)
            with patiently("composing the jobs"):
                expected = runs_of(config, jobs)
        except (UserError, HydraException, OmegaConfBaseException, ValueError):
            return  # the sweep is about to compose the same jobs, and will report it
        fixed = [override for override in _overrides(config) if not override.is_sweep_override()]
        self.fixed = frozenset(f"{each.get_key_element()}={each.get_value_element_as_str()}" for each in fixed)
        self.runs = {str(folder / name): run["job"] for folder, runs in expected.items() for name, run in runs.items()}
        for folder, runs in expected.items():
            file = folder / EXPECTED
            before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            asked = {run["job"] for run in runs.values()}  # after an edit of conf/, the same job has another name
            write_json(file, {name: run for name, run in before.items() if run["job"] not in asked} | runs)
        UNDER_WAY[:] = [(self, config, time.time())]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra has written the command as it was typed: remove the secrets."""
        self.began = time.time()
        file = Path(config.hydra.sweep.dir) / "multirun.yaml"
        if config.hydra.mode == RunMode.MULTIRUN and file.exists():
            write_text(file, yaml.safe_dump(without_secrets(yaml.safe_load(file.read_text(encoding="utf-8")))))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN or int(os.environ.get("RANK", 0)) > 0:
            return
        failed, run = isinstance(job_return._return_value, BaseException), job_return.cfg  # the property raises it
        outcome = "failed" if failed else f"{time.time() - self.began:.0f} s"
        if not failed and run is not None and run.task == "train":
            file = Path(run.runs_dir) / run.sweep / (run.name or run_name(run)) / METRICS
            outcome = outcome if file.stat().st_mtime >= self.began else "finished before"
            # a search must not see the test split
            metric = f"val/{run.trainer.keep_metric}" if _searches(config) else "accuracy"
            outcome = f"{metric} {mapping_in(file)[metric]:.3f}, {outcome}"
        label = self._label(config.hydra.overrides.task)
        print(f"job {config.hydra.job.num + 1} of {self.jobs}: {', '.join(filter(None, [label, outcome]))}", flush=True)

    def tell_end(self, config: DictConfig, began: float) -> None:
        """Print a table of the finished runs (means over seeds), the failed jobs, and the command of a full report."""
        found: dict[str, list[dict[str, Any]]] = {}
        failed = []
        for folder, job in self.runs.items():
            words = shlex.split(job)
            status = mapping_in(Path(folder) / "status.json")
            if status.get("status") == "failed":
                failed.append(f"failed: {self._label(words)}: {status.get('why')}")
            elif set(MEANS) <= (metrics := mapping_in(Path(folder) / METRICS)).keys():
                label = self._label(word for word in words if not word.startswith("seed="))
                found.setdefault(label, []).append(metrics)
        rows = [
            {"job": label, "runs": len(runs)} | {name: sum(run[name] for run in runs) / len(runs) for name in MEANS}
            for label, runs in found.items()
        ]
        if rows:
            summary_table(f"sweep {config.sweep}: means over seeds, test split", rows, whole=1)
        for line in failed:
            print(line)
        best = Path(config.hydra.sweep.dir) / BEST
        if _searches(config) and best.is_file() and best.stat().st_mtime >= began:
            result = yaml.safe_load(best.read_text(encoding="utf-8"))
            options = shlex.join(f"{key}={value}" for key, value in result["best_params"].items())
            print(f"best: val/{config.trainer.keep_metric} {result['best_value']:.3f} with {options}")
        elif not rows:
            return
        sweep = config.hydra.runtime.choices.get("sweeps") or config.sweep
        places = [] if config.runs_dir == "results/runs" else ["--runs", config.runs_dir]
        print(f"report: {shlex.join(['python', '-m', 'massdpo.report', sweep, *places])}")

    def _label(self, overrides: Iterable[str]) -> str:
        return " ".join(str(without_secrets(word)) for word in overrides if word not in self.fixed)


UNDER_WAY: list[tuple[NoteExpected, DictConfig, float]] = []  # the multirun of this process, and when it began


def tell_of_sweep() -> None:
    """Print the outcome of this process's multirun, if it was one."""
    while UNDER_WAY:
        note, config, began = UNDER_WAY.pop()
        note.tell_end(config, began)


def _searches(config: DictConfig) -> bool:
    """Does the sweeper decide what to try as it goes? Hydra's own knows all jobs beforehand."""
    return not str(config.hydra.sweeper._target_).endswith(".BasicSweeper")


def jobs_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each job that a multirun of this config makes: the sweep's options, then the command line's."""
    jobs: list[list[str]] = BasicSweeper.split_arguments(_overrides(config), None)[0]
    return jobs


def _overrides(config: DictConfig) -> list[Override]:
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*given, *config.hydra.overrides.task])


def runs_of(config: DictConfig, jobs: list[list[str]]) -> dict[Path, dict[str, Any]]:
    """The runs that the jobs of a multirun make, by sweep folder: name -> {"job", "command", "config"}."""
    loader = GlobalHydra.instance().config_loader()
    command = shlex.join(["python", "run.py", "-m", *config.hydra.overrides.task])
    expected: dict[Path, dict[str, Any]] = {}
    for job in jobs:
        composed = as_composed(loader.load_configuration("config", job, RunMode.RUN))
        for key in ("sweep", "name"):
            if not RULES[key].holds(composed[key]):
                raise UserError(f"{key}={composed[key]}: {RULES[key].allowed}")  # before anything is written there
        if composed.task == "train":
            run = without_secrets({"job": shlex.join(job), "command": command}) | {"config": resolved(composed)}
            expected.setdefault(Path(composed.runs_dir) / composed.sweep, {})[composed.name or run_name(composed)] = run
    return expected
