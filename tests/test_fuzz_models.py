"""Damaged and hostile model folders: a model that computes comes out, or one UserError of one line, within bounds."""

import json
import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from massdpo.config import compose
from massdpo.data.chat import settle_chat_template
from massdpo.data.prepare import prepare
from massdpo.data.schema import Splits
from massdpo.data.tokenize import tokenize_split
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitScorer
from massdpo.model.save import add_adapter, load_policy, save_policy
from massdpo.model.scoring import PreferenceScorer
from massdpo.model.scratch import TinyModel
from massdpo.runs import start
from massdpo.store import Cache
from tests.test_chat import TEMPLATES
from tests.test_fuzz_data import limits, mutated, restructured
from tests.test_models import ADAPTER, option

FAMILIES = ("llama", "gemma", "phi", "qwen")
GIGABYTES = 3  # beyond what the process has; a load that needs more fails
SECONDS = 20  # of one load, which takes a tenth of one


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def splits(home: Path) -> Splits:
    sizes = ["dataset.num_train=6", "dataset.num_val=2", "dataset.num_test=2"]
    return prepare(dict(compose(sizes).dataset), Cache(home / "cache"))


@pytest.fixture(scope="module")
def folders(home: Path, splits: Splits) -> list[Path]:
    """A small model of each family with a chat template, and an adapter with its base."""
    found = []
    for family in FAMILIES:
        model, tokenizer = TinyModel(option(f"tiny_{family}").options | {"num_hidden_layers": 1}, 300).load(
            [example.prompt for example in splits.train], 0, Cache(home)
        )
        tokenizer.chat_template = TEMPLATES["ChatML"][0]
        save_policy(model, tokenizer, home / family)
        found.append(home / family)
    save_policy(add_adapter(model, ADAPTER, 0), tokenizer, home / "adapter")
    return [*found, home / "adapter"]


@pytest.fixture
def bounded() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (GIGABYTES << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def used(folder: Path, splits: Splits, home: Path, chat: bool) -> None:
    """As a run uses it: loaded, texts tokenised, responses scored."""
    options = ["model=qwen3_0_6b", f"model.path={folder}", f"trainer.chat_template={str(chat).lower()}"]
    config = compose([*options, "trainer.max_length=128", f"cache_dir={home / 'other'}"])
    model: Any
    if "adapter" in str(sorted(folder.iterdir())):
        model, tokenizer = load_policy(folder)
        if chat:
            settle_chat_template(tokenizer)
        rows, pad = tokenize_split(splits.test, tokenizer, 128, chat), 0
    else:
        data, model = start.tokenized(config, splits, Cache(home / "other"))
        rows, pad = data.test, data.pad_id
    SplitScorer(Accelerator(cpu=True), 4, pad)(PreferenceScorer(model), rows, "test")


def survives(folder: Path, splits: Splits, home: Path, chat: bool) -> None:
    begin = time.monotonic()
    try:
        used(folder, splits, home, chat)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
        assert "allocate" not in str(error), "that was tried"
    assert time.monotonic() - begin < SECONDS


def damaged(folders: list[Path], splits: Splits, home: Path, tmp_path: Path, seed: int) -> None:
    """One file of one folder: bytes changed, or sound JSON or safetensors with other values, shapes and types."""
    chance = random.Random(seed)
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(chance.choice(folders), folder)
    file = chance.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    if chance.random() < 0.3:
        file.write_bytes(mutated(file.read_bytes(), seed))
    elif file.suffix == ".json":
        file.write_text(json.dumps(restructured(json.loads(file.read_text()), chance)))
    else:
        save_file(reshaped(load_file(file), chance), file, {"format": "pt"})
    survives(folder, splits, home, chance.random() < 0.3)


def reshaped(tensors: Any, chance: random.Random) -> Any:
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    kind = chance.choice(("gone", "renamed", "half", "flat", "integers", "nan"))
    if kind in ("gone", "renamed"):
        del tensors[name]
    if kind == "renamed":
        tensors[f"{name}.other"] = tensor
    elif kind == "half":
        tensors[name] = tensor[: len(tensor) // 2].contiguous()
    elif kind == "flat":
        tensors[name] = tensor.flatten()
    elif kind == "integers":
        tensors[name] = tensor.long()
    elif kind == "nan":
        tensors[name] = tensor * float("nan")
    return tensors


def test_whole_folders_are_used(folders: list[Path], splits: Splits, home: Path) -> None:
    for folder in folders:
        for chat in (False, True):
            used(folder, splits, home, chat)


@limits(30)
@given(seed=st.integers(0, 2**32))
def test_damaged_folders(
    folders: list[Path], splits: Splits, home: Path, tmp_path: Path, bounded: None, seed: int
) -> None:
    damaged(folders, splits, home, tmp_path, seed)


@pytest.mark.slow
@limits(300)
@given(seed=st.integers(0, 2**32))
def test_many_damaged_folders(
    folders: list[Path], splits: Splits, home: Path, tmp_path: Path, bounded: None, seed: int
) -> None:
    damaged(folders, splits, home, tmp_path, seed)
