"""Texts to token ids, in the one way that every stage reads them.

A sequence is `[BOS] prompt | " " response EOS`, without the space where either text brings one (`schema.joint`). The
two sides are tokenised apart, so that every response follows the very same prompt tokens. With a chat template the
prompt is a user message, its rendering brings BOS, and no space joins the two.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, tee
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from massdpo.data import chat
from massdpo.data.ragged import Places, Ragged, Texts, appending
from massdpo.data.schema import PreferenceExample, joint
from massdpo.errors import UserError, one_line

Ids = NDArray[np.int32]
CHUNK = 2048  # texts per call to the tokenizer: its Python lists are turned into arrays before they grow large
BOUNDARY = 48  # characters on each side of the joint between prompt and response that are looked at


class Encoder:
    """One tokenizer's way with prompts and responses: BOS once before a prompt, EOS after every response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token: every response ends with it; set its eos_token")
        if chat_template and tokenizer.chat_template is None:
            raise UserError("chat_template=true, but the tokenizer has no chat template: set chat_template=false")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.bos = None if chat_template else tokenizer.bos_token_id

    def rendered(self, example: PreferenceExample, cut: int = 0) -> str:
        """The text before a response, with the `cut` oldest items of the history left out."""
        if not example.prompt.strip():
            raise UserError(f"{example.id}: the prompt is empty; give it at least one word")
        prompt = example.without_oldest(cut) if cut else example.prompt
        if not self.chat_template:
            return prompt
        messages: list[dict[str, Any]] = example.meta.get("messages") or [{"role": "user", "content": prompt}]
        return chat.rendered(self.tokenizer, messages, example.id)

    def marks(self) -> re.Pattern[str]:
        """The tokenizer's own markup: what it reads as special tokens wherever it stands in a text."""
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")

    def joined(self, rendered: str, response: str) -> str:
        """The response as it follows the rendered prompt: with the space that joins the two, if one does."""
        return response if self.chat_template else joint(rendered, response) + response

    def prompts(self, rendered: Iterable[str], owner: Sequence[PreferenceExample]) -> Iterator[Ids]:
        """The ids of prompts, each as `rendered` gave it; `owner` is the example of each, for messages."""
        before = np.array([] if self.bos is None else [self.bos], np.int32)
        for row, ids in enumerate(self._ids(rendered)):
            if not len(ids):
                raise UserError(f"{owner[row].id}: the prompt is empty; give it at least one word")
            yield ids if ids[0] == self.bos else np.concatenate([before, ids])

    def responses(self, texts: Iterable[str], owner: Callable[[int], str]) -> Iterator[Ids]:
        """The ids of responses, as `joined` gave them, in the middle of a text (a start may be tokenised differently).

        `owner` names the example that each was first seen in, for messages.
        """
        eos = np.array([self.tokenizer.eos_token_id], np.int32)
        before = dict(zip((":", "\n"), self._ids([":", "\n"]), strict=True))
        texts, ahead = tee(texts)
        inside = self._ids(self._anchor(text) + text for text in ahead)
        for row, (text, ids) in enumerate(zip(texts, inside, strict=True)):
            anchor = before[self._anchor(text)]
            if np.array_equal(ids[: len(anchor)], anchor):
                ids = ids[len(anchor) :]
            else:  # a tokenizer that joins the anchor and the text
                (ids,) = self._ids([text])
            if not text.strip() or not len(ids):
                raise UserError(f"{owner(row)}: a response is empty; give it at least one word or leave it out")
            if eos in ids:
                raise UserError(
                    f"{owner(row)}: the response {text.strip()[:60]!r} contains the end token "
                    f"{self.tokenizer.eos_token}, which is added to every response: leave it out of the data"
                )
            yield np.concatenate([ids, eos])

    def _anchor(self, text: str) -> str:
        return ":" if text[:1].isspace() and not self.chat_template else "\n"

    def boundary_differences(
        self, ends: Texts, end_B: NDArray[np.int32], texts: Texts, candidates: Ragged, scratch: Path
    ) -> int:
        """How many rows have a response that is tokenised differently when joined to its prompt.

        Only the words on both sides of the joint are looked at, each distinct pair once: row b's prompt ends in the
        `end_B[b]`-th of `ends`. What does not fit the memory goes to the folder `scratch`.
        """
        with appending(scratch, "starts", np.uint8) as add:
            place = Places(add)
            start_of_text = np.fromiter((place.of(first_word(text)) for text in texts), np.int32, len(texts))
        starts = Texts(scratch, "starts")

        def pairs() -> Iterator[tuple[NDArray[np.int64], Ragged]]:
            for rows, block in candidates.blocks():
                end_of_candidate = np.repeat(end_B[rows].astype(np.int64), block.lengths)
                yield end_of_candidate * len(starts) + start_of_text[block.flat], block

        known = np.unique(np.concatenate([np.zeros(0, np.int64), *(np.unique(pair) for pair, _ in pairs())]))
        left = Ragged.written(self._ids(ends), scratch, "left")
        right = Ragged.written((ids[:-1] for ids in self.responses(starts, starts.__getitem__)), scratch, "right")
        joint = self._ids(ends[pair // len(starts)] + starts[pair % len(starts)] for pair in known)
        apart = (np.concatenate([left[pair // len(starts)], right[pair % len(starts)]]) for pair in known)
        differ = (not np.array_equal(*both) for both in zip(joint, apart, strict=True))
        differs = np.fromiter(differ, bool, len(known))
        return sum(
            int(np.logical_or.reduceat(differs[np.searchsorted(known, pair)], block.offsets[:-1]).sum())
            for pair, block in pairs()
        )

    def _ids(self, texts: Iterable[str]) -> Iterator[Ids]:
        """Ids of each text, without any special token that is not in the text itself."""
        left, waiting = iter(texts), deque[Future[list[Ids]]]()
        with ThreadPoolExecutor(1) as worker:  # the tokenizer works outside Python's lock, a chunk behind the texts
            while chunk := list(islice(left, CHUNK)):
                waiting.append(worker.submit(self._encode, chunk))
                if len(waiting) > 1:
                    yield from waiting.popleft().result()
            for last in waiting:
                yield from last.result()

    def _encode(self, texts: list[str]) -> list[Ids]:
        try:
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
        except Exception as error:  # whatever tokenizers raise, as of a text that needs an unknown token they lack
            raise UserError(f"the tokenizer fails on a text of the data ({one_line(error)}): fix it") from error
        return [np.array(ids, np.int32) for ids in encoded["input_ids"]]


def last_word(text: str) -> str:
    """The last word with the space after it; a long one is cut: text further from the boundary hardly affects it."""
    end = text[-BOUNDARY:]
    word = end.rstrip()
    return end[len(word) - len(word.rsplit(maxsplit=1)[-1]) :] if word else end


def first_word(text: str) -> str:
    """The first word with the space before it, cut like a last one."""
    word = text.lstrip()
    return text[: len(text) - len(word)] + word[:BOUNDARY].split(maxsplit=1)[0] if word else text
