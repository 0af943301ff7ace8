"""What a run is about to do, before anything is trained: steps, tokens, time, memory, and why it may not work.

Time and memory are measured: a few steps of the run's own model, batches and selector, which move no weight.
"""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from massdpo.config import fast_precision
from massdpo.console import patiently, say, spell, summary_table
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.catalogue import rank_catalogue
from massdpo.evaluation.generation import generate_split
from massdpo.evaluation.logps import SplitScorer
from massdpo.runs.machine import check_memory, free_bytes, peak_memory_mb, training_bytes
from massdpo.runs.provenance import reference_key, start_key
from massdpo.runs.start import Data
from massdpo.runs.timing import LOOKED_AT, Timing
from massdpo.selection import Selector
from massdpo.store import Cache

FEW_STEPS, FEW_PROMPTS = 20, 50
TOO_FAST = {False: 3e-4, True: 2e-3}  # learning rates above which pretrained weights are lost; True: an adapter's


@dataclass
class Plan:
    """A run's stages as rows of a table, what it needs in words, and the seconds of each of its bars."""

    title: str
    stages: list[dict[str, Any]] = field(default_factory=list)
    memory: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def tell(self, stderr: bool) -> None:
        is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
        console = Console(stderr=stderr, width=None if is_terminal else 240)  # whole lines for who reads the log
        summary_table(self.title, self.stages, console)
        total = f"; all of it takes about {spell(sum(self.seconds.values()))}" if self.seconds else ""
        console.print(f"memory: {self.memory}{total}", highlight=False, markup=False, soft_wrap=True)


def plan(
    config: DictConfig,
    data: Data,
    policy: nn.Module,
    rows: Sequence[TokenizedExample],
    selector: Selector,
    score_split: SplitScorer,
    kept: Collection[str],
) -> Plan:
    """The plan of a run on these rows; `kept`: which of its parts are there already. Several processes time nothing.

    Raises:
        UserError: more memory is needed than is free.
    """
    trainer, processes = config.trainer, score_split.accelerator.num_processes
    check_memory(policy, score_split.accelerator)
    timing = Timing(config, policy, selector, score_split) if processes == 1 else None
    count: Any = policy.num_parameters  # of what is held in few bits, too
    size, trained = count(), count(only_trainable=True)
    part = f", {trained / size:.1%} of them trained" if trained < size else ""
    made = Plan(f"plan: {config.choices.model}, {size / 1e6:.3g} M parameters{part}")
    for name, of in (("sft", data.train), ("preference", rows)):
        epochs = trainer[name].epochs
        steps = -(-len(of) // (trainer.batch_size * trainer.accumulate * processes)) * epochs
        tokens, told = "", "kept" if name in kept else ""
        if timing and epochs and not told:
            fed, seconds = timing.stage(name, of, epochs)
            made.seconds[name] = seconds + epochs * timing.scoring(data.val)
            made.seconds[name] += timing.observing(of, epochs) if name == "preference" else 0.0
            tokens, told = f"{fed / 1e6:.3g} M" if fed >= 1e6 else f"{fed / 1e3:.3g} k", spell(made.seconds[name])
        made.stages.append(
            {"stage": name, "prompts": len(of), "epochs": epochs, "steps": steps, "tokens": tokens, "time": told}
        )
        if name == "sft" and timing and "reference" not in kept:
            splits = {"train": rows, "val": data.val, "test": data.test}
            made.seconds |= {f"reference {split}": timing.scoring(part) for split, part in splits.items()}
    if timing:
        made.seconds |= at_the_end(timing, trainer.generate, data, score_split)
        scoring = sum(seconds for name, seconds in made.seconds.items() if name not in trainer)
        prompts = len(data.test) + (0 if "reference" in kept else len(rows) + len(data.val) + len(data.test))
        timing.end()
        made.stages.append(dict(zip(made.stages[0], ["scoring", prompts, "", "", "", spell(scoring)], strict=True)))
    state = training_bytes(policy, score_split.accelerator)
    needed = peak_memory_mb() * 1e6 if timing else state
    made.memory = (
        f"{needed / 1e9:.2f} GB at the peak (weights, gradients and AdamW: {state / 1e9:.2g} GB), "
        f"{free_bytes(score_split.accelerator) / 1e9:.1f} GB are free"
    )
    return made


def at_the_end(timing: Timing, generate: bool, data: Data, score_split: SplitScorer) -> dict[str, float]:
    """Seconds of what follows the stages, by the name of its bar."""
    seconds, model = {"test": timing.scoring(data.test)}, timing.scorer
    if generate:
        answer = partial(generate_split, model, score_split=score_split, tokenizer=data.tokenizer)
        seconds["generate"] = timing.by_part(data.test, answer)
    if data.catalogue:
        rank = partial(rank_catalogue, model, data.splits, title_ids=data.catalogue, score_split=score_split)
        seconds["catalogue"] = timing.by_part(data.test, rank)
    return seconds


def doubts(config: DictConfig, data: Data, rows: Sequence[TokenizedExample], processes: int) -> Iterator[str]:
    """Why a run may show nothing, a line each."""
    trainer = config.trainer
    at_once = trainer.batch_size * trainer.accumulate * processes
    for name, of in (("sft", data.train), ("preference", rows)):
        stage = trainer[name]
        steps = -(-len(of) // at_once) * stage.epochs
        if 0 < steps < FEW_STEPS:
            yield (
                f"{name}: {len(of)} prompts, {at_once} at once, are {steps} optimiser steps, hardly enough to learn "
                f"from: lower trainer.batch_size or raise trainer.{name}.epochs"
            )
        rate = TOO_FAST[bool(trainer.adapter)]
        if stage.epochs and stage.learning_rate > rate and not config.model._target_.endswith("TinyModel"):
            yield (
                f"trainer.{name}.learning_rate={stage.learning_rate:g} is for tiny models of random weights, and "
                f"pretrained ones lose what they know above {rate:g}: trainer=cpu_pretrained, gpu or lora set others"
            )
    if trainer.precision != "float32" and fast_precision(trainer.device) == "float32":  # on a GPU, an error
        yield "this CPU has no fast bfloat16: PyTorch may be some 60 times slower than with trainer.precision=float32"
    if len(data.test) < FEW_PROMPTS:
        yield (
            f"{len(data.test)} test prompts: chance alone moves an accuracy by {0.5 / len(data.test) ** 0.5:.2f}, so "
            "take more, or compare over seeds"
        )
    k, sizes = config.selector.get("k"), [len(rows[row].response_ids) - 1 for row in range(min(len(rows), LOOKED_AT))]
    if k and trainer.preference.epochs and max(sizes) <= k:
        yield f"no pool has more than k={k} negatives: every selector takes all of them; lower k"


def what_is_kept(config: DictConfig, data: Data, cache: Cache, accelerator: Accelerator) -> set[str]:
    """Which of `sft` and `reference` are there already. Where the first is for other threads alone, that is told."""
    key = start_key(config, data.key, data.model_key, accelerator)
    with patiently("checking the SFT start"):
        if cache.believes("sft", key):
            reference = reference_key(config, cache.path("sft", key))
            return {"sft", "reference"} if cache.believes("reference", reference) else {"sft"}
    if cache.checkpoints("sft", key).is_dir():
        return set()
    for other in range(1, (os.cpu_count() or 1) + 1):
        elsewhere = start_key(config, data.key, data.model_key, accelerator, other)
        if cache.path("sft", elsewhere).is_dir() or cache.checkpoints("sft", elsewhere).is_dir():
            say(
                f"note: the SFT stage was computed with {other} threads, whose last digits are others, and starts anew "
                f"with {torch.get_num_threads()}: trainer.threads={other} goes on from it"
            )
            break
    return set()
