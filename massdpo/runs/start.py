"""What the preference stage starts from: data, the SFT policy, reference log-probs; each computed once and shared."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from massdpo.config import instantiate
from massdpo.console import patiently
from massdpo.data.batches import by_length
from massdpo.data.chat import settle_chat_template
from massdpo.data.prepare import limited, prepare
from massdpo.data.schema import PreferenceExample, Splits, joint
from massdpo.data.tokenize import tokenize_catalogue, tokenize_splits, tokenizer_key
from massdpo.data.tokens import TokenizedExample, TokenizedSplit
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitLogps, SplitScorer, check_reference
from massdpo.model.load import warn_of_long_rope
from massdpo.model.save import add_adapter, load_policy, merge_adapter, save_policy
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs.folder import alone
from massdpo.runs.machine import check_memory
from massdpo.runs.provenance import model_key, reference_key, start_key
from massdpo.selection import Selector, check_selection
from massdpo.store import Cache, digest, package_code, write_json
from massdpo.training.history import History, Tracker
from massdpo.training.loop import fit
from massdpo.training.objectives import Sft
from massdpo.training.stage import Stage


@dataclass
class Data:
    """The splits as text and as tokens, and the keys of what determines them."""

    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    train: TokenizedSplit
    val: TokenizedSplit
    test: TokenizedSplit
    rows: Sequence[TokenizedExample]  # of train: what the preference stage trains on
    examples: Sequence[PreferenceExample]  # the same as text
    key: str
    model_key: str  # of the start weights and the model's configuration
    catalogue: list[list[int]]  # the ids of every title that tests rank against; empty: of each prompt's own candidates

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad  # masked everywhere


def cache_of(config: DictConfig) -> Cache:
    return Cache(Path(config.cache_dir).expanduser(), config.force)


def load(config: DictConfig, cache: Cache) -> tuple[Data, nn.Module]:
    """The data as text and tokens, and the model with its start weights."""
    with patiently(f"reading {config.choices.dataset}"):
        splits = prepare(config.dataset, cache)
    return tokenized(config, splits, cache)


def tokenized(config: DictConfig, splits: Splits, cache: Cache) -> tuple[Data, nn.Module]:
    """The splits with their tokens, and the model, whose tokenizer may be learned from them."""
    source = instantiate(config.model)

    def texts() -> Iterator[str]:
        for example in splits.train:
            prompt = example.prompt  # joined by a space, as in training
            yield prompt + joint(prompt, example.chosen) + example.chosen
            yield from (joint(prompt, response) + response for response in example.pool)

    texts_key = digest(package_code("data", "model", "store"), splits.digest)
    with patiently(f"loading {config.choices.model}"):
        model, tokenizer = source.load(texts, config.seed, cache, texts_key)
    context = model.config.get_text_config().max_position_embeddings
    options = config.trainer.max_length, config.trainer.chat_template
    if config.trainer.max_length > context:
        raise UserError(f"trainer.max_length={config.trainer.max_length}: the model's context holds {context} tokens")
    warn_of_long_rope(model.config, config.trainer.max_length)
    if config.trainer.chat_template:
        settle_chat_template(tokenizer)
    elif tokenizer.chat_template:
        print("hint: this model has a chat template, and trainer.chat_template=true would use it", file=sys.stderr)
    long_rows = config.dataset.get("long_rows", "error")
    with patiently("tokenising"):
        tokens = tokenize_splits(splits, tokenizer, *options, cache, long_rows)
    train, val, test = (tokens[name].rows_of(getattr(splits, name)) for name in tokens)
    splits = replace(splits, train=train, val=val, test=test)
    for name, split in tokens.items():
        for line in split.warnings:
            print(f"warning: {name}: {line}", file=sys.stderr)
    key = digest(splits.digest, tokenizer_key(tokenizer, config.trainer.chat_template), options, long_rows)
    with patiently("hashing the weights"):
        weights = model_key(model)
    catalogue = tokenize_catalogue(splits.catalogue, tokenizer, tokens["test"], *options)
    subset = config.trainer.preference.limit, config.dataset.get("seed", 0), "preference"
    parts: Any = tokens | {"rows": limited(tokens["train"], *subset), "examples": limited(train, *subset)}
    return Data(splits, tokenizer, **parts, key=key, model_key=weights, catalogue=catalogue), model


def selector_for(config: DictConfig, data: Data) -> Selector:
    """The selector of the config.

    Raises:
        UserError: a pool is too small for it, or too large.
    """
    selector: Selector = instantiate(config.selector)
    check_selection(config.selector, [len(example.response_ids) - 1 for example in data.rows])
    return selector


def trainable(config: DictConfig, model: Any) -> nn.Module:
    """The model as SFT trains it, with the adapter if there is one: in float32, as bfloat16 rounds small steps away."""
    policy = add_adapter(model, config.trainer.adapter, config.seed) if config.trainer.adapter else model.float()
    if config.trainer.gradient_checkpointing:
        checkpointing(policy)
    return policy


def sft_start(
    config: DictConfig,
    data: Data,
    policy: nn.Module,
    features: str | None,
    cache: Cache,
    score_split: SplitScorer,
    tracker: Tracker,
) -> Path:
    """The folder of the SFT policy: the same for every selector, loss, k and beta, so it is trained once and shared.

    A model that cannot give what the preference stage needs, such as the selector's `features`, fails before training.
    """
    trainer, accelerator = config.trainer, score_split.accelerator
    key = start_key(config, data.key, data.model_key, accelerator)
    checkpoints = cache.checkpoints("sft", key)

    def make(folder: Path | None) -> None:
        check_memory(policy, accelerator)
        stage = Stage(
            name="sft",
            objective=Sft(data.train, data.val, score_split),
            epochs=trainer.sft.epochs,
            learning_rate=trainer.sft.learning_rate,
            checkpoints=checkpoints,
            seed=config.seed,
            pad_id=data.pad_id,
        )
        history = History(checkpoints / "history.csv")
        scorer: Any = PreferenceScorer(policy, features, trainer.layout)
        scorer.features = None  # nothing is selected yet
        scorer, position = fit(stage, scorer, trainer, accelerator, history, tracker)
        trained, weights = accelerator.unwrap_model(scorer).model, gathered(scorer, accelerator)
        accelerator.free_memory()
        if folder:
            save_policy(trained, data.tokenizer, folder, weights=weights)
            write_json(folder / "start.json", {"seconds": position.train_seconds, "history": position.history})

    return shared_folder(cache, "sft", key, accelerator, make)


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


def reference_logps(
    config: DictConfig, data: Data, start: Path, scorer: PreferenceScorer, cache: Cache, score_split: SplitScorer
) -> dict[str, SplitLogps]:
    """Log-probs of every split under the policy that the preference stage starts from, the one in the folder `start`.

    Raises:
        UserError: the stored log-probs are not this policy's.
    """
    trainer, accelerator = config.trainer, score_split.accelerator
    splits = {"train": data.rows, "val": data.val, "test": data.test}

    def make(folder: Path | None) -> None:
        for name, split in splits.items():
            values = score_split(scorer, split, f"reference {name}")
            if folder:
                values.save(folder / f"{name}.safetensors")

    folder = shared_folder(cache, "reference", reference_key(config, start), accelerator, make)
    logps = {name: SplitLogps.load(folder / f"{name}.safetensors") for name in splits}
    whole = by_length(data.rows, trainer.eval_batch_size)[: accelerator.num_processes]
    first = [row for batch in whole for row in batch]
    dtype = torch.bfloat16 if trainer.precision == "bfloat16" else scorer.causal_lm.dtype
    now = score_split(scorer, [data.rows[row] for row in first], "check")
    check_reference(now, logps["train"].logp_SC[first], dtype)
    return logps


def shared_folder(
    cache: Cache, kind: str, key: str, accelerator: Accelerator, make: Callable[[Path | None], None]
) -> Path:
    """The cached folder for `key`; if there is none, every process calls `make`, the main one with a folder to fill."""
    if accelerator.num_processes == 1:
        return cache.folder(kind, key, make)
    place = cache.path(kind, key)
    with alone(accelerator, lambda meanwhile: cache.lock(kind, key, meanwhile)):
        held = accelerator.is_main_process and cache.holds(kind, key)  # moves a damaged one aside
        accelerator.wait_for_everyone()
        # One process per machine checks every byte.
        there = held or (cache.believes(kind, key) if accelerator.is_local_main_process else place.is_dir())
        count = torch.tensor(float(there), device=accelerator.device)
        if int(accelerator.reduce(count, "sum")) < accelerator.num_processes:
            if accelerator.is_main_process:
                cache.build(kind, key, make)
            else:
                make(None)
        accelerator.wait_for_everyone()
    return place


def gathered(scorer: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor] | None:
    """The policy's weights by name, if they are sharded; every process takes part, the main one gets them."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    names = [name for name, _ in scorer.named_parameters()]  # a tied matrix counts once
    weights = accelerator.get_state_dict(scorer)
    return {name.removeprefix("model."): weights[name] for name in names if name in weights}


def checkpointing(policy: Any) -> None:
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()  # frozen embeddings would cut the graph below the adapters
