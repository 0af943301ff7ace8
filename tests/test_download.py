"""Fetching over a real connection (to this machine): files, hub sets, and an archive that would break out."""

import io
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from massdpo.data.download import SOURCES, HubSet, WebFiles, fetch
from massdpo.data.prepare import prepare
from massdpo.data.readers.mcqa import MultipleChoice
from massdpo.errors import UserError
from massdpo.store import Cache
from tests.test_prepare import node
from tests.test_recommendation import MovieLens100K, write_movielens


class Quiet(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    Quiet.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_an_archive_is_fetched_once_checked_unpacked_and_prepared(
    site: tuple[Path, str],
    cache: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, address = site
    write_movielens(tmp_path, MovieLens100K)
    members = {f"ml-100k/{name}": (tmp_path / name).read_bytes() for name in ("u.data", "u.item")}
    (folder / "ml-100k.zip").write_bytes(zipped(members))
    checksum = sha256((folder / "ml-100k.zip").read_bytes()).hexdigest()
    source = WebFiles(((f"{address}ml-100k.zip", checksum),), inside="ml-100k")
    monkeypatch.setitem(SOURCES, "movielens_100k", source)
    config = node("movielens_100k", num_negatives=5)
    first = prepare(config, cache)
    told = capsys.readouterr().err
    assert "100%" in told and told.count(config["terms"]) == 1, "a progress bar, and the terms of use once"
    second = prepare(config, cache)
    assert capsys.readouterr().err == ""
    assert Quiet.asked == ["/ml-100k.zip"] and first.digest == second.digest and len(first.train) > 0


def test_another_content_than_the_published_one_is_refused(
    site: tuple[Path, str], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = site
    (folder / "data.json").write_text("[]")
    monkeypatch.setitem(SOURCES, "lastfm", WebFiles(((f"{address}data.json", "0" * 64),)))
    with pytest.raises(UserError, match=r"data.json is not the published file .* set dataset.raw_dir"):
        fetch("lastfm", cache)
    assert not any(cache.root.rglob("data.json"))


@pytest.mark.parametrize("path", ["missing.json", None])
def test_no_file_or_no_network_says_what_to_put_where(
    site: tuple[Path, str], cache: Cache, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    address = site[1] + path if path else "http://127.0.0.1:9/u.json"  # port 9 (discard) is closed
    monkeypatch.setitem(SOURCES, "lastfm", WebFiles(((address, "0" * 64),)))
    why = "404" if path else "no connection"
    with pytest.raises(UserError, match=rf"lastfm could not be fetched .*{why}.*: put \w+.json .*set dataset.raw_dir"):
        fetch("lastfm", cache)
    monkeypatch.setitem(SOURCES, "movielens_100k", WebFiles(((f"{address}.zip", "0" * 64),), inside="ml-100k"))
    with pytest.raises(
        UserError, match=r"unpack .*\.zip \(SHA-256 0+\), take its folder ml-100k and set dataset.raw_dir"
    ):
        fetch("movielens_100k", cache)
    assert not list(cache.root.glob("raw/[!.]*/")), "a failed fetch must leave nothing behind"


def test_offline_hub(cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"dataset=qasc could not be fetched .*put train.jsonl, dev.jsonl into a folder"
    ):
        fetch("qasc", cache)


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/out.txt", "..\\out.txt"])
def test_no_member_of_an_archive_leaves_the_folder(
    name: str, site: tuple[Path, str], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = site
    (folder / "set.zip").write_bytes(content := zipped({"set/fine.txt": b"fine", name: b"out"}))
    source = WebFiles(((f"{address}set.zip", sha256(content).hexdigest()),), inside="set")
    monkeypatch.setitem(SOURCES, "lastfm", source)
    fetched = fetch("lastfm", cache)
    assert (fetched / "fine.txt").read_text() == "fine"
    assert all(fetched.parent in file.parents for file in cache.root.parent.rglob("*out.txt"))
    assert not Path("/out.txt").exists()


def test_an_unknown_name(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"'mine' has no published address: set dataset.raw_dir"):
        fetch("mine", cache)


def test_every_address_is_pinned() -> None:
    for source in SOURCES.values():
        if isinstance(source, HubSet):
            assert len(source.revision) == 40 and int(source.revision, 16)
        else:
            assert all(len(checksum) == 64 and int(checksum, 16) for _, checksum in source.files)
            assert all(address.startswith("https://") for address, _ in source.files)


def hub_rows(stem: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{row}",
            stem: f"what is {row}?",
            "choices": {"text": [f"right {row}", f"wrong {row}", f"other {row}"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
        for row in range(count)
    ]


@pytest.mark.parametrize("name", ["qasc", "arc", "commonsenseqa", "openbookqa", "medmcqa"])
def test_hub_sets_are_read_as_the_hub_has_them(
    name: str, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCES[name]
    assert isinstance(source, HubSet)
    asked = []

    def served(repo: str, remote: str, repo_type: str, revision: str) -> str:
        asked.append((repo, remote, repo_type, revision))
        if name == "medmcqa":
            options = ("opa", "opb", "opc", "opd")
            rows = [
                {"id": f"m{row}", "question": f"m{row}?", "cop": row % 4, "exp": None, "choice_type": "single"}
                | {each: f"{each} {row}" for each in options}
                for row in range(20)
            ]
        else:
            rows = hub_rows("question_stem" if name == "openbookqa" else "question", 20)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", served)
    config = node(name, num_negatives=5)
    if config["val_file"] is None:
        config["val_size"] = 5
    splits = prepare(config, cache)
    expected = [
        f"{('opa', 'opb', 'opc', 'opd')[row % 4]} {row}" if name == "medmcqa" else f"right {row}" for row in range(20)
    ]
    assert [example.chosen for example in splits.test] == expected
    assert {each[0] for each in asked} == {source.repo} and {each[3] for each in asked} == {source.revision}
    target = MultipleChoice
    assert config["_target_"].endswith(target.__name__)
