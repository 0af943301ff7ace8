"""What each `task` does, one file each."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from massdpo.config import validate
from massdpo.evaluation.metrics import check_keep_metric
from massdpo.runs import pipeline
from massdpo.runs.folder import note_failed
from massdpo.tasks.evaluate import evaluate
from massdpo.tasks.explain import explain
from massdpo.tasks.inspect import inspect
from massdpo.tasks.merge import merge
from massdpo.tasks.plan import plan
from massdpo.tasks.push import push
from massdpo.tasks.rank import rank
from massdpo.tasks.select import select
from massdpo.tasks.show import show
from massdpo.tasks.study import study


def run(config: DictConfig) -> Path | None:
    """Do what `task` says; returns the folder of a run, where it makes one.

    Raises:
        UserError: any mistake of the user's; nothing half-written is left where a result is expected.
    """
    try:
        validate(config)
        check_keep_metric(config.trainer.keep_metric)
        return TASKS[config.task](config)
    except Exception as error:
        if config.get("task") == "train" and config.get("runs_dir") and config.get("sweep"):
            note_failed(Path(config.runs_dir) / config.sweep, config, error)
        raise


TASKS: dict[str, Callable[[DictConfig], Path | None]] = {
    "train": pipeline.train,
    "plan": plan,
    "show": show,
    "explain": explain,
    "evaluate": evaluate,
    "select": select,
    "rank": rank,
    "merge": merge,
    "push": push,
    "inspect": inspect,
    "study": study,
}
