"""Files that appear whole or not at all, content keys, and a cache of folders that parallel jobs compute once.

A cached folder is built beside its place, checksummed, and renamed; a reader verifies the checksums, and a folder that
does not match them is told, set aside and built again.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from massdpo.errors import UserError

MANIFEST = "manifest.json"
UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}(\.old)?")  # how tempfile names what is made beside a place


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


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# How Rust (safetensors, tokenizers), NumPy and PyTorch tell that a disk takes no more.
TOLD_OTHERWISE = re.compile(r"\(os error (\d+)\)|requested and \d+ written|inline_container")


@contextmanager
def writing(place: Path, remedy: str) -> Iterator[None]:
    """Tell in one line (`place`, why, `remedy`) what a full disk or a folder that cannot be written raises inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if why := _why_not_written(error, place):
            raise UserError(f"{place} cannot be written ({why}): {remedy}") from error
        raise


def _why_not_written(error: Exception, place: Path) -> str | None:
    """None where the error is about something else, such as a file that cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        there, asked = os.path.abspath(place), os.path.abspath(error.filename or "/dev/null")
        ours = asked.startswith(there) or there.startswith(asked)
        return error.strerror if ours or error.errno in FULL else None
    if not (found := TOLD_OTHERWISE.search(str(error))):
        return None
    return os.strerror(int(found[1])) if found[1] else "a write was cut short"


def acquire(lock: FileLock, waiting: Callable[[], str]) -> None:
    """Take the lock, however long that takes; after a second, say what is waited for."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(waiting(), file=sys.stderr)
        lock.acquire()


class Cache:
    """Folders under `root`, each named by kind and content key."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def folder(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """The folder for `key`, built by `build(empty_folder)` if it is not there yet, once by jobs side by side."""
        place = self.path(kind, key)
        if not is_whole(place):
            with self.lock(kind, key):
                if not self.holds(kind, key):
                    self.build(kind, key, build)
        return place

    def build(self, kind: str, key: str, build: Callable[[Path], None]) -> None:
        """Build the folder for `key` anew; for who has the lock."""
        with writing(self.root, "free some room or set cache_dir"):
            build_folder(self.path(kind, key), build)

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Build the folder for `key` alone: others wait. The lock goes with its process, however that ends."""
        place = self.path(kind, key)
        with writing(self.root, "set cache_dir"):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{place}.lock")
            acquire(lock, lambda: f"another job computes {place}: waiting for it")
        try:
            remove_unfinished(place.parent, f"{key}.")
            yield
        finally:
            lock.release()

    def holds(self, kind: str, key: str) -> bool:
        """Is the folder there and whole? A damaged one is set aside; only who has the lock may ask."""
        place = self.path(kind, key)
        if place.is_dir() and not is_whole(place):
            set_aside(place)
        return place.is_dir()


def set_aside(place: Path) -> None:
    """Move a damaged folder out of the way, with a line that says so."""
    aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{place.name}.damaged."))
    os.replace(place, aside)
    print(f"warning: {place} is damaged; it was set aside as {aside.name} and is computed again", file=sys.stderr)


def remove_unfinished(folder: Path, prefix: str = "") -> None:
    """Remove what `replacing` and `build_folder` had begun here when their process was killed; for who has the lock."""
    for path in folder.glob(f".{prefix}*"):
        if not UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def build_folder(place: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder beside `place`, write its manifest, and put it in `place`'s stead."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    old = beside.with_name(f"{beside.name}.old")  # removed last: a rename is quick, removing is not
    try:
        build(beside)
        write_json(beside / MANIFEST, {name: file_digest(beside / name) for name in _files(beside)})
        beside.chmod(0o755)
        if place.exists():
            os.replace(place, old)
        os.replace(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
