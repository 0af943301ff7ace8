"""Whole runs on a tiny world: what they write, share and refuse, and that they repeat to the last digit."""

import csv
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from massdpo.config import compose
from massdpo.data.prepare import prepare
from massdpo.errors import UserError
from massdpo.report.status import sweep_status
from massdpo.runs import pipeline, results, start
from massdpo.store import MANIFEST, Cache, file_digest, write_json
from tests.conftest import ROOT, SHARED_DATA, needs_shared_data

TINY = [
    *("dataset.num_train=64", "dataset.num_val=16", "dataset.num_test=32"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.log_every=1", "trainer.threads=1"),
    *("logger=none", "verbosity=quiet", "trainer.save_policy=false"),
]
SELECTORS = sorted(file.stem for file in (ROOT / "conf" / "selector").glob("*.yaml"))
DRAWN = ("random", "sampled", "top_random")
LOSSES = sorted(file.stem for file in (ROOT / "conf" / "loss").glob("*.yaml"))
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tiny runs: the SFT start is trained once a seed."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def places(tmp_path: Path, cache: Path) -> list[str]:
    return [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={cache}"]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logger: str) -> Main:
    """`python run.py ...` as it stands, without the seconds of a new interpreter: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, logger])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()  # type: ignore[return-value]

    return call


def train(*overrides: str) -> Path:
    return pipeline.train(compose([*TINY, *overrides]))


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def timeless(folder: Path) -> str:
    """metrics.json without what no two runs share: times, memory, and how the run was called."""
    measured = ("seconds", "memory", "per_second", "command")
    return json.dumps({name: value for name, value in metrics(folder).items() if not any(m in name for m in measured)})


def steps(folder: Path) -> str:
    """history.csv without the columns that tell times."""
    rows = list(csv.DictReader((folder / "history.csv").open(encoding="utf-8")))
    return json.dumps(
        [{name: cell for name, cell in row.items() if "seconds" not in name and "share" not in name} for row in rows]
    )


# What a run writes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    runs = tmp_path_factory.mktemp("finished")
    return train(f"runs_dir={runs}", f"cache_dir={cache}", "trainer.save_policy=true")


def test_metrics_hold_every_promised_key(finished: Path) -> None:
    ranking = ["accuracy", "mrr"] + [f"{name}@{cut}" for name in ("recall", "ndcg") for cut in (1, 3, 5, 10)]
    ranking += [f"{name}_sum" for name in ranking]
    rewards = ["reward_accuracy", "reward_accuracy_pairwise", "margin", "margin_max", "chosen_logp_change"]
    costs = ["train_seconds", "select_seconds", "tokens_per_second", "peak_memory_mb", "threads"]
    others = ["k_effective", "git_commit", "seed"]
    found = metrics(finished)
    assert set(ranking + [f"sft/{name}" for name in ranking] + rewards + costs + others) <= set(found)
    assert not any(isinstance(value, dict | list) for value in found.values())  # flat
    assert found["accuracy"] == found["recall@1"] == found["ndcg@1"]
    assert found["k_effective"] == 4
    assert found["threads"] == 1
    assert 0 < found["select_seconds"] < found["train_seconds"]


def test_tokens_are_those_that_were_fed_and_those_that_were_learned_from(places: list[str]) -> None:
    """The whole pool is fed where it is selected from, and learned from where it is trained on."""
    found = {name: metrics(train(*places, f"selector={name}", "k=2")) for name in ("full", "random", "mass")}
    config = compose([*TINY, *places])
    data = start.load(config, Cache(Path(config.cache_dir)))[0]
    prompts = sum(len(row.prompt_ids) for row in data.train)
    pools = sum(len(response) for row in data.train for response in row.response_ids)
    chosen = sum(len(row.response_ids[0]) for row in data.train)
    assert found["full"]["train_tokens"] == found["full"]["fed_tokens"] == prompts + pools
    assert prompts + chosen < found["random"]["train_tokens"] == found["random"]["fed_tokens"] < prompts + pools / 2
    # prompts this short are fed with the pool, and again with the picks
    assert found["mass"]["fed_tokens"] - found["mass"]["train_tokens"] == prompts + pools
    assert found["mass"]["train_tokens"] < prompts + pools / 2


@pytest.mark.parametrize("part", ["model_card", "draw_history", "picks_table", "show"])
def test_what_decorates_a_run_costs_none_of_its_results(
    places: list[str], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = SystemExit if part == "show" else RuntimeError  # what rich raises where nobody reads

    def fails(*arguments: object) -> None:
        raise kind("a bomb")

    monkeypatch.setattr(results if part == "model_card" else pipeline, part, fails)
    level = "normal" if part == "show" else "quiet"
    folder = train(*places, "trainer.save_policy=true", f"name={part}", f"verbosity={level}")
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert metrics(folder) and (folder / "policy" / "model.safetensors").is_file()
    assert f"is left out ({kind.__name__}: a bomb)" in capsys.readouterr().err


def test_what_a_field_is_called_does_nothing_to_a_terminal(tmp_path: Path, places: list[str], main: Main) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"\x1b[2J\x07": "a", "prompt": 1}) + "\n")
    options = [name for name in TINY if not name.startswith("dataset.")]
    code, _, error = main(*options, *places, "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}")
    assert code == 2 and not {"\x1b", "\x07"} & set(error)


def test_pools_below_k_are_one_line(tmp_path: Path, places: list[str], main: Main) -> None:
    rows = [{"prompt": f"Say {n}", "chosen": f"{n}", "rejected": [f"not {n}"]} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [name for name in TINY if not name.startswith("dataset.")]
    data = ["dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "k=2"]
    code, _, error = main(*options, *places, *data)
    (line,) = error.strip().splitlines()
    assert code == 2 and line.startswith("error: ") and "k=2" in line


def test_a_run_leaves_its_files_and_no_others(finished: Path) -> None:
    names = {"config.yaml", "metrics.json", "history.csv", "predictions.jsonl", "history.png", "status.json", "policy"}
    names |= {"picks.jsonl"}
    assert {path.name for path in finished.iterdir()} - {".lock"} == names
    assert json.loads((finished / "status.json").read_text())["status"] == "finished"
    assert (finished / "history.png").read_bytes().startswith(b"\x89PNG")
    assert "num_train: 64" in (finished / "config.yaml").read_text()


def test_the_cache_keeps_no_checkpoints(finished: Path, cache: Path) -> None:
    assert list((cache / "sft").glob("*.checkpoints")) == []


def test_history_holds_every_promised_column(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "history.csv").open(encoding="utf-8")))
    logged = [row for row in rows if row["stage"] == "preference" and row["loss"]]
    assert [row["step"] for row in logged] == ["1", "2", "3", "4"]  # 64 prompts, 16 a step
    names = ["loss", "margin", "margin_max", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"]
    names += ["gradient_norm", "learning_rate", "selection/hardest_overlap", "select_share"]
    for row in logged:
        assert all(row[name] for name in names)
        assert 0 <= float(row["selection/hardest_overlap"]) <= 1
        assert 0 < float(row["select_share"]) < 1
    assert float(logged[0]["margin"]) == pytest.approx(0, abs=1e-4)  # step 1 is before any update
    assert float(logged[0]["loss"]) == pytest.approx(torch.log(torch.tensor(5.0)).item(), abs=1e-4)


def test_saved_policy_gives_the_scores_of_predictions(finished: Path, cache: Path) -> None:
    """Each candidate alone behind its prompt, tokenised and scored by transformers alone."""
    lines = [json.loads(line) for line in (finished / "predictions.jsonl").open(encoding="utf-8")]
    config = compose([*TINY, f"cache_dir={cache}"])
    examples = {example.id: example for example in prepare(dict(config.dataset), Cache(cache)).test}
    assert [line["id"] for line in lines] == list(examples)
    model = AutoModelForCausalLM.from_pretrained(finished / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "policy")
    for line in lines[:4]:
        example = examples[line["id"]]
        assert len(line["scores"]) == 1 + len(example.pool)
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        prompt = start + tokenizer(example.prompt, add_special_tokens=False).input_ids
        expected = []
        for response in (example.chosen, *example.pool):
            ids = [*tokenizer(" " + response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean()))
        # scores are written with six decimals; packed and single passes differ by about 1e-6 in float32
        assert line["scores"] == pytest.approx(expected, abs=2e-5)
        assert 1 <= line["rank"] <= len(expected)


def test_no_test_example_is_in_training(cache: Path) -> None:
    splits = prepare(dict(compose([f"cache_dir={cache}"]).dataset), Cache(cache))  # the default world, whole
    assert (len(splits.train), len(splits.test)) == (1600, 800)
    held_out = [*splits.test, *splits.val]
    assert not {example.id for example in splits.train} & {example.id for example in held_out}
    assert not {example.prompt for example in splits.train} & {example.prompt for example in held_out}
    assert not {example.prompt for example in splits.test} & {example.prompt for example in splits.val}


# Every combination ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", SELECTORS)
def test_selector_trains_two_steps_with_every_loss(
    selector: str, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "draw_history", lambda *_: None)  # half of such a run's time
    for loss in LOSSES:
        if (loss == "dpo" and selector == "full") or (loss == "is_pl" and selector not in DRAWN):
            continue  # refused: tests/test_config.py
        k = "k=1" if loss == "dpo" else "k=3"
        folder = train(*places, f"selector={selector}", f"loss={loss}", k, "trainer.preference.limit=32")
        rows = [row for row in csv.DictReader((folder / "history.csv").open()) if row["stage"] == "preference"]
        assert [row["step"] for row in rows if row["loss"]] == ["1", "2"]
        numbers = [value for value in metrics(folder).values() if isinstance(value, float)]
        assert torch.isfinite(torch.tensor(numbers)).all()
        assert metrics(folder)["chosen_logp_change"] != 0  # the second step's rate is not 0: something was learned
        taken = metrics(folder)["k_effective"]
        assert taken == 20 if selector == "full" else 1 <= taken <= int(k[2:])
        assert selector == "dynamic" or taken in (20, int(k[2:]))


# Same numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_same_seed_repeats_to_the_last_byte_and_workers_change_nothing(
    workers: int, finished: Path, tmp_path: Path
) -> None:
    """From the start: nothing is shared through the cache."""
    options = ["trainer.save_policy=true", f"trainer.workers={workers}"]
    again = train(f"runs_dir={tmp_path}", f"cache_dir={tmp_path}", *options)
    assert timeless(again) == timeless(finished)
    assert steps(again) == steps(finished)
    for name in ("predictions.jsonl", "policy/model.safetensors", "policy/tokenizer.json", "policy/config.json"):
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name


def test_another_seed_gives_other_numbers(finished: Path, places: list[str]) -> None:
    """Start weights, the order of the data and what is picked: no logged loss of either stage is the same."""
    other = train(*places, "seed=1")
    assert metrics(other)["seed"] == 1
    assert metrics(other)["margin"] != metrics(finished)["margin"]
    rows = [[row for row in json.loads(steps(run)) if row["loss"]] for run in (finished, other)]
    pairs = [(first, second) for first, second in zip(*rows, strict=True) if first["loss"] == second["loss"]]
    # before anything is learned all rewards are 0 and the loss is log(1 + k), whatever the seed
    assert all(first["stage"] == "preference" and first["step"] == "1" for first, _ in pairs)
    ids = [[json.loads(line)["id"] for line in (run / "predictions.jsonl").open()] for run in (finished, other)]
    assert ids[0] == ids[1]  # the test set is the dataset seed's


# Reference ------------------------------------------------------------------------------------------------------------


def test_a_stored_reference_of_another_policy_stops_the_run(tmp_path: Path, logger: str) -> None:
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    train(*places)
    (file,) = (tmp_path / "cache" / "reference").glob("*/train.safetensors")
    scores = load_file(file)
    scores["logp_SC"] += 0.01
    save_file(scores, file)
    manifest = json.loads((file.parent / MANIFEST).read_text())
    write_json(file.parent / MANIFEST, manifest | {file.name: file_digest(file)})
    with pytest.raises(UserError, match="stored reference log-probs do not belong to this policy"):
        train(*places, "name=other", "selector=random", logger)
    folder = tmp_path / "runs" / "single" / "other"
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert not (folder / "metrics.json").exists()


# A folder that is there already ---------------------------------------------------------------------------------------


def test_finished_run_is_skipped_forced_or_refused(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(*places, "name=mine")
    written = (folder / "metrics.json").stat().st_mtime_ns
    numbers = timeless(folder)
    capsys.readouterr()
    assert train(*places, "name=mine") == folder
    assert "is finished already: skipped" in capsys.readouterr().out
    assert (folder / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="holds a run with other options"):
        train(*places, "name=mine", "beta=0.1")
    assert (folder / "metrics.json").stat().st_mtime_ns == written
    kept = folder.parent / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    (folder / "policy").symlink_to(kept)
    train(*places, "name=mine", "force=true", "trainer.save_policy=true")
    assert (folder / "metrics.json").stat().st_mtime_ns > written
    assert timeless(folder) == numbers
    assert (kept / "mine.txt").read_text() == "mine" and (folder / "policy" / "model.safetensors").is_file()


# Bad input ------------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Which bird?", "chosen": "the wren", "rejected": ["the owl", "the kite"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "missing.jsonl"),
        ("", "data.jsonl"),
        (json.dumps(GOOD) + "\n" + '{"prompt": "Which', "data.jsonl:2"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"rejected": []}), "data.jsonl:2"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"rejected": ["the wren"]}), "data.jsonl:2"),
        (
            "\n".join(json.dumps(GOOD | {"prompt": f"Which bird {number}?"}) for number in range(40)),
            "selector.short_pool=all",
        ),
    ],
    ids=["missing", "empty", "bad row", "no rejected", "chosen rejected", "short pools"],
)
def test_bad_data_is_one_line_and_exit_code_2(
    text: str | None, said: str, tmp_path: Path, places: list[str], main: Main
) -> None:
    file = tmp_path / ("missing.jsonl" if text is None else "data.jsonl")
    if text is not None:
        file.write_text(text, encoding="utf-8")
    tiny = [option for option in TINY if not option.startswith("dataset.")]
    code, _, err = main(*tiny, *places, "dataset=jsonl", f"dataset.path={file}")
    errors = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert [line[:6] for line in errors if not line.startswith("warning:")] == ["error:"]
    assert said in errors[-1]
    assert list((tmp_path / "runs").rglob("metrics.json")) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["dataset.num_train=3190"], "dataset.num_train + num_val + num_test = 3238, but the knowledge base has 3200"),
        (["dataset.num_test=4000"], "dataset.num_test=4000 is not allowed: it must be between 1 and 3200"),
        (["dataset.num_negatives=60", "k=4"], "dataset.num_negatives=60 is not allowed: it must be between 1 and 50"),
        (["trainer.max_length=8"], "exceed max_length=8: raise it to at least"),
        (
            ["trainer.max_length=8", "model.config.max_position_embeddings=8"],
            "exceed max_length=8: raise it to at least",
        ),
        (["selector=adpo", "k=1", "loss=dpo", "dataset.near_duplicates=2"], "dataset.near_duplicates=2"),
    ],
    ids=["splits", "one split", "pool", "length", "context", "share"],
)
def test_what_the_data_does_not_allow_is_told_before_anything_is_trained(
    options: list[str], said: str, tmp_path: Path, places: list[str], main: Main
) -> None:
    code, _, err = main(*TINY, *places, *options)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "runs").exists()


def test_a_pretrained_models_context_is_kept_to(finished: Path, places: list[str], tmp_path: Path, logger: str) -> None:
    shutil.copytree(finished / "policy", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    with pytest.raises(UserError, match=r"trainer.max_length=1024: the model's context holds 64 tokens"):
        train(*places, "model=qwen3_0_6b", f"model.path={tmp_path / 'model'}", logger)
    assert not (tmp_path / "runs").exists()


def test_a_sweep_goes_on_after_a_failing_job_and_ends_non_zero(tmp_path: Path, places: list[str], main: Main) -> None:
    code, _, err = main("-m", *TINY, *places, "k=99,2")
    assert code == 2
    assert err.count("error:") == 1
    (file,) = (tmp_path / "runs").rglob("metrics.json")
    assert metrics(file.parent)["k_effective"] == 2
    lines, _ = sweep_status(file.parents[1])
    assert [line["state"] for line in lines] == ["finished", "failed"] and lines[1]["note"].startswith("k=99 is above")


# More than tiny -------------------------------------------------------------------------------------------------------


@needs_shared_data
def test_lastfm_for_real(places: list[str]) -> None:
    tiny = [option for option in TINY if not option.startswith("dataset.")]
    limits = ["dataset.limit_train=64", "dataset.limit_val=16", "dataset.limit_test=32"]
    raw = f"dataset.raw_dir={SHARED_DATA / 'lastfm'}"
    folder = pipeline.train(compose([*tiny, *places, "dataset=lastfm", raw, *limits]))
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").open(encoding="utf-8")]
    assert [len(line["scores"]) for line in lines] == [20] * 32
    ranks = [line["rank"] for line in lines]
    assert metrics(folder)["accuracy"] == sum(rank == 1 for rank in ranks) / 32
    assert set(ranks) <= set(range(1, 21))


@pytest.mark.slow
def test_on_the_default_world_mass_is_above_random_and_above_its_start(tmp_path: Path) -> None:
    """Means over three seeds: single seeds can flip (about 800 test prompts, a standard error of 1.7 points each)."""
    found: dict[str, list[float]] = {"mass": [], "random": [], "start": []}
    for seed in range(3):
        for selector in ("mass", "random"):
            places = [f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "logger=none"]
            result = metrics(pipeline.train(compose([*places, f"selector={selector}", f"seed={seed}"])))
            found[selector].append(result["accuracy"])
        found["start"].append(result["sft/accuracy"])
    means = {name: sum(values) / 3 for name, values in found.items()}
    assert means["mass"] > means["random"], found
    assert means["mass"] > means["start"], found
