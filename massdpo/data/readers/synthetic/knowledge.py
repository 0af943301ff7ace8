"""A world of facts: entities, relations and questions about them."""

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from massdpo.data.readers.synthetic.parts import check_between, split_off, word_list
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.errors import UserError
from massdpo.store import keyed_seed

# An entity is one word of each list, an answer one word of each of its relation's two lists.
ENTITY_WORDS = (
    word_list("amber brisk clever dusty eager gentle humble jolly lucky noble"),
    word_list("badger crane donkey falcon gopher heron jackal lynx otter raven"),
)
RELATIONS = {
    "home": (
        word_list("alpine barren coastal distant eastern foggy hidden lonely misty northern quiet windy"),
        word_list("bay canyon desert forest glacier island lagoon marsh plateau ridge swamp valley"),
    ),
    "trade": (
        word_list("brass copper ivory leather linen marble paper pewter silk timber velvet wool"),
        word_list("binder broker carver dyer engraver fitter grinder monger painter sculptor tanner weaver"),
    ),
    "meal": (
        word_list("baked boiled candied fried grilled pickled roasted salted smoked spiced steamed stewed"),
        word_list("apricot barley cabbage eggplant fennel ginger leek mushroom parsnip pumpkin radish turnip"),
    ),
    "treasure": (
        word_list("agate beryl coral emerald garnet jade onyx opal pearl ruby sapphire topaz"),
        word_list("anklet brooch chalice dagger flute goblet lantern mirror pendant ring shield spoon"),
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


@dataclass
class SyntheticMCQA:
    """A knowledge base of 100 entities x 4 relations, asked about in 8 wordings.

    A (fact, wording) pair is in one split only, so a test question is a new wording of a fact that training asks about
    in other wordings. The pool has answers to the same question about other entities, answers to other questions, and
    near-duplicates of both.

    Raises:
        UserError: more prompts than there are (3,200), or a pool or share outside its bounds.
    """

    seed: int = 0
    num_train: int = 1600
    num_val: int = 200
    num_test: int = 800
    num_negatives: int = 20
    near_duplicates: float = 0.3  # share of the pool that is another negative with one word exchanged
    easy: float = 0.7  # share of the other negatives that answer another question
    kinship: float = 0.2  # share of facts whose first word depends on the entity's first word: what can be inferred

    def files(self) -> list[Path]:
        return []  # none is read

    def load(self) -> Splits:
        facts = self._facts()
        asked = [(entity, relation, wording) for entity, relation in facts for wording in range(len(QUESTIONS))]
        size = (1, len(asked))
        check_between(self, num_train=size, num_val=size, num_test=size)
        check_between(self, num_negatives=(1, 50), near_duplicates=(0, 0.9), easy=(0, 1), kinship=(0, 1))
        if (total := self.num_train + self.num_val + self.num_test) > len(asked):
            raise UserError(
                f"dataset.num_train + num_val + num_test = {total}, but the knowledge base has {len(asked)} questions"
            )
        Random(keyed_seed("mcqa", self.seed, "order")).shuffle(asked)
        sizes = {"train": self.num_train, "val": self.num_val, "test": self.num_test}
        return split_off(sizes, (self._example(facts, *question) for question in asked))

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
        """All answers that differ from one of the given ones in this word alone, in random order."""
        near = []
        for answer in answers:
            words = answer.split()
            (others,) = (lists[place] for lists in RELATIONS.values() if words[place] in lists[place])
            near += [" ".join([*words[:place], other, *words[place + 1 :]]) for other in others]
        return draw.sample(near, len(near))
