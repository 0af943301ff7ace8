"""Keys and seeds that depend on content alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Any) -> str:
    """A hex key of contents: strings, bytes, numbers, json-able structures, tensors and files (their bytes)."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        _feed(state, part)
    return state.hexdigest()


def keyed_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on the parts alone, so that processes, workers and resumed runs agree on it."""
    return int(digest(*parts), 16) % (1 << 63)


def _feed(state: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        cpu = part.detach().cpu().contiguous()
        state.update(f"tensor {cpu.dtype} {tuple(cpu.shape)}\0".encode())
        state.update(cpu.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(part, Path):
        state.update(b"file\0")
        state.update(file_digest(part).encode())
    elif isinstance(part, bytes):
        state.update(f"bytes {len(part)}\0".encode() + part)
    else:
        text = json.dumps(part, sort_keys=True, ensure_ascii=False)
        state.update(f"json {len(text)}\0{text}".encode())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
