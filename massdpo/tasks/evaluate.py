"""`task=evaluate`: the test split, ranked by the policy of a run."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from massdpo.console import summary_table
from massdpo.data.prepare import prepare
from massdpo.data.tokenize import tokenize_catalogue, tokenize_split
from massdpo.evaluation.catalogue import rank_catalogue
from massdpo.evaluation.generation import generate_split, generation_metrics
from massdpo.evaluation.scores import SplitScorer, ranking
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch, start
from massdpo.store import write_json
from massdpo.tasks.rank import policy_in, writing_to

READING = ("max_length", "chat_template")  # options of the trainer that change what a policy makes of a text


def evaluate(config: DictConfig) -> None:
    """Rank the test split of `dataset` with the policy of the run in `in`, with the policy's own tokenizer.

    Of the run's folder only policy/ is loaded; its config.yaml is read as plain data, to tell where it read texts
    otherwise. Metrics are those of ranking, and of generation with `trainer.generate`: the run's reference, which
    rewards and margins need, is not kept.

    Raises:
        UserError: no policy there, or a dataset that it cannot read.
    """
    accelerator = launch.start(config)
    run = Path(config["in"]).expanduser()
    policy, tokenizer = policy_in(run / "policy", config)
    for name, value in _trained_with(run).items():
        if config.trainer[name] != value:
            print(f"warning: the run was trained with trainer.{name}={value}", file=sys.stderr)
    splits = prepare(OmegaConf.to_container(config.dataset, resolve=True), start.cache_of(config))  # type: ignore[arg-type]
    options = config.trainer.max_length, config.trainer.chat_template
    rows = tokenize_split(splits.test, tokenizer, *options, long_rows=config.dataset.get("long_rows", "error"))
    for line in rows.warnings:
        print(f"warning: test: {line}", file=sys.stderr)
    scorer = accelerator.prepare_model(PreferenceScorer(policy, None, config.trainer.layout), evaluation_mode=True)
    score = SplitScorer(accelerator, config.trainer.eval_batch_size, tokenizer.pad_token_id)
    scores = score(scorer, rows, "evaluate")
    answers = generate_split(scorer, rows, score, tokenizer) if config.trainer.generate else []
    splits = replace(splits, test=rows.rows_of(splits.test))
    against = {}
    if title_ids := tokenize_catalogue(splits.catalogue, tokenizer, rows, *options):
        against = rank_catalogue(scorer, splits, rows, title_ids, score).metrics()
    if not accelerator.is_main_process:
        return
    metrics = ranking(scores) | (generation_metrics(answers, scores) if answers else {}) | against
    print(f"{run} on the test split of {config.choices.dataset}, {len(rows)} prompts")
    summary_table("test split", [{"test metric": name, "policy": value} for name, value in metrics.items()])
    if config.out:
        about = {"run": str(run), "dataset": config.choices.dataset, "data": splits.digest, "prompts": len(rows)}
        with writing_to(config.out):
            write_json(Path(config.out), metrics | about)


def _trained_with(run: Path) -> dict[str, Any]:
    """How the run read its texts, as far as its folder tells."""
    try:
        trainer = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["trainer"]
        return {name: trainer[name] for name in READING}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}  # a policy that came without its run
