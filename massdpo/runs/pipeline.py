"""One run, top to bottom: prepare, SFT, reference, preference stage, evaluate, result files; what is there is kept."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

import massdpo
from massdpo.config import identity, resolved, run_name, without_secrets
from massdpo.data.prepare import limited
from massdpo.data.tokens import TokenizedExample
from massdpo.evaluation.baselines import baselines
from massdpo.evaluation.catalogue import rank_catalogue
from massdpo.evaluation.generation import Answer, generate_split, generation_metrics
from massdpo.evaluation.scores import evaluate, predictions, ranking
from massdpo.model.save import save_policy
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch
from massdpo.runs.card import model_card
from massdpo.runs.folder import CHECKPOINTS, claim, draw_history, holding, show, take_over, telling
from massdpo.runs.machine import commit, in_words, machine, peak_memory_mb
from massdpo.runs.start import (
    Data,
    cache_of,
    gathered,
    instantiate,
    load,
    load_start,
    reference_scores,
    scoring,
    sft_start,
)
from massdpo.runs.trackers import NoLogger
from massdpo.selection import check_selection
from massdpo.store import Cache, build_folder, digest, write_json, write_text
from massdpo.training import objectives
from massdpo.training.history import History, Tracker
from massdpo.training.loop import Stage, fit


def train(config: DictConfig) -> Path:
    """SFT start, preference stage, evaluation; returns the run's folder.

    A finished run of the same config and data is announced and left alone (`force=true` computes it again).
    """
    accelerator = launch.start(config)
    cache = cache_of(config)
    folder = Path(config.runs_dir) / config.sweep / (config.name or run_name(config))
    data, model = load(config, cache)
    key = digest(massdpo.__version__, identity(config), data.key, accelerator.num_processes)
    with holding(folder, accelerator):
        if accelerator.is_main_process and not config.force:
            take_over(folder, key)
        accelerator.wait_for_everyone()
        if not claim(folder, key, config.force, accelerator):
            return folder
        accelerator.wait_for_everyone()
        logger = without_secrets(OmegaConf.to_container(config.logger, resolve=True))
        tracker: Tracker = hydra.utils.instantiate(logger) if accelerator.is_main_process else NoLogger()
        try:
            with telling(folder, key, accelerator):
                compute(config, data, model, cache, folder, tracker, accelerator)
        except BaseException:
            tracker.finish(None)
            raise
    return folder


def compute(
    config: DictConfig,
    data: Data,
    model: nn.Module,
    cache: Cache,
    folder: Path,
    tracker: Tracker,
    accelerator: Accelerator,
) -> None:
    """The stages of one run, into its folder."""
    trainer = config.trainer
    selector = instantiate(config.selector)
    rows: Sequence[TokenizedExample] = limited(data.train, trainer.preference.limit, config.dataset.seed, "preference")
    pools = [len(example.response_ids) - 1 for example in rows]
    check_selection(config.selector, pools)
    tracker.start(resolved(config), folder, folder.name, config.sweep, [str(name) for name in config.choices.values()])
    if accelerator.is_main_process:
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved(config))))
    history = History(folder / "history.csv")

    score = scoring(config, accelerator, data.pad_id)
    start_folder = sft_start(config, data, model, cache, score, tracker, accelerator)
    model.to("meta")  # it is saved: from here on one model's weights are in memory, the policy's
    start_info = json.loads((start_folder / "start.json").read_text(encoding="utf-8"))
    history.rows[:] = start_info["history"]

    policy = load_start(start_folder, config)
    scorer: Any = PreferenceScorer(policy, selector.features if selector.needs_scores else None, trainer.layout)
    started = time.perf_counter()
    reference = reference_scores(config, data, rows, scorer.to(accelerator.device), cache, score, accelerator)
    reference_seconds = time.perf_counter() - started

    width = max(pools) if "k" not in config.selector else min(config.selector.k, max(pools))
    loss = hydra.utils.instantiate(config.loss)
    objective = objectives.Preference(
        selector, loss, config.beta, config.refresh, config.seed, reference["train"], width
    )
    stage = Stage(
        name="preference",
        rows=rows,
        epochs=trainer.preference.epochs,
        learning_rate=trainer.preference.learning_rate,
        objective=objective,
        validate=lambda scorer: evaluate(score(scorer, data.val, "validate"), reference["val"], config.beta),
        checkpoints=folder / CHECKPOINTS,
        seed=config.seed,
        pad_id=data.pad_id,
        begin_epoch=objective.selecting(rows, accelerator, trainer.eval_batch_size, data.pad_id),
        state=objective.state,
        share=objective.share,
        seconds=objective.seconds,
        alarms=objectives.alarms,
    )
    scorer, position = fit(stage, scorer, trainer, accelerator, history, tracker)

    final = score(scorer, data.test, "test")
    answers: list[Answer] = []
    if trainer.generate:
        answers = generate_split(scorer, data.test, accelerator, trainer.eval_batch_size, data.tokenizer)
    against = None
    if data.catalogue:
        how = accelerator, trainer.eval_batch_size, data.pad_id
        against = rank_catalogue(scorer, data.splits, data.test, data.catalogue, *how)
    weights = gathered(scorer, accelerator) if trainer.save_policy else None
    if not accelerator.is_main_process:
        return
    history.write()
    metrics: dict[str, Any] = evaluate(final, reference["test"], config.beta)
    metrics |= {f"sft/{name}": value for name, value in ranking(reference["test"]).items()}
    metrics |= {f"val/{name}": value for name, value in position.validation.items()}
    metrics |= generation_metrics(answers, final) if answers else {}
    metrics |= against.metrics() if against else {}
    metrics |= baselines(data.splits, cache)
    sizes = [row["k_effective"] for row in position.history if "k_effective" in row]
    metrics |= {
        "k_effective": sum(sizes) / len(sizes) if sizes else 0.0,
        "train_seconds": position.train_seconds,
        "select_seconds": position.select_seconds,
        "sft_seconds": start_info["seconds"],
        "reference_seconds": reference_seconds,
        "train_tokens": position.tokens,
        "tokens_per_second": position.tokens / position.train_seconds if position.train_seconds else 0.0,
        "peak_memory_mb": peak_memory_mb(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "packed": int(accelerator.unwrap_model(scorer).packed),
        "seed": config.seed,
        "git_commit": commit(),
        "machine": in_words(machine()),
        "command": command_line(),
    }
    ids = [example.id for example in data.test]
    lines = predictions(final, reference["test"], config.beta, ids)
    for line, answer in zip(lines, answers, strict=False):  # without generation there is none
        line |= {"generated": answer.free, "generated_constrained": answer.constrained}
    for line, rank in zip(lines, against.rank_S.tolist() if against else [], strict=False):
        line["catalogue_rank"] = rank
    write_text(folder / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if trainer.save_policy:
        policy = accelerator.unwrap_model(scorer).model
        counts = {"train": len(data.train), "preference": len(rows), "test": len(data.test)}
        blocks = getattr(policy.config, "dequantised_from", None)
        card = model_card(resolved(config), metrics, counts, folder.name, blocks)
        build_folder(folder / "policy", lambda place: save_policy(policy, data.tokenizer, place, card, weights))
    write_json(folder / "metrics.json", metrics)
    draw_history(history.rows, folder / "history.png", folder.name)
    tracker.table("picks", picks_table(objective, data, rows))
    sync = tracker.finish(metrics, [folder / "metrics.json", folder / "history.csv"])
    show(folder, metrics, sync)


def command_line() -> str:
    """The command that this process computes, as it may be written down."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []  # none in a notebook
    return str(without_secrets(shlex.join(["python", "run.py", *overrides])))


def picks_table(objective: objectives.Preference, data: Data, rows: Sequence[TokenizedExample]) -> list[dict[str, str]]:
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
