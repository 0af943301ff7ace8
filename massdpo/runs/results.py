"""What a run leaves behind: metrics, result files, the policy with its card."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from massdpo.config import resolved, without_secrets
from massdpo.errors import one_line
from massdpo.evaluation.baselines import baselines
from massdpo.evaluation.catalogue import CatalogueRanks
from massdpo.evaluation.generation import Answer, generation_metrics
from massdpo.evaluation.logps import SplitLogps, SplitScorer, evaluate, predictions, ranking
from massdpo.model.save import save_policy
from massdpo.runs.card import model_card
from massdpo.runs.machine import commit, in_words, machine, peak_memory_mb
from massdpo.runs.start import Data
from massdpo.store import Cache, build_folder, write_json, write_jsonl
from massdpo.training.checkpoints import Position
from massdpo.training.history import History, Tracker
from massdpo.training.picks import candidates_of

PICKS, PREDICTIONS = "picks.jsonl", "predictions.jsonl"  # in a run's folder


@dataclass
class Run:
    """What every step of a run needs."""

    config: DictConfig
    data: Data
    cache: Cache
    folder: Path
    tracker: Tracker
    history: History
    score_split: SplitScorer

    @property
    def accelerator(self) -> Accelerator:
        return self.score_split.accelerator


@dataclass
class Tested:
    """What the trained policy makes of the test split, and its log-probs under the reference."""

    final: SplitLogps
    reference: SplitLogps
    answers: Sequence[Answer]  # empty without `trainer.generate`
    against: CatalogueRanks | None  # None where tests do not rank a catalogue


def measured(run: Run, tested: Tested, position: Position) -> dict[str, Any]:
    """Metrics of the policy and of the SFT start on the test split, of validation, and of guesses without a model."""
    metrics: dict[str, Any] = evaluate(tested.final, tested.reference, run.config.beta)
    metrics |= {f"sft/{name}": value for name, value in ranking(tested.reference).items()}
    metrics |= {f"val/{name}": value for name, value in position.validation.items()}
    metrics |= generation_metrics(tested.answers, tested.final) if tested.answers else {}
    metrics |= tested.against.metrics() if tested.against else {}
    return metrics | baselines(run.data.splits, run.cache)


def about(run: Run, position: Position, packed: bool) -> dict[str, Any]:
    """What the run cost, and what it ran on."""
    sizes = [row["k_effective"] for row in position.history if "k_effective" in row]
    return {
        "k_effective": sum(sizes) / len(sizes) if sizes else 0.0,
        "train_seconds": position.train_seconds,
        "select_seconds": position.select_seconds,
        "train_tokens": position.learned_tokens,
        "fed_tokens": position.fed_tokens,
        "tokens_per_second": position.fed_tokens / position.train_seconds if position.train_seconds else 0.0,
        "peak_memory_mb": peak_memory_mb(),
        "threads": torch.get_num_threads(),
        "processes": run.accelerator.num_processes,
        "packed": int(packed),
        "seed": run.config.seed,
        "git_commit": commit(),
        "machine": in_words(machine()),
        "command": command_line(),
    }


def write_results(run: Run, metrics: dict[str, Any], tested: Tested) -> None:
    """Everything that was computed, before anything that decorates it."""
    run.history.write()
    ids = [example.id for example in run.data.test]
    lines = predictions(tested.final, tested.reference, run.config.beta, ids)
    for line, example, reference_C in zip(lines, run.data.splits.test, tested.reference.logp_SC, strict=True):
        line |= candidates_of(example, reference_C)
    for line, answer in zip(lines, tested.answers, strict=False):  # there may be none
        line |= {"generated": answer.free, "generated_constrained": answer.constrained}
    for line, rank in zip(lines, tested.against.rank_S.tolist() if tested.against else [], strict=False):
        line["catalogue_rank"] = rank
    write_jsonl(run.folder / PREDICTIONS, lines)
    write_json(run.folder / "metrics.json", metrics)


def save(run: Run, policy: Any, weights: dict[str, torch.Tensor] | None, metrics: dict[str, Any]) -> None:
    """The trained policy and its model card, as an ordinary Hugging Face folder."""
    counts = {"train": len(run.data.train), "preference": len(run.data.rows), "test": len(run.data.test)}
    blocks = getattr(policy.config, "dequantised_from", None)
    card = None
    with decorating("the model card"):
        card = model_card(resolved(run.config), metrics, counts, run.folder.name, blocks)
    build_folder(run.folder / "policy", lambda place: save_policy(policy, run.data.tokenizer, place, card, weights))


@contextmanager
def decorating(what: str) -> Iterator[None]:
    """Something that a result can do without: if it fails, everything else is still complete."""
    try:
        yield
    except (Exception, SystemExit) as error:  # SystemExit: rich, when the reader is gone
        why = one_line(error, with_type=True)
        print(f"warning: {what} is left out ({why}); everything else is complete", file=sys.stderr)


def overrides() -> list[str]:
    """The options on the command line; none in a notebook."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def command_line() -> str:
    """The command that this process runs, without secrets."""
    return str(without_secrets(shlex.join(["python", "run.py", *overrides()])))


def picks_table(file: Path) -> list[dict[str, str]]:
    """The first lines of `picks.jsonl`, as text."""
    with open(file, encoding="utf-8") as lines:
        first = [json.loads(line) for line in islice(lines, 20)]
    return [
        {
            "id": line["id"],
            "prompt": str(line["prompt"]),
            "chosen": line["candidates"][0],
            "picked": " | ".join(pick["text"] for pick in line["picks"]),
        }
        for line in first
    ]
