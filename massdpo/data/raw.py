"""Rows of anyone's preferences, wherever they lie: JSON Lines, what `datasets` reads from a disk, sets of the hub.

Only formats that hold nothing but data are read: JSON, Parquet, Arrow and CSV. No code that comes with a set is run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from massdpo.data.readers.interactions import BadRows
from massdpo.data.text import read_jsonl
from massdpo.errors import UserError

Row = tuple[str, dict[str, Any]]  # where it stands (for messages), and its fields
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "dev", "eval"), "test": ("test",)}
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv")
# What `datasets` raises of damaged files beside its own errors: it trusts that its JSON holds what it wrote.
DAMAGED = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)


def row_files(path: Path) -> list[Path]:
    """The files at `path`, whose content decides what `read_rows` gives.

    Raises:
        UserError: there is nothing, or no file that could hold rows.
    """
    if not path.exists():
        raise UserError(f"{path} cannot be read: No such file or directory")
    if path.is_file():
        return [path]
    files = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES)
    if not files:
        raise UserError(
            f"{path} holds no file of rows ({', '.join(SUFFIXES)}): give a JSONL file or a `datasets` folder"
        )
    return files


def read_rows(path: Path, subset: str | None, bad: BadRows) -> dict[str, Iterator[Row]]:
    """The rows at `path` by split; what has no name of a split is `train`.

    A folder is one written by `datasets.save_to_disk`, or one of data files as `datasets.load_dataset` takes it, where
    `subset` names one of several configurations.
    """
    files = row_files(path)
    if path.is_file() and path.suffix not in (".parquet", ".arrow"):
        return {"train": ((f"{path}:{number}", row) for number, row in read_jsonl(path, bad))}
    from datasets.exceptions import DatasetsError  # seconds to import, and only needed here

    try:
        for file in files:
            if file.suffix == ".arrow":
                _check_arrow(file)
        parts = _opened(path.resolve(), subset)
    except (*DAMAGED, DatasetsError) as error:
        raise _unreadable(path, error) from error
    known = {name: split for split, names in SPLIT_NAMES.items() for name in names}
    return {known.get(name, name): _numbered(path, name, part) for name, part in parts.items()}


def hub_folder(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub set's data files, fetched if the hub's cache does not hold them; offline, what it holds."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*(f"*{suffix}" for suffix in SUFFIXES), "README.md"]  # the card says which files are which split
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"dataset.hub_id={hub_id} (revision {revision or 'main'}) cannot be fetched ({reason}): go online once, "
            "check its name, or set dataset.path to a copy of it"
        ) from error


def _opened(path: Path, subset: str | None) -> dict[str, Any]:
    """Splits as `datasets` opens them, read as a stream: nothing is copied into its cache."""
    from datasets import DatasetDict, load_dataset_builder, load_from_disk
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    if path.is_file():
        builder = load_dataset_builder(path.suffix[1:], data_files=str(path))
    else:
        builder = load_dataset_builder(str(path), subset)
    if not isinstance(builder, Json | Parquet | Arrow | Csv):
        raise ValueError("its files are neither JSON, Parquet, Arrow nor CSV")
    return dict(builder.as_streaming_dataset())


def _check_arrow(file: Path) -> None:
    """Raises ValueError where offsets or texts are damaged: Arrow's memory is read as it lies, unchecked, by others."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_stream(source)  # what `datasets` writes
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
        reader.read_all().validate(full=True)


def _numbered(path: Path, name: str, part: Any) -> Iterator[Row]:
    from datasets.exceptions import DatasetsError

    rows, number = iter(part), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (*DAMAGED, DatasetsError) as error:
            raise _unreadable(path, error) from error
        number += 1
        yield f"{path} ({name}, row {number})", dict(row)


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{path} cannot be read by `datasets` ({reason}); give a JSONL file, or what save_to_disk wrote")
