"""Two CPU processes train as one process with twice the batch does, with whole weights and with sharded ones."""

import csv
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

from massdpo.errors import UserError
from massdpo.runs import launch
from massdpo.runs.folder import alone
from massdpo.store import Cache
from tests.conftest import ROOT
from tests.processes import CONTEXT

SMALL = (
    *("dataset.num_train=60", "dataset.num_val=16", "dataset.num_test=32", "selector=full", "logger=none"),
    "verbosity=quiet",  # no plan, whose steps pick too
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.log_every=1", "trainer.checkpoint_every=2"),
    *("trainer.keep=best", "name=run"),
)
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    str(ROOT / "run.py"),
]
NOTED = str(ROOT / "tests" / "noted.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "fsdp.yaml")]
SHARDED = [*LAUNCH, "--main_process_port", "0", str(ROOT / "tests" / "sharded.py")]  # 0: any port that is free


def train(
    launcher: list[str], where: Path, batch_size: int, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    where.mkdir(exist_ok=True)
    variables = {"MASSDPO_CACHE": str(where / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, *SMALL, *more, f"runs_dir={where}", f"trainer.batch_size={batch_size}"]
    options: dict[str, Any] = {"cwd": where, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, env=os.environ | variables | environment, **options)


def losses(done: subprocess.CompletedProcess[str], where: Path) -> list[float]:
    assert done.returncode == 0, done.stderr
    with open(where / "single" / "run" / "history.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """The losses and the policy of one process."""
    where = tmp_path_factory.mktemp("one")
    found = losses(train([sys.executable, str(ROOT / "run.py")], where, batch_size=16), where)
    # 60 prompts: the last step of each stage has 12, an unequal share of a full batch.
    assert len(found) == 8
    return found, where / "single" / "run" / "policy"


def check_policy(policy: Path, expected: Path) -> None:
    """All weights, as `transformers` loads them. Adam's first steps make 1e-5 of a gradient's last digits."""
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (policy, expected))
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-4)
    model, info = AutoModelForCausalLM.from_pretrained(policy, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.tie_word_embeddings


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(
    one: tuple[list[float], Path], tmp_path: Path
) -> None:
    two = losses(train(TORCHRUN, tmp_path, batch_size=8), tmp_path)
    assert two == pytest.approx(one[0], abs=1e-4)  # sums in another order differ by about 1e-6
    found, expected = costs(tmp_path / "single" / "run"), costs(one[1].parent)
    assert (found.pop("processes"), expected.pop("processes")) == (2, 1)
    assert found == expected  # tokens are counted over all processes
    check_policy(tmp_path / "single" / "run" / "policy", one[1])


def costs(run: Path) -> dict[str, int]:
    found = json.loads((run / "metrics.json").read_text())
    return {name: found[name] for name in ("fed_tokens", "train_tokens", "processes")}


@pytest.mark.slow
def test_two_processes_pick_what_one_picks(tmp_path: Path) -> None:
    """At the first step, where all rewards are equal but for rounding, and at those after it."""
    picks, tokens = [], []
    for launcher, size in ([sys.executable], 16), (TORCHRUN[:-1], 8):
        where = tmp_path / str(size)
        where.mkdir()
        done = train([*launcher, NOTED], where, size, "selector=mass", NOTED=str(where))
        assert len(losses(done, where)) == 8
        noted = [json.loads(line) for file in where.glob("*.jsonl") for line in file.read_text().splitlines()]
        picks.append({(call, name): index_K for call, name, index_K in noted})
        assert len(noted) == len(picks[-1]) == 60
        tokens.append(costs(where / "single" / "run"))
    assert picks[0] == picks[1]
    one, two = tokens
    # Of all processes; one alone feeds prompts this short twice, with the pool and with the picks.
    assert one["train_tokens"] == two["train_tokens"] < two["fed_tokens"] <= one["fed_tokens"]


@pytest.mark.slow
def test_sharded_weights_train_alike_and_go_on_from_a_checkpoint(one: tuple[list[float], Path], tmp_path: Path) -> None:
    """The first try dies after the second of four preference steps; the second one goes on from the checkpoint."""
    died = train(SHARDED, tmp_path, batch_size=8, DIE_AFTER_CHECKPOINT="1")
    assert died.returncode != 0 and not (tmp_path / "single" / "run" / "metrics.json").exists()
    again = train(SHARDED, tmp_path, batch_size=8)
    assert losses(again, tmp_path) == pytest.approx(one[0], abs=1e-4)
    assert "preference: continuing from step 2" in again.stdout and "sft" not in again.stdout
    assert json.loads((tmp_path / "single" / "run" / "metrics.json").read_text())["processes"] == 2
    check_policy(tmp_path / "single" / "run" / "policy", one[1])


def accelerator(**changes: Any) -> Any:
    """What `check_sharding` looks at."""
    settings = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "mixed_precision_policy": None} | changes
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings))
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)


@pytest.mark.parametrize("changes", [{"fsdp_version": 1}, {"cpu_ram_efficient_loading": True}])
def test_settings_that_a_sharded_run_cannot_use(changes: dict[str, Any]) -> None:
    launch.check_sharding(accelerator())
    with pytest.raises(UserError, match=f"set (fsdp_)?{next(iter(changes))}: "):
        launch.check_sharding(accelerator(**changes))


def test_sharded_log_probs_stay_in_float32() -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    found = accelerator(mixed_precision_policy=policy)
    launch.check_sharding(found)
    policy = found.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_sharding_that_would_not_happen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # Accelerate writes into it
    options = {"device": "cpu", "precision": "float32", "threads": None, "generate": False}
    with pytest.raises(UserError, match="only over several GPUs"):
        launch.start(OmegaConf.create({"trainer": options}))


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux notifies a process of its parent's end")
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [6, 12])
def test_workers_go_when_their_launcher_is_killed(tmp_path: Path, seconds: int) -> None:
    """At whatever moment: while they find each other, too."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = [f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "logger=none", "trainer.threads=1"]
    process = subprocess.Popen([*launcher, str(ROOT / "run.py"), *options], env=os.environ | {"PYTHONPATH": str(ROOT)})
    time.sleep(seconds)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists() and running(pid)]) and (
        time.monotonic() < end
    ):
        time.sleep(0.5)
    for pid in alive:
        os.kill(int(pid), signal.SIGKILL)
    assert workers and not alive


def running(pid: str) -> bool:
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


LIMIT = 7  # seconds that a collective waits for its mates; the main process looks for its lock every 5


def in_turn(rank: int, root: Path) -> None:
    """A process of two: it waits for another job's lock, and then for its own mate's."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    told = os.open(root / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 2)
    meeting, limit = f"file://{root / 'meeting'}", datetime.timedelta(seconds=LIMIT)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    accelerator, cache = Accelerator(cpu=True), Cache(root)
    with alone(accelerator, lambda meanwhile: cache.lock("theirs", "key", meanwhile)):
        (root / f"had it {rank}").touch()
    cache.folder("ours", "key", lambda folder: time.sleep(3))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_wait_for_another_jobs_lock_longer_than_a_collective_does(tmp_path: Path) -> None:
    with Cache(tmp_path).lock("theirs", "key"):
        mates = [CONTEXT.Process(target=in_turn, args=(rank, tmp_path)) for rank in range(2)]
        for mate in mates:
            mate.start()
        begin = time.monotonic()
        while not (tmp_path / "told").exists() or not (tmp_path / "told").read_text():
            assert time.monotonic() - begin < 60
            time.sleep(0.1)
        time.sleep(LIMIT + 3)
        assert all(mate.is_alive() for mate in mates) and not list(tmp_path.glob("had it*"))
    for mate in mates:
        mate.join(60)
    assert [mate.exitcode for mate in mates] == [0, 0], (tmp_path / "told").read_text()
    assert (tmp_path / "told").read_text().count("another job is computing") == 1  # not each other: they are one job
