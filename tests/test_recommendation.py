"""Recommendation data: the published files byte for byte, counts of the real data, and what must never be in a pool."""

import hashlib
import json
import operator
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml

from massdpo.data.raw import SPLITS
from massdpo.data.readers.public_logs import split_titles
from massdpo.data.readers.recommendation import LastFM, Recommendation, UserSequences, near_key
from massdpo.data.schema import PreferenceExample
from massdpo.errors import UserError
from tests.conftest import ROOT, SHARED_DATA, needs_shared_data

LASTFM = str(SHARED_DATA / "lastfm")
READY = SHARED_DATA / "lastfm" / "lastfm-sft-cans20"
MOVIELENS = str(SHARED_DATA / "movielens_100k")


def set_up(name: str) -> Callable[..., UserSequences]:
    """What conf/dataset/ makes of anyone's own sequences for a public data set."""
    options = yaml.safe_load((ROOT / "conf" / "dataset" / f"{name}.yaml").read_text())
    handled = ("_target_", "name", "terms", "raw_dir", "long_rows", "limit_train", "limit_val", "limit_test")
    return partial(UserSequences, **{key: value for key, value in options.items() if key not in handled})


MovieLens100K, MovieLens1M = set_up("movielens_100k"), set_up("movielens_1m")
TRAIN_SHA256 = "ecfdf0999aee341da322e5ab4315875cbf01656caeb9321ec3c7d8209e5c03e6"  # of S-DPO's lastfm-train.json


def write_interactions(folder: Path, users: int = 30, length: int = 12, items: int = 80) -> UserSequences:
    """A small data set of one's own: distinct items of each user at distinct times."""
    rng = np.random.default_rng(0)
    lines = ["user,item,time"]
    for user in range(users):
        picks = rng.choice(items, length, replace=False)
        lines += [f"u{user},{item},{1000 * place + user}" for place, item in enumerate(picks)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{item},Thing {item:03d}\n" for item in range(items)))
    return UserSequences(raw_dir=str(folder))


def write_movielens(folder: Path, dataset: Callable[..., UserSequences]) -> None:
    """Invented films in GroupLens's two formats, with what is awkward in the real ones."""
    titles = [f"Invented Film {number} (19{number:02d})" for number in range(60)]
    titles[3], titles[4] = "Night to Invent, A (1950)", "Étrange Invention, The (1951)"
    titles[5] = titles[6] = "Same Invention (1960)"
    titles[7] = "unknown"
    rng = np.random.default_rng(1)
    ratings = [
        (user + 1, int(item) + 1, int(rng.integers(1, 6)), 10_000 * user + 10 * place)
        for user in range(20)
        for place, item in enumerate(rng.choice(60, 25, replace=False))
    ]
    tab, bar, names = ("\t", "|", ("u.data", "u.item")) if dataset is MovieLens100K else ("::", "::", None)
    ratings_name, titles_name = names or ("ratings.dat", "movies.dat")
    (folder / ratings_name).write_text("".join(tab.join(map(str, row)) + "\n" for row in ratings))
    lines = [bar.join([str(number), title, "rest"]) + "\n" for number, title in enumerate(titles, start=1)]
    (folder / titles_name).write_bytes("".join(lines).encode("iso-8859-1"))


def as_published(examples: Any) -> str:
    rows = [
        {"historyList": "::".join(each.history), "itemList": list(each.candidates), "trueSelection": each.chosen}
        for each in examples
    ]
    return json.dumps(rows, indent=4)


# LastFM, real


@needs_shared_data
def test_lastfm_counts_equal_the_data_readme() -> None:
    splits = LastFM(raw_dir=LASTFM).load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (47_872, 2_767, 2_495)
    assert (splits.report["users"], splits.report["items"], splits.report["interactions"]) == (1220, 4606, 56_794)
    lengths = Counter(len(example.history) for example in splits.test)
    assert lengths == {3: 122, 4: 111, 5: 103, 6: 92, 7: 82, 8: 75, 9: 71, 10: 1839}


@needs_shared_data
def test_legacy_reproduces_the_published_files_byte_for_byte() -> None:
    splits = LastFM(raw_dir=LASTFM, slate="legacy").load()
    assert hashlib.sha256(as_published(splits.train).encode()).hexdigest() == TRAIN_SHA256
    for split in ("val", "test"):
        assert as_published(getattr(splits, split)) == (READY / f"lastfm-{split}.json").read_text()


@needs_shared_data
@pytest.mark.slow
def test_ready_made_files_give_the_same_sequences(tmp_path: Path) -> None:
    legacy = LastFM(raw_dir=LASTFM, slate="legacy").load()
    for split in SPLITS:
        (tmp_path / f"lastfm-{split}.json").write_text(as_published(getattr(legacy, split)))
    chained, sequences = LastFM(raw_dir=str(tmp_path)).load(), LastFM(raw_dir=LASTFM).load()
    for split in SPLITS:  # whichever of the two was at hand: the same slates
        assert all(map(operator.eq, getattr(chained, split), getattr(sequences, split)))
    every_tenth = READY / "lastfm-train.every10th.json"
    (tmp_path / "lastfm-train.json").write_bytes(every_tenth.read_bytes())
    with pytest.raises(UserError, match=r"lastfm-train.json: row .* does not continue"):
        LastFM(raw_dir=str(tmp_path)).load()


@needs_shared_data
@pytest.mark.parametrize("options", [{}, {"negatives": "popularity"}, {"num_negatives": 49, "merge_titles": "near"}])
def test_no_pool_holds_the_target_or_any_item_of_its_user(options: dict[str, Any]) -> None:
    splits = LastFM(raw_dir=LASTFM, **options).load()
    names = (SHARED_DATA / "lastfm" / "id2name.txt").read_text().splitlines()
    titles = [line.split("::", 1)[1] for line in names]
    rows = map(json.loads, (SHARED_DATA / "lastfm" / "sequences.jsonl").read_text().splitlines())
    met = {f"{row['split']}/{row['user']}": {titles[item] for item in row["items"]} for row in rows}
    for split in SPLITS:
        for example in getattr(splits, split):
            assert example.candidates.count(example.chosen) == 1
            assert example.chosen not in example.pool
            assert set(example.candidates) == {example.chosen, *example.pool}
            assert len(set(example.pool)) == len(example.pool) == options.get("num_negatives", 19)
            assert not met[example.meta["user"]].intersection(example.pool)


def test_titles_with_colons_at_their_ends_are_told_apart() -> None:
    known = {":in:", "out", "a: b", ":"}
    for titles in (["out", ":in:"], [":in:", "out"], [":in:", ":in:"], ["a: b", ":in:", "out"], ["out", ":", "out"]):
        assert split_titles("::".join(titles), known) == titles
    assert split_titles("new::newer:::newest", known) == ["new", "newer", ":newest"]  # unknown: cut as it stands


def test_llaras_pickles_are_refused_and_the_recipe_turns_them_into_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published: every prefix of a training user from none on, the last one of the others, padded with 4606."""
    (tmp_path / "id2name.txt").write_text("".join(f"{item}::Artist {item}\n" for item in range(40)))
    users = {"train_data": [range(13), range(2, 8)], "Val_data": [range(20, 31)], "Test_data": [range(3, 9)]}
    for name, sequences in users.items():
        rows = []
        for items in map(list, sequences):
            for end in range(len(items)) if name == "train_data" else [len(items) - 1]:
                history = items[max(0, end - 10) : end]
                rows.append({"seq": history + [4606] * (10 - len(history)), "len_seq": end, "next": items[end]})
        pandas.DataFrame(rows).to_pickle(tmp_path / f"{name}.df")
    with pytest.raises(UserError, match=r"Test_data.df is one of LLaRA's pickled tables.*conf/dataset/lastfm.yaml"):
        LastFM(raw_dir=str(tmp_path)).load()
    lines = (ROOT / "conf" / "dataset" / "lastfm.yaml").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.removeprefix("#     ") for line in lines if line.startswith("#     ")), {})
    splits = LastFM(raw_dir=str(tmp_path), num_negatives=3).load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (10 + 3, 8, 3)
    assert splits.train[9].history == tuple(f"Artist {item}" for item in range(2, 12))


# MovieLens, real


@needs_shared_data
def test_movielens_100k_is_cut_as_published() -> None:
    options = MovieLens100K(raw_dir=MOVIELENS)
    splits = options.load()
    assert 100_000 - splits.report["ratings_below_minimum"] == 82_520
    users = {split: {example.meta["user"] for example in getattr(splits, split)} for split in SPLITS}
    kept: dict[str, list[tuple[int, int]]] = {}
    for line in (SHARED_DATA / "movielens_100k" / "u.data").read_text().splitlines():
        user, item, rating, time = line.split("\t")
        if int(rating) >= 3:
            kept.setdefault(user, []).append((int(time), int(item)))
    assert len({item for rows in kept.values() for _, item in rows}) == 1574
    for split in ("val", "test"):
        rows = [json.loads(line) for line in (SHARED_DATA / "movielens_100k" / f"llara_{split}.jsonl").open()]
        assert {str(row["user_id"]) for row in rows} == users[split]
        for row in rows:  # their order among equal times cannot be recovered, so: the target is one of the latest
            latest = max(kept[str(row["user_id"])])[0]
            assert (latest, row["next"]) in kept[str(row["user_id"])]


# the formats, with invented films


@pytest.mark.parametrize("dataset", [MovieLens100K, MovieLens1M])
def test_movielens_formats(tmp_path: Path, dataset: Callable[..., UserSequences]) -> None:
    write_movielens(tmp_path, dataset)
    options = dataset(raw_dir=str(tmp_path), num_negatives=5, min_rating=1)
    splits = options.load()
    seen = {title for example in splits.train for title in (*example.candidates, *example.history)}
    assert {"A Night to Invent (1950)", "The Étrange Invention (1951)", "unknown"} <= seen
    assert splits.report["items_merged_by_title"] == 1 and splits.report["ratings_below_minimum"] == 0
    assert [{example.meta["user"] for example in getattr(splits, split)} for split in SPLITS] == [
        {str(user) for user in range(1, 17)},
        {"17", "18"},
        {"19", "20"},
    ]  # users' first times rise with their number: 8 : 1 : 1 of 20
    below = dataset(raw_dir=str(tmp_path), num_negatives=5, min_rating=4).load()
    low = sum(int(line.replace("::", "\t").split("\t")[2]) < 4 for line in options.files()[0].open())
    assert below.report["ratings_below_minimum"] == low > 0


def test_split_by_time_puts_every_target_after_the_training_ones(tmp_path: Path) -> None:
    base = write_interactions(tmp_path)
    splits = UserSequences(raw_dir=base.raw_dir, split="time", num_negatives=5).load()
    time_of = {}
    for line in (tmp_path / "interactions.csv").read_text().splitlines()[1:]:
        user, item, time = line.split(",")
        time_of[user, f"Thing {int(item):03d}"] = int(time)
    times = [[time_of[each.meta["user"], each.chosen] for each in getattr(splits, split)] for split in SPLITS]
    assert max(times[0]) < min(times[1]) and max(times[1]) < min(times[2])
    assert sum(map(len, times)) == 30 * (12 - 3)


def test_split_by_user_is_seeded_and_disjoint(tmp_path: Path) -> None:
    base = write_interactions(tmp_path)
    cut = lambda seed: [  # noqa: E731
        {each.meta["user"] for each in getattr(UserSequences(raw_dir=base.raw_dir, seed=seed).load(), split)}
        for split in SPLITS
    ]
    zero = cut(0)
    assert [len(users) for users in zero] == [24, 3, 3] and len(set.union(*zero)) == 30
    assert zero == cut(0) != cut(1)


def test_repeats_and_equal_titles_are_merged_and_counted(tmp_path: Path) -> None:
    titles = {str(number): f"Thing {number}" for number in range(40)} | {"40": "thing  5", "41": "Thing-6"}
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{item},{title}\n" for item, title in titles.items()))
    rows = [(f"u{user}", item) for user in range(20) for item in ("5", "6", str(10 + user), "40", "41", "5", "7", "8")]
    (tmp_path / "interactions.csv").write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in rows))
    equal = UserSequences(raw_dir=str(tmp_path), num_negatives=2).load()
    assert equal.report["items_merged_by_title"] == 1  # "thing  5"
    assert equal.report["repeats_left_out"] == 40  # each user meets 5 as 40 and again as 5
    merged = UserSequences(raw_dir=str(tmp_path), num_negatives=2, merge_titles="near").load()
    assert merged.report["items_merged_by_title"] == 2 and merged.report["repeats_left_out"] == 60


def test_near_duplicates() -> None:
    assert near_key("The Inventors & Co.") == near_key("inventors and co") == "inventors and co"
    assert near_key("Invention (1954)") != near_key("Invention (1995)")
    assert near_key("!!!") != near_key("???")


def test_prompts(tmp_path: Path) -> None:
    base = write_interactions(tmp_path)
    load = partial(lambda **options: UserSequences(raw_dir=base.raw_dir, num_negatives=4, **options).load().train)
    for example in load(max_history=5):
        assert example.prompt.endswith("Answer:") and "; ".join(example.candidates) in example.prompt
        joined = ", ".join(example.history)
        assert 3 <= len(example.history) <= 5
        assert example.prompt[example.history_start :].startswith(joined)
        for count in range(len(example.history)):
            shorter = example.without_oldest(count)
            assert len(example.prompt) - len(shorter) == len(joined) - len(", ".join(example.history[count:]))
            assert shorter[example.history_start :].startswith(", ".join(example.history[count:]))
    bare = load(list_candidates=False)
    assert not any(title in example.prompt for example in bare for title in example.candidates)
    openings = lambda examples: {example.prompt[: example.history_start] for example in examples}  # noqa: E731
    assert len(openings(load())) == 1 and len(openings(load(prompts="several"))) == 4
    assert [each.prompt for each in load(prompts="several")] == [each.prompt for each in load(prompts="several")]


def row_of(make: Callable[[], Recommendation], row: int) -> PreferenceExample:
    return make().load().train[row]


def test_rows_are_the_same_in_any_process_and_order(tmp_path: Path) -> None:
    base = write_interactions(tmp_path)
    make = partial(UserSequences, raw_dir=base.raw_dir, prompts="several", negatives="popularity")
    whole = list(make().load().train)
    rows = list(range(0, len(whole), 37))
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(partial(row_of, make), rows)) == [whole[row] for row in rows]
    assert whole == make().load().train[:]
    assert [each.candidates for each in make(seed=1).load().train] != [each.candidates for each in whole]


def test_reading_a_split_takes_no_more_memory_for_more_rows(tmp_path: Path) -> None:
    peaks = []
    for users in (400, 1600):  # 9 rows a user: both more than one block
        folder = tmp_path / str(users)
        folder.mkdir()
        write_interactions(folder, users=users)
        train = UserSequences(raw_dir=str(folder)).load().train
        row_count = 0
        tracemalloc.start()
        for _ in train:
            row_count += 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert row_count == len(train) == users * 0.8 * 9
    # a block has 2,880 rows in the first and 4,096 in the second: 1.42 times, and some slack for what Python keeps
    assert peaks[1] < 1.7 * peaks[0]


# what users can cause


def test_missing_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"raw_dir is not set"):
        UserSequences().load()
    with pytest.raises(UserError, match=r"interactions.csv is missing .*dataset.raw_dir"):
        UserSequences(raw_dir=str(tmp_path)).load()
    base = write_interactions(tmp_path, users=2)
    with pytest.raises(UserError, match=r"the val split is empty"):
        base.load()
    write_interactions(tmp_path, items=20)
    with pytest.raises(UserError, match=r"all but 8 of the 20 items.*num_negatives=8"):
        list(UserSequences(raw_dir=str(tmp_path)).load().train)
    (tmp_path / "items.csv").write_text("")
    with pytest.raises(UserError, match=r"items.csv is empty"):
        base.load()


def test_time_needs_times(tmp_path: Path) -> None:
    base = write_interactions(tmp_path)
    lines = (tmp_path / "interactions.csv").read_text().splitlines()
    (tmp_path / "interactions.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
    for split in ("time", "first_seen"):
        with pytest.raises(UserError, match=r"needs times, and this data has none"):
            UserSequences(raw_dir=base.raw_dir, split=split).load()
    with pytest.raises(UserError, match=r"LastFM has no times"):
        LastFM(raw_dir="x", split="time")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slate": "legacy", "num_negatives": 5}, "legacy has 19 negatives"),
        ({"slate": "legacy"}, "legacy needs at least 30 different titles, and none twice: use dataset.slate=clean$"),
    ],
)
@pytest.mark.parametrize("titles", [29, 40])
def test_legacy_slates_need_titles_that_differ(
    tmp_path: Path, options: dict[str, Any], message: str, titles: int
) -> None:
    """Too few, or enough of which two are equal."""
    names = [f"Artist {item}" for item in range(titles - 1)] + ["artist 0"]
    (tmp_path / "id2name.txt").write_text("".join(f"{item}::{name}\n" for item, name in enumerate(names)))
    row = {"split": "train", "user": 0, "items": [*range(8)]}
    (tmp_path / "sequences.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        LastFM(raw_dir=str(tmp_path), **options).load()
