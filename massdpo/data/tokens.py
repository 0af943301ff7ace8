"""Tokenised examples: the same for SFT, preference training, scoring and generation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from massdpo.data.ragged import Ragged, Texts
from massdpo.data.stored import Lazy, Subset
from massdpo.store import write_json

T = TypeVar("T")

UNPACKED = 1 << 16  # responses that are kept as lists: many rows share them


@dataclass(frozen=True)
class TokenizedExample:
    """One prompt and its candidates as token ids: the chosen response first, then the pool in its own order."""

    id: str
    prompt_ids: list[int]
    response_ids: list[list[int]]


class TokenizedSplit(Lazy[TokenizedExample]):
    """A tokenised split: each distinct response is held once, everything in files that are mapped.

    `report` counts what happened (flat, json-able); `warnings` says in plain lines what a user should know of it.
    """

    def __init__(
        self,
        ids: Sequence[str],
        prompts: Ragged,
        responses: Ragged,
        candidates: Ragged,  # of each example, the rows of `responses`
        report: dict[str, int],
        notes: Sequence[str] = (),
        kept: NDArray[np.int64] | None = None,
    ):
        self.ids = ids
        self.report = report
        self.notes = notes  # what became of rows that are too long
        self.kept = kept  # the examples that the rows are, where some were left out
        self._prompts, self._responses, self._candidates = prompts, responses, candidates
        self._response = lru_cache(UNPACKED)(lambda row: responses[row].tolist())

    def __len__(self) -> int:
        return len(self.ids)

    def _at(self, row: int) -> TokenizedExample:
        responses = [self._response(text) for text in self._candidates[row].tolist()]
        return TokenizedExample(self.ids[row], self._prompts[row].tolist(), responses)

    def rows_of(self, examples: Sequence[T]) -> Sequence[T]:
        """Those of the examples that were not left out."""
        return examples if self.kept is None else Subset(examples, self.kept)

    @property
    def warnings(self) -> list[str]:
        report = self.report
        texts = {
            "prompts_truncated": "of {examples} prompts lost the oldest part of their history to fit max_length "
            "({history_items_cut} items in all)",
            "boundary_differences": "of {examples} prompts have a response that is tokenised differently when joined "
            "to its prompt: the model sees a boundary that plain text does not have",
            "chosen_tokens_in_pool": "of {examples} prompts have a negative with exactly the chosen response's tokens: "
            "the two cannot be told apart",
            "prompts_with_markup": "of {examples} prompts contain the tokenizer's special tokens, read as such",
            "prompts_with_markup_twice": "of {examples} prompts contain special tokens of their own inside those of "
            "the chat template: drop one of the two (trainer.chat_template=false)",
        }
        return [
            *self.notes,
            *(f"{report[name]} {text.format(**report)}" for name, text in texts.items() if report[name]),
        ]

    def save(self, folder: Path) -> None:
        """Write what `tokenize_split` has not written to the folder already."""
        write_json(folder / "about.json", {"report": self.report, "notes": list(self.notes)})
        if self.kept is not None:
            np.save(folder / "kept.npy", self.kept)

    @classmethod
    def load(cls, folder: Path) -> "TokenizedSplit":
        """What `tokenize_split` and `save` wrote; rows are read when they are asked for."""
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        prompts, responses, candidates = (Ragged.load(folder, name) for name in ("prompts", "responses", "candidates"))
        kept = np.load(folder / "kept.npy") if (folder / "kept.npy").exists() else None
        return cls(Texts(folder, "ids"), prompts, responses, candidates, about["report"], about["notes"], kept)
