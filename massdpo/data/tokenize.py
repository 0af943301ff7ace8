"""The one tokeniser and collator, for SFT, preference training, scoring and generation alike.

Shapes, as in `massdpo.batch`: B prompts, C candidates (column 0 the chosen one), P prompt tokens, T response tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

import massdpo
from massdpo.batch import Batch
from massdpo.data.encode import Encoder, last_word
from massdpo.data.ragged import Ragged
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.store import Cache, digest, write_json

# tokens are made anew when the code that makes them changes
CODE = [Path(__file__).parent / f"{name}.py" for name in ("encode", "ragged", "tokenize")]
UNPACKED = 1 << 16  # responses that are kept as lists: many rows share them


@dataclass(frozen=True)
class TokenizedExample:
    """One prompt and its candidates as token ids: the chosen response first, then the pool in its own order."""

    id: str
    prompt_ids: list[int]
    response_ids: list[list[int]]


class TokenizedSplit(Sequence[TokenizedExample]):
    """A tokenised split: each distinct response is held once, everything in flat int32 arrays.

    `report` counts what happened (flat, json-able); `warnings` says in plain lines what a user should know of it.
    """

    def __init__(
        self,
        ids: list[str],
        prompts: Ragged,
        responses: Ragged,
        candidates: Ragged,
        report: dict[str, int],
    ):
        self.ids = ids
        self.report = report
        self._prompts, self._responses, self._candidates = prompts, responses, candidates
        self._response = lru_cache(UNPACKED)(lambda text: responses[text].tolist())

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, row: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, row: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, row: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = range(len(self))[row]
        responses = [self._response(text) for text in self._candidates[number].tolist()]
        return TokenizedExample(self.ids[number], self._prompts[number].tolist(), responses)

    @property
    def warnings(self) -> list[str]:
        report = self.report
        texts = {
            "prompts_truncated": "of {examples} prompts lost the oldest part of their history to fit max_length "
            "({history_items_cut} items in all)",
            "boundary_differences": "of {examples} prompts have a response that would be tokenised otherwise together "
            "with its prompt: the model sees a joint it did not see in plain text",
            "chosen_tokens_in_pool": "of {examples} prompts have a negative with the chosen response's very tokens: "
            "it cannot be told from the chosen one",
        }
        return [f"{report[name]} {text.format(**report)}" for name, text in texts.items() if report[name]]

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files, ids and report as JSON."""
        self._prompts.save(folder, "prompts")
        self._responses.save(folder, "responses")
        self._candidates.save(folder, "candidates")
        write_json(folder / "about.json", {"report": self.report, "ids": self.ids})

    @classmethod
    def load(cls, folder: Path) -> "TokenizedSplit":
        """What `save` wrote; rows are read when they are asked for."""
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        arrays = (Ragged.load(folder, name) for name in ("prompts", "responses", "candidates"))
        return cls(about["ids"], *arrays, about["report"])


def tokenize_splits(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool, cache: Cache
) -> dict[str, TokenizedSplit]:
    """`train`, `val` and `test` as `tokenize_split` makes them, once for the same data, tokenizer and options."""
    key = digest(
        massdpo.__version__, splits.digest, tokenizer_key(tokenizer, chat_template), max_length, chat_template, *CODE
    )

    def tokens(name: str) -> TokenizedSplit:
        def build(folder: Path) -> None:
            tokenize_split(getattr(splits, name), tokenizer, max_length, chat_template).save(folder)

        return TokenizedSplit.load(cache.folder("tokens", f"{key}-{name}", build))

    return {name: tokens(name) for name in ("train", "val", "test")}


def tokenizer_key(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[Any]:
    """Everything of a tokenizer that decides which ids a text becomes (json-able)."""
    template = tokenizer.chat_template if chat_template else None
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # as every call here leaves it: what an earlier call left behind decides nothing
    backend.no_truncation()
    return [backend.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id, template]


def tokenize_split(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
) -> TokenizedSplit:
    """Tokenise a split so that every prompt with any of its responses has at most `max_length` tokens.

    A prompt that is too long loses the oldest items of its history, as few as will do; the instruction and the
    candidates stay. The report counts that, and where tokenising prompt and response together gave other tokens.

    Raises:
        UserError: a prompt or response is empty, a response contains the tokenizer's end token, a prompt does not fit
            even without its history, or the tokenizer lacks the end token or chat template that is needed.
    """
    encoder = Encoder(tokenizer, chat_template)
    texts: dict[str, int] = {}  # every distinct response and its row in `responses`
    owner: list[str] = []  # the example that it was first seen in
    ids: list[str] = []
    places: list[NDArray[np.int32]] = []
    ends: list[str] = []

    def rendered() -> Iterator[str]:
        for example in examples:  # one pass: a split may be read from the disk
            text = encoder.rendered(example)
            ids.append(example.id)
            places.append(_places(example, texts, owner))
            ends.append(last_word(text))
            yield text

    prompts = list(encoder.prompts(rendered(), ids))
    candidates = Ragged.of(places)
    responses = Ragged.of(encoder.responses(list(texts), owner))
    longest_B = _longest(responses.lengths, candidates)

    long = [row for row, prompt in enumerate(prompts) if len(prompt) + longest_B[row] > max_length]
    to_cut = [examples[row] for row in long]
    cut = _history_to_cut(to_cut, encoder, max_length - longest_B[long])
    shortened = [encoder.rendered(*pair) for pair in zip(to_cut, cut, strict=True)]
    names = [example.id for example in to_cut]
    for row, example, text, prompt in zip(long, to_cut, shortened, encoder.prompts(shortened, names), strict=True):
        if len(prompt) + longest_B[row] > max_length:
            raise UserError(_too_long(example, len(prompt), int(longest_B[row]), max_length))
        prompts[row], ends[row] = prompt, last_word(text)

    kept = Ragged.of(prompts)
    report = {
        "examples": len(ids),
        "prompts_truncated": len(long),
        "history_items_cut": sum(cut),
        "boundary_differences": encoder.boundary_differences(ends, list(texts), candidates),
        "chosen_tokens_in_pool": _chosen_in_pool(responses, candidates),
        "longest_prompt": int(kept.lengths.max(initial=0)),
        "longest_response": int(longest_B.max(initial=0)),
        "longest_total": int((kept.lengths + longest_B).max(initial=0)),
        "prompt_tokens": int(kept.lengths.sum()),
        "response_tokens": int(responses.lengths[candidates.flat].sum()),
    }
    return TokenizedSplit(ids, kept, responses, candidates, report)


def collate(rows: Sequence[tuple[int, TokenizedExample]], pad_id: int) -> Batch:
    """Pad (row number in the split, example) pairs on the right to the rectangles of one Batch."""
    examples = [example for _, example in rows]
    prompt_ids_BP, prompt_mask_BP = _padded([example.prompt_ids for example in examples], pad_id)
    width = max(len(example.response_ids) for example in examples)
    slates = [example.response_ids + [[]] * (width - len(example.response_ids)) for example in examples]
    response_ids_XT, response_mask_XT = _padded(list(chain.from_iterable(slates)), pad_id)
    return Batch(
        ids=[example.id for example in examples],
        index_B=torch.tensor([row for row, _ in rows]),
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=prompt_mask_BP,
        response_ids_BCT=response_ids_XT.view(len(examples), width, -1),
        response_mask_BCT=response_mask_XT.view(len(examples), width, -1),
    )


def _padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one rectangle, and where it holds them."""
    length = np.array([len(row) for row in rows])
    mask = np.arange(length.max())[None] < length[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64, length.sum())
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _places(example: PreferenceExample, texts: dict[str, int], owner: list[str]) -> NDArray[np.int32]:
    """Where the example's responses stand among all distinct ones; new ones are added."""
    candidates = (example.chosen, *example.pool)
    for text in candidates:
        if text not in texts:
            texts[text] = len(texts)
            owner.append(example.id)
    return np.array([texts[text] for text in candidates], np.int32)


def _longest(lengths: np.ndarray, candidates: Ragged) -> np.ndarray:
    """Tokens of each row's longest response."""
    if not len(candidates):
        return np.zeros(0, np.int64)
    return np.maximum.reduceat(lengths[candidates.flat], candidates.offsets[:-1])


def _history_to_cut(examples: Sequence[PreferenceExample], encoder: Encoder, room_B: np.ndarray) -> list[int]:
    """The fewest oldest items to leave out so that each prompt fits its room, by bisection of all at once."""
    low = [0] * len(examples)
    high = [len(example.history) for example in examples]
    while rows := [row for row in range(len(examples)) if low[row] < high[row]]:
        middle = [(low[row] + high[row]) // 2 for row in rows]
        asked = [examples[row] for row in rows]
        rendered = [encoder.rendered(*pair) for pair in zip(asked, middle, strict=True)]
        names = [example.id for example in asked]
        for row, cut, prompt in zip(rows, middle, encoder.prompts(rendered, names), strict=True):
            if len(prompt) <= room_B[row]:
                high[row] = cut
            else:
                low[row] = cut + 1
    return high


def _too_long(example: PreferenceExample, prompt: int, response: int, max_length: int) -> str:
    if response >= max_length:
        return (
            f"{example.id}: its longest response has {response} tokens, but max_length={max_length} holds the "
            "prompt too: shorten the response or raise max_length"
        )
    without = "" if not example.history else " even without its history"
    return (
        f"{example.id}: the prompt{without} ({prompt} tokens) and its longest response ({response}) exceed "
        f"max_length={max_length}: raise it to at least {prompt + response} (if the model allows) or shorten the prompt"
    )


def _chosen_in_pool(responses: Ragged, candidates: Ragged) -> int:
    """How many rows have a negative whose tokens are the chosen response's."""
    kinds: dict[bytes, int] = {}
    kind = np.array([kinds.setdefault(responses[row].tobytes(), row) for row in range(len(responses))], np.int64)
    flat = kind[candidates.flat]
    return sum(bool((flat[start + 1 : end] == flat[start]).any()) for start, end in pairwise(candidates.offsets))
