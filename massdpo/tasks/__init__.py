"""What each `task` does: `massdpo.tasks.NAME` has a function of the same name. `train` is `massdpo.runs.pipeline`."""

from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig

from massdpo.config import validate
from massdpo.evaluation.metrics import check_keep_metric
from massdpo.runs import pipeline
from massdpo.runs.folder import note_failed


def run(config: DictConfig) -> Path | None:
    """Do what `task` says; returns the folder of a run, if it makes one.

    Raises:
        UserError: any mistake of the user's; nothing half-written is left where a result is expected.
    """
    try:
        validate(config)
        check_keep_metric(config.trainer.keep_metric)
        if config.task == "train":
            return pipeline.train(config)
        getattr(import_module(f"massdpo.tasks.{config.task}"), config.task)(config)
        return None
    except Exception as error:
        if config.get("task") == "train" and config.get("runs_dir") and config.get("sweep"):
            note_failed(Path(config.runs_dir) / config.sweep, config, error)
        raise
