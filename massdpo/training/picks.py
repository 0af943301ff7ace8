"""What a selector is given besides scores, and `picks.jsonl`: which negatives a run trained on, and why.

The file has one line per prompt and epoch.

Suffixes: B prompts of a batch, C = 1 + N candidates (column 0 is the chosen one), K picked negatives.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from massdpo.data.schema import PreferenceExample
from massdpo.evaluation.logps import SplitLogps
from massdpo.store import keyed_seed
from massdpo.tensors import Batch, CandidateScores, Picks, PoolStatistics


class BatchPicks(NamedTuple):
    """The picks of a batch, and what is known about them: values per prompt `(B,)` or per pick `(B, K)`."""

    rows_B: Tensor  # of the split
    picks: Picks
    known: dict[str, Tensor]
    seen: tuple[Tensor, Tensor] | None = None  # where only a shortlist was scored: which negatives, and their s

    def on_cpu(self) -> "BatchPicks":
        known = {name: value.cpu() for name, value in self.known.items()}
        seen = None if self.seen is None else (self.seen[0].cpu(), self.seen[1].cpu())
        return BatchPicks(self.rows_B, self.picks.to("cpu"), known, seen)


def reasons(pool: PoolStatistics, picks: Picks) -> dict[str, Tensor]:
    """What a selector that looks at scores saw in its picks: rank in the pool by reward, reward, p = softmax(s)."""
    rewards_BC = pool.rewards_BC
    negatives_BN = rewards_BC[:, 1:].masked_fill(~pool.mask_BN, -torch.inf)
    place_BN = negatives_BN.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
    values_BN = {"pool_rank": place_BN, "reward": negatives_BN, "p": negatives_BN.softmax(-1)}
    known = {name: value_BN.gather(1, picks.index_BK) for name, value_BN in values_BN.items()}
    known |= {} if picks.gains_BK is None else {"gain": picks.gains_BK}
    whole = {"logdet": "logdet", "certificate": "certified_ratio"}
    known |= {name: picks.info[said] for name, said in whole.items() if said in picks.info}
    return known | {"chosen_reward": rewards_BC[:, 0]}


def candidates_of(example: PreferenceExample, reference_C: Tensor) -> dict[str, Any]:
    """A prompt as `task=rank` takes it: its candidates are the chosen response, then the pool in its own order.

    `reference`: their summed log-probs under the SFT start, in that order, nats.
    """
    candidates = [example.chosen, *example.pool]
    prompt = example.meta.get("messages") or example.prompt
    return {"prompt": prompt, "candidates": candidates, "reference": rounded(reference_C[: len(candidates)])}


def rounded(values: Tensor) -> Any:
    return [round(value, 6) for value in values.tolist()]


def unscored(batch: Batch) -> CandidateScores:
    """What a selector that needs no scores is given: which candidates there are, and zeros."""
    zero_BCT = torch.zeros(batch.response_ids_BCT.shape, device=batch.response_ids_BCT.device)
    return CandidateScores(zero_BCT[..., 0], zero_BCT, batch.length_BC, batch.mask_BC)


def noise(batch: Batch, seed: int, draw: int) -> Tensor:
    """Uniform numbers of each negative, `(B, N)`, keyed by (seed, draw, example id): the same in every process."""
    place_BN = torch.where(batch.mask_BC, batch.place_BC, 0)[:, 1:].cpu().numpy() - 1  # -1 where there is none
    noise_BN = np.zeros(place_BN.shape)
    for row, name in enumerate(batch.ids):
        drawn_N = np.random.default_rng(keyed_seed("noise", seed, draw, name)).random(1 + place_BN.max())
        noise_BN[row] = np.where(place_BN[row] < 0, 0.0, drawn_N[place_BN[row]])
    return torch.from_numpy(noise_BN).to(batch.mask_BC.device)


class PickLog:
    """Writes `picks.jsonl` whenever a checkpoint is written, which records up to where the file is valid.

    What a run wrote after the checkpoint that it continues from is cut off, so no line is there twice. With
    `keep="last"` the file holds the picks of the newest epoch, with `all` those of every epoch.
    """

    def __init__(self, file: Path, examples: Sequence[PreferenceExample], reference: SplitLogps, keep: str):
        self.file, self.examples, self.reference, self.keep = file, examples, reference, keep

    def write(self, epoch: int, made: Mapping[int, tuple[BatchPicks, int]], valid: Tensor) -> None:
        """Write the picks of some rows, each with its place in a batch; updates `valid`, (newest epoch, bytes)."""
        newest, end = valid.tolist()
        end = end if self.keep == "all" or newest == epoch else 0
        text = "".join(self._line(epoch, row, *where) for row, where in made.items())
        with open(self.file, "ab") as file:
            file.truncate(min(end, file.tell()))
            file.write(text.encode())
            valid.copy_(torch.tensor([epoch, file.tell()]))

    def _line(self, epoch: int, row: int, made: BatchPicks, place: int) -> str:
        example, mask_K = self.examples[row], made.picks.mask_BK[place]
        index_K = made.picks.index_BK[place][mask_K].tolist()
        line: dict[str, Any] = {"id": example.id, "epoch": epoch} | candidates_of(example, self.reference.logp_SC[row])
        line["picks"] = [{"text": example.pool[index], "index": index} for index in index_K]
        for name, value in made.known.items():
            if value.dim() == 1:
                line[name] = round(value[place].item(), 6) + 0  # not -0.0
            else:
                for pick, number in zip(line["picks"], value[place][mask_K].tolist(), strict=True):
                    pick[name] = round(number, 6) + 0
        return json.dumps(line, ensure_ascii=False) + "\n"
