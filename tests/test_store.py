"""Files and cached folders appear whole or not at all, whatever happens to who writes them."""

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from massdpo.data.schema import PreferenceExample
from massdpo.data.stored import spooled
from massdpo.errors import UserError
from massdpo.store import (
    MANIFEST,
    Cache,
    build_folder,
    digest,
    is_whole,
    keyed_seed,
    plain_yaml,
    remove_unfinished,
    replacing,
    write_json,
    write_text,
    writing,
)
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
    elif how == "nested manifest":
        (place / MANIFEST).write_text("[" * 100_000)
    else:
        (place / MANIFEST).write_text('{"text')


@pytest.mark.parametrize("how", ["bytes", "missing", "added", "no manifest", "nested manifest", "broken manifest"])
def test_a_damaged_folder_is_told_set_aside_and_built_again(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path)
    place = cache.folder("sft", "key", build)
    _damage(place, how)
    assert not is_whole(place)
    assert is_whole(cache.folder("sft", "key", build))
    assert "is damaged: moved aside as key.damaged." in capsys.readouterr().err
    assert len(list((tmp_path / "sft").glob("key.damaged.*"))) == 1


def test_what_a_file_manager_leaves_in_a_folder_is_no_damage(tmp_path: Path) -> None:
    place = Cache(tmp_path).folder("sft", "key", build)
    (place / ".DS_Store").write_bytes(b"how macOS shows the folder")
    assert is_whole(place)


@pytest.mark.parametrize(
    ("file", "is_ours"), [("a/cache", True), ("a/cache/b", True), ("a", True), ("a/cache2", False)]
)
def test_only_what_is_in_a_folder_is_said_of_it(tmp_path: Path, file: str, is_ours: bool) -> None:
    with pytest.raises(UserError if is_ours else FileNotFoundError), writing(tmp_path / "a" / "cache", "remedy"):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / file))


def test_a_full_folder_for_temporary_files_is_not_called_the_cache(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[float, PreferenceExample]]:
        yield 0.0, PreferenceExample("", "p", "a", ("b",), ("a", "b"))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"massdpo\..* cannot be written \(No space.*TMPDIR"):
        Cache(tmp_path).folder("prepared", "key", lambda _: spooled(rows()) and None)


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


def test_files_and_folders_follow_the_umask_whatever_wrote_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")

        def private(folder: Path) -> None:
            (folder / "weights").write_text("1")
            (folder / "weights").chmod(0o600)  # as safetensors does

        build_folder(tmp_path / "folder", private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "folder" / "weights").stat().st_mode) == 0o640


def test_a_pipe_is_written_into_and_a_link_is_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    write_text(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "far").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    write_text(tmp_path / "file", "text")
    build_folder(tmp_path / "folder", build)
    build_folder(tmp_path / "folder", build)
    assert (tmp_path / "file").is_symlink() and (tmp_path / "far" / "file").read_text() == "text"
    assert (tmp_path / "folder").is_symlink() and is_whole(tmp_path / "far" / "folder")
    assert names(tmp_path / "far") == ["file", "folder"]


@pytest.mark.parametrize("stop", ["Ctrl-C", "kill"])
def test_an_end_between_the_two_renames_loses_nothing(
    tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "policy"
    build_folder(place, build)
    before, done = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}, []
    rename = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target == place and not done:
            done.append(target)
            if stop == "kill":  # nothing of what cleans up comes about
                monkeypatch.setattr("massdpo.store.folders.shutil.rmtree", lambda *arguments, **options: None)
                monkeypatch.setattr("massdpo.store.folders.os.replace", lambda *arguments: None)
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("massdpo.store.folders.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_folder(place, build)
    monkeypatch.undo()
    assert done and place.exists() is (stop == "Ctrl-C")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["policy"]
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_what_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    place = cache.folder("kind", "key", build)

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("massdpo.store.folders.file_digest", refused)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        cache.folder("kind", "key", build)
    assert names(place.parent) == ["key", "key.lock"]


def test_checksums_are_compared_once_in_a_process_while_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    place = cache.folder("kind", "key", build)
    assert is_whole(place)
    monkeypatch.setattr("massdpo.store.folders.file_digest", lambda path: pytest.fail("read again"))
    cache.folder("kind", "key", build)
    monkeypatch.undo()
    file = next(path for path in place.iterdir() if path.name != MANIFEST)
    file.write_bytes(file.read_bytes() + b"1")
    assert not is_whole(place)


@pytest.mark.parametrize(
    "text",
    ["a: &a [x]\nb: *a", "[" * 60 + "]" * 60, "a: " + "x" * 1_000_001, "a: [", "license: *bomb"],
    ids=["alias", "nesting", "size", "broken", "no anchor"],
)
def test_yaml_that_could_fill_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        plain_yaml(text)


def test_plain_yaml_is_read() -> None:
    assert plain_yaml("a: 1\nb: [x, {c: null}]") == {"a": 1, "b": ["x", {"c": None}]}
