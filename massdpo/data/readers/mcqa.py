"""Multiple choice: question and options are the prompt, the right option is chosen, the others are the pool.

The prompt lists only the question's own options, in their own order; a wider pool borrows options from other questions
of the same split, so that training sees nothing of the test questions. `questions.py` reads the rows.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from massdpo.data.raw import SPLITS, BadRows, Source, ignored_note
from massdpo.data.readers.interactions import raw_file
from massdpo.data.readers.located import Located
from massdpo.data.readers.questions import Question, answered, read_questions
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.text import normalise
from massdpo.errors import UserError
from massdpo.store import keyed_seed

# (before the question, between question and options); the options follow, then "Answer:"
WORDINGS = (
    ("Question: ", "\nOptions: "),
    ("Choose the right answer. ", "\nThe possible answers are: "),
    ("", "\nOne of these is correct: "),
    ("Here is an exam question. ", "\nPick one: "),
)


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Located):
    """Questions from `path`, `hub_id` or the files in `raw_dir`; `conf/dataset/mcqa.yaml` explains the options.

    Splits that are missing are held out of training: `val_size` and `test_size` questions, or shares of them.
    """

    raw_dir: str | None = None
    train_file: str | None = None
    val_file: str | None = None
    test_file: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    answer: Literal["letter", "index0", "index1", "text"] | None = None
    val_size: int | float = 500
    test_size: int | float = 0.1
    seed: int = 0
    num_negatives: int | Literal["own"] = 19
    list_options: bool = True
    prompts: Literal["one", "several"] = "one"
    bad_rows: Literal["error", "skip"] = "error"

    @cached_property
    def _source(self) -> Source:
        if not self.train_file:
            return self.source()
        names = {"train": self.train_file, "val": self.val_file, "test": self.test_file}
        parts = {
            split: [raw_file(self.raw_dir, name, f"labelled questions, named by dataset.{split}_file")]
            for split, name in names.items()
            if name is not None
        }
        return Source(Path(str(self.raw_dir)), self, outside=True, parts=parts)

    def files(self) -> list[Path]:
        """The files that `load` reads: their content and the options decide the outcome."""
        return self._source.files

    def load(self) -> Splits:
        """Raises UserError for missing or damaged files, unclear answers, or splits too small to fill the pools."""
        bad = BadRows(self.bad_rows)
        readers = {
            split: read_questions(
                self._source.rows(split, bad),
                self._place(split).stem if self.train_file else name,  # names the rows without an id
                self.columns,
                bad,
            )
            for split, name in self._source.splits.items()
        }
        everything = [question for reader in readers.values() for question in reader.questions]
        _, way = answered(everything, self.answer, bad=BadRows("skip"))
        questions = {split: answered(reader.questions, way, bad)[0] for split, reader in readers.items()}
        for split, found in questions.items():
            if not found:
                raise UserError(f"{self._place(split)} has no labelled question")
        report: dict[str, Any] = self._held_out(questions)
        counts: Counter[str] = Counter()
        train, val, test = (list(self._examples(split, questions[split], counts)) for split in SPLITS)
        report |= {f"{split}_rows": len(questions[split]) for split in SPLITS} | dict(+counts) | bad.report()
        for reader in readers.values():
            report = (reader.columns.report() if reader.columns else {}) | report
        notes = {"notes": ignored_note(self._source.ignored)}
        return Splits(train, val, test, {"answers_read_as": way} | report | notes)

    def _place(self, split: str) -> Path:
        return self._source.found[split][0] if self.train_file else self._source.place

    def _held_out(self, questions: dict[str, list[Question]]) -> dict[str, Any]:
        """Hold out the splits that are missing; returns notes that say so."""
        report: dict[str, Any] = {}
        if self.train_file and "test" in questions and "val" not in questions:
            name = self._place("test").name
            report["test_is"] = f"the official labelled split {name} (the official test split has no answers)"
        total = len(questions["train"])
        for split, size, key in (("val", self.val_size, "validation"), ("test", self.test_size, "test")):
            if split not in questions:
                questions["train"], questions[split] = self._hold_out(
                    questions["train"], split, size if isinstance(size, int) else max(1, round(size * total)), key
                )
                report[f"{split}_is"] = f"{len(questions[split])} questions held out of {self._place('train').name}"
        return report

    def _hold_out(
        self, questions: list[Question], split: str, wanted: int, key: str
    ) -> tuple[list[Question], list[Question]]:
        """The training questions without, and those with, a seeded sample; questions of the same stem stay together."""
        groups: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            groups.setdefault(normalise(question.stem), []).append(number)
        stems = list(groups)
        held: set[int] = set()
        for place in np.random.default_rng(keyed_seed(key, self.seed)).permutation(len(stems)):
            if len(held) < wanted:
                held.update(groups[stems[place]])
        if len(held) == len(questions):
            raise UserError(
                f"{self._place('train')} has {len(questions)} questions: dataset.{split}_size={wanted} leaves none to "
                "train on"
            )
        kept = [question for number, question in enumerate(questions) if number not in held]
        return kept, [questions[number] for number in sorted(held)]

    def _examples(self, split: str, questions: list[Question], counts: Counter[str]) -> Iterator[PreferenceExample]:
        lender = Lender(questions)
        for row, question in enumerate(questions):
            id = f"{split}/{row}"
            chance = np.random.default_rng(keyed_seed("pool", self.seed, split, row))
            if question.shuffled:
                question = _shuffled(question, chance)
            chosen = question.options[question.answer]
            own: dict[str, str] = {}  # the wrong options, without those that a reader would call equal
            for place, option in enumerate(question.options):
                key = normalise(option)
                if place == question.answer:
                    continue
                if key == normalise(chosen):
                    counts["options_equal_to_the_answer"] += 1
                elif key in own:
                    counts["options_repeated"] += 1
                else:
                    own[key] = option
            pool = list(own.values())
            if isinstance(self.num_negatives, int):
                more = self.num_negatives - len(own)
                counts["own_options_left_out"] += max(0, -more)
                pool = pool[: self.num_negatives] + lender.borrow(more, {normalise(chosen), *own}, chance, split)
            if not pool:
                raise UserError(
                    f"{id}: question {question.id} has no wrong option: set dataset.num_negatives to a number, as 19"
                )
            candidates = [chosen, *pool]
            candidates = [candidates[place] for place in chance.permutation(len(candidates))]
            yield PreferenceExample(
                id=id,
                prompt=self._prompt(id, question),
                chosen=chosen,
                pool=tuple(pool),
                candidates=tuple(candidates),
                meta={"question": question.id, "own": len(own)},
            )

    def _prompt(self, id: str, question: Question) -> str:
        choice = keyed_seed("wording", self.seed, id) % len(WORDINGS) if self.prompts == "several" else 0
        before, between = WORDINGS[choice]
        options = between + "; ".join(question.options) if self.list_options else ""
        return f"{before}{question.stem}{options}\nAnswer:"


class Lender:
    """The distinct options of a split, to be borrowed by questions that have too few."""

    def __init__(self, questions: list[Question]):
        first: dict[str, str] = {}
        for question in questions:
            for option in question.options:
                first.setdefault(normalise(option), option)
        self.keys = list(first)
        self.texts = list(first.values())

    def borrow(self, count: int, taken: set[str], chance: np.random.Generator, split: str) -> list[str]:
        """`count` options, none of which equals one of the `taken`."""
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


def _shuffled(question: Question, chance: np.random.Generator) -> Question:
    order = chance.permutation(len(question.options)).tolist()
    options = [question.options[place] for place in order]
    return replace(question, options=options, answer=order.index(question.answer))
