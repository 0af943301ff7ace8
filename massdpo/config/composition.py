"""From the files in conf/ and overrides to a configuration, outside a Hydra job; and from that to plain values.

Importing this registers the resolvers that conf/ and sweeps/ use.
"""

import typing
from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from massdpo.config.messages import explain
from massdpo.config.options import on_search_path, root
from massdpo.config.precision import fast_precision
from massdpo.config.rules import CHOICES
from massdpo.errors import UserError

# For conf/ and sweeps/: where raw files are below data_dir (null: fetched), the value for a size or a method, and the
# precision that a device is fast in.
OmegaConf.register_new_resolver(
    "within", lambda folder, name: None if folder is None else f"{folder}/{name}", replace=True
)
OmegaConf.register_new_resolver(
    "pick", lambda name, options: options["other" if name not in options and "other" in options else name], replace=True
)
OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that `python run.py OVERRIDES` runs with, for tests and notebooks.

    Raises:
        UserError: an unknown key or option, or an override that cannot be read.
    """
    on_search_path()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
            config = hydra_compose("config", list(overrides), return_hydra_config=True)
    # The last two: a group whose option is not a name.
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(explain(error)) from error
    return as_composed(config)


def as_composed(config: DictConfig) -> DictConfig:
    """A config as a job sees it, resolved, from one with Hydra's own node as Hydra composes it outside a job.

    Raises:
        UserError: a reference leads nowhere.
    """
    choices = config.hydra.runtime.choices
    OmegaConf.set_struct(config, False)
    config.choices = {group: choices.get(group) for group in CHOICES}
    config.pop("hydra")
    try:
        whole_config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(whole_config, DictConfig)
    OmegaConf.set_struct(whole_config, True)
    return whole_config


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved options as plain values, without Hydra's own node; raises OmegaConf's errors."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    values.pop("hydra", None)
    return typing.cast(dict[str, Any], values)
