"""Which options there are: the files of each group in conf/, and every key in them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from massdpo.config.rules import PARTS, RULES


def root() -> Path:
    """The folder with conf/ and sweeps/: the checkout, or the installed package."""
    package = Path(__file__).resolve().parents[1]
    return package.parent if (package.parent / "conf" / "config.yaml").is_file() else package


def on_search_path() -> None:
    """Set the variables with which conf/config.yaml puts sweeps/ and the user's own conf/ on Hydra's search path."""
    here = Path.cwd() / "conf"
    os.environ["MASSDPO_ROOT"] = str(root())
    os.environ["MASSDPO_CONF"] = str(here if here.is_dir() else root() / "conf")


def options_of(group: str) -> list[str]:
    """The options of a group: files in conf/, the package's or the working folder's, or beside it (sweeps/).

    Those of a setting lie in folders: `small/qasc`.
    """
    folders = [place / group for place in {root() / "conf", Path.cwd() / "conf", root()}]
    files = {file.relative_to(folder) for folder in folders for file in folder.rglob("*.yaml")}
    return sorted(file.with_suffix("").as_posix() for file in files)


def read_option(group: str, name: str) -> DictConfig:
    """The contents of an option's file."""
    places = [folder / group / f"{name}.yaml" for folder in (Path.cwd() / "conf", root() / "conf")]
    node = OmegaConf.load(next(file for file in places if file.is_file()))
    assert isinstance(node, DictConfig)
    return node


def known_keys() -> list[str]:
    """Every dotted key and group in conf/."""
    keys = dict.fromkeys([*RULES, *PARTS, "trainer", "method", "setting", "sweeps"])
    for file in sorted((root() / "conf").glob("*/*.yaml")):
        if file.parent.name in (*PARTS, "trainer"):
            node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            node.pop("defaults", None)
            keys |= dict.fromkeys(key for key, _ in leaves({file.parent.name: node}) if not key.endswith("_"))
    return list(keys)


def options_with(key: str) -> list[str]:
    """The options of a dotted key's group that have the key."""
    group = key.split(".")[0]
    files = {name: root() / "conf" / group / f"{name}.yaml" for name in options_of(group)}
    nodes = {name: yaml.safe_load(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    return [name for name, node in nodes.items() if key in dict(leaves({group: node}))]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; an empty mapping counts as a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def node_of(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that a dotted key is in (an empty one, where there is none), and the key's last part."""
    *above, last = key.split(".")
    for name in above:
        inside = values.get(name)
        values = inside if isinstance(inside, dict) else {}
    return values, last
