"""Pretrained language models: found, checked and loaded with their tokenizers.

Each node of conf/model/ builds a `PretrainedModel`, a `PackagedModel` or a `TinyModel` (scratch.py); all `load` to a
model and its tokenizer. Weights are read from safetensors and GGUF only, and no code that comes with a model is run.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from massdpo.errors import UserError, one_line
from massdpo.model.gguf import converted, packaged
from massdpo.model.hub import hub_snapshot
from massdpo.store import Cache

Texts = Iterable[str] | Callable[[], Iterable[str]]
ADAPTER = "adapter_config.json"


class PretrainedModel:
    """A pretrained model and its tokenizer, from the Hugging Face hub, a folder or a GGUF file.

    Args:
        hub_id: `owner/name` on the hub; a saved adapter records it as its base.
        path: a folder (`save_pretrained`'s layout) or a GGUF file that holds the model instead; null: the hub, or its
            cache.
        revision: branch, tag or commit on the hub; null: main.
        dtype: of the weights, float32 or bfloat16.
    Raises `UserError` where the model cannot be found, is not a causal language model, or comes only in pickles.
    """

    def __init__(
        self, hub_id: str | None = None, path: str | None = None, revision: str | None = None, dtype: str = "float32"
    ):
        if not hub_id and not path:
            raise UserError("which pretrained model? Set model.path=DIR | FILE.gguf or model.hub_id=OWNER/NAME")
        self.hub_id = hub_id
        self.path = path
        self.revision = revision
        if dtype not in ("float32", "bfloat16"):  # it may stand in a saved adapter's base.json
            raise UserError(f"model.dtype={dtype}: use float32 or bfloat16")
        self.dtype = dtype

    def load(
        self, texts: Texts, seed: int, cache: Cache, texts_key: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, on the CPU; neither depends on the training texts or the seed."""
        if self.path is None or not self.path.endswith(".gguf"):
            return fitting(self.model(), load_tokenizer(self.folder()))
        file = Path(self.path).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"model.path: there is no file {file}")
        folder = converted([file], self.dtype, cache)
        return fitting(load_model(folder, self.dtype), load_tokenizer(folder))

    def model(self) -> PreTrainedModel:
        """The hub's or the folder's model; a saved adapter records its base by the path and commit set here."""
        folder = self.folder()
        model = load_model(folder, self.dtype)
        model.name_or_path = str(folder) if self.path else self.hub_id
        model.config._commit_hash = None if self.path else folder.name
        return model

    def folder(self) -> Path:
        """Where the model's files lie, fetched from the hub if they are not there yet."""
        if self.path is None:
            return hub_snapshot(str(self.hub_id), self.revision)
        folder = Path(self.path).expanduser().resolve()
        if (folder / ADAPTER).is_file():
            raise UserError(f"model.path: {folder} holds an adapter, not a whole model: merge it first")
        return folder


class PackagedModel:
    """A pretrained model and its tokenizer, from a GGUF file that installed Python packages carry.

    Args:
        packages: as pip names them, each with its version and a part of the file, in order.
        terms: of use, printed when the file is first read and written into the policy's card.
        dtype: of the weights, float32 or bfloat16.
    Raises `UserError` where a package is missing or damaged.
    """

    def __init__(self, packages: Sequence[str], terms: str, dtype: str = "float32"):
        self.packages = packages
        self.terms = terms
        self.dtype = dtype

    def load(
        self, texts: Texts, seed: int, cache: Cache, texts_key: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, on the CPU; neither depends on the training texts or the seed."""
        folder = converted(packaged(self.packages), self.dtype, cache, f"; terms: {self.terms}")
        return fitting(load_model(folder, self.dtype), load_tokenizer(folder))


def fitting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The two, checked to belong together: every id that a text can produce has a row in the embedding.

    Special tokens that are never written here may lie beyond it, as an image's does in the text models of Gemma 3.

    Raises:
        UserError: another token has no row there; the message names it.
    """
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.items()
    unwritten = {index for index, token in added if token.special and token.content not in template} - set(ends)
    if beyond := sorted(index for index in set(tokenizer.get_vocab().values()) - unwritten if index >= rows):
        raise UserError(
            f"the tokenizer's token {tokenizer.convert_ids_to_tokens(beyond[0])!r} has the id {beyond[0]}, but the "
            f"model's embedding has {rows} rows: resize it (resize_token_embeddings), or use the model's own tokenizer"
        )
    return model, tokenizer


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, and the noise on routers to experts: policy and reference must agree where
    their weights do."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, module.config) if isinstance(module, PreTrainedModel) else (module,):
            for name, value in list(vars(holder).items()):
                if name.endswith(("drop", "dropout", "jitter_noise")) and isinstance(value, float):
                    setattr(holder, name, 0.0)


def attention(config: PreTrainedConfig) -> str | None:
    """What transformers prefers for the family: SDPA, or eager where there is none.

    Eager where attention's scores are capped (Gemma 2): SDPA cannot, and some versions then drop the cap.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gemma2" else None


def warn_of_long_rope(config: PreTrainedConfig, max_length: int) -> None:
    """Warn where rows may be so long that Phi-3's long rope makes a batch's log-probs depend on its longest row."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    near = rope.get("original_max_position_embeddings", max_length)
    if rope.get("rope_type") == "longrope" and max_length > near:
        print(
            f"warning: a row of more than {near} tokens changes how this model rotates the positions of its whole "
            f"batch, so log-probs depend on what else is in the batch: trainer.max_length={near} avoids that",
            file=sys.stderr,
        )


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The causal language model that the folder holds, without the adapter that may lie beside it."""
    _check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_sizes(folder, config)
        loader: Any = AutoModelForCausalLM
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention(config),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            adapter_kwargs={"subfolder": "none"},  # where there is none: it would be read in the base's dtype
        )
    except Exception as error:  # transformers may raise anything where a folder is damaged or malicious
        raise UserError(f"{folder} cannot be loaded as a causal language model: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks weights of a causal language model: {', '.join(missing[:3])}")
    disable_dropout(model)
    model.name_or_path = ""  # the folder may be temporary; only the caller knows
    return model


def _check_sizes(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that the folder's weights cannot fill: building it could exhaust memory or time."""
    files = list(folder.glob("*.safetensors"))
    tensors, size = 0, sum(file.stat().st_size for file in files)
    for file in files:
        with safe_open(file, "pt") as weights:
            tensors += len(list(weights.keys()))
    if (layers := config.get_text_config().num_hidden_layers) > tensors:
        raise ValueError(f"config.json says {layers} layers, but there are only {tensors} weight tensors")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if (count := empty.num_parameters()) > 2 * size:  # 4 bits each, where they are quantised
        raise ValueError(f"config.json says {count} weights, but the files hold only {size} bytes")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"model.path: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model's folder: it has no config.json (which save_pretrained writes)")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "none"
        raise UserError(f"{folder} has no weights in *.safetensors ({found}): save it with save_pretrained first")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("")
    except Exception as error:  # as above
        raise UserError(f"{folder} holds no tokenizer that can be loaded: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is written in Python, and only one with a tokenizer.json can "
            "be used: choose another model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token would do: padding is masked everywhere
    return tokenizer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU's random numbers come from `seed`; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        yield


def as_plain(node: Mapping[str, Any]) -> dict[str, Any]:
    """A config node as plain dictionaries and lists."""
    return OmegaConf.to_object(node) if isinstance(node, DictConfig) else dict(node)  # type: ignore[return-value]
