"""Preparing once: what comes back from the disk is what was made, until anything it depends on changes."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from massdpo.data.prepare import Subset, limited, prepare
from massdpo.data.readers.synthetic import SyntheticMCQA
from massdpo.data.schema import PreferenceExample
from massdpo.data.stored import StoredExamples
from massdpo.errors import UserError
from massdpo.store import Cache
from tests.conftest import ROOT, SHARED_DATA, needs_shared_data
from tests.test_mcqa import small
from tests.test_recommendation import write_interactions

SPLITS = ("train", "val", "test")
CACHED = ("prepared", "tokens")
OWN = ("lastfm", "movielens_100k", "movielens_1m", "sequences", "qasc", "medmcqa", "arc", "commonsenseqa", "openbookqa")


def node(name: str, **options: Any) -> dict[str, Any]:
    """The dataset's options, without a `data_dir`."""
    written = yaml.safe_load((ROOT / "conf" / "dataset" / f"{name}.yaml").read_text())
    return written | ({"raw_dir": None} if "raw_dir" in written else {}) | options


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def raw(tmp_path: Path) -> str:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_interactions(folder)
    return str(folder)


def test_what_comes_back_is_what_was_made(cache: Cache, raw: str) -> None:
    prepared = prepare(node("sequences", raw_dir=raw, prompts="several"), cache)
    made = write_interactions(Path(raw)).__class__(raw_dir=raw, prompts="several").load()
    for split in SPLITS:
        assert list(getattr(prepared, split)) == list(getattr(made, split))
        assert getattr(prepared, split)[-1] == getattr(made, split)[len(getattr(made, split)) - 1]
    assert prepared.train[2:9:3] == made.train[2:9:3] and prepared.report == made.report


def test_made_once(cache: Cache, raw: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    terms = "all invented"
    first = prepare(node("sequences", raw_dir=raw, terms=terms), cache)
    assert capsys.readouterr().err.count(terms) == 1
    monkeypatch.setattr(StoredExamples, "written", None)  # would fail if anything were made again
    second = prepare(node("sequences", raw_dir=raw, terms=terms), cache)
    assert second.digest == first.digest and list(second.test) == list(first.test)
    assert capsys.readouterr().err == ""


def test_what_a_user_should_know_is_told_each_time(
    cache: Cache, raw: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with open(Path(raw) / "interactions.csv", "a") as file:
        file.write("u1,999,5\n")
    questions = small(tmp_path)
    own = questions().raw_dir
    for _ in range(2):  # the second time from the cache
        prepare(node("sequences", raw_dir=raw, bad_rows="skip"), cache)
        assert re.search(r"sequences: 1 rows skipped, the first: .*interactions.csv:362", capsys.readouterr().err)
        held_out = {"train_file": "train.jsonl", "test_file": "test.jsonl", "val_size": 3}
        prepare(node("qasc", raw_dir=own, **held_out, num_negatives=5), cache)
        told = capsys.readouterr().err
        assert "qasc: test is the official labelled split test.jsonl (the official test split has no answers)" in told
        assert "qasc: val is 3 questions held out of train.jsonl" in told


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_negatives": 5}, {"limit_train": 10}, "raw"])
def test_the_digest_changes_with_what_it_depends_on(cache: Cache, raw: str, change: dict[str, Any] | str) -> None:
    before = prepare(node("sequences", raw_dir=raw), cache)
    if change == "raw":
        path = Path(raw) / "items.csv"
        path.write_text(path.read_text().replace("Thing 007", "Thing 7"))
    after = prepare(node("sequences", raw_dir=raw) | (change if isinstance(change, dict) else {}), cache)
    assert after.digest != before.digest and list(after.train) != list(before.train)


def test_moving_the_raw_folder_changes_nothing(cache: Cache, raw: str, tmp_path: Path) -> None:
    before = prepare(node("sequences", raw_dir=raw), cache)
    Path(raw).rename(tmp_path / "moved")
    assert prepare(node("sequences", raw_dir=str(tmp_path / "moved")), cache).digest == before.digest


def lines(first: int) -> str:
    rows = ({"prompt": f"q{row}", "chosen": "a", "rejected": "b"} for row in range(first, first + 4))
    return "".join(json.dumps(row) + "\n" for row in rows)


def impressions(first: int) -> str:
    rows = ({"user": row, "history": ["a"], "shown": ["b", "c"], "clicked": ["b"]} for row in range(first, first + 40))
    return "".join(json.dumps(row) + "\n" for row in rows)


def questions(first: int) -> str:
    return lines(first).replace("chosen", "answer").replace('"rejected": "b"', '"wrong": ["b"]')


SHARD = "train-00000-of-00002.jsonl", "validation-00000-of-00001.jsonl", "train-00001-of-00002.jsonl"


@pytest.mark.parametrize("names", [("train/a.jsonl", "val/b.jsonl", "train/b.jsonl"), SHARD])
@pytest.mark.parametrize(
    ("name", "written"), [("preferences", lines), ("mcqa", questions), ("impressions", impressions)]
)
def test_the_name_of_a_file_counts_where_it_says_the_split(
    cache: Cache, tmp_path: Path, name: str, written: Callable[[int], str], names: tuple[str, str, str]
) -> None:
    """Its content is the same, and stands in the same place among the others'."""
    train, before, after = names
    for place, file in enumerate((train, before, "test/c.jsonl")):
        (tmp_path / "own" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / file).write_text(written(100 * place))
    asked = node(name, path=str(tmp_path / "own")) | ({"val_size": 2, "num_negatives": "own"} if name == "mcqa" else {})
    first = prepare(asked, cache)
    (tmp_path / "own" / before).rename(tmp_path / "own" / after)
    second = prepare(asked, cache)
    assert second.digest != first.digest
    assert len(second.train) > len(first.train) and len(second.val) < len(first.val)


def test_the_card_of_impressions_counts(cache: Cache, tmp_path: Path) -> None:
    for place, name in enumerate("abc"):
        (tmp_path / f"{name}.jsonl").write_text(impressions(100 * place))
    sizes = []
    for train, val in (("a", "b"), ("ab", "")):
        parts = [("train", train), ("validation", val), ("test", "c")]
        config = [{"split": split, "path": [f"{name}.jsonl" for name in names]} for split, names in parts if names]
        (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [{'data_files': config}]})}---\n")
        sizes.append(len(prepare(node("impressions", path=str(tmp_path)), cache).train))
    assert sizes[1] > sizes[0]


def chosen_of(split: Any) -> list[str]:
    return [example.chosen for example in split]


def test_another_process_can_read_a_split(cache: Cache, raw: str) -> None:
    splits = prepare(node("sequences", raw_dir=raw, limit_val=5), cache)
    assert list(pickle.loads(pickle.dumps(splits.train))) == list(splits.train)
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(chosen_of, splits.val).result() == chosen_of(splits.val)


def test_limits_are_seeded_subsets_in_order_one_within_another() -> None:
    examples = [PreferenceExample(f"t/{row}", "p", "c", ("n",), ("c", "n")) for row in range(100)]
    small, large = limited(examples, 10, 0, "train"), limited(examples, 30, 0, "train")
    assert isinstance(small, Subset) and len(small) == 10 and len(large) == 30
    rows = lambda some: [int(each.id[2:]) for each in some]  # noqa: E731
    assert set(rows(small)) <= set(rows(large)) and rows(large) == sorted(rows(large))
    assert rows(small) != rows(limited(examples, 10, 1, "train")) != rows(limited(examples, 10, 1, "val"))
    assert rows(limited(examples, 1000, 0, "train")) == list(range(100))
    assert limited(examples, None, 0, "train") is examples


READERS = "massdpo.data.readers"


@pytest.mark.parametrize(
    ("reader", "options", "allowed"),
    [
        *(
            ("recommendation.UserSequences", {"limit_train": wrong}, "a whole number of at least 1, or null")
            for wrong in (0, -1, 2.5, True, "ten")
        ),
        ("recommendation.UserSequences", {"negatives": 3}, "uniform | popularity"),
        ("recommendation.UserSequences", {"num_negatives": 0}, "a whole number of at least 1, or own"),
        ("recommendation.UserSequences", {"num_negatives": "own"}, "a whole number"),
        ("recommendation.UserSequences", {"max_history": 0}, "a whole number of at least 1"),
        ("recommendation.UserSequences", {"bad_rows": "ignore"}, "error | skip"),
        ("recommendation.UserSequences", {"seed": "x"}, "a whole number of at least 0"),
        ("recommendation.UserSequences", {"list_candidates": "maybe"}, "true | false"),
        ("recommendation.UserSequences", {"split": "first"}, "user | first_seen | time"),
        ("recommendation.UserSequences", {"candidates": "some"}, "sampled | all"),
        ("recommendation.UserSequences", {"min_rating": True}, "a number, or null"),
        ("recommendation.LastFM", {"slate": "dirty"}, "clean | legacy"),
        ("impressions.Impressions", {"split": "first_seen"}, "user | time"),
        ("impressions.Impressions", {"noun": "song"}, "item | film | artist"),
        ("impressions.Impressions", {"min_history": 0}, "a whole number of at least 1"),
        ("impressions.Impressions", {"missing_titles": "drop"}, "error | skip | id"),
        ("mcqa.MultipleChoice", {"answer": 1}, "letter | index0 | index1 | text, or null"),
        ("mcqa.MultipleChoice", {"num_negatives": "some"}, "a whole number of at least 1, or own"),
        ("mcqa.MultipleChoice", {"val_size": 1.5}, "a whole number of at least 1, or a number between 0 and 1"),
        ("preferences.Preferences", {"ties": "lose"}, "drop | keep"),
        ("preferences.Preferences", {"val_fraction": 1}, "a number between 0 and 1"),
    ],
)
def test_an_option_out_of_range_is_refused_before_a_file_is_opened(
    reader: str, options: dict[str, Any], allowed: str, cache: Cache
) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError) as caught:
        prepare({"_target_": f"{READERS}.{reader}", "name": "own", **options}, cache)
    shown = json.dumps(value) if not isinstance(value, str) else repr(value)
    assert str(caught.value) == f"dataset.{name}={shown} is not allowed: use {allowed}"


def test_a_dataset_without_raw_files_is_made_once_and_limited_too(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = {"_target_": "massdpo.data.readers.synthetic.SyntheticMCQA", "num_train": 20}
    made = SyntheticMCQA(num_train=20).load()
    splits = prepare(world, cache)
    assert (list(splits.train), list(splits.val), list(splits.test)) == (made.train, made.val, made.test)
    monkeypatch.setattr(SyntheticMCQA, "load", None)  # would fail if it were made again
    some = prepare(world | {"limit_train": 7, "limit_test": 3}, cache)
    assert len(some.train) == 7 and all(row in made.test for row in some.test) and len(some.test) == 3


def test_a_composed_config_is_taken_as_it_is(cache: Cache, raw: str) -> None:
    composed = OmegaConf.create({"seed": 3, "dataset": node("sequences", raw_dir=raw, seed="${seed}")})
    assert prepare(composed.dataset, cache).digest == prepare(node("sequences", raw_dir=raw, seed=3), cache).digest


PROBE = """
import json, sys, threading, time
from pathlib import Path
from massdpo.data.prepare import prepare
from massdpo.data.tokenize import tokenize_splits
from massdpo.model.scratch import learn_tokenizer
from massdpo.store import Cache

node, cache = json.loads(sys.argv[1]), Cache(Path(sys.argv[2]))
peak = 0

def watch():  # files that are mapped are not counted: the system takes their pages back when it needs them
    global peak
    while True:
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.005)

tokenizer = learn_tokenizer(["Thing 1234567890, oldest first: Items a user has chosen."], 300)
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
before, started = peak, time.process_time()
splits = prepare(node, cache)
prepared, seconds = peak, time.process_time() - started
tokenize_splits(splits, tokenizer, 2048, False, cache)
print(json.dumps({"prepare": prepared - before, "tokenize": peak - before, "seconds": seconds}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_slates_and_a_million_would_take_minutes(tmp_path: Path) -> None:
    """Four times the interactions: what is written grows fourfold, memory by the interactions themselves.

    On one thread: each thread of the tokenizer keeps an arena of freed memory, which grows with chance, not with the
    data (a quarter to over a third of what is written; .15 on one thread, whatever else runs).
    """
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    found, written = [], []
    for users in (500, 2000):
        folder = tmp_path / str(users)
        folder.mkdir()
        write_interactions(folder, users=users, length=50, items=5_000)
        config = json.dumps(node("sequences", raw_dir=str(folder)))
        command = [sys.executable, "-c", PROBE, config, str(folder / "cache")]
        answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(answer.stdout))
        sizes = {kind: sum(path.stat().st_size for path in (folder / "cache" / kind).rglob("*.*")) for kind in CACHED}
        written.append(sizes)
    more = {name: found[1][name] - found[0][name] for name in ("prepare", "tokenize")}
    assert more["prepare"] < 0.15 * (written[1]["prepared"] - written[0]["prepared"])
    assert more["tokenize"] < 0.3 * (written[1]["tokens"] - written[0]["tokens"])  # ids and places are held
    assert found[1]["seconds"] < 18  # of CPU, for a tenth of the million that may take three minutes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_million_rows_of_distinct_responses_would_fit_in_two_gigabytes(tmp_path: Path) -> None:
    """No text is held and no id: 16,000 further rows, each with five responses of its own, add less than 1 kB each."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    found = []
    for rows in (8_000, 24_000):
        path = tmp_path / f"{rows}.jsonl"
        with open(path, "w") as file:
            for row in range(rows):
                rejected = [f"Things {row} that a user has not chosen, {place}" for place in range(4)]
                asked = {"prompt": f"Items {row}, oldest:", "chosen": f"Things {row} a user has chosen"}
                file.write(json.dumps(asked | {"rejected": rejected}) + "\n")
        command = [
            sys.executable,
            "-c",
            PROBE,
            json.dumps(node("preferences", path=str(path))),
            str(tmp_path / "cache"),
        ]
        answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(answer.stdout)["tokenize"])
    assert (found[1] - found[0]) / 16_000 < 1_000


def test_mistakes_come_out_as_user_errors(cache: Cache, raw: str) -> None:
    with pytest.raises(UserError, match=r"no published address: set dataset.raw_dir"):
        prepare(node("sequences"), cache)
    (Path(raw) / "items.csv").write_text("item,title\n1,\n")
    with pytest.raises(UserError, match=r"items.csv:2: item '1' has no title"):
        prepare(node("sequences", raw_dir=raw), cache)
    assert not list((cache.root / "prepared").glob("[!.]*/")), "a failed preparation must leave nothing behind"


@pytest.mark.parametrize("name", OWN)
def test_every_option_has_a_comment_and_the_class_takes_it(name: str) -> None:
    from hydra.utils import instantiate

    lines = (ROOT / "conf" / "dataset" / f"{name}.yaml").read_text().splitlines()
    options = [line for line in lines if not line.startswith(("#", "_target_", "name", "terms"))]
    for place, line in enumerate(lines):
        if line in options:
            assert " # " in line or lines[place - 1].startswith("#"), f"{name}: {line} has no comment"
    options_node = node(name)
    limits = [options_node.pop(f"limit_{split}") for split in SPLITS]
    terms = options_node.pop("terms", "")
    assert options_node.pop("long_rows") == "error"
    assert options_node.pop("name") == name and limits == [None] * 3 and (terms or name == "sequences")
    instance = instantiate(options_node, _convert_="all")
    for key, value in options_node.items():
        if key != "_target_":
            assert getattr(instance, key) == value


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "folder", "counts"), [("lastfm", "lastfm", (47_872, 2_767, 2_495)), ("qasc", "qasc", (7_634, 500, 926))]
)
def test_real_data(cache: Cache, name: str, folder: str, counts: tuple[int, int, int]) -> None:
    splits = prepare(node(name, raw_dir=str(SHARED_DATA / folder)), cache)
    assert (len(splits.train), len(splits.val), len(splits.test)) == counts
    start = time.perf_counter()
    prepare(node(name, raw_dir=str(SHARED_DATA / folder)), cache)
    assert time.perf_counter() - start < 2
    ids = [example.id for split in SPLITS for example in getattr(splits, split)]
    assert len(set(ids)) == sum(counts)
    json.dumps(splits.report)
