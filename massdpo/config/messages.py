"""How mistakes are reported: in one line, with the nearest valid name."""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError

from massdpo.config.options import known_keys, options_of, options_with

OF_YOUR_OWN = {  # what a group takes besides its names
    "dataset": "; data of your own: dataset=preferences dataset.path=FILE",
    "model": "; any other: model=pretrained with model.path=DIR | FILE.gguf or model.hub_id=OWNER/NAME",
}

PLUGINS = {"optuna": "optuna", "submitit_slurm": "cluster", "submitit_local": "cluster"}  # and the extra they come with


def explain(error: Exception) -> str:
    """In one line, what Hydra or OmegaConf say in several: what is wrong, and the nearest right name."""
    said = str(error)
    if isinstance(error, MissingConfigException) and (found := re.search(r"Could not find '(\w+)/([^']*)'", said)):
        group, option = found.groups()
        if extra := PLUGINS.get(option.split("/")[-1] if group == "hydra" else ""):
            return f"{group}/{option} {comes_with(extra)}"
        names = options_of(group) if group != "hydra" else []  # most of its options are in Hydra and its plugins
        return f"unknown {group} '{option}'{nearest(option, names)}{OF_YOUR_OWN.get(group, '')}"
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", said):
        if elsewhere := options_with(found[1]):
            group = found[1].split(".")[0]
            public = (
                "; for a public one: data_dir=FOLDER or dataset.raw_dir=FOLDER" if found[1] == "dataset.path" else ""
            )
            return f"the {group} chosen has no '{found[1]}': {group}={' | '.join(elsewhere)} has{public}"
        return f"unknown key '{found[1]}'{nearest(found[1], known_keys())}"
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", said):
        return f"the key '{found[1]}' is there already: write {found[1]}=VALUE, without the +"
    if found := re.search(r"Multiple values for (\S+)\. ", said):
        return f"the group '{found[1]}' is there already: write {found[1]}=NAME, without the +"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", said):
        return f"'{found[1]}' has several values: add -m to run one after the other, or write a list as key=[a,b]"
    if isinstance(error, OverrideParseException):
        given = f" '{error.override}'" if getattr(error, "override", None) else ""
        lines = [line.strip(" ^") for line in said.split("\nSee https")[0].splitlines()]
        reason = next(line for line in [*reversed(lines), "it is not of that form"] if line)
        return f"cannot read the argument{given}: write KEY=VALUE, with quotes around special characters ({reason})"
    if found := re.search(r"Missing mandatory value: (\S+)", said):
        key = getattr(error, "full_key", None) or found[1]
        return f"the key '{key}' has no value: write {key}=VALUE"
    if isinstance(error, InterpolationKeyError) and (found := re.search(r"Interpolation key '([^']+)'", said)):
        if found[1] in known_keys():
            return f"the key '{found[1]}' is missing: it was removed or overwritten"
        return f"the reference ${{{found[1]}}} leads nowhere{nearest(found[1], known_keys())}"
    if said.startswith("Config group override must be"):
        return "a group needs the name of an option: write GROUP=NAME, as in selector=mass"
    if found := re.search(r"hydra:runtime\.choices\.(\w+)|runtime\.choices\.(\w+)", said):
        return f"the group '{found[1] or found[2]}' needs one option: write {found[1] or found[2]}=NAME"
    if found := re.search(r"Environment variable '(\w+)' not found", said):
        return f"the environment variable {found[1]} that the configuration refers to is not set"
    return " ".join(said.split())


def comes_with(extra: str) -> str:
    return f"comes with an extra: pip install '.[{extra}]' in a checkout of massdpo"


def nearest(word: str, names: Sequence[str]) -> str:
    """'; did you mean NAME?', or all names where none is near and there are few."""
    return near(word, names) or (f"; there are {', '.join(names)}" if 0 < len(names) <= 20 else "")


# What others call our options.
OTHER_WORDS = {"lr": "learning_rate", "gamma": "ridge", "lora": "adapter", "lora_alpha": "alpha"}


def near(word: Any, names: Sequence[str]) -> str:
    """'; did you mean NAME?' for a word near a name, or near the last part of a dotted one; else an empty text."""
    if not isinstance(word, str):
        return ""
    last = word.lower().split(".")[-1]
    last, last_parts = OTHER_WORDS.get(last, last), [name.lower().split(".")[-1] for name in names]
    if found := difflib.get_close_matches(last, last_parts, n=1, cutoff=0.6):
        alike = [name for name, part in zip(names, last_parts, strict=True) if part == found[0]]
        return f"; did you mean '{difflib.get_close_matches(word, alike, n=1, cutoff=0.0)[0]}'?"
    return ""


def shown(value: Any) -> str:
    """A value as a message quotes it, shortened where it is long."""
    said = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return said if len(said) <= 80 else said[:77] + "..."
