"""The one place that orders prompts and makes rectangles of them, the same after an interruption as without it.

Suffixes: B prompts of a batch, C candidates (column 0 is the chosen one), P prompt tokens, T response tokens,
R = B C responses.
"""

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from massdpo.data.tokens import TokenizedExample
from massdpo.store import keyed_seed
from massdpo.tensors import Batch


def in_order(rows: int, *key: int | str) -> list[int]:
    """The order in which an epoch sees the rows, decided by the key alone."""
    return np.random.default_rng(keyed_seed("order", *key)).permutation(rows).tolist()


def by_length(examples: Sequence[TokenizedExample], size: int) -> list[list[int]]:
    """Row numbers in batches of prompts of similar length, so that there is little padding."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].prompt_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def micro_batches(prompts: int, world: int, size: int) -> int:
    """Batches per process when `prompts` prompts are shared among `world` processes; the same in each."""
    return math.ceil(math.ceil(prompts / world) / size)


def batches(
    examples: Sequence[TokenizedExample],
    steps: Sequence[Sequence[int]],
    options: DictConfig,
    pad_id: int,
    accelerator: Accelerator,
) -> Iterator[Batch]:
    """The batches of this process, step by step. Every process has as many; a prompt without weight fills the gaps."""
    found: list[list[int]] = []
    for rows in steps:
        own = list(rows[accelerator.process_index :: accelerator.num_processes])
        micro = micro_batches(len(rows), accelerator.num_processes, options.batch_size)
        for number in range(micro):
            found.append(own[number * options.batch_size : (number + 1) * options.batch_size] or [rows[0]])
    loader: DataLoader[Any] = DataLoader(
        Numbered(examples),
        batch_sampler=found,
        collate_fn=partial(collate, pad_id=pad_id),
        num_workers=options.workers,
        worker_init_fn=_outlive_signals,
    )
    return iter(loader)


def _outlive_signals(worker: int) -> None:
    """A terminal or cluster signals every process, but the batches up to the next checkpoint are still needed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Numbered(Dataset[tuple[int, TokenizedExample]]):
    """Rows with their numbers, as `collate` wants them."""

    rows: Sequence[TokenizedExample]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[int, TokenizedExample]:
        return row, self.rows[row]


def real(batch: Batch, rows: Sequence[int], number: int, size: int, accelerator: Accelerator) -> Tensor:
    """1 for this process's own prompts, 0 for the fillers that keep processes in step."""
    own = len(rows[accelerator.process_index :: accelerator.num_processes])
    count = max(0, min(size, own - number * size))
    return (torch.arange(len(batch.ids), device=accelerator.device) < count).float()


def collate(rows: Sequence[tuple[int, TokenizedExample]], pad_id: int) -> Batch:
    """Pad (row number in the split, example) pairs on the right to the rectangles of one Batch."""
    examples = [example for _, example in rows]
    prompt_ids_BP, prompt_mask_BP = _padded([example.prompt_ids for example in examples], pad_id)
    width = max(len(example.response_ids) for example in examples)
    slates = [example.response_ids + [[]] * (width - len(example.response_ids)) for example in examples]
    response_ids_RT, response_mask_RT = _padded(list(chain.from_iterable(slates)), pad_id)  # R = B C
    return Batch(
        ids=[example.id for example in examples],
        index_B=torch.tensor([row for row, _ in rows]),
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=prompt_mask_BP,
        response_ids_BCT=response_ids_RT.view(len(examples), width, -1),
        response_mask_BCT=response_mask_RT.view(len(examples), width, -1),
    )


def _padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one rectangle, and a mask of where they are in it."""
    length = np.array([len(row) for row in rows])
    mask = np.arange(length.max())[None] < length[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, length.sum())
    return torch.from_numpy(ids), torch.from_numpy(mask)
