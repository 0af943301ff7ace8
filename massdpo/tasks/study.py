"""`task=study`: which study, on which runs, and where its table and figure go."""

import json
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from massdpo.data.batches import collate
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitScorer
from massdpo.model.save import load_policy
from massdpo.runs import launch, pipeline, results, start
from massdpo.runs.machine import commit, in_words, machine
from massdpo.runs.trackers import NoLogger
from massdpo.store import write_text

SEEDS = 5  # training seeds of study=features and study=refresh, from `seed` on
PROMPTS = 64  # training prompts whose gradients study=features compares


def study(config: DictConfig) -> None:
    """Compute the study that `study` names; its table and figure go to `out`, or results/studies.

    `optimality` and `loglinear` simulate and take nothing from the config; `features` and `refresh` train with it, once
    per seed, as runs that are kept and found again.
    """
    out = Path(config.out or "results/studies")
    started, code = time.perf_counter(), commit()  # before its own files change the checkout
    module = import_module(f"massdpo.tasks.studies.{config.study}")
    arguments = ARGUMENTS[config.study](config) if config.study in ARGUMENTS else ()
    getattr(module, config.study)(out, *arguments)
    page = out / f"{config.study}.md"
    source = f"`{results.command_line()}`, {time.perf_counter() - started:.0f} s. Commit {code}."
    write_text(page, f"{page.read_text(encoding='utf-8')}\n{source} Machine: {in_words(machine())}.\n")
    print(page.read_text(encoding="utf-8"))
    print(f"files: {out} ({config.study}.md, .csv, .png, .svg)")


def _of_refresh(config: DictConfig) -> tuple[Any, ...]:
    def run(kind: str, seed: int) -> Mapping[str, float]:
        folder = pipeline.train(_run_of(config, refresh=kind, seed=seed))
        return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))

    return run, _seeds(config)


def _of_features(config: DictConfig) -> tuple[Any, ...]:
    accelerator = launch.start(config)
    if not config.trainer.save_policy:
        raise UserError("study=features compares the policy before and after training: set trainer.save_policy=true")
    cache = start.cache_of(config)
    data, _ = start.load(config, cache)
    rows = list(enumerate(data.train[:PROMPTS]))
    # One prompt each: a backward pass goes through a whole batch.
    batches = [collate([row], data.pad_id).to(accelerator.device) for row in rows]

    def models(seed: int) -> Mapping[str, nn.Module]:
        run = _run_of(config, seed=seed)
        folder = pipeline.train(run)
        data, model = start.load(run, cache)
        score_split = SplitScorer(accelerator, config.trainer.eval_batch_size, data.pad_id)
        sft_folder = start.sft_start(run, data, start.trainable(run, model), None, cache, score_split, NoLogger())
        before, after = start.load_start(sft_folder, run), load_policy(folder / "policy")[0]
        trained = {name for name, weight in before.named_parameters() if weight.requires_grad}
        for name, weight in after.named_parameters():
            weight.requires_grad_(name in trained)
        return {"before": before.to(accelerator.device), "after": after.to(accelerator.device)}

    return models, batches, config.beta, config.k, _seeds(config)


ARGUMENTS = {"refresh": _of_refresh, "features": _of_features}  # of a study's function, after the folder it writes to


def _seeds(config: DictConfig) -> range:
    return range(config.seed, config.seed + SEEDS)


def _run_of(config: DictConfig, **options: Any) -> DictConfig:
    """The same config, as a training run in the study's own sweep."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    run = {"task": "train", "study": None, "out": None, "name": None, "sweep": f"study_{config.study}"}
    return OmegaConf.create(values | run | options)
