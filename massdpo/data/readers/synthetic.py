"""Two small worlds made on the spot: large enough that the choice of negatives matters, small enough for a laptop.

Both are functions of `seed` alone: every draw has a generator keyed by the seed and by what is drawn, so that asking
for more training prompts changes no validation or test prompt.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.store import keyed_seed


def _words(text: str) -> list[str]:
    return text.split()


# The knowledge base: an entity is one word of each list, an answer one word of each of its relation's two lists.
ENTITY_WORDS = (
    _words("amber brisk clever dusty eager gentle humble jolly lucky noble"),
    _words("badger crane donkey falcon gopher heron jackal lynx otter raven"),
)
RELATIONS = {
    "home": (
        _words("alpine barren coastal distant eastern foggy hidden lonely misty northern quiet windy"),
        _words("bay canyon desert forest glacier island lagoon marsh plateau ridge swamp valley"),
    ),
    "trade": (
        _words("brass copper ivory leather linen marble paper pewter silk timber velvet wool"),
        _words("binder broker carver dyer engraver fitter grinder monger painter sculptor tanner weaver"),
    ),
    "meal": (
        _words("baked boiled candied fried grilled pickled roasted salted smoked spiced steamed stewed"),
        _words("apricot barley cabbage eggplant fennel ginger leek mushroom parsnip pumpkin radish turnip"),
    ),
    "treasure": (
        _words("agate beryl coral emerald garnet jade onyx opal pearl ruby sapphire topaz"),
        _words("anklet brooch chalice dagger flute goblet lantern mirror pendant ring shield spoon"),
    ),
}
QUESTIONS = (
    "what is the {relation} of {entity}?",
    "name the {relation} of {entity}:",
    "{entity} has which {relation}?",
    "tell me the {relation} {entity} has:",
    "which {relation} belongs to {entity}?",
    "the {relation} of {entity} is",
    "of {entity} the {relation} is",
    "say which {relation} {entity} has:",
)

# The catalogue: a title is a franchise and a part; franchises belong to genres that no title names.
FRANCHISES = _words(
    "anchor arrow beacon blizzard canopy castle cavern comet compass crater crown cyclone delta ember engine fable "
    "feather harbor harvest horizon hunter jungle kingdom ladder legend meadow meteor monsoon orbit orchard phantom "
    "pilot pirate prairie prophet pyramid quarry ranger riddle river rocket shadow signal sphinx thunder tundra "
    "voyage whisper"
)
PARTS = ("one", "two", "three")
GENRES = 8


def _splits(sizes: dict[str, int], rows: Iterator[PreferenceExample]) -> Splits:
    """The next rows, taken as test, val and train in that order, so that a larger training split moves no other."""
    parts = {split: [next(rows) for _ in range(sizes[split])] for split in ("test", "val", "train")}
    named = {
        split: [PreferenceExample(**{**vars(row), "id": f"{split}/{number}"}) for number, row in enumerate(part)]
        for split, part in parts.items()
    }
    return Splits(named["train"], named["val"], named["test"])


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"dataset.{name}={value} is not possible: it must lie between {low:g} and {high:g}")


@dataclass
class SyntheticMCQA:
    """A knowledge base of 100 entities x 4 relations, asked about in 8 wordings.

    A (fact, wording) pair stands in one split only, so a test question is a new wording of a fact that training asks
    about in others. The pool holds answers to the same question about other entities, answers to other questions, and
    near-duplicates of both.

    Raises:
        UserError: more prompts than there are (3,200), or a pool or share that is not possible.
    """

    seed: int = 0
    num_train: int = 1600
    num_val: int = 200
    num_test: int = 800
    num_negatives: int = 20
    near_duplicates: float = 0.3  # share of the pool that is another negative with one word exchanged
    easy: float = 0.7  # share of the other negatives that answer another question
    kinship: float = 0.2  # share of facts whose first word goes by the entity's first word: what can be inferred

    def files(self) -> list[Path]:
        return []  # none is read

    def load(self) -> Splits:
        facts = self._facts()
        asked = [(entity, relation, wording) for entity, relation in facts for wording in range(len(QUESTIONS))]
        for name in ("num_train", "num_val", "num_test"):
            _check(name, getattr(self, name), 1, len(asked))
        if (total := self.num_train + self.num_val + self.num_test) > len(asked):
            raise UserError(
                f"dataset.num_train + num_val + num_test = {total}, but the knowledge base has {len(asked)} questions"
            )
        _check("num_negatives", self.num_negatives, 1, 50)
        _check("near_duplicates", self.near_duplicates, 0, 0.9)
        _check("easy", self.easy, 0, 1)
        _check("kinship", self.kinship, 0, 1)
        Random(keyed_seed("mcqa", self.seed, "order")).shuffle(asked)
        sizes = {"train": self.num_train, "val": self.num_val, "test": self.num_test}
        return _splits(sizes, (self._example(facts, *question) for question in asked))

    def _facts(self) -> dict[tuple[str, str], str]:
        """The answer to every (entity, relation)."""
        draw = Random(keyed_seed("mcqa", self.seed, "facts"))
        facts = {}
        for relation, (firsts, seconds) in RELATIONS.items():
            family_word = dict(zip(ENTITY_WORDS[0], draw.sample(firsts, len(ENTITY_WORDS[0])), strict=True))
            for family in ENTITY_WORDS[0]:
                for name in ENTITY_WORDS[1]:
                    first = family_word[family] if draw.random() < self.kinship else draw.choice(firsts)
                    facts[f"{family} {name}", relation] = f"{first} {draw.choice(seconds)}"
        return facts

    def _example(
        self, facts: dict[tuple[str, str], str], entity: str, relation: str, wording: int
    ) -> PreferenceExample:
        draw = Random(keyed_seed("mcqa", self.seed, "pool", entity, relation, wording))
        chosen = facts[entity, relation]
        same = sorted({answer for (_, other), answer in facts.items() if other == relation} - {chosen})
        others = sorted({answer for (_, other), answer in facts.items() if other != relation})
        originals = math.ceil(self.num_negatives * (1 - self.near_duplicates))
        easy = round(originals * self.easy)
        pool = draw.sample(same, originals - easy) + draw.sample(others, easy)
        near = [text for place in (1, 0) for text in self._exchanged(draw, pool, place)]
        near = [text for text in dict.fromkeys(near) if text not in {chosen, *pool}]
        pool += near[: self.num_negatives - originals]
        draw.shuffle(pool)
        candidates = [chosen, *pool]
        draw.shuffle(candidates)
        prompt = QUESTIONS[wording].format(relation=relation, entity=entity)
        return PreferenceExample("", prompt, chosen, tuple(pool), tuple(candidates), meta={"relation": relation})

    def _exchanged(self, draw: Random, answers: list[str], place: int) -> list[str]:
        """All answers that differ from one of the given in this word alone, in random order."""
        near = []
        for answer in answers:
            words = answer.split()
            (others,) = (lists[place] for lists in RELATIONS.values() if words[place] in lists[place])
            near += [" ".join([*words[:place], other, *words[place + 1 :]]) for other in others]
        return draw.sample(near, len(near))


class _Catalogue(NamedTuple):
    genres: list[list[str]]  # the franchises of each
    after: dict[str, str]  # the franchise, of the same genre, that viewers usually turn to after a title


@dataclass
class SyntheticRec:
    """Viewers with a taste for two of eight genres, a liking for sequels and common habits: 48 franchises of 3 parts.

    The prompt shows the candidates and what a viewer has seen, oldest first; the chosen response is what the same
    viewer watches next. Genres are in no title: they show only in what is watched together.

    Raises:
        UserError: a size, pool or share that is not possible.
    """

    seed: int = 0
    num_train: int = 1600
    num_val: int = 200
    num_test: int = 800
    num_negatives: int = 19
    history: int = 5  # titles that the prompt shows
    same_genre: float = 0.4  # share of the pool that is of the chosen title's genre
    list_candidates: bool = False  # are the candidates listed in the prompt?
    loyalty: float = 0.2  # probability that a viewer goes on with a franchise that they have begun
    habit: float = 0.85  # probability, otherwise, of the franchise that is usual after the last title

    def files(self) -> list[Path]:
        return []  # none is read

    def load(self) -> Splits:
        for name in ("num_train", "num_val", "num_test"):
            _check(name, getattr(self, name), 1, 1_000_000)
        _check("history", self.history, 1, 20)
        _check("num_negatives", self.num_negatives, 1, 40)
        _check("same_genre", self.same_genre, 0, 1)
        _check("loyalty", self.loyalty, 0, 1)
        _check("habit", self.habit, 0, 1)
        draw = Random(keyed_seed("rec", self.seed, "catalogue"))
        names = draw.sample(FRANCHISES, len(FRANCHISES))
        genres = [names[genre::GENRES] for genre in range(GENRES)]
        after = {f"{name} {part}": draw.choice(genre) for genre in genres for name in genre for part in PARTS}
        sizes = {"train": self.num_train, "val": self.num_val, "test": self.num_test}
        return _splits(sizes, self._viewers(_Catalogue(genres, after)))

    def _viewers(self, catalogue: _Catalogue) -> Iterator[PreferenceExample]:
        """Viewers without end; one whose prompt was already given is left out, so that no two prompts are equal."""
        seen: set[str] = set()
        viewer = 0
        while True:
            example = self._example(catalogue, viewer)
            viewer += 1
            if viewer > 1000 + 20 * len(seen):
                raise UserError(
                    f"dataset.history={self.history}, loyalty={self.loyalty}, habit={self.habit} allow only "
                    f"{len(seen)} different viewers: a longer history or smaller probabilities are needed"
                )
            if example.prompt not in seen:
                seen.add(example.prompt)
                yield example

    def _example(self, catalogue: _Catalogue, viewer: int) -> PreferenceExample:
        draw = Random(keyed_seed("rec", self.seed, "viewer", viewer))
        *history, chosen = self._watched(draw, catalogue, self.history + 1)
        pool = self._pool(draw, catalogue, chosen, history)
        candidates = [chosen, *pool]
        draw.shuffle(candidates)
        before = f"choice: {', '.join(candidates)}. seen: " if self.list_candidates else "seen: "
        prompt = f"{before}{', '.join(history)}. next:"
        return PreferenceExample(
            "",
            prompt,
            chosen,
            tuple(pool),
            tuple(candidates),
            tuple(history),
            len(before),
            {"user": f"viewer {viewer}"},
        )

    def _watched(self, draw: Random, catalogue: _Catalogue, count: int) -> list[str]:
        """The first `count` titles of one viewer; a franchise is always watched from its first part on."""
        taste = draw.sample(range(GENRES), GENRES)
        parts: dict[str, int] = {}  # how many parts of each begun franchise were watched
        titles: list[str] = []
        while len(titles) < count:
            begun = [name for name, watched in parts.items() if watched < len(PARTS)]
            usual = catalogue.after[titles[-1]] if titles else None
            if begun and draw.random() < self.loyalty:
                name = begun[-1]
            elif usual and parts.get(usual, 0) < len(PARTS) and draw.random() < self.habit:
                name = usual
            else:
                genre = draw.choices(taste, weights=[6, 3, *[1 / (GENRES - 2)] * (GENRES - 2)])[0]
                name = draw.choice(catalogue.genres[genre])
            watched = parts.get(name, 0)
            if watched < len(PARTS):  # else all of it was watched: drawn again
                parts[name] = watched + 1
                titles.append(f"{name} {PARTS[watched]}")
        return titles

    def _pool(self, draw: Random, catalogue: _Catalogue, chosen: str, history: list[str]) -> list[str]:
        (genre,) = (names for names in catalogue.genres if chosen.split()[0] in names)
        free = [title for name in FRANCHISES for part in PARTS if (title := f"{name} {part}") not in {chosen, *history}]
        draw.shuffle(free)
        alike = [title for title in free if title.split()[0] in genre][: round(self.num_negatives * self.same_genre)]
        others = [title for title in free if title.split()[0] not in genre]
        pool = alike + others[: self.num_negatives - len(alike)]
        draw.shuffle(pool)
        return pool
