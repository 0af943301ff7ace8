"""Every sweep in both sizes: its jobs can be composed and run; what it will make is noted; shared runs are made once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from massdpo.config import compose, run_name, validate
from massdpo.report.rows import expected_runs
from massdpo.report.status import sweep_status
from massdpo.report.views import VIEWS
from massdpo.runs import take_over
from massdpo.sweeps import jobs_of
from tests.conftest import ROOT

SWEEPS = sorted(file.stem for file in (ROOT / "sweeps").glob("*.yaml"))
METHODS = set("sft dpo dmpo mppo sdpo hardest hardest_logp full adpo interleaved mass".split())
BENCHMARKS = set("synthetic_mcqa synthetic_rec lastfm movielens_100k qasc medmcqa".split())
TINY = (  # the smallest that goes through every stage
    "dataset.num_train=8 dataset.num_val=4 dataset.num_test=4 dataset.num_negatives=4 k=2 trainer.sft.epochs=1"
    " trainer.preference.epochs=1 trainer.preference.limit=8 trainer.threads=1 trainer.save_policy=false logger=none"
).split()


@pytest.fixture
def multirun(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Hydra's own config of `python run.py -m OVERRIDES`, as its callbacks get it."""
    monkeypatch.setenv("MASSDPO_ROOT", str(ROOT))

    def composed(*overrides: str) -> DictConfig:
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration("config", [*overrides], RunMode.MULTIRUN)

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        yield composed


@pytest.mark.parametrize("size", ["mini", "paper"])
@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_has_a_first_line_a_view_and_jobs(sweep: str, size: str, multirun) -> None:  # type: ignore[no-untyped-def]
    lines = (ROOT / "sweeps" / f"{sweep}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_", "Hydra reads it on the first line alone"
    assert lines[1].startswith(f"# python run.py -m sweeps={sweep}")
    jobs = jobs_of(multirun(f"sweeps={sweep}", f"size={size}"))
    assert len(jobs) >= 12 and len({tuple(job) for job in jobs}) == len(jobs)
    assert VIEWS[sweep].metrics
    rows_of = VIEWS[sweep].rows_of or sweep
    seen = set()
    for job in jobs[:: len(jobs) // 12]:  # composing takes a fifth of a second
        config = compose(job)
        assert config.sweep == rows_of
        if config.trainer.device == "cpu" or size == "mini":  # what it needs of the machine is not ours to have
            validate(config)
        seen.add(run_name(config))
    assert len(seen) >= 12


def test_the_main_table_has_all_benchmarks_families_methods_and_five_seeds(multirun) -> None:  # type: ignore[no-untyped-def]
    jobs = [dict(part.split("=", 1) for part in job) for job in jobs_of(multirun("sweeps=main"))]
    settings = {job["setting"] for job in jobs}
    assert {setting.removeprefix("mini/") for setting in settings} >= BENCHMARKS
    of = {setting: compose([f"setting={setting}"]).choices for setting in settings}
    models = {choices.model: {c.dataset for c in of.values() if c.model == choices.model} for choices in of.values()}
    assert models["tiny_llama"] == BENCHMARKS
    assert sorted(map(len, models.values()), reverse=True)[1:] == [2, 2]
    for setting in settings:
        here = [job for job in jobs if job["setting"] == setting]
        assert {job["method"] for job in here} == METHODS and {job["seed"] for job in here} == set("01234")


def test_options_of_the_command_line_win_over_the_sweep(multirun) -> None:  # type: ignore[no-untyped-def]
    jobs = jobs_of(multirun("sweeps=main", "setting=mini/lastfm", "method=mass", "seed=7", "beta=0.1,0.2"))
    config = compose(jobs[0])
    assert len(jobs) == 2 and (config.seed, config.beta, config.choices.dataset) == (7, 0.1, "lastfm")


@pytest.mark.parametrize("size", ["mini", "paper"])
def test_methods_share_every_option_but_their_own(size: str) -> None:
    """One setting for all: a method differs in selector, loss, k (dpo: 1) and, for the start alone, in its epochs."""
    settings = sorted((ROOT / "conf" / "setting" / size).glob("*.yaml"))
    assert settings
    for file in settings:
        base = None
        for method in sorted(METHODS):
            values = OmegaConf.to_container(compose([f"setting={size}/{file.stem}", f"method={method}"]))
            assert isinstance(values, dict)
            for key in ("selector", "loss", "choices", "k"):
                values.pop(key)
            if method == "sft":
                assert values["trainer"]["preference"].pop("epochs") == 0
            else:
                assert values["trainer"]["preference"].pop("epochs") > 0
            base = base or values
            assert values == base, f"{file.stem} {method}"


def test_raw_data_come_from_data_dir_or_are_fetched() -> None:
    setting = "setting=mini/lastfm"
    assert compose([setting]).dataset.raw_dir is None
    assert compose([setting, "data_dir=some/where"]).dataset.raw_dir == "some/where/lastfm"
    assert run_name(compose([setting])) == run_name(compose([setting, "data_dir=some/where"]))


def run(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MASSDPO_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *TINY, *overrides]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # three processes that import torch
def test_a_sweep_from_command_to_status(tmp_path: Path) -> None:
    done = run("-m", "selector=random,mass", "seed=0,1", "sweep=first", "runs_dir=runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = expected_runs(tmp_path / "runs" / "first")
    made = {path.parent.name for path in (tmp_path / "runs" / "first").glob("*/metrics.json")}
    assert set(expected) == made and len(made) == 4  # noted before the first job, by the names they then took
    assert {noted["job"].split()[0] for noted in expected.values()} == {"selector=random", "selector=mass"}

    # Another sweep that shares two runs with it and fails in two others; both processes of joblib find their config.
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    again = run("-m", "selector=mass", "seed=0,1", "k=2,9", "sweep=second", "runs_dir=runs", *launcher, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stdout.count("taken over from") == 2 and "k=9 is above dataset.num_negatives=4" in again.stderr
    second = tmp_path / "runs" / "second"
    for path in second.glob("*/metrics.json"):
        assert path.read_bytes() == (tmp_path / "runs" / "first" / path.parent.name / "metrics.json").read_bytes()
    lines, sentence = sweep_status(second)
    assert sentence.startswith("2 finished, 0 running, 0 failed, 2 missing; about ")
    (missing, _) = (line["note"] for line in lines if line["state"] == "missing")
    assert "k=9" in missing and "seed=" in missing  # what to give to run it alone


def test_a_run_of_another_key_or_unfinished_is_not_taken_over(tmp_path: Path) -> None:
    ours, other = tmp_path / "b" / "name", tmp_path / "a" / "name"
    for folder, status in ((ours, None), (other, {"status": "finished", "key": "k"})):
        folder.mkdir(parents=True)
        if status:
            (folder / "status.json").write_text(json.dumps(status))
            (folder / "metrics.json").write_text("{}")
    take_over(ours, "another key")
    assert not list(ours.iterdir())
    (other / "status.json").write_text(json.dumps({"status": "running", "key": "k"}))
    take_over(ours, "k")
    assert not list(ours.iterdir())
    (other / "status.json").write_text(json.dumps({"status": "finished", "key": "k"}))
    take_over(ours, "k")
    assert {path.name for path in ours.iterdir()} == {"metrics.json", "status.json"}
