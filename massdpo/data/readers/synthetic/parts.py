"""What both worlds share: lists of words, splits of rows, ranges of options."""

from collections.abc import Iterator
from dataclasses import replace

from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError


def word_list(text: str) -> list[str]:
    return text.split()


def split_off(sizes: dict[str, int], rows: Iterator[PreferenceExample]) -> Splits:
    """Cut test, val and train off the rows, in this order, so that a larger training split changes no other."""
    parts = {split: [next(rows) for _ in range(sizes[split])] for split in ("test", "val", "train")}
    named = {
        split: [replace(row, id=f"{split}/{number}") for number, row in enumerate(part)]
        for split, part in parts.items()
    }
    return Splits(named["train"], named["val"], named["test"])


def check_between(options: object, **bounds: tuple[float, float]) -> None:
    """Refuse options of a dataset that are outside their bounds."""
    for name, (low, high) in bounds.items():
        if not low <= (value := getattr(options, name)) <= high:
            raise UserError(f"dataset.{name}={value} is not allowed: it must be between {low:g} and {high:g}")
