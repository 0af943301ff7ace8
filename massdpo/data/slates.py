"""The items beside the target: slates that say nothing about it (`clean`), and published ones (`legacy`).

A clean slate is drawn by a counter-based generator (Philox) that is keyed by dataset seed and split, with the row as
its counter: any row's slate can be drawn alone, in any order, by any worker, and the target has no influence on it.

Shapes: R rows, W draws per row, N negatives, C = 1 + N candidates, I items of the catalogue, E (user, item) pairs.
"""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from massdpo.errors import UserError
from massdpo.store import keyed_seed

Ints = NDArray[np.int64]

DRAWS = 3  # at first, per negative: enough unless the user has met much of the catalogue, or of its popular part
LEGACY_NEGATIVES = 19
LEGACY_HISTORY = 10


@dataclass(frozen=True)
class CleanSlates:
    """Draws N negatives for each row of a split from the items that the row's user never met, before or after.

    They are drawn one after the other without replacement, in proportion to `weights_I` (None: uniformly).
    """

    seed: int
    split: str
    count: int
    items: int
    seen_E: Ints  # sorted codes user * items + item of every interaction of every user
    weights_I: NDArray[np.float64] | None = None

    def draw(self, first_row: int, user_R: Ints, target_R: Ints) -> Ints:
        """Slates (R, C) of consecutive rows from `first_row` on, each with its target once, at a random place.

        Raises:
            UserError: a user has met so many items that there are no N others.
        """
        width = DRAWS * self.count
        uniform_RW = self._uniforms(first_row, len(user_R), width + self.count + 1)
        item_RW = self._items(uniform_RW[:, :width])
        fresh_RW = ~self._seen(user_R[:, None], item_RW) & ~_repeats(item_RW)
        rank_RW = np.cumsum(fresh_RW, axis=1)
        negatives_RN = np.empty((len(user_R), self.count), dtype=np.int64)
        whole_R = rank_RW[:, -1] >= self.count
        kept_RW = fresh_RW & (rank_RW <= self.count)
        negatives_RN[whole_R] = item_RW[whole_R][kept_RW[whole_R]].reshape(-1, self.count)
        for row in np.flatnonzero(~whole_R):
            found = item_RW[row][fresh_RW[row]]
            negatives_RN[row] = self._complete(first_row + int(row), int(user_R[row]), found)
        slate_RC = np.concatenate([target_R[:, None], negatives_RN], axis=1)
        order_RC = np.argsort(uniform_RW[:, width:], axis=1, kind="stable")
        return np.take_along_axis(slate_RC, order_RC, axis=1)

    def _uniforms(self, first_row: int, rows: int, width: int) -> NDArray[np.float64]:
        blocks = -(-width // 4)  # each step of Philox's counter gives four words
        generator = np.random.Philox(key=keyed_seed("slate", self.seed, self.split), counter=first_row * blocks)
        words = generator.random_raw(rows * blocks * 4).reshape(rows, blocks * 4)[:, :width]
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _items(self, uniform_RW: NDArray[np.float64]) -> Ints:
        if self.weights_I is None:
            return (uniform_RW * self.items).astype(np.int64)
        edge_I = np.cumsum(self.weights_I)
        item_RW = np.searchsorted(edge_I, uniform_RW * edge_I[-1], side="right")
        return np.minimum(item_RW, self.items - 1).astype(np.int64)  # rounding at the upper end

    def _seen(self, user: Ints, item: Ints) -> NDArray[np.bool_]:
        code = user * self.items + item
        place = np.minimum(np.searchsorted(self.seen_E, code), len(self.seen_E) - 1)
        return self.seen_E[place] == code

    def _complete(self, row: int, user: int, found: Ints) -> Ints:
        """The rare row whose draws did not suffice: goes on with the same sample, by Gumbel noise on what is left."""
        first, last = np.searchsorted(self.seen_E, [user * self.items, (user + 1) * self.items])
        free_I = np.ones(self.items, dtype=bool)
        free_I[self.seen_E[first:last] - user * self.items] = False
        free = int(free_I.sum())
        if free < self.count:
            remedy = f"set dataset.num_negatives={free} or less" if free else "leave that user out"
            raise UserError(
                f"row {row} of the {self.split} split: its user has met all but {free} of the {self.items} items, so "
                f"{self.count} negatives do not exist: {remedy}"
            )
        free_I[found] = False
        left = np.flatnonzero(free_I)
        gumbel = np.random.default_rng(keyed_seed("slate", self.seed, self.split, row)).gumbel(size=len(left))
        score = gumbel if self.weights_I is None else gumbel + np.log(self.weights_I[left])
        return np.concatenate([found, left[np.argsort(-score)[: self.count - len(found)]]])


def _repeats(item_RW: Ints) -> NDArray[np.bool_]:
    """Which draws repeat an earlier one of their row."""
    order_RW = np.argsort(item_RW, axis=1, kind="stable")
    sorted_RW = np.take_along_axis(item_RW, order_RW, axis=1)
    again_RW = np.zeros(item_RW.shape, dtype=bool)
    again_RW[:, 1:] = sorted_RW[:, 1:] == sorted_RW[:, :-1]
    repeats_RW = np.empty_like(again_RW)
    np.put_along_axis(repeats_RW, order_RW, again_RW, axis=1)
    return repeats_RW


def legacy_slate(items: int, sequence: list[int]) -> list[int]:
    """The 20 candidates for a user's sequence, which ends with the target, as in S-DPO's LastFM files (NeurIPS 2024).

    They are drawn from `items` ids and shuffled, seeded by the target's id. Negatives can be older items of the same
    user, and a look-up table by target finds the answer: for comparison only.
    """
    target = sequence[-1]
    chance = random.Random(target)
    removed = sorted({*sequence[-1 - LEGACY_HISTORY :]})
    negatives = []
    for item in chance.sample(range(items - len(removed)), LEGACY_NEGATIVES):
        for gap in removed:  # the item-th among those that were not removed
            item += gap <= item
        negatives.append(item)
    slate = [*negatives, target]
    random.Random(target).shuffle(slate)
    return slate
