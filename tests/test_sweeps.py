"""Every sweep can be composed and run in both sizes, what it will make is noted, and shared runs are made once."""

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from massdpo import __main__ as command
from massdpo.config import compose, fast_precision, run_name, validate
from massdpo.config.options import on_search_path
from massdpo.config.sweeps import NoteExpected, jobs_of
from massdpo.errors import UserError
from massdpo.report.rows import RunRows, expected_runs
from massdpo.report.status import sweep_status
from massdpo.report.views import VIEWS
from massdpo.runs.folder import claim, status, take_over
from massdpo.store import digest, write_json
from massdpo.tasks import run as run_task
from tests.conftest import ROOT
from tests.test_precision import on_cpu

SWEEPS = sorted(file.stem for file in (ROOT / "sweeps").glob("*.yaml") if file.stem != "optuna")  # which searches
SETTINGS = sorted(f"{file.parent.name}/{file.stem}" for file in (ROOT / "conf" / "setting").glob("*/*.yaml"))
METHODS = {
    *("sft", "dpo", "dmpo", "mppo", "sdpo", "hardest", "hardest_logp", "full", "adpo", "interleaved", "mass"),
}
BENCHMARKS = {"synthetic_mcqa", "synthetic_rec", "lastfm", "movielens_100k", "qasc", "medmcqa"}
TINY = [  # the smallest that goes through every stage
    *("dataset.num_train=8", "dataset.num_val=4", "dataset.num_test=4", "dataset.num_negatives=4", "logger=none"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.threads=1", "trainer.save_policy=false"),
]


def jobs(*overrides: str) -> list[list[str]]:
    """The overrides of each job of `python run.py -m OVERRIDES`."""
    on_search_path()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        loader = GlobalHydra.instance().config_loader()
        return jobs_of(loader.load_configuration("config", [*overrides], RunMode.MULTIRUN))


@pytest.mark.parametrize(
    ("sweep", "size"),
    [(sweep, size) for sweep in SWEEPS for size in (("small",) if sweep.startswith("small") else ("mini", "paper"))],
)
def test_a_sweep_has_a_first_line_a_view_and_jobs(sweep: str, size: str) -> None:
    lines = (ROOT / "sweeps" / f"{sweep}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_", "Hydra reads it on the first line alone"
    assert lines[1].startswith(f"# python run.py -m sweeps={sweep}")
    all_jobs = jobs(f"sweeps={sweep}", f"size={size}")
    assert len(all_jobs) >= 12 and len({tuple(job) for job in all_jobs}) == len(all_jobs)
    first, last = (compose(job) for job in (all_jobs[0], all_jobs[-1]))
    assert first.sweep == last.sweep == (VIEWS[sweep].rows_of or sweep)
    assert run_name(first) != run_name(last)
    if size == "mini":  # what the other size needs of the machine is not there everywhere
        validate(first)
        validate(last)


def test_committed_rows_have_the_names_that_their_commands_give_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another default, or an option that `naming.ADDED` lacks, would part them from the runs that replace them."""
    on_cpu(monkeypatch, fast=True)  # those with real weights were computed in bfloat16
    for file in sorted((ROOT / "results").glob("*/rows.csv")):
        with open(file, encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        for row in rows[:: len(rows) // 3 + 1]:
            assert run_name(compose(shlex.split(row["command"])[2:])) == row["name"], row["command"]


def test_small_settings_take_the_rates_that_were_best_on_validation() -> None:
    rows = RunRows.read(ROOT / "results" / "small_rates").frame
    means = rows.groupby(["dataset", "method", "option/learning_rate"], as_index=False)["val/ndcg@5"].mean()
    for row in means.loc[means.groupby(["dataset", "method"])["val/ndcg@5"].idxmax()].to_dict("records"):
        config = compose([f"setting=small/{row['dataset']}", f"method={row['method']}"])
        assert config.trainer.preference.learning_rate == row["option/learning_rate"], row["method"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_there_in_both_sizes_and_possible(setting: str) -> None:
    size, name = setting.split("/")
    config = compose([f"setting={setting}"])
    if size == "small":  # real weights on a CPU: the benchmarks, with two models
        assert config.choices.model.endswith("_q4") and config.trainer.precision == fast_precision("cpu")
        assert config.k == 3 and config.trainer.preference.limit == 300
        return
    assert f"{'paper' if size == 'mini' else 'mini'}/{name}" in SETTINGS
    assert name.startswith(config.choices.dataset)
    if size == "mini":
        validate(config)
        assert config.choices.model.startswith("tiny_") and config.trainer.threads == 1


def test_the_main_table_has_all_benchmarks_families_methods_and_five_seeds() -> None:
    options = [dict(part.split("=", 1) for part in job) for job in jobs("sweeps=main")]
    settings = {job["setting"] for job in options}
    choices = [compose([f"setting={setting}"]).choices for setting in sorted(settings)]
    datasets: dict[str, set[str]] = {}
    for choice in choices:
        datasets.setdefault(choice.model, set()).add(choice.dataset)
    assert datasets.pop("tiny_llama") == BENCHMARKS
    assert [len(of_family) for of_family in datasets.values()] == [2, 2]
    for setting in settings:
        here = [job for job in options if job["setting"] == setting]
        assert {job["method"] for job in here} == METHODS and {job["seed"] for job in here} == set("01234")


def test_methods_share_every_option_but_their_own() -> None:
    """One setting for all: a method is a selector, a loss and a k; `sft` is the start, without a preference stage."""
    for file in sorted((ROOT / "conf" / "method").glob("*.yaml")):
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert [next(iter(line)) for line in node.pop("defaults")] == ["override /selector", "override /loss"]
        node.pop("k", None)
        assert node == ({"trainer": {"preference": {"epochs": 0}}} if file.stem == "sft" else {})


def test_options_of_the_command_line_win_over_the_sweep() -> None:
    made = jobs("sweeps=main", "setting=mini/lastfm", "method=mass", "seed=7", "beta=0.1,0.2")
    config = compose(made[0])
    assert len(made) == 2 and (config.seed, config.beta, config.choices.dataset) == (7, 0.1, "lastfm")


def test_raw_data_come_from_data_dir_or_are_fetched() -> None:
    setting = "setting=mini/lastfm"
    assert compose([setting]).dataset.raw_dir is None
    assert compose([setting, "data_dir=some/where"]).dataset.raw_dir == "some/where/lastfm"
    assert run_name(compose([setting])) == run_name(compose([setting, "data_dir=some/where"]))
    for name in ("arc", "commonsenseqa", "lastfm", "medmcqa", "movielens_100k", "movielens_1m", "openbookqa", "qasc"):
        assert compose([f"dataset={name}"]).dataset.raw_dir is None
        assert compose([f"dataset={name}", "data_dir=some/where"]).dataset.raw_dir == f"some/where/{name}"
        own = compose([f"dataset={name}", "data_dir=some/where", "dataset.raw_dir=else/where"])
        assert own.dataset.raw_dir == "else/where"


def test_a_job_that_got_another_name_is_expected_once(tmp_path: Path) -> None:
    """After an edit of conf/ the same job makes another run; what other commands asked for is still expected."""
    on_search_path()
    before = {"old": {"job": f"k=1 runs_dir={tmp_path}"}, "other": {"job": "k=9"}}
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "expected.json").write_text(json.dumps(before))
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", ["k=1,2", f"runs_dir={tmp_path}"], RunMode.MULTIRUN)
        NoteExpected().on_multirun_start(config)
    after = json.loads((folder / "expected.json").read_text())
    assert sorted(run["job"].split()[0] for run in after.values()) == ["k=1", "k=2", "k=9"] and "old" not in after
    assert {name for name, run in after.items() if run["job"].startswith("k=2")} == {
        run_name(compose(["k=2", f"runs_dir={tmp_path}"]))
    }


def test_only_a_run_that_was_expected_is_noted_as_failed(tmp_path: Path) -> None:
    """Not one whose name is a part of an expected one, nor one whose options are so wrong that it has no name."""
    write_json(tmp_path / "single" / "expected.json", {"one-more": {}})
    wrong = [*TINY, f"runs_dir={tmp_path}", "trainer.keep_metric=nothing"]
    for more in (["name=one"], ["beta=abc"], ["name=one-more"]):
        with pytest.raises(UserError, match=r"^(beta=|trainer\.keep_metric=)"):
            run_task(compose([*wrong, *more]))
    assert [path.parent.name for path in tmp_path.glob("*/*/status.json")] == ["one-more"]


def run(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MASSDPO_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), "-m", *TINY, *overrides]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# Searches ------------------------------------------------------------------------------------------------------------

has_optuna = importlib.util.find_spec("optuna") is not None


def test_a_job_returns_what_validation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sweepers that search: the metric that `keep_metric` names, of the validation split; or why there is none."""
    monkeypatch.setattr(command, "MAIN_PROCESS", [os.getpid()])
    monkeypatch.setattr(command, "FAILURES", [])
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", "verbosity=quiet", "name=one"]
    job = command.job.__wrapped__
    found = [job(compose([*TINY, *places, "trainer.keep_metric=mrr"])) for _ in ("computed", "finished before")]
    metrics = json.loads((tmp_path / "runs" / "single" / "one" / "metrics.json").read_text())
    assert found == [metrics["val/mrr"]] * 2 and metrics["val/mrr"] != metrics["mrr"]
    assert command.FAILURES == []
    assert isinstance(job(compose([*TINY, *places, "k=9"])), UserError) and command.FAILURES == [2]


@pytest.mark.skipif(has_optuna, reason="Optuna, the extra `optuna`, is installed")
def test_without_optuna_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"^hydra/sweeper/optuna comes with an extra: pip install '\.\[optuna\]'"):
        compose(["sweeps=optuna"])


@pytest.mark.slow
@pytest.mark.skipif(not has_optuna, reason="Optuna, the extra `optuna`, is not installed")
def test_a_search_looks_at_validation_alone(tmp_path: Path) -> None:
    few = ["hydra.sweeper.n_trials=3", "runs_dir=runs", "trainer.preference.learning_rate=tag(log,interval(1e-4,1e-2))"]
    done = run("sweeps=optuna", *few, "k=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    label = r"trainer.preference.learning_rate=[\de.-]+ beta=[\d.]+"
    jobs = re.findall(rf"^job (\d) of 3: ({label}), val/accuracy ([01]\.\d+), \d+ s$", done.stdout, re.MULTILINE)
    assert [number for number, *_ in jobs] == ["1", "2", "3"]
    (best,) = re.findall(rf"^best: val/accuracy ([\d.]+) with ({label})$", done.stdout, re.MULTILINE)
    assert best[0] == max(value for *_, value in jobs) and best[1] in {label for _, label, _ in jobs}
    files = (tmp_path / "runs" / "optuna").glob("*/metrics.json")
    assert sorted(f"{json.loads(file.read_text())['val/accuracy']:.3f}" for file in files) == sorted(
        value for *_, value in jobs
    )
    assert done.stdout.splitlines()[-1] == "report: python -m massdpo.report optuna --runs runs"


@pytest.mark.slow  # three processes that import torch
def test_a_sweep_from_command_to_status(tmp_path: Path) -> None:
    done = run("selector=random,mass", "seed=0,1", "k=2", "sweep=first", "runs_dir=runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = re.findall(
        r"^job (\d) of 4: (selector=\w+ seed=\d), accuracy [01]\.\d{3}, \d+ s$", done.stdout, re.MULTILINE
    )
    assert told == [
        (str(number), f"selector={name} seed={seed}")
        for number, (name, seed) in enumerate(product(("random", "mass"), (0, 1)), 1)
    ]
    assert re.search(r"│ selector=mass +│ +2 │", done.stdout) and len(done.stdout.splitlines()) < 15
    assert done.stdout.splitlines()[-1] == "report: python -m massdpo.report first --runs runs"
    expected = expected_runs(tmp_path / "runs" / "first")
    made = {path.parent.name for path in (tmp_path / "runs" / "first").glob("*/metrics.json")}
    assert set(expected) == made and len(made) == 4  # noted before the first job, by the names they then took
    asked = {
        tuple(part for part in noted["job"].split() if part[:4] in ("sele", "seed")) for noted in expected.values()
    }
    assert asked == {(f"selector={name}", f"seed={seed}") for name in ("random", "mass") for seed in (0, 1)}

    # Another sweep that shares two runs with it and fails in two others; both processes of joblib find their config.
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    again = run("selector=mass", "seed=0,1", "k=2,9", "sweep=second", "runs_dir=runs", *launcher, cwd=tmp_path)
    assert again.returncode == 2
    assert len(re.findall(r"^job \d of 4: seed=\d k=2, .*finished before$", again.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^job \d of 4: seed=\d k=9, failed$", again.stdout, re.MULTILINE)) == 2
    assert re.search(r"│ k=2 +│ +2 │", again.stdout), "a launcher's process that failed costs no table"
    failed = re.findall(r"^failed: seed=(\d) k=9: (k=9 is above dataset.num_negatives=4)", again.stdout, re.MULTILINE)
    assert [seed for seed, _ in failed] == ["0", "1"]
    assert again.stdout.splitlines()[-1] == "report: python -m massdpo.report second --runs runs"
    assert again.stdout.count("taken over from") == 2 and "k=9 is above dataset.num_negatives=4" in again.stderr
    second = tmp_path / "runs" / "second"
    for path in second.glob("*/metrics.json"):
        assert path.read_bytes() == (tmp_path / "runs" / "first" / path.parent.name / "metrics.json").read_bytes()
    lines, sentence = sweep_status(second)
    assert sentence.startswith("2 finished, 0 missing, 2 failed, 0 running; about "), sentence
    (failed, _) = (line["note"] for line in lines if line["state"] == "failed")
    assert "k=9" in failed, failed


def test_a_run_of_another_key_or_unfinished_is_not_taken_over(tmp_path: Path) -> None:
    ours, other = tmp_path / "b" / "name", tmp_path / "a" / "name"
    ours.mkdir(parents=True)
    parts = {"options": "o", "data": "d"}
    finished = {"status": "finished", "key": digest(parts), "parts": parts}
    write_json(other / "metrics.json", {})
    for found, wanted in ((finished, parts | {"data": "other"}), (finished | {"status": "running"}, parts)):
        write_json(other / "status.json", found)
        take_over(ours, wanted)
        assert not list(ours.iterdir())
    write_json(other / "status.json", finished)
    take_over(ours, parts)
    assert {path.name for path in ours.iterdir()} == {"metrics.json", "status.json"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_cleared_while_it_is_copied_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Another job computes it again with force=true: its files are removed one by one, status.json first."""
    ours, other = tmp_path / "b" / "name", tmp_path / "a" / "name"
    ours.mkdir(parents=True)
    parts = {"options": "o"}
    machine: Any = SimpleNamespace(is_main_process=True)
    write_json(other / "status.json", {"status": "finished", "key": digest(parts), "parts": parts})
    for number in range(5):
        write_json(other / f"{number}.json", {})
    copies = []

    def copy(source: str, target: str) -> None:
        if len(copies) == 2 and when == "before":
            assert claim(other, parts, True, machine)
        copies.append(shutil.copyfile(source, target))
        if len(copies) == 5:
            assert claim(other, parts, True, machine)

    copytree = shutil.copytree
    monkeypatch.setattr(shutil, "copytree", lambda *args, **options: copytree(*args, copy_function=copy, **options))
    take_over(ours, parts)
    assert copies and not status(ours)


def test_the_status_of_a_run_is_the_first_file_that_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"options": "o"}
    machine: Any = SimpleNamespace(is_main_process=True)
    for name in ("a.json", "status.json", "z.json"):
        write_json(tmp_path / name, {"status": "finished", "key": digest(parts)})
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: [removed.append(path.name), unlink(path)])
    assert claim(tmp_path, parts, True, machine)
    assert removed[0] == "status.json" and len(removed) == 3


@pytest.mark.parametrize("option", ["sweep=../../outside", "name=../outside"])
def test_a_sweep_writes_nothing_where_a_name_leads_out_of_its_folder(tmp_path: Path, option: str) -> None:
    runs = tmp_path / "a" / "runs"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "run.py"), "-m", "seed=0", option, f"runs_dir={runs}", "logger=none"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert found.returncode == 2 and "a plain folder name" in found.stderr
    assert found.stdout.startswith("job 1 of 1: ") and found.stdout.endswith("failed\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and runs not in path.parents]
    assert not list(runs.rglob("expected.json"))
