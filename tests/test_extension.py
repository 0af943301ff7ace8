"""Adding to the project stays easy: a selector, a loss, a dataset in a new format, a metric and a model family.

Each takes the files that docs/selector.md says, in a checkout of its own, and the project's own checks pass there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = {
    # A selector: a class and its option.
    "my_selectors.py": """
from massdpo.selection import take_best
from massdpo.tensors import Picks, PoolStatistics


class Longest:
    features = None
    needs_scores = False

    def __init__(self, k: int, short_pool: str = "error"):
        self.k, self.short_pool = k, short_pool

    def __call__(self, pool: PoolStatistics) -> Picks:
        return take_best(pool, pool.scores.length_BC[:, 1:], self.k, self.short_pool)
""",
    "conf/selector/longest.yaml": """
# The k longest negatives.
_target_: my_selectors.Longest
k: ${k} # negatives per prompt
short_pool: error # where a pool has fewer than k: error | all
""",
    # A loss: a function of rewards and its option.
    "my_losses.py": """
def hinge(rewards_BC, mean_logp_BC, mask_BC):
    worst_B = rewards_BC[:, 1:].masked_fill(~mask_BC[:, 1:], float("-inf")).amax(-1)
    return (1 - rewards_BC[:, 0] + worst_B).clamp(min=0)
""",
    "conf/loss/hinge.yaml": """
# A hinge on the hardest of the picks.
_target_: my_losses.hinge
_partial_: true # the function itself is what training calls
""",
    # A dataset in a format of its own: a class with files() and load(), and its option.
    "my_datasets.py": """
from pathlib import Path

from massdpo.data.schema import PreferenceExample, Splits


class Pipes:
    def __init__(self, path: str):
        self.path = Path(path)

    def files(self) -> list[Path]:
        return [self.path]

    def load(self) -> Splits:
        found = {"train": [], "val": [], "test": []}
        for number, line in enumerate(self.path.read_text().splitlines()):
            split, prompt, *responses = line.split("|")
            slate = tuple(responses)
            found[split].append(PreferenceExample(f"{split}/{number}", prompt, slate[0], slate[1:], slate))
        return Splits(**found)
""",
    "conf/dataset/pipes.yaml": """
# Lines of a split, a prompt, the chosen response and the others, with | between them.
_target_: my_datasets.Pipes
name: pipes
path: animals.txt # the file
""",
    # A model family: one option.
    "conf/model/tiny_olmo2.yaml": """
# OLMo 2 in miniature.
_target_: massdpo.model.scratch.TinyModel
vocab_size: 300 # tokens
config: # of the family
  model_type: olmo2 # the family
  hidden_size: 32 # width
  intermediate_size: 32 # width of the feed-forward layers
  num_hidden_layers: 1 # depth
  num_attention_heads: 2 # per layer
  num_key_value_heads: 2 # per layer
  max_position_embeddings: 1024 # tokens
""",
    "animals.txt": "".join(
        f"{split}|What says sound {number}?|" + "|".join(f"animal {number + step}" for step in range(4)) + "\n"
        for split, count in (("train", 12), ("val", 4), ("test", 4))
        for number in range(count)
    ),
}
METRIC = 'Metric("recall@2", "recall@2", f"{RANKED} is among the first 2", of_rank=partial(_recall, 2)),'


@pytest.mark.slow
def test_each_kind_of_part_is_added_by_its_files_alone(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.rstrip("\0").split("\0"):
        if not name.startswith("results/") and (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    for name, text in FILES.items():
        (checkout / name).write_text(text.lstrip("\n"))
    metrics = checkout / "massdpo" / "evaluation" / "metrics.py"
    entry = '    Metric("mrr", "MRR"'
    assert entry in metrics.read_text()
    metrics.write_text(metrics.read_text().replace(entry, f"    {METRIC}\n{entry}"))

    where = {"PYTHONPATH": str(checkout), "MASSDPO_CACHE": str(tmp_path / "cache")}
    parts = ["selector=longest", "loss=hinge", "dataset=pipes", "model=tiny_olmo2", "k=2"]
    small = ["trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.threads=1", "logger=none", "name=added"]
    done = _run(["run.py", *parts, *small, "trainer.keep_metric=recall@2"], checkout, where)
    assert done.returncode == 0, done.stderr
    found = json.loads((checkout / "results" / "runs" / "single" / "added" / "metrics.json").read_text())
    assert found["accuracy"] <= found["recall@2"] <= found["recall@3"] and "val/recall@2" in found

    own = ["tests/test_config.py", "tests/test_readme.py", "tests/test_selectors.py", "tests/test_metrics.py"]
    checks = ["-m", "pytest", "-q", "-x", "-n", "0", "-m", "not slow", "-k", "option or every or table or metric", *own]
    done = _run(checks, checkout, where)
    assert done.returncode == 0, done.stdout[-3000:]


def _run(arguments: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=500)
