"""What the two stages learn: SFT on chosen responses, then preferences between the chosen and the picked negatives.

Suffixes: S prompts of the training split, B prompts of a batch, C = 1 + N candidates (column 0 is the chosen one),
K picked negatives.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from massdpo.data.tokens import TokenizedExample
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitLogps, SplitScorer, evaluate, ranking
from massdpo.selection import Selector, hardest_overlap, overlap
from massdpo.tensors import Batch, CandidateScores, Picks, PoolStatistics, ScorerOutput
from massdpo.training.picks import BatchPicks, PickLog, noise, reasons, unscored
from massdpo.training.remembered import Remembered
from massdpo.training.stage import Objective

Loss = Callable[..., Tensor]  # of rewards, mean log-probs and a mask, as in losses.py

# At a margin of 16 the loss and its gradient are exp(-16), a ten-millionth of what they were: nothing more is learned.
RUNAWAY = 16.0
# Mean nats per token below the start: the chosen responses' perplexity is e times what SFT left.
COLLAPSE = 1.0


@dataclass
class Sft(Objective):
    """Supervised fine-tuning on the chosen responses alone."""

    rows: Sequence[TokenizedExample]
    val: Sequence[TokenizedExample]
    score_split: SplitScorer
    state: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"select": 0.0, "observe": 0.0})

    def loss(self, scorer: nn.Module, batch: Batch, epoch: int, observe: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean negative log-prob per token of the chosen response, `(B,)`."""
        output: ScorerOutput = scorer(batch.chosen_only())
        return -output.scores.mean_logp_BC[:, 0], {"chosen_logp": output.scores.logp_BC[:, 0]} | tokens_of(output)

    def validate(self, scorer: nn.Module) -> dict[str, float]:
        return ranking(self.score_split(scorer, self.val, "validate"))


@dataclass
class Preference(Objective):
    """The preference objective: select negatives (at this step, or as last refreshed), score them, compare.

    `refresh`: `step` selects with the current policy in the same pass that trains on it; `epoch` and `once` select for
    the whole split beforehand. A selector that needs no scores picks without a pass over the pool; with `screen` the
    others see a shortlist of as many negatives, and only those are scored.
    """

    selector: Selector
    compare: Loss
    beta: float
    refresh: str
    seed: int
    rows: Sequence[TokenizedExample]
    val: Sequence[TokenizedExample]
    reference: Mapping[str, SplitLogps]  # of `rows` ("train") and of `val`
    score_split: SplitScorer
    screen: int | None = None
    log: PickLog | None = None  # where picks are written down
    state: dict[str, Tensor] = field(init=False)  # what a checkpoint must remember
    seconds: dict[str, float] = field(default_factory=lambda: {"select": 0.0, "observe": 0.0})
    _own: list[BatchPicks] = field(default_factory=list)  # of an epoch's rows, known to this process alone until shared
    _epoch: int = 0  # theirs

    def __post_init__(self) -> None:
        self._remembered = Remembered(self.rows, getattr(self.selector, "k", None), self.screen)
        self.state = self._remembered.state
        loss = getattr(self.compare, "func", self.compare)  # within what Hydra makes of it
        self._corrected = "log_inclusion_BK" in inspect.signature(loss).parameters

    def loss(self, scorer: nn.Module, batch: Batch, epoch: int, observe: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each prompt `(B,)` and what is logged of it; `observe` asks for what costs an extra pass."""
        started = time.perf_counter()
        if self.refresh != "step":
            picks, pool = self._remembered.picks(batch), None
            output: ScorerOutput = scorer(batch.take(picks))
        elif self.selector.needs_scores:
            batch = self._remembered.shortlist(batch, self._reference(batch))
            output = scorer(
                batch, lambda scores: self._pick(self._statistics(batch, scores, epoch, observe), batch, epoch)
            )
            assert output.picks is not None and output.pool is not None
            picks, pool = output.picks, output.pool
            self.seconds["select"] += output.select_seconds
        else:
            picks, pool = self._pick(self._statistics(batch, unscored(batch), epoch), batch, epoch), None
            self.seconds["select"] += time.perf_counter() - started
            output = scorer(batch.take(picks))
        scores = output.scores
        rewards_BC = self.beta * (scores.logp_BC - self._reference(batch).gather(1, picks.column_BC))
        if self.refresh == "step" and not self.selector.needs_scores:  # nobody knew them when it picked
            self._own[-1].known["reward"] = rewards_BC[:, 1:].detach()
        loss_B = self._compare(rewards_BC, scores, picks)
        logs = self._logs(scores, rewards_BC, picks) | tokens_of(output)
        with torch.no_grad():
            logs |= self._pick_logs(scorer, batch, picks, pool, epoch, observe)
        return loss_B, logs

    @torch.no_grad()
    def begin_epoch(self, scorer: nn.Module, epoch: int, observe_every: int) -> dict[str, float]:
        """Nothing, or a selection for every prompt of the split with the current policy.

        Returns the means of what is logged of the picks, where any were made; of what only the log needs, the mean over
        every `observe_every`-th batch.
        """
        done = int(self.state["selected_in"])
        if self.refresh == "step" or done == epoch or (self.refresh == "once" and done >= 0):
            return {}
        parts, accelerator, started = [], self.score_split.accelerator, time.perf_counter()
        for place, batch in enumerate(self.score_split.batches(scorer, self.rows, "select")):
            number = place * accelerator.num_processes + accelerator.process_index
            batch = self._remembered.shortlist(batch, self._reference(batch))
            output = scorer(batch) if self.selector.needs_scores else ScorerOutput(unscored(batch))
            pool = self._statistics(batch, output.scores, epoch, number % observe_every == 0)
            picks = self._pick(pool, batch, epoch)
            logs = {f"selection/{name}": value_B for name, value_B in picks.info.items()} | tokens_of(output)
            if self.selector.needs_scores:
                logs["selection/hardest_overlap"] = hardest_overlap(pool, picks)
            if done >= 0:
                logs["selection/same_as_before"] = overlap(self._remembered.picks(batch), batch.whole(picks))
            parts.append((batch.index_B, {name: value_B.cpu() for name, value_B in logs.items()}))
        self.share()
        values: dict[str, Tensor] = {}
        for index_B, logs in gather_object(parts):
            for name, value_B in logs.items():
                values.setdefault(name, torch.full((len(self.rows),), torch.nan))[index_B] = value_B.float()
        self.state["selected_in"].fill_(epoch)
        self.seconds["select"] += time.perf_counter() - started
        return {name: float(value_S.nanmean()) for name, value_S in values.items()}

    def validate(self, scorer: nn.Module) -> dict[str, float]:
        return evaluate(self.score_split(scorer, self.val, "validate"), self.reference["val"], self.beta)

    def share(self) -> None:
        """Bring the picks of all processes together, before they are saved and at an epoch's end."""
        own = [made.on_cpu() for made in self._own]  # only now, as each look at the device's picks waits for it
        self._own.clear()
        places: dict[int, tuple[BatchPicks, int]] = {}  # a row once: a filler that keeps processes in step repeats one
        for made in gather_object(own):
            self._remembered.store(made.rows_B, made.picks)
            if made.seen is not None:
                self._remembered.saw(made.rows_B, *made.seen)
            places |= {row: (made, place) for place, row in enumerate(made.rows_B.tolist())}
        if self.log and places and self.score_split.accelerator.is_main_process:
            self.log.write(self._epoch, places, self.state["written"])

    @staticmethod
    def alarms(row: Mapping[str, Any]) -> dict[str, str]:
        """Runaway rewards, collapsing chosen log-probs."""
        found = {}
        reward = max(row["chosen_reward"], row["rejected_reward"], key=abs)
        if abs(reward) > RUNAWAY:
            found["rewards"] = (
                f"rewards run away ({reward:+.1f} on average; beyond {RUNAWAY:g} the loss learns nothing more from "
                "them): lower trainer.preference.learning_rate"
            )
        if row["chosen_mean_logp_change"] < -COLLAPSE:
            found["chosen"] = (
                f"the chosen responses' log-probs collapse ({row['chosen_mean_logp_change']:+.2f} nats per token "
                "since the start, on average): lower trainer.preference.learning_rate"
            )
        return found

    def _reference(self, batch: Batch) -> Tensor:
        """Reference log-probs of the batch's candidates, `(B, C)`."""
        return self.reference["train"].logp_SC[batch.index_B].to(batch.place_BC.device).gather(1, batch.place_BC)

    def _statistics(self, batch: Batch, scores: CandidateScores, epoch: int, observe: bool = False) -> PoolStatistics:
        noise_BN = noise(batch, self.seed, 0 if self.refresh == "once" else epoch)
        return PoolStatistics(scores, self._reference(batch), self.beta, noise_BN, batch.ids, observe)

    def _pick(self, pool: PoolStatistics, batch: Batch, epoch: int) -> Picks:
        if (picks := self.selector(pool)).log_inclusion_BK is None and self._corrected:  # ours are checked earlier
            raise UserError(f"{type(self.selector).__name__} picks without log_inclusion_BK: use loss=pl, not is_pl")
        known = reasons(pool, picks) if self.log and self.selector.needs_scores else {}
        seen = None if self.screen is None else (batch.place_BC[:, 1:] - 1, pool.advantage_BN)
        self._own.append(BatchPicks(batch.index_B, batch.whole(picks), known, seen))
        self._epoch = epoch
        return picks

    def _compare(self, rewards_BC: Tensor, scores: CandidateScores, picks: Picks) -> Tensor:
        if picks.beta_scale_BK is not None:
            apart_BK = picks.beta_scale_BK.to(rewards_BC) * (rewards_BC[:, 1:] - rewards_BC[:, :1])
            rewards_BC = torch.cat([rewards_BC[:, :1], rewards_BC[:, :1] + apart_BK], dim=1)
        given = {}
        if self._corrected:
            assert picks.log_inclusion_BK is not None  # or they would not have been taken
            given["log_inclusion_BK"] = picks.log_inclusion_BK.to(rewards_BC)
        return self.compare(rewards_BC, scores.mean_logp_BC, scores.mask_BC, **given)

    def _logs(self, scores: CandidateScores, rewards_BC: Tensor, picks: Picks) -> dict[str, Tensor]:
        count_B = picks.mask_BK.sum(-1)
        rejected = [(value_BC[:, 1:] * picks.mask_BK).sum(-1) / count_B for value_BC in (rewards_BC, scores.logp_BC)]
        best_B = rewards_BC[:, 1:].masked_fill(~picks.mask_BK, -torch.inf).amax(-1)
        return {
            "chosen_reward": rewards_BC[:, 0],
            "rejected_reward": rejected[0],
            "margin": rewards_BC[:, 0] - rejected[0],
            "margin_max": rewards_BC[:, 0] - best_B,
            "reward_accuracy": (rewards_BC[:, 0] > best_B).float(),
            "chosen_logp": scores.logp_BC[:, 0],
            "chosen_mean_logp_change": rewards_BC[:, 0] / self.beta / scores.length_BC[:, 0],
            "rejected_logp": rejected[1],
            "k_effective": count_B.float(),
        }

    def _pick_logs(
        self, scorer: nn.Module, batch: Batch, picks: Picks, pool: CandidateScores | None, epoch: int, observe: bool
    ) -> dict[str, Tensor]:
        logs = {f"selection/{name}": value_B for name, value_B in picks.info.items()}
        if self.refresh == "step" and epoch and observe:
            logs["selection/same_as_before"] = overlap(self._remembered.picks(batch), batch.whole(picks))
        if observe:
            started = time.perf_counter()
            scores = scorer(batch).scores if pool is None else pool
            logs["selection/hardest_overlap"] = hardest_overlap(self._statistics(batch, scores, epoch), picks)
            self.seconds["observe"] += time.perf_counter() - started
        return logs


def tokens_of(output: ScorerOutput) -> dict[str, Tensor]:
    """The counts of tokens through the model that the training loop adds up."""
    counts = {"fed_tokens": output.fed_B, "learned_tokens": output.learned_B}
    return {name: count_B for name, count_B in counts.items() if count_B is not None}
