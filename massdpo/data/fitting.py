"""Rows longer than the model reads lose the oldest of their history; if that is not enough, the user's choice decides:
the run stops and names them all, they are left out, or they are cut.

Suffixes: B examples of a split.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from massdpo.data.encode import Encoder
from massdpo.data.ragged import BLOCK, Ragged
from massdpo.data.schema import PreferenceExample
from massdpo.errors import UserError

Counts = NDArray[np.int64]

NAMED = 5  # rows that a line names


def shortened(
    examples: Sequence[PreferenceExample], rows: Counts, encoder: Encoder, longest_B: Counts, max_length: int
) -> Iterator[tuple[int, NDArray[np.int32], str, int]]:
    """The prompts of some rows with as few of the oldest items left out as will do: row, ids, text, how many those are.

    One that does not fit is without any history then.
    """
    for block in np.split(rows, range(BLOCK, len(rows), BLOCK)):
        asked = [examples[row] for row in block.tolist()]
        cut = _history_to_cut(asked, encoder, max_length - longest_B[block])
        texts = [encoder.rendered(*pair) for pair in zip(asked, cut, strict=True)]
        yield from zip(block.tolist(), encoder.prompts(texts, asked), texts, cut, strict=True)


def _history_to_cut(examples: Sequence[PreferenceExample], encoder: Encoder, room_B: Counts) -> list[int]:
    """The fewest oldest items to leave out so that each prompt fits its room, by bisection of all at once."""
    low = [0] * len(examples)
    high = [len(example.history) for example in examples]
    while rows := [row for row in range(len(examples)) if low[row] < high[row]]:
        middle = [(low[row] + high[row]) // 2 for row in rows]
        asked = [examples[row] for row in rows]
        rendered = [encoder.rendered(*pair) for pair in zip(asked, middle, strict=True)]
        for row, cut, prompt in zip(rows, middle, encoder.prompts(rendered, asked), strict=True):
            if len(prompt) <= room_B[row]:
                high[row] = cut
            else:
                low[row] = cut + 1
    return high


def named(examples: Sequence[PreferenceExample], rows: Counts, prompt_B: Counts, longest_B: Counts) -> str:
    """Rows by file and line, with the tokens of each one's prompt and longest response."""
    some = [examples[row] for row in rows[:NAMED].tolist()]
    places = [
        f"{example.where or example.id} ({prompt_B[row]} + {longest_B[row]} tokens)"
        for row, example in zip(rows.tolist(), some, strict=False)
    ]
    more = f" and {len(rows) - len(some)} more" if len(rows) > len(some) else ""
    return f"{len(rows)} of {len(examples)} rows, {', '.join(places)}{more}"


def refusal(first: PreferenceExample, told: str, max_length: int, needed: int) -> UserError:
    return UserError(
        f"{first.where or first.id}: prompt (without its history) and longest response exceed max_length={max_length}: "
        f"raise it to at least {needed} (if the model allows), shorten them, or set dataset.long_rows=skip or "
        f"truncate; too long are {told}"
    )


def truncated_responses(
    rows: Counts, candidates: Ragged, responses: Ragged, max_length: int, folder: Path
) -> tuple[Ragged, Ragged]:
    """Candidates and responses, written to `folder`, with which these rows have none longer than half of `max_length`.

    The end is cut off; EOS stays, and rows that share such a response and fit keep it whole.
    """
    half = max_length // 2
    place, cut, further = candidates.flat.copy(), dict[int, int](), list[NDArray[np.int32]]()
    for row in rows.tolist():
        for slot in range(candidates.offsets[row], candidates.offsets[row + 1]):
            whole = int(candidates.flat[slot])
            ids = responses[whole]
            if len(ids) > half:
                if whole not in cut:
                    cut[whole] = len(responses) + len(cut)
                    further.append(np.concatenate([ids[: half - 1], ids[-1:]]))
                place[slot] = cut[whole]
    fitting = Ragged(place, candidates.offsets)
    kept = map(responses.__getitem__, range(len(responses)))
    return (
        Ragged.written(map(fitting.__getitem__, range(len(fitting))), folder, "candidates"),
        Ragged.written(chain(kept, further), folder, "responses"),
    )


def truncated_prompt(ids: NDArray[np.int32], room: int, bos: int | None) -> NDArray[np.int32]:
    """The end of a prompt, with BOS if it has one."""
    start = ids[:1] if len(ids) > room and ids[0] == bos else ids[:0]
    return np.concatenate([start, ids[len(start) :][-(room - len(start)) :]])
