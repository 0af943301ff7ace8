"""Log-probs of every candidate of a split, and the metrics that follow from them.

Suffixes: S prompts of a split, B prompts of a batch, C = 1 + N candidates (column 0 is the chosen one).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from massdpo.console import progress
from massdpo.data.batches import by_length, collate
from massdpo.data.tokens import TokenizedExample
from massdpo.errors import UserError
from massdpo.evaluation import metrics
from massdpo.tensors import Batch, ScorerOutput

# Nats, per square root of a response's tokens, by which two machines' log-probs of one policy may differ: two to
# four times what other batches or threads change in a model of 135M parameters (0.05 to 0.09 under bfloat16, 5e-6 in
# float32, root mean square). Less could not be told from the rounding of the training steps themselves.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class SplitLogps:
    """Summed log-probs of each candidate of each prompt of a split, on the CPU, float32 nats."""

    logp_SC: Tensor
    length_SC: Tensor  # int64, tokens; 0 where a prompt has no such candidate

    @property
    def mask_SC(self) -> Tensor:
        return self.length_SC > 0

    @property
    def mean_logp_SC(self) -> Tensor:
        return self.logp_SC / self.length_SC.clamp(min=1)

    def ranks(self) -> tuple[Tensor, Tensor]:
        """The targets' ranks `(S,)` by mean and by summed log-prob."""
        by_mean = metrics.target_ranks(self.mean_logp_SC, self.mask_SC)
        return by_mean, metrics.target_ranks(self.logp_SC, self.mask_SC)

    def save(self, file: Path) -> None:
        save_file({"logp_SC": self.logp_SC, "length_SC": self.length_SC}, file)

    @classmethod
    def load(cls, file: Path) -> "SplitLogps":
        return cls(**load_file(file))


@dataclass(frozen=True)
class SplitScorer:
    """Takes a scorer through whole splits in evaluation mode; each process scores its share of the batches."""

    accelerator: Accelerator
    batch_size: int
    pad_id: int

    def batches(self, scorer: nn.Module, rows: Sequence[TokenizedExample], what: str) -> Iterator[Batch]:
        """This process's batches of the split, as many as any other's; `what` is the label of the progress bar."""
        processes, mine = self.accelerator.num_processes, by_length(rows, self.batch_size)
        rounds = -(-len(mine) // processes)
        mine += [mine[-1]] * (rounds * processes - len(mine))  # sharded weights need every process in every forward
        was_training = scorer.training
        scorer.eval()
        with progress(rounds, what) as advance:
            for numbers in mine[self.accelerator.process_index :: processes]:
                yield collate([(row, rows[row]) for row in numbers], self.pad_id).to(self.accelerator.device)
                advance()
        scorer.train(was_training)

    @torch.no_grad()
    def __call__(self, scorer: nn.Module, rows: Sequence[TokenizedExample], what: str) -> SplitLogps:
        """Every candidate's summed log-prob, at the run's precision; every process gets the whole.

        The same batches give the same numbers to the last digit. Batches of another shape do not, as matrix products
        then sum in another order: a response of T tokens moves by about 0.1 sqrt(T) nats under bfloat16 and
        5e-6 sqrt(T) in float32 (root mean square, 135M parameters). Before the first step, rewards are off 0 by that,
        times beta.
        """
        parts = []
        for batch in self.batches(scorer, rows, what):
            with self.accelerator.autocast():
                output: ScorerOutput = scorer(batch)
            parts.append((batch.index_B, output.scores.logp_BC.float().cpu(), output.scores.length_BC.cpu()))
        parts = gather_object(parts)
        width = max(logp_BC.shape[1] for _, logp_BC, _ in parts)
        logp_SC = torch.zeros(len(rows), width)
        length_SC = torch.zeros(len(rows), width, dtype=torch.int64)
        for index_B, logp_BC, length_BC in parts:
            logp_SC[index_B, : logp_BC.shape[1]] = logp_BC
            length_SC[index_B, : length_BC.shape[1]] = length_BC
        return SplitLogps(logp_SC, length_SC)


def check_reference(now: SplitLogps, stored_SC: Tensor, dtype: torch.dtype) -> None:
    """Compare the stored log-probs of some whole batches with those of the policy as it starts, in the same batches.

    There both are the same to the last digit, whatever `dtype` they are computed in; what another machine stored
    differs by the rounding of matrix products, for which `ROUNDING` allows.

    Raises:
        UserError: they differ by more, as a root mean square over the responses.
    """
    change_SC = now.logp_SC - stored_SC[:, : now.logp_SC.shape[1]]
    off = (change_SC / now.length_SC.sqrt())[now.mask_SC].square().mean().sqrt().item()
    if not off <= ROUNDING[dtype]:  # NaN is not
        raise UserError(
            f"the stored reference log-probs do not belong to this policy (off by {off:.2g} nats per square root of a "
            f"response's tokens; rounding explains {ROUNDING[dtype]:g}): remove the folder reference/ from cache_dir"
        )


def evaluate(policy: SplitLogps, reference: SplitLogps, beta: float) -> dict[str, float]:
    """Metrics over the whole pool, whatever was trained on: ranking by mean (`_sum`: summed) log-prob, rewards."""
    return ranking(policy) | metrics.reward_metrics(*_rewards(policy, reference, beta))


def ranking(logps: SplitLogps) -> dict[str, float]:
    return metrics.both_rankings(*logps.ranks())


def predictions(policy: SplitLogps, reference: SplitLogps, beta: float, ids: Sequence[str]) -> list[dict[str, Any]]:
    """One row per prompt: the target's rank by mean and by summed log-prob, rewards, every candidate's scores."""
    rank_S, rank_sum_S = policy.ranks()
    values = metrics.reward_values(*_rewards(policy, reference, beta))
    kept = {metric.column: values[metric.name].tolist() for metric in metrics.REWARDS if metric.column}
    kept["reward_correct"] = [bool(value) for value in kept["reward_correct"]]
    return [
        {
            "id": ids[row],
            "rank": int(rank_S[row]),
            "rank_sum": int(rank_sum_S[row]),
            **{column: value[row] for column, value in kept.items()},
            "scores": [round(float(value), 6) for value in policy.mean_logp_SC[row][policy.mask_SC[row]]],
        }
        for row in range(len(ids))
    ]


def _rewards(policy: SplitLogps, reference: SplitLogps, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    change_SC = policy.logp_SC - reference.logp_SC
    return beta * change_SC, policy.mask_SC, change_SC[:, 0]
