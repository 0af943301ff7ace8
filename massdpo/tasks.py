"""What a task other than training does. Each takes the whole config and writes where `out` says."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from massdpo import experiment
from massdpo.data.inspect import inspect as inspect_data
from massdpo.store import Cache


def inspect(config: DictConfig) -> None:
    """Print what will be trained on; with `split` and `out`, write every prepared example of a split as JSON lines."""
    experiment.start(config)
    data, _ = experiment.load(config, Cache(Path(config.cache_dir).expanduser()))
    out = Path(config.out) if config.out else None
    sys.stdout.write(inspect_data(data.splits, data.tokenizer, config.split or "train", out) + "\n")
