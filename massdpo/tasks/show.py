"""`task=show`: the table of a finished run, as it stood at its end."""

from pathlib import Path

from omegaconf import DictConfig

from massdpo.errors import UserError
from massdpo.report.reading import read_metrics, reading
from massdpo.runs import shown


def show(config: DictConfig) -> None:
    """Print the table of the run in `in` again, from its files alone.

    Raises:
        UserError: a folder without a finished run, or files that cannot be read.
    """
    run = Path(config["in"]).expanduser()
    if not (run / "metrics.json").is_file():
        raise UserError(f"in={run} is no finished run: name a folder that holds a metrics.json")
    metrics = read_metrics(run / "metrics.json")
    with reading(run / "predictions.jsonl"):
        shown.show(run, metrics, None)
