"""From a dataset's config node to splits: fetched if needed, prepared once, cached by content, read from disk."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from omegaconf import OmegaConf

from massdpo.config import check_dataset, instantiate
from massdpo.data.containers import unusual_separators
from massdpo.data.download import fetch
from massdpo.data.raw import SPLITS
from massdpo.data.schema import Splits
from massdpo.data.stored import StoredExamples, Subset
from massdpo.store import MANIFEST, Cache, digest, keyed_seed, package_code, target_code, write_json

# Entries of the report that are shown whenever the data is used.
SHOWN = {
    "equal_times": "equal times",
    "rating_is_ignored": "a column of ratings is ignored",
    "separator": "columns are separated (dataset.separator) by",
}

T = TypeVar("T")


def prepare(dataset: Mapping[str, Any], cache: Cache) -> Splits:
    """The splits of a dataset node (`_target_`, its options, `name`, `terms`, `limit_train|val|test`).

    The class that it names has `files()`, the raw files that it reads, and `load()`, which makes the splits.

    Raises:
        UserError: from the dataset's own reader, from the download, or an option with a value that is not allowed.
    """
    source, node, limits, name, terms = _source_of(dataset, cache)
    options = {key: value for key, value in node.items() if key != "raw_dir"}
    key = digest(package_code("data", "store"), target_code(node), options, *_named(source.files()))

    def build(folder: Path) -> None:
        if terms:
            print(f"{name or node['_target_']}: {terms}", file=sys.stderr)
        splits = _loaded(source, node)
        for split in SPLITS:
            StoredExamples.written(getattr(splits, split), folder, split)
        write_json(folder / "report.json", splits.report)
        write_json(folder / "catalogue.json", splits.catalogue)

    folder = cache.folder("prepared", key, build)
    train, val, test = (StoredExamples(folder, split) for split in SPLITS)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    catalogue = tuple(json.loads((folder / "catalogue.json").read_text(encoding="utf-8")))
    for line in _notes(name, report):
        print(line, file=sys.stderr)
    content = digest((folder / MANIFEST).read_text(encoding="utf-8"))
    return _limit(Splits(train, val, test, report, content, catalogue), limits, node)


def _named(files: list[Path]) -> list[str | Path]:
    """Names and contents: a name may say which split a file belongs to and how to read it."""
    whole = [os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(file) for file in whole]) if whole else ""
    return [*(os.path.relpath(file, root) for file in whole), *files]


def read(dataset: Mapping[str, Any], cache: Cache) -> Splits:
    """What `prepare` returns, for a quick look: read afresh, rows made on demand, nothing cached, no digest."""
    source, node, limits, name, _ = _source_of(dataset, cache)
    splits = _loaded(source, node)
    for line in _notes(name, splits.report):
        print(line, file=sys.stderr)
    return _limit(splits, limits, node)


def _source_of(dataset: Mapping[str, Any], cache: Cache) -> tuple[Any, dict[str, Any], dict[str, Any], str, str | None]:
    """The reader that a dataset node describes, the reader's options, the limits, the name and the terms."""
    node: Any = OmegaConf.to_container(OmegaConf.create(dict(dataset)), resolve=True)
    check_dataset(node)
    limits = {split: node.pop(f"limit_{split}", None) for split in SPLITS}
    name, terms = node.pop("name", ""), node.pop("terms", None)
    node.pop("long_rows", None)  # for the tokeniser
    if "raw_dir" in node and node["raw_dir"] is None:
        node["raw_dir"] = str(fetch(name, cache))
    return instantiate(node, _convert_="all"), node, limits, name, terms


def _loaded(source: Any, node: Mapping[str, Any]) -> Splits:
    splits: Splits = source.load()
    is_open = node.get("separator", "") is None  # the reader has this option, and it is not set
    if is_open and (found := unusual_separators(source.files(), node.get("encoding", "utf-8"))):
        splits.report["separator"] = ", ".join(map(repr, found))
    return splits


def _notes(name: str, report: dict[str, Any]) -> list[str]:
    """What a user should know about the data, whether it is prepared now or was found in the cache."""
    notes = [f"note: {name}: {split} is {report[f'{split}_is']}" for split in SPLITS if f"{split}_is" in report]
    notes += [f"note: {name}: {text}: {report[key]}" for key, text in SHOWN.items() if key in report]
    if count := report.get("bad_rows_skipped"):
        notes.append(f"warning: {name}: {count} rows skipped, the first: {report['first_bad_row']}")
    return notes + [f"note: {name}: {note}" for note in report.get("notes", [])]


def _limit(splits: Splits, limits: dict[str, int | None], node: Mapping[str, Any]) -> Splits:
    seed = node.get("seed", 0)
    train, val, test = (limited(getattr(splits, split), limits[split], seed, split) for split in SPLITS)
    return replace(splits, train=train, val=val, test=test, digest=digest(splits.digest, limits, seed))


def limited(examples: Sequence[T], limit: int | None, seed: int, split: str) -> Sequence[T]:
    """A seeded subset of at most `limit` examples, in their order; a larger limit contains a smaller one's examples."""
    if limit is None:
        return examples
    order = np.random.default_rng(keyed_seed("limit", seed, split)).permutation(len(examples))
    return Subset(examples, np.sort(order[:limit]))
