"""Policies: a model with or without a LoRA adapter, written to a folder that `transformers` loads, and read back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from massdpo.errors import UserError, one_line
from massdpo.model.load import (
    ADAPTER,
    PretrainedModel,
    as_plain,
    disable_dropout,
    fitting,
    load_model,
    load_tokenizer,
    seeded,
)
from massdpo.model.quantize import bits_of, quantized
from massdpo.store import digest, keyed_seed, write_json, write_text

if TYPE_CHECKING:
    from peft import PeftModel  # at run time only where there is an adapter: importing it takes seconds

BASE = "base.json"  # next to an adapter: dtype and bits of its base's weights, which the adapter's config lacks


def add_adapter(model: PreTrainedModel, adapter: Mapping[str, Any], seed: int) -> "PeftModel":
    """Freeze `model` and put a LoRA adapter (Hu et al. 2021) on it, trained in float32, that changes nothing yet.

    `adapter` has `r`, `alpha` and `targets` (`all-linear` or a list of module names), and may have the bits that the
    frozen weights are put into (`quantize`); `seed` draws the A matrices.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    options = as_plain(adapter)
    if options.get("quantize") and not bits_of(model):
        model = quantized(model, options["quantize"])
    config = LoraConfig(
        r=options["r"],
        lora_alpha=options["alpha"],
        target_modules=options["targets"],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    try:
        with seeded(keyed_seed(seed, "adapter")):
            adapted = get_peft_model(model, config, revision=getattr(model.config, "_commit_hash", None))
    except ValueError as error:
        raise UserError(f"trainer.adapter: {one_line(error)}") from error
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if tied and any(isinstance(module, BaseTunerLayer) for module in ends):
        raise UserError(
            f"trainer.adapter.targets={options['targets']}: input and output share one matrix in this model, and "
            "merging would change both: leave the embedding and the output matrix out"
        )
    return adapted


def merge_adapter(model: "PeftModel") -> PreTrainedModel:
    """The plain model with the adapter's update added to its weights, in place.

    Raises:
        UserError: they are quantised.
    """
    if bits := bits_of(model.get_base_model()):
        raise UserError(
            f"this adapter was trained on weights in {bits}, which cannot absorb it without rounding most of it away: "
            "use it together with its base"
        )
    merged = model.merge_and_unload()
    merged.name_or_path, merged.config._commit_hash = "", None  # the weights are no longer the hub's or a folder's
    return merged


def weights_digest(model: nn.Module) -> str:
    """A key of all parameters' and buffers' names and values, adapters included, one tensor in memory at a time."""
    named = sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0])
    return digest([[name, digest(weight)] for name, weight in named])


def save_policy(
    model: "PreTrainedModel | PeftModel",
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an ordinary Hugging Face folder: safetensors, config, tokenizer and, as README.md, the model's `card`.

    An adapter is written alone if its base can be loaded again (from the hub or a folder), else with its base.
    `weights` are the model's, by name, where it holds only a shard of them.
    """
    weights = model.state_dict() if weights is None else weights
    base: Any = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    base.generation_config.eos_token_id = tokenizer.eos_token_id  # a chat template may end turns with another
    if not isinstance(model, PreTrainedModel):
        if base.name_or_path:
            bits = {"quantize": bits_of(base)} if bits_of(base) else {}
            write_json(folder / BASE, {"dtype": str(base.config.dtype).removeprefix("torch.")} | bits)
        else:
            of_base = {
                name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight
                for name, weight in weights.items()
                if ".lora_" not in name
            }
            base.save_pretrained(folder, state_dict=of_base)
        # save_embedding_layers="auto" would ask the hub whether they changed
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
    else:
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if card is not None:
        write_text(folder / "README.md", card)  # peft has written one of its own there


def load_policy(folder: Path) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]":
    """A policy that `save_policy` wrote, in the type that its weights had; an adapter is ready to be trained further.

    Raises `UserError` where the folder holds no such policy, or where an adapter's base cannot be found.
    """
    tokenizer = load_tokenizer(folder)
    if not (folder / ADAPTER).is_file():
        return fitting(load_model(folder, "auto"), tokenizer)
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} has an adapter's config but no adapter_model.safetensors")
    adapter = read_json(folder / ADAPTER)
    if adapter.get("peft_type") != "LORA" or adapter.get("megatron_config"):  # peft would import code for the latter
        raise UserError(f"{folder} holds an adapter of another kind than task=train writes: only plain LoRA works")
    from peft import PeftModel, get_peft_model_state_dict

    base = load_model(folder, "auto") if (folder / "config.json").is_file() else _load_base(folder)
    fitting(base, tokenizer)
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            sizes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  no dict
        ranks = adapter["r"], *(adapter.get("rank_pattern") or {}).values()
        if max(ranks) > max(map(max, sizes.values())):
            raise ValueError("its rank is higher than its weights have rows")
        adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        missing = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - sizes.keys()
    except Exception as error:  # peft may raise anything where a folder is damaged or malicious
        raise UserError(f"{folder} holds an adapter that cannot be loaded: {one_line(error)}") from error
    if missing:
        raise UserError(f"{folder} holds an adapter that lacks weights: {', '.join(sorted(missing)[:3])}")
    disable_dropout(adapted)
    return adapted, tokenizer


def _load_base(folder: Path) -> PreTrainedModel:
    """The model that the adapter in `folder` was trained on, from where it was then."""
    adapter = read_json(folder / ADAPTER)
    name = str(adapter.get("base_model_name_or_path"))
    path = name if Path(name).is_absolute() else None
    if path and not Path(path).is_dir():
        raise UserError(f"{folder} holds an adapter, but the model that it belongs to is no longer in {path}")
    base = read_json(folder / BASE)
    model = PretrainedModel(name, path, adapter.get("revision"), base.get("dtype", "")).model()
    return quantized(model, base["quantize"]) if base.get("quantize") else model


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it is not a JSON object")
    return found
