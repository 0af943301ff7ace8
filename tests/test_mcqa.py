"""Multiple choice: counts of the real files; pools hold no second right answer and nothing of another split."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from massdpo.data.readers.mcqa import MultipleChoice
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.text import normalise
from massdpo.errors import UserError
from tests.conftest import SHARED_DATA, needs_shared_data

SPLITS = ("train", "val", "test")
QASC = partial(
    MultipleChoice,
    raw_dir=str(SHARED_DATA / "qasc"),
    train_file="train.jsonl",
    val_file=None,
    test_file="dev.jsonl",
)
ARC = partial(
    MultipleChoice,
    raw_dir=str(SHARED_DATA / "arc" / "ARC-Challenge"),
    train_file="ARC-Challenge-Train.partial.jsonl",
    val_file="ARC-Challenge-Dev.jsonl",
    test_file="ARC-Challenge-Test.jsonl",
)
MEDMCQA = partial(
    MultipleChoice,
    raw_dir=str(SHARED_DATA / "medmcqa"),
    train_file="train_sample.jsonl",
    val_file=None,
    test_file="validation.jsonl",
    val_size=100,
)


def question(id: str, options: list[str], answer: int = 0, stem: str | None = None) -> dict[str, Any]:
    choices = [{"label": "ABCDEFGH"[place], "text": text} for place, text in enumerate(options)]
    return {
        "id": id,
        "question": {"stem": stem or f"what is {id}?", "choices": choices},
        "answerKey": "ABCDEFGH"[answer],
    }


def write(folder: Path, **files: list[dict[str, Any]]) -> partial[MultipleChoice]:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial(
        MultipleChoice,
        raw_dir=str(folder),
        train_file="train.jsonl",
        val_file="val.jsonl" if "val" in files else None,
        test_file="test.jsonl",
    )


def small(folder: Path) -> partial[MultipleChoice]:
    return write(
        folder,
        **{
            split: [
                question(f"{split}{row}", [f"{split} option {row}.{place}" for place in range(4)], row % 4)
                for row in range(12)
            ]
            for split in SPLITS
        },
    )


def raw_options(path: Path) -> set[str]:
    rows = map(json.loads, path.read_text().splitlines())
    return {normalise(choice["text"]) for row in rows for choice in row["question"]["choices"]}


def sound(example: PreferenceExample) -> bool:
    """The slate is chosen and pool, no two of which say the same."""
    texts = [normalise(text) for text in (example.chosen, *example.pool)]
    return len(set(texts)) == len(texts) and sorted(example.candidates) == sorted((example.chosen, *example.pool))


@needs_shared_data
def test_qasc_counts_and_pools() -> None:
    splits = QASC().load()
    assert len(splits.train) + len(splits.val) == 8134 and len(splits.test) == 926
    stems = [{example.prompt.split("\n")[0] for example in getattr(splits, split)} for split in SPLITS]
    assert not stems[0] & stems[1] and not stems[0] & stems[2]  # 384 train stems repeat: none is cut in two
    for split in SPLITS:
        for example in getattr(splits, split):
            assert sound(example) and len(example.pool) == 19
    assert "no answers" in splits.report["test_is"] and "500 questions" in splits.report["val_is"]
    raw = [json.loads(line) for line in (SHARED_DATA / "qasc" / "dev.jsonl").open()]
    for row, example in zip(raw, splits.test, strict=True):
        texts = {choice["label"]: choice["text"].strip() for choice in row["question"]["choices"]}
        assert example.chosen == texts[row["answerKey"]]
        wrong = {text for label, text in texts.items() if label != row["answerKey"]}
        assert {normalise(text) for text in wrong} - {normalise(example.chosen)} <= {
            normalise(text) for text in example.pool
        }
        assert "; ".join(texts.values()) in example.prompt
        borrowed = set(example.pool) - wrong
        assert len(borrowed) >= 12 and not any(f"; {text}; " in example.prompt for text in borrowed)


@needs_shared_data
def test_train_pools_borrow_from_train_alone() -> None:
    splits = ARC().load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1056, 294, 1172)
    folder = SHARED_DATA / "arc" / "ARC-Challenge"
    files = {"train": "Train.partial", "val": "Dev", "test": "Test"}
    for split, name in files.items():
        own = raw_options(folder / f"ARC-Challenge-{name}.jsonl")
        for example in getattr(splits, split):
            assert sound(example) and {normalise(text) for text in example.pool} <= own
    assert "test_is" not in splits.report


@needs_shared_data
def test_own_pools_keep_what_the_question_offers() -> None:
    splits = ARC(num_negatives="own").load()
    sizes = [len(example.pool) for example in splits.test]
    # 4 three-option and 3 five-option rows, the others four (data README); equal options make a pool smaller
    assert sizes.count(4) == 3 and sizes.count(3) >= 1172 - 7 - 8
    dropped = splits.report["options_equal_to_the_answer"] + splits.report["options_repeated"]
    raw_wrong = sum(
        len(json.loads(line)["question"]["choices"]) - 1
        for name in ("Train.partial", "Dev", "Test")
        for line in (SHARED_DATA / "arc" / "ARC-Challenge" / f"ARC-Challenge-{name}.jsonl").open()
    )
    assert sum(len(example.pool) for split in SPLITS for example in getattr(splits, split)) == raw_wrong - dropped


@needs_shared_data
def test_medmcqa_counts_and_the_base_of_cop() -> None:
    splits = MEDMCQA().load()
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (1000, 4183)
    raw = [json.loads(line) for line in (SHARED_DATA / "medmcqa" / "validation.jsonl").open()]
    for row, example in zip(raw, splits.test, strict=True):
        assert example.chosen == row[("opa", "opb", "opc", "opd")[row["cop"]]].strip()
        assert sound(example)
    assert splits.report["answers_read_as"] == "index0"
    with pytest.raises(UserError, match=r"the answer '0' is none of the 4 options .*dataset.answer=index1"):
        MEDMCQA(answer="index1").load()
    with pytest.raises(UserError, match=r"test.jsonl:1: the answer '-1' is none of the 4 options"):
        MEDMCQA(test_file="test.jsonl").load()


def test_the_authors_own_medmcqa_counts_from_one(tmp_path: Path) -> None:
    rows = [
        {"id": f"q{row}", "question": f"q{row}?", "cop": 1 + row % 4}
        | {name: f"{name} of {row}" for name in ("opa", "opb", "opc", "opd")}
        for row in range(12)
    ]
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"raw_dir": str(tmp_path), "train_file": "train.json", "val_file": None, "test_file": "dev.json"}
    splits = MultipleChoice(**options, val_size=4, num_negatives=5).load()
    assert splits.report["answers_read_as"] == "index1"
    expected = [f"{('opa', 'opb', 'opc', 'opd')[row % 4]} of {row}" for row in range(12)]
    assert [example.chosen for example in splits.test] == expected


def test_equal_options_leave_the_pool_and_are_counted(tmp_path: Path) -> None:
    rows = [question(f"q{row}", [f"right {row}", f"wrong {row}", f"other {row}"]) for row in range(9)]
    awkward = question("awkward", ["Right ", "right", "wrong", "WRONG", "wrong  "])
    make = write(tmp_path, train=[awkward, *rows], val=rows, test=rows)
    splits = make(num_negatives="own").load()
    assert splits.train[0].chosen == "Right" and splits.train[0].pool == ("wrong",)
    assert splits.report["options_equal_to_the_answer"] == 1 and splits.report["options_repeated"] == 2
    assert splits.train[0].prompt.count("ight") == 2  # the prompt still lists all of the question's options
    wide = make(num_negatives=6).load()
    assert all(sound(example) and len(example.pool) == 6 for example in wide.train)
    alone = write(tmp_path, train=[question("same", ["x", "X"]), *rows], val=rows, test=rows)
    with pytest.raises(UserError, match=r"question same has no wrong option"):
        alone(num_negatives="own").load()


def test_borrowed_options_are_drawn_evenly_and_by_the_seed(tmp_path: Path) -> None:
    make = small(tmp_path)
    pools = lambda splits: [example.pool for example in splits.train]  # noqa: E731
    assert pools(make().load()) == pools(make().load()) != pools(make(seed=1).load())
    borrowed: dict[str, int] = {}
    for seed in range(300):
        for text in make(seed=seed, num_negatives=7).load().train[0].pool[3:]:
            borrowed[text] = borrowed.get(text, 0) + 1
    # 300 draws of 4 out of 44: 27 each, standard deviation 5
    assert len(borrowed) == 44 and all(5 < count < 55 for count in borrowed.values())


def test_narrow_pools_and_short_splits_are_told(tmp_path: Path) -> None:
    make = small(tmp_path)
    narrow = make(num_negatives=2).load()
    assert all(len(example.pool) == 2 for example in narrow.train)
    assert narrow.report["own_options_left_out"] == 36
    with pytest.raises(UserError, match=r"the train split has 48 different options, too few"):
        make(num_negatives=60).load()


def test_prompts(tmp_path: Path) -> None:
    make = small(tmp_path)

    def prompts(splits: Splits) -> list[str]:
        return [example.prompt for example in splits.train]

    assert prompts(make().load())[0] == (
        "Question: what is train0?\n"
        "Options: train option 0.0; train option 0.1; train option 0.2; train option 0.3\nAnswer:"
    )
    assert not any("option" in prompt for prompt in prompts(make(list_options=False).load()))
    assert len({prompt.split("what is")[0] for prompt in prompts(make(prompts="several").load())}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "Z"}, "the answer 'Z' is none of the 4 options"),
        ({"answerKey": None}, "no answer: unlabelled questions"),
        ({"question": {"stem": "?"}}, 'no "options" in the columns'),
        ({"question": {"stem": " ", "choices": ["a", "b"]}}, "'question' must be a text that is not empty"),
        ({"question": {"stem": "?", "choices": ["a"]}}, "at least two options"),
        ({"question": {"stem": "?", "choices": ["a", None]}}, "'options' must be a text"),
        ({"question": {"stem": "?", "choices": "a, b"}}, "the options must be a list"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make = small(tmp_path)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps(question("bad", ["a", "b", "c", "d"]) | change) + "\n")
    with pytest.raises(UserError, match=rf"train.jsonl:13: .*{message}"):
        make().load()
    splits = make(bad_rows="skip").load()
    assert len(splits.train) == 12 and splits.report["bad_rows_skipped"] == 1
    assert "train.jsonl:13" in splits.report["first_bad_row"]


def test_an_id_that_occurs_twice(tmp_path: Path) -> None:
    make = small(tmp_path)
    text = (tmp_path / "val.jsonl").read_text()
    (tmp_path / "val.jsonl").write_text(text + text.splitlines()[3] + "\n")
    with pytest.raises(UserError, match=r"val.jsonl:13: id 'val3' is listed twice"):
        make().load()
    assert len(make(bad_rows="skip").load().val) == 12


def test_held_out_questions(tmp_path: Path) -> None:
    rows = [question(f"q{row}", [f"a{row}", f"b{row}", f"c{row}"], stem=f"stem {row // 2}") for row in range(40)]
    make = write(tmp_path, train=rows, test=rows[:4])
    splits = make(val_size=9, num_negatives=3).load()
    assert len(splits.val) == 10 and len(splits.train) == 30  # two questions a stem
    with pytest.raises(UserError, match="val_size=40 leaves none"):
        make(val_size=40).load()


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    make = small(tmp_path)
    with pytest.raises(UserError, match=r"other.jsonl is missing .*dataset.train_file.* holds test.jsonl, train.jsonl"):
        make(train_file="other.jsonl").load()
