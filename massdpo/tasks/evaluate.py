"""`task=evaluate`: the test split, ranked by the policy of a run."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from massdpo.config import root
from massdpo.console import summary_table
from massdpo.data.prepare import prepare
from massdpo.data.tokenize import tokenize_catalogue, tokenize_split
from massdpo.errors import UserError
from massdpo.evaluation.catalogue import rank_catalogue
from massdpo.evaluation.generation import generate_split, generation_metrics
from massdpo.evaluation.logps import SplitScorer, ranking
from massdpo.runs import launch, start
from massdpo.runs.results import overrides
from massdpo.store import write_json
from massdpo.tasks.rank import scorer_in, trained_with, writing_to


def evaluate(config: DictConfig) -> None:
    """Rank the run's own test split, or that of `dataset`, with the policy of the run in `in` and its tokenizer.

    Only policy/ is loaded from the run's folder; its config.yaml is read as plain data. Metrics are those of ranking
    and, with `trainer.generate`, of generation: the run's reference, which rewards and margins need, is not kept.

    Raises:
        UserError: there is no policy, or the dataset cannot be read.
    """
    accelerator = launch.start(config)
    run = Path(config["in"]).expanduser()
    scorer, tokenizer = scorer_in(run / "policy", config, accelerator)
    config = with_data_of(run, config)
    splits = prepare(OmegaConf.to_container(config.dataset, resolve=True), start.cache_of(config))  # type: ignore[arg-type]
    options = config.trainer.max_length, config.trainer.chat_template
    rows = tokenize_split(splits.test, tokenizer, *options, long_rows=config.dataset.get("long_rows", "error"))
    for line in rows.warnings:
        print(f"warning: test: {line}", file=sys.stderr)
    score_split = SplitScorer(accelerator, config.trainer.eval_batch_size, tokenizer.pad_token_id)
    logps = score_split(scorer, rows, "evaluate")
    answers = generate_split(scorer, rows, score_split, tokenizer) if config.trainer.generate else []
    splits = replace(splits, test=rows.rows_of(splits.test))
    against = {}
    if title_ids := tokenize_catalogue(splits.catalogue, tokenizer, rows, *options):
        against = rank_catalogue(scorer, splits, rows, title_ids, score_split).metrics()
    if not accelerator.is_main_process:
        return
    metrics = ranking(logps) | (generation_metrics(answers, logps) if answers else {}) | against
    print(f"{run} on the test split of {config.choices.dataset}, {len(rows)} prompts")
    summary_table("test split", [{"test metric": name, "policy": value} for name, value in metrics.items()])
    if config.out:
        about = {"run": str(run), "dataset": config.choices.dataset, "data": splits.digest, "prompts": len(rows)}
        with writing_to(config.out):
            write_json(Path(config.out), metrics | about)


def with_data_of(run: Path, config: DictConfig) -> DictConfig:
    """The config, with the data that the run was trained on unless the command line names others.

    Options of the dataset on the command line apply to the run's data. A run's config may be somebody else's: only the
    project's own readers are built from it, with options that they know.

    Raises:
        UserError: the run was trained with a reader that is not the project's, or with options that it does not know.
    """
    found = trained_with(run)
    given = [override.lstrip("+~").split("=")[0] for override in overrides()]
    if {"dataset", "setting", "sweeps"} & set(given) or not HydraConfig.initialized():
        return config
    node, choices = found.get("dataset"), found.get("choices")
    if not isinstance(node, dict) or not isinstance(choices, dict) or not isinstance(choices.get("dataset"), str):
        print(
            f"note: {run} does not say what it was trained on: using dataset={config.choices.dataset}", file=sys.stderr
        )
        return config
    if node.get("_target_") not in readers():
        raise UserError(f"{run} was trained on data of a reader that is not massdpo's: name them with dataset=")
    options = {name.removeprefix("dataset.") for name in given if name.startswith("dataset.")}
    node |= {key: value for key, value in config.dataset.items() if key in options}
    whole: Any = OmegaConf.to_container(config, resolve=True)
    whole["dataset"], whole["choices"]["dataset"] = node, choices["dataset"]
    return OmegaConf.create(whole)


def readers() -> set[str]:
    """The classes that conf/dataset/ names."""
    files = (root() / "conf" / "dataset").glob("*.yaml")
    return {yaml.safe_load(file.read_text(encoding="utf-8")).get("_target_") for file in files}  # an alias has none
