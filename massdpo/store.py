"""Files that appear whole or not at all, content keys, and a cache of folders that parallel jobs compute once.

A cached folder is built beside its place, checksummed, and renamed; a reader verifies the checksums, and a folder that
does not match them is told, set aside and built again.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from massdpo.errors import UserError

MANIFEST = "manifest.json"


def digest(*parts: Any) -> str:
    """A hex key of the content: strings, bytes, numbers, json-able structures, tensors and files (their bytes)."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        _feed(state, part)
    return state.hexdigest()


def keyed_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on the parts alone, so that processes, workers and resumed runs agree."""
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place once written, or disappears on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.chmod(0o644)  # mkstemp makes files that only their owner can read
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Cache:
    """Folders under `root`, each named by kind and content key."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def folder(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """The folder for `key`, built by `build(empty_folder)` if it is not there yet.

        Jobs side by side build it once: the others wait, and take over if it dies (a lock goes with its process).
        """
        place = self.path(kind, key)
        if self.holds(kind, key):
            return place
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):
                if not self.holds(kind, key):
                    build_folder(place, build)
        except OSError as error:
            raise UserError(
                f"the cache {self.root} cannot be written ({error.strerror or error}): free some room or set cache_dir"
            ) from error
        return place

    def holds(self, kind: str, key: str) -> bool:
        """Is the folder there and whole? A damaged one is set aside, with a line that says so."""
        place = self.path(kind, key)
        if not place.is_dir():
            return False
        if is_whole(place):
            return True
        aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{key}.damaged."))
        os.replace(place, aside)
        print(f"warning: {place} is damaged; it was set aside as {aside.name} and is computed again", file=sys.stderr)
        return False


def build_folder(place: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder beside `place`, write its manifest, and put it in `place`'s stead."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        build(beside)
        write_json(beside / MANIFEST, {name: file_digest(beside / name) for name in _files(beside)})
        beside.chmod(0o755)
        if place.exists():
            shutil.rmtree(place)
        os.replace(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_whole(place: Path) -> bool:
    """Does every file of the folder match its manifest, with none missing and none added?"""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        return manifest == {name: file_digest(place / name) for name in _files(place)}
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> list[str]:
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)
