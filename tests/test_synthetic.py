"""The synthetic worlds: functions of their seed, honest splits, pools without the target."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from massdpo.data.readers.synthetic import SyntheticMCQA, SyntheticRec
from massdpo.data.readers.synthetic.knowledge import QUESTIONS, RELATIONS
from massdpo.data.readers.synthetic.viewers import PARTS
from massdpo.errors import UserError
from massdpo.store import digest
from tests.conftest import ROOT

SMALL = {"num_train": 300, "num_val": 50, "num_test": 100}
WORLDS = pytest.mark.parametrize("world", [SyntheticMCQA, SyntheticRec])


def rows(splits):
    return [*splits.train, *splits.val, *splits.test]


def content(splits):
    """Of everything but where it was read from, which no run sees."""
    fields = (asdict(row) for row in rows(splits))
    return digest(*({name: value for name, value in row.items() if name != "where"} for row in fields))


@pytest.mark.parametrize(
    ("world", "known"),
    [(SyntheticMCQA(), "421596ec2f403f5950a6dcc0f57b0cf0"), (SyntheticRec(), "585c98fe9b5c0df4c2acb79b8c57a364")],
)
def test_the_default_worlds_stay_what_they_are(world, known):
    """Results were published on them: a change of a single byte needs another name or option."""
    assert content(world.load()) == known


@WORLDS
def test_the_seed_alone_decides(world):
    """Another process with another hash seed makes the same world; another seed another one; no global state moves."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    splits = world(**SMALL).load()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    code = f"from tests.test_synthetic import *; print(content({world.__name__}(**{SMALL}).load()))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert printed.stdout.strip() == content(splits)
    assert content(world(**SMALL, seed=1).load()) != content(splits)


@WORLDS
def test_no_prompt_stands_twice_and_ids_are_unique(world):
    splits = world(**SMALL).load()
    assert [len(splits.train), len(splits.val), len(splits.test)] == [300, 50, 100]
    assert len({row.id for row in rows(splits)}) == len({row.prompt for row in rows(splits)}) == 450
    assert splits.test[3].id == "test/3"


@WORLDS
def test_more_training_prompts_change_no_other_split(world):
    small, large = world(**SMALL).load(), world(**SMALL | {"num_train": 500}).load()
    assert small.test == large.test and small.val == large.val
    assert small.train == large.train[:300]


@WORLDS
def test_pools_hold_no_target_and_no_text_twice(world):
    for row in rows(world(**SMALL, num_negatives=9).load()):
        assert len(row.pool) == 9 and len({row.chosen, *row.pool}) == 10
        assert sorted(row.candidates) == sorted([row.chosen, *row.pool])


@WORLDS
def test_the_place_in_the_slate_says_nothing(world):
    """Chi-square over the places of the target in 10 candidates: above 27.9 has a probability of 0.001 (9 degrees)."""
    splits = world(num_train=1000, num_val=1, num_test=1, num_negatives=9).load()
    places = Counter(row.candidates.index(row.chosen) for row in splits.train)
    assert sum((places[place] - 100) ** 2 / 100 for place in range(10)) < 27.9


def parse(prompt):
    """(entity, relation, wording) of a question, the slow way: by trying all wordings."""
    for wording, question in enumerate(QUESTIONS):
        for relation in RELATIONS:
            before, after = question.format(relation=relation, entity="\0").split("\0")
            if prompt.startswith(before) and prompt.endswith(after):
                entity = prompt[len(before) : len(prompt) - len(after)]
                if len(entity.split()) == 2:
                    return entity, relation, wording
    raise AssertionError(prompt)


def test_mcqa_facts_are_consistent_and_test_wordings_new():
    splits = SyntheticMCQA().load()
    answers = {}
    for row in rows(splits):
        entity, relation, _ = parse(row.prompt)
        assert answers.setdefault((entity, relation), row.chosen) == row.chosen
        first, second = row.chosen.split()
        assert first in RELATIONS[relation][0] and second in RELATIONS[relation][1]
    trained = {parse(row.prompt)[:2] for row in splits.train}
    known = sum(parse(row.prompt)[:2] in trained for row in splits.test)
    assert known >= 0.95 * len(splits.test)  # in other wordings: about 4 of 8 are in train, so 1 - 2^-7 are expected
    assert not {parse(row.prompt) for row in splits.train} & {parse(row.prompt) for row in splits.test}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_mcqa_easy_negatives_answer_another_question(share):
    for row in SyntheticMCQA(**SMALL, near_duplicates=0, easy=share).load().test:
        firsts = RELATIONS[row.meta["relation"]][0]
        assert sum(text.split()[0] not in firsts for text in row.pool) == share * len(row.pool)


def test_mcqa_near_duplicates_differ_in_one_word_from_another_negative():
    """Joined where they differ in one word only, 20 negatives with 10 near-duplicates form at most 10 groups."""
    for row in SyntheticMCQA(**SMALL, near_duplicates=0.5).load().test:
        groups = []
        for text in row.pool:
            near = [group for group in groups if any(set(text.split()) & set(other.split()) for other in group)]
            groups = [group for group in groups if group not in near] + [sum(near, [text])]
        assert len(groups) <= 10


def test_mcqa_kinship_makes_families_alike():
    def agreement(kinship):
        splits = SyntheticMCQA(num_train=2000, num_val=1, num_test=1, kinship=kinship).load()
        words = {}
        for row in splits.train:
            entity, relation, _ = parse(row.prompt)
            words.setdefault((entity.split()[0], relation), {})[entity] = row.chosen.split()[0]
        return np.mean([max(Counter(group.values()).values()) / len(group) for group in words.values()])

    assert agreement(1.0) == 1.0 and agreement(0.0) < 0.5


def test_rec_viewers_watch_franchises_in_order_and_nothing_twice():
    for row in SyntheticRec(**SMALL).load().train:
        watched = [*row.history, row.chosen]
        assert len(set(watched)) == len(watched)
        for place, title in enumerate(watched):
            name, part = title.split()
            assert [f"{name} {earlier}" for earlier in PARTS[: PARTS.index(part)]] == [
                other for other in watched[:place] if other.split()[0] == name
            ]
        assert not set(row.pool) & set(row.history)


@pytest.mark.parametrize("listed", [True, False])
def test_rec_prompt_shows_history_and_slate_and_can_lose_its_oldest_titles(listed):
    for row in SyntheticRec(**SMALL, history=4, list_candidates=listed).load().test:
        assert (", ".join(row.candidates) in row.prompt) == listed
        assert len(row.history) == 4 and ", ".join(row.history) in row.prompt
        assert row.without_oldest(0) == row.prompt
        assert row.without_oldest(3) == row.prompt.replace(", ".join(row.history), row.history[-1])


def test_rec_genres_and_habits_are_shared_by_viewers():
    """Hidden, but there: of the titles that follow a title most often, both the share and the kinship show."""

    def following(**options):
        after = {}
        for row in SyntheticRec(num_train=2000, num_val=1, num_test=1, loyalty=0, **options).load().train:
            for title, following in itertools.pairwise([*row.history, row.chosen]):
                after.setdefault(title, Counter())[following.split()[0]] += 1
        frequent = [count for count in after.values() if count.total() >= 30]
        top = sum(count.most_common(1)[0][1] for count in frequent)
        six = sum(n for count in frequent for _, n in count.most_common(6))
        return top / sum(count.total() for count in frequent), six / sum(count.total() for count in frequent)

    habit, free = following(habit=0.7), following(habit=0)
    assert habit[0] > 0.6  # the usual franchise, except where all its parts were watched
    assert free[0] < 0.3 and free[1] > 0.4  # no single follower, but two tastes: 0.6^2 + 0.3^2 stay in a genre


def test_rec_pools_hold_the_share_of_the_chosen_titles_genre():
    """Pools of one genre alone tell the genres: 8 groups of 6 franchises; other shares are then counted by them."""
    genre_of = {}
    for row in SyntheticRec(**SMALL, num_negatives=10, same_genre=1.0).load().train:
        names = {title.split()[0] for title in (row.chosen, *row.pool)}
        merged = set.union(names, *(genre_of.get(name, set()) for name in names))
        genre_of.update(dict.fromkeys(merged, merged))
    assert len(genre_of) == 48 and {len(genre) for genre in genre_of.values()} == {6}
    for share in (0.0, 0.4):
        rows = SyntheticRec(**SMALL, num_negatives=20, same_genre=share).load().test
        alike = [sum(t.split()[0] in genre_of[row.chosen.split()[0]] for t in row.pool) for row in rows]
        assert set(alike) == {20 * share}


@pytest.mark.parametrize(
    ("world", "options", "told"),
    [
        (SyntheticMCQA, {"num_train": 3000}, "3200"),
        (SyntheticMCQA, {"num_test": 0}, "num_test"),
        (SyntheticMCQA, {"num_negatives": 51}, "num_negatives"),
        (SyntheticMCQA, {"near_duplicates": 1.0}, "near_duplicates"),
        (SyntheticMCQA, {"easy": -0.1}, "easy"),
        (SyntheticMCQA, {"kinship": 1.1}, "kinship"),
        (SyntheticRec, {"num_train": 0}, "num_train"),
        (SyntheticRec, {"history": 0}, "history"),
        (SyntheticRec, {"history": 1}, "different viewers"),
        (SyntheticRec, {"habit": -1}, "habit"),
        (SyntheticRec, {"same_genre": 1.5}, "same_genre"),
        (SyntheticRec, {"loyalty": 2}, "loyalty"),
        (SyntheticRec, {"num_negatives": 0}, "num_negatives"),
    ],
)
def test_impossible_options_are_refused(world, options, told):
    with pytest.raises(UserError, match=told):
        world(**options).load()


@WORLDS
def test_the_largest_options_still_give_whole_pools(world):
    limits = {SyntheticMCQA: {"num_negatives": 50, "near_duplicates": 0.9}, SyntheticRec: {"num_negatives": 40}}[world]
    extra = {"history": 20, "same_genre": 1.0, "loyalty": 0.9} if world is SyntheticRec else {}
    splits = replace(world(num_train=100, num_val=1, num_test=1), **limits, **extra).load()
    assert all(len(set(row.pool)) == limits["num_negatives"] for row in splits.train)
