"""What a stage reports as it goes: its history file, and the tracker that also receives step metrics."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from massdpo import store
from massdpo.console import Rows

Number = int | float


class History:
    """`history.csv`: one row per logged step, each a dict of numbers; columns in order of first appearance.

    The file is written whole, at most every `write_every` seconds while rows are added and by `write()`.
    """

    def __init__(self, path: Path, write_every: float = 10.0):
        self.path = path
        self.rows: list[dict[str, Number]] = []
        self.write_every = write_every
        self._written = time.monotonic()

    def append(self, row: Mapping[str, Number]) -> None:
        self.rows.append(dict(row))
        if time.monotonic() - self._written > self.write_every:
            self.write()

    def write(self) -> None:
        columns = dict.fromkeys(name for row in self.rows for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        store.write_text(self.path, text.getvalue())
        self._written = time.monotonic()


class Tracker(Protocol):
    """Where step metrics go besides `history.csv`. No method raises or waits; `finish` waits a bounded time."""

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None: ...

    def log(self, step: int, metrics: Mapping[str, Number]) -> None: ...

    def table(self, name: str, rows: Rows) -> None: ...

    def finish(self, metrics: Mapping[str, Any] | None = None, files: Sequence[Path] = ()) -> str | None:
        """End the run with its final metrics (None: it failed) and result files, kept as an artifact.

        Returns the command that uploads what was recorded offline, where there is one.
        """
        ...


def step_means(values: dict[str, list[Tensor]], norm: Tensor, accelerator: Accelerator) -> dict[str, float]:
    """Means over a step's prompts, of all processes, and the gradient's norm: the one wait for the device.

    NaN stands for a value that a prompt does not have.
    """
    names = sorted(values)
    joined = [torch.cat(values[name]) for name in names]
    total_n2 = torch.stack([torch.stack([value.nansum(), (~value.isnan()).sum().float()]) for value in joined])
    total_n2 = accelerator.reduce(total_n2, "sum")
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of sharded weights
    *sums, gradient_norm = torch.cat([total_n2.flatten(), norm.reshape(1).to(total_n2)]).tolist()
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count} | {"gradient_norm": gradient_norm}
