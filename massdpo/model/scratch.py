"""Models from scratch: a family's own classes with random weights, and a tokenizer learned from the training texts."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from massdpo.errors import UserError, one_line
from massdpo.model.load import Texts, as_plain, attention, disable_dropout, seeded
from massdpo.store import Cache, digest, keyed_seed, write_json

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
TOKENIZER_BYTES = 8_000_000  # from the start of the training texts: more would hardly change a few thousand merges


class TinyModel:
    """A family's own `transformers` classes with random weights, and a byte-level BPE learned from the training split.

    Args:
        config: `model_type` and that family's options, as `AutoConfig.for_model` takes them; the vocabulary's size and
            the special tokens' ids come from the tokenizer.
        vocab_size: the most tokens that the tokenizer may have, at least 259 (the bytes and three special tokens); a
            small corpus yields fewer.
    Raises `UserError` where the family or one of its options does not exist.
    """

    def __init__(self, config: Mapping[str, Any], vocab_size: int):
        self.options = as_plain(config)
        self.vocab_size = vocab_size
        if vocab_size < 256 + len(SPECIAL):
            raise UserError(f"model.vocab_size={vocab_size}: a byte-level vocabulary has at least {256 + len(SPECIAL)}")
        model_type = str(self.options.get("model_type"))
        try:
            known = AutoConfig.for_model(model_type).to_dict()
        except (ValueError, TypeError) as error:
            raise UserError(f"model.config.model_type={model_type}: no such family in transformers") from error
        # transformers accepts any key, so a misspelt one would silently change nothing
        if unknown := sorted(self.options.keys() - known.keys()):
            raise UserError(f"model.config: {model_type} has no option {', '.join(unknown)}")

    def load(
        self, texts: Texts, seed: int, cache: Cache, texts_key: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with weights drawn from `seed` (float32, on the CPU) and the tokenizer learned from `texts`."""
        tokenizer = self.tokenizer(texts, cache, texts_key)
        ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL}
        try:
            config = AutoConfig.for_model(**{**self.options, **ids, "vocab_size": len(tokenizer)})
            with seeded(keyed_seed(seed, "weights")):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, attn_implementation=attention(config), dtype=torch.float32, trust_remote_code=False
                )
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(f"model.config: {one_line(error)}") from error
        disable_dropout(model)
        return model, tokenizer

    def tokenizer(self, texts: Texts, cache: Cache, texts_key: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer for `texts`, learned once: it is cached by what it is learned from.

        `texts_key` names their content, so that a tokenizer learned before is found without reading them.
        """
        if texts_key is None:
            texts = list(texts() if callable(texts) else texts)
            texts_key = digest(texts)

        def build(folder: Path) -> None:
            used, left_out = _first_bytes(texts() if callable(texts) else texts, TOKENIZER_BYTES)
            if not used:
                raise UserError("the training split is empty: there is no text to learn a tokenizer from")
            learn_tokenizer(used, self.vocab_size).save_pretrained(folder)
            write_json(folder / "learned_from.json", {"texts": len(used), "texts_left_out": left_out})
            if left_out:
                total = f"{len(used) + left_out} training texts"
                print(f"note: the tokenizer is learned from the first {len(used)} of {total}", file=sys.stderr)

        how = tokenizers.__version__, SPECIAL, TOKENIZER_BYTES, self.vocab_size
        key = digest("byte-level BPE", how, texts_key)
        return PreTrainedTokenizerFast.from_pretrained(cache.folder("tokenizer", key, build))


def learn_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; any text survives encoding and decoding; BOS comes first."""
    bpe = Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **SPECIAL)


def _first_bytes(texts: Iterable[str], limit: int) -> tuple[list[str], int]:
    """The first texts, up to `limit` bytes, and how many were left out."""
    used: list[str] = []
    left_out = size = 0
    for text in texts:
        size += len(text.encode())
        if size <= limit or not used:
            used.append(text)
        else:
            left_out += 1
    return used, left_out
