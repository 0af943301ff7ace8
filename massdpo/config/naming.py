"""What identifies a run, the name that follows from it, and its options as its folder keeps them."""

import hashlib
import json
import re
from typing import Any

from omegaconf import DictConfig

from massdpo.config.composition import plain
from massdpo.config.options import node_of
from massdpo.config.rules import PARTS
from massdpo.config.secrets import without_secrets

# Options that cannot change what a run computes; contents (weights, data) have digests of their own.
NOT_IDENTITY = (
    *("sweep", "name", "runs_dir", "cache_dir", "data_dir", "force", "debug", "verbosity", "logger"),
    *("id", "policy", "out", "size"),
    *("choices", "trainer.workers", "trainer.checkpoint_every", "dataset.name", "dataset.terms"),
    *("dataset.raw_dir", "dataset.path", "dataset.val_path", "dataset.test_path"),
)

# Options added after the first runs, each with the value that keeps the old behaviour, and so the old names.
ADDED = {
    **{"trainer.generate": False, "trainer.picks": "last", "trainer.patience": None, "selector.screen": None},
    **{"trainer.adapter.quantize": None, "dataset.long_rows": "error"},
}

EXPECTED = "expected.json"  # in a sweep's folder: name -> {"job", "command", "config"} of every run that it should have


def identity(config: DictConfig) -> dict[str, Any]:
    """The resolved options that can change what a run computes or writes, as plain values for json."""
    values = plain(config)
    for key in NOT_IDENTITY:
        node, last = node_of(values, key)
        node.pop(last, None)
    for part in PARTS:  # our own classes count by name: their files may move
        if part in values and str(values[part]["_target_"]).startswith("massdpo."):
            values[part]["_target_"] = values[part]["_target_"].rpartition(".")[2]
    for key, neutral in ADDED.items():
        node, last = node_of(values, key)
        if node.get(last, neutral) == neutral:
            node.pop(last, None)
    return values


def run_name(config: DictConfig) -> str:
    """A folder name: `<dataset>-<model>-<selector>-<loss>-k<k>-b<beta>-s<seed>-<hash of the identity>`."""
    values, choices = plain(config), plain(config)["choices"]
    key = json.dumps([identity(config)], sort_keys=True)
    parts = [choices[group] for group in ("dataset", "model", "selector", "loss")]
    parts += [f"k{values['k']}", f"b{values['beta']:g}", f"s{values['seed']}"]
    name = "-".join([*parts, hashlib.blake2b(key.encode(), digest_size=4).hexdigest()])
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def resolved(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration for `config.yaml`, without the secrets in keys, addresses and values."""
    cleaned = without_secrets(plain(config))
    assert isinstance(cleaned, dict)
    return cleaned
