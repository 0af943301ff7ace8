"""One run, top to bottom: prepare, SFT, reference, preference stage, evaluate, result files; what is there is kept."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from massdpo.config import resolved, run_name, without_secrets
from massdpo.data.prepare import limited
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.baselines import baselines
from massdpo.evaluation.catalogue import CatalogueRanks, rank_catalogue
from massdpo.evaluation.generation import Answer, generate_split, generation_metrics
from massdpo.evaluation.scores import SplitScorer, SplitScores, evaluate, predictions, ranking
from massdpo.model.save import save_policy
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch
from massdpo.runs.card import model_card
from massdpo.runs.folder import CHECKPOINTS, claim, draw_history, holding, show, take_over, telling
from massdpo.runs.machine import commit, in_words, machine, peak_memory_mb
from massdpo.runs.provenance import run_parts
from massdpo.runs.start import Data, cache_of, gathered, instantiate, load, load_start, reference_scores, sft_start
from massdpo.runs.trackers import NoLogger
from massdpo.selection import check_selection
from massdpo.store import Cache, build_folder, write_json, write_text
from massdpo.training.checkpoints import Position
from massdpo.training.history import History, Tracker
from massdpo.training.loop import Stage, fit
from massdpo.training.objectives import Preference


@dataclass
class Run:
    """What every step of a run needs."""

    config: DictConfig
    data: Data
    cache: Cache
    folder: Path
    tracker: Tracker
    history: History
    score: SplitScorer

    @property
    def accelerator(self) -> Accelerator:
        return self.score.accelerator


def train(config: DictConfig) -> Path:
    """SFT start, preference stage, evaluation; returns the run's folder.

    A finished run of the same config and data is announced and left alone (`force=true` computes it again).
    """
    accelerator = launch.start(config)
    cache = cache_of(config)
    folder = Path(config.runs_dir) / config.sweep / (config.name or run_name(config))
    data, model = load(config, cache)
    parts = run_parts(config, data.key, data.model_key, accelerator)
    with holding(folder, accelerator):
        if accelerator.is_main_process and not config.force:
            take_over(folder, parts)
        accelerator.wait_for_everyone()
        if not claim(folder, parts, config.force, accelerator):
            return folder
        accelerator.wait_for_everyone()
        logger = without_secrets(OmegaConf.to_container(config.logger, resolve=True))
        tracker: Tracker = hydra.utils.instantiate(logger) if accelerator.is_main_process else NoLogger()
        score = SplitScorer(accelerator, config.trainer.eval_batch_size, data.pad_id)
        run = Run(config, data, cache, folder, tracker, History(folder / "history.csv"), score)
        try:
            with telling(folder, parts, accelerator):
                compute(run, model)
        except BaseException:
            tracker.finish(None)
            raise
    return folder


def compute(run: Run, model: nn.Module) -> None:
    """The stages of one run, into its folder."""
    config, trainer = run.config, run.config.trainer
    rows = limited(run.data.train, trainer.preference.limit, config.dataset.seed, "preference")
    selector = instantiate(config.selector)
    features = selector.features if selector.needs_scores else None
    check_selection(config.selector, [len(example.response_ids) - 1 for example in rows])
    announce(run)

    start_folder = sft_start(config, run.data, model, features, run.cache, run.score, run.tracker)
    model.to("meta")  # it is saved: from here on one model's weights are in memory, the policy's
    start = json.loads((start_folder / "start.json").read_text(encoding="utf-8"))
    run.history.rows[:] = start["history"]

    scorer: Any = PreferenceScorer(load_start(start_folder, config), features, trainer.layout)
    started = time.perf_counter()
    scorer.to(run.accelerator.device)
    reference = reference_scores(config, run.data, rows, start_folder, scorer, run.cache, run.score)
    seconds = {"sft_seconds": start["seconds"], "reference_seconds": time.perf_counter() - started}

    objective = Preference(
        selector=selector,
        compare=hydra.utils.instantiate(config.loss),
        beta=config.beta,
        refresh=config.refresh,
        seed=config.seed,
        rows=rows,
        val=run.data.val,
        reference=reference,
        score=run.score,
    )
    stage = Stage(
        name="preference",
        objective=objective,
        epochs=trainer.preference.epochs,
        learning_rate=trainer.preference.learning_rate,
        checkpoints=run.folder / CHECKPOINTS,
        seed=config.seed,
        pad_id=run.data.pad_id,
    )
    scorer, position = fit(stage, scorer, trainer, run.accelerator, run.history, run.tracker)

    final = run.score(scorer, run.data.test, "test")
    answers = generate_split(scorer, run.data.test, run.score, run.data.tokenizer) if trainer.generate else []
    against = None
    if run.data.catalogue:
        against = rank_catalogue(scorer, run.data.splits, run.data.test, run.data.catalogue, run.score)
    weights = gathered(scorer, run.accelerator) if trainer.save_policy else None
    if not run.accelerator.is_main_process:
        return
    metrics = measured(run, final, reference["test"], answers, against, position)
    metrics |= seconds | about(run, position, run.accelerator.unwrap_model(scorer).packed)
    write_results(run, metrics, final, reference["test"], answers, against)
    if trainer.save_policy:
        save(run, run.accelerator.unwrap_model(scorer).model, weights, metrics, len(rows))
    with decorating("history.png"):
        draw_history(run.history.rows, run.folder / "history.png", run.folder.name)
    with decorating("the table of picks"):
        run.tracker.table("picks", picks_table(objective, run.data, rows))
    sync = run.tracker.finish(metrics, [run.folder / "metrics.json", run.folder / "history.csv"])
    show(run.folder, metrics, sync)


def announce(run: Run) -> None:
    """Tell the tracker of the run and write down its config."""
    config = resolved(run.config)
    tags = [str(name) for name in run.config.choices.values()]
    run.tracker.start(config, run.folder, run.folder.name, run.config.sweep, tags)
    if run.accelerator.is_main_process:
        write_text(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))


def measured(
    run: Run,
    final: SplitScores,
    reference: SplitScores,
    answers: Sequence[Answer],
    against: CatalogueRanks | None,
    position: Position,
) -> dict[str, Any]:
    """Metrics of the test split: of the policy, of the SFT start, of validation, of guesses without a model."""
    metrics: dict[str, Any] = evaluate(final, reference, run.config.beta)
    metrics |= {f"sft/{name}": value for name, value in ranking(reference).items()}
    metrics |= {f"val/{name}": value for name, value in position.validation.items()}
    metrics |= generation_metrics(answers, final) if answers else {}
    metrics |= against.metrics() if against else {}
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


def write_results(
    run: Run,
    metrics: dict[str, Any],
    final: SplitScores,
    reference: SplitScores,
    answers: Sequence[Answer],
    against: CatalogueRanks | None,
) -> None:
    """Everything computed, before anything that decorates it."""
    run.history.write()
    lines = predictions(final, reference, run.config.beta, [example.id for example in run.data.test])
    for line, answer in zip(lines, answers, strict=False):  # without generation there is none
        line |= {"generated": answer.free, "generated_constrained": answer.constrained}
    for line, rank in zip(lines, against.rank_S.tolist() if against else [], strict=False):
        line["catalogue_rank"] = rank
    write_text(run.folder / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(run.folder / "metrics.json", metrics)


def save(run: Run, policy: Any, weights: dict[str, torch.Tensor] | None, metrics: dict[str, Any], used: int) -> None:
    """The trained policy and its model card, as an ordinary Hugging Face folder."""
    counts = {"train": len(run.data.train), "preference": used, "test": len(run.data.test)}
    blocks = getattr(policy.config, "dequantised_from", None)
    card = None
    with decorating("the model card"):
        card = model_card(resolved(run.config), metrics, counts, run.folder.name, blocks)
    build_folder(run.folder / "policy", lambda place: save_policy(policy, run.data.tokenizer, place, card, weights))


@contextmanager
def decorating(what: str) -> Iterator[None]:
    """What a run can do without: where it fails, the run's results are good all the same."""
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"warning: {what} is left out ({why}); the run's results are complete", file=sys.stderr)


def command_line() -> str:
    """The command that this process computes, as it may be written down."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []  # none in a notebook
    return str(without_secrets(shlex.join(["python", "run.py", *overrides])))


def picks_table(objective: Preference, data: Data, rows: Sequence[TokenizedExample]) -> list[dict[str, str]]:
    """The newest picks of the first prompts, as text."""

    def text(ids: Sequence[int]) -> str:
        return str(data.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    table = []
    for row, example in enumerate(rows[: min(20, len(rows))]):
        index_K = objective.state["index_SK"][row][objective.state["mask_SK"][row]]
        picks = " | ".join(text(example.response_ids[1 + index]) for index in index_K.tolist())
        chosen = text(example.response_ids[0])
        table.append({"id": example.id, "prompt": text(example.prompt_ids), "chosen": chosen, "picked": picks})
    return table
