"""Two CPU processes train as one process with twice the batch does."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SMALL = (
    *("dataset.num_train=60", "dataset.num_val=16", "dataset.num_test=32", "selector=full", "logger=none"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.log_every=1", "name=run"),
)


def losses(launcher: list[str], where: Path, *overrides: str) -> list[float]:
    environment = os.environ | {"MASSDPO_CACHE": str(where / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "run.py"), *SMALL, f"runs_dir={where}", *overrides]
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with open(where / "single" / "run" / "history.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = losses([sys.executable], tmp_path / "one", "trainer.batch_size=16")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = losses(torchrun, tmp_path / "two", "trainer.batch_size=8")
    # 60 prompts: the last step has 12, an unequal share of a full batch. Sums in another order differ by about 1e-7.
    assert len(one) == 8
    assert two == pytest.approx(one, abs=1e-4)
    assert '"processes": 2' in (tmp_path / "two" / "single" / "run" / "metrics.json").read_text()
