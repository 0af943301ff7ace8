"""The look-up finds slates that tell their target and nothing else; the page and the export hold what they promise."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from massdpo.data.readers.recommendation import LastFM, UserSequences
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.evaluation.baselines import baselines, guess_metrics, guessed, leak_check
from massdpo.store import Cache
from massdpo.tasks.inspect import COUNTED, export, sample
from massdpo.tasks.inspect import page as page_of
from tests.conftest import SHARED_DATA, needs_shared_data
from tests.test_recommendation import write_interactions

LASTFM = str(SHARED_DATA / "lastfm")


def splits_of(*slates: list[tuple[str, ...]]) -> Splits:
    """Splits whose examples are (chosen, candidate, candidate, ...)."""
    named = [
        [
            PreferenceExample(f"{name}/{row}", "p", chosen, tuple(each for each in slate if each != chosen), slate)
            for row, (chosen, *slate_list) in enumerate(rows)
            for slate in [tuple(slate_list)]
        ]
        for name, rows in zip(("train", "val", "test"), slates, strict=True)
    ]
    return Splits(named[0], named[1], named[2])


@needs_shared_data
@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"negatives": "popularity"}])
def test_clean_slates_leave_the_look_up_at_chance(options: dict[str, object]) -> None:
    found = leak_check(LastFM(raw_dir=LASTFM, **options).load())
    assert found["chance"] == pytest.approx(1 / 20)
    assert abs(found["accuracy"] - found["chance"]) < 4 * found["standard_error"]
    assert found["matched"] > 0.5  # it did try


@needs_shared_data
def test_legacy_slates_give_the_target_away() -> None:
    assert leak_check(LastFM(raw_dir=LASTFM, slate="legacy").load())["accuracy"] > 0.5


def test_the_look_up_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # who was never a target is judged as a is
    monkeypatch.setattr("massdpo.evaluation.baselines.crc32", lambda text: 0)
    train = [("a", "a", "x", "y"), ("a", "a", "y", "z"), ("a", "z", "a", "x"), ("b", "x", "y", "b")]
    test = [
        ("a", "a", "x", "q"),  # a at its usual place beside a remembered x: found
        ("r", "b", "r", "s"),  # nobody at their place or beside those remembered: one of three
        ("x", "a", "x", "q"),  # a again matches best: wrong
        ("b", "a", "q", "b"),  # a and b at their places, equally good: one of two
    ]
    found = leak_check(splits_of(train, [], test))
    assert found["accuracy"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 2) / 4)
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["standard_error"] == pytest.approx((1 / 3 * 2 / 3 / 4) ** 0.5)
    assert found["matched"] == 0.75


def test_popularity_is_no_leak(tmp_path: Path) -> None:
    """Few training rows, so that only popular items were ever targets; clean slates still leave the look-up at chance.

    Judging unknown candidates as matching nothing would find 0.11 of the targets here, 7 standard errors above chance.
    """
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 401)
    picks = [rng.choice(400, 12, replace=False, p=weights / weights.sum()) for _ in range(600)]
    rows = [f"u{user},{item},{time}" for user, items in enumerate(picks) for time, item in enumerate(items)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,time", *rows]))
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{item},Thing {item}\n" for item in range(400)))
    whole = UserSequences(raw_dir=str(tmp_path)).load()
    found = leak_check(Splits(whole.train[:200], whole.val[:1], whole.test))
    assert len(whole.test) == 540 and abs(found["accuracy"] - 0.05) < 4 * found["standard_error"]
    assert guess_metrics(whole)["popularity/accuracy"] > 0.3


def test_the_split_in_question_teaches_the_look_up_nothing() -> None:
    rows = [(each, each, "x", "y") for each in "abcdefgh"]
    assert leak_check(splits_of([], [], rows))["accuracy"] == pytest.approx(1 / 3)
    assert leak_check(splits_of([], rows, rows))["accuracy"] == 1


def test_popularity_by_hand() -> None:
    train = [("a", "a", "b"), ("a", "a", "b"), ("b", "a", "b")]
    test = [("a", "b", "a", "c"), ("b", "b", "a", "c"), ("c", "d", "c", "e")]  # ranks 1, 2, and 1 to 3 among equals
    found = guess_metrics(splits_of(train, [], test))
    assert found["popularity/accuracy"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert found["popularity/mrr"] == pytest.approx((1 + 1 / 2 + (1 + 1 / 2 + 1 / 3) / 3) / 3)
    second = 1 / math.log2(3)
    assert found["popularity/ndcg@5"] == pytest.approx((1 + second + (1 + second + 0.5) / 3) / 3)
    assert found["popularity/recall@1"] == found["popularity/accuracy"] and found["popularity/recall@5"] == 1


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=6), min_size=1, max_size=4))
def test_expected_metrics_are_the_mean_over_every_order_of_equals(scores: list[list[int]]) -> None:
    """Against the plain way: rank the target, candidate 0, in every order of the candidates and average."""
    names = [[f"{row}/{place}" for place in range(len(each))] for row, each in enumerate(scores)]
    examples = splits_of([], [], [(slate[0], *slate) for slate in names]).test
    found = guessed(lambda example: scores[examples.index(example)], examples).metrics()

    def ranks(each: list[int]) -> list[int]:
        orders = itertools.permutations(range(len(each)))
        return [1 + sorted(order, key=lambda place: -each[place]).index(0) for order in orders]  # sorting is stable

    def mean(value: Callable[[int], float]) -> float:
        return float(np.mean([np.mean([value(rank) for rank in ranks(each)]) for each in scores]))

    assert found["accuracy"] == pytest.approx(mean(lambda rank: rank == 1))
    assert found["recall@3"] == pytest.approx(mean(lambda rank: rank <= 3))
    assert found["ndcg@3"] == pytest.approx(mean(lambda rank: (rank <= 3) / math.log2(1 + rank)))
    assert found["mrr"] == pytest.approx(mean(lambda rank: 1 / rank))


def test_popularity_is_counted_in_training_alone() -> None:
    train, other = [("a", "a", "b")], [("b", "a", "b")] * 5
    with_val = guess_metrics(splits_of(train, other, [("a", "a", "b")]))
    assert (
        with_val["popularity/accuracy"]
        == 1
        == guess_metrics(splits_of(train, [], [("a", "a", "b")]))["popularity/accuracy"]
    )
    assert guess_metrics(splits_of([], [("a", "a", "b")], [("a", "a", "b")]))["popularity/accuracy"] == 0.5


def test_only_recommendation_has_baselines_and_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    assert baselines(splits_of([], [], [("a", "a", "b")]), cache) == {}
    splits = write_interactions(tmp_path).load()
    first = baselines(splits, cache)
    assert first == guess_metrics(splits)
    assert {name.split("/")[0] for name in first} == {"popularity", "lookup"} and "lookup/ndcg@10" in first
    monkeypatch.setattr("massdpo.evaluation.baselines.guess_metrics", None)  # would fail if it were computed again
    assert baselines(splits, cache) == first


@pytest.fixture
def prepared(tmp_path: Path) -> Splits:
    return write_interactions(tmp_path).load()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")


def test_the_page(prepared: Splits, tokenizer: PreTrainedTokenizerFast) -> None:
    page = page_of(prepared, prepared, tokenizer, "val")
    for expected in ("train: 216 examples", "val: 27 examples", "pool sizes: 19 (216x)"):
        assert expected in page
    for example in prepared.val[:3]:
        place = example.candidates.index(example.chosen) + 1
        assert example.prompt in page and f"chosen, number {place} of a slate of 20: {example.chosen}\n" in page
        assert f"pool (19): {' | '.join(example.pool)}\n" in page + "\n"
    assert "leak check, standard error:" in page and "lookup/accuracy:" in page and "popularity/mrr:" in page
    assert "per response: 2 to 2, median 2" in page  # "Thing 001" in words
    with pytest.raises(UserError, match="split must be train, val or test"):
        page_of(prepared, prepared, tokenizer, "dev")


def test_a_large_split_is_sampled_evenly_and_said_so(prepared: Splits, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = replace(prepared, train=[*prepared.train] * 20)
    looked_at = sample(whole)
    assert len(looked_at.train) == COUNTED and looked_at.val == list(prepared.val)
    assert looked_at.train[0] == whole.train[0] and looked_at.train[-1] == whole.train[-1]
    assert len({example.id for example in looked_at.train}) > 200  # of 216
    page = page_of(whole, looked_at, tokenizer)
    assert "train: 4320 examples; counted here: 300 of them" in page and "val: 27 examples\n" in page


def test_what_repeats_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    """All prompts of `splits_of` are equal, and one slate holds a text twice but for its case."""
    splits = splits_of([("a", "a", "b"), ("a", "a", "A")], [("a", "a", "b")], [("b", "a", "b")] * 3)
    train, val, test = page_of(splits, splits, tokenizer).split("\n\n")[:3]
    assert "prompts that repeat an earlier one: 1" in train and "slates that hold a text twice: 1" in train
    assert "prompts also in train: 1" in val and "slates that hold a text twice: 0" in val
    assert "prompts that repeat an earlier one: 2" in test and "prompts also in train: 3" in test


def test_the_export(prepared: Splits, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "test.jsonl"
    export(prepared.test, "test", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(prepared.test) == 27
    for row, example in zip(rows, prepared.test, strict=True):
        assert set(row) == {"split", "id", "prompt", "chosen", "pool", "candidates"}
        assert row["split"] == "test" and row["id"] == example.id and row["prompt"] == example.prompt
        assert row["candidates"] == list(example.candidates) and row["pool"] == list(example.pool)
    again = tmp_path / "again.jsonl"
    export(UserSequences(raw_dir=str(tmp_path)).load().test, "test", again)
    assert again.read_bytes() == out.read_bytes()
