"""Preparing once: what comes back from the disk is what was made, until anything it depends on changes."""

import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from massdpo.data import prepare as prepare_module
from massdpo.data.prepare import Subset, limited, prepare
from massdpo.data.schema import PreferenceExample
from massdpo.data.synthetic import SyntheticMCQA
from massdpo.errors import UserError
from massdpo.store import Cache
from tests.conftest import ROOT, SHARED_DATA, needs_shared_data
from tests.test_recommendation import write_interactions

SPLITS = ("train", "val", "test")
OWN = ("lastfm", "movielens_100k", "movielens_1m", "sequences", "qasc", "medmcqa", "arc", "commonsenseqa", "openbookqa")


def node(name: str, **options: Any) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf" / "dataset" / f"{name}.yaml").read_text()) | options


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def raw(tmp_path: Path) -> str:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_interactions(folder)
    return str(folder)


def test_what_comes_back_is_what_was_made(cache: Cache, raw: str) -> None:
    prepared = prepare(node("sequences", raw_dir=raw, prompts="several"), cache)
    made = write_interactions(Path(raw)).__class__(raw_dir=raw, prompts="several").load()
    for split in SPLITS:
        assert list(getattr(prepared, split)) == list(getattr(made, split))
        assert getattr(prepared, split)[-1] == getattr(made, split)[len(getattr(made, split)) - 1]
    assert prepared.train[2:9:3] == made.train[2:9:3] and prepared.report == made.report


def test_made_once(cache: Cache, raw: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    terms = "all invented"
    first = prepare(node("sequences", raw_dir=raw, terms=terms), cache)
    assert capsys.readouterr().err.count(terms) == 1
    monkeypatch.setattr(prepare_module, "_write", None)  # would fail if anything were made again
    second = prepare(node("sequences", raw_dir=raw, terms=terms), cache)
    assert second.digest == first.digest and list(second.test) == list(first.test)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_negatives": 5}, {"limit_train": 10}, "raw"])
def test_the_digest_changes_with_what_it_depends_on(cache: Cache, raw: str, change: dict[str, Any] | str) -> None:
    before = prepare(node("sequences", raw_dir=raw), cache)
    if change == "raw":
        path = Path(raw) / "items.csv"
        path.write_text(path.read_text().replace("Thing 007", "Thing 7"))
    after = prepare(node("sequences", raw_dir=raw) | (change if isinstance(change, dict) else {}), cache)
    assert after.digest != before.digest and list(after.train) != list(before.train)


def test_moving_the_raw_folder_changes_nothing(cache: Cache, raw: str, tmp_path: Path) -> None:
    before = prepare(node("sequences", raw_dir=raw), cache)
    Path(raw).rename(tmp_path / "moved")
    assert prepare(node("sequences", raw_dir=str(tmp_path / "moved")), cache).digest == before.digest


def chosen_of(split: Any) -> list[str]:
    return [example.chosen for example in split]


def test_another_process_can_read_a_split(cache: Cache, raw: str) -> None:
    splits = prepare(node("sequences", raw_dir=raw, limit_val=5), cache)
    assert list(pickle.loads(pickle.dumps(splits.train))) == list(splits.train)
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(chosen_of, splits.val).result() == chosen_of(splits.val)


def test_limits_are_seeded_subsets_in_order_one_within_another() -> None:
    examples = [PreferenceExample(f"t/{row}", "p", "c", ("n",), ("c", "n")) for row in range(100)]
    small, large = limited(examples, 10, 0, "train"), limited(examples, 30, 0, "train")
    assert isinstance(small, Subset) and len(small) == 10 and len(large) == 30
    rows = lambda some: [int(each.id[2:]) for each in some]  # noqa: E731
    assert set(rows(small)) <= set(rows(large)) and rows(large) == sorted(rows(large))
    assert rows(small) != rows(limited(examples, 10, 1, "train")) != rows(limited(examples, 10, 1, "val"))
    assert rows(limited(examples, 1000, 0, "train")) == list(range(100))
    assert limited(examples, None, 0, "train") is examples
    for wrong in (0, -1, 2.5, True, "ten"):
        with pytest.raises(UserError, match=r"dataset.limit_train must be a whole number"):
            limited(examples, wrong, 0, "train")


def test_a_dataset_without_raw_files_is_made_once_and_limited_too(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = {"_target_": "massdpo.data.synthetic.SyntheticMCQA", "num_train": 20}
    made = SyntheticMCQA(num_train=20).load()
    splits = prepare(world, cache)
    assert (list(splits.train), list(splits.val), list(splits.test)) == (made.train, made.val, made.test)
    monkeypatch.setattr(SyntheticMCQA, "load", None)  # would fail if it were made again
    some = prepare(world | {"limit_train": 7, "limit_test": 3}, cache)
    assert len(some.train) == 7 and all(row in made.test for row in some.test) and len(some.test) == 3


def test_a_composed_config_is_taken_as_it_is(cache: Cache, raw: str) -> None:
    composed = OmegaConf.create({"seed": 3, "dataset": node("sequences", raw_dir=raw, seed="${seed}")})
    assert prepare(composed.dataset, cache).digest == prepare(node("sequences", raw_dir=raw, seed=3), cache).digest


@pytest.mark.slow
def test_a_million_interactions_take_minutes_and_little_memory(tmp_path: Path) -> None:
    """A fifth of a million in a fifth of the three minutes that a million may take, and memory as for any number."""
    rng = np.random.default_rng(0)
    users, length, items = 4_000, 50, 20_000
    with open(tmp_path / "interactions.csv", "w") as file:
        file.write("user,item,time\n")
        for user in range(users):
            picks = enumerate(rng.choice(items, length, replace=False))
            file.writelines(f"u{user},{item},{place}\n" for place, item in picks)
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{item},Thing {item}\n" for item in range(items)))
    code = (
        "import resource, sys, yaml; from pathlib import Path\n"
        "from massdpo.data.prepare import prepare; from massdpo.store import Cache\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); prepare(yaml.safe_load(sys.argv[1]), Cache(Path(sys.argv[2]))); print(peak() - before)"
    )
    start = time.perf_counter()
    config = json.dumps(node("sequences", raw_dir=str(tmp_path)))
    command = [sys.executable, "-c", code, config, str(tmp_path / "cache")]
    kilobytes = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert time.perf_counter() - start < 36
    written = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.jsonl"))
    assert kilobytes * 1024 < written / 3  # 300 MB of prepared rows; the interactions themselves are in memory


def test_mistakes_come_out_as_user_errors(cache: Cache, raw: str) -> None:
    with pytest.raises(UserError, match=r"dataset.slate is clean or legacy"):
        prepare(node("sequences", raw_dir=raw, slate="dirty"), cache)
    with pytest.raises(UserError, match=r"cop_base must be given"):
        prepare(node("medmcqa", raw_dir=raw), cache)
    with pytest.raises(UserError, match=r"no published address: set dataset.raw_dir"):
        prepare(node("sequences"), cache)
    (Path(raw) / "items.csv").write_text("item,title\n1,\n")
    with pytest.raises(UserError, match=r"items.csv:2: 'title' is empty"):
        prepare(node("sequences", raw_dir=raw), cache)
    assert not list((cache.root / "prepared").glob("[!.]*/")), "a failed preparation must leave nothing behind"


@pytest.mark.parametrize("name", OWN)
def test_every_option_has_a_comment_and_the_class_takes_it(name: str) -> None:
    from hydra.utils import instantiate

    lines = (ROOT / "conf" / "dataset" / f"{name}.yaml").read_text().splitlines()
    options = [line for line in lines if not line.startswith(("#", "_target_", "name", "terms"))]
    for place, line in enumerate(lines):
        if line in options:
            assert " # " in line or lines[place - 1].startswith("#"), f"{name}: {line} has no comment"
    options_node = node(name)
    limits = [options_node.pop(f"limit_{split}") for split in SPLITS]
    terms = options_node.pop("terms", "")
    assert options_node.pop("name") == name and limits == [None] * 3 and (terms or name == "sequences")
    if name == "medmcqa":
        options_node["cop_base"] = 0
    instance = instantiate(options_node)
    for key, value in options_node.items():
        if key != "_target_":
            assert getattr(instance, key) == value


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "folder", "counts"), [("lastfm", "lastfm", (47_872, 2_767, 2_495)), ("qasc", "qasc", (7_634, 500, 926))]
)
def test_real_data(cache: Cache, name: str, folder: str, counts: tuple[int, int, int]) -> None:
    splits = prepare(node(name, raw_dir=str(SHARED_DATA / folder)), cache)
    assert (len(splits.train), len(splits.val), len(splits.test)) == counts
    start = time.perf_counter()
    prepare(node(name, raw_dir=str(SHARED_DATA / folder)), cache)
    assert time.perf_counter() - start < 2
    ids = [example.id for split in SPLITS for example in getattr(splits, split)]
    assert len(set(ids)) == sum(counts)
    json.dumps(splits.report)
