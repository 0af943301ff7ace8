"""What the loop works on: a stage, and what it asks of the stage's objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from massdpo.data.tokens import TokenizedExample
from massdpo.tensors import Batch


class Objective(Protocol):
    """What a stage learns. Values per prompt are `(B,)`."""

    rows: Sequence[TokenizedExample]
    state: dict[str, Tensor]  # what a checkpoint must remember of it
    seconds: dict[str, float]  # spent so far on selection ("select") and on what only the log needs ("observe")

    def begin_epoch(self, scorer: nn.Module, epoch: int, observe_every: int) -> dict[str, float]:
        """Prepare an epoch; returns values to be logged, costly ones from every `observe_every`-th batch only."""
        return {}

    def loss(self, scorer: nn.Module, batch: Batch, epoch: int, observe: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each prompt, and its values to be logged; `observe` asks for those that cost an extra pass."""
        ...

    def share(self) -> None:
        """Make the state of all processes the same."""
        return

    def validate(self, scorer: nn.Module) -> dict[str, float]:
        """Metrics on the validation split."""
        ...

    def alarms(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Warnings about a step's mean values, by kind."""
        return {}


@dataclass
class Stage:
    """One training stage: what it learns, how long, and where its checkpoints lie."""

    name: str  # sft | preference
    objective: Objective
    epochs: int
    learning_rate: float
    checkpoints: Path
    seed: int
    pad_id: int
