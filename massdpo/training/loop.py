"""One loop trains both stages: batches, loss, backward, step, log, validate, checkpoint.

What a stage is (its loss) comes from massdpo/training/objectives.py. A checkpoint is a folder that appears whole; a
stage stopped at any moment continues from the newest one and ends with the same numbers. The order of the data is
keyed by (seed, stage, epoch), and no dropout is used, so weights, optimiser and position are all there is to
remember.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from massdpo.console import progress, say
from massdpo.data.batches import batches, in_order, micro_batches, real
from massdpo.errors import UserError
from massdpo.tensors import Batch
from massdpo.training import checkpoints
from massdpo.training.checkpoints import Position
from massdpo.training.history import History, Tracker, step_means
from massdpo.training.interruption import Stopped, asked_to_stop
from massdpo.training.stage import Stage

TOLD = ("accuracy", "mrr", "margin")  # of the validation split, printed at each epoch's end


def fit(
    stage: Stage, scorer: nn.Module, options: DictConfig, accelerator: Accelerator, history: History, tracker: Tracker
) -> tuple[nn.Module, Position]:
    """Train `scorer` (prepared here) on a stage, from its newest checkpoint where there is one.

    Raises:
        UserError: a loss or gradient that is not finite (the last checkpoint stays good).
        Stopped: a signal asked for an end.
    """
    training = Training(stage, scorer, options, accelerator, history, tracker)
    position = training.position
    with progress(training.total, stage.name, position.step) as advance:
        while position.epoch < stage.epochs and position.without_gain < (options.patience or math.inf):
            training.epoch(advance)
            training.validate()
    if position.epoch < stage.epochs:
        accelerator.print(
            f"{stage.name}: ended after epoch {position.epoch}, without gain in the last {options.patience}"
        )
    if options.keep == "best" and stage.epochs:
        if accelerator.is_fsdp2:  # an evaluation leaves the outermost weights gathered, and then none can be loaded
            training.scorer.reshard()
        checkpoints.load(stage.checkpoints / "best", accelerator, weights_alone=True)
    return training.scorer, position


class Training:
    """A stage under way: the scorer, its optimiser and schedule, and how far they are."""

    def __init__(
        self,
        stage: Stage,
        scorer: nn.Module,
        options: DictConfig,
        accelerator: Accelerator,
        history: History,
        tracker: Tracker,
    ):
        self.stage, self.objective, self.options = stage, stage.objective, options
        self.accelerator, self.history, self.tracker = accelerator, history, tracker
        optimizer = torch.optim.AdamW(
            (weight for weight in scorer.parameters() if weight.requires_grad),
            lr=stage.learning_rate,
            weight_decay=options.weight_decay,
            fused=True,  # the plain loop over tensors costs a tiny model more than its backward pass
        )
        self.prompts_per_step = options.batch_size * options.accumulate * accelerator.num_processes
        self.total = -(-len(self.objective.rows) // self.prompts_per_step) * stage.epochs
        rise = int(options.warmup * self.total)  # transformers' schedule; its module imports its Trainer and peft
        fall = max(1, self.total - rise)
        self.schedule = LambdaLR(optimizer, lambda step: step / rise if step < rise else (self.total - step) / fall)
        self.scorer, self.optimizer = accelerator.prepare(scorer, optimizer)
        state, keep = self.objective.state, options.keep
        self.position = checkpoints.resume(stage.checkpoints, state, keep, accelerator, self.schedule, self.total)
        if self.position.step:
            accelerator.print(f"{stage.name}: continuing from step {self.position.step}")
        self.warned: set[str] = set()
        self.losses: list[float] = []  # of the epoch's steps
        history.rows[:] = [row for row in history.rows if row["stage"] != stage.name] + self.position.history

    def epoch(self, advance: Callable[..., None]) -> None:
        """The rest of the epoch that `position` is in."""
        stage, position, options = self.stage, self.position, self.options
        with self._timed():
            refreshed = self.objective.begin_epoch(self.scorer, position.epoch, options.log_every)
            refreshed = self._counted(refreshed, len(self.objective.rows))
        if refreshed:
            self._log(refreshed | self._place())
        self.scorer.train()
        order = in_order(len(self.objective.rows), stage.seed, stage.name, position.epoch)
        steps = [order[start : start + self.prompts_per_step] for start in range(0, len(order), self.prompts_per_step)]
        loader = batches(self.objective.rows, steps[position.batch :], options, stage.pad_id, self.accelerator)
        with asked_to_stop(self.accelerator) as stop:
            for rows in steps[position.batch :]:
                position.batch, position.step = position.batch + 1, position.step + 1
                row = self._place() | {"learning_rate": self.schedule.get_last_lr()[0]}
                logged = position.step % options.log_every == 0 or position.step == self.total
                with self._timed():
                    row |= self.step(loader, rows, logged, advance)
                self.schedule.step()
                self._warn(row)
                if logged:
                    seconds = position.select_seconds
                    cost = {"select_seconds": seconds, "select_share": seconds / position.train_seconds}
                    self._log(row | cost)
                self.losses.append(row["loss"])
                advance(0, f"loss {row['loss']:.3f}")
                asked, last = stop(), position.batch == len(steps)
                if asked or last or position.step % options.checkpoint_every == 0:
                    self.objective.share()
                    state, last_step = self.objective.state, position.step == self.total
                    checkpoints.save(stage.checkpoints, position, state, self.accelerator, last_step)
                if asked or (last and stop()):
                    where = f"step {position.step} of {self.total} of {stage.name}"
                    raise Stopped(f"stopped at {where}; give the same command to continue")
        position.epoch, position.batch = position.epoch + 1, 0

    def validate(self) -> None:
        """Metrics on the validation split; keeps the policy where it is the best so far."""
        position, options = self.position, self.options
        validation = self.objective.validate(self.scorer)
        self._log({f"val/{name}": value for name, value in validation.items()} | {"step": position.step})
        value = validation[options.keep_metric]
        if options.keep == "last" or value > position.best:
            position.validation = validation
        if options.keep == "best" and value > position.best:
            best, state = self.stage.checkpoints / "best", self.objective.state
            checkpoints.write(best, position, state, self.accelerator, weights_alone=True)
        position.without_gain = 0 if value > position.best else position.without_gain + 1
        position.best = max(position.best, value)
        self._tell(validation)

    def _tell(self, validation: dict[str, float]) -> None:
        """One line for the epoch that just ended."""
        # There are none where a stopped stage had only its validation left.
        loss = f"loss {sum(self.losses) / len(self.losses):.3f}, " if self.losses else ""
        self.losses.clear()
        told = ", ".join(f"{name} {validation[name]:.3f}" for name in TOLD if name in validation)
        say(f"{self.stage.name} epoch {self.position.epoch}/{self.stage.epochs}: {loss}val {told}")

    def step(
        self, loader: Iterator[Batch], rows: Sequence[int], logged: bool, advance: Callable[..., None]
    ) -> dict[str, Any]:
        """One optimiser step over `rows`; returns what is logged of it."""
        position, accelerator = self.position, self.accelerator
        name = self.stage.name
        where, remedy = f"step {position.step} of {name}", f"lower trainer.{name}.learning_rate"
        world, size = accelerator.num_processes, self.options.batch_size
        micro = micro_batches(len(rows), world, size)
        values: dict[str, list[Tensor]] = {}
        for number in range(micro):
            batch = next(loader).to(accelerator.device)
            with accelerator.no_sync(self.scorer) if number < micro - 1 else nullcontext():
                try:
                    loss_B, logs = self.objective.loss(self.scorer, batch, position.epoch, logged)
                except UserError as error:  # log-probs that are not finite: the scorer names the examples
                    raise UserError(f"{where}: {error}") from error
                real_B = real(batch, rows, number, size, accelerator)
                # Gradients are averaged over processes: times their number, each prompt weighs 1 / len(rows).
                loss = (loss_B * real_B).sum() * world / len(rows)
                accelerator.backward(loss)
            advance(1 / micro)
            for name, value_B in (logs | {"loss": loss_B}).items():
                values.setdefault(name, []).append(value_B.detach().float().masked_fill(real_B == 0, math.nan))
        norm = accelerator.clip_grad_norm_(self.scorer.parameters(), self.options.max_grad_norm)
        means = step_means(values, norm, accelerator)
        if not math.isfinite(means["gradient_norm"]):
            own = zip(rows[accelerator.process_index :: world], torch.cat(values["loss"]).tolist(), strict=False)
            bad = gather_object([row for row, value in own if not math.isfinite(value)])  # fillers come last, unpaired
            what, remedy = ("loss", f"{remedy} or beta") if bad else ("gradient", remedy)
            names = ", ".join(self.objective.rows[row].id for row in bad or rows)
            raise UserError(f"the {what} is not finite at {where} (examples {names}): {remedy}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._counted(means, len(rows))

    def _counted(self, means: dict[str, float], prompts: int) -> dict[str, float]:
        """Move the token counts of this many prompts from the logged means to the position."""
        self.position.fed_tokens += round(means.pop("fed_tokens", 0.0) * prompts)
        self.position.learned_tokens += round(means.pop("learned_tokens", 0.0) * prompts)
        return means

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the seconds of training and, among them, of selection; leave out what only the log needs."""
        started, before = time.perf_counter(), dict(self.objective.seconds)
        yield
        observed = self.objective.seconds["observe"] - before["observe"]
        self.position.train_seconds += time.perf_counter() - started - observed
        self.position.select_seconds += self.objective.seconds["select"] - before["select"]

    def _place(self) -> dict[str, Any]:
        return {"step": self.position.step, "epoch": self.position.epoch}

    def _log(self, row: dict[str, Any]) -> None:
        self.position.history.append({"stage": self.stage.name} | row)
        self.history.append(self.position.history[-1])
        numbers = {f"{self.stage.name}/{key}": value for key, value in row.items() if isinstance(value, int | float)}
        self.tracker.log(len(self.history.rows), numbers)  # one running number over both stages, for W&B

    def _warn(self, row: dict[str, Any]) -> None:
        """Print the warnings that a step's values call for, each kind once."""
        for kind, line in self.objective.alarms(row).items():
            if kind not in self.warned and self.accelerator.is_main_process:
                print(f"warning: {self.stage.name}, step {row['step']}: {line}", file=sys.stderr)
            self.warned.add(kind)
