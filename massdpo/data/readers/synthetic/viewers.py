"""A world of viewers: titles, genres that no title names, and habits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from massdpo.data.readers.synthetic.parts import check_between, split_off, word_list
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.store import keyed_seed

# A title is a franchise and a part; franchises belong to genres that no title names.
FRANCHISES = word_list(
    "anchor arrow beacon blizzard canopy castle cavern comet compass crater crown cyclone delta ember engine fable "
    "feather harbor harvest horizon hunter jungle kingdom ladder legend meadow meteor monsoon orbit orchard phantom "
    "pilot pirate prairie prophet pyramid quarry ranger riddle river rocket shadow signal sphinx thunder tundra "
    "voyage whisper"
)
PARTS = ("one", "two", "three")
GENRES = 8


class _Catalogue(NamedTuple):
    genres: list[list[str]]  # the franchises of each
    after: dict[str, str]  # by title: the franchise, of the same genre, that viewers usually turn to next


@dataclass
class SyntheticRec:
    """Viewers with a taste for two of eight genres, a liking for sequels, and shared habits: 48 franchises of 3 parts.

    The prompt shows what a viewer has seen, oldest first, and with `list_candidates` the candidates; the chosen
    response is what the viewer watches next. No title names its genre: genres show only in what is watched together.

    Raises:
        UserError: a size, pool or share outside its bounds.
    """

    seed: int = 0
    num_train: int = 1600
    num_val: int = 200
    num_test: int = 800
    num_negatives: int = 19
    history: int = 5  # titles that the prompt shows
    same_genre: float = 0.4  # share of the pool that is of the chosen title's genre
    list_candidates: bool = False  # are the candidates listed in the prompt?
    loyalty: float = 0.2  # probability that a viewer goes on with a franchise they have begun
    habit: float = 0.85  # otherwise, probability of the franchise that is usual after the last title

    def files(self) -> list[Path]:
        return []  # none is read

    def load(self) -> Splits:
        size, share = (1, 1_000_000), (0, 1)
        check_between(self, num_train=size, num_val=size, num_test=size, history=(1, 20), num_negatives=(1, 40))
        check_between(self, same_genre=share, loyalty=share, habit=share)
        draw = Random(keyed_seed("rec", self.seed, "catalogue"))
        names = draw.sample(FRANCHISES, len(FRANCHISES))
        genres = [names[genre::GENRES] for genre in range(GENRES)]
        after = {f"{name} {part}": draw.choice(genre) for genre in genres for name in genre for part in PARTS}
        sizes = {"train": self.num_train, "val": self.num_val, "test": self.num_test}
        return split_off(sizes, self._viewers(_Catalogue(genres, after)))

    def _viewers(self, catalogue: _Catalogue) -> Iterator[PreferenceExample]:
        """Endless viewers; one whose prompt was already given is left out, so that no two prompts are equal."""
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
        """The first `count` titles that a viewer watches; franchises are always watched from their first part on."""
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
