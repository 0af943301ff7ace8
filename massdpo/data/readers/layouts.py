"""A row of preferences, in whatever layout, as a prompt, chosen responses and rejected responses.

There are two kinds of layout: chosen and rejected responses have columns of their own, or there is a list of answers
with a score or rank for each. The prompt is a text or messages, or else the beginning that the responses share.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from massdpo.data.columns import Columns, shown
from massdpo.data.messages import Messages, as_text, checked_messages, dialogue, found, is_message
from massdpo.data.readers.wording import ALIGNED, NAMES, NEEDED, NUMBER_KEYS, SEVERAL, TEXT_KEYS
from massdpo.errors import UserError

LAST_TURN = re.compile(r"^[#* ]*(assistant|response|answer)[* ]*:", re.IGNORECASE | re.MULTILINE)

Response = str | Messages


@dataclass
class RowParts:
    """What a row contains. `messages` is the prompt as a conversation, where it is one."""

    prompt: str
    messages: Messages
    chosen: list[str]
    rejected: list[str]
    candidates: Any = None
    id: Any = None


class Layout:
    """Rows to preferences.

    `columns` gives the column, or columns, of a part (`NAMES`); other parts are found by their usual names. `ties`: an
    answer as good as the best is left out (drop) or rejected (keep); `min_margin`: an answer is rejected only if its
    score is that far below the best, or its rank that far behind. `counts` counts what was changed or left out.
    """

    def __init__(
        self, columns: Mapping[str, str | list[str]] | None = None, ties: str = "drop", min_margin: float = 0.0
    ):
        self.columns = Columns(NAMES, columns, several=SEVERAL, optional=("scores", "ranks"), aligned=ALIGNED)
        self.ties, self.min_margin = ties, min_margin
        self.counts: Counter[str] = Counter()

    def preference(self, where: str, row: Mapping[str, Any]) -> RowParts | None:
        """The row's preference; None where no answer is better than another.

        Raises:
            UserError: a part is missing (the message lists the columns), empty, or of the wrong kind.
        """
        parts = self.columns.parts(where, row)
        if {"chosen", "rejected"} <= parts.keys():
            chosen, rejected = (self._responses(where, name, parts[name]) for name in ("chosen", "rejected"))
        elif "answers" in parts:
            ordered = self._ordered(where, parts)
            if ordered is None:
                return None
            chosen, rejected = ordered
        else:
            raise self.columns.missing(where, row, "rejected" if "chosen" in parts else "chosen", NEEDED)
        prompt, messages = self._prompt(where, parts) if "prompt" in parts else ("", [])
        responses = [*chosen, *rejected]
        if "prompt" not in parts and not any(isinstance(each, list) for each in responses):
            prompt, responses = self._common_beginning(where, row, responses)
            messages = dialogue(prompt)
        prompt, messages, texts = self._joined(where, prompt, messages, responses)
        names = _labels("chosen", chosen) + _labels("rejected", rejected)
        for name, text in [("prompt", prompt), *zip(names, texts, strict=True)]:
            if not text.strip():
                raise UserError(f'{where}: "{name}" is empty; give it at least one word')
        pair = texts[: len(chosen)], texts[len(chosen) :]
        return RowParts(prompt, messages, *pair, parts.get("candidates"), parts.get("id"))

    def _responses(self, where: str, name: str, value: Any) -> list[Response]:
        """One response or several, each a text or a conversation that ends with it."""
        if is_message(value):
            return [checked_messages(where, name, value, self.counts)]
        if not isinstance(value, list):
            return [self._text(where, name, value)]
        if not value:
            raise UserError(f'{where}: "{name}" must be a text or a list of at least one text, found an empty list')
        if all(is_message(each) for each in value):
            messages = checked_messages(where, name, value, self.counts)
            if len(messages) > 1 and all(each["role"] == "assistant" for each in messages):
                return [[each] for each in messages]
            return [messages]
        return [
            checked_messages(where, label, each, self.counts)
            if isinstance(each, list) or is_message(each)
            else self._text(where, label, each)
            for label, each in zip(_labels(name, value), value, strict=True)
        ]

    def _text(self, where: str, name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.counts["numbers_as_text"] += 1
            return str(value)
        raise UserError(f'{where}: "{name}" must be a text or messages, found {found(value)}')

    def _prompt(self, where: str, parts: dict[str, Any]) -> tuple[str, Messages]:
        value = parts["prompt"]
        if isinstance(value, dict) and "messages" in value:
            value = value["messages"]
        system = self._text(where, "system", parts.get("system", ""))
        before = [{"role": "system", "content": system}] if system.strip() else []
        if isinstance(value, list) or is_message(value):
            messages = checked_messages(where, "prompt", value, self.counts)
            self.counts["inputs_beside_messages_ignored"] += bool(parts.get("context"))
            if messages[-1]["role"] == "assistant":
                raise UserError(
                    f'{where}: "prompt" ends with a message of the assistant: the assistant must be next to speak'
                )
            return "", messages if messages[0]["role"] == "system" else before + messages
        text = self._text(where, "prompt", value)
        if context := self._text(where, "input", parts.get("context", "")):
            text = f"{text}\n{context}"
        if not before:
            return text, dialogue(text)
        return "", [*before, *(dialogue(text) or [{"role": "user", "content": text}])]

    def _common_beginning(self, where: str, row: Mapping[str, Any], texts: list[Any]) -> tuple[str, list[Response]]:
        """Dialogues as texts: the prompt is what they share, up to where the assistant's last shared turn begins."""
        first, last = min(texts), max(texts)  # what these two share, all texts between them in order share too
        length = next((place for place in range(len(first)) if first[place] != last[place : place + 1]), len(first))
        shared = first[:length]
        turns = list(LAST_TURN.finditer(shared))
        if not turns:
            raise self.columns.missing(where, row, "prompt", NEEDED)
        end = turns[-1].end()
        return shared[:end], [text[end:].removeprefix(" ") for text in texts]

    def _joined(
        self, where: str, prompt: str, messages: Messages, responses: list[Response]
    ) -> tuple[str, Messages, list[str]]:
        """The prompt and the responses' texts: all messages before a conversation's last one belong to the prompt."""
        texts, beginnings = [], []
        for each in responses:
            if isinstance(each, list):
                if each[-1]["role"] != "assistant":
                    raise UserError(f'{where}: a response must be a message with the role "assistant", or end with one')
                beginnings.append(each[:-1])
            texts.append(each[-1]["content"] if isinstance(each, list) else each)
        if any(beginnings):
            shared = beginnings[0]
            if any(each != shared for each in beginnings) or len(beginnings) < len(responses):
                raise UserError(f'{where}: "chosen" and "rejected" must share every message but the last')
            asked = {message["content"].strip() for message in shared}
            if messages and shared not in (messages, messages[1:]):
                raise UserError(f'{where}: "chosen" and "rejected" do not begin with the messages of "prompt"')
            if prompt and prompt.strip() not in asked:
                raise UserError(f'{where}: "prompt" is not among the messages that "chosen" and "rejected" begin with')
            prompt, messages = "", messages or shared
        elif not prompt and not messages:
            raise UserError(f'{where}: no "prompt", neither as a field nor as the messages before the last')
        if not prompt:
            single = len(messages) == 1 and messages[0]["role"] == "user"
            prompt = messages[0]["content"] if single else as_text(messages)
        return prompt, messages, texts

    def _ordered(self, where: str, parts: dict[str, Any]) -> tuple[list[Response], list[Response]] | None:
        """The best of a list of answers, and the worse ones; None where no answer is worse."""
        answers = parts["answers"]
        if not isinstance(answers, list) or not answers:
            raise UserError(f'{where}: "answers" must be a list of answers, found {found(answers)}')
        rated = []
        for place, (answer, worth) in enumerate(zip(answers, self._worths(where, answers, parts), strict=True)):
            if isinstance(answer, dict):
                answer = next((answer[key] for key in TEXT_KEYS if answer.get(key) is not None), None)
            text = "" if answer is None else self._text(where, f"answers[{place}]", answer)
            if not text.strip() or worth is None:
                self.counts["answers_without_text_or_score"] += 1
            else:
                rated.append((text, worth))
        if not rated:
            raise UserError(f"{where}: none of the {len(answers)} answers has both a text and a score or rank")
        chosen, best = max(rated, key=lambda each: each[1])
        rejected = []
        for text, worth in rated:
            if text == chosen:
                continue
            if worth == best and self.ties == "drop":
                self.counts["tied_answers_dropped"] += 1
            elif best - worth < self.min_margin:
                self.counts["answers_within_margin_dropped"] += 1
            else:
                rejected.append(text)
        if not rejected:
            self.counts["rows_without_a_worse_answer"] += 1
            return None
        return [chosen], list(rejected)

    def _worths(self, where: str, answers: list[Any], parts: dict[str, Any]) -> list[float | None]:
        """How good each answer is: its score, or its negated rank."""
        entries = [answer if isinstance(answer, dict) else {} for answer in answers]
        for part, sign in (("scores", 1), ("ranks", -1)):
            values = parts.get(part)
            if values is None and any(entries):
                asked = self.columns.given.get(part)
                keys = (asked,) if isinstance(asked, str) else NUMBER_KEYS[part]
                key = next((key for key in keys if any(entry.get(key) is not None for entry in entries)), None)
                values = None if key is None else [entry.get(key) for entry in entries]
                self.columns.mapped |= {part: f"{key} of each answer"} if key else {}
            if values is not None:
                if not isinstance(values, list) or len(values) != len(answers):
                    raise UserError(f'{where}: "{part}" must be a list of {len(answers)} numbers, one for each answer')
                numbers = [_number(value) for value in values]
                return [None if number is None else sign * number for number in numbers]
        if any(entries):
            raise UserError(
                f"{where}: the answers have {shown(next(filter(None, entries)))}, but no score or rank; "
                "name it with dataset.columns={scores: KEY} or {ranks: KEY}"
            )
        self.counts["rows_ranked_by_order"] += 1
        return [-float(place) for place in range(len(answers))]


def _labels(name: str, values: list[Any]) -> list[str]:
    return [name] if len(values) == 1 else [f"{name}[{place}]" for place in range(len(values))]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
