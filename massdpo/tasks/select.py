"""`task=select`: the training split with the negatives that a selector picks, for other trainers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from massdpo.config import instantiate
from massdpo.data.schema import PreferenceExample, joint
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitScorer
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch, start
from massdpo.runs.trackers import NoLogger
from massdpo.store import build_folder, is_whole, write_jsonl
from massdpo.tasks.rank import writing_to
from massdpo.training.objectives import Preference


def select(config: DictConfig) -> None:
    """Write the training split with the negatives that `selector` picks under the SFT start, for other trainers.

    In the folder `out`: train.jsonl and dataset/ (`datasets.load_from_disk`) with `prompt`, `chosen`, the picked texts
    `rejected` in pick order, their places in the pool `rejected_index`, and `responses`, the chosen one before the
    picked ones, for trainers of ranked lists; pairs.jsonl with one line per picked negative, whose responses start
    with the space that joins them to the prompt, as TRL expects. With a chat template, prompts and responses are lists
    of messages.

    Raises:
        UserError: a pool is smaller than k, or `out` holds something else.
    """
    accelerator = launch.start(config)
    out, trainer = Path(config.out), config.trainer
    written = is_whole(out) and (out / "pairs.jsonl").exists()  # by this task
    if out.exists() and not written and (out.is_file() or any(out.iterdir())):
        raise UserError(f"out={out} was not written by task=select: give a new folder")
    cache = start.cache_of(config)
    data, model = start.load(config, cache)
    selector = start.selector_for(config, data)
    features = selector.features if selector.needs_scores else None
    score_split = SplitScorer(accelerator, trainer.eval_batch_size, data.pad_id)
    sft_folder = start.sft_start(config, data, start.trainable(config, model), features, cache, score_split, NoLogger())
    policy = start.load_start(sft_folder, config)
    scorer = accelerator.prepare_model(PreferenceScorer(policy, features, trainer.layout), evaluation_mode=True)
    reference = start.reference_logps(config, data, sft_folder, scorer, cache, score_split)
    picking = Preference(
        selector=selector,
        compare=instantiate(config.loss),
        beta=config.beta,
        refresh="once",
        seed=config.seed,
        rows=data.rows,
        val=data.val,
        reference=reference,
        score_split=score_split,
        screen=config.selector.get("screen"),
    )
    picking.begin_epoch(scorer, 0, observe_every=len(data.rows))  # nothing is logged
    index_SK, mask_SK = picking.state["index_SK"], picking.state["mask_SK"]
    table = list(_rows(data.examples, index_SK, mask_SK, trainer.chat_template))
    if accelerator.is_main_process:
        _write(out, table, trainer.chat_template)


def _write(out: Path, table: list[dict[str, Any]], chat_template: bool) -> None:
    import datasets  # seconds

    datasets.disable_progress_bars()

    def joined(prompt: Any, response: Any) -> Any:
        return response if chat_template else joint(prompt, response) + response

    pairs = [
        {"prompt": row["prompt"], "chosen": joined(row["prompt"], row["chosen"]), "rejected": text}
        for row in table
        for text in (joined(row["prompt"], rejected) for rejected in row["rejected"])
    ]

    def write(folder: Path) -> None:
        write_jsonl(folder / "train.jsonl", table)
        write_jsonl(folder / "pairs.jsonl", pairs)
        datasets.Dataset.from_list(table).save_to_disk(folder / "dataset")

    with writing_to(str(out)):
        build_folder(out, write)
    print(f"{len(table)} prompts with {len(pairs)} picked negatives: {out} (train.jsonl, pairs.jsonl, dataset/)")


def _rows(
    examples: Sequence[PreferenceExample], index_SK: Tensor, mask_SK: Tensor, chat_template: bool
) -> Iterator[dict[str, Any]]:
    """Each prompt with its picks, as texts or as lists of messages."""
    for example, index_K, mask_K in zip(examples, index_SK, mask_SK, strict=True):
        places = index_K[mask_K].tolist()
        rejected = [example.pool[place] for place in places]
        if chat_template:  # TRL's conversational form, for the template that they were read with
            asked = example.meta.get("messages") or [{"role": "user", "content": example.prompt}]
            texts = {"prompt": asked, "chosen": answer(example.chosen), "rejected": [answer(text) for text in rejected]}
        else:
            texts = {"prompt": example.prompt, "chosen": example.chosen, "rejected": rejected}
        responses = [texts["chosen"], *texts["rejected"]]
        yield texts | {"rejected_index": places, "responses": responses}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
