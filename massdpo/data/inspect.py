"""What will be trained on, for a person to see; and what can be guessed without any model.

The leak check is a look-up table from target to slate and position, learned on the other splits: slates drawn by the
target give themselves away (public LastFM preprocessing), clean ones leave it at chance.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from massdpo.data.interactions import SPLITS
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.text import normalise
from massdpo.errors import UserError
from massdpo.store import replacing

SHOWN = 3  # examples printed whole
MEASURED = 2000  # examples whose tokens are counted, spread evenly over the split


def leak_check(splits: Splits, split: str = "test") -> dict[str, float]:
    """How often a look-up by target, learned on the other splits, finds the target of `split`.

    The table keeps, of each target, the place where it stood most often and the negatives that stood beside it there
    first. A candidate matches as far as it stands at its own remembered place and among its own remembered negatives;
    the best match is guessed, evenly among equals, so that without any match every candidate is as good.

    Returns:
        `lookup_accuracy`, the `lookup_chance` of guessing evenly, the `lookup_standard_error` of guessing so, and
        `lookup_matched`, the share of rows where something matched. All are shares of rows.
    """
    table = _remember(example for name in SPLITS if name != split for example in getattr(splits, name))
    hits, chances, matched = [], [], []
    for example in getattr(splits, split):
        slate = set(example.candidates)
        scores = []
        for place, candidate in enumerate(example.candidates):
            usual, beside = table.get(candidate, (-1, frozenset()))
            scores.append((usual == place) + len(slate & beside) / (len(slate) - 1))
        best = max(scores)
        winners = [text for text, score in zip(example.candidates, scores, strict=True) if score == best]
        hits.append((example.chosen in winners) / len(winners))
        chances.append(1 / len(slate))
        matched.append(best > 0)
    chance = np.array(chances)
    return {
        "lookup_accuracy": float(np.mean(hits)),
        "lookup_chance": float(chance.mean()),
        "lookup_standard_error": float(np.sqrt((chance * (1 - chance)).mean() / len(chance))),
        "lookup_matched": float(np.mean(matched)),
    }


def _remember(examples: Iterable[PreferenceExample]) -> dict[str, tuple[int, frozenset[str]]]:
    places: dict[str, Counter[int]] = {}
    beside: dict[tuple[str, int], frozenset[str]] = {}
    for example in examples:
        place = example.candidates.index(example.chosen)
        places.setdefault(example.chosen, Counter())[place] += 1
        beside.setdefault((example.chosen, place), frozenset(example.pool))
    table = {}
    for target, counter in places.items():
        usual = counter.most_common(1)[0][0]
        table[target] = (usual, beside[target, usual])
    return table


def popularity_baseline(splits: Splits, split: str = "test") -> dict[str, float]:
    """Ranking the candidates by how often each is a chosen response in training; ties count against the target.

    Returns:
        `popularity_accuracy` (hit rate at 1), `popularity_recall@5`, `popularity_ndcg@5`, `popularity_mrr`.
    """
    count = Counter(example.chosen for example in splits.train)
    ranks = np.array(
        [
            1 + sum(count[negative] >= count[example.chosen] for negative in example.pool)
            for example in getattr(splits, split)
        ]
    )
    return {
        "popularity_accuracy": float((ranks == 1).mean()),
        "popularity_recall@5": float((ranks <= 5).mean()),
        "popularity_ndcg@5": float(np.where(ranks <= 5, 1 / np.log2(1 + ranks), 0).mean()),
        "popularity_mrr": float((1 / ranks).mean()),
    }


def inspect(splits: Splits, tokenizer: PreTrainedTokenizerBase, split: str = "train", out: Path | None = None) -> str:
    """A page about a prepared dataset; with `out`, every example of `split` is written there as JSON Lines.

    Raises:
        UserError: `split` is none of train, val, test.
    """
    if split not in SPLITS:
        raise UserError(f"split is train, val or test, not {split!r}")
    lines = [f"digest {splits.digest}"]
    lines += [f"  {name}: {value}" for name, value in splits.report.items()]
    for name in SPLITS:
        lines += _about(name, getattr(splits, name), tokenizer)
    lines += ["", "without a model, on the test split:"]
    lines += [f"  {name}: {value:.4f}" for name, value in (leak_check(splits) | popularity_baseline(splits)).items()]
    for example in getattr(splits, split)[:SHOWN]:
        lines += ["", f"{example.id}  {json.dumps(example.meta, ensure_ascii=False)}", f"prompt: {example.prompt}"]
        lines += [f"chosen: {example.chosen}", f"pool ({len(example.pool)}): {' | '.join(example.pool)}"]
    if out is not None:
        lines += ["", f"{export(getattr(splits, split), split, out)} examples of {split} written to {out}"]
    return "\n".join(lines)


def export(examples: Sequence[PreferenceExample], split: str, out: Path) -> int:
    """Write `split`, `id`, `prompt`, `chosen`, `pool`, `candidates` (in slate order), a line each; return how many."""
    with replacing(out) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            row = {
                "split": split,
                "id": example.id,
                "prompt": example.prompt,
                "chosen": example.chosen,
                "pool": example.pool,
                "candidates": example.candidates,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(examples)


def _about(split: str, examples: Sequence[PreferenceExample], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    pools: Counter[int] = Counter()
    prompts: Counter[str] = Counter()
    repeated = 0
    for example in examples:
        pools[len(example.pool)] += 1
        prompts[example.prompt] += 1
        texts = {normalise(text) for text in example.candidates}
        repeated += len(texts) < len(example.candidates)
    some = [examples[row] for row in np.linspace(0, len(examples) - 1, min(MEASURED, len(examples))).astype(int)]
    prompt_lengths = _lengths([example.prompt for example in some], tokenizer)
    response_lengths = _lengths([text for example in some for text in example.candidates], tokenizer)
    return [
        "",
        f"{split}: {len(examples)} examples",
        f"  pool sizes: {_counts(pools)}",
        f"  prompts that repeat an earlier one: {len(examples) - len(prompts)}",
        f"  slates with equal texts: {repeated}",
        f"  tokens of a prompt: {_spread(prompt_lengths)}; of a response: {_spread(response_lengths)}"
        + (f" (of {len(some)} examples)" if len(some) < len(examples) else ""),
    ]


def _lengths(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _spread(lengths: list[int]) -> str:
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    return f"{low} to {high}, median {middle}"


def _counts(counter: Counter[int]) -> str:
    return ", ".join(f"{size} ({count}x)" for size, count in sorted(counter.items()))
