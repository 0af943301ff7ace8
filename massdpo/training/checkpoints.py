"""Checkpoints of a stage: folders that appear whole; a run stopped at any moment continues from the newest one."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from massdpo.store import build_folder, is_whole, remove_unfinished, set_aside, writing

NUMBERED = re.compile(r"\d+-\d+")  # the name of a checkpoint: epoch and step


@dataclass
class Position:
    """How far a stage is: what a checkpoint holds besides weights and optimiser."""

    epoch: int = 0
    batch: int = 0  # optimiser steps done in this epoch; if all, only its validation is left
    step: int = 0
    fed_tokens: int = 0  # through the model, by all processes
    learned_tokens: int = 0  # those among them that have gradients
    train_seconds: float = 0.0  # steps, selection included, without what only the log needs
    select_seconds: float = 0.0
    best: float = -math.inf  # of `keep_metric` on the validation split
    without_gain: int = 0  # epochs since then
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)  # of the policy that is kept


def save(checkpoints: Path, position: Position, state: dict[str, Tensor], accelerator: Accelerator, last: bool) -> None:
    """Write the newest checkpoint, then drop older ones: once there is one, there is a whole one at every moment.

    After the `last` step no optimiser is needed any more.
    """
    place = checkpoints / f"{position.epoch:04d}-{position.step:08d}"
    write(place, position, state, accelerator, weights_alone=last)
    if accelerator.is_main_process:
        for old in _all(checkpoints)[:-1]:
            shutil.rmtree(old)


def write(
    place: Path, position: Position, state: dict[str, Tensor], accelerator: Accelerator, weights_alone: bool
) -> None:
    """One checkpoint, written by the main process with what the others hold."""

    def build(folder: Path) -> None:
        _save_state(accelerator, folder, weights_alone)
        (folder / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
        if state:
            save_file(state, folder / "objective.safetensors")

    if accelerator.is_main_process:
        with writing(place.parent, "free some room; the same command then continues from the last checkpoint"):
            build_folder(place, build)
    else:
        _save_state(accelerator, None, weights_alone)
    accelerator.wait_for_everyone()


def _save_state(accelerator: Accelerator, folder: Path | None, weights_alone: bool) -> None:
    """Every process takes part, as weights may be sharded; the main one chooses the folder."""
    (place,) = broadcast_object_list([str(folder)])
    hook = accelerator.register_save_state_pre_hook(_trained_alone)
    with _without_optimizer_if(accelerator, weights_alone):
        accelerator.save_state(place)
    hook.remove()
    accelerator.wait_for_everyone()


def _trained_alone(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Frozen weights need not be saved: a stage that continues has them. FSDP passes none here, and writes all."""
    for model, state in zip(models, weights, strict=False):
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        for name in state.keys() - trained:
            del state[name]


@contextmanager
def _without_optimizer_if(accelerator: Accelerator, weights_alone: bool) -> Iterator[None]:
    """Accelerate saves and loads all that it prepared, the optimiser too, which is twice the size of its weights."""
    optimizers = accelerator._optimizers
    accelerator._optimizers = [] if weights_alone else optimizers
    try:
        yield
    finally:
        accelerator._optimizers = optimizers


def load(place: Path, accelerator: Accelerator, weights_alone: bool) -> None:
    with _without_optimizer_if(accelerator, weights_alone):
        accelerator.load_state(str(place), strict=False)  # frozen weights are not in it


def resume(
    checkpoints: Path, state: dict[str, Tensor], keep: str, accelerator: Accelerator, schedule: LambdaLR, total: int
) -> Position:
    """Load the newest whole checkpoint, if any; damaged checkpoints are reported, moved aside and ignored."""
    if accelerator.is_main_process:
        _keep_newest(checkpoints, keep)
    accelerator.wait_for_everyone()
    if not (places := _all(checkpoints)):
        return Position()
    (place,) = places
    position = _position(place)
    load(place, accelerator, weights_alone=position.step == total)
    if state:
        state.update(load_file(place / "objective.safetensors"))
    rates = [group["lr"] for group in schedule.optimizer.param_groups]  # they came back with the optimizer
    schedule.last_epoch, schedule._last_lr = position.step, rates  # step() here would warn of a wrong order
    return position


def _keep_newest(checkpoints: Path, keep: str) -> None:
    """Leave only the newest whole checkpoint, and none where the best policy so far, which it needs, is damaged."""
    remove_unfinished(checkpoints)
    places = _all(checkpoints)
    while places and not is_whole(places[-1]):
        set_aside(places.pop())
    for old in places[:-1]:  # the process ended while they were being removed
        shutil.rmtree(old)
    best = checkpoints / "best"
    if places and keep == "best" and _position(places[-1]).best > -math.inf and not is_whole(best):
        set_aside(best if best.exists() else places[-1])
        shutil.rmtree(places[-1], ignore_errors=True)


def _position(place: Path) -> Position:
    return Position(**json.loads((place / "position.json").read_text(encoding="utf-8")))


def _all(checkpoints: Path) -> list[Path]:
    """The numbered checkpoints, oldest first."""
    return sorted(place for place in checkpoints.glob("*") if NUMBERED.fullmatch(place.name))
