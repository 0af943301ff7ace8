"""One run, top to bottom: prepare, SFT, reference, preference stage, evaluate, result files; what exists is reused."""

import json
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from massdpo.config import instantiate, resolved, run_name, without_secrets
from massdpo.console import patiently, screen, show_as, shows, warn
from massdpo.evaluation.catalogue import rank_catalogue
from massdpo.evaluation.generation import generate_split
from massdpo.evaluation.logps import SplitLogps, SplitScorer
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch
from massdpo.runs.folder import CHECKPOINTS, claim, holding, take_over, telling
from massdpo.runs.plan import doubts, plan, what_is_kept
from massdpo.runs.provenance import run_parts
from massdpo.runs.results import PICKS, Run, Tested, about, decorating, measured, picks_table, save, write_results
from massdpo.runs.shown import draw_history, show
from massdpo.runs.start import (
    cache_of,
    gathered,
    load,
    load_start,
    reference_logps,
    selector_for,
    sft_start,
    trainable,
)
from massdpo.runs.trackers import NoLogger
from massdpo.selection import Selector
from massdpo.store import write_text
from massdpo.training.checkpoints import Position
from massdpo.training.history import History, Tracker
from massdpo.training.loop import fit
from massdpo.training.objectives import Preference
from massdpo.training.picks import PickLog
from massdpo.training.stage import Stage


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
        tracker: Tracker = instantiate(logger) if accelerator.is_main_process else NoLogger()
        score_split = SplitScorer(accelerator, config.trainer.eval_batch_size, data.pad_id)
        run = Run(config, data, cache, folder, tracker, History(folder / "history.csv"), score_split)
        try:
            with telling(folder, parts, accelerator):
                compute(run, model)
        except BaseException:
            tracker.finish(None)
            raise
    return folder


def compute(run: Run, model: nn.Module) -> None:
    """The stages of one run, into its folder."""
    config, trainer, data = run.config, run.config.trainer, run.data
    selector = selector_for(config, data)
    features = selector.features if selector.needs_scores else None
    known = resolved(config)
    run.tracker.start(known, run.folder)
    if run.accelerator.is_main_process:
        write_text(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(known)))

    policy = trainable(config, model)
    tell_plan(run, policy, selector)
    start_folder = sft_start(config, data, policy, features, run.cache, run.score_split, run.tracker)
    for weight in policy.parameters():  # they are on disk: from here on only the policy's own weights are in memory
        weight.data = weight.data.new_empty(0)
    start = json.loads((start_folder / "start.json").read_text(encoding="utf-8"))
    run.history.rows[:] = start["history"]

    with patiently("loading the SFT start"):
        scorer: Any = PreferenceScorer(load_start(start_folder, config), features, trainer.layout)
    started = time.perf_counter()
    scorer.to(run.accelerator.device)
    reference = reference_logps(config, data, start_folder, scorer, run.cache, run.score_split)
    seconds = {"sft_seconds": start["seconds"], "reference_seconds": time.perf_counter() - started}

    objective = Preference(
        selector=selector,
        compare=instantiate(config.loss),
        beta=config.beta,
        refresh=config.refresh,
        seed=config.seed,
        rows=data.rows,
        val=data.val,
        reference=reference,
        score_split=run.score_split,
        screen=config.selector.get("screen"),
        log=PickLog(run.folder / PICKS, data.examples, reference["train"], trainer.picks),
    )
    stage = Stage(
        name="preference",
        objective=objective,
        epochs=trainer.preference.epochs,
        learning_rate=trainer.preference.learning_rate,
        checkpoints=run.folder / CHECKPOINTS,
        seed=config.seed,
        pad_id=data.pad_id,
    )
    scorer, position = fit(stage, scorer, trainer, run.accelerator, run.history, run.tracker)
    conclude(run, scorer, position, reference["test"], seconds)


def conclude(run: Run, scorer: Any, position: Position, reference: SplitLogps, seconds: dict[str, float]) -> None:
    """Evaluate the trained policy on the test split, against its reference there; write results and the policy."""
    trainer = run.config.trainer
    final = run.score_split(scorer, run.data.test, "test")
    answers = generate_split(scorer, run.data.test, run.score_split, run.data.tokenizer) if trainer.generate else []
    against = None
    if run.data.catalogue:
        against = rank_catalogue(scorer, run.data.splits, run.data.test, run.data.catalogue, run.score_split)
    weights = gathered(scorer, run.accelerator) if trainer.save_policy else None
    if not run.accelerator.is_main_process:
        return
    tested, model = Tested(final, reference, answers, against), run.accelerator.unwrap_model(scorer)
    metrics = measured(run, tested, position) | seconds | about(run, position, model.packed)
    write_results(run, metrics, tested)
    if trainer.save_policy:
        with patiently("writing the policy"):
            save(run, model.model, weights, metrics)
    decorate(run, metrics)


def tell_plan(run: Run, policy: nn.Module, selector: Selector) -> None:
    """Say what speaks against the run, what it will do and what it will take, before anything is computed."""
    kept = what_is_kept(run.config, run.data, run.cache, run.accelerator)  # by every process
    if screen.level != "sweep" and run.accelerator.is_main_process:
        for doubt in doubts(run.config, run.data, run.data.rows, run.accelerator.num_processes):
            warn(doubt)
    if shows("normal"):
        planned = plan(run.config, run.data, policy, run.data.rows, selector, run.score_split, kept)
        planned.tell(stderr=True)
        show_as(screen.level, planned.seconds)


def decorate(run: Run, metrics: dict[str, Any]) -> None:
    """Show the results once they are written: nothing that fails here can cost them."""
    with decorating("history.png"):
        draw_history(run.history.rows, run.folder / "history.png", run.folder.name)
    if run.config.trainer.preference.epochs:
        with decorating("the table of picks"):
            run.tracker.table("picks", picks_table(run.folder / PICKS))
    with patiently("finishing the log"):
        sync = run.tracker.finish(metrics, [run.folder / "metrics.json", run.folder / "history.csv"])
    with decorating("the table"):  # its reader may be gone
        if shows("normal"):
            show(run.folder, metrics, sync)
        elif not launch.in_multirun():  # there, the sweep prints a line per job
            print(f"{run.folder}: accuracy {metrics['accuracy']:.3f}")
