"""What preference training remembers of each prompt between steps: its picks, and, for a shortlist, its last scores.

Suffixes: S prompts of the training split, B prompts of a batch, N pool negatives, K picked, M shortlisted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from massdpo.data.tokens import TokenizedExample
from massdpo.tensors import Batch, Picks, PoolStatistics

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
        }
        if screen is not None:
            self.state["advantage_SN"] = torch.zeros(len(rows), widest)  # s = r - r_0, as last seen
        self._unread: list[tuple[Tensor, Picks]] = []
        self._own: list[Tensor] = []  # rows that this process alone knows, till shared

    def picks(self, batch: Batch) -> Picks:
        """The batch's picks as they were stored, on its device."""
        names = {"index_BK": "index_SK", "mask_BK": "mask_SK"} | {f"{name}_BK": f"{name}_SK" for name in CARRIED}
        found: dict[str, Any] = {
            name: self.state[key][batch.index_B] for name, key in names.items() if key in self.state
        }
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

    def note(self, batch: Batch, picks: Picks) -> None:
        """Picks of this process's prompts, read only when they are shared: each look at them waits for the device."""
        self._unread.append((batch.index_B, picks))
        self._own.append(batch.index_B)

    def shortlist(self, batch: Batch, ref_logp_BC: Tensor) -> Batch:
        """The batch with the `screen` negatives of each prompt whose s was last the largest; by default, with all.

        One never scored counts as at the start, where s = 0, so that those that training has pushed down make room;
        among equals the likeliest per token under the reference come first.
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

    def saw(self, batch: Batch, pool: PoolStatistics) -> None:
        """Remember how the negatives of a shortlist were scored."""
        if batch.column_BC is None:  # there is none
            return
        self._own.append(batch.index_B)
        mask_BM = pool.mask_BN.cpu()
        rows_BM = batch.index_B[:, None].expand_as(mask_BM)
        index_BM = batch.column_BC[:, 1:].cpu() - 1
        self.state["advantage_SN"][rows_BM[mask_BM], index_BM[mask_BM]] = pool.advantage_BN.float().cpu()[mask_BM]

    def share(self) -> None:
        """Bring what all processes know together: done before it is saved, at an epoch's end too."""
        for rows_B, picks in self._unread:
            self.store(rows_B, picks)
        rows_S = torch.cat([torch.zeros(0, dtype=torch.int64), *self._own])
        keys = [key for key in ("index_SK", "mask_SK", "advantage_SN") if key in self.state]
        for others_S, values in gather_object([(rows_S, [self.state[key][rows_S] for key in keys])]):
            for key, value in zip(keys, values, strict=True):
                self.state[key][others_S] = value
        self._unread.clear()
        self._own.clear()
