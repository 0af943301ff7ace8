"""Greedy decoding against full forward passes one token at a time, and the numbers against answers counted by hand."""

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from massdpo.data.batches import collate
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.generation import Answer, decode, generate_split, generation_metrics, greedy_settings, named
from massdpo.evaluation.logps import SplitLogps, SplitScorer
from massdpo.model.scoring import PreferenceScorer
from massdpo.model.scratch import learn_tokenizer
from massdpo.tensors import Batch
from tests.test_engine_families import FAMILIES
from tests.test_scoring import VOCABULARY, tiny

PAD = 0
# The four families of conf/model (windows shorter than the prompts, caps), and one whose positions are learned. Float32
# rounds logits by about 1e-6; two that lie nearer at one of some hundred steps would be a rare accident of the seed.
NAMES = ["llama", "gemma2", "phi3", "qwen3", "qwen2_windowed", "gpt2"]


def plain_greedy(
    model: PreTrainedModel, prompt_ids: list[int], candidates: list[list[int]], eos: int, constrained: bool
) -> list[int]:
    """The whole text through the model's own forward at each step; held to the candidates by looking at all of them."""
    ids: list[int] = []
    while len(ids) < max(map(len, candidates)) and eos not in ids:
        with torch.no_grad():
            logits_V = model(torch.tensor([prompt_ids + ids]), use_cache=False).logits[0, -1]
        allowed = {r[len(ids)] for r in candidates if r[: len(ids)] == ids} if constrained else range(len(logits_V))
        ids.append(max(allowed, key=lambda token: float(logits_V[token])))
    return ids


def world(model: PreTrainedModel, lengths: list[int], seed: int = 0) -> tuple[list[TokenizedExample], int]:
    """Prompts of these lengths with random candidates, some of them prefixes of others, and a token that ends them: one
    that free decoding comes to in some prompts, early in at least one."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    prompts = [tokens(length) for length in lengths]
    eos = plain_greedy(model, prompts[0], [[0] * 3], -1, False)[-1]
    examples = []
    for row, prompt in enumerate(prompts):
        long = tokens(5)
        texts = [tokens(2), long, long[:2], long[:4], [*long[:2], *tokens(2)], tokens(1), tokens(4)]
        kept = [text for text in texts if len(text) < 6 - 3 * (row % 2)]  # shorter ones beside longer ones
        responses = [[token for token in text if token != eos] + [eos] for text in kept]
        examples.append(TokenizedExample(f"example-{row}", prompt, responses))
    return examples, eos


def together(examples: list[TokenizedExample]) -> Batch:
    return collate(list(enumerate(examples)), PAD)


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "constrained"])
@pytest.mark.parametrize("family", NAMES)
def test_a_ragged_batch_decodes_as_full_forward_passes_one_by_one(family: str, constrained: bool) -> None:
    model = tiny(FAMILIES[family])
    examples, eos = world(model, [9, 3, 20, 1, 12, 6])
    expected = [plain_greedy(model, e.prompt_ids, e.response_ids, eos, constrained) for e in examples]
    for use_cache in (True, False):
        with greedy_settings(model, eos, PAD, use_cache):
            assert decode(model, together(examples), constrained) == expected
            assert [decode(model, together([example]), constrained)[0] for example in examples] == expected
    if constrained:  # each ends at a candidate, and not always at the same place
        places = [e.response_ids.index(ids) for e, ids in zip(examples, expected, strict=True)]
        assert len(set(places)) > 1
    else:
        ended = [eos in ids for ids in expected]
        assert any(ended) and not all(ended)


def test_of_prefixes_of_one_another_each_can_be_the_answer() -> None:
    """`a`, `a b` and `a b c`: what the end token is worth decides; greedy decoding goes the same way as brute force."""
    model = tiny(FAMILIES["llama"])
    eos, found = 7, set()
    for seed in range(40):
        prompt = torch.randint(8, VOCABULARY, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        nested = TokenizedExample("nested", prompt, [[20, eos], [20, 21, eos], [20, 21, 22, eos]])
        with greedy_settings(model, eos, PAD):
            (ids,) = decode(model, together([nested]), constrained=True)
        assert ids == plain_greedy(model, prompt, nested.response_ids, eos, True)
        found.add(nested.response_ids.index(ids))
    assert found == {0, 1, 2}


def test_settings_of_the_models_own_do_not_count_and_come_back() -> None:
    model = tiny(FAMILIES["qwen3"])
    examples, eos = world(model, [9, 3, 20])
    expected = [plain_greedy(model, e.prompt_ids, e.response_ids, eos, False) for e in examples]
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3, no_repeat_ngram_size=1)
    own.update(min_new_tokens=5, eos_token_id=[eos, *expected[0][:1]], bad_words_ids=[expected[1][:1]])
    before = copy.deepcopy(own.to_dict())
    with greedy_settings(model, eos, PAD):
        assert decode(model, together(examples)) == expected
    assert model.generation_config is own and own.to_dict() == before


# A split --------------------------------------------------------------------------------------------------------------

WORDS = ["red fox", "Red  Fox", "red", "blue whale", "red fox runs", "grey"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return learn_tokenizer([f"a {word}, the {word}" for word in WORDS] * 20, 400)


def example_of(tokenizer: Any, texts: list[str], prompt: str = "which?") -> TokenizedExample:
    ids = [[*tokenizer.encode(f" {text}", add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    return TokenizedExample("example", tokenizer.encode(prompt), ids)


def test_a_text_names_the_candidates_that_it_equals(tokenizer: Any) -> None:
    example = example_of(tokenizer, ["red fox", "blue whale", "red", "red fox runs"])
    eos = tokenizer.eos_token_id

    def of(text: str, *end: int) -> list[int]:
        return named([*tokenizer.encode(text, add_special_tokens=False), *end], [], example, tokenizer).free

    assert of(" red fox", eos) == [0]
    assert of("RED   fox ", eos) == [0]  # case and spaces do not matter
    assert of(" red", eos) == [2]  # a part of another candidate
    assert of(" red fox runs", eos) == [3]  # another candidate is a part of it
    assert of(" red fox") == []  # it would go on
    assert of(" it is the red fox", eos) == []
    assert of("", eos) == []
    alike = example_of(tokenizer, ["red fox", "Red  Fox", "grey"])
    same = alike.response_ids[0]
    assert named(same, same, alike, tokenizer) == Answer(free=[0, 1], constrained=[0])
    twins = example_of(tokenizer, ["red fox", "red fox"])
    assert named(same, same, twins, tokenizer) == Answer(free=[0, 1], constrained=[0, 1])


def test_metrics_by_hand() -> None:
    answers = [
        Answer([0], [0]),  # right both ways; the largest log-prob is candidate 0's
        Answer([2], [0]),  # a valid answer that is wrong; held to the candidates it is right
        Answer([], [1]),  # no candidate
        Answer([0, 1], [0, 1]),  # the chosen response cannot be told from another candidate
        Answer([0], [2]),  # its third candidate is padding: the largest log-prob is candidate 0's
    ]
    logp_SC = torch.tensor([[-1, -2, -3], [-3, -1, -2], [-2, -1, -3], [-2, -1, -3], [-5, -6, 0]], dtype=torch.float32)
    scores = SplitLogps(logp_SC, torch.tensor([[1, 1, 1]] * 4 + [[1, 1, 0]]))
    assert generation_metrics(answers, scores) == {
        "hr@1": 2 / 5,
        "valid_ratio": 3 / 5,
        "hr@1_constrained": 2 / 5,
        "constrained_agreement": 3 / 5,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_split_does_not_depend_on_the_size_of_its_batches(family: str, tokenizer: Any) -> None:
    """In the last two, prompt and longest response fill the 64 positions: in one batch they would go beyond them."""
    model = tiny(FAMILIES[family])
    model.generation_config.eos_token_id = 1  # not the tokenizer's
    examples, _ = world(model, [9, 3, 20, 1, 12, 58, 63])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(examples[0].response_ids[0][-1])
    eos = tokenizer.eos_token_id
    examples[-1] = TokenizedExample("full", examples[-1].prompt_ids[:61], [[5, 6, eos], [8, eos], [eos]])
    expected = []
    for e in examples:
        free, held = (plain_greedy(model, e.prompt_ids, e.response_ids, eos, way) for way in (False, True))
        expected.append(named(free, held, e, tokenizer))
    assert any(answer.constrained != [0] for answer in expected)
    for size in (1, 3, 7):
        scorer = PreferenceScorer(model)
        assert generate_split(scorer, examples, SplitScorer(Accelerator(cpu=True), size, 0), tokenizer) == expected
