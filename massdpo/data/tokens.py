"""Tokenised examples: the same for SFT, preference training, scoring and generation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from massdpo.data.stored import Lazy, Subset

T = TypeVar("T")

# The files of a tokenised split: a table with a record batch for every block of rows, and the report.
TOKENS, ABOUT = "tokens.arrow", "about.json"
IDS = pa.list_(pa.int32())
SCHEMA = pa.schema({"row": pa.int64(), "id": pa.string(), "prompt": IDS, "responses": pa.list_(IDS)})


@dataclass(frozen=True)
class TokenizedExample:
    """One prompt and its candidates as token ids: the chosen response first, then the pool in its own order."""

    id: str
    prompt_ids: list[int]
    response_ids: list[list[int]]


class TokenizedSplit(Lazy[TokenizedExample]):
    """What `tokenize_split` wrote into a folder. The file is mapped, and a row is read when it is asked for.

    `report` counts what happened (flat, json-able); `warnings` says in plain lines what a user should know of it.
    """

    def __init__(self, folder: Path):
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.report: dict[str, int] = about["report"]
        self.notes: list[str] = about["notes"]  # what became of rows that are too long
        table = pa.ipc.open_file(pa.memory_map(str(folder / TOKENS))).read_all()
        self._row, self._id, self._prompt, self._responses = table.columns

    def __len__(self) -> int:
        return len(self._id)

    def _at(self, row: int) -> TokenizedExample:
        responses = self._responses[row].values
        flat, ends = responses.values.to_numpy(), responses.offsets.to_pylist()
        ids = [flat[start:end].tolist() for start, end in pairwise(ends)]
        return TokenizedExample(self._id[row].as_py(), self._prompt[row].values.to_numpy().tolist(), ids)

    def rows_of(self, examples: Sequence[T]) -> Sequence[T]:
        """Those of the examples that were not left out."""
        return examples if len(examples) == len(self) else Subset(examples, self._row.to_numpy())

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
