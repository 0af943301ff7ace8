"""What decides a run's numbers, as keys: equal keys, equal numbers.

Decided by: the code (the package's modules that can change a number, the files of classes from outside it, and the
versions of the libraries that compute), the data as tokens, the start weights with their model's configuration, and
the options. Every key of a cache or run is made here, later ones from earlier ones: that of the SFT start, of the
reference, of the run.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from massdpo.config import identity
from massdpo.model.save import weights_digest
from massdpo.store import MANIFEST, digest, package_code, target_code

# Trainer options that come after the SFT start; of threads the number that is used counts, whoever chose it.
NOT_OF_THE_START = ("preference", "generate", "picks", "save_policy", "threads")
BY_CONTENT = ("dataset", "model")  # groups whose outcome has its own key
OF_OTHER_TASKS = ("task", "in", "split", "study")


def model_key(model: nn.Module) -> str:
    """Start weights, and the configuration that says what is computed with them."""
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    told = {"_name_or_path", "_commit_hash", "transformers_version"}  # where it came from, not what it computes
    return digest(weights_digest(model), {name: value for name, value in config.items() if name not in told})


def start_key(config: DictConfig, data_key: str, weights: str, accelerator: Accelerator, threads: int = 0) -> str:
    """The key of the SFT start: the same for every selector, loss, k and beta. `weights` is the `model_key`."""
    trainer = identity(config)["trainer"]
    options = {name: value for name, value in trainer.items() if name not in NOT_OF_THE_START}
    # A CPU's number of threads changes last digits: a start computed with another would change a repeated run.
    threads = (threads or torch.get_num_threads()) if accelerator.device.type == "cpu" else 0
    machine = accelerator.device.type, accelerator.num_processes, threads
    code = package_code(), target_code(_node(config.model)), _versions()
    return digest(code, data_key, weights, options, config.seed, machine)


def reference_key(config: DictConfig, start: Path) -> str:
    """The key of the reference log-probs: of the policy in the folder `start`, on the rows that are trained on."""
    files = json.loads((start / MANIFEST).read_text(encoding="utf-8"))
    files.pop("start.json", None)  # holds how long it took
    return digest(start.name, files, config.trainer.preference.limit, config.dataset.get("seed", 0))


def run_parts(config: DictConfig, data_key: str, weights: str, accelerator: Accelerator) -> dict[str, str]:
    """The run's key, part by part, so that a message can name those that differ; `weights` is the `model_key`."""
    options = {name: value for name, value in identity(config).items() if name not in (*BY_CONTENT, *OF_OTHER_TASKS)}
    return {
        "options": digest(options, config.dataset.get("seed", 0)),
        "code": digest(package_code(), target_code([_node(config[part]) for part in ("model", "selector", "loss")])),
        "libraries": _versions(),
        "data": data_key,
        "model": weights,
        "number of processes": str(accelerator.num_processes),
    }


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))


def _node(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)
