"""Damaged files of every kind, the real ones among them: sound examples come out, or one UserError of one line."""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import hydra.utils
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from massdpo.config import compose
from massdpo.data.readers.preferences import Preferences
from massdpo.errors import UserError
from tests.conftest import SHARED_DATA, needs_shared_data
from tests.test_readers_fuzz import READERS, check

ROW = {"prompt": "Which bird is it?", "chosen": "the wren", "rejected": ["the owl", "the kite"]}
ODD = (
    b"\x00",
    b"\xff",
    b"\r",
    b'"',
    b"{",
    b"[",
    b"]",
    b",",
    b"\t",
    b"|",
    b"::",
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"\\ud800",
)


def mutated(content: bytes, seed: int) -> bytes:
    """One to four pieces cut, doubled, swapped, overwritten or moved elsewhere, by the seed."""
    chance, changed = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(changed) + 1)
        stop = min(len(changed), start + int(chance.expovariate(1 / 20)))
        kind = chance.choice(("cut", "truncate", "double", "noise", "odd", "digit", "move"))
        if kind == "cut":
            del changed[start:stop]
        elif kind == "truncate" and chance.random() < 0.3:
            del changed[start:]
        elif kind == "double":
            changed[stop:stop] = changed[start:stop] * chance.choice((1, 1, 100))
        elif kind == "noise":
            changed[start:stop] = chance.randbytes(stop - start)
        elif kind == "odd":
            changed[start:start] = chance.choice(ODD)
        elif kind == "digit":
            changed[start:stop] = bytes(
                chance.choice(b"0123456789") if 48 <= byte < 58 else byte for byte in changed[start:stop]
            )
        elif kind == "move" and changed:
            piece = changed[start:stop]
            del changed[start:stop]
            place = chance.randrange(len(changed) + 1)
            changed[place:place] = piece
    return bytes(changed)


ODD_VALUES: list[Any] = [
    *(None, True, -1, 0, 7, 2**31, 10**12, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "wide", "é\n\0", "../../etc/passwd", [], [1], ["a", None], {}, {"a": {}}, [[[]]]),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in plain values."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def restructured(value: Any, chance: random.Random) -> Any:
    """One to three values of another kind or size, missing, or added."""
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice([*places(value), (None, None)])
        if holder is None:
            return chance.choice(ODD_VALUES)
        kind = chance.choice(("other", "other", "missing", "nested", "many"))
        if kind == "other":
            holder[key] = chance.choice(ODD_VALUES)
        elif kind == "missing":
            del holder[key]
        elif kind == "nested":
            holder[key] = {str(key): [holder[key]]}
        elif isinstance(holder[key], int | float):
            holder[key] = holder[key] * chance.choice((-1, 2, 1000, 10**9))
        if not isinstance(value, dict | list):
            break
    return value


def survives(load: Callable[[], Any]) -> None:
    try:
        check(load())  # slates are drawn as a split is read: what they lack is told then
    except UserError as error:
        assert "\n" not in str(error)


def tried(folder: Path, files: list[Path], load: Callable[..., Any], seed: int) -> None:
    """Damage one of the files, read, and put it back."""
    chance = random.Random(seed)
    file = chance.choice(files)
    before = file.read_bytes()
    if file.name in JSON and chance.random() < 0.7:
        file.write_text(json.dumps(restructured(json.loads(before), chance)))
    else:
        file.write_bytes(mutated(before, seed))
    try:
        for policy in ("error", "skip"):
            survives(partial(load, folder, bad_rows=policy))
    finally:
        file.write_bytes(before)


JSON = ("state.json", "dataset_info.json", "dataset_dict.json")  # whose keys have a meaning


def limits(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def write_jsonl(folder: Path) -> None:
    rows = [ROW | {"prompt": f"Which bird sings at {hour}?", "id": f"b{hour}"} for hour in range(30)]
    rows[3]["prompt"] = [{"role": "user", "content": "Which bird?"}]  # type: ignore[assignment]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_saved(folder: Path) -> None:
    rows = [ROW | {"prompt": f"Which bird sings at {hour}?"} for hour in range(30)]
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "saved")


OWN: dict[str, tuple[Callable[[Path], None], Callable[..., Any], tuple[str, ...]]] = {
    "preferences": (
        write_jsonl,
        lambda folder, **options: Preferences(path=str(folder / "own.jsonl"), **options).load(),
        ("own.jsonl",),
    ),
    "saved": (
        write_saved,
        lambda folder, **options: Preferences(path=str(folder / "saved"), **options).load(),
        (
            *(f"saved/train/{name}" for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json")),
            "saved/dataset_dict.json",
        ),
    ),
}


@pytest.mark.parametrize("name", OWN)
@limits(60)
@given(seed=st.integers(0, 2**32))
def test_preferences_of_ones_own(name: str, tmp_path: Path, seed: int) -> None:
    write, load, files = OWN[name]
    if not (tmp_path / files[0]).exists():
        write(tmp_path)
    tried(tmp_path, [tmp_path / file for file in files], load, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS, *OWN])
@limits(150)
@given(seed=st.integers(0, 2**32))
def test_many_damages(name: str, tmp_path: Path, seed: int) -> None:
    write, load, files = (READERS | OWN)[name]
    if not (tmp_path / files[0]).exists():
        write(tmp_path)
    tried(tmp_path, [tmp_path / file for file in files], load, seed)


# The files of each public dataset, and how many lines of them are enough.
REAL = {
    "lastfm": (["lastfm/sequences.jsonl:200", "lastfm/id2name.txt"], []),
    "movielens_100k": (["movielens_100k/u.data:4000", "movielens_100k/u.item"], ["dataset.num_negatives=5"]),
    "qasc": (["qasc/train.jsonl:200", "qasc/dev.jsonl:60"], ["dataset.val_size=20"]),
    "arc": (
        [f"arc/ARC-Challenge/ARC-Challenge-{part}.jsonl:100" for part in ("Train.partial", "Dev", "Test")],
        ["dataset.train_file=ARC-Challenge-Train.partial.jsonl"],
    ),
    "medmcqa": (
        ["medmcqa/train_sample.jsonl:150", "medmcqa/validation.jsonl:60"],
        ["dataset.train_file=train_sample.jsonl", "dataset.val_size=20"],
    ),
}


@needs_shared_data
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@limits(250)
@given(seed=st.integers(0, 2**32))
def test_damaged_real_files(name: str, tmp_path: Path, seed: int) -> None:
    sources, options = REAL[name]
    files = []
    for source in sources:
        path, _, count = source.partition(":")
        file = tmp_path / Path(path).name
        if not file.exists():
            with open(SHARED_DATA / path, "rb") as lines:
                file.write_bytes(b"".join(islice(lines, int(count) if count else None)))
        files.append(file)

    def load(folder: Path, **more: Any) -> Any:
        try:
            return hydra.utils.instantiate(node(name, *options) | {"raw_dir": str(folder)} | more).load()
        except hydra.errors.InstantiationException as error:
            raise error.__cause__ or error from None

    tried(tmp_path, files, load, seed)


@cache
def node(name: str, *options: str) -> dict[str, Any]:
    dataset = compose([f"dataset={name}", *options]).dataset
    left = ("limit_", "long_rows", "name", "terms")
    return {key: value for key, value in dataset.items() if not key.startswith(left)}
