"""From texts to token ids, in the same way for every stage.

A sequence is `[BOS] prompt | " " response EOS`, without the space where either text brings one (`schema.joint`). The
two sides are tokenised apart, so that every response follows the very same prompt tokens. With a chat template the
prompt is a user message, its rendering brings BOS, and no space joins the two.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from massdpo.data import chat
from massdpo.data.schema import PreferenceExample, joint
from massdpo.errors import UserError, one_line

Ids = NDArray[np.int32]
CHUNK = 2048  # texts per call to the tokenizer: its Python lists are turned into arrays before they grow large
BOUNDARY = 48  # characters on each side of the joint between prompt and response that are looked at


class Encoder:
    """How a tokenizer encodes prompts and responses: BOS once before a prompt, EOS after every response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token: every response ends with it; set its eos_token")
        if chat_template and tokenizer.chat_template is None:
            raise UserError("chat_template=true, but the tokenizer has no chat template: set chat_template=false")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.bos = None if chat_template else tokenizer.bos_token_id

    def rendered(self, example: PreferenceExample, cut: int = 0) -> str:
        """The text before a response, without the `cut` oldest items of the history."""
        if not example.prompt.strip():
            raise UserError(f"{example.id}: the prompt is empty; give it at least one word")
        prompt = example.without_oldest(cut) if cut else example.prompt
        if not self.chat_template:
            return prompt
        messages: list[dict[str, Any]] = example.meta.get("messages") or [{"role": "user", "content": prompt}]
        return chat.rendered(self.tokenizer, messages, example.id)

    def marks(self) -> re.Pattern[str]:
        """The tokenizer's own markup: texts that it reads as special tokens wherever they are."""
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")

    def joined(self, prompt: str, response: str) -> str:
        """The response as it follows the prompt: with the space that joins the two, if there is one."""
        return response if self.chat_template else joint(prompt, response) + response

    def prompts(self, rendered: Sequence[str], examples: Sequence[PreferenceExample]) -> list[Ids]:
        """The ids of the examples' prompts, as `rendered` gave them."""
        before = np.array([] if self.bos is None else [self.bos], np.int32)
        prompts = []
        for example, ids in zip(examples, self._ids(rendered), strict=True):
            if not len(ids):
                raise UserError(f"{example.id}: the prompt is empty; give it at least one word")
            prompts.append(ids if ids[0] == self.bos else np.concatenate([before, ids]))
        return prompts

    def responses(self, texts: Sequence[str], owners: Sequence[str]) -> list[Ids]:
        """The ids of responses, as `joined` gave them, read as in the middle of a text: a beginning may differ.

        `owners` names an example that has each of them, for messages.
        """
        eos = np.array([self.tokenizer.eos_token_id], np.int32)
        before = dict(zip((":", "\n"), self._ids([":", "\n"]), strict=True))
        anchors = [self._anchor(text) for text in texts]
        inside = self._ids([anchor + text for anchor, text in zip(anchors, texts, strict=True)])
        responses = []
        for owner, anchor, text, ids in zip(owners, anchors, texts, inside, strict=True):
            start = before[anchor]
            if np.array_equal(ids[: len(start)], start):
                ids = ids[len(start) :]
            else:  # a tokenizer that merges the anchor and the text
                (ids,) = self._ids([text])
            if not text.strip() or not len(ids):
                raise UserError(f"{owner}: a response is empty; give it at least one word or leave it out")
            if eos in ids:
                raise UserError(
                    f"{owner}: the response {text.strip()[:60]!r} contains the end token "
                    f"{self.tokenizer.eos_token}, which is added to every response: leave it out of the data"
                )
            responses.append(np.concatenate([ids, eos]))
        return responses

    def _anchor(self, text: str) -> str:
        return ":" if text[:1].isspace() and not self.chat_template else "\n"

    def differ(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the last word of a prompt and the first word of a response are tokenised differently when joined."""
        ends, starts = (list(dict.fromkeys(words)) for words in zip(*pairs, strict=True)) if pairs else ([], [])
        left = dict(zip(ends, self._ids(ends), strict=True))
        right = {start: ids[:-1] for start, ids in zip(starts, self.responses(starts, starts), strict=True)}
        together = self._ids([end + start for end, start in pairs])
        return [
            not np.array_equal(np.concatenate([left[end], right[start]]), ids)
            for (end, start), ids in zip(pairs, together, strict=True)
        ]

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without any special token that is not in the text itself."""
        chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
        return [ids for chunk in chunks for ids in self._encode(list(chunk))]

    def _encode(self, texts: list[str]) -> list[Ids]:
        try:
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
        except Exception as error:  # whatever tokenizers raise, as for a text that needs the unknown token they lack
            raise UserError(
                f"the tokenizer fails on a text of the data ({one_line(error)}): use another one"
            ) from error
        return [np.array(ids, np.int32) for ids in encoded["input_ids"]]


def last_word(text: str) -> str:
    """The last word with the space after it; a long word is cut: what is further away hardly affects the joint."""
    end = text[-BOUNDARY:]
    word = end.rstrip()
    return end[len(word) - len(word.rsplit(maxsplit=1)[-1]) :] if word else end


def first_word(text: str) -> str:
    """The first word with the space before it; a long word is cut."""
    word = text.lstrip()
    return text[: len(text) - len(word)] + word[:BOUNDARY].split(maxsplit=1)[0] if word else text
