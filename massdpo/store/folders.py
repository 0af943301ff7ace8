"""Folders that appear whole or not at all, and a cache of them that parallel jobs compute once.

A cached folder is built beside its place, checksummed, and renamed; readers verify the checksums, and a folder that
does not match them is reported, moved aside and built again.
"""

import glob
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from massdpo.errors import UserError
from massdpo.store.content import file_digest
from massdpo.store.files import name_beside, write_json, writing

MANIFEST = "manifest.json"
UNFINISHED = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<old>\.old)?")  # the names that `name_beside` makes


@contextmanager
def locked(
    file: Path, remedy: str, waiting: Callable[[], str], meanwhile: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the lock `file`, however long it takes to get it. It ends with its process, however that ends.

    After a second, print what is waited for, unless this job itself has it; `meanwhile` is called every few seconds.

    Raises:
        UserError: the lock cannot be written; `remedy` says what would help.
    """
    # torchrun starts the processes of one job side by side
    job = f"{socket.gethostname()} {os.getppid() if 'RANK' in os.environ else os.getpid()}"
    lock, timeout = FileLock(file), 1
    with writing(file.parent, remedy):
        file.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=timeout)
            except Timeout:
                if timeout == 1 and file.read_text(encoding="utf-8") != job:
                    print(waiting(), file=sys.stderr)
                timeout = 5
                meanwhile()
        with suppress(OSError):  # some systems do not let a locked file be written
            file.write_text(job, encoding="utf-8")
    try:
        yield
    finally:
        lock.release()


class Cache:
    """Folders under `root`, each named by kind and content key.

    With `force`, only those are believed that were computed through this object.
    """

    def __init__(self, root: Path, force: bool = False):
        self.root = root
        self.force = force
        self._renewed: set[Path] = set()

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def checkpoints(self, kind: str, key: str) -> Path:
        """Where a `build` that was stopped goes on from."""
        return self.root / kind / f"{key}.checkpoints"

    def folder(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """The folder for `key`; if it is not there yet, one of the jobs that ask builds it by `build(empty_folder)`."""
        if not self.believes(kind, key):
            with self.lock(kind, key):
                if not self.holds(kind, key):
                    self.build(kind, key, build)
        return self.path(kind, key)

    def build(self, kind: str, key: str, build: Callable[[Path], None]) -> None:
        """Build the folder for `key` anew; only the holder of the lock may."""
        with writing(self.root, "free some room or set cache_dir"):
            build_folder(self.path(kind, key), build)
        self._renewed.add(self.path(kind, key))
        shutil.rmtree(self.checkpoints(kind, key), ignore_errors=True)

    @contextmanager
    def lock(self, kind: str, key: str, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Let others wait while the folder for `key` is built. The lock ends with its process, however that ends."""
        place = self.path(kind, key)
        waiting = f"another job is computing {place}: waiting for it"
        with locked(Path(f"{place}.lock"), "set cache_dir", lambda: waiting, meanwhile):
            remove_unfinished(place.parent, f"{key}.")
            yield

    def believes(self, kind: str, key: str) -> bool:
        """Is the folder there and whole, and need not be computed again?"""
        place = self.path(kind, key)
        return not (self.force and place not in self._renewed) and is_whole(place)

    def holds(self, kind: str, key: str) -> bool:
        """As `believes`, but moves a damaged folder aside; only the holder of the lock may ask."""
        place = self.path(kind, key)
        if place.is_dir() and not is_whole(place):
            set_aside(place)
        return self.believes(kind, key)


def set_aside(place: Path) -> None:
    """Move a damaged folder out of the way, and say so."""
    aside = place.with_name(f"{place.name}.damaged.{secrets.token_hex(4)}")
    os.replace(place, aside)
    print(f"warning: {place} is damaged: moved aside as {aside.name}, to be computed again", file=sys.stderr)


def remove_unfinished(folder: Path, prefix: str = "") -> None:
    """Remove what `replacing` and `build_folder` left unfinished when their process died; for the lock's holder."""
    for path in folder.glob(f".{glob.escape(prefix)}*"):
        if not (found := UNFINISHED.fullmatch(path.name)):
            continue
        if found["old"] and not (place := folder / found["name"]).exists():
            os.replace(path, place)  # the kill came between the two renames of `build_folder`
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def build_folder(place: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder beside `place`, write its manifest, and move it to `place`; links are followed.

    Its files get the umask's mode, whatever wrote them: safetensors would be readable by their owner alone.
    """
    place = place.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = name_beside(place)
    old = beside.with_name(f"{beside.name}.old")  # removed last: renaming is quick, removing is not
    try:
        beside.mkdir()
        build(beside)
        write_json(beside / MANIFEST, {name: file_digest(beside / name) for name in _files(beside)})
        for name in _files(beside):
            (beside / name).chmod((beside / MANIFEST).stat().st_mode & 0o777)
        if place.exists():
            os.replace(place, old)
        os.replace(beside, place)
    finally:
        if old.exists() and not place.exists():  # stopped between the two renames
            os.replace(old, place)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


_COMPARED: dict[str, dict[str, tuple[int, int]]] = {}  # folders found whole, with the sizes and times of their files


def is_whole(place: Path) -> bool:
    """Does every file of the folder match its manifest, with none missing and none added?

    A process compares checksums once, as long as sizes and times stay the same. Raises `UserError` where a file is
    there but cannot be read, which is not damage.
    """
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        seen = {name: _size_and_time(place / name) for name in (*_files(place), MANIFEST)}
        if _COMPARED.get(os.path.abspath(place)) == seen:
            return True
        whole: bool = manifest == {name: file_digest(place / name) for name in seen if name != MANIFEST}
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return False
    except OSError as error:
        raise UserError(
            f"{error.filename or place} cannot be read ({error.strerror}): ask its owner for permission"
        ) from error
    if whole:
        _COMPARED[os.path.abspath(place)] = seen
    return whole


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _files(folder: Path) -> list[str]:
    """But for hidden ones: macOS leaves .DS_Store in any folder that is looked at."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(name for path in files if (name := str(path.relative_to(folder))) != MANIFEST)
