"""What every dataset becomes: prompts with one chosen response and a pool of negatives."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from massdpo.errors import UserError


@dataclass(frozen=True)
class PreferenceExample:
    """One prompt, its chosen response and the pool of negatives to select from.

    Texts are kept as they came: the tokeniser puts a space between prompt and response where there is none (`joint`).
    Of a prompt that is too long, the oldest items of its `history` may be cut; they are in the prompt joined by ", ",
    from character `history_start` on. A prompt that cannot be cut has an empty history.
    """

    id: str  # unique within the dataset, `split/number`
    prompt: str
    chosen: str
    pool: tuple[str, ...]  # the negatives, without the chosen response
    candidates: tuple[str, ...]  # the slate: chosen and pool in the order in which they are shown or ranked
    history: tuple[str, ...] = ()  # oldest first
    history_start: int = 0
    meta: dict[str, Any] = field(default_factory=dict)  # json-able: the user, the number of own options, ...
    where: str = field(default="", compare=False)  # file and line that it was read from, for messages

    def __post_init__(self) -> None:
        """Raises UserError where the slate does not consist of the chosen response and the pool."""
        if set(self.candidates) != {self.chosen, *self.pool}:
            raise UserError(f"{self.where or self.id}: candidates must be the chosen response and the pool")

    def without_oldest(self, count: int) -> str:
        """The prompt with the `count` oldest items of the history left out."""
        joined = ", ".join(self.history)
        rest = self.prompt[self.history_start + len(joined) :]
        return self.prompt[: self.history_start] + ", ".join(self.history[count:]) + rest


def joint(prompt: str, response: str) -> str:
    """What goes between a prompt and a response in plain text: a space, unless either brings one of its own."""
    return "" if prompt[-1:].isspace() or response[:1].isspace() else " "


@dataclass(frozen=True)
class Splits:
    """A prepared dataset: three sequences of examples and what happened on the way.

    `report` counts what was left out or changed, and why (flat, json-able); `digest`, which `prepare` sets, changes
    whenever any example does. With a `catalogue`, each test target is ranked against all of its titles except those
    whose places are in the test example's `meta["met"]`.
    """

    train: Sequence[PreferenceExample]
    val: Sequence[PreferenceExample]
    test: Sequence[PreferenceExample]
    report: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    catalogue: tuple[str, ...] = ()
