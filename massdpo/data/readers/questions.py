"""A multiple-choice row, whatever its layout, as a question with its options and the place of the right one.

Options are in a list, in columns (option1, ..., A, ..., opa, ...), in {text, label}, or are the right answer and wrong
ones beside it. The answer is one of the row's labels, a letter, a number from 0 or from 1, or an option's text: which
of these is an option, or inferred where the questions leave no doubt.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from massdpo.data.columns import Columns
from massdpo.data.containers import PlacedRow
from massdpo.data.raw import BadRows
from massdpo.data.text import normalise
from massdpo.errors import UserError

WAYS = ("letter", "index0", "index1", "text")
USUAL = {
    "question": ("question", "question_stem", "stem", "query", "ctx", "sentence", "prompt", "problem"),
    "options": ("choices", "options", "answers", "endings", "option", "choice", "ending"),
    "wrong": ("wrong", "distractors", "incorrect_answers", "wrong_answers", "distractor", "incorrect", "wrong_answer"),
    "answer": (
        *("answerkey", "answer_key", "answer", "correct_answer", "correct_option", "correct", "label", "gold"),
        *("target", "answer_idx", "answer_index", "cop", "solution", "key"),
    ),
    "id": ("id", "qid", "question_id", "ind", "idx"),
}
LETTERED = re.compile(r"(|option|opt|op|choice|answer|ans)[ _-]?([a-j])", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """`answer` is the place of the right option, -1 until known; `ways` has the place for each way to read the row."""

    where: str
    id: str
    stem: str
    options: list[str]
    ways: Mapping[str, int]
    answer_text: str  # the answer as the row has it
    answer: int = -1
    shuffled: bool = False  # the row gives the options no order: one is drawn


def read_questions(rows: Iterable[PlacedRow], name: str, columns: Mapping[str, Any], bad: BadRows) -> "Reader":
    reader = Reader(columns)
    ids: set[str] = set()
    for number, (where, row) in enumerate(rows, start=1):
        try:
            question = reader.question(where, row, f"{name}:{number}")
            if question.id in ids:
                raise UserError(f"{where}: id {question.id!r:.80} is listed twice")
        except UserError as error:
            bad(error)
            continue
        ids.add(question.id)
        reader.questions.append(question)
    return reader


class Reader:
    """The questions that were read, and the columns they came from."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = given
        self.columns: Columns | None = None
        self.questions: list[Question] = []

    def question(self, where: str, row: dict[str, Any], name: str) -> Question:
        if isinstance(row.get("question"), dict):  # {stem, choices}
            row = row | row["question"] | {"question": row["question"].get("stem")}
            row.pop("stem", None)
        if self.columns is None:
            lettered = _lettered(row)
            given = {"options": lettered, **self.given} if lettered else self.given
            self.columns = Columns(
                USUAL, given, several=("options", "wrong"), optional=("options",), aligned=("options",)
            )
        parts = self.columns.parts(where, row)
        for part in ("question", "answer"):
            if part not in parts and part not in self.columns.mapped:
                raise self.columns.missing(where, row, part, ("question", "options", "answer"))
        stem = _text(where, "question", parts.get("question"))
        options, labels = _options(where, parts.get("options"))
        answer = parts.get("answer")
        if answer is None or str(answer).strip() == "":
            raise UserError(
                f"{where}: no answer: unlabelled questions can be used neither for training nor for testing"
            )
        if not options and "wrong" in parts:
            wrong, _ = _options(where, parts["wrong"])
            return Question(
                where, _id(parts, name), stem, [str(answer).strip(), *wrong], {"own": 0}, str(answer), 0, True
            )
        if not options:
            raise self.columns.missing(where, row, "options", ("question", "options", "answer"))
        if len(options) < 2:
            raise UserError(f"{where}: at least two options are needed, found {len(options)}")
        return Question(where, _id(parts, name), stem, options, _ways(answer, options, labels), str(answer).strip())


def answered(questions: list[Question], way: str | None, bad: BadRows) -> tuple[list[Question], str]:
    """The questions with their answers, read in the given `way` or the one that all of them allow; and which it was.

    Raises:
        UserError: several ways are possible and differ, or a question's answer is not one of its options.
    """
    open_ones = [question for question in questions if "own" not in question.ways]
    if way is None and open_ones:
        fits = {each: sum(each in question.ways for question in open_ones) for each in WAYS}
        best = [each for each in WAYS if fits[each] == max(fits.values())]
        if any(len({question.ways[each] for each in best if each in question.ways}) > 1 for question in open_ones):
            first = open_ones[0]
            raise UserError(
                f"{first.where}: the answer {first.answer_text!r:.40} can be read as {' or as '.join(best)}, so can "
                "all others: set dataset.answer to one of these (index0: the first option is 0; index1: it is 1)"
            )
        way = best[0]
    kept = []
    for question in questions:
        place = question.ways.get("own", question.ways.get(way or ""))
        if place is None:
            bad(UserError(_no_option(question, way)))
        else:
            kept.append(replace(question, answer=place))
    return kept, (way or "label") if open_ones else "label"


def _no_option(question: Question, way: str | None) -> str:
    shown = ", ".join(question.options)
    return (
        f"{question.where}: the answer {question.answer_text!r:.40} is none of the {len(question.options)} options "
        f"({shown:.100}), read as dataset.answer={way}"
    )


def _ways(answer: Any, options: list[str], labels: list[str]) -> dict[str, int]:
    """The place of the right option by each way to read the answer that fits; `own` where the row's labels decide."""
    text = str(answer).strip()
    if isinstance(answer, float) and answer.is_integer():
        text = str(int(answer))
    if labels.count(text) == 1:
        return {"own": labels.index(text)}
    ways = {}
    if len(text) == 1 and 0 <= (letter := ascii_uppercase.find(text.upper())) < len(options):
        ways["letter"] = letter
    if re.fullmatch(r"\d{1,3}", text):
        ways |= {f"index{base}": int(text) - base for base in (0, 1) if 0 <= int(text) - base < len(options)}
    same = [place for place, option in enumerate(options) if option == text] or [
        place for place, option in enumerate(options) if normalise(option) == normalise(text)
    ]
    if same:
        ways["text"] = same[0]
    return ways


def _options(where: str, value: Any) -> tuple[list[str], list[str]]:
    """The texts of the options, and their labels where the row has them."""
    if value is None:
        return [], []
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):  # a list in a cell of text
        value = _parsed(where, value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = value.get("label") or list(range(len(value["text"])))
        value = [{"text": text, "label": label} for text, label in zip(value["text"], labels, strict=False)]
    if not isinstance(value, list):
        raise UserError(f"{where}: the options must be a list, or {{text, label}} lists, found {value!r:.80}")
    if not all(isinstance(each, dict) for each in value):
        return [_text(where, "options", each) for each in value], []
    texts = [_text(where, "options", each.get("text")) for each in value]
    return texts, [_text(where, "label", each.get("label")) for each in value]


def _parsed(where: str, cell: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # literals only: nothing is run
        try:
            return read(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise UserError(f"{where}: the options must be a list, found {cell!r:.80}")


def _text(where: str, name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where}: {name!r} must be a text that is not empty, found {value!r:.80}")
    return str(value).strip()


def _id(parts: Mapping[str, Any], name: str) -> str:
    return str(parts.get("id") or name)


def _lettered(row: Mapping[str, Any]) -> list[str]:
    """Columns of options that are lettered from a on, with the same name before the letter."""
    by_name: dict[str, dict[str, str]] = {}
    for column in row:
        if found := LETTERED.fullmatch(column.strip()):
            by_name.setdefault(found[1].lower(), {})[found[2].lower()] = column
    for columns in by_name.values():
        run = [columns[letter] for place, letter in enumerate(sorted(columns)) if letter == "abcdefghij"[place]]
        if len(run) >= 2:
            return run
    return []
