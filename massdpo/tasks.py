"""What each `task` does: training is an experiment of its own, the others are here, and write where `out` says."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from massdpo import experiment, inputs, launch
from massdpo.config import validate
from massdpo.data.inspect import inspect as inspect_data
from massdpo.data.prepare import limited, prepare
from massdpo.data.tokenize import tokenize_split
from massdpo.errors import UserError
from massdpo.evaluation import ranking, score_split
from massdpo.generation import Answer, generate_split, generation_metrics
from massdpo.ranking import policy_in, rank, writing_to
from massdpo.scoring import PreferenceScorer
from massdpo.selectors import check_selection
from massdpo.stages import Preference
from massdpo.store import build_folder, is_whole, write_json
from massdpo.studies.task import study
from massdpo.tracking import NoLogger, summary_table

READING = ("max_length", "chat_template")  # options of the trainer that change what a policy makes of a text


def run(config: DictConfig) -> None:
    """Do what `task` says.

    Raises:
        UserError: anything a user can cause; nothing half-written is left where a result is expected.
    """
    validate(config)
    TASKS[config.task](config)


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
    splits = prepare(OmegaConf.to_container(config.dataset, resolve=True), inputs.cache_of(config))  # type: ignore[arg-type]
    rows = tokenize_split(splits.test, tokenizer, config.trainer.max_length, config.trainer.chat_template)
    for line in rows.warnings:
        print(f"warning: test: {line}", file=sys.stderr)
    scorer = accelerator.prepare_model(PreferenceScorer(policy, None, config.trainer.layout), evaluation_mode=True)
    scores = score_split(scorer, rows, accelerator, config.trainer.eval_batch_size, tokenizer.pad_token_id, "evaluate")
    answers: list[Answer] = []
    if config.trainer.generate:
        answers = generate_split(scorer, rows, accelerator, config.trainer.eval_batch_size, tokenizer)
    if not accelerator.is_main_process:
        return
    metrics = ranking(scores) | (generation_metrics(answers, scores) if answers else {})
    print(f"{run} on the test split of {config.choices.dataset}, {len(rows)} prompts")
    summary_table("test split", [{"test metric": name, "policy": value} for name, value in metrics.items()])
    if config.out:
        about = {"run": str(run), "dataset": config.choices.dataset, "data": splits.digest, "prompts": len(rows)}
        with writing_to(config.out):
            write_json(Path(config.out), metrics | about)


def select(config: DictConfig) -> None:
    """Write the training split with the negatives that `selector` picks under the SFT start, for other trainers.

    In the folder `out`: train.jsonl and dataset/ (`datasets.load_from_disk`) with `prompt`, `chosen`, the picked texts
    `rejected` and their places in the pool `rejected_index`, in pick order; pairs.jsonl with a line for each picked
    negative, whose responses bring the space that joins them to the prompt (none with a chat template), as TRL wants.

    Raises:
        UserError: a pool below k, or an `out` that holds something else.
    """
    accelerator = launch.start(config)
    out, trainer = Path(config.out), config.trainer
    if out.exists() and not is_whole(out) and (out.is_file() or any(out.iterdir())):
        raise UserError(f"out={out} is not what task=select wrote before: name a new folder")
    cache = inputs.cache_of(config)
    data, model = inputs.load(config, cache)
    subset = trainer.preference.limit, config.dataset.seed, "preference"
    rows, examples = limited(data.train, *subset), limited(data.splits.train, *subset)
    selector = inputs.instantiate(config.selector)
    pools = [len(example.pool) for example in examples]
    check_selection(config.selector, pools)
    score = inputs.scoring(config, accelerator, data.pad_id)
    start = inputs.sft_start(config, data, model, cache, score, NoLogger(), accelerator)
    policy = inputs.load_start(start, config)
    features = selector.features if selector.needs_scores else None
    scorer = PreferenceScorer(policy, features, trainer.layout).to(accelerator.device)
    reference = inputs.reference_scores(config, data, rows, start, scorer, cache, score, accelerator)["train"]
    width = min(config.selector.k, max(pools)) if "k" in config.selector else max(pools)
    picking = Preference(selector, inputs.instantiate(config.loss), config.beta, "once", config.seed, reference, width)
    with accelerator.autocast():
        picking.selecting(rows, accelerator, trainer.eval_batch_size, data.pad_id)(scorer, 0)
    index_SK, mask_SK = picking.state["index_SK"], picking.state["mask_SK"]
    table = []
    for example, index_K, mask_K in zip(examples, index_SK, mask_SK, strict=True):
        places = index_K[mask_K].tolist()
        rejected = [example.pool[place] for place in places]
        row = {"prompt": example.prompt, "chosen": example.chosen, "rejected": rejected, "rejected_index": places}
        table.append(row)
    if accelerator.is_main_process:
        import datasets  # seconds

        datasets.disable_progress_bars()
        space = "" if trainer.chat_template else " "
        pairs = [
            {"prompt": row["prompt"], "chosen": space + row["chosen"], "rejected": space + rejected}
            for row in table
            for rejected in row["rejected"]
        ]

        def write(folder: Path) -> None:
            _write_lines(folder / "train.jsonl", table)
            _write_lines(folder / "pairs.jsonl", pairs)
            datasets.Dataset.from_list(table).save_to_disk(folder / "dataset")

        with writing_to(config.out):
            build_folder(out, write)
        print(f"{len(table)} prompts with {len(pairs)} picked negatives: {out} (train.jsonl, pairs.jsonl, dataset/)")


def inspect(config: DictConfig) -> None:
    """Print what will be trained on; with `split` and `out`, write every prepared example of a split as JSON lines."""
    launch.start(config)
    data, _ = inputs.load(config, inputs.cache_of(config))
    out = Path(config.out) if config.out else None
    with writing_to(config.out):
        page = inspect_data(data.splits, data.tokenizer, config.split or "train", out)
    counts = [f"  {name}: {value}" for name, value in _token_counts(data).items()]
    sys.stdout.write("\n".join([page, "", "as tokens, a prompt with its responses:", *counts]) + "\n")


def _trained_with(run: Path) -> dict[str, Any]:
    """How the run read its texts, as far as its folder tells."""
    try:
        trainer = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["trainer"]
        return {name: trainer[name] for name in READING}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}  # a policy that came without its run


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _token_counts(data: inputs.Data) -> dict[str, str]:
    """Every count of the tokeniser's report, over the splits."""
    reports = {name: getattr(data, name).report for name in ("train", "val", "test")}
    return {key: ", ".join(f"{name} {report[key]}" for name, report in reports.items()) for key in reports["train"]}


TASKS = {
    "train": experiment.train,
    "evaluate": evaluate,
    "select": select,
    "rank": rank,
    "inspect": inspect,
    "study": study,
}
