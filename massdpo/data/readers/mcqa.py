"""Multiple choice: question and options are the prompt, the right option is chosen, the others are the pool.

One reader serves the AI2-style JSON Lines of QASC, ARC, CommonsenseQA and OpenBookQA, another MedMCQA's. The prompt
lists only the question's own options, in their own order; a wider pool borrows options of other questions of the same
split, so that nothing of a test question stands in training.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massdpo.data.raw import SPLITS, BadRows
from massdpo.data.readers.interactions import field_of, raw_file
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.text import normalise, read_jsonl
from massdpo.errors import UserError
from massdpo.store import keyed_seed

OPTION_FIELDS = ("opa", "opb", "opc", "opd")  # MedMCQA's

# (before the question, between question and options); the options follow, then "Answer:"
WORDINGS = (
    ("Question: ", "\nOptions: "),
    ("Choose the right answer. ", "\nThe possible answers are: "),
    ("", "\nOne of these is correct: "),
    ("Here is an exam question. ", "\nPick one: "),
)


@dataclass(frozen=True)
class Question:
    """One labelled question; `answer` is the place of the right option, `where` the question's file and line."""

    where: str
    id: str
    stem: str
    options: list[str]
    answer: int


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """AI2-style files: `id`, `question` {`stem`, `choices` [{`label`, `text`}]}, `answerKey`.

    `conf/dataset/qasc.yaml` says what each option does.
    """

    train_file: str
    val_file: str | None
    test_file: str
    raw_dir: str | None = None
    val_size: int = 500
    seed: int = 0
    num_negatives: int | str = 19
    list_options: bool = True
    prompts: str = "one"
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        if self.num_negatives != "own" and (type(self.num_negatives) is not int or self.num_negatives < 1):
            raise UserError(
                f"dataset.num_negatives is a whole number of at least 1, or own; not {self.num_negatives!r}"
            )
        if self.prompts not in ("one", "several"):
            raise UserError(f"dataset.prompts is one or several, not {self.prompts!r}")
        for name, least in (("seed", 0), ("val_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"dataset.{name} must be a whole number of at least {least}, not {value!r}")
        if not isinstance(self.list_options, bool):
            raise UserError(f"dataset.list_options is true or false, not {self.list_options!r}")
        BadRows(self.bad_rows)

    def files(self) -> list[Path]:
        """The raw files that `load` reads: their content, with the options, decides the outcome."""
        names = {"train": self.train_file, "val": self.val_file, "test": self.test_file}
        return [
            raw_file(self.raw_dir, name, f"labelled questions, named by dataset.{split}_file")
            for split, name in names.items()
            if name is not None
        ]

    def read(self, path: Path, bad: BadRows) -> Iterator[Question]:
        for number, row in read_jsonl(path, bad):
            try:
                yield _ai2_question(row, f"{path}:{number}")
            except UserError as error:
                bad(error)

    def load(self) -> Splits:
        """Raises UserError for a missing or damaged raw file, and for a split too small to fill the pools."""
        bad = BadRows(self.bad_rows)
        report: dict[str, Any] = {}
        paths = self.files()
        questions = {"train": _unique(self.read(paths[0], bad), paths[0], bad)}
        questions["test"] = _unique(self.read(paths[-1], bad), paths[-1], bad)
        if self.val_file is None:
            questions["train"], questions["val"] = self._hold_out(questions["train"], paths[0])
            report["test_is"] = f"the official labelled split {paths[-1].name} (the official test split has no answers)"
            report["val_is"] = f"{len(questions['val'])} questions held out of {paths[0].name}"
        else:
            questions["val"] = _unique(self.read(paths[1], bad), paths[1], bad)
        counts: Counter[str] = Counter()
        train, val, test = (list(self._examples(split, questions[split], counts)) for split in SPLITS)
        report |= {f"{split}_rows": len(questions[split]) for split in SPLITS} | counts | bad.report()
        return Splits(train, val, test, report)

    def _hold_out(self, questions: list[Question], path: Path) -> tuple[list[Question], list[Question]]:
        """Seeded validation questions out of the training file; questions of the same stem stay together."""
        groups: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            groups.setdefault(normalise(question.stem), []).append(number)
        stems = list(groups)
        held: set[int] = set()
        for place in np.random.default_rng(keyed_seed("validation", self.seed)).permutation(len(stems)):
            if len(held) < self.val_size:
                held.update(groups[stems[place]])
        if len(held) == len(questions):
            raise UserError(
                f"{path} has {len(questions)} questions, dataset.val_size={self.val_size} leaves none to train on"
            )
        kept = [question for number, question in enumerate(questions) if number not in held]
        return kept, [questions[number] for number in sorted(held)]

    def _examples(self, split: str, questions: list[Question], counts: Counter[str]) -> Iterator[PreferenceExample]:
        lender = _Lender(questions)
        for row, question in enumerate(questions):
            id = f"{split}/{row}"
            chosen = question.options[question.answer]
            taken = {normalise(chosen)}
            own = []
            for place, option in enumerate(question.options):
                if place == question.answer:
                    continue
                if normalise(option) in taken:
                    counts[
                        "options_equal_to_the_answer" if normalise(option) == normalise(chosen) else "options_repeated"
                    ] += 1
                else:
                    taken.add(normalise(option))
                    own.append(option)
            chance = np.random.default_rng(keyed_seed("pool", self.seed, split, row))
            pool = own
            if isinstance(self.num_negatives, int):
                if len(own) > self.num_negatives:
                    counts["own_options_left_out"] += len(own) - self.num_negatives
                taken |= {normalise(option) for option in question.options}
                pool = own[: self.num_negatives] + lender.borrow(self.num_negatives - len(own), taken, chance, split)
            if not pool:
                raise UserError(
                    f"{id}: question {question.id} has no wrong option left; set dataset.num_negatives=19, say"
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


class _Lender:
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


def _unique(questions: Iterator[Question], path: Path, bad: BadRows) -> list[Question]:
    ids: set[str] = set()
    kept = []
    for question in questions:
        if question.id in ids:
            bad(UserError(f"{question.where}: id {question.id!r:.80} has a line already"))
        else:
            ids.add(question.id)
            kept.append(question)
    if not kept:
        raise UserError(f"{path} has no labelled question")
    return kept


def _ai2_question(row: dict[str, Any], place: str) -> Question:
    id = field_of(row, "id", (str,), place)
    question = field_of(row, "question", (dict,), place)
    stem = field_of(question, "stem", (str,), place).strip()
    choices = field_of(question, "choices", (list,), place)
    if not all(isinstance(choice, dict) for choice in choices) or len(choices) < 2:
        raise UserError(f"{place}: 'choices' must be at least two objects of label and text")
    labels = [field_of(choice, "label", (str,), place) for choice in choices]
    options = [field_of(choice, "text", (str,), place).strip() for choice in choices]
    if not row.get("answerKey"):
        raise UserError(f"{place}: no 'answerKey': an unlabelled split can be neither trained nor tested on")
    if labels.count(row["answerKey"]) != 1:
        raise UserError(f"{place}: answerKey {row['answerKey']!r:.40} is not one of the labels {', '.join(labels)}")
    return Question(place, id, stem, options, labels.index(row["answerKey"]))


@dataclass(frozen=True, kw_only=True)
class MedMCQA(MultipleChoice):
    """MedMCQA's files: `question`, `opa` to `opd` and `cop`, which the hub counts from 0, the authors' JSON from 1."""

    cop_base: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cop_base not in (0, 1) or isinstance(self.cop_base, bool):
            raise UserError(
                "dataset.cop_base must be given: 0 if `cop` of the first option is 0 (the hub's files), 1 if it is 1 "
                "(the authors' own JSON); a wrong one shifts every answer"
            )

    def read(self, path: Path, bad: BadRows) -> Iterator[Question]:
        for number, row in read_jsonl(path, bad):
            place = f"{path}:{number}"
            try:
                stem = field_of(row, "question", (str,), place).strip()
                options = [field_of(row, name, (str,), place).strip() for name in OPTION_FIELDS]
                cop = field_of(row, "cop", (int,), place)
                answer = cop - (self.cop_base or 0)
                if answer not in range(len(options)):
                    raise UserError(f"{place}: cop {cop} with dataset.cop_base={self.cop_base} points at no option")
                yield Question(place, str(row.get("id") or f"{path.stem}:{number}"), stem, options, answer)
            except UserError as error:
                bad(error)
