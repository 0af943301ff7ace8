"""`task=show`: the table of a finished run, as the run printed it."""

from pathlib import Path

from omegaconf import DictConfig

from massdpo.errors import UserError
from massdpo.report.reading import read_metrics, reading
from massdpo.runs import shown


def show(config: DictConfig) -> None:
    """Print the table of the run in `in` again, from its files alone.

    Raises:
        UserError: there is no finished run, or its files cannot be read.
    """
    run = Path(config["in"]).expanduser()
    if not (run / "metrics.json").is_file():
        raise UserError(f"in={run} is not a finished run: give a folder with a metrics.json")
    metrics = read_metrics(run / "metrics.json")
    with reading(run / "predictions.jsonl"):
        shown.show(run, metrics, None)
