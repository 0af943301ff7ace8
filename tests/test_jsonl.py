"""Anyone's own preferences: what is read, what is refused (by file and line), and what is held out together."""

import json
import re
import struct
from collections import Counter

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from massdpo.data.readers.preferences import Preferences
from massdpo.errors import UserError


def line(**fields):
    return {"prompt": "p", "chosen": "c", "rejected": ["a", "b"]} | fields


def lines(count):
    return [line(prompt=f"question {row}", chosen=f"right {row}") for row in range(count)]


def write(path, rows, end="\n", start=b""):
    path.write_bytes(start + "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    return str(path)


def message(content, role="user"):
    return {"role": role, "content": content}


def everything(splits):
    return [*splits.train, *splits.val, *splits.test]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own.jsonl"


def test_every_row_arrives_once_as_it_was(path):
    splits = Preferences(path=write(path, lines(40))).load()
    read = {(row.prompt, row.chosen, row.pool) for row in everything(splits)}
    assert read == {(f"question {row}", f"right {row}", ("a", "b")) for row in range(40)}
    assert [len(splits.train), len(splits.val), len(splits.test)] == [32, 4, 4]
    assert len({row.id for row in everything(splits)}) == 40 and splits.test[0].id == "test/0"
    assert all(sorted(row.candidates) == sorted([row.chosen, *row.pool]) for row in everything(splits))
    assert splits.report["train_rows_read"] == 40


def test_bom_crlf_blank_lines_and_a_missing_last_line_end_change_nothing(tmp_path):
    plain = Preferences(path=write(tmp_path / "a", lines(20))).load()
    windows = Preferences(path=write(tmp_path / "b", lines(20), end="\r\n\r\n", start=b"\xef\xbb\xbf")).load()
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes().rstrip())
    assert everything(plain) == everything(windows) == everything(Preferences(path=str(tmp_path / "c")).load())


def test_one_prompt_is_held_out_whole_and_the_seed_decides(path):
    rows = [line(prompt=f"question {row % 17}", chosen=f"right {row}") for row in range(170)]
    given = write(path, rows)
    splits = Preferences(path=given, seed=3).load()
    prompts = [{row.prompt for row in part} for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, prompts)) == 17 == len(set.union(*prompts))
    assert [len(splits.val), len(splits.test)] == [20, 20]  # 17 wanted, ten rows a prompt
    assert everything(splits) == everything(Preferences(path=given, seed=3).load())
    assert {row.prompt for row in Preferences(path=given, seed=4).load().test} != prompts[2]


def test_held_out_rows_do_not_depend_on_the_order_of_the_file(tmp_path):
    rows = lines(50)
    one, other = (
        Preferences(path=write(tmp_path / name, part)).load() for name, part in (("a", rows), ("b", rows[::-1]))
    )
    assert {row.prompt for row in one.test} == {row.prompt for row in other.test}


def test_files_of_their_own_for_validation_and_test(tmp_path):
    train, val, test = (
        write(tmp_path / name, rows) for name, rows in zip("abc", (lines(9), lines(3), lines(2)), strict=True)
    )
    splits = Preferences(path=train, val_path=val, test_path=test).load()
    assert [len(splits.train), len(splits.val), len(splits.test)] == [9, 3, 2]
    assert splits.report["val_prompts_also_in_train"] == 3 and splits.report["test_prompts_also_in_train"] == 2
    partly = Preferences(path=train, val_path=val).load()
    assert [len(partly.train), len(partly.val), len(partly.test)] == [8, 3, 1]


def test_the_place_of_the_chosen_one_says_nothing(path):
    """300 slates of 3: each place has 100 +- 8.2 (binomial); five of these are never reached by chance."""
    splits = Preferences(path=write(path, lines(300)), val_fraction=0.01, test_fraction=0.01).load()
    places = Counter(row.candidates.index(row.chosen) for row in everything(splits))
    assert all(abs(places[place] - 100) < 41 for place in range(3))


def test_candidates_and_ids_are_taken_as_given(path):
    rows = [line(prompt=f"q{row}", candidates=["b", "c", "a"], id=row) for row in range(5)]
    splits = Preferences(path=write(path, rows)).load()
    assert {row.candidates for row in everything(splits)} == {("b", "c", "a")}
    assert {row.id for row in everything(splits)} == set("01234")


def test_conversations_read_as_their_texts(tmp_path):
    plain = [line(prompt=f"q{row}", chosen="yes", rejected=["no"]) for row in range(6)]
    talk = [
        {"prompt": [message(row["prompt"])], "chosen": [message("yes", "assistant")], "rejected": answers}
        for row, answers in zip(plain, [[message("no", "assistant")], [[message("no", "assistant")]]] * 3, strict=True)
    ]
    one = everything(Preferences(path=write(tmp_path / "a", plain)).load())
    other = everything(Preferences(path=write(tmp_path / "b", talk)).load())
    assert [(r.prompt, r.chosen, r.pool) for r in one] == [(r.prompt, r.chosen, r.pool) for r in other]
    assert all(row.meta == {"messages": [message(row.prompt)]} for row in other)


def test_a_conversation_of_several_turns_is_flattened(path):
    turns = [message("be brief", "system"), message("hello"), message("hi", "assistant"), message("why?")]
    rows = [*lines(5), line(prompt=turns)]
    (row,) = [row for row in everything(Preferences(path=write(path, rows)).load()) if row.meta]
    assert row.prompt == "system: be brief\nuser: hello\nassistant: hi\nuser: why?\nassistant:"
    assert row.meta["messages"] == turns


def test_the_messages_of_a_conversation_are_stripped_too(path):
    turns = [message(" be brief\n", "system"), message("hello"), message("hi ", "assistant"), message("why?\n")]
    rows = [*lines(5), line(prompt=turns), line(prompt=[message("who? ")])]
    splits = Preferences(path=write(path, rows), strip=True).load()
    found = {tuple(turn["content"] for turn in row.meta["messages"]) for row in everything(splits) if row.meta}
    assert found == {("be brief", "hello", "hi", "why?"), ("who?",)}
    assert splits.report["texts_stripped"] == 4
    kept = [row.meta["messages"] for row in everything(Preferences(path=write(path, rows)).load()) if row.meta]
    assert turns in kept


def test_what_is_changed_on_the_way_is_counted(path):
    rows = [*lines(5), line(prompt="p ", chosen=" c", rejected=["a", "a", "b"], score=3), line(rejected="a")]
    splits = Preferences(path=write(path, rows), strip=True).load()
    changed = {
        key: splits.report[key] for key in ("texts_stripped", "rejected_repeats_dropped", "ignored_column_score")
    }
    assert changed == {"texts_stripped": 2, "rejected_repeats_dropped": 1, "ignored_column_score": 1}
    assert Counter(len(row.pool) for row in everything(splits)) == {2: 6, 1: 1}
    assert [re.search(r"\d+ (texts|rejected)|ignored: score", note)[0] for note in splits.report["notes"]] == [
        "2 texts",
        "1 rejected",
        "ignored: score",
    ]


def test_texts_stay_as_they_are(path):
    rows = [
        line(prompt=f"def f{row}(x):\n", chosen="    return x\n", rejected=["\tpass", "a", "a "]) for row in range(5)
    ]
    splits = Preferences(path=write(path, rows)).load()
    assert {(row.chosen, row.pool) for row in everything(splits)} == {("    return x\n", ("\tpass", "a", "a "))}
    assert {row.prompt for row in everything(splits)} == {row["prompt"] for row in rows}
    assert splits.report["notes"] == []


def test_a_folder_saved_by_datasets_equals_the_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = lines(30)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    file, folder = (
        Preferences(path=write(tmp_path / "a", rows)).load(),
        Preferences(path=str(tmp_path / "saved")).load(),
    )
    assert everything(file) == everything(folder)
    parts = {"train": rows[:20], "validation": rows[20:25], "test": rows[25:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    saved.save_to_disk(tmp_path / "whole")
    splits = Preferences(path=str(tmp_path / "whole")).load()
    assert [len(splits.train), len(splits.val), len(splits.test)] == [20, 5, 5]
    assert [row.prompt for row in splits.test] == [row["prompt"] for row in rows[25:]]


def parts_of(rows):
    return {"train": rows[:20], "validation": rows[20:25], "test": rows[25:]}


def saved_to_disk(folder, rows):
    import datasets

    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part) for name, part in parts_of(rows).items()}
    ).save_to_disk(folder)


def parquet_files(folder, rows):
    import datasets

    for name, part in parts_of(rows).items():
        datasets.Dataset.from_list(part).to_parquet(folder / f"{name}-00000-of-00001.parquet")


def json_files(folder, rows):
    for name, part in parts_of(rows).items():
        write(folder / f"{name}.jsonl", part)


def one_of_two_subsets(folder, rows):
    """As a hub set lays it out: the card names the configurations and their files."""
    for subset, part in (("wanted", rows), ("other", lines(9))):
        (folder / subset).mkdir()
        json_files(folder / subset, part)
    configs = "".join(
        f"- config_name: {subset}\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: {subset}/{name}.jsonl\n" for name in parts_of(rows))
        for subset in ("wanted", "other")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


@pytest.mark.parametrize("lay_out", [saved_to_disk, parquet_files, json_files, one_of_two_subsets])
@pytest.mark.parametrize("from_hub", [False, True])
def test_folders_that_datasets_knows_bring_their_splits(tmp_path, monkeypatch, lay_out, from_hub):
    rows = lines(30)
    folder = tmp_path / "data"
    folder.mkdir()
    lay_out(folder, rows)
    options = {"subset": "wanted"} if lay_out is one_of_two_subsets else {}
    if from_hub:
        asked = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(folder))
        dataset = Preferences(hub_id="owner/name", revision="1234", **options)
    else:
        dataset = Preferences(path=str(folder), **options)
    splits = dataset.load()
    assert [row.prompt for row in everything(splits)] == [
        row["prompt"] for row in (*rows[:20], *rows[20:25], *rows[25:])
    ]
    assert {path.parent for path in dataset.files()} <= {folder, *folder.iterdir()} and dataset.files()
    if from_hub:
        (((name,), how),) = asked  # once, though files and rows are both asked for
        assert (name, how["repo_type"], how["revision"]) == ("owner/name", "dataset", "1234")
        assert not {"*.py", "*.pkl", "*.bin"} & set(how["allow_patterns"])
    if options:
        with pytest.raises(UserError, match="wanted"):
            Preferences(path=str(folder)).load()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_single_file_of_datasets(tmp_path, suffix):
    datasets = pytest.importorskip("datasets")
    rows = lines(30)
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "own.parquet")
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        (arrow,) = (tmp_path / "saved").glob("*.arrow")
        arrow.rename(tmp_path / "own.arrow")
    splits = Preferences(path=str(tmp_path / f"own.{suffix}")).load()
    assert everything(splits) == everything(Preferences(path=write(tmp_path / "own.jsonl", rows)).load())


@pytest.mark.parametrize("in_folder", [True, False])
def test_offsets_that_arrow_would_follow_blindly(tmp_path, in_folder):
    """A text's length that became negative: read as it lies, it ends in a SystemError or in another's memory."""
    rows = [{"prompt": "Which bird?", "chosen": "wren", "rejected": ["owl", "kite"]} for _ in range(3)]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    content, offsets = arrow.read_bytes(), struct.pack("<4i", 0, 11, 22, 33)
    assert content.count(offsets) == 1
    arrow.write_bytes(content.replace(offsets, struct.pack("<4i", 0, 11, 5, 33)))
    with pytest.raises(UserError, match=r"cannot be read after row 0") as error:
        Preferences(path=str(tmp_path / "saved" if in_folder else arrow)).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("own.parquet", b"no parquet"), ("data/a.parquet", b"PAR1"), ("data/data.py", b"1"), ("data/a.json", b"[{]")],
)
def test_folders_that_datasets_cannot_read(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read after row 0|holds no file of rows|not JSON") as error:
        Preferences(path=str(path if path.parent == tmp_path else path.parent)).load()
    assert "\n" not in str(error.value)


def test_a_hub_set_out_of_reach(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find the requested files in the cache, and no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"hub_id=owner/name \(revision main\) cannot be fetched .*set dataset.path"):
        Preferences(hub_id="owner/name").load()
    for both in ({"path": "x", "hub_id": "y"}, {}):
        with pytest.raises(UserError, match=r"dataset\.path=FILE .*or dataset\.hub_id"):
            Preferences(**both).files()


def test_a_prompt_may_stand_in_the_conversations_alone(path):
    """TRL's implicit prompts: what the conversations share before their last message."""
    start = [message("be brief", "system"), message("why?")]
    answers = [[*start, message(text, "assistant")] for text in ("because", "no idea", "who knows")]
    row = {"chosen": answers[0], "rejected": answers[1:]}
    spelt_out = {"prompt": start, "chosen": answers[0][-1:], "rejected": [each[-1:] for each in answers[1:]]}
    others = lines(9)
    one, other = (Preferences(path=write(path, [each, *others])).load() for each in (row, spelt_out))
    assert everything(one) == everything(other)
    single = Preferences(path=write(path, [row | {"rejected": answers[1]}, *others])).load()
    assert {each.pool for each in everything(single)} == {("no idea",), ("a", "b")}
    for bad, told in [
        (row | {"rejected": [[message("how?"), answers[1][-1]]]}, "must share every message"),
        ({"chosen": answers[0][-1:], "rejected": [answers[1][-1:]]}, 'no "prompt", neither'),
        (row | {"rejected": "no idea"}, "must share every message"),
    ]:
        with pytest.raises(UserError, match=told):
            Preferences(path=write(path, [bad, *others])).load()


START = b'{"prompt": "p", '
BAD = {
    "not JSON": b'{"prompt": "p", ',
    "expected a JSON object": b'["p", "c"]',
    "not UTF-8": b'{"prompt": "caf\xe9", "chosen": "c", "rejected": ["a"]}',
    "lone surrogate": b'{"prompt": "\\ud800", "chosen": "c", "rejected": ["a"]}',
    'no "prompt"': b'{"chosen": "c", "rejected": ["a"]}',
    'no "chosen"': b'{"prompt": "p", "chosen": null, "rejected": ["a"]}',
    'no "rejected"': b'{"prompt": "p", "chosen": "c"}',
    '"prompt" is empty': b'{"prompt": " ", "chosen": "c", "rejected": ["a"]}',
    '"chosen" is empty': b'{"prompt": "p", "chosen": "", "rejected": ["a"]}',
    r'"rejected\[1\]" is empty': b'{"prompt": "p", "chosen": "c", "rejected": ["a", ""]}',
    '"chosen" must be a text.*an object': b'{"prompt": "p", "chosen": {}, "rejected": ["a"]}',
    r'"rejected\[1\]" must be a text.*true': b'{"prompt": "p", "chosen": "c", "rejected": ["a", true]}',
    '"rejected" must be .*an empty list': b'{"prompt": "p", "chosen": "c", "rejected": []}',
    '"rejected" must be .*an object': b'{"prompt": "p", "chosen": "c", "rejected": {}}',
    r'"chosen" is also rejected\[2\]': b'{"prompt": "p", "chosen": "c", "rejected": ["a", "a", "c"]}',
    "\"candidates\" must be exactly.*'d'": START + b'"chosen": "c", "rejected": ["a"], "candidates": ["c", "a", "d"]}',
    '"candidates" must be a list': b'{"prompt": "p", "chosen": "c", "rejected": ["a"], "candidates": "c"}',
    '"id" must be': b'{"prompt": "p", "chosen": "c", "rejected": ["a"], "id": 1.5}',
    'a message with the role "assistant"': START + b'"chosen": [{"role": "user", "content": "c"}], "rejected": ["a"]}',
    'without the texts "role"': b'{"prompt": [{"role": "user"}], "chosen": "c", "rejected": ["a"]}',
    "role 'bot'": b'{"prompt": [{"role": "bot", "content": "x"}], "chosen": "c", "rejected": ["a"]}',
    "without content": b'{"prompt": [{"role": "user", "content": ""}], "chosen": "c", "rejected": ["a"]}',
}


@pytest.mark.parametrize(("told", "bad"), BAD.items())
def test_a_bad_row_is_told_by_file_and_line_or_skipped_and_counted(path, told, bad):
    good = [json.dumps(row).encode() for row in lines(5)]
    path.write_bytes(b"\n".join([*good[:2], b"", bad, *good[2:]]))
    with pytest.raises(UserError, match=told) as error:
        Preferences(path=str(path)).load()
    assert str(error.value).startswith(f"{path}:4: ") and "\n" not in str(error.value)
    splits = Preferences(path=str(path), bad_rows="skip").load()
    assert len(everything(splits)) == 5
    assert splits.report["bad_rows_skipped"] == 1 and splits.report["first_bad_row"] == str(error.value)


def test_ids_given_twice(path):
    rows = [line(prompt=f"q{row}", id=f"row {row % 4}") for row in range(5)]
    with pytest.raises(UserError, match=r"own.jsonl:5: .*'row 0'.*own.jsonl:1"):
        Preferences(path=write(path, rows)).load()
    with pytest.raises(UserError, match="only some rows"):
        Preferences(path=write(path, [line(id=1), line(prompt="q")])).load()


def test_files_that_cannot_be_used(tmp_path, path):
    with pytest.raises(UserError, match=r"dataset\.path=FILE"):
        Preferences(path=None).load()
    with pytest.raises(UserError, match=r"absent\.jsonl cannot be read: No such file"):
        Preferences(path=str(tmp_path / "absent.jsonl")).load()
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"own\.jsonl is empty"):
        Preferences(path=str(path)).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no file of rows"):
        Preferences(path=str(tmp_path / "empty")).load()
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match="no usable row"):
        Preferences(path=str(path), bad_rows="skip").load()


def test_too_few_prompts_and_impossible_options(path):
    with pytest.raises(UserError, match="2 different prompts are too few"):
        Preferences(path=write(path, lines(2))).load()
    with pytest.raises(UserError, match="below 1"):
        Preferences(path=write(path, lines(9)), val_fraction=0.5, test_fraction=0.5)
