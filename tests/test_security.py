"""Nothing that is read runs code, and no secret is in anything that is written."""

import ast
import base64
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from massdpo.config import without_secrets
from massdpo.errors import UserError
from massdpo.report.__main__ import main as report
from massdpo.report.rows import collect
from massdpo.store import MANIFEST, file_digest, is_whole, write_json
from massdpo.training.objectives import Preference
from tests.conftest import ROOT
from tests.processes import start
from tests.test_experiment import TINY, train
from tests.test_models import Harm
from tests.test_report import demo, make_run  # noqa: F401  a fixture too

# Secrets --------------------------------------------------------------------------------------------------------------

KEYS = {  # each another text, so that a search tells where one came from
    "WANDB_API_KEY": "planted0wandb0key0" + "ab12" * 6,
    "HF_TOKEN": "hf_planted0hub0token0cd34",
    "MY_SERVICE_PASSWORD": "planted0password0ef56",
}
REMOTE = "planted0remote0token"
ADDRESS = "planted0address0token"


def searched(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below a folder, as it is, and unpacked where it is an archive."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from ((path / name, archive.read(name)) for name in archive.namelist())


@pytest.mark.slow
def test_planted_secrets_are_in_nothing_that_is_written(tmp_path: Path) -> None:
    """Keys in the environment, in a git remote, in the command: a run with W&B, one that fails, a report on both."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: there is no remote to plant a secret in")
    checkout, written = tmp_path / "checkout", tmp_path / "written"
    parts = ("massdpo", "conf", "sweeps", "run.py")
    checkout.mkdir()
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, checkout / part)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (
        ["init", "-q"],
        ["remote", "add", "origin", f"https://someone:{REMOTE}@host.invalid/x.git"],
        ["add", "massdpo"],
        ["commit", "-qm", "all"],
    ):
        subprocess.run([*git, *command], check=True)
    for name in ("home", "tmp"):
        (written / name).mkdir(parents=True)
    folders = [f"runs_dir={written / 'runs'}", f"cache_dir={written / 'cache'}"]
    environment = os.environ | KEYS | {"HOME": str(written / "home"), "TMPDIR": str(written / "tmp")}
    environment |= {"PYTHONPATH": str(checkout)}
    tiny = [option for option in TINY if not option.startswith(("logger", "trainer.save"))]

    def run(*arguments: str, code: int = 0) -> None:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=written, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stderr
        said.append(done.stdout + done.stderr)

    said: list[str] = []
    entry = str(checkout / "run.py")
    secret = KEYS["MY_SERVICE_PASSWORD"]
    run(entry, *tiny, *folders, f"logger.project={secret}", "name=good")
    wrong = ["dataset=jsonl", f"dataset.path=https://me:{ADDRESS}@host.invalid/{secret}.jsonl"]
    run(entry, *(option for option in tiny if "dataset" not in option), *folders, *wrong, "logger=none", code=2)
    run(entry, *tiny, *folders, "name=long", "trainer.max_length=8", code=2)
    run(entry, f"logger.entity=https://me:{ADDRESS}@host.invalid", "debug=true", code=2)
    run(
        entry,
        "--multirun",
        *tiny,
        *folders,
        "logger=none",
        f"+notes=https://me:{ADDRESS}@host.invalid/{secret}",
        code=2,
    )
    run(entry, "task=evaluate", f"in={written / 'runs' / 'single' / 'good'}", *folders, f"out={written / 'found.json'}")
    run("-m", "massdpo.report", "--runs", str(written / "runs"), "--out", str(written / "results"))
    (written / "said.txt").write_text("\n".join(said))

    metrics = json.loads((written / "runs" / "single" / "good" / "metrics.json").read_text())
    assert len(metrics["git_commit"].removesuffix("+changes")) == 40  # so git was asked
    assert "logger.project=(hidden)" in metrics["command"]
    found = [
        (str(path.relative_to(written)), name)
        for path, content in searched(written)
        for name, text in (KEYS | {"remote": REMOTE, "address": ADDRESS}).items()
        for form in (text.encode(), base64.b64encode(text.encode())[:-4], text.encode("utf-16-le"))
        if form in content or form in str(path).encode()
    ]
    assert found == []
    assert any(path.suffix == ".wandb" and b"synthetic_mcqa" in content for path, content in searched(written))


def test_secrets_are_taken_out_of_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEYS["HF_TOKEN"])
    text = f"cannot reach https://me:{REMOTE}@host/x with {KEYS['HF_TOKEN']}"
    assert without_secrets(text) == "cannot reach https://host/x with (hidden)"
    assert without_secrets({"deep": [{"api_key": "x", "tokens": 3}], "k": 4}) == {
        "deep": [{"api_key": "(hidden)", "tokens": 3}],
        "k": 4,
    }


# Pickles --------------------------------------------------------------------------------------------------------------


def test_no_line_of_the_package_unpickles_or_runs_what_it_reads() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for file in (*(ROOT / "massdpo").rglob("*.py"), ROOT / "run.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not forbidden & {name.split(".")[0] for name in names}, f"{file}:{node.lineno}"
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert called not in ("eval", "exec", "compile", "__import__", "os.system"), f"{file}:{node.lineno}"
                assert called not in ("torch.load", "yaml.unsafe_load", "yaml.full_load"), f"{file}:{node.lineno}"
                assert called != "yaml.load" or options["Loader"].endswith("SafeLoader"), f"{file}:{node.lineno}"
                assert options.get("allow_pickle", "False") == "False", f"{file}:{node.lineno}"
                assert options.get("trust_remote_code", "False") == "False", f"{file}:{node.lineno}"
                assert options.get("shell", "False") == "False", f"{file}:{node.lineno}"


@dataclass(frozen=True)
class Noting:
    """Notes in a file whatever name an unpickler looks up in this process."""

    notes: Path

    def __call__(self) -> None:
        note = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "pickle.find_class":
                os.write(note, ".".join(map(str, arguments[1:])).encode() + b"\n")

        sys.addaudithook(hook)


@pytest.mark.slow
def test_no_unpickler_is_at_work_from_the_first_command_to_the_last(tmp_path: Path) -> None:
    """Train with an adapter, stop, go on, evaluate, rank, select."""
    folders = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", "trainer.threads=1", "logger=none"]
    data = ["dataset.num_train=64", "dataset.num_val=16", "dataset.num_test=32", "trainer.sft.epochs=1"]
    adapter = "trainer.adapter={r: 2, alpha: 4, targets: all-linear, stages: one}"
    run, log, noting = tmp_path / "runs" / "single" / "run", tmp_path / "log", Noting(tmp_path / "notes")
    command = [*folders, *data, adapter, "name=run", "trainer.checkpoint_every=1", "trainer.preference.epochs=2"]
    process = start(*command, log=log, before=noting)
    while process.is_alive() and not list(run.glob("checkpoints/0*")):
        process.join(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 130, log.read_text()
    question = {"prompt": "name the home of noble crane:", "candidates": ["quiet plateau", "ruby ring"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    for arguments in (
        command,
        ["task=evaluate", f"in={run}", *folders, *data],
        [
            "task=rank",
            f"policy={run / 'policy'}",
            f"in={tmp_path / 'questions.jsonl'}",
            f"out={tmp_path / 'o'}",
            *folders,
        ],
        ["task=select", f"out={tmp_path / 'selected'}", *folders, *data],
    ):
        process = start(*arguments, log=log, before=noting)
        process.join(300)
        assert process.exitcode == 0, log.read_text()
    assert "preference: continuing from step" in log.read_text()
    assert noting.notes.read_text() == ""


def planted(file: Path, mark: Path) -> None:
    """Put a pickle that makes the folder `mark` in a file's place, and make its folder whole again."""
    evil = io.BytesIO()
    torch.save({"state": Harm(mark)}, evil)
    file.write_bytes(evil.getvalue() if file.suffix == ".bin" else pickle.dumps(Harm(mark)))
    folder = next(place for place in file.parents if (place / MANIFEST).exists())
    names = json.loads((folder / MANIFEST).read_text()) | {str(file.relative_to(folder)): None}
    write_json(folder / MANIFEST, {name: file_digest(folder / name) for name in sorted(names)})
    assert is_whole(folder)


def test_pickles_planted_in_checkpoints_and_caches_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with matching checksums: who can write there can write those too."""
    mark = tmp_path / "harm"
    folders = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", "name=run"]
    folders.append("trainer.preference.epochs=2")  # stopped after the first, when the optimiser is still needed

    def stopping(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Preference, "validate", stopping)
        train(*folders)
    (checkpoint,) = (tmp_path / "runs" / "single" / "run" / "checkpoints").glob("0*")
    (started,) = (folder for folder in (tmp_path / "cache" / "sft").iterdir() if folder.is_dir())
    for file in (
        checkpoint / "random_states_0.pkl",
        checkpoint / "pytorch_model.bin",
        started / "pytorch_model.bin",
        started / "training_args.bin",
        started / "adapter_model.bin",
        started / "tokenizer.pkl",
    ):
        planted(file, mark)
    train(*folders)
    assert not mark.exists()
    shutil.rmtree(tmp_path / "runs")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Preference, "validate", stopping)
        train(*folders)
    planted(checkpoint / "optimizer.bin", mark)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        train(*folders)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Harm(mark)))  # it would have
    assert mark.exists()


# What somebody else made ----------------------------------------------------------------------------------------------


def test_yaml_of_a_run_constructs_no_objects(demo: Path, tmp_path: Path) -> None:  # noqa: F811
    mark = tmp_path / "harm"
    for text in (f"!!python/object/apply:os.mkdir ['{mark}']", f"{{_target_: os.mkdir, path: {mark}}}"):
        (file,) = demo.glob("*mass*s0-*/config.yaml")
        before = file.read_text()
        file.write_text(f"{before}\nextra: {text}\n")
        if text.startswith("!!"):
            with pytest.raises(UserError, match=r"config.yaml cannot be read"):
                collect(demo)
        else:
            collect(demo)
        file.write_text(before)
    assert not mark.exists()


def test_a_few_lines_of_yaml_cannot_fill_the_memory(demo: Path) -> None:  # noqa: F811
    (file,) = demo.glob("*mass*s0-*/config.yaml")
    rows = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    file.write_text(file.read_text() + "\n" + "\n".join(rows))
    with pytest.raises(UserError, match="alias"):
        collect(demo)


def test_arrays_of_a_report_hold_no_objects(demo: Path, tmp_path: Path) -> None:  # noqa: F811
    results, mark = tmp_path / "out", tmp_path / "harm"
    assert report(["demo", "--runs", str(demo.parent), "--out", str(results)]) == 0
    file = results / "demo" / "prompts.npz"
    with np.load(file) as data:
        arrays = {name: data[name] for name in data.files}
    arrays[next(iter(arrays))] = np.array([Harm(mark)], dtype=object)
    np.savez(file, **arrays)  # type: ignore[arg-type]
    assert report(["demo", "--render", "--runs", str(demo.parent), "--out", str(results)]) == 2
    assert not mark.exists()


NASTY = '<img src=x onerror="alert(1)"> [x](javascript:alert(1)) | `a` $x_1$ & \\input{/etc/passwd} %'


def test_names_out_of_a_run_are_escaped_in_every_report(demo: Path, tmp_path: Path) -> None:  # noqa: F811
    """An option's value that a sweep varies, a machine's name, a reason of failure: all are somebody's text."""
    sweep = tmp_path / "runs" / "nasty"
    for selector in ("mass", "random"):
        for value in (NASTY, "plain"):
            for seed in range(2):
                folder = make_run(sweep, selector, seed, options={"learning_rate": value})
                metrics = json.loads((folder / "metrics.json").read_text())
                (folder / "metrics.json").write_text(json.dumps(metrics | {"machine": NASTY, "command": NASTY}))
    failed = make_run(sweep, "full", 0, status="failed")
    (failed / "status.json").write_text(json.dumps({"status": "failed", "why": NASTY}))
    out = tmp_path / "results"
    assert report(["nasty", "--runs", str(sweep.parent), "--out", str(out)]) == 0
    page = (out / "index.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=" in page
    for file in (out / "nasty").glob("*.md"):
        text = file.read_text()
        assert "<img" not in text.replace("\\<img", "") and "[x](" not in text.replace("\\[x\\](", ""), file.name
    for file in (out / "nasty").glob("*.tex"):
        assert "\\input" not in file.read_text().replace("\\textbackslash{}input", ""), file.name
        assert "$x_1$" not in file.read_text(), file.name
    for file in (out / "nasty").rglob("*.svg"):
        assert "<img" not in file.read_text(), file.name
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["preference"]["learning_rate"] == "plain"
