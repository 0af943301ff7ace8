"""Slates against their definition: brute-force probabilities, the published recipe in plain Python, other orders."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from massdpo.data import slates
from massdpo.data.slates import CleanSlates, legacy_slate
from massdpo.errors import UserError


def codes(seen: list[set[int]], items: int) -> np.ndarray:
    return np.array(sorted(user * items + item for user, met in enumerate(seen) for item in met))


@st.composite
def worlds(draw):
    items = draw(st.integers(5, 60))
    seen = draw(st.lists(st.sets(st.integers(0, items - 1), min_size=1, max_size=items - 2), min_size=1, max_size=5))
    count = draw(st.integers(1, items - max(map(len, seen))))
    weighted = draw(st.booleans())
    return items, seen, count, np.arange(1.0, items + 1) if weighted else None, draw(st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_a_slate_holds_the_target_once_and_new_items_once_each(world) -> None:
    items, seen, count, weights, seed = world
    clean = CleanSlates(seed, "train", count, items, codes(seen, items), weights)
    users = np.repeat(np.arange(len(seen)), 3)
    targets = np.array([min(seen[user]) for user in users])
    slate_RC = clean.draw(0, users, targets)
    assert slate_RC.shape == (len(users), count + 1)
    for user, target, slate in zip(users, targets, slate_RC.tolist(), strict=True):
        assert slate.count(target) == 1
        negatives = [item for item in slate if item != target]
        assert len(set(negatives)) == count and not set(negatives) & seen[user]
        assert all(0 <= item < items for item in negatives)


@pytest.mark.parametrize("first_draws", [1, 3])  # 1 leaves most rows to the completion
def test_any_block_of_rows_gives_the_same_slates(monkeypatch, first_draws: int) -> None:
    monkeypatch.setattr(slates, "DRAWS", first_draws)
    clean = CleanSlates(3, "val", 8, 40, codes([{1, 2}, {3}], 40))
    users, targets = np.array([0, 1] * 20), np.array([1, 3] * 20)
    whole = clean.draw(0, users, targets)
    parts = [clean.draw(start, users[start : start + 7], targets[start : start + 7]) for start in range(0, 40, 7)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_seed_split_and_row_decide_and_the_target_does_not() -> None:
    seen = codes([{1, 2}], 500)
    users = np.zeros(50, dtype=int)
    draw = lambda seed, split, target: CleanSlates(seed, split, 19, 500, seen).draw(0, users, np.full(50, target))  # noqa: E731
    one, two = draw(0, "train", 1), draw(0, "train", 2)
    assert np.array_equal(np.where(one == 1, -1, one), np.where(two == 2, -1, two))
    assert not np.array_equal(one, draw(1, "train", 1)) and not np.array_equal(one, draw(0, "test", 1))
    assert not np.array_equal(one[0], one[1])


@pytest.mark.parametrize("first_draws", [1, 3])
@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 2.0, 1.0, 3.0, 4.0]])
def test_draws_follow_sequential_sampling(monkeypatch, first_draws: int, weights: list[float] | None) -> None:
    """Probability of each set of two negatives out of items 1 to 5, by enumeration; item 0 is the target."""
    monkeypatch.setattr(slates, "DRAWS", first_draws)
    rows = 20_000
    weight_I = None if weights is None else np.array(weights)
    clean = CleanSlates(0, "train", 2, 6, codes([{0}], 6), weight_I)
    slate_RC = clean.draw(0, np.zeros(rows, dtype=int), np.zeros(rows, dtype=int))
    share = np.ones(6) if weights is None else np.array(weights)
    expected = {}
    for first, second in itertools.permutations(range(1, 6), 2):
        chance = share[first] / share[1:].sum() * share[second] / (share[1:].sum() - share[first])
        key = frozenset((first, second))
        expected[key] = expected.get(key, 0) + chance
    found = dict.fromkeys(expected, 0)
    for slate in slate_RC.tolist():
        found[frozenset(slate) - {0}] += 1
    # fixed seeds: the p-value is one number; below 1e-4 it would be no chance finding
    assert chisquare(list(found.values()), [rows * expected[key] for key in found]).pvalue > 1e-4
    places = np.bincount(np.argmax(slate_RC == 0, axis=1), minlength=3)
    assert chisquare(places).pvalue > 1e-4


def test_a_pool_that_cannot_be_filled_is_told_with_the_way_out() -> None:
    clean = CleanSlates(0, "test", 5, 8, codes([{0, 1, 2, 3}], 8))
    with pytest.raises(UserError, match=r"all but 4 of the 8 items.*num_negatives=4"):
        clean.draw(0, np.array([0]), np.array([0]))
    nothing_left = CleanSlates(0, "test", 5, 4, codes([{0}, {0, 1, 2, 3}], 4))
    with pytest.raises(UserError, match=r"row 7 of the test split.*all but 0 of the 4 items.*: leave that user out$"):
        nothing_left.draw(7, np.array([1]), np.array([0]))


@given(st.data())
def test_legacy_equals_the_published_recipe_in_plain_python(data) -> None:
    items = data.draw(st.integers(40, 5000))
    sequence = data.draw(st.lists(st.integers(0, items - 1), min_size=2, max_size=15, unique=True))
    *older, target = sequence
    pool = [item for item in range(items) if item not in {*older[-10:], target}]
    random.seed(target)
    expected = [*random.sample(pool, 19), target]
    random.seed(target)
    random.shuffle(expected)
    assert legacy_slate(items, sequence) == expected
