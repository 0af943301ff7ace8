"""Language models to train: from scratch in a family's own classes, or pretrained.

Each node of conf/model/ builds a `TinyModel` or a `PretrainedModel`; both `load` to a model and its tokenizer. Weights
are read from safetensors only, and no code that comes with a model is ever run.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from massdpo.errors import UserError
from massdpo.store import Cache, digest, keyed_seed, write_json

Texts = Iterable[str] | Callable[[], Iterable[str]]
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
TOKENIZER_BYTES = 8_000_000  # of the training texts, from the start: more would hardly change some thousand merges
ADAPTER = "adapter_config.json"
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]  # no pickles, no code


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
        self.options = plain(config)
        self.vocab_size = vocab_size
        if vocab_size < 256 + len(SPECIAL):
            raise UserError(f"model.vocab_size={vocab_size}: a byte-level vocabulary has at least {256 + len(SPECIAL)}")
        model_type = str(self.options.get("model_type"))
        try:
            known = AutoConfig.for_model(model_type).to_dict()
        except (ValueError, TypeError) as error:
            raise UserError(f"model.config.model_type={model_type}: no such family in transformers") from error
        # transformers takes any key without complaint, so that a misspelt one would change nothing
        if unknown := sorted(self.options.keys() - known.keys()):
            raise UserError(f"model.config: {model_type} has no option {', '.join(unknown)}")

    def identity(self) -> dict[str, Any]:
        """With the seed and the training texts, what determines the start weights."""
        return {"config": self.options, "vocab_size": self.vocab_size}

    def load(
        self, texts: Texts, seed: int, cache: Cache, texts_key: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with weights drawn from `seed` (float32, on the CPU) and the tokenizer learned from `texts`."""
        tokenizer = self.tokenizer(texts, cache, texts_key)
        with seeded(keyed_seed(seed, "weights")):
            model = _from_config(self.model_config(tokenizer))
        disable_dropout(model)
        return model, tokenizer

    def tokenizer(self, texts: Texts, cache: Cache, texts_key: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer for `texts`, learned once: it is cached by what it is learned from.

        `texts_key` names their content, so that a tokenizer that was learned before is found without reading them.
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

    def model_config(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL}
        options = {**self.options, **ids, "vocab_size": len(tokenizer)}
        try:
            return AutoConfig.for_model(**options)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(f"model.config: {one_line(error)}") from error


def learn_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; any text survives encoding and decoding, and BOS opens it."""
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


class PretrainedModel:
    """A pretrained model and its tokenizer, from the Hugging Face hub or from a folder.

    Args:
        hub_id: `owner/name` on the hub; also what a saved adapter names as its base.
        path: a folder that holds the model instead (`save_pretrained`'s layout); null: the hub, or its cache.
        revision: branch, tag or commit on the hub; null: main.
        dtype: of the weights, float32 or bfloat16.
    Raises `UserError` where the model cannot be had, is not a causal language model, or comes only in pickles.
    """

    def __init__(self, hub_id: str, path: str | None = None, revision: str | None = None, dtype: str = "float32"):
        self.hub_id = hub_id
        self.path = path
        self.revision = revision
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype={dtype}: float32 or bfloat16")
        self.dtype = dtype

    def identity(self) -> dict[str, Any]:
        """What determines the start weights: the hub's commit, or the content of the folder's files."""
        folder = self.folder()
        if self.path is None:
            return {"hub_id": self.hub_id, "commit": folder.name, "dtype": self.dtype}
        files = sorted(file for pattern in ("*.safetensors", "*.json") for file in folder.glob(pattern))
        return {"files": {file.name: digest(file) for file in files}, "dtype": self.dtype}

    def load(
        self, texts: Texts, seed: int, cache: Cache, texts_key: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer; neither depends on the training texts or the seed."""
        return self.model(), load_tokenizer(self.folder())

    def model(self) -> PreTrainedModel:
        """The model alone, on the CPU; a saved adapter names its base by the `name_or_path` and the commit set here."""
        folder = self.folder()
        model = load_model(folder, getattr(torch, self.dtype))
        model.name_or_path = self.hub_id if self.path is None else str(folder)
        model.config._commit_hash = folder.name if self.path is None else None
        return model

    def folder(self) -> Path:
        """Where the model's files lie, fetched from the hub if they are not there yet."""
        if self.path is None:
            return _fetch(self.hub_id, self.revision)
        folder = Path(self.path).expanduser().resolve()
        _check_folder(folder)
        if (folder / ADAPTER).is_file():
            raise UserError(f"model.path: {folder} holds an adapter; a model to start from is whole: merge it first")
        return folder


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: policy and reference must agree where their weights do."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
        if isinstance(module, PreTrainedModel):
            _zero_dropout(module.config)


def _zero_dropout(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(holder, name, 0.0)


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=_attention(config), dtype=torch.float32, trust_remote_code=False
        )
    except ValueError as error:
        raise UserError(f"model.config: {one_line(error)}") from error


def _attention(config: PreTrainedConfig) -> str:
    """SDPA, unless the model caps its attention scores (Gemma 2): SDPA cannot, and some versions then drop it."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gemma2" else "sdpa"


def load_model(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The causal language model that the folder holds, without the adapter that may lie beside it."""
    _check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loader: Any = AutoModelForCausalLM
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            adapter_kwargs={"subfolder": "none"},  # looks where there is none: it would be read in the base's type
        )
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded as a causal language model: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks weights of a causal language model: {', '.join(missing[:3])}")
    disable_dropout(model)
    model.name_or_path = ""  # the folder may go; who calls knows whether it is there to stay
    return model


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"model.path: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model's folder: it has no config.json (what save_pretrained writes)")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "none"
        raise UserError(f"{folder} has no weights in *.safetensors ({found}): save it with save_pretrained first")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder} holds no tokenizer that can be loaded: {one_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token would do: padding is masked everywhere
    return tokenizer


def _fetch(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub model's snapshot in the hub's cache; offline, what the cache has."""
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise UserError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id} and put your access token into "
            "the variable HF_TOKEN, or set model.path=DIR to a folder that holds it"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {hub_id} (or it is private and HF_TOKEN holds no token for it)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{hub_id} is not in the cache {constants.HF_HUB_CACHE} and the hub cannot be reached: go online once, or "
            "set model.path=DIR to a folder that holds it"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{hub_id} cannot be fetched from the hub: {one_line(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{hub_id} has no weights in *.safetensors in {folder}: where the hub has them, go online once to complete "
            "that cache, or set model.path=DIR to a folder that holds the model"
        )
    return folder


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU's random numbers come from `seed`; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        yield


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


def plain(node: Mapping[str, Any]) -> dict[str, Any]:
    """A config node as plain dictionaries and lists."""
    return OmegaConf.to_object(node) if isinstance(node, DictConfig) else dict(node)  # type: ignore[return-value]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
