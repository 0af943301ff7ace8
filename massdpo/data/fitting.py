"""Rows that are too long for the model lose the oldest items of their history. If that is not enough, the user chooses:
the run stops and names them, they are left out, or they are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from massdpo.data.encode import Encoder, Ids
from massdpo.data.schema import PreferenceExample
from massdpo.errors import UserError

NAMED = 5  # rows that a message names


def history_to_cut(examples: Sequence[PreferenceExample], encoder: Encoder, room: Sequence[int]) -> list[int]:
    """The fewest oldest items to leave out so that each prompt fits its room, by bisection of all prompts at once.

    A prompt that does not fit even so loses its whole history.
    """
    low = [0] * len(examples)
    high = [len(example.history) for example in examples]
    while rows := [row for row in range(len(examples)) if low[row] < high[row]]:
        middle = [(low[row] + high[row]) // 2 for row in rows]
        asked = [examples[row] for row in rows]
        rendered = [encoder.rendered(*pair) for pair in zip(asked, middle, strict=True)]
        for row, cut, prompt in zip(rows, middle, encoder.prompts(rendered, asked), strict=True):
            if len(prompt) <= room[row]:
                high[row] = cut
            else:
                low[row] = cut + 1
    return high


@dataclass
class TooLong:
    """The rows that exceed `max_length` without their history: the first few by file and line, and how many."""

    max_length: int
    count: int = 0
    needed: int = 0  # tokens of the longest
    places: list[str] = field(default_factory=list)

    def add(self, example: PreferenceExample, prompt: int, longest: int) -> None:
        self.count += 1
        self.needed = max(self.needed, prompt + longest)
        if len(self.places) < NAMED:
            self.places.append(f"{example.where or example.id} ({prompt} + {longest} tokens)")

    def named(self, rows: int) -> str:
        more = f" and {self.count - len(self.places)} more" if self.count > len(self.places) else ""
        return f"{self.count} of {rows} rows, {', '.join(self.places)}{more}"

    def refusal(self, rows: int) -> UserError:
        first = self.places[0].rpartition(" (")[0]
        return UserError(
            f"{first}: prompt (without its history) and longest response exceed max_length={self.max_length}: "
            f"raise it to at least {self.needed} (if the model allows), shorten them, or set dataset.long_rows=skip or "
            f"truncate; too long are {self.named(rows)}"
        )


def truncated_response(ids: Ids, length: int) -> Ids:
    """A response without its end where it is longer than `length`; EOS stays."""
    return ids if len(ids) <= length else np.concatenate([ids[: length - 1], ids[-1:]])


def truncated_prompt(ids: Ids, length: int, bos: int | None) -> Ids:
    """A prompt without its beginning where it is longer than `length`; BOS stays if it has one."""
    start = ids[:1] if len(ids) > length and ids[0] == bos else ids[:0]
    return np.concatenate([start, ids[len(start) :][-(length - len(start)) :]])
