"""What preference training remembers of each prompt between steps: its picks, and, for a shortlist, its last scores.

Suffixes: S prompts of the training split, B prompts of a batch, N pool negatives, K picked, M shortlisted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from massdpo.data.tokens import TokenizedExample
from massdpo.tensors import Batch, Picks

CARRIED = ("log_inclusion", "beta_scale")  # of picks, for the loss that they will meet


class Remembered:
    """By row of the split, on the CPU; `state` is what a checkpoint saves."""

    def __init__(self, rows: Sequence[TokenizedExample], k: int | None, screen: int | None) -> None:
        widest = max(len(example.response_ids) for example in rows) - 1
        shape = len(rows), min(k or widest, widest)
        self.screen = screen
        self.state = {
            "index_SK": torch.zeros(shape, dtype=torch.int64),
            "mask_SK": torch.zeros(shape, dtype=torch.bool),
            "selected_in": torch.tensor(-1),  # the epoch of the newest selection over the whole split
            "written": torch.tensor([-1, 0]),  # up to where the log of picks is valid: its newest epoch, and its bytes
        }
        if screen is not None:
            self.state["advantage_SN"] = torch.zeros(len(rows), widest)  # s = r - r_0, as last seen

    def picks(self, batch: Batch) -> Picks:
        """The batch's picks as they were stored, on its device."""
        stored = [name for name in ("index", "mask", *CARRIED) if f"{name}_SK" in self.state]
        found: dict[str, Any] = {f"{name}_BK": self.state[f"{name}_SK"][batch.index_B] for name in stored}
        return Picks(**found).to(batch.prompt_ids_BP.device)

    def store(self, rows_B: Tensor, picks: Picks) -> None:
        width, picks = picks.index_BK.shape[1], picks.to("cpu")
        self.state["index_SK"][rows_B, :width] = picks.index_BK
        self.state["mask_SK"][rows_B] = False
        self.state["mask_SK"][rows_B, :width] = picks.mask_BK
        for name in CARRIED:
            if (value_BK := getattr(picks, f"{name}_BK")) is not None:
                shape = self.state["index_SK"].shape
                kept_SK = self.state.setdefault(f"{name}_SK", torch.zeros(shape, dtype=torch.float64))
                kept_SK[rows_B, :width] = value_BK.double()

    def shortlist(self, batch: Batch, ref_logp_BC: Tensor) -> Batch:
        """The batch with the `screen` negatives of each prompt whose s was last the largest; by default, with all.

        One never scored counts as s = 0, as at the start, so that those that training has pushed down make room; among
        equals the likeliest per token under the reference come first.
        """
        if self.screen is None:
            return batch
        mask_BN = batch.mask_BC[:, 1:]
        last_BN = self.state["advantage_SN"][batch.index_B, : mask_BN.shape[1]].to(mask_BN.device)
        last_BN = last_BN.masked_fill(~mask_BN, -torch.inf)
        order_BN = (ref_logp_BC / batch.length_BC.clamp(min=1))[:, 1:].argsort(dim=-1, descending=True)
        order_BN = order_BN.gather(1, last_BN.gather(1, order_BN).argsort(dim=-1, descending=True, stable=True))
        index_BM = order_BN[:, : self.screen]
        return batch.take(Picks(index_BM, mask_BN.gather(1, index_BM)))

    def saw(self, rows_B: Tensor, index_BM: Tensor, advantage_BM: Tensor) -> None:
        """Remember how the negatives of a shortlist were scored."""
        self.state["advantage_SN"][rows_B[:, None], index_BM] = advantage_BM.float()
