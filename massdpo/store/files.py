"""Files that appear whole or not at all."""

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from massdpo.errors import UserError


def name_beside(path: Path) -> Path:
    """A hidden name in the same folder, for something unfinished."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place once written, or disappears on an error.

    A link is followed and stays. A device or pipe is yielded itself.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = name_beside(path)
    try:
        beside.touch(exist_ok=False)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def plain_yaml(text: str) -> Any:
    """The plain values of a YAML text from outside.

    Raises ValueError where it is not YAML or could fill the memory: with aliases, a few lines of which make gigabytes,
    more than 50 levels, or more than 1 MB.
    """
    depth = 0
    try:
        if len(text) > 1_000_000:
            raise ValueError("more than 1 MB")
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 50 or isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases or nesting")
        return yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def mapping_in(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The mapping that a file holds; empty if the file is missing or damaged, or holds something else."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines, each row written as it comes."""
    with replacing(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# How Rust (safetensors, tokenizers), NumPy and PyTorch say that a disk is full.
SAYS_FULL = re.compile(r"\(os error (\d+)\)|requested and \d+ written|inline_container")


@contextmanager
def writing(place: Path, remedy: str) -> Iterator[None]:
    """Report in one line (`place`, why, `remedy`) a full disk, or a folder that cannot be written, met inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if why := _why_not_written(error, place):
            raise UserError(f"{place} cannot be written ({why}): {remedy}") from error
        raise


def _why_not_written(error: Exception, place: Path) -> str | None:
    """The reason; None where the error is about something else, such as a file that cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        there, asked = Path(os.path.abspath(place)), Path(os.path.abspath(error.filename or "/dev/null"))
        ours = asked.is_relative_to(there) or there.is_relative_to(asked)
        return error.strerror if ours or error.errno in FULL else None
    if not (found := SAYS_FULL.search(str(error))):
        return None
    return os.strerror(int(found[1])) if found[1] else "a write was cut short"
