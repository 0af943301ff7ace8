"""How long a run's kinds of work take: a few steps of each on its own rows, whose updates have length 0."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from massdpo.config import instantiate
from massdpo.data.batches import by_length, collate, in_order
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.scores import SplitScorer, SplitScores
from massdpo.model.scoring import PreferenceScorer
from massdpo.selection import Selector
from massdpo.training.objectives import Preference, Sft
from massdpo.training.stage import Objective

Rows = Sequence[TokenizedExample]
LOOKED_AT = 500  # rows whose lengths stand for those of their split
ENOUGH, MOST = 5.0, 8  # seconds, and number, of steps that are timed after the first; two at least


class Timing:
    """Times a policy that is still to be trained, in one process, and leaves its weights as they are."""

    def __init__(self, config: DictConfig, policy: nn.Module, selector: Selector, score: SplitScorer):
        self.config, self.policy, self.selector, self.score = config, policy, selector, score
        features = selector.features if selector.needs_scores else None
        self.scorer: Any = score.accelerator.prepare_model(PreferenceScorer(policy, features, config.trainer.layout))
        self._scoring = 0.0  # seconds per token, once known

    def stage(self, name: str, rows: Rows, epochs: int, steps: int) -> tuple[float, float]:
        """Tokens that a stage feeds to the model, and the seconds of its steps."""
        size, chosen_only = self.config.trainer.batch_size, name == "sft"
        order = in_order(len(rows), self.config.seed, name, 0)[: size * MOST]
        some = [rows[row] for row in order]
        objective: Objective = Sft(some, some, self.score) if chosen_only else self._preference(some)
        weights = [weight for weight in self.policy.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=0.0, fused=True)
        self.scorer.train()
        paces: list[float] = []  # seconds per token
        updates: list[float] = []  # seconds
        began = self._now()
        objective.begin_epoch(self.scorer, 0, self.config.trainer.log_every)
        before = (self._now() - began) / sum(tokens_of(row, chosen_only) for row in some)
        fed: list[float] = []  # tokens that went through the model, per token
        spent: list[float] = []  # seconds
        while len(paces) < 3 or (sum(spent[1:]) < ENOUGH and len(paces) <= MOST):
            start = len(paces) * size % (-(-len(some) // size) * size)
            part = list(enumerate(some))[start : start + size]
            began = self._now()
            batch = collate(part, self.score.pad_id).to(self.score.accelerator.device)
            loss_B, logs = objective.loss(self.scorer, batch, 0, False)
            loss_B.mean().backward()
            between = self._now()
            if torch.isfinite(nn.utils.clip_grad_norm_(weights, self.config.trainer.max_grad_norm)):
                optimizer.step()  # 0 times infinity would move a weight
            optimizer.zero_grad()
            tokens = sum(tokens_of(row, chosen_only) for _, row in part)
            paces.append((between - began) / tokens)
            spent.append(self._now() - began)
            updates.append(self._now() - between)
            fed.append(float(logs["fed_tokens"].sum()) / tokens)
        epoch = mean_tokens(rows, chosen_only) * len(rows)
        selecting = before * epoch * (1 if self.config.refresh == "once" else epochs)
        learning = median(paces[1:]) * epoch * epochs + median(updates[1:]) * steps
        return median(fed) * epoch * epochs, selecting + learning

    @torch.no_grad()
    def scoring(self, rows: Rows) -> float:
        """Seconds to score every candidate of a split."""
        if not self._scoring:
            order = by_length(rows, self.config.trainer.eval_batch_size)
            whole = order[:-1] or order
            some = [[rows[row] for row in numbers] for numbers in (whole[-1], whole[len(whole) // 2], whole[0])]
            self.score(self.scorer, some[0], "plan")  # the first time takes longer
            began = self._now()
            for part in some:
                self.score(self.scorer, part, "plan")
            self._scoring = (self._now() - began) / sum(tokens_of(row) for part in some for row in part)
        return self._scoring * mean_tokens(rows) * len(rows)

    def observing(self, rows: Rows, epochs: int) -> float:
        """Seconds to score pools for what the log alone needs, on the steps that are logged."""
        if self.config.refresh == "step" and self.selector.needs_scores:
            return 0.0  # they are scored anyway
        return self.scoring(rows) * epochs / self.config.trainer.log_every

    def by_part(self, rows: Rows, work: Callable[[Rows], object]) -> float:
        """Seconds of what is done to all rows, by those of a batch of middling length."""
        order = by_length(rows, self.config.trainer.eval_batch_size)
        some = [rows[row] for row in order[(len(order) - 1) // 2]]
        began = self._now()
        work(some)
        return (self._now() - began) * len(rows) / len(some)

    def _preference(self, rows: Rows) -> Preference:
        config, widest = self.config, max(len(row.response_ids) for row in rows)
        nothing = torch.zeros(len(rows), widest)
        reference = {"train": SplitScores(nothing, nothing.long())}
        compare = instantiate(config.loss)
        screen = config.selector.get("screen")
        given = self.selector, compare, config.beta, config.refresh, config.seed, rows, rows, reference, self.score
        return Preference(*given, screen=screen)

    def end(self) -> None:
        """Accelerate forgets the scorer, which checkpoints would hold beside the one that is trained."""
        self.score.accelerator.free_memory()

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def tokens_of(row: TokenizedExample, chosen_only: bool = False) -> int:
    """Tokens of a prompt and its candidates, or its chosen response alone."""
    return len(row.prompt_ids) + sum(map(len, row.response_ids[:1] if chosen_only else row.response_ids))


def mean_tokens(rows: Rows, chosen_only: bool = False) -> float:
    places = np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int).tolist()
    return sum(tokens_of(rows[place], chosen_only) for place in places) / len(places)
