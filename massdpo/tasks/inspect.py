"""`task=inspect`: what will be trained on, and how much of it can be guessed without a model (`baselines.py`)."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from massdpo.data.prepare import read
from massdpo.data.raw import SPLITS
from massdpo.data.schema import PreferenceExample, Splits
from massdpo.data.text import normalise
from massdpo.errors import UserError
from massdpo.evaluation.baselines import guess_metrics, leak_check
from massdpo.runs import launch, start
from massdpo.store import Cache, write_jsonl
from massdpo.tasks.rank import writing_to

PRINTED = 3  # examples printed in full
COUNTED = 300  # examples of each split that the counts are based on, evenly spaced


def inspect(config: DictConfig) -> None:
    """Print what will be trained on; with `split` and `out`, write every prepared example of a split as JSON lines."""
    launch.start(config)
    splits = read(config.dataset, start.cache_of(config))
    looked_at = sample(splits)
    with TemporaryDirectory() as folder:  # a tokenizer learned from a sample must not be cached
        data, _ = start.tokenized(config, looked_at, Cache(Path(folder)))
        shown = page(splits, looked_at, data.tokenizer, config.split or "train")
    if config.out:
        split = config.split or "train"
        with writing_to(config.out):
            export(examples := getattr(splits, split), split, Path(config.out))
        shown += f"\n\n{len(examples)} examples of {split} written to {config.out}"
    print(f"{shown}\n\nas tokens, each prompt with its responses:")
    for count in data.train.report:
        print(f"  {count}: {', '.join(f'{name} {getattr(data, name).report[count]}' for name in SPLITS)}")


def sample(splits: Splits) -> Splits:
    """At most COUNTED examples of each split, evenly spaced: a look must not take as long as the work."""

    def some(examples: Sequence[PreferenceExample]) -> Sequence[PreferenceExample]:
        rows = np.linspace(0, len(examples) - 1, min(COUNTED, len(examples))).astype(int)
        return [examples[row] for row in rows.tolist()]

    return replace(splits, train=some(splits.train), val=some(splits.val), test=some(splits.test))


def page(splits: Splits, looked_at: Splits, tokenizer: PreTrainedTokenizerBase, split: str = "train") -> str:
    """A page about a dataset; counts are of the examples in `looked_at`.

    Raises:
        UserError: `split` is not train, val or test.
    """
    if split not in SPLITS:
        raise UserError(f"split must be train, val or test, got {split!r}")
    lines = [f"  {name}: {value}" for name, value in splits.report.items() if name != "notes"]
    trained_on = {example.prompt for example in looked_at.train}
    for name in SPLITS:
        lines += _about(name, len(getattr(splits, name)), getattr(looked_at, name), tokenizer)
        if name != "train":
            also = sum(example.prompt in trained_on for example in getattr(looked_at, name))
            lines.append(f"  prompts also in train: {also}")
    leak = {f"leak check, {name.replace('_', ' ')}": value for name, value in leak_check(looked_at).items()}
    lines += ["", "without a model, on the test split, ties broken evenly:"]
    lines += [f"  {name}: {value:.4f}" for name, value in (leak | guess_metrics(looked_at)).items()]
    for example in getattr(splits, split)[:PRINTED]:
        lines += [
            "",
            f"{example.id}  {example.where}  {json.dumps(example.meta, ensure_ascii=False)}",
            f"prompt: {example.prompt}",
        ]
        place = example.candidates.index(example.chosen) + 1
        lines += [f"chosen, number {place} of a slate of {len(example.candidates)}: {example.chosen}"]
        lines += [f"pool ({len(example.pool)}): {' | '.join(example.pool)}"]
    return "\n".join(lines)


def export(examples: Sequence[PreferenceExample], split: str, out: Path) -> None:
    """Write one line per example: `split`, `id`, `prompt`, `chosen`, `pool`, `candidates` (in slate order)."""
    names = ("id", "prompt", "chosen", "pool", "candidates")
    write_jsonl(out, ({"split": split} | {name: getattr(example, name) for name in names} for example in examples))


def _about(
    split: str, size: int, examples: Sequence[PreferenceExample], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    pools = Counter(len(example.pool) for example in examples)
    prompts = {example.prompt for example in examples}
    distinct = [{normalise(text) for text in example.candidates} for example in examples]
    repeated = sum(len(texts) < len(example.candidates) for texts, example in zip(distinct, examples, strict=True))
    of_prompts = _lengths([example.prompt for example in examples], tokenizer)
    of_responses = _lengths([text for example in examples for text in example.candidates], tokenizer)
    return [
        "",
        f"{split}: {size} examples"
        + (f"; counted here: {len(examples)} of them, evenly spaced" if len(examples) < size else ""),
        f"  pool sizes: {', '.join(f'{size} ({count}x)' for size, count in sorted(pools.items()))}",
        f"  prompts that repeat an earlier one: {len(examples) - len(prompts)}",
        f"  slates that hold a text twice: {repeated}",
        f"  tokens per prompt: {of_prompts}; per response: {of_responses}",
    ]


def _lengths(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    return f"{low} to {high}, median {middle}"
