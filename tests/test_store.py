"""Files and cached folders appear whole or not at all, whatever happens to who writes them."""

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from massdpo.errors import UserError
from massdpo.store import MANIFEST, Cache, build_folder, digest, is_whole, keyed_seed, replacing, write_json, write_text
from tests.conftest import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    write_json(file, {"accuracy": 0.5})
    before = file.read_bytes()
    with pytest.raises(RuntimeError), replacing(file) as beside:
        beside.write_text("half")
        assert file.read_bytes() == before  # the place is untouched while writing
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(file, {"accuracy": object()})
    assert file.read_bytes() == before
    assert names(tmp_path) == ["metrics.json"]


def test_a_written_file_is_exact_and_readable_by_others(tmp_path: Path) -> None:
    text = "a,b\nÉmile,2\r\n"
    write_text(tmp_path / "deep" / "file.csv", text)
    assert (tmp_path / "deep" / "file.csv").read_bytes() == text.encode()
    assert stat.S_IMODE((tmp_path / "deep" / "file.csv").stat().st_mode) & 0o044 == 0o044


def test_digest_tells_parts_apart() -> None:
    parts = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (b"abc",),
        (["abc"],),
        (1,),
        ("1",),
        (None,),
        (torch.zeros(2),),
        (torch.zeros(2, 1),),
        (torch.zeros(2, dtype=torch.int32),),
    ]
    assert len({digest(*part) for part in parts}) == len(parts)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    bits = torch.arange(6.0).reshape(2, 3)
    assert digest(bits.T) == digest(bits.T.contiguous()) != digest(bits)


def test_keyed_seed_is_the_same_in_every_process() -> None:
    code = "from massdpo.store import keyed_seed; print(keyed_seed('order', 3, 'x/1'))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(other.stdout) == keyed_seed("order", 3, "x/1")
    assert 0 <= keyed_seed("order", 3, "x/1") < 2**63
    assert keyed_seed("order", 3, "x/1") != keyed_seed("order", 3, "x/2")


def build(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_text("w")
    (folder / "text").write_text("t")


def test_cached_folder_is_built_once_and_read_after(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path), []
    for _ in range(2):
        place = cache.folder("sft", "key", lambda folder: (calls.append(folder), build(folder)))
    assert len(calls) == 1
    assert (place / "deep" / "weights").read_text() == "w"
    assert is_whole(place)


def _slow_folder(root: Path, count: Path, barrier) -> None:
    def slow(folder: Path) -> None:
        with open(count, "a") as file:
            file.write("built\n")
        time.sleep(0.5)  # the other process arrives meanwhile
        build(folder)

    barrier.wait()
    place = Cache(root).folder("sft", "key", slow)
    assert is_whole(place)


def test_two_processes_build_a_folder_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    pair = [
        context.Process(target=_slow_folder, args=(tmp_path / "cache", tmp_path / "count", barrier)) for _ in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    assert (tmp_path / "count").read_text() == "built\n"


def _damage(place: Path, how: str) -> None:
    if how == "bytes":
        (place / "text").write_text("T")
    elif how == "missing":
        (place / "deep" / "weights").unlink()
    elif how == "added":
        (place / "more").write_text("?")
    elif how == "no manifest":
        (place / MANIFEST).unlink()
    else:
        (place / MANIFEST).write_text('{"text')


@pytest.mark.parametrize("how", ["bytes", "missing", "added", "no manifest", "broken manifest"])
def test_a_damaged_folder_is_told_set_aside_and_built_again(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path)
    place = cache.folder("sft", "key", build)
    _damage(place, how)
    assert not is_whole(place)
    assert is_whole(cache.folder("sft", "key", build))
    assert "is damaged; it was set aside as key.damaged." in capsys.readouterr().err
    assert len(list((tmp_path / "sft").glob("key.damaged.*"))) == 1


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise RuntimeError("full disk")

    cache = Cache(tmp_path)
    with pytest.raises(RuntimeError):
        cache.folder("sft", "key", fails)
    assert [name for name in names(tmp_path / "sft") if not name.endswith(".lock")] == []
    assert is_whole(cache.folder("sft", "key", build))


def test_a_builder_that_is_killed_leaves_no_folder_and_no_lock(tmp_path: Path) -> None:
    def hangs(folder: Path) -> None:
        (folder / "half").write_text("h")
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=lambda: Cache(tmp_path).folder("sft", "key", hangs))
    process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("sft/.key.*/half")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not Cache(tmp_path).holds("sft", "key")
    assert is_whole(Cache(tmp_path).folder("sft", "key", build))  # would hang if the lock had stayed


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    for text in ("old", "new"):
        build_folder(place, lambda folder, text=text: (folder / text).write_text(text))
    assert names(place) == [MANIFEST, "new"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set cache_dir"):
        Cache(tmp_path / "file").folder("sft", "key", build)
