"""How long a run's kinds of work take: a few steps of each on its own rows, whose updates have length 0."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from massdpo.config import instantiate
from massdpo.data.batches import batches, by_length, in_order
from massdpo.data.tokens import TokenizedExample
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitLogps, SplitScorer
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs.trackers import NoLogger
from massdpo.selection import Selector
from massdpo.tensors import Batch
from massdpo.training.history import History
from massdpo.training.loop import Training
from massdpo.training.objectives import Preference, Sft
from massdpo.training.stage import Objective, Stage

LOOKED_AT = 500  # rows whose lengths stand for those of their split
ENOUGH = 5.0  # seconds after which no other step is timed
MOST, TIMES = 8, 6  # steps that differ, and how often each is timed


class Timing:
    """Times a policy that is still to be trained, in one process, and leaves its weights as they are."""

    def __init__(self, config: DictConfig, policy: nn.Module, selector: Selector, score_split: SplitScorer):
        self.config, self.policy, self.selector, self.score_split = config, policy, selector, score_split
        features = selector.features if selector.needs_scores else None
        scorer = PreferenceScorer(policy, features, config.trainer.layout)
        self.scorer: Any = score_split.accelerator.prepare_model(scorer)
        self._scoring = 0.0  # seconds per token, once known

    def stage(self, name: str, rows: Sequence[TokenizedExample], epochs: int) -> tuple[float, float]:
        """Tokens that a stage feeds to the model, and the seconds of its steps: those of the training loop itself."""
        trainer, chosen_only = self.config.trainer, name == "sft"
        size = trainer.batch_size * trainer.accumulate
        some = [rows[row] for row in in_order(len(rows), self.config.seed, name, 0)[: size * MOST]]
        objective: Objective = Sft(some, some, self.score_split) if chosen_only else self._preference(some)
        began = self._now()
        objective.begin_epoch(self.scorer, 0, trainer.log_every)
        selecting = (self._now() - began) / sum(tokens_of(row, chosen_only) for row in some)  # seconds per token
        whole = [range(start, min(start + size, len(some))) for start in range(0, len(some), size)]
        first = range(min(trainer.batch_size, len(some)))  # takes longer, and does not count
        parts, spent, seen = whole * TIMES, 0.0, 0
        with TemporaryDirectory() as folder:
            stage = Stage(name, objective, 1, 0.0, Path(folder), self.config.seed, self.score_split.pad_id)
            history = History(Path(folder) / "history.csv")
            training = Training(stage, self.scorer, trainer, self.score_split.accelerator, history, NoLogger())
        with torch.random.fork_rng():  # a DataLoader draws from it
            loader = batches(some, [first, *parts], trainer, self.score_split.pad_id, self.score_split.accelerator)
        training.scorer.train()
        self._step(training, loader, first)
        training.position.fed_tokens = 0
        for part in parts:
            spent += self._step(training, loader, part)
            seen += sum(tokens_of(some[row], chosen_only) for row in part)
            if spent > ENOUGH:
                break
        epoch, fed = mean_tokens(rows, chosen_only) * len(rows), training.position.fed_tokens / seen
        self.end()
        selecting *= epoch * (1 if self.config.refresh == "once" else epochs)
        return fed * epoch * epochs, selecting + spent / seen * epoch * epochs

    def _step(self, training: Training, loader: Iterator[Batch], rows: Sequence[int]) -> float:
        began = self._now()
        with suppress(UserError):  # a loss or gradient that is not finite: the stage itself will say so
            training.step(loader, rows, False, lambda *_: None)
        training.optimizer.zero_grad()
        return self._now() - began

    @torch.no_grad()
    def scoring(self, rows: Sequence[TokenizedExample]) -> float:
        """Seconds to score every candidate of a split."""
        if not self._scoring:
            order = by_length(rows, self.config.trainer.eval_batch_size)
            whole = order[:-1] or order
            some = [[rows[row] for row in numbers] for numbers in (whole[-1], whole[len(whole) // 2], whole[0])]
            self.score_split(self.scorer, some[0], "plan")  # the first time takes longer
            began = self._now()
            for part in some:
                self.score_split(self.scorer, part, "plan")
            self._scoring = (self._now() - began) / sum(tokens_of(row) for part in some for row in part)
        return self._scoring * mean_tokens(rows) * len(rows)

    def observing(self, rows: Sequence[TokenizedExample], epochs: int) -> float:
        """Seconds to score pools for what the log alone needs, on the steps that are logged."""
        if self.config.refresh == "step" and self.selector.needs_scores:
            return 0.0  # they are scored anyway
        return self.scoring(rows) * epochs / self.config.trainer.log_every

    def by_part(self, rows: Sequence[TokenizedExample], work: Callable[[Sequence[TokenizedExample]], object]) -> float:
        """Seconds of what is done to all rows, by those of a batch of middling length."""
        order = by_length(rows, self.config.trainer.eval_batch_size)
        some = [rows[row] for row in order[(len(order) - 1) // 2]]
        began = self._now()
        work(some)
        return (self._now() - began) * len(rows) / len(some)

    def _preference(self, rows: Sequence[TokenizedExample]) -> Preference:
        config, widest = self.config, max(len(row.response_ids) for row in rows)
        nothing = torch.zeros(len(rows), widest)
        reference = {"train": SplitLogps(nothing, nothing.long())}
        compare = instantiate(config.loss)
        screen = config.selector.get("screen")
        given = self.selector, compare, config.beta, config.refresh, config.seed, rows, rows, reference
        return Preference(*given, self.score_split, screen=screen)

    def end(self) -> None:
        """Accelerate forgets the scorer, which checkpoints would hold beside the one that is trained."""
        self.score_split.accelerator.free_memory()

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def tokens_of(row: TokenizedExample, chosen_only: bool = False) -> int:
    """Tokens of a prompt and its candidates, or its chosen response alone."""
    return len(row.prompt_ids) + sum(map(len, row.response_ids[:1] if chosen_only else row.response_ids))


def mean_tokens(rows: Sequence[TokenizedExample], chosen_only: bool = False) -> float:
    places = np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int).tolist()
    return sum(tokens_of(rows[place], chosen_only) for place in places) / len(places)
