"""The frozen weights below an adapter in 4 or 8 bits, by bitsandbytes (QLoRA, Dettmers et al. 2023)."""

from importlib.util import find_spec
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from massdpo.config.messages import comes_with
from massdpo.errors import UserError
from massdpo.model.load import disable_dropout


def quantized(model: PreTrainedModel, bits: str) -> PreTrainedModel:
    """A frozen copy of `model` whose linear layers, except the output matrix, have `bits`: `4bit` (NF4) or `8bit`.

    It is on this process's device and stays there. Everything else in it is float32; `config.dtype` stays that of the
    original weights.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    from peft import prepare_model_for_kbit_training  # seconds

    if not find_spec("bitsandbytes"):
        raise UserError(f"weights in {bits} need bitsandbytes, which {comes_with('quantized')}")

    options = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
    )
    copy: Any = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        quantization_config=options,
        device_map={"": PartialState().device},
    )
    disable_dropout(copy)
    for module in copy.modules():  # some CPUs would round more in evaluation than in training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    copy.name_or_path, copy.generation_config = model.name_or_path, model.generation_config
    copy.config._commit_hash = model.config._commit_hash
    prepared: PreTrainedModel = prepare_model_for_kbit_training(copy, use_gradient_checkpointing=False)
    return prepared


def bits_of(model: nn.Module) -> str | None:
    """The `bits` that `quantized` was called with; None if it was not."""
    return next((bits for bits in ("4bit", "8bit") if getattr(model, f"is_loaded_in_{bits}", False)), None)
