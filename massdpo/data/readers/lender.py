"""Wrong options for a question that has too few of its own, borrowed from other questions of its split."""

import numpy as np

from massdpo.data.readers.questions import Question
from massdpo.data.text import normalise
from massdpo.errors import UserError


class Lender:
    """The distinct options of a split, to borrow from."""

    def __init__(self, questions: list[Question]):
        first: dict[str, str] = {}
        for question in questions:
            for option in question.options:
                first.setdefault(normalise(option), option)
        self.keys = list(first)
        self.texts = list(first.values())

    def borrow(self, count: int, taken: set[str], chance: np.random.Generator, split: str) -> list[str]:
        """`count` options, none of which says what one of `taken` does."""
        if count <= 0:
            return []
        if len(self.keys) < count + len(taken):
            raise UserError(
                f"the {split} split has {len(self.keys)} different options, too few for dataset.num_negatives: "
                "lower it, or set it to own"
            )
        draws = chance.choice(len(self.keys), size=count + len(taken), replace=False, shuffle=True)
        free = [place for place in draws if self.keys[place] not in taken]
        return [self.texts[place] for place in free[:count]]
