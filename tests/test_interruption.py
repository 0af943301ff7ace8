"""A run that was stopped at any moment, in any way, ends with the same numbers; nothing half-written is believed."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from massdpo.config import compose
from massdpo.data.stored import StoredExamples
from massdpo.errors import UserError
from massdpo.evaluation.scores import SplitScorer
from massdpo.model import scratch
from massdpo.runs import pipeline, start
from massdpo.runs.folder import claim
from massdpo.store import MANIFEST, digest, is_whole
from massdpo.training import interruption, loop
from massdpo.training.objectives import Preference
from tests import processes
from tests.conftest import ROOT
from tests.test_experiment import TINY, Main, main, steps, timeless  # noqa: F401  a fixture too
from tests.test_recommendation import write_interactions

# 16 steps of SFT and 48 of the preference stage, some 20 ms each: long enough to be stopped in the middle
SHORT = (
    *TINY[:-1],
    *("trainer.preference.epochs=3", "trainer.batch_size=4", "trainer.checkpoint_every=3", "name=run"),
)
KILLS = 20


@dataclass
class Place:
    """Where one run lives, apart from all others: its folder, its cache, and what its processes said."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "runs" / "single" / "run"

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*SHORT, f"runs_dir={self.root / 'runs'}", f"cache_dir={self.root / 'cache'}")

    @property
    def log(self) -> Path:
        return self.root / "log"

    def start(self, *overrides: str, before: Callable[[], None] | None = None) -> BaseProcess:
        self.root.mkdir(parents=True, exist_ok=True)
        return processes.start(*self.arguments, *overrides, log=self.log, before=before)

    def until(self, happens: Callable[[], object], process: BaseProcess) -> None:
        deadline = time.monotonic() + 120
        while not happens():
            assert process.is_alive() and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.003)

    def train(self, *overrides: str) -> Path:
        """In this process."""
        return pipeline.train(compose([*self.arguments, *overrides]))

    def status(self) -> dict[str, Any]:
        return json.loads((self.run / "status.json").read_text())

    def errors(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("error: ")]

    def result(self) -> dict[str, Any]:
        """Everything the run computed, and the names of everything that it left."""
        names = [str(path.relative_to(self.run)) for path in self.run.rglob("*")]
        cached = (path for path in (self.root / "cache").rglob("*") if path.suffix != ".lock")
        return {
            "metrics": timeless(self.run),
            "history": steps(self.run),
            "predictions": (self.run / "predictions.jsonl").read_bytes(),
            "policy": (self.run / "policy" / "model.safetensors").read_bytes(),
            "status": self.status()["status"],
            "left": sorted(name for name in names if not name.startswith("wandb")),
            "cached": sorted(str(path.relative_to(self.root / "cache")) for path in cached),
        }


def same(found: dict[str, Any], expected: dict[str, Any], when: str = "") -> None:
    for name, value in found.items():
        assert value == expected[name], f"{name} {when}"


def wait(process: BaseProcess) -> int | None:
    process.join(240)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run, never stopped."""
    place = Place(tmp_path_factory.mktemp("whole"))
    assert wait(place.start()) == 0, place.log.read_text()
    return place.result()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# Stopped at any moment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_while_it_trains(number: signal.Signals, whole: dict[str, Any], place: Place) -> None:
    """With workers, the signal sent to all of them, as a terminal does; the same command goes on."""
    process = place.start("trainer.workers=2")
    place.until(lambda: list(place.run.glob("checkpoints/0*")), process)
    time.sleep(random.uniform(0, 0.3))  # another moment in every test run: any must do
    os.killpg(process.pid or 0, number)
    code = wait(process)
    assert not (place.run / "metrics.json").exists(), "the run was over before the signal came: make SHORT longer"
    if number == signal.SIGKILL:
        assert place.status()["status"] == "running"
    else:
        assert code == 130
        assert place.status()["status"] == "interrupted"
        (newest,) = (place.run / "checkpoints").glob("0*")
        step = place.status()["why"].split()[3]
        assert newest.name.endswith(f"-{int(step):08d}")  # written at that very step
        assert "Traceback" not in place.log.read_text()
    assert wait(place.start()) == 0, place.log.read_text()
    assert "preference: continuing from step" in place.log.read_text()
    same(place.result(), whole)


@pytest.mark.parametrize(
    "phase",
    ["validate", "test", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reference train", "select"))],
)
def test_sigterm_between_the_steps(
    phase: str,
    whole: dict[str, Any],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is learned in these phases: the run ends at once, the checkpoint before them is written already."""
    place_of = (Preference, "begin_epoch") if phase == "select" else (SplitScorer, "__call__")
    original = getattr(*place_of)

    def stopped(*arguments: Any) -> Any:
        if phase in ("select", arguments[-1]):
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*place_of, stopped)
        place.train()
    assert place.status()["status"] == "interrupted" and "SIGTERM" in place.status()["why"]
    if phase == "test":
        (last,) = (place.run / "checkpoints").iterdir()
        assert not list(last.glob("optimizer*")), "no step needs it any more, and it has twice the size of the weights"
    place.train()
    same(place.result(), whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_moments(whole: dict[str, Any], tmp_path: Path) -> None:
    """From the first file to the last: killed and started again until done, and that until there were enough kills."""
    begun = time.monotonic()
    assert wait(Place(tmp_path / "timed").start()) == 0
    seconds = time.monotonic() - begun
    seed = random.randrange(2**32)
    chance, kills, runs = random.Random(seed), 0, 0
    while kills < KILLS:
        place = Place(tmp_path / str(runs))
        process = place.start()
        while process.join(chance.uniform(0, seconds)) or process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            process = place.start()
        assert process.exitcode == 0, f"seed {seed}: {place.log.read_text()}"
        same(place.result(), whole, f"seed {seed}, run {runs}")
        assert "damaged" not in place.log.read_text()
        runs += 1


@dataclass(frozen=True)
class DiesAt:
    """Kills its own process before the `number`th change to what is below `folder`: a file, a folder, a name."""

    folder: Path
    number: int

    def __call__(self) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event == "open":
                changes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            else:
                changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
            # rmtree removes names relative to an open folder: all are below ours while a run is at work
            if changes and (str(arguments[0]).startswith(str(self.folder)) or event in ("os.remove", "os.rmdir")):
                seen += 1
                if seen == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_before_any_change_to_the_disk(whole: dict[str, Any], tmp_path: Path) -> None:
    """Some twenty of the 640 changes, others in every test run: in caches, checkpoints, results, while old ones go."""
    stride = 31
    number = random.Random().randrange(1, stride + 1)
    kills = 0
    while True:
        place = Place(tmp_path / str(number))
        if wait(place.start(before=DiesAt(tmp_path, number))) == 0:
            break  # there were fewer changes than that
        kills += 1
        assert wait(place.start()) == 0, f"change {number}: {place.log.read_text()}"
        same(place.result(), whole, f"change {number}")
        assert "damaged" not in place.log.read_text()
        shutil.rmtree(place.root)
        number += stride
    assert kills >= 15


def test_checkpoints_that_outlived_a_finished_run_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "0001-00000003").mkdir(parents=True)
    (tmp_path / "status.json").write_text(json.dumps({"status": "finished", "key": digest({"code": "a"})}))
    assert not claim(tmp_path, {"code": "a"}, False, Accelerator(cpu=True))
    assert not (tmp_path / "checkpoints").exists()


# Damaged checkpoints and caches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was stopped in its second epoch, with the best policy of the first beside its checkpoint."""
    place = Place(tmp_path_factory.mktemp("begun"))
    with pytest.MonkeyPatch.context() as patch:
        step = loop.Training.step

        def stopping(training: loop.Training, *rest: Any) -> dict[str, Any]:
            if training.stage.name == "preference" and training.position.step == 23:
                signal.raise_signal(signal.SIGTERM)
            return step(training, *rest)

        patch.setattr(loop.Training, "step", stopping)
        with pytest.raises(interruption.Stopped):
            place.train("trainer.keep=best")
    return place


@pytest.fixture(scope="module")
def best(begun: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run, gone on with: nothing is damaged."""
    place = copied(begun, tmp_path_factory.mktemp("best") / "run")
    place.train("trainer.keep=best")
    return place.result()


def copied(place: Place, root: Path) -> Place:
    shutil.copytree(place.root, root)
    return Place(root)


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("0*/model.safetensors", "truncated"),
        ("0*/optimizer.bin", "a bit"),
        (f"0*/{MANIFEST}", "missing"),
        ("best/model.safetensors", "a bit"),
        *(
            pytest.param(name, how, marks=pytest.mark.slow)
            for name in ("0*/objective.safetensors", "0*/position.json", f"best/{MANIFEST}")
            for how in ("truncated", "a bit", "missing")
        ),
    ],
)
def test_a_damaged_checkpoint_is_told_set_aside_and_not_used(
    name: str, how: str, begun: Place, best: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(begun, tmp_path / "run")
    (file,) = (place.run / "checkpoints").glob(name)
    damage(file, how)
    capsys.readouterr()
    place.train("trainer.keep=best")
    said = capsys.readouterr()
    assert "checkpoints" in said.err and "is damaged: moved aside" in said.err
    assert "preference: going on" not in said.out
    same(place.result(), best)


def test_checkpoints_without_a_status_are_not_used(
    begun: Place, best: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows which config they belong to."""
    place = copied(begun, tmp_path / "run")
    (place.run / "status.json").write_text('{"status": "runn')
    place.train("trainer.keep=best", "beta=0.1")
    assert "checkpoints is damaged: moved aside" in capsys.readouterr().err
    assert place.result()["metrics"] != best["metrics"]


def test_damaged_caches_are_told_set_aside_and_computed_again(
    begun: Place, best: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(begun, tmp_path / "run")
    damages = {
        "prepared": ("train.jsonl", "a bit"),
        "tokenizer": ("tokenizer.json", "missing"),
        "sft": ("model.safetensors", "truncated"),
        "reference": ("train.safetensors", "a bit"),
    }
    for kind, (name, how) in damages.items():
        (file,) = (place.root / "cache" / kind).glob(f"*/{name}")
        damage(file, how)
    capsys.readouterr()
    place.train("trainer.keep=best")
    assert capsys.readouterr().err.count("is damaged: moved aside") == len(damages)
    for kind in damages:
        folders = sorted(path for path in (place.root / "cache" / kind).iterdir() if path.is_dir())
        assert [is_whole(folder) for folder in folders] == [True, False]  # KEY, and KEY.damaged.SOMETHING
    same(place.result() | {"cached": 0}, best | {"cached": 0})


# A disk that takes no more --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_stops_with_one_error_and_leaves_the_last_checkpoint_good(
    whole: dict[str, Any], place: Place, logger: str
) -> None:
    """From then on no file may grow beyond 30 kB: weights no longer fit, status.json does."""
    process = place.start(logger)
    place.until(lambda: list(place.run.glob("checkpoints/0*")), process)
    resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (30_000, 30_000))
    assert wait(process) == 2
    (error,) = place.errors()
    assert "checkpoints cannot be written" in error and "continues from the last checkpoint" in error
    assert "Traceback" not in place.log.read_text()
    assert place.status()["status"] == "failed" and "cannot be written" in place.status()["why"]
    (newest,) = (place.run / "checkpoints").iterdir()
    assert is_whole(newest)
    assert wait(place.start()) == 0
    assert "preference: continuing from step" in place.log.read_text()
    same(place.result(), whole)


@dataclass(frozen=True)
class Limited:
    """Its process may write files of so many bytes at most."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@pytest.mark.slow
@pytest.mark.parametrize("size", [300, 3_000, 30_000, 100_000, 300_000])
def test_a_disk_that_is_full_from_the_start(size: int, whole: dict[str, Any], place: Place) -> None:
    """Whichever file it is that does not fit: one line, and the same command ends well once there is room."""
    code = wait(place.start(before=Limited(size)))
    if code != 0:
        assert code == 2, place.log.read_text()
        assert "Traceback" not in place.log.read_text()
        assert ["cannot be written" in error for error in place.errors()] == [True]
        assert not list(place.root.rglob("metrics.json"))
        assert wait(place.start()) == 0, place.log.read_text()
    same(place.result(), whole)


@pytest.mark.parametrize("option", ["runs_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written_is_told_in_one_line(
    option: str,
    place: Place,
    main: Main,  # noqa: F811
) -> None:
    (place.root / "file").write_text("a file stands in the folder's place")
    code, _, err = main(*place.arguments, f"{option}={place.root / 'file' / 'deep'}")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert "cannot be written (Not a directory)" in line and f"set {option}" in line


def test_a_checkpoint_that_cannot_be_written(place: Place, logger: str) -> None:
    place.run.mkdir(parents=True)
    (place.run / "checkpoints").write_text("a file stands in the folder's place")
    with pytest.raises(UserError, match=r"checkpoints cannot be written \((File exists|Not a directory)\)"):
        place.train(logger)
    assert place.status()["status"] == "failed"


# Many at once ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting:
    """Notes in a file, a line each, what is computed: stages trained, tokenizers learned, splits prepared."""

    notes: Path

    def __call__(self) -> None:
        def counted(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                note = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(note, f"{name(*arguments)}\n".encode())
                os.close(note)
                return function(*arguments, **named)

            return call

        for module in (start, pipeline):  # the SFT start's, the preference stage's
            module.fit = counted(lambda stage, *_: stage.name, module.fit)  # type: ignore[attr-defined]
        SplitScorer.__call__ = counted(lambda *rest: rest[-1], SplitScorer.__call__)  # type: ignore[method-assign]
        scratch.learn_tokenizer = counted(lambda *_: "tokenizer", scratch.learn_tokenizer)  # type: ignore[assignment]
        written = counted(lambda _, __, split: f"prepared {split}", StoredExamples.written)
        StoredExamples.written = staticmethod(written)  # type: ignore[assignment, method-assign]


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[tuple[Counting, Callable[[str], int]]]:
    counter = Counting(tmp_path / "notes")
    yield counter, lambda name: counter.notes.read_text().splitlines().count(name)


@pytest.mark.slow
def test_two_runs_of_one_config_at_once(
    whole: dict[str, Any], place: Place, counting: tuple[Counting, Callable[[str], int]]
) -> None:
    counter, count = counting
    pair = [place.start(before=counter) for _ in range(2)]
    assert [wait(process) for process in pair] == [0, 0], place.log.read_text()
    said = place.log.read_text()
    assert "is being computed by process" in said and "is finished already: skipped" in said
    assert [count(name) for name in ("tokenizer", "sft", "reference test", "preference", "test")] == [1] * 5
    same(place.result(), whole)


@pytest.mark.slow
def test_jobs_at_once_share_what_they_have_in_common(
    tmp_path: Path, counting: tuple[Counting, Callable[[str], int]]
) -> None:
    counter, count = counting
    raw = tmp_path / "raw"
    raw.mkdir()
    write_interactions(raw, users=40, length=6, items=40)
    tiny = [option for option in TINY if not option.startswith("dataset.")]
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    data = ["dataset=sequences", f"dataset.raw_dir={raw}"]
    jobs = ("selector=mass", "selector=random", "selector=hardest", "beta=0.1")
    started = [processes.start(*tiny, *places, *data, job, log=tmp_path / "log", before=counter) for job in jobs]
    assert [wait(process) for process in started] == [0] * 4, (tmp_path / "log").read_text()
    shared = ("prepared train", "prepared test", "tokenizer", "sft", "reference train", "reference test")
    assert [count(name) for name in shared] == [1] * 6
    assert [count(name) for name in ("preference", "test")] == [4, 4]


@pytest.mark.slow
def test_a_job_that_waits_takes_over_from_one_that_is_killed(
    whole: dict[str, Any], place: Place, counting: tuple[Counting, Callable[[str], int]]
) -> None:
    """The one that trains the SFT start dies, workers and all; the other goes on from its checkpoint."""
    counter, count = counting
    first = place.start("trainer.workers=1", before=counter)
    place.until(lambda: list((place.root / "cache" / "sft").glob("*.checkpoints/0*")), first)
    os.kill(first.pid or 0, signal.SIGSTOP)  # it computes on as slowly as it takes the other to arrive
    second = place.start("name=other", before=counter)
    place.until(lambda: "another job is computing" in place.log.read_text(), second)
    first.kill()
    assert wait(second) == 0, place.log.read_text()
    assert "sft: continuing from step" in place.log.read_text()
    assert [count(name) for name in ("tokenizer", "sft", "preference")] == [1, 2, 1]
    assert wait(place.start()) == 0
    assert place.result()["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_two_processes_of_one_run_stop_at_the_same_step(tmp_path: Path) -> None:
    """torchrun hands SIGTERM on, and each hears it at a time of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def launch(place: Place) -> subprocess.Popen[bytes]:
        place.root.mkdir(exist_ok=True)
        with open(place.log, "ab") as log:
            command = [*launcher, str(ROOT / "run.py"), *place.arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, env=environment, cwd=place.root, stdout=log, stderr=log)

    whole, stopped = Place(tmp_path / "whole"), Place(tmp_path / "stopped")
    assert launch(whole).wait(300) == 0, whole.log.read_text()
    process = launch(stopped)
    while not list(stopped.run.glob("checkpoints/0*")):
        assert process.poll() is None, stopped.log.read_text()
        time.sleep(0.003)
    process.terminate()
    assert process.wait(120) != 0
    assert not (stopped.run / "metrics.json").exists(), "the run was over before the signal came: make SHORT longer"
    assert stopped.status()["status"] == "interrupted", stopped.log.read_text()
    assert launch(stopped).wait(300) == 0, stopped.log.read_text()
    assert "preference: continuing from step" in stopped.log.read_text()
    same(stopped.result(), whole.result())
