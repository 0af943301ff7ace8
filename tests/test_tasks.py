"""Each task against the plain way: full sequences through transformers, the run's own metrics, TRL's own tokens."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from massdpo import tasks
from massdpo.config import compose
from massdpo.data.prepare import prepare
from massdpo.data.tokenize import tokenize_split
from massdpo.errors import UserError
from massdpo.model.save import load_policy
from massdpo.runs import pipeline, start
from massdpo.store import Cache, build_folder, write_json
from massdpo.tasks.evaluate import with_data_of
from massdpo.tasks.explain import _take_from
from massdpo.tasks.studies.refresh import MEASURED
from tests.conftest import ROOT
from tests.test_mcqa import question

MODEL = [
    *("model.config.hidden_size=16", "model.config.intermediate_size=16", "model.config.num_hidden_layers=1"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.eval_batch_size=7"),
]
DATA = ["dataset.num_train=40", "dataset.num_val=8", "dataset.num_test=30", "dataset.num_negatives=8"]
MINE = "choices: {dataset: mine}\n"
Call = Callable[..., int]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def call(home: Path) -> Call:
    """What `python run.py` does with these overrides, in this process; returns the exit status."""

    def run_py(*overrides: str) -> int:
        given = [*MODEL, *([] if "dataset=qasc" in overrides else DATA), *overrides]
        given = [f"cache_dir={home / 'cache'}", f"runs_dir={home / 'runs'}", *given]
        HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"overrides": {"task": given}}})  # type: ignore[assignment]
        try:
            tasks.run(compose(given))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            HydraConfig.instance().cfg = None
        return 0

    return run_py


@pytest.fixture(scope="module")
def trained(call: Call, home: Path) -> Path:
    assert call("name=trained", "logger=none") == 0
    return home / "runs" / "single" / "trained"


def plain_scores(policy: Path, prompt: str, candidates: list[str]) -> list[float]:
    """Mean log-prob of each response's tokens: one full sequence at a time, with `transformers` alone."""
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    scores = []
    for text in candidates:
        before = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        space = "" if prompt[-1:].isspace() or text[:1].isspace() else " "
        response = [*tokenizer.encode(space + text, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            logp_TV = model(torch.tensor([before + response])).logits[0].double().log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(response) - 1)
        scores.append(
            sum(float(logp_TV[at, token]) for at, token in zip(places, response, strict=True)) / len(response)
        )
    return scores


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# evaluate -------------------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_runs_own_metrics(
    call: Call, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert call("task=evaluate", f"in={trained}", f"out={out}") == 0
    found, own = json.loads(out.read_text()), json.loads((trained / "metrics.json").read_text())
    assert {"accuracy", "mrr", "ndcg@5", "accuracy_sum"} <= found.keys()
    metrics = found.keys() - {"run", "dataset", "data", "prompts"}
    for name in metrics:
        assert found[name] == pytest.approx(own[name], abs=1e-6), name
    assert found["prompts"] == 30
    page = capsys.readouterr()
    assert "mrr_sum" in page.out and "warning" not in page.err


def test_only_options_of_the_dataset_change_the_runs_data(tmp_path: Path) -> None:
    """Others may have the same last word: seed, name, split."""
    (run := tmp_path / "run").mkdir()
    config = compose([*DATA, "dataset.seed=5"])
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    for given, seed in ((["seed=7", "name=other"], 5), (["dataset.seed=6"], 6)):
        HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"overrides": {"task": given}}})  # type: ignore[assignment]
        try:
            found = with_data_of(run, compose([*DATA, *given])).dataset
        finally:
            HydraConfig.instance().cfg = None
        assert found == OmegaConf.merge(config.dataset, {"seed": seed})


@pytest.mark.parametrize(("given", "k"), [("k=3", 3), ("++k=3", 3), ("beta=2", 5)])
def test_explain_takes_from_the_run_what_the_command_line_leaves_open(tmp_path: Path, given: str, k: int) -> None:
    (tmp_path / "config.yaml").write_text("k: 5\n")
    config = compose([given])
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"overrides": {"task": [given]}}})  # type: ignore[assignment]
    try:
        _take_from(tmp_path, config)
    finally:
        HydraConfig.instance().cfg = None
    assert config.k == k


def test_evaluate_runs_nothing_of_a_foreign_folder_and_uses_its_tokenizer(
    call: Call, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another dataset would train another tokenizer; the policy is scored with its own, as the plain way does."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "policy").symlink_to(trained / "policy")
    mark = tmp_path / "ran"
    node = f"{{_target_: pathlib.Path.touch, self: {mark}}}"
    bad = f"model: {node}\ndataset: {{_target_: os.system, command: touch {mark}}}\n"
    bad += f"trainer: {{max_length: 512, chat_template: !!python/object/apply:os.mkdir ['{mark}']}}\n"
    (foreign / "config.yaml").write_text(bad)
    out = tmp_path / "found.json"
    other = ["dataset.seed=3", "dataset.num_test=12"]
    assert call("task=evaluate", f"in={foreign}", f"out={out}", *other) == 0
    assert not mark.exists()
    dataset = dict(compose([*MODEL, *DATA, *other]).dataset)
    ranks = []
    for example in prepare(dataset, Cache(tmp_path)).test:
        scores = plain_scores(trained / "policy", example.prompt, [example.chosen, *example.pool])
        ranks.append(1 + sum(score > scores[0] for score in scores[1:]))
    assert json.loads(out.read_text())["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), abs=1e-6)

    (foreign / "config.yaml").write_text("trainer: {max_length: 512, chat_template: false}\n")
    capsys.readouterr()
    assert call("task=evaluate", f"in={foreign}", *other) == 0
    assert "trained with trainer.max_length=512" in capsys.readouterr().err


def test_evaluate_takes_the_runs_own_data_unless_told_otherwise(
    call: Call, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = f"cache_dir={tmp_path / 'cache'}"
    assert call("name=recommends", "dataset=synthetic_rec", "logger=none", elsewhere) == 0
    run, out = trained.parent / "recommends", tmp_path / "found.json"
    assert call("task=evaluate", f"in={run}", f"out={out}") == 0
    found, own = json.loads(out.read_text()), json.loads((run / "metrics.json").read_text())
    assert found["dataset"] == "synthetic_rec"
    assert [found[name] for name in ("mrr", "ndcg@5")] == pytest.approx([own[name] for name in ("mrr", "ndcg@5")])
    assert call("task=evaluate", f"in={run}", f"out={out}", "dataset=synthetic_mcqa") == 0
    assert json.loads(out.read_text())["dataset"] == "synthetic_mcqa"
    assert call("task=evaluate", f"in={run}", f"out={out}", "dataset.limit_test=9") == 0
    assert json.loads(out.read_text())["prompts"] == 9 and json.loads(out.read_text())["dataset"] == "synthetic_rec"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("choices: {dataset: mine}\ndataset: {_target_: os.system, command: ls}", "a reader that is not massdpo's"),
        (
            "choices: {dataset: mine}\ndataset: {_target_: massdpo.data.readers.synthetic.SyntheticMCQA, hi: 1}",
            "dataset.hi",
        ),
        (MINE + "a: &a [1]\nb: [*a, *a]", "does not say what it was trained on"),
        ("[" * 10_000, "does not say what it was trained on"),
    ],
    ids=["code", "option", "alias", "nesting"],
)
def test_the_config_of_a_foreign_run_is_only_data(
    call: Call, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, says: str
) -> None:
    (tmp_path / "policy").symlink_to(trained / "policy")
    (tmp_path / "config.yaml").write_text(config)
    call("task=evaluate", f"in={tmp_path}")
    assert says in capsys.readouterr().err


def test_evaluate_without_a_policy(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("task=evaluate", f"in={tmp_path}") == 2
    assert f"there is no policy in {tmp_path / 'policy'}" in capsys.readouterr().err


# rank -----------------------------------------------------------------------------------------------------------------

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "name the home of noble crane:", "candidates": ["quiet plateau", "a", "ruby ring of the far east"]},
    {"prompt": "x ", "candidates": [" only one "], "id": 7},
    {"prompt": "a much longer prompt than the other two have:", "candidates": ["ß", "日本", "", "b"][:2], "scores": 1},
    {"prompt": "last", "candidates": ["same", "other", "same"]},
]


def test_rank_orders_by_the_plain_score(call: Call, trained: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(line) for line in QUESTIONS), encoding="utf-8")
    policy = trained / "policy"
    # three lines a batch: one batch is not full, and lines of different lengths share one
    assert call("task=rank", f"in={source}", f"out={out}", f"policy={policy}", "trainer.eval_batch_size=3") == 0
    answers = read_lines(out)
    assert [answer["prompt"] for answer in answers] == [line["prompt"] for line in QUESTIONS]
    assert answers[1]["id"] == 7
    for line, answer in zip(QUESTIONS, answers, strict=True):
        texts = line["candidates"]
        plain = plain_scores(policy, str(line["prompt"]), texts)
        order = sorted(range(len(texts)), key=lambda place: -plain[place])
        assert answer["candidates"] == [texts[place] for place in order]
        # float32 sums of a handful of log-probs near 6 against float64
        assert answer["scores"] == pytest.approx([plain[place] for place in order], abs=1e-5)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"candidates": ["a"]}', 'no "prompt"'),
        ('{"prompt": "p"}', '"candidates" must be a list'),
        ('{"prompt": "p", "candidates": []}', '"candidates" must be a list'),
        ('{"prompt": "p", "candidates": ["a", 1]}', '"candidates" must be a list'),
        ('{"prompt": " ", "candidates": ["a"]}', "the prompt is empty"),
        ('{"prompt": "p", "candidates": ["a", " "]}', "a response is empty"),
        ('{"prompt": "p", "candidates": ["a"], "note": NaN}', "NaN and Infinity"),
        (json.dumps({"prompt": "p", "candidates": ["long " * 2000]}), "max_length"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    call: Call, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(QUESTIONS[0]) + "\n\n" + line + "\n")
    options = [f"in={source}", f"out={out}", f"policy={trained / 'policy'}", "trainer.eval_batch_size=1"]
    assert call("task=rank", *options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {source}:3: ") and says in error
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.timeout(120)  # an answer that never comes
def test_rank_answers_each_line_of_a_pipe(call: Call, trained: Path, home: Path) -> None:
    options = ["in=-", "out=-", f"policy={trained / 'policy'}", "trainer.eval_batch_size=1", f"cache_dir={home}"]
    command = [sys.executable, str(ROOT / "run.py"), "task=rank", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in QUESTIONS:
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())  # before the next line is sent
            assert sorted(answer["candidates"]) == sorted(line["candidates"])
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait() == 0


def test_rank_without_a_policy(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("task=rank", "in=a", "out=b") == 2
    assert "task=rank needs policy=the folder of a trained policy" in capsys.readouterr().err
    assert call("task=rank", "in=a", "out=b", f"policy={tmp_path / 'none'}") == 2
    assert "there is no policy in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def talks(trained: Path, home: Path) -> Path:
    """A policy whose tokenizer has a chat template."""
    folder = home / "talks"
    shutil.copytree(trained / "policy", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] + '\n' }}{% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_rank_reads_messages_and_says_what_a_policy_was_trained_with(
    call: Call, talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, replies = "What is it?", ["a stone", "a bird"]
    messages = [{"role": "user", "content": asked}]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "candidates": replies}) + "\n" for p in (asked, messages)))
    options = ["task=rank", f"in={file}", f"out={out}", f"policy={talks}", "trainer.max_length=256"]
    assert call(*options, "trainer.chat_template=true") == 0
    text, listed = read_lines(out)
    assert text["scores"] == listed["scores"]
    assert listed["prompt"] == messages
    (talks.parent / "config.yaml").write_text("trainer: {chat_template: true}\n")
    capsys.readouterr()
    assert call(*options) == 0
    assert "the run was trained with trainer.chat_template=True" in capsys.readouterr().err
    (talks.parent / "config.yaml").unlink()


def test_rank_reads_a_socket_in_any_locale_and_outlives_its_reader(trained: Path, home: Path) -> None:
    """What a Node program gives its children as stdin is a socket; it may leave while answers are on their way."""
    ours, theirs = socket.socketpair()
    options = ["in=-", "out=-", f"policy={trained / 'policy'}", "trainer.eval_batch_size=1", f"cache_dir={home}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "task=rank", *options],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    theirs.close()
    assert process.stdout is not None and process.stderr is not None
    ours.sendall(json.dumps({"prompt": "Où?", "candidates": ["là", "ici"]}).encode() + b"\n")
    assert sorted(json.loads(process.stdout.readline())["candidates"]) == ["ici", "là"]
    process.stdout.close()
    ours.sendall(b'{"prompt": "a", "candidates": ["b"]}\n' * 3)
    ours.close()
    error = process.stderr.read().decode()
    assert process.wait() == 2
    assert error.splitlines() == ["error: out=- cannot be written (Broken pipe)"]


def test_a_table_is_shown_in_any_locale(trained: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "run.py"), "task=show", f"in={trained}"]
    shown = subprocess.run(command, env=os.environ | ascii_only | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert shown.returncode == 0, shown.stderr
    assert b"accuracy" in shown.stdout and b"next: " in shown.stdout


# select ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def selected(call: Call, home: Path) -> Path:
    """The three that the SFT policy finds likeliest: what the plain way can check."""
    assert call("task=select", f"out={home / 'selected'}", "selector=hardest_logp", "k=3") == 0
    return home / "selected"


def training_split(home: Path) -> Any:
    return prepare(dict(compose([*MODEL, *DATA]).dataset), Cache(home / "cache")).train


def test_select_picks_under_the_sft_policy(selected: Path, home: Path) -> None:
    (start,) = (file.parent for file in (home / "cache" / "sft").glob("*/start.json"))  # one, shared with `trained`
    rows = read_lines(selected / "train.jsonl")
    examples = training_split(home)
    assert len(rows) == len(examples) == 40
    for row, example in zip(rows, examples, strict=True):
        assert (row["prompt"], row["chosen"]) == (example.prompt, example.chosen)
        assert row["rejected"] == [example.pool[place] for place in row["rejected_index"]]
        assert row["responses"] == [example.chosen, *row["rejected"]]
    for row, example in list(zip(rows, examples, strict=True))[:6]:
        plain = plain_scores(start, example.prompt, list(example.pool))
        assert row["rejected_index"] == sorted(range(8), key=lambda place: -plain[place])[:3]


def test_the_three_forms_hold_the_same(selected: Path) -> None:
    rows = read_lines(selected / "train.jsonl")
    assert list(datasets.load_from_disk(str(selected / "dataset"))) == rows
    pairs = [
        {"prompt": row["prompt"], "chosen": " " + row["chosen"], "rejected": " " + rejected}
        for row in rows
        for rejected in row["rejected"]
    ]
    assert read_lines(selected / "pairs.jsonl") == pairs


def test_select_with_a_chat_template_exports_messages(talks: Path, home: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {n}"}],
         "chosen": f"{n}", "rejected": [f"{n + 1}", f"{n + 2}"]}
        for n in range(20)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.run(
        compose([
            "task=select", "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "model=smollm2_135m",
            f"model.path={talks}", "trainer.chat_template=true", "trainer.max_length=256", "trainer.sft.epochs=0",
            "selector=random", "k=1", f"out={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache'}", "logger=none",
        ])
    )  # fmt: skip
    given = {row["chosen"]: row for row in rows}
    for row in read_lines(tmp_path / "out" / "train.jsonl"):
        (answer,) = row["chosen"]
        assert answer["role"] == "assistant" and row["prompt"] == given[answer["content"]]["prompt"]
        assert all(turn["content"] in given[answer["content"]]["rejected"] for (turn,) in row["rejected"])
    pair = read_lines(tmp_path / "out" / "pairs.jsonl")[0]
    assert [type(pair[name]) for name in ("prompt", "chosen", "rejected")] == [list] * 3
    assert len(datasets.load_from_disk(str(tmp_path / "out" / "dataset"))) == len(
        read_lines(tmp_path / "out" / "train.jsonl")
    )


def test_selecting_again_replaces_its_own_result_only(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for k in (1, 2):
        assert call("task=select", f"out={out}", f"k={k}", "selector=random") == 0
        assert {len(set(row["rejected"])) for row in read_lines(out / "train.jsonl")} == {k}
    (out / "mine.txt").write_text("mine")
    assert call("task=select", f"out={out}") == 2
    assert "was not written by task=select" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"
    build_folder(tmp_path / "policy", lambda folder: (folder / "model.safetensors").write_text("weights"))
    assert call("task=select", f"out={tmp_path / 'policy'}") == 2  # whole, but something else
    assert (tmp_path / "policy" / "model.safetensors").exists()


def test_trl_sees_our_tokens_and_takes_a_step(selected: Path, home: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    (start,) = (file.parent for file in (home / "cache" / "sft").glob("*/start.json"))
    model, tokenizer = load_policy(start)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    config = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, max_length=None,
        learning_rate=1e-3,
    )  # fmt: skip
    pairs = datasets.load_dataset("json", data_files=str(selected / "pairs.jsonl"), cache_dir=str(tmp_path))["train"]
    trainer = DPOTrainer(model=model, args=config, train_dataset=pairs, processing_class=tokenizer)
    rows = read_lines(selected / "train.jsonl")
    ours = tokenize_split(training_split(home), tokenizer, 512)
    assert trainer.train_dataset is not None and trainer.model is not None
    seen = iter(trainer.train_dataset)
    for row, example in zip(rows, ours, strict=True):
        for place in row["rejected_index"]:
            theirs = next(seen)
            assert theirs["prompt_ids"] == example.prompt_ids
            assert theirs["chosen_ids"] == example.response_ids[0]
            assert theirs["rejected_ids"] == example.response_ids[1 + place]
    result = trainer.train()
    assert result.global_step == 1
    # the reference is the policy as it starts: every reward is 0, and the loss log 2
    assert result.training_loss == pytest.approx(0.693147, abs=1e-4)
    assert any(not torch.equal(before[name], weight.cpu()) for name, weight in trainer.model.named_parameters())


# inspect --------------------------------------------------------------------------------------------------------------


def test_inspect_trains_nothing_and_tells_what_was_cut(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (pipeline, start):
        monkeypatch.setattr(module, "fit", None)
    out = tmp_path / "val.jsonl"
    cut = ["dataset=synthetic_rec", "dataset.history=20", "trainer.max_length=50"]
    assert call("task=inspect", "split=val", f"out={out}", *cut) == 0
    page = capsys.readouterr()
    config = compose([*MODEL, *DATA, *cut])
    splits = prepare(dict(config.dataset), Cache(tmp_path))
    assert [line["prompt"] for line in read_lines(out)] == [example.prompt for example in splits.val]
    line = next(line for line in page.out.splitlines() if "prompts_truncated" in line)
    counts = dict(part.split() for part in line.split(":")[1].split(","))
    assert int(counts["train"]) > 0
    assert f"warning: train: {counts['train']} of 40 prompts lost the oldest part" in page.err


def test_inspect_says_which_data_validation_and_test_are(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 20), ("dev", 5)):
        rows = [question(f"{name}{row}", [f"{name} {row} {place}" for place in range(4)]) for row in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"dataset.raw_dir={tmp_path}", "dataset.num_negatives=own", "k=3", "dataset.val_size=4"]
    assert call("task=inspect", "dataset=qasc", *given) == 0
    page = capsys.readouterr().out
    assert "test_is: the official labelled split dev.jsonl" in page
    assert "val_is: 4 questions held out of train.jsonl" in page


# study ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "small"),
    [
        ("optimality", {"ks": (1, 2), "pools": (6,), "ridges": (1.0,), "prompts": 5}),
        ("loglinear", {"seeds": 2, "prompts": (10,), "ks": (1,), "middle": (10, 1), "rounds": (1,), "size": 4}),
    ],
)
def test_a_study_writes_its_table_and_figure(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    study: str,
    small: dict[str, Any],
) -> None:
    module = importlib.import_module(f"massdpo.tasks.studies.{study}")
    monkeypatch.setattr(module, study, partial(getattr(module, study), **small))
    assert call("task=study", f"study={study}", f"out={tmp_path / 'out'}") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"{study}.{end}" for end in ("csv", "md", "png", "svg")
    }
    page = (tmp_path / "out" / f"{study}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {study}\n") and page in capsys.readouterr().out
    source = page.splitlines()[-1]  # what it takes to compute it again
    assert f"task=study study={study}" in source and "Commit" in source and torch.__version__ in source


def test_the_refresh_study_runs_each_kind_with_each_seed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train(config: Any) -> Path:
        assert (config.task, config.study, config.out, config.k) == ("train", None, None, 2)
        asked.append((config.refresh, config.seed))
        folder = tmp_path / f"{config.refresh}{config.seed}"
        write_json(folder / "metrics.json", dict.fromkeys(MEASURED, float(config.seed)) | {"machine": "m"})
        return folder

    monkeypatch.setattr(pipeline, "train", train)
    assert call("task=study", "study=refresh", f"out={tmp_path / 'out'}", "k=2", "seed=5") == 0
    assert sorted(asked) == [(kind, seed) for kind in ("epoch", "once", "step") for seed in range(5, 10)]
    header, *rows = (tmp_path / "out" / "refresh.csv").read_text().splitlines()
    assert header.split(",") == ["refresh", "seed", *MEASURED] and len(rows) == 15


@pytest.mark.slow
def test_the_features_study_compares_before_and_after(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("massdpo.tasks.study.PROMPTS", 8)
    monkeypatch.setattr("massdpo.tasks.study.SEEDS", 2)
    assert call("task=study", "study=features", f"out={tmp_path}", "k=2") == 0
    rows = [line.split(",") for line in (tmp_path / "features.csv").read_text().splitlines()[1:]]
    assert {(row[1], row[2]) for row in rows} == {(seed, stage) for seed in "01" for stage in ("before", "after")}
    assert len(rows) == 2 * 2 * 2 * 5 * 8  # ridges, seeds, stages, kinds of features, prompts
