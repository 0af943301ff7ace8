"""Which options there are: the files of each group in conf/, and every key in them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from massdpo.config.rules import PARTS, RULES


def root() -> Path:
    """The folder that conf/ and sweeps/ are in: the checkout, or the package as it is installed."""
    package = Path(__file__).resolve().parents[1]
    return package.parent if (package.parent / "conf" / "config.yaml").is_file() else package


def on_search_path() -> None:
    """Set the variables through which conf/config.yaml puts sweeps/ and a conf/ of one's own on Hydra's search path."""
    here = Path.cwd() / "conf"
    os.environ["MASSDPO_ROOT"] = str(root())
    os.environ["MASSDPO_CONF"] = str(here if here.is_dir() else root() / "conf")


def options_of(group: str) -> list[str]:
    """The options of a group: files in conf/, the package's and the working folder's, or beside it (sweeps/)."""
    places = {root() / "conf", Path.cwd() / "conf", root()}
    return sorted({file.stem for place in places for file in (place / group).glob("*.yaml")})


def read_option(group: str, name: str) -> DictConfig:
    """The file of an option, as it stands."""
    places = [folder / group / f"{name}.yaml" for folder in (Path.cwd() / "conf", root() / "conf")]
    node = OmegaConf.load(next(file for file in places if file.is_file()))
    assert isinstance(node, DictConfig)
    return node


def known_keys() -> list[str]:
    """Every dotted key and group that conf/ knows."""
    keys = dict.fromkeys([*RULES, *PARTS, "trainer", "method", "setting", "sweeps"])
    for file in sorted((root() / "conf").glob("*/*.yaml")):
        if file.parent.name in (*PARTS, "trainer"):
            node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            node.pop("defaults", None)
            keys |= dict.fromkeys(key for key, _ in leaves({file.parent.name: node}) if not key.endswith("_"))
    return list(keys)


def options_with(key: str) -> list[str]:
    """The options of a dotted key's group whose files have the key."""
    group = key.split(".")[0]
    files = {name: root() / "conf" / group / f"{name}.yaml" for name in options_of(group)}
    nodes = {name: yaml.safe_load(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    return [name for name, node in nodes.items() if key in dict(leaves({group: node}))]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
