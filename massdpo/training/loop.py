"""One loop trains both stages: batches, loss, backward, step, log, validate, checkpoint.

What a stage is (its loss) comes from massdpo/training/objectives.py. A checkpoint is a folder that appears whole; a
stage that was stopped at any moment goes on from the newest one and ends with the same numbers. Order of the data is
keyed by (seed, stage, epoch), and no dropout is used, so that weights, optimiser and position are all there is to
remember.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from massdpo.console import progress
from massdpo.data.batches import batches, in_order, micro_batches, real
from massdpo.data.tokens import TokenizedExample
from massdpo.errors import UserError
from massdpo.evaluation.scores import Validate
from massdpo.tensors import Batch
from massdpo.training import checkpoints
from massdpo.training.checkpoints import Position
from massdpo.training.history import History, Tracker

# (scorer, batch, epoch, is this step logged) -> loss of each prompt (B,), and per-prompt values (B,) to be logged
Objective = Callable[[nn.Module, Batch, int, bool], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Stage:
    """One training stage: what it learns from, how long, and where its checkpoints lie."""

    name: str  # sft | preference
    rows: Sequence[TokenizedExample]
    epochs: int
    learning_rate: float
    objective: Objective
    validate: Validate
    checkpoints: Path
    seed: int
    pad_id: int
    begin_epoch: Callable[[nn.Module, int], dict[str, float]] = lambda scorer, epoch: {}  # returns what is logged of it
    state: dict[str, Tensor] = field(default_factory=dict)  # what the objective must remember
    share: Callable[[], None] = lambda: None  # makes the state of all processes the same
    seconds: dict[str, float] = field(default_factory=lambda: {"select": 0.0, "observe": 0.0})  # the objective counts
    alarms: Callable[[dict[str, Any]], dict[str, str]] = lambda row: {}  # what to warn of in a step's values, by kind


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; a checkpoint has been written."""


def fit(
    stage: Stage,
    scorer: nn.Module,
    options: DictConfig,
    accelerator: Accelerator,
    history: History,
    tracker: Tracker,
) -> tuple[nn.Module, Position]:
    """Train `scorer` (prepared here) on a stage, from its newest checkpoint where there is one.

    Raises:
        UserError: a loss or gradient that is not finite (the last checkpoint stays good).
        Stopped: a signal asked for an end.
    """
    optimizer = torch.optim.AdamW(
        (weight for weight in scorer.parameters() if weight.requires_grad),
        lr=stage.learning_rate,
        weight_decay=options.weight_decay,
        fused=True,  # the plain loop over tensors costs a tiny model more than its backward pass
    )
    prompts_a_step = options.batch_size * options.accumulate * accelerator.num_processes
    steps_an_epoch = -(-len(stage.rows) // prompts_a_step)
    total = steps_an_epoch * stage.epochs
    rise = int(options.warmup * total)  # the schedule of transformers, whose module imports its Trainer and peft
    schedule = LambdaLR(optimizer, lambda step: step / rise if step < rise else (total - step) / max(1, total - rise))
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    position = checkpoints.resume(stage.checkpoints, stage.state, options.keep, accelerator, schedule)
    if position.step:
        accelerator.print(f"{stage.name}: going on from step {position.step}")
    warned: set[str] = set()
    history.rows[:] = [row for row in history.rows if row["stage"] != stage.name] + position.history
    scorer.train()
    with progress(total, stage.name) as advance:
        advance(position.step)
        while position.epoch < stage.epochs:
            with _timed(stage, position):
                refreshed = stage.begin_epoch(scorer, position.epoch)
            if refreshed:
                _log(stage, position, refreshed | _place(position), history, tracker)
            scorer.train()
            order = in_order(len(stage.rows), stage.seed, stage.name, position.epoch)
            steps = [order[start : start + prompts_a_step] for start in range(0, len(order), prompts_a_step)]
            with _signals(accelerator) as stop:
                loader = batches(stage.rows, steps[position.batch :], options, stage.pad_id, accelerator)
                for rows in steps[position.batch :]:
                    position.batch, position.step = position.batch + 1, position.step + 1
                    logged = position.step % options.log_every == 0 or position.step == total
                    row = _place(position) | {"learning_rate": schedule.get_last_lr()[0]}
                    with _timed(stage, position):
                        row |= _step(stage, scorer, optimizer, loader, rows, position, logged, options, accelerator)
                    schedule.step()
                    _warn(stage, row, warned, accelerator)
                    if logged:
                        seconds = position.select_seconds
                        cost = {"select_seconds": seconds, "select_share": seconds / position.train_seconds}
                        _log(stage, position, row | cost, history, tracker)
                    advance(1, f"loss {row['loss']:.3f}")
                    asked, last = stop(), position.batch == len(steps)
                    if asked or last or position.step % options.checkpoint_every == 0:
                        stage.share()
                        checkpoints.save(stage.checkpoints, position, stage.state, accelerator)
                    if asked or (last and stop()):
                        where = f"step {position.step} of {total} of {stage.name}"
                        raise Stopped(f"stopped at {where}; the same command goes on")
            position.epoch, position.batch = position.epoch + 1, 0
            validation = stage.validate(scorer)
            scorer.train()
            _log(stage, position, _named("val", validation) | {"step": position.step}, history, tracker)
            value = validation[options.keep_metric]
            if options.keep == "last" or value > position.best:
                position.validation = validation
            if options.keep == "best" and value > position.best:
                checkpoints.write(stage.checkpoints / "best", position, stage.state, accelerator)
            position.best = max(position.best, value)
    if options.keep == "best" and stage.epochs:
        if accelerator.is_fsdp2:  # an evaluation leaves the outermost weights gathered, and none can be loaded then
            scorer.reshard()  # type: ignore[operator]
        accelerator.load_state(str(stage.checkpoints / "best"))
    return scorer, position


def _step(
    stage: Stage,
    scorer: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterator[Batch],
    rows: Sequence[int],
    position: Position,
    logged: bool,
    options: DictConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """One optimiser step over `rows`; returns what is logged of it."""
    world, size = accelerator.num_processes, options.batch_size
    micro = micro_batches(len(rows), world, size)
    values: dict[str, list[Tensor]] = {}
    for number in range(micro):
        batch = next(loader).to(accelerator.device)
        with accelerator.no_sync(scorer) if number < micro - 1 else nullcontext():
            try:
                loss_B, logs = stage.objective(scorer, batch, position.epoch, logged)
            except UserError as error:  # log-probs that are not finite: the scorer names the examples
                raise UserError(f"step {position.step} of {stage.name}: {error}") from error
            real_B = real(batch, rows, number, size, accelerator)
            # Gradients are averaged over processes: times their number, each prompt weighs 1 / len(rows).
            loss = (loss_B * real_B).sum() * world / len(rows)
            if not torch.isfinite(loss):
                bad = [name for name, value in zip(batch.ids, loss_B.tolist(), strict=True) if not math.isfinite(value)]
                raise UserError(
                    f"the loss is not finite at step {position.step} of {stage.name} (examples "
                    f"{', '.join(bad or batch.ids)}): lower trainer.{stage.name}.learning_rate or beta"
                )
            accelerator.backward(loss)
        for name, value_B in (logs | {"loss": loss_B}).items():
            values.setdefault(name, []).append(value_B.detach().float()[real_B > 0])
        position.tokens += int(batch.prompt_mask_BP.sum() + batch.response_mask_BCT.sum())
    norm = float(accelerator.clip_grad_norm_(scorer.parameters(), options.max_grad_norm))
    if not math.isfinite(norm):
        raise UserError(
            f"the gradient is not finite at step {position.step} of {stage.name} (examples "
            f"{', '.join(stage.rows[row].id for row in rows)}): lower trainer.{stage.name}.learning_rate"
        )
    optimizer.step()
    optimizer.zero_grad()
    # Means over this step's prompts, of all processes; NaN stands for what is not known of a prompt.
    names = sorted(values)
    total_n2 = torch.stack(
        [
            torch.stack([value.nansum(), (~value.isnan()).sum().float()])
            for value in (torch.cat(values[name]) for name in names)
        ]
    )
    total_n2 = accelerator.reduce(total_n2, "sum")
    means = {name: float(total / count) for name, (total, count) in zip(names, total_n2.tolist(), strict=True) if count}
    return means | {"gradient_norm": norm}


@contextmanager
def _timed(stage: Stage, position: Position) -> Iterator[None]:
    """Count the seconds of training, and among them those of selection; what only the log needs counts as neither."""
    started, before = time.perf_counter(), dict(stage.seconds)
    yield
    observed = stage.seconds["observe"] - before["observe"]
    position.train_seconds += time.perf_counter() - started - observed
    position.select_seconds += stage.seconds["select"] - before["select"]


def _log(stage: Stage, position: Position, row: dict[str, Any], history: History, tracker: Tracker) -> None:
    position.history.append({"stage": stage.name} | row)
    history.append(position.history[-1])
    numbers = {f"{stage.name}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
    tracker.log(len(history.rows), numbers)  # one running number over both stages, for W&B


def _place(position: Position) -> dict[str, Any]:
    return {"step": position.step, "epoch": position.epoch}


def _warn(stage: Stage, row: dict[str, Any], warned: set[str], accelerator: Accelerator) -> None:
    """Tell what a step's values give reason to, each kind once."""
    for kind, line in stage.alarms(row).items():
        if kind not in warned and accelerator.is_main_process:
            print(f"warning: {stage.name}, step {row['step']}: {line}", file=sys.stderr)
        warned.add(kind)


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


@contextmanager
def _signals(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question the loop asks between steps; a second Ctrl-C stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    def stop() -> bool:
        if accelerator.num_processes == 1:
            return bool(received)
        asked = torch.tensor(float(bool(received)), device=accelerator.device)  # one process may hear it a step later
        return bool(accelerator.reduce(asked, "sum") > 0)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
