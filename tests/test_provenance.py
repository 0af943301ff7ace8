"""What decides a run's numbers decides its keys, and nothing else does."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from massdpo.config import RULES, compose
from massdpo.data.tokenize import tokenizer_key
from massdpo.model.scratch import TinyModel, learn_tokenizer
from massdpo.runs import machine, pipeline, provenance
from massdpo.runs.provenance import model_key, reference_key, run_parts, start_key
from massdpo.store import MANIFEST, Cache, code, digest
from massdpo.store.code import meaning, package_code, target_code
from massdpo.tasks import run as run_task

TINY = [
    *("dataset.num_train=24", "dataset.num_val=8", "dataset.num_test=12", "dataset.num_negatives=5"),
    *("model.config.hidden_size=16", "model.config.intermediate_size=16", "model.config.num_hidden_layers=1"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.threads=1", "logger=none"),
]
SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
HERE: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


def keys(config: DictConfig, data: str = "data", model: str = "model", machine: Any = HERE) -> tuple[str, str]:
    """Of the SFT start and of the run."""
    return start_key(config, data, model, machine), digest(run_parts(config, data, model, machine))


# --- code ---


def test_comments_docstrings_and_layout_mean_nothing_and_a_sign_does() -> None:
    plain = "def f(x):\n    return -x\n"
    told = '"""Of f."""\n\ndef f( x ):  # why\n    """Negated."""\n    return (\n        -x)\n'
    assert meaning(plain) == meaning(told)
    assert meaning(plain) != meaning(plain.replace("-x", "x"))
    assert meaning("x = 'a text'") != meaning("x = 'another'")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, whose code is what the keys are made of."""
    copy = tmp_path / "massdpo"
    shutil.copytree(code.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", copy)
    return copy


def fresh(*rooms: str) -> str:
    package_code.cache_clear()
    try:
        return package_code(*rooms)
    finally:
        package_code.cache_clear()


@pytest.mark.parametrize(
    "file", ["training/objectives", "data/batches", "model/scoring", "selection/gram", "runs/start"]
)
def test_a_change_of_any_code_that_computes_changes_the_key_and_a_comment_does_not(package: Path, file: str) -> None:
    place = package / f"{file}.py"
    before = fresh()
    place.write_text(f"# a comment\n{place.read_text(encoding='utf-8')}", encoding="utf-8")
    assert fresh() == before
    place.write_text(place.read_text(encoding="utf-8") + "\nSIGN = -1\n", encoding="utf-8")
    assert fresh() != before


@pytest.mark.parametrize("file", ["report/tables", "runs/card", "runs/trackers", "tasks/inspect", "config/messages"])
def test_code_that_only_tells_is_in_no_key(package: Path, file: str) -> None:
    before = fresh()
    with open(package / f"{file}.py", "a", encoding="utf-8") as source:
        source.write("\nSIGN = -1\n")
    assert fresh() == before


def test_new_files_count_unless_they_are_named(package: Path) -> None:
    before = fresh()
    (package / "selection" / "new.py").write_text("SIGN = -1\n", encoding="utf-8")
    assert fresh() != before


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own module with a helper beside it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_part.py").write_text(
        "from own_helper import factor\n\n\ndef loss(rewards_BC, *more):\n    return factor * rewards_BC.mean(-1)\n"
    )
    (tmp_path / "own_helper.py").write_text("import torch\n\nfactor = 1\n")
    yield tmp_path
    for name in ("own_part", "own_helper"):
        sys.modules.pop(name, None)


def test_a_class_of_ones_own_is_in_the_key_with_what_it_imports(own: Path) -> None:
    node = {"inside": [{"_target_": "own_part.loss"}]}
    before = target_code(node)
    assert len(before) == 2  # torch is installed: a version, not a file of the user's
    (own / "own_helper.py").write_text("import torch\n\nfactor = -1\n")
    importlib.invalidate_caches()
    assert target_code(node) != before
    (own / "own_helper.py").write_text("import torch  # a comment\n\nfactor = 1\n")
    assert target_code(node) == before
    (own / "own_part.py").write_text((own / "own_part.py").read_text().replace("factor *", "-factor *"))
    assert target_code(node) != before


def test_a_module_whose_name_begins_as_the_packages_is_followed(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "PACKAGE", own / "own")  # as massdpo_helper beside massdpo
    assert len(target_code({"_target_": "own_part.loss"})) == 2


@pytest.mark.parametrize("shown_by", ["from .inside import loss", "from own_package.inside import loss", ""])
def test_a_class_is_followed_through_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown_by: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text(f"{shown_by}\n")
    (package / "inside.py").write_text("from . import deeper\n\n\ndef loss(*_):\n    return deeper.sign\n")
    (package / "deeper.py").write_text("sign = 1\n")
    node = {"_target_": "own_package.loss" if shown_by else "own_package.inside.loss"}
    try:
        before = target_code(node)
        (package / "deeper.py").write_text("sign = -1\n")
        assert target_code(node) != before
    finally:
        for name in [name for name in sys.modules if name.startswith("own_package")]:
            del sys.modules[name]


def test_the_packages_own_classes_have_no_key_of_their_own() -> None:
    assert target_code(OmegaConf.to_container(compose([]), resolve=True)) == []


def test_the_commit_is_never_that_of_a_repository_around_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run([*around, "init", "-q"], check=True)
    subprocess.run([*around, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    for place, known in (("venv/site-packages/massdpo/runs", False), ("massdpo/runs", True)):
        (tmp_path / place).mkdir(parents=True)
        monkeypatch.setattr(machine, "__file__", str(tmp_path / place / "machine.py"))
        assert (machine.commit() != "unknown") is known, place


# --- options ---

# What decides nothing: where files are, what is told, and how quickly the same comes about.
NOTHING = {
    *("task", "size", "sweep", "name", "runs_dir", "cache_dir", "data_dir", "force", "debug", "in", "policy", "out"),
    *(
        "split",
        "study",
        "id",
        "verbosity",
        "trainer.workers",
        "trainer.checkpoint_every",
        "dataset.name",
        "dataset.terms",
    ),
}
# What comes after the SFT start.
LATER = {"k", "beta", "refresh", "trainer.picks", "trainer.generate", "trainer.save_policy"}
LATER |= {"trainer.threads"}  # the number that is used counts, and does not change with the option here
OTHER = {  # a value that is not the default, where counting up would not do
    "refresh": "once",
    "trainer.device": "auto",
    "trainer.precision": "bfloat16",
    "trainer.layout": "repeated",
    "trainer.adapter": {"r": 1, "alpha": 1, "targets": "all-linear", "stages": "one"},
    "trainer.keep": "best",
    "trainer.keep_metric": "mrr",
    "trainer.threads": 1,
    "trainer.preference.limit": 3,
    "selector.variant": "relative",
    "selector.features": "last",
    "selector.solver": "swap",
    "selector.score": "sum",
    "selector.short_pool": "all",
    "selector.exact": {},
}


def changed(config: DictConfig, key: str) -> DictConfig:
    other: DictConfig = OmegaConf.create(OmegaConf.to_container(config))  # type: ignore[assignment]
    value = OmegaConf.select(config, key)
    if key in OTHER:
        value = OTHER[key]
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, int | float):
        value = value + 1
    else:
        value = "another"
    OmegaConf.update(other, key, value, merge=False)
    return other


def options(config: DictConfig) -> list[str]:
    """Every option that a run takes, but those of content: data and model have keys of their own."""
    known = {key for key in RULES if not key.startswith(("dataset.", "model.", "logger."))}
    known |= {f"selector.{name}" for name in config.selector if not name.endswith("_")}
    return sorted(key for key in known if OmegaConf.select(config, key, default="none") != "none")


def test_an_option_is_in_a_key_where_it_can_change_a_number_and_only_there() -> None:
    config = compose([])
    start, run = keys(config)
    asked = options(config)
    assert len(asked) > 40
    for key in asked:
        other_start, other_run = keys(changed(config, key))
        assert (other_run == run) is (key in NOTHING), key
        later = key in NOTHING | LATER or key.startswith(("selector.", "trainer.preference."))
        assert (other_start == start) is later, key


def test_a_start_of_other_threads_is_found_with_the_option_that_the_note_names(monkeypatch: pytest.MonkeyPatch) -> None:
    left_open, asked_for = compose([]), compose(["trainer.threads=3"])
    other = start_key(left_open, "data", "model", HERE, 3)
    assert other != keys(left_open)[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert keys(asked_for)[0] == keys(left_open)[0] == other


def test_data_weights_and_machine_are_in_the_keys() -> None:
    config = compose([])
    found = keys(config)
    assert not set(found) & set(keys(config, data="other"))
    assert not set(found) & set(keys(config, model="other"))
    assert not set(found) & set(keys(config, machine=SimpleNamespace(device=HERE.device, num_processes=2)))
    assert keys(config)[0] != keys(config, machine=SimpleNamespace(device=torch.device("cuda"), num_processes=1))[0]


@pytest.mark.parametrize("library", ["torch", "transformers", "peft"])
def test_another_version_of_what_computes_is_in_the_keys(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    config = compose([])
    before = keys(config)
    versions = {name: provenance.version(name) for name in ("torch", "transformers", "peft")}
    monkeypatch.setattr(provenance, "version", lambda name: "9.9" if name == library else versions[name])
    assert not set(before) & set(keys(config))
    assert library in run_parts(config, "data", "model", HERE)["libraries"]


def test_the_threads_of_a_processor_that_only_feeds_a_gpu_are_in_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    config, gpu = compose([]), SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    before = keys(config, machine=gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert keys(config, machine=gpu) == before


def test_an_option_that_came_later_orphans_nothing() -> None:
    config = compose([])
    older = OmegaConf.to_container(config)
    for name in ("generate", "picks"):
        del older["trainer"][name]  # type: ignore[union-attr, call-overload, index]
    assert keys(OmegaConf.create(older)) == keys(config)  # type: ignore[arg-type]


def test_the_reference_belongs_to_the_start_it_was_computed_with(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text('{"model.safetensors": "a", "start.json": "1"}')
    config = compose([])
    found = reference_key(config, tmp_path / "one")
    assert found != reference_key(config, tmp_path / "other")
    assert found != reference_key(compose(["trainer.preference.limit=3"]), tmp_path / "one")
    (tmp_path / "one" / MANIFEST).write_text('{"model.safetensors": "a", "start.json": "2"}')  # it took longer
    assert found == reference_key(config, tmp_path / "one")
    (tmp_path / "one" / MANIFEST).write_text('{"model.safetensors": "b", "start.json": "1"}')
    assert found != reference_key(config, tmp_path / "one")


# --- model and template ---


def test_the_models_configuration_counts_where_the_weights_are_the_same(tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        source = TinyModel({"model_type": "llama", **SIZE, **options}, 300)
        return model_key(source.load(["some text"], 0, Cache(tmp_path), "text")[0])

    kinds = [{}, {"hidden_act": "gelu"}, {"num_attention_heads": 8}, {"rms_norm_eps": 0.1}]
    assert len({key(**options) for options in kinds}) == len(kinds)
    assert key() == key()


def test_a_changed_weight_counts(tmp_path: Path) -> None:
    model = TinyModel({"model_type": "llama", **SIZE}, 300).load(["some text"], 0, Cache(tmp_path), "text")[0]
    before = model_key(model)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-6  # type: ignore[union-attr, index, operator]
    assert model_key(model) != before


def test_what_a_template_makes_of_a_text_counts() -> None:
    tokenizer = learn_tokenizer(["some text"], 300)
    found = []
    for day in ("monday", "tuesday"):
        tokenizer.chat_template = "{{ day }} {% for turn in messages %}{{ turn['content'] }}{% endfor %}"
        tokenizer.init_kwargs["day"] = day
        found.append(tokenizer_key(tokenizer, True))
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}!{% endfor %}"
    assert tokenizer_key(tokenizer, True) not in found
    assert tokenizer_key(tokenizer, False) == tokenizer_key(learn_tokenizer(["some text"], 300), False)


# --- runs ---


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def test_runs_side_by_side_share_what_they_have_in_common_and_force_shares_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"cache_dir={tmp_path / 'cache'}", f"runs_dir={tmp_path / 'runs'}", "trainer.save_policy=false"]

    def train(*overrides: str) -> Path:
        return pipeline.train(compose([*TINY, *places, *overrides]))

    def kept(kind: str) -> list[tuple[str, int]]:
        """Names of the folders, and what tells one that was made anew."""
        folders = (path for path in (tmp_path / "cache" / kind).iterdir() if path.is_dir())
        return sorted((path.name, path.stat().st_ino) for path in folders)

    plain = train()
    first = {kind: kept(kind) for kind in ("prepared", "tokens", "tokenizer", "sft", "reference")}
    assert train("+model.config.hidden_act=gelu") != plain
    assert len(kept("sft")) == len(kept("reference")) == 2  # the weights are the same, the model is not
    assert kept("prepared") == first["prepared"]
    train("selector=random")
    assert len(kept("sft")) == 2
    capsys.readouterr()
    train()
    said = capsys.readouterr().out
    assert "finished already: skipped, with the same options, code, libraries, data, model" in said
    before = metrics(plain)
    train("force=true")
    for kind, folders in first.items():
        assert not set(folders) & set(kept(kind)), kind
        assert {name for name, _ in folders} <= {name for name, _ in kept(kind)}
    assert metrics(plain)["accuracy"] == before["accuracy"]


def test_the_reference_of_select_is_the_runs(tmp_path: Path) -> None:
    """Scored in the run's own precision, whoever comes first."""
    tensors = []
    for task in ("select", "train"):
        more = [f"out={tmp_path / 'out'}"] if task == "select" else ["trainer.save_policy=false"]
        run_task(
            compose(
                [
                    *TINY,
                    *more,
                    f"task={task}",
                    "trainer.precision=bfloat16",
                    f"cache_dir={tmp_path / task}",
                    f"runs_dir={tmp_path / 'runs'}",
                ]
            )
        )
        (file,) = (tmp_path / task / "reference").glob("*/train.safetensors")
        tensors.append(load_file(file)["logp_SC"])
    assert torch.equal(*tensors)
