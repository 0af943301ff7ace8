"""The test split ranked against the whole catalogue: metrics on a few sampled candidates can rank policies differently.

(Krichene and Rendle, On Sampled Metrics for Item Recommendation, KDD 2020.) A target's rivals are all items but those
that its user met before it.

Suffixes: S prompts of a split, B prompts of a batch, I items of the catalogue.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from massdpo.data.schema import Splits
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.logps import SplitScorer
from massdpo.evaluation.metrics import both_rankings, target_ranks
from massdpo.model.trie import Catalogue
from massdpo.tensors import ScorerOutput

PROMPTS = 8  # behind which a part of the catalogue is fed at once, at most


@dataclass(frozen=True)
class CatalogueRanks:
    """The rank of each test target in the catalogue, by mean and by summed log-prob; 1 is best."""

    rank_S: Tensor  # int64
    rank_sum_S: Tensor
    items: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The ranking metrics under `catalogue/` (`_sum`: by summed log-prob), and what they cost."""
        values = both_rankings(self.rank_S, self.rank_sum_S) | {"items": self.items, "seconds": self.seconds}
        return {f"catalogue/{name}": value for name, value in values.items()}


@torch.no_grad()
def rank_catalogue(
    scorer: nn.Module,
    splits: Splits,
    rows: Sequence[TokenizedExample],
    title_ids: Sequence[Sequence[int]],
    score_split: SplitScorer,
) -> CatalogueRanks:
    """Rank the targets of the test split, whose tokens are `rows`, among all titles; every process gets all ranks."""
    started, accelerator = time.perf_counter(), score_split.accelerator
    catalogue = Catalogue.of(title_ids).to(accelerator.device)
    place_of = {title: place for place, title in enumerate(splits.catalogue)}
    row_of = {example.id: row for row, example in enumerate(splits.test)}  # `rows` may lack some that were too long
    parts = []
    few = replace(score_split, batch_size=min(score_split.batch_size, PROMPTS))
    for batch in few.batches(scorer, rows, "catalogue"):
        output: ScorerOutput = scorer(batch, catalogue=catalogue)
        examples = [splits.test[row_of[name]] for name in batch.ids]
        target_B = torch.tensor([place_of[example.chosen] for example in examples], device=accelerator.device)
        rival_BI = torch.ones_like(output.scores.mask_BC)
        for row, example in enumerate(examples):
            rival_BI[row, [*example.meta["met"], place_of[example.chosen]]] = False
        both = output.scores.mean_logp_BC, output.scores.logp_BC
        parts.append((batch.index_B, *(_ranks(score_BI, target_B, rival_BI).cpu() for score_BI in both)))
    parts = gather_object(parts)
    rank_S, rank_sum_S = torch.zeros(2, len(rows), dtype=torch.int64)
    for index_B, rank_B, rank_sum_B in parts:
        rank_S[index_B], rank_sum_S[index_B] = rank_B, rank_sum_B
    return CatalogueRanks(rank_S, rank_sum_S, len(title_ids), time.perf_counter() - started)


def _ranks(score_BI: Tensor, target_B: Tensor, rival_BI: Tensor) -> Tensor:
    target_B1 = score_BI.gather(1, target_B[:, None])
    mask_BC = torch.nn.functional.pad(rival_BI, (1, 0), value=True)
    return target_ranks(torch.cat([target_B1, score_BI], dim=1), mask_BC)
