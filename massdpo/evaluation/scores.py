"""Score every candidate of a split, and turn scores into metrics.

Suffixes: S prompts of a split, B prompts of a batch, C = 1 + N candidates (column 0 is the chosen one).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from massdpo.console import progress
from massdpo.data.tokens import TokenizedExample, collate
from massdpo.evaluation import metrics
from massdpo.tensors import Batch, Scored


@dataclass(frozen=True)
class SplitScores:
    """Summed log-probs of each candidate of each prompt of a split, on the CPU, float32 nats."""

    logp_SC: Tensor
    length_SC: Tensor  # int64, tokens; 0 where a prompt has no such candidate

    @property
    def mask_SC(self) -> Tensor:
        return self.length_SC > 0

    @property
    def mean_logp_SC(self) -> Tensor:
        return self.logp_SC / self.length_SC.clamp(min=1)

    def save(self, file: Path) -> None:
        save_file({"logp_SC": self.logp_SC, "length_SC": self.length_SC}, file)

    @classmethod
    def load(cls, file: Path) -> "SplitScores":
        return cls(**load_file(file))


def batches_by_length(rows: Sequence[TokenizedExample], size: int) -> list[list[int]]:
    """Row numbers in batches of prompts of like length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].prompt_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def each_batch(
    scorer: nn.Module, rows: Sequence[TokenizedExample], accelerator: Accelerator, size: int, pad_id: int, what: str
) -> Iterator[Batch]:
    """The split's batches, in evaluation mode and without gradients; every process gets as many, of its own share."""
    batches = batches_by_length(rows, size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    rounds = -(-len(batches) // accelerator.num_processes)
    mine += [batches[-1]] * (rounds - len(mine))  # sharded weights need every process in every forward
    was_training = scorer.training
    scorer.eval()
    with torch.no_grad(), progress(rounds, what) as advance:
        for numbers in mine:
            yield collate([(row, rows[row]) for row in numbers], pad_id).to(accelerator.device)
            advance()
    scorer.train(was_training)


def score_split(
    scorer: nn.Module, rows: Sequence[TokenizedExample], accelerator: Accelerator, size: int, pad_id: int, what: str
) -> SplitScores:
    """Every candidate's summed log-prob under the policy, at the run's precision; every process gets the whole.

    The same batches give the same numbers to the last digit. Batches of another shape do not, as matrix products then
    sum in another order: a response of T tokens moves by about 0.1 sqrt(T) nats under bfloat16 and 5e-6 sqrt(T) in
    float32 (root mean square, 135M parameters). So far from 0, times beta, are rewards before the first step.
    """
    parts = []
    for batch in each_batch(scorer, rows, accelerator, size, pad_id, what):
        with accelerator.autocast():
            scored: Scored = scorer(batch)
        parts.append((batch.index_B.cpu(), scored.scores.logp_BC.float().cpu(), scored.scores.length_BC.cpu()))
    if accelerator.num_processes > 1:
        parts = gather_object(parts)
    width = max(logp_BC.shape[1] for _, logp_BC, _ in parts)
    logp_SC = torch.zeros(len(rows), width)
    length_SC = torch.zeros(len(rows), width, dtype=torch.int64)
    for index_B, logp_BC, length_BC in parts:
        logp_SC[index_B, : logp_BC.shape[1]] = logp_BC
        length_SC[index_B, : length_BC.shape[1]] = length_BC
    return SplitScores(logp_SC, length_SC)


def evaluate(policy: SplitScores, reference: SplitScores, beta: float) -> dict[str, float]:
    """Metrics over the whole pool, whatever was trained on: ranking by mean (`_sum`: summed) log-prob, rewards."""
    return ranking(policy) | metrics.reward_metrics(*_rewards(policy, reference, beta))


def ranking(scores: SplitScores) -> dict[str, float]:
    by_mean = metrics.ranking_metrics(metrics.target_ranks(scores.mean_logp_SC, scores.mask_SC))
    by_sum = metrics.ranking_metrics(metrics.target_ranks(scores.logp_SC, scores.mask_SC))
    return by_mean | {f"{name}_sum": value for name, value in by_sum.items()}


def predictions(policy: SplitScores, reference: SplitScores, beta: float, ids: Sequence[str]) -> list[dict[str, Any]]:
    """One row per prompt: the target's rank by mean and by summed log-prob, rewards, every candidate's scores."""
    rank_S = metrics.target_ranks(policy.mean_logp_SC, policy.mask_SC)
    rank_sum_S = metrics.target_ranks(policy.logp_SC, policy.mask_SC)
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


def _rewards(policy: SplitScores, reference: SplitScores, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    change_SC = policy.logp_SC - reference.logp_SC
    return beta * change_SC, policy.mask_SC, change_SC[:, 0]


Validate = Callable[[nn.Module], dict[str, float]]
