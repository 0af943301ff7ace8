"""Whatever stands on the command line or in a config: it is taken, or refused in one line."""

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from massdpo.config import RULES, compose, validate
from massdpo.errors import UserError
from tests.conftest import ROOT
from tests.test_fuzz_data import limits

GROUPS = ("dataset", "model", "selector", "loss", "method", "trainer", "logger")
OPTIONS = {group: [file.stem for file in sorted((ROOT / "conf" / group).glob("*.yaml"))] for group in GROUPS}
WORDS = [
    "null",
    "true",
    "-1",
    "0",
    "1e400",
    "nan",
    "own",
    "''",
    "[]",
    "{}",
    "[1,{a:2}]",
    "a/b",
    "..",
    "${k}",
    "${",
    "???",
    "é",
    "1_0",
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9).filter(lambda text: "$" not in text),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text("abk_.", max_size=5), inside, max_size=3),
    max_leaves=5,
)


def keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a config, branches too."""
    found = []
    for name in node:
        found.append(f"{prefix}{name}")
        if OmegaConf.is_dict(node._get_node(name)):
            found += keys(node[name], f"{prefix}{name}.")
    return found


@cache
def composed(every: bool) -> list[DictConfig]:
    """The default, and the last option of every group, or all of them."""
    needed = {name: ["dataset.path=a"] for name in ("mcqa", "jsonl", "preferences")}
    needed |= {"sequences": ["dataset.raw_dir=a"]}
    needed |= {"dpo": ["k=1"], "is_pl": ["selector=random"], "gpu": ["trainer.device=cpu"]}
    pairs = [(group, option) for group, options in OPTIONS.items() for option in (options if every else options[-1:])]
    return [compose(), *(compose([f"{group}={option}", *needed.get(option, [])]) for group, option in pairs)]


def refused_or_taken(config: DictConfig) -> None:
    try:
        validate(config)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


def any_value_at_any_key(seed: int, value: Any, every: bool) -> None:
    chance = random.Random(seed)
    config = chance.choice(composed(every)).copy()
    OmegaConf.set_struct(config, False)
    key = chance.choice(keys(config))
    if chance.random() < 0.2:
        key += chance.choice(["_", ".x", "s"])
    if key.endswith("_target_"):
        return  # names a class that is imported: whoever writes the config chooses what is run
    *above, last = key.split(".")
    holder: Any = config
    for name in above:
        holder = holder[name]
    if not OmegaConf.is_dict(holder):
        return  # nothing can stand below a value
    if chance.random() < 0.1:
        holder.pop(last, None)
    else:
        holder[last] = value
    refused_or_taken(config)


def any_command(seed: int) -> None:
    chance = random.Random(seed)
    arguments = []
    for _ in range(chance.randint(1, 3)):
        kind = chance.choice(("group", "option", "misspelt", "value", "noise"))
        group = chance.choice(GROUPS)
        key = chance.choice(keys(composed(False)[0]))
        word = chance.choice(WORDS)
        if kind == "group":
            arguments.append(f"{group}={chance.choice(OPTIONS[group])}")
        elif kind == "option":
            arguments.append(f"{chance.choice(['', '+', '++', '~'])}{key}={word}")
        elif kind == "misspelt":
            place = chance.randrange(len(key))
            arguments.append(f"{key[:place]}{chance.choice('aex._')}{key[place:]}={word}")
        elif kind == "value":
            arguments.append(f"{chance.choice(list(RULES))}={word}{chance.choice(WORDS)}")
        else:
            arguments.append("".join(chance.choice("abk=.~+[]{}$'\"\\,: \t#@%é") for _ in range(chance.randrange(12))))
    if any("_target_" in argument for argument in arguments):
        return
    try:
        config = compose(arguments)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        refused_or_taken(config)


@limits(150)
@given(seed=st.integers(0, 2**32), value=values)
def test_any_value_at_any_key(seed: int, value: Any) -> None:
    any_value_at_any_key(seed, value, every=False)


@limits(60)
@given(seed=st.integers(0, 2**32))
def test_any_command(seed: int) -> None:
    any_command(seed)


@pytest.mark.slow
@limits(1500)
@given(seed=st.integers(0, 2**32), value=values)
def test_many_values_at_many_keys(seed: int, value: Any) -> None:
    any_value_at_any_key(seed, value, every=True)


@pytest.mark.slow
@limits(600)
@given(seed=st.integers(0, 2**32))
def test_many_commands(seed: int) -> None:
    any_command(seed)
