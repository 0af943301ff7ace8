"""Two worlds that differ in one thing: their runs have other keys where it can change a number, and the same otherwise.

Worlds are changed in place, with one cache: what was kept of the first is what the second must not believe.
"""

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from massdpo.config import compose
from massdpo.model.save import save_policy
from massdpo.model.scratch import TinyModel
from massdpo.runs import start
from massdpo.store import Cache
from tests.test_chat import TEMPLATES
from tests.test_files import SEPARATED, TABLES, TEXTS, in_container
from tests.test_fuzz_data import limits
from tests.test_provenance import SIZE
from tests.test_provenance import keys as keys_of

CONTAINERS = (*TEXTS, *SEPARATED, *TABLES, "folder", "card", "splits")
READ_AS = {"keyed.json": ["dataset.rows=mine"]}
OPTIONS = ("k=1", "beta=0.7", "seed=1", "selector.solver=swap", "trainer.sft.epochs=3", "trainer.max_length=100")
BY_THE_WAY = ("logger.mode=online", "force=true", "trainer.workers=1", "name=other", "sweep=other", "runs_dir=b")


@cache
def composed() -> DictConfig:
    own = ["dataset=preferences", "dataset.path=a", "model=qwen3_0_6b", "loss._target_=keyed_part.loss", "logger=wandb"]
    return compose([*own, "k=2", "trainer.max_length=128"])


class World:
    """Data of one's own, a model's folder, and a loss of one's own, in a folder."""

    def __init__(self, root: Path, container: str, chat: bool, seed: int):
        self.root, self.container, self.chat, self.chance = root, container, chat, random.Random(seed)
        self.rows = [(f"what is {n}?", [f"answer {n}", f"answer {n + 1}", f"other {n}"]) for n in range(15)]
        self.options: list[str] = []
        self.write_data()
        shutil.copytree(root / "downloaded", root / "model")
        (root / "keyed_part.py").write_text(
            "from keyed_helper import sign\n\n\ndef loss(rewards_BC, *_):\n    return sign\n"
        )
        (root / "keyed_helper.py").write_text("sign = 1\n")

    def write_data(self) -> None:
        plain = [{"prompt": prompt, "chosen": chosen, "rejected": others} for prompt, (chosen, *others) in self.rows]
        path = self.data
        if path.is_dir():
            shutil.rmtree(path)
        if self.container == "card":  # its name says nothing of the file
            path.mkdir()
            (path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: rows.txt\n---\n")
            (path / "rows.txt").write_text("".join(json.dumps(row) + "\n" for row in plain))
        elif self.container == "splits":
            path.mkdir()
            for place, name in enumerate(("train", "validation", "test")):
                lines = (json.dumps(row) + "\n" for row in plain[place::3])
                (path / f"{name}.jsonl").write_text("".join(lines))
        else:
            in_container(path, plain, self.rows)

    @property
    def data(self) -> Path:
        return self.root / "data" / self.container

    def keys(self) -> tuple[str, str]:
        """Of the SFT start and of the run."""
        config = copy.deepcopy(composed())
        given = [f"dataset.path={self.data}", f"model.path={self.root / 'model'}", f"trainer.chat_template={self.chat}"]
        for option in (*given, *READ_AS.get(self.container, []), *self.options):
            key, _, value = option.partition("=")
            OmegaConf.update(config, key, yaml.safe_load(value))
        data, _ = start.load(config, Cache(self.root / "cache"))
        return keys_of(config, data.key, data.model_key)

    # what can change a number

    def a_text(self) -> None:
        row = self.chance.randrange(15)
        self.rows[row][1][self.chance.randrange(3)] += "!"
        self.write_data()

    def the_order(self) -> None:
        self.rows.reverse()
        self.write_data()

    def a_weight(self) -> None:
        file = self.root / "model" / "model.safetensors"
        tensors = load_file(file)
        tensor = tensors[self.chance.choice(sorted(tensors))]
        tensor.view(-1)[self.chance.randrange(tensor.numel())] += 1e-3
        save_file(tensors, file, {"format": "pt"})

    def the_architecture(self) -> None:
        file = self.root / "model" / "config.json"
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}
        change = self.chance.choice([{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}, rope])
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    def the_vocabulary(self) -> None:
        file = self.root / "model" / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["w"] = vocabulary["w"], vocabulary["a"]
        file.write_text(json.dumps(tokenizer))

    def the_template(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.root / "model")
        tokenizer.chat_template = TEMPLATES["Phi-3"][0]
        tokenizer.save_pretrained(self.root / "model")

    def own_code(self) -> None:
        file = self.root / self.chance.choice(["keyed_part.py", "keyed_helper.py"])
        file.write_text(file.read_text().replace("return sign", "return -sign").replace("= 1", "= -1"))

    def an_option(self) -> None:
        self.options.append(self.chance.choice(OPTIONS))

    # what cannot

    def comments(self) -> None:
        for name in ("keyed_part.py", "keyed_helper.py"):
            (self.root / name).write_text(f'"""What it is for."""\n\n{(self.root / name).read_text()}  # a comment\n')

    def times(self) -> None:
        for file in (self.root / "model", self.root / "data"):
            for path in file.rglob("*"):
                os.utime(path, (1, 1))

    def the_models_card(self) -> None:
        (self.root / "model" / "README.md").write_text("# Mended\n")

    def the_models_place(self) -> None:
        (self.root / "model").rename(self.root / "moved")
        (self.root / "model").symlink_to(self.root / "moved")

    def nothing(self) -> None:
        pass

    def by_the_way(self) -> None:
        self.options.append(self.chance.choice(BY_THE_WAY))


COUNT = (
    "a_text",
    "the_order",
    "a_weight",
    "the_architecture",
    "the_vocabulary",
    "the_template",
    "own_code",
    "an_option",
)
OF_THE_RUN = ("own_code", "an_option")  # the SFT start may stay
DO_NOT = ("comments", "times", "the_models_card", "the_models_place", "nothing", "by_the_way")


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("downloaded")
    model, tokenizer = TinyModel({"model_type": "llama", **SIZE}, 300).load(["what answer other"], 0, Cache(home))
    tokenizer.chat_template = TEMPLATES["ChatML"][0]
    save_policy(model, tokenizer, home / "model")
    return home / "model"


@pytest.fixture
def in_world(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    root = tmp_path / "world"
    monkeypatch.syspath_prepend(root)

    def make(*given: Any) -> World:
        shutil.rmtree(root, ignore_errors=True)
        (root / "data").mkdir(parents=True)
        (root / "downloaded").symlink_to(downloaded)
        for name in ("keyed_part", "keyed_helper"):
            sys.modules.pop(name, None)
        return World(root, *given)

    yield make


def differ_where_they_must(make: Callable[..., World], container: str, chat: bool, change: str, seed: int) -> None:
    world = make(container, chat, seed)
    first_start, first_run = world.keys()
    getattr(world, change)()
    second_start, second_run = world.keys()
    decides = change in COUNT and (chat or change != "the_template")
    assert (second_run != first_run) is decides
    if change not in OF_THE_RUN:
        assert (second_start != first_start) is decides


worlds = given(
    container=st.sampled_from(CONTAINERS),
    chat=st.booleans(),
    change=st.sampled_from(COUNT + DO_NOT),
    seed=st.integers(0, 2**32),
)


@limits(25)
@worlds
def test_keys_differ_where_numbers_can(
    in_world: Callable[..., World], container: str, chat: bool, change: str, seed: int
) -> None:
    differ_where_they_must(in_world, container, chat, change, seed)


@pytest.mark.slow
@limits(150)
@worlds
def test_keys_of_many_worlds(
    in_world: Callable[..., World], container: str, chat: bool, change: str, seed: int
) -> None:
    differ_where_they_must(in_world, container, chat, change, seed)
