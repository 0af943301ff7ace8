"""What a multirun is about to do: the names of its runs, noted where `python -m massdpo.report --status` finds them."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from massdpo.config import EXPECTED, RULES, as_composed, resolved, run_name, without_secrets
from massdpo.errors import UserError
from massdpo.store import write_json, write_text


class NoteExpected(Callback):
    """Hydra calls this in the parent before the first job of a multirun, and in each job's process before that job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if int(os.environ.get("RANK", 0)) > 0:  # torchrun: every process starts the same multirun
            return
        try:
            expected = runs_of(config)
        except (UserError, HydraException, OmegaConfBaseException, ValueError):
            return  # the sweep composes the same jobs in a moment, and reports it
        for folder, runs in expected.items():
            file = folder / EXPECTED
            before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            asked = {run["job"] for run in runs.values()}  # before an edit of conf/, the same job had another name
            write_json(file, {name: run for name, run in before.items() if run["job"] not in asked} | runs)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra has kept the command as it was typed, secrets and all."""
        file = Path(config.hydra.sweep.dir) / "multirun.yaml"
        if config.hydra.mode == RunMode.MULTIRUN and file.exists():
            write_text(file, yaml.safe_dump(without_secrets(yaml.safe_load(file.read_text(encoding="utf-8")))))


def jobs_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each job that a multirun of this config makes: the sweep's options, then the command line's."""
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*given, *config.hydra.overrides.task])
    jobs: list[list[str]] = BasicSweeper.split_arguments(overrides, None)[0]
    return jobs


def runs_of(config: DictConfig) -> dict[Path, dict[str, Any]]:
    """By a sweep's folder, name -> {"job", "command", "config"} of the runs that the multirun of `config` asks for."""
    loader = GlobalHydra.instance().config_loader()
    command = shlex.join(["python", "run.py", "-m", *config.hydra.overrides.task])
    jobs = jobs_of(config)
    print(f"sweep {config.sweep}: {len(jobs)} jobs", file=sys.stderr)
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
