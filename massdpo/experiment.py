"""One run, top to bottom: prepare, SFT, reference, preference stage, evaluate, result files; what is there is kept."""

import json
import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import massdpo
from massdpo import stages
from massdpo.benchmark.measure import commit, in_words, machine
from massdpo.card import model_card
from massdpo.config import identity, resolved, run_name, validate, without_secrets
from massdpo.data.baselines import baselines
from massdpo.data.prepare import limited, prepare
from massdpo.data.schema import Splits
from massdpo.data.tokenize import tokenize_splits, tokenizer_key
from massdpo.data.tokens import TokenizedExample, TokenizedSplit
from massdpo.errors import UserError
from massdpo.evaluation import SplitScores, evaluate, predictions, ranking, score_split
from massdpo.generation import Answer, generate_split, generation_metrics
from massdpo.policies import add_adapter, load_policy, merge_adapter, save_policy, weights_digest
from massdpo.runs import (
    CHECKPOINTS,
    claim,
    draw_history,
    holding,
    peak_memory_mb,
    reset_peak_memory,
    show,
    take_over,
    telling,
)
from massdpo.scoring import PreferenceScorer
from massdpo.selectors import check_selection
from massdpo.store import Cache, build_folder, digest, is_whole, write_json, write_text
from massdpo.tracking import History, NoLogger, Tracker
from massdpo.training import Stage, fit

Score = Callable[[nn.Module, Sequence[TokenizedExample], str], SplitScores]  # (scorer, split, what the bar says)
# Options of the trainer that change the SFT start.
SFT_OPTIONS = (
    *("device", "precision", "max_length", "chat_template", "gradient_checkpointing", "layout", "adapter", "sft"),
    *("batch_size", "accumulate", "weight_decay", "max_grad_norm", "warmup", "keep", "keep_metric", "log_every"),
)


def run(config: DictConfig) -> None:
    """Do what `task` says.

    Raises:
        UserError: anything a user can cause; nothing half-written is left where a result is expected.
    """
    from massdpo import tasks

    validate(config)
    if config.task == "train":
        train(config)
    else:
        getattr(tasks, config.task)(config)


@dataclass
class Data:
    """The splits as text and as tokens, and what determines them."""

    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    train: TokenizedSplit
    val: TokenizedSplit
    test: TokenizedSplit
    key: str

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad  # masked wherever it stands


def train(config: DictConfig) -> Path:
    """SFT start, preference stage, evaluation; returns the run's folder.

    A finished run of the same config and data is announced and left alone (`force=true` computes it again).
    """
    accelerator = start(config)
    cache = Cache(Path(config.cache_dir).expanduser())
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


def start(config: DictConfig) -> Accelerator:
    """A fresh Accelerator: several jobs run in one process, and its state would keep the first one's precision."""
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Renamed in the newest transformers; peft, and we for older ones, use the old names.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    logging.getLogger("accelerate.utils.other").setLevel(
        logging.ERROR
    )  # tells of every tied weight at every checkpoint
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = config.trainer.device == "cpu" or (config.trainer.device == "auto" and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if config.trainer.precision == "bfloat16" else "no")
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise UserError(f"{expected} processes were asked for, {accelerator.num_processes} started: use torchrun")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        check_sharding(accelerator)
    if config.trainer.generate and accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "trainer.generate=true cannot decode with sharded weights: leave it out here, and let "
            "task=evaluate in=RUN trainer.generate=true do it afterwards"
        )
    reset_peak_memory()
    return accelerator


def check_sharding(accelerator: Accelerator) -> None:
    """Hold Accelerate's FSDP settings against what a run needs; log-probs stay in float32 whatever the precision."""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("Accelerate shards weights over several GPUs only: leave its FSDP settings out here")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("Accelerate's FSDP settings: set fsdp_version: 2")
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "Accelerate's FSDP settings: set fsdp_cpu_ram_efficient_loading: false, as every process scores the "
            "reference with whole weights before they are sharded"
        )
    if plugin.mixed_precision_policy is not None:
        in_float32 = {"reduce_dtype": torch.float32, "output_dtype": None}  # None: as the scorer gives them
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **in_float32)


def load(config: DictConfig, cache: Cache) -> tuple[Data, nn.Module]:
    """The data as text and tokens, and the model with its start weights."""
    splits = prepare(OmegaConf.to_container(config.dataset, resolve=True), cache)  # type: ignore[arg-type]
    source = instantiate(config.model)

    def texts() -> Iterator[str]:
        for example in splits.train:
            yield f"{example.prompt} {example.chosen}"  # as they stand when trained on: a space joins them
            yield from (f" {response}" for response in example.pool)

    model, tokenizer = source.load(texts, config.seed, cache, digest(massdpo.__version__, splits.digest))
    context = model.config.get_text_config().max_position_embeddings
    options = config.trainer.max_length, config.trainer.chat_template
    if config.trainer.max_length > context:
        raise UserError(f"trainer.max_length={config.trainer.max_length}: the model's context holds {context} tokens")
    tokens = tokenize_splits(splits, tokenizer, *options, cache)
    for name, split in tokens.items():
        for line in split.warnings:
            print(f"warning: {name}: {line}", file=sys.stderr)
    key = digest(splits.digest, tokenizer_key(tokenizer, config.trainer.chat_template), options)
    return Data(splits, tokenizer, **tokens, key=key), model


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

    def score(scorer: nn.Module, split: Sequence[TokenizedExample], what: str) -> SplitScores:
        return score_split(scorer, split, accelerator, trainer.eval_batch_size, data.pad_id, what)

    start_folder = sft_start(config, data, model, cache, score, tracker, accelerator)
    model.to("meta")  # it is saved: from here on one model's weights are in memory, the policy's
    start_info = json.loads((start_folder / "start.json").read_text(encoding="utf-8"))
    history.rows[:] = start_info["history"]

    policy = load_start(start_folder, config)
    scorer: nn.Module = PreferenceScorer(policy, selector.features if selector.needs_scores else None, trainer.layout)
    started = time.perf_counter()
    bfloat16 = trainer.precision == "bfloat16"
    with accelerator.autocast():  # as in training, or rewards would not start at 0
        reference = reference_scores(config, data, rows, scorer.to(accelerator.device), cache, score, accelerator)
        reference_seconds = time.perf_counter() - started
        stages.check_reference(scorer, rows, reference["train"], accelerator, data.pad_id, bfloat16)

    width = max(pools) if "k" not in config.selector else min(config.selector.k, max(pools))
    loss = hydra.utils.instantiate(config.loss)
    objective = stages.Preference(selector, loss, config.beta, config.refresh, config.seed, reference["train"], width)
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
        alarms=stages.alarms,
    )
    scorer, position = fit(stage, scorer, trainer, accelerator, history, tracker)

    final = score(scorer, data.test, "test")
    answers: list[Answer] = []
    if trainer.generate:
        answers = generate_split(scorer, data.test, accelerator, trainer.eval_batch_size, data.tokenizer)
    weights = gathered(scorer, accelerator) if trainer.save_policy else None
    if not accelerator.is_main_process:
        return
    history.write()
    metrics: dict[str, Any] = evaluate(final, reference["test"], config.beta)
    metrics |= {f"sft/{name}": value for name, value in ranking(reference["test"]).items()}
    metrics |= {f"val/{name}": value for name, value in position.validation.items()}
    metrics |= generation_metrics(answers, final) if answers else {}
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
    write_text(folder / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if trainer.save_policy:
        policy = accelerator.unwrap_model(scorer).model
        counts = {"train": len(data.train), "preference": len(rows), "test": len(data.test)}
        card = model_card(resolved(config), metrics, counts, folder.name)
        build_folder(folder / "policy", lambda place: save_policy(policy, data.tokenizer, place, card, weights))
    write_json(folder / "metrics.json", metrics)
    draw_history(position.history, folder / "history.png")
    tracker.table("picks", picks_table(objective, data, rows))
    sync = tracker.finish(metrics, [folder / "metrics.json", folder / "history.csv"])
    show(folder, metrics, sync)


def command_line() -> str:
    """The command that this process computes, as it may be written down."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []  # none in a notebook
    return str(without_secrets(shlex.join(["python", "run.py", *overrides])))


def sft_start(
    config: DictConfig,
    data: Data,
    model: nn.Module,
    cache: Cache,
    score: Score,
    tracker: Tracker,
    accelerator: Accelerator,
) -> Path:
    """The folder of the SFT policy: the same for every selector, loss, k and beta, so it is trained once and shared."""
    trainer = config.trainer
    options: Any = OmegaConf.to_container(trainer, resolve=True)
    chosen = {name: options[name] for name in SFT_OPTIONS}
    # The number of threads changes last digits, and a start of other threads would change a repeated run's.
    machine_shape = accelerator.num_processes, torch.get_num_threads()
    key = digest(massdpo.__version__, weights_digest(model), data.key, chosen, config.seed, machine_shape)
    checkpoints = cache.root / "sft" / f"{key}.checkpoints"

    def make() -> Callable[[Path], None]:
        policy = add_adapter(model, trainer.adapter, config.seed) if trainer.adapter else model  # type: ignore[arg-type]
        if trainer.gradient_checkpointing:
            checkpointing(policy)
        stage = Stage(
            name="sft",
            rows=data.train,
            epochs=trainer.sft.epochs,
            learning_rate=trainer.sft.learning_rate,
            objective=stages.sft,
            validate=lambda scorer: ranking(score(scorer, data.val, "validate")),
            checkpoints=checkpoints,
            seed=config.seed,
            pad_id=data.pad_id,
        )
        history = History(checkpoints / "history.csv")
        scorer: nn.Module = PreferenceScorer(policy, None, trainer.layout)
        scorer, position = fit(stage, scorer, trainer, accelerator, history, tracker)
        trained, weights = accelerator.unwrap_model(scorer).model, gathered(scorer, accelerator)
        accelerator.free_memory()

        def write(folder: Path) -> None:
            save_policy(trained, data.tokenizer, folder, weights=weights)
            write_json(folder / "start.json", {"seconds": position.train_seconds, "history": position.history})

        return write

    place = shared_folder(cache, "sft", key, accelerator, make)
    shutil.rmtree(checkpoints, ignore_errors=True)  # weights and optimiser, three times the policy
    return place


def shared_folder(
    cache: Cache, kind: str, key: str, accelerator: Accelerator, make: Callable[[], Callable[[Path], None]]
) -> Path:
    """The cached folder for `key`; else every process takes part in `make()`, and one writes what it returns."""
    if accelerator.num_processes == 1:
        return cache.folder(kind, key, lambda folder: make()(folder))
    place = cache.path(kind, key)
    with cache.lock(kind, key) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            cache.holds(kind, key)  # sets a damaged one aside before the others look
        accelerator.wait_for_everyone()
        there = torch.tensor(float(is_whole(place)), device=accelerator.device)
        if int(accelerator.reduce(there, "sum")) < accelerator.num_processes:
            write = make()
            if accelerator.is_main_process:
                cache.build(kind, key, write)
        accelerator.wait_for_everyone()
    return place


def gathered(scorer: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor] | None:
    """The policy's weights by name, where they are sharded; every process takes part, the main one gets them."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    names = [name for name, _ in scorer.named_parameters()]  # a tied matrix counts once
    weights = accelerator.get_state_dict(scorer)
    return {name.removeprefix("model."): weights[name] for name in names if name in weights}


def load_start(folder: Path, config: DictConfig) -> nn.Module:
    """The policy as the preference stage starts, ready to be trained."""
    trainer = config.trainer
    policy: Any = load_policy(folder)[0]
    if trainer.adapter and trainer.adapter.stages == "two" and not isinstance(policy, PreTrainedModel):
        policy = merge_adapter(policy)
    if trainer.adapter and isinstance(policy, PreTrainedModel):
        policy = add_adapter(policy, trainer.adapter, config.seed + 1)
    for name, weight in policy.named_parameters():
        weight.requires_grad_("lora_" in name if trainer.adapter else True)
    if trainer.gradient_checkpointing:
        checkpointing(policy)
    return policy


def reference_scores(
    config: DictConfig,
    data: Data,
    rows: Sequence[TokenizedExample],
    scorer: nn.Module,
    cache: Cache,
    score: Score,
    accelerator: Accelerator,
) -> dict[str, SplitScores]:
    """Log-probs of every split under the policy as the preference stage starts, by weights, tokenizer and data."""
    splits = {"train": rows, "val": data.val, "test": data.test}
    limit = config.trainer.preference.limit, config.dataset.seed
    precision = config.trainer.precision, torch.get_num_threads()
    key = digest(massdpo.__version__, weights_digest(scorer), data.key, limit, precision)

    def make() -> Callable[[Path], None]:
        scores = {name: score(scorer, split, f"reference {name}") for name, split in splits.items()}

        def write(folder: Path) -> None:
            for name, values in scores.items():
                values.save(folder / f"{name}.safetensors")

        return write

    folder = shared_folder(cache, "reference", key, accelerator, make)
    return {name: SplitScores.load(folder / f"{name}.safetensors") for name in splits}


def instantiate(node: DictConfig) -> Any:
    """The part a config node describes; a UserError of its own stays one."""
    try:
        return hydra.utils.instantiate(node)
    except hydra.errors.InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None


def checkpointing(policy: Any) -> None:
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()  # frozen embeddings would cut the graph below the adapters


def picks_table(objective: stages.Preference, data: Data, rows: Sequence[TokenizedExample]) -> list[dict[str, str]]:
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
