"""The one tokeniser and collator, for SFT, preference training, scoring and generation alike.

A sequence is `[BOS] prompt | " " response EOS`. The two sides are tokenised apart, so that every response follows the
very same prompt tokens; the report counts where tokenising them together would give other tokens. With a chat template
the prompt is a user message, its rendering brings BOS, and no space joins the two.
Shapes, as in `massdpo.batch`: B prompts, C candidates (column 0 the chosen one), P prompt tokens, T response tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypeVar, overload

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from massdpo.batch import Batch
from massdpo.data.schema import PreferenceExample
from massdpo.errors import UserError

T = TypeVar("T")
CHUNK = 4096  # texts a call to the tokenizer: its Python lists are turned into arrays before they grow large
BOUNDARY = 48  # characters on each side of the joint between prompt and response that are looked at


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
        prompts: "Ragged",
        responses: "Ragged",
        candidates: "Ragged",
        report: dict[str, int],
    ):
        self.ids = ids
        self.report = report
        self._prompts, self._responses, self._candidates = prompts, responses, candidates

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
        responses = [self._responses[text].tolist() for text in self._candidates[number]]
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


class Ragged:
    """Rows of different lengths in one flat int32 array."""

    def __init__(self, rows: Iterable[np.ndarray]):
        parts = list(rows)
        self.flat = np.concatenate([np.zeros(0, np.int32), *parts])
        self.offsets = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenize_split(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
) -> TokenizedSplit:
    """Tokenise a split so that every prompt with any of its responses has at most `max_length` tokens.

    A prompt that is too long loses the oldest items of its history, as few as will do; the instruction and the
    candidates stay.

    Raises:
        UserError: a prompt or response is empty, a response contains the tokenizer's end token, a prompt does not fit
            even without its history, or the tokenizer lacks the end token or chat template that is needed.
    """
    encoder = _Encoder(tokenizer, chat_template)
    texts: dict[str, int] = {}  # every distinct response and its row in `responses`
    owner: list[str] = []  # the example that it was first seen in
    ids: list[str] = []
    places: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    ends: list[str] = []
    for chunk in _chunks(examples):  # one pass: a split may be read from the disk
        ids += [example.id for example in chunk]
        places += [_places(example, texts, owner) for example in chunk]
        rendered = [encoder.rendered(example) for example in chunk]
        prompts += encoder.prompts(chunk, rendered)
        ends += map(_last_word, rendered)
    candidates = Ragged(places)
    responses = Ragged(encoder.responses(list(texts), owner))
    longest_B = _longest(responses.lengths, candidates)

    long = [row for row, prompt in enumerate(prompts) if len(prompt) + longest_B[row] > max_length]
    to_cut = [examples[row] for row in long]
    cut = _history_to_cut(to_cut, encoder, max_length - longest_B[long])
    rendered = [encoder.rendered(*pair) for pair in zip(to_cut, cut, strict=True)]
    for row, example, text, prompt in zip(long, to_cut, rendered, encoder.prompts(to_cut, rendered), strict=True):
        if len(prompt) + longest_B[row] > max_length:
            raise UserError(_too_long(example, len(prompt), int(longest_B[row]), max_length))
        prompts[row], ends[row] = prompt, _last_word(text)

    kept = Ragged(prompts)
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
    shape_BCT = (
        len(examples),
        max(len(example.response_ids) for example in examples),
        max(len(response) for example in examples for response in example.response_ids),
    )
    prompt_ids_BP = np.full((len(examples), max(len(example.prompt_ids) for example in examples)), pad_id, np.int64)
    prompt_mask_BP = np.zeros(prompt_ids_BP.shape, bool)
    response_ids_BCT = np.full(shape_BCT, pad_id, np.int64)
    response_mask_BCT = np.zeros(shape_BCT, bool)
    for b, example in enumerate(examples):
        prompt_ids_BP[b, : len(example.prompt_ids)] = example.prompt_ids
        prompt_mask_BP[b, : len(example.prompt_ids)] = True
        for c, response in enumerate(example.response_ids):
            response_ids_BCT[b, c, : len(response)] = response
            response_mask_BCT[b, c, : len(response)] = True
    return Batch(
        ids=[example.id for example in examples],
        index_B=torch.tensor([row for row, _ in rows]),
        prompt_ids_BP=torch.from_numpy(prompt_ids_BP),
        prompt_mask_BP=torch.from_numpy(prompt_mask_BP),
        response_ids_BCT=torch.from_numpy(response_ids_BCT),
        response_mask_BCT=torch.from_numpy(response_mask_BCT),
    )


class _Encoder:
    """Texts to ids for one tokenizer: BOS once before a prompt, EOS after every response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token: every response ends with it; set its eos_token")
        if chat_template and tokenizer.chat_template is None:
            raise UserError("chat_template=true, but the tokenizer has no chat template: set chat_template=false")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.space = "" if chat_template else " "
        self.bos = None if chat_template else tokenizer.bos_token_id

    def prompts(self, examples: Sequence[PreferenceExample], rendered: Sequence[str]) -> Iterator[np.ndarray]:
        for example, ids in zip(examples, self._ids(rendered), strict=True):
            if not example.prompt.strip() or not len(ids):
                raise UserError(f"{example.id}: the prompt is empty; give it at least one word")
            yield ids if self.bos is None or ids[0] == self.bos else np.concatenate([[self.bos], ids]).astype(np.int32)

    def responses(self, texts: Sequence[str], owner: Sequence[str]) -> Iterator[np.ndarray]:
        """The responses' ids as they are in the middle of a text (some tokenizers treat a text's start otherwise)."""
        eos = self.tokenizer.eos_token_id
        anchor = "\n" if self.chat_template else ":"
        (before,) = self._ids([anchor])
        inside = self._ids(anchor + self.space + text for text in texts)
        for text, example, ids in zip(texts, owner, inside, strict=True):
            if np.array_equal(ids[: len(before)], before):
                ids = ids[len(before) :]
            else:  # a tokenizer that joins the anchor and the text
                (ids,) = self._ids([self.space + text])
            if not text.strip() or not len(ids):
                raise UserError(f"{example}: a response is empty; give it at least one word or leave it out")
            if eos in ids:
                raise UserError(
                    f"{example}: the response {text[:60]!r} contains the end token {self.tokenizer.eos_token}, "
                    "which is added to every response: leave it out of the data"
                )
            yield np.concatenate([ids, [eos]]).astype(np.int32)

    def boundary_differences(self, ends: Sequence[str], texts: Sequence[str], candidates: "Ragged") -> int:
        """How many rows have a response that is tokenised otherwise when joined to its prompt, which ends in `ends`.

        Only the words on both sides of the joint are looked at, each distinct pair once.
        """
        end_words, end_B = _distinct(ends)
        start_words, start_of_text = _distinct([_first_word(text) for text in texts])
        end_of_candidate = np.repeat(end_B, candidates.lengths)
        pairs, pair_of_candidate = np.unique(
            end_of_candidate * len(start_words) + start_of_text[candidates.flat], return_inverse=True
        )
        pair_words = [(end, start) for end, start in zip(*np.divmod(pairs, max(1, len(start_words))), strict=True)]
        joint = self._ids(end_words[end] + self.space + start_words[start] for end, start in pair_words)
        left = list(self._ids(end_words))
        right = [ids[:-1] for ids in self.responses(start_words, start_words)]
        differs = np.array(
            [
                not np.array_equal(ids, np.concatenate([left[end], right[start]]))
                for (end, start), ids in zip(pair_words, joint, strict=True)
            ],
            bool,
        )
        rows = np.repeat(np.arange(len(candidates)), candidates.lengths)
        return len(np.unique(rows[differs[pair_of_candidate]]))

    def rendered(self, example: PreferenceExample, cut: int = 0) -> str:
        """The text before a response, with the `cut` oldest items of the history left out."""
        prompt = example.without_oldest(cut) if cut else example.prompt
        if not self.chat_template:
            return prompt
        messages: list[dict[str, Any]] = example.meta.get("messages") or [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for chunk in _chunks(texts):
            encoded = self.tokenizer(
                chunk, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
            yield from (np.array(ids, np.int32) for ids in encoded["input_ids"])


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    left = iter(items)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def _places(example: PreferenceExample, texts: dict[str, int], owner: list[str]) -> np.ndarray:
    """Where the example's responses stand among all distinct ones; new ones are added."""
    candidates = (example.chosen, *example.pool)
    for text in candidates:
        if texts.setdefault(text, len(texts)) == len(owner):
            owner.append(example.id)
    return np.array([texts[text] for text in candidates], np.int32)


def _longest(lengths: np.ndarray, candidates: Ragged) -> np.ndarray:
    """Tokens of each row's longest response."""
    if not len(candidates):
        return np.zeros(0, np.int64)
    return np.maximum.reduceat(lengths[candidates.flat], candidates.offsets[:-1])


def _history_to_cut(examples: Sequence[PreferenceExample], encoder: _Encoder, room_B: np.ndarray) -> list[int]:
    """The fewest oldest items to leave out so that each prompt fits its room, by bisection of all at once."""
    low = [0] * len(examples)
    high = [len(example.history) for example in examples]
    while rows := [row for row in range(len(examples)) if low[row] < high[row]]:
        middle = [(low[row] + high[row]) // 2 for row in rows]
        asked = [examples[row] for row in rows]
        rendered = [encoder.rendered(*pair) for pair in zip(asked, middle, strict=True)]
        for row, cut, prompt in zip(rows, middle, encoder.prompts(asked, rendered), strict=True):
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


def _distinct(words: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct words, and for each given word its place among them."""
    place: dict[str, int] = {}
    place_B = np.array([place.setdefault(word, len(place)) for word in words], np.int64)
    return list(place), place_B


def _last_word(text: str) -> str:
    # a long word is cut: what is further from the joint hardly moves it
    return re.search(r"\S*\s*\Z", text[-BOUNDARY:]).group()  # type: ignore[union-attr]


def _first_word(text: str) -> str:
    return text[:BOUNDARY].split(maxsplit=1)[0] if text.strip() else text
