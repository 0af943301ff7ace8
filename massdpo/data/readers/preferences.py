"""Anyone's own preferences, from a file, a folder or the hub: rows of a prompt, chosen and rejected responses.

Rows go to the disk as they are read, so that memory holds a single number for each of them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from massdpo.data.messages import found
from massdpo.data.raw import SPLITS, BadRows, Source, ignored_note
from massdpo.data.readers.layouts import Layout, RowParts
from massdpo.data.readers.located import Located
from massdpo.data.readers.wording import NOTES
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.stored import NumberedSplit, StoredExamples, spooled
from massdpo.errors import UserError
from massdpo.store import keyed_seed


@dataclass(frozen=True, kw_only=True)
class Preferences(Located):
    """Preferences from `path` or `hub_id`, with validation and test rows of their own or held out by the seed.

    `raw.Source` reads `path`, `val_path` and `test_path`, and `layouts.Layout` reads the rows;
    `conf/dataset/preferences.yaml` says what each option does. A row may also have an `id` and `candidates`, the slate:
    chosen and rejected responses in the order shown. All rows of one prompt are held out together.

    Raises:
        UserError: a file is missing, empty or damaged; a row is not usable (file, line, and what is wrong), unless
            `bad_rows="skip"`; a split would be empty; the hub cannot be reached.
    """

    columns: Mapping[str, str | list[str]] | None = None
    outside: bool = False
    several_chosen: Literal["each", "error"] = "each"
    ties: Literal["drop", "keep"] = "drop"
    min_margin: float = 0.0
    strip: bool = False
    val_path: str | None = None
    test_path: str | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    bad_rows: Literal["error", "skip"] = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._layout()
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError("dataset.val_fraction + dataset.test_fraction must be below 1: no row is left for training")

    def _layout(self) -> Layout:
        return Layout(self.columns, self.ties, self.min_margin)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Where each split is read from; `val_path` and `test_path` replace the splits that `path` has."""
        main = self.source(self.outside)
        paths = {"val": self.val_path, "test": self.test_path}
        others = {split: Source(Path(path), self) for split, path in paths.items() if path}
        for split, source in others.items():
            if split not in source.splits and len(source.splits) > 1:
                names = ", ".join(source.found)
                raise UserError(f"dataset.{split}_path={source.place} has the splits {names}, but no {split!r}")
        return {split: main for split in main.splits} | others

    def files(self) -> list[Path]:
        """The files that `load` reads: their content and the options decide the outcome."""
        return list(dict.fromkeys(file for source in self._sources.values() for file in source.files))

    def load(self) -> Splits:
        bad, layout, report = BadRows(self.bad_rows), self._layout(), dict[str, Any]()
        seen: dict[str, str] = {}
        given: dict[str, StoredExamples] = {}
        prompts: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        for split, source in self._sources.items():
            given[split], prompts[split] = spooled(self._examples(split, source, layout, bad, seen))
            if not len(given[split]):
                raise UserError(f"no usable row for the split {split!r}: at least one is needed")
        rows = self._held_out(prompts)
        parts = {split: NumberedSplit(given.get(split, given["train"]), rows[split], split) for split in SPLITS}
        trained_on = prompts["train"][rows["train"]]
        for split in ("val", "test"):
            asked = prompts.get(split, prompts["train"])[rows[split]]
            report[f"{split}_prompts_also_in_train"] = int(np.isin(asked, trained_on).sum())
        report |= layout.columns.report() | dict(+layout.counts) | bad.report()
        report["notes"] = self._notes(layout)
        return Splits(parts["train"], parts["val"], parts["test"], report)

    def _notes(self, layout: Layout) -> list[str]:
        """One line for each kind of thing that was changed or not used."""
        notes = [text.format(layout.counts[name]) for name, text in NOTES.items() if layout.counts[name]]
        columns = layout.columns.report()
        if ignored := [name.removeprefix("ignored_column_") for name in columns if name.startswith("ignored_column_")]:
            notes.append(f"columns that were ignored: {', '.join(ignored)}; those that were read: {columns['columns']}")
        return notes + ignored_note(name for source in self._sources.values() for name in source.ignored)

    def _examples(
        self, split: str, source: Source, layout: Layout, bad: BadRows, seen: dict[str, str]
    ) -> Iterator[tuple[int, PreferenceExample]]:
        """The examples of a split, each with a number of its prompt; `seen` gets the ids and where they were given."""
        name = split if split in source.splits else next(iter(source.splits))
        named = None
        for where, row in source.rows(name, bad):
            layout.counts[f"{split}_rows_read"] += 1
            try:
                preference = layout.preference(where, row)
                examples = self._of_row(where, preference, layout.counts) if preference else []
                for example in examples:
                    if example.id and (first := seen.setdefault(example.id, where)) != where:
                        raise UserError(
                            f'{where}: "id" {example.id!r} was already given at {first}: ids must be unique'
                        )
            except UserError as error:
                bad(error)
                continue
            for example in examples:
                named = bool(example.id) if named is None else named
                if named != bool(example.id):
                    raise UserError(f'{where}: only some rows have an "id"; give one to all or to none')
                yield (
                    keyed_seed("jsonl split", self.seed, example.prompt),
                    replace(example, where=source.inside(where)),
                )

    def _of_row(self, where: str, row: RowParts, counts: Counter[str]) -> list[PreferenceExample]:
        """One example per chosen response, each with all rejected ones."""
        messages = [
            message | {"content": self._stripped(message["content"], message["content"].strip(), counts)}
            for message in row.messages
        ]  # what a chat template gets; the prompt is the same as one text
        prompt = self._stripped(row.prompt, row.prompt.rstrip(), Counter() if messages else counts)
        every_chosen, every_rejected = (
            [self._stripped(text, text.strip(), counts) for text in texts] for texts in (row.chosen, row.rejected)
        )
        chosen, rejected = list(dict.fromkeys(every_chosen)), list(dict.fromkeys(every_rejected))
        if both := set(chosen) & set(rejected):
            place = every_rejected.index(min(both))
            raise UserError(f'{where}: "chosen" is also rejected[{place}]: remove it from there')
        counts["rejected_repeats_dropped"] += len(every_rejected) - len(rejected)
        if len(chosen) > 1:
            if self.several_chosen == "error":
                raise UserError(
                    f"{where}: {len(chosen)} chosen responses; dataset.several_chosen=each makes one example of each"
                )
            counts["rows_with_several_chosen"] += 1
        identity = row.id
        if isinstance(identity, bool) or not isinstance(identity, str | int | None):
            raise UserError(f'{where}: "id" must be a text or a whole number, found {found(identity)}')
        name = "" if identity is None else str(identity)
        slate = self._given_slate(where, row.candidates, {*chosen, *rejected}, counts)
        return [
            PreferenceExample(
                f"{name}/{number}" if name and len(chosen) > 1 else name,
                prompt,
                text,
                tuple(rejected),
                tuple(other for other in slate if other == text or other not in chosen)
                or self._drawn_slate(prompt, [text, *rejected]),
                meta={"messages": messages} if messages else {},
            )
            for number, text in enumerate(chosen)
        ]

    def _stripped(self, text: str, stripped: str, counts: Counter[str]) -> str:
        if not self.strip:
            return text
        counts["texts_stripped"] += stripped != text
        return stripped

    def _given_slate(self, where: str, value: Any, texts: set[str], counts: Counter[str]) -> list[str]:
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f'{where}: "candidates" must be a list of texts, found {found(value)}')
        slate = list(dict.fromkeys(self._stripped(text, text.strip(), counts) for text in value))
        if set(slate) != texts:
            other = sorted(set(slate) ^ texts)[0]
            raise UserError(
                f'{where}: "candidates" must be exactly "chosen" and all "rejected"; {other[:60]!r} is only on one side'
            )
        return slate

    def _drawn_slate(self, prompt: str, texts: list[str]) -> tuple[str, ...]:
        """An order that does not give the chosen one away."""
        slate = list(texts)
        Random(keyed_seed("jsonl slate", self.seed, prompt, slate)).shuffle(slate)
        return tuple(slate)

    def _held_out(self, prompts: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """The rows of all three splits; those that were not given take prompts from train, by the prompts' numbers."""
        numbers, sizes = np.unique(prompts["train"], return_counts=True)
        ends, taken = np.cumsum(sizes), 0
        split_of = np.full(len(prompts["train"]), "train", dtype="<U5")
        for split, fraction in (("test", self.test_fraction), ("val", self.val_fraction)):
            if split in prompts:
                continue
            wanted = max(1, round(fraction * len(prompts["train"]))) + (ends[taken - 1] if taken else 0)
            last = int(np.searchsorted(ends, wanted)) + 1
            split_of[np.isin(prompts["train"], numbers[taken:last])] = split
            taken = last
        if taken >= len(numbers):
            raise UserError(
                f"{self.path or self.hub_id}: {len(numbers)} different prompts are too few to hold out validation and "
                "test rows; add rows, or give dataset.val_path and dataset.test_path"
            )
        given = {split: np.arange(len(rows)) for split, rows in prompts.items() if split != "train"}
        return {split: np.flatnonzero(split_of == split) for split in SPLITS} | given
