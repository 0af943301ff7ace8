"""Whole runs from a model on disk, as pretrained ones come: adapters, chat templates, the saved policy and its card."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from massdpo import tasks
from massdpo.config import compose, resolved
from massdpo.data.batches import collate
from massdpo.data.prepare import prepare
from massdpo.data.schema import Splits
from massdpo.data.tokenize import tokenize_split
from massdpo.data.tokens import TokenizedSplit
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitLogps, SplitScorer
from massdpo.model.load import PretrainedModel
from massdpo.model.save import add_adapter, save_policy
from massdpo.model.scoring import PreferenceScorer
from massdpo.model.scratch import TinyModel
from massdpo.runs import launch, pipeline
from massdpo.runs.card import model_card
from massdpo.runs.shown import SHOWN
from massdpo.selection import Full
from massdpo.store import Cache
from massdpo.training.losses import pl
from massdpo.training.objectives import Preference, Sft
from tests.conftest import ROOT
from tests.test_models import ADAPTER, FAMILIES, load_tiny, option

ANSWERS = ["zuq elba", "zuq elba norte", "Pimvo", "drastil hox", "ymmer", "qonda 7", "bref ossu"]
RUN = [
    *("model=qwen3_0_6b", "trainer=lora", "k=2", "logger=none", "trainer.threads=1", "trainer.max_length=256"),
    *("trainer.batch_size=4", "trainer.accumulate=2", "trainer.sft.epochs=1", "trainer.log_every=1"),
    *("trainer.sft.learning_rate=0.01", "trainer.preference.learning_rate=0.01", "trainer.adapter.r=4"),
    "trainer.generate=true",
]
WAYS = {
    "plain": ["trainer.precision=float32", "trainer.device=cpu"],
    "chat": ["trainer.chat_template=true", "trainer.adapter.stages=two", "trainer.device=cpu"],  # in bfloat16
}
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def data(home: Path) -> list[str]:
    """Questions whose answer follows from their last word, four in five times: some are learned, some are not."""
    for split, count in (("train", 40), ("val", 10), ("test", 25)):
        lines = []
        for row in range(count):
            answer = ANSWERS[(row % 7 + (row % 5 == 4)) % 7]
            others = [other for other in ANSWERS if other != answer]
            lines.append({"prompt": f"{split} {row}: what is like {row % 7}?", "chosen": answer, "rejected": others})
        (home / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = (f"dataset.{key}={home / name}.jsonl" for key, name in (("path", "train"), ("val_path", "val")))
    return ["dataset=jsonl", *paths, f"dataset.test_path={home / 'test.jsonl'}"]


@pytest.fixture(scope="module")
def splits(data: list[str], home: Path) -> Splits:
    return prepare(dict(compose(data).dataset), Cache(home))


@pytest.fixture(scope="module")
def stand_in(splits: Splits, home: Path) -> Path:
    """A small Qwen3 that has seen the questions, its tokenizer with a chat template, and a card: as if downloaded."""
    texts = [f"{example.prompt} {example.chosen}" for example in splits.train]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model, tokenizer = TinyModel(option("tiny_qwen").options | small, 500).load(texts, 0, Cache(home))
    tokenizer.chat_template = TEMPLATE
    rows = [row for chat in (False, True) for row in tokenize_split(splits.train, tokenizer, 256, chat)]
    batch, scorer = collate(list(enumerate(rows)), 0), PreferenceScorer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    objective = Sft(rows, rows, SplitScorer(Accelerator(cpu=True), 16, 0))
    for _ in range(40):
        objective.loss(scorer, batch, 0, False)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    card = "---\nlicense: other\nlicense_name: its-own\nlicense_link: https://example.org/terms\n---\n# Theirs\n"
    save_policy(model, tokenizer, home / "a_downloaded_model", card)
    return home / "a_downloaded_model"


@pytest.fixture(scope="module", params=WAYS)
def trained(request: pytest.FixtureRequest, stand_in: Path, data: list[str], home: Path) -> tuple[str, Path]:
    places = [f"model.path={stand_in}", f"cache_dir={home / request.param}", f"runs_dir={home / 'runs'}"]
    return request.param, pipeline.train(compose([*RUN, *data, *WAYS[request.param], *places, f"name={request.param}"]))


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def rows_of(way: str, splits: Splits, policy: Path) -> TokenizedSplit:
    return tokenize_split(splits.test, AutoTokenizer.from_pretrained(policy), 256, way == "chat")


# The run --------------------------------------------------------------------------------------------------------------


def test_the_reference_includes_the_sft(trained: tuple[str, Path], stand_in: Path, splits: Splits, home: Path) -> None:
    """Rewards are 0 at step 0, though the SFT has moved the log-probs away from those of the model without adapter."""
    way, run = trained
    with open(run / "history.csv", newline="", encoding="utf-8") as file:
        first = next(row for row in csv.DictReader(file) if row["stage"] == "preference")
    # beta 0.5 times the difference of two passes' summed log-probs: rounding, of which there is more in bfloat16
    tolerance = {"plain": 1e-5, "chat": 0.01}[way]
    for name in ("chosen_reward", "rejected_reward", "margin"):
        assert float(first[name]) == pytest.approx(0, abs=tolerance)
    (reference,) = (home / way / "reference").glob("*/test.safetensors")
    before = PretrainedModel("a/b", str(stand_in)).model()
    scores = SplitScorer(Accelerator(cpu=True), 20, 0)(PreferenceScorer(before), rows_of(way, splits, stand_in), "")
    assert (SplitLogps.load(reference).logp_SC - scores.logp_SC).abs().mean() > 0.1


def test_the_policy_loads_by_itself_and_scores_the_same(trained: tuple[str, Path], splits: Splits) -> None:
    way, run = trained
    loaded = AutoModelForCausalLM.from_pretrained(run / "policy")  # peft's adapter, and its base from where it lies
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    rows = rows_of(way, splits, run / "policy")
    accelerator = launch.start(compose([*RUN, *WAYS[way]]))
    scorer = accelerator.prepare_model(PreferenceScorer(loaded), evaluation_mode=True)
    scores = SplitScorer(accelerator, 16, 0)(scorer, rows, "")
    for line, mean_logp_C in zip(lines, scores.mean_logp_SC, strict=True):
        assert line["scores"] == pytest.approx(mean_logp_C.tolist(), abs=1e-6)


def test_evaluate_gives_the_runs_own_metrics(
    trained: tuple[str, Path], data: list[str], tmp_path: Path, home: Path
) -> None:
    way, run = trained
    places = [f"in={run}", f"out={tmp_path / 'found.json'}", f"cache_dir={home / 'other cache'}"]
    tasks.run(compose([*RUN, *data, *WAYS[way], "task=evaluate", *places]))
    found, own = read(tmp_path / "found.json"), read(run / "metrics.json")
    for name in found.keys() - {"run", "dataset", "data", "prompts"}:
        assert found[name] == pytest.approx(own[name], abs=1e-6), name
    assert {"accuracy", "mrr_sum", "hr@1", "valid_ratio", "hr@1_constrained", "constrained_agreement"} <= found.keys()


def test_what_was_generated_is_what_the_policy_writes(trained: tuple[str, Path], splits: Splits) -> None:
    """One text at a time, with `transformers` alone, compared as texts."""
    way, run = trained
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    named = []
    for example in splits.test:
        turn = [{"role": "user", "content": example.prompt}]
        chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        text = chat if way == "chat" else f"<|bos|>{example.prompt}"
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.autocast("cpu", enabled=way == "chat"):
            output = model.generate(**inputs, max_new_tokens=20)[0, inputs.input_ids.shape[1] :]
        wrote = tokenizer.decode(output, skip_special_tokens=True).strip()
        named.append([place for place, text in enumerate([example.chosen, *example.pool]) if text == wrote])
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["generated"] for line in lines] == named
    found = read(run / "metrics.json")
    assert found["hr@1"] == pytest.approx(sum(places == [0] for places in named) / 25)
    assert found["valid_ratio"] == pytest.approx(sum(map(bool, named)) / 25)
    assert 0 < found["hr@1"] <= found["valid_ratio"] < 1  # something was learned, and not everything


def test_one_models_weights_are_in_memory_after_the_sft(
    stand_in: Path, data: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that the run started from lets go of its weights before the policy is loaded."""
    models, held = [], []
    load, load_start = pipeline.load, pipeline.load_start

    def loading(*given: Any) -> Any:
        models.append(load(*given))
        return models[0]

    def starting(*given: Any) -> Any:
        held.append(sum(weight.numel() for weight in models[0][1].parameters()))
        return load_start(*given)

    monkeypatch.setattr(pipeline, "load", loading)
    monkeypatch.setattr(pipeline, "load_start", starting)
    places = [f"model.path={stand_in}", f"cache_dir={home / 'memory'}", f"runs_dir={home / 'runs'}", "name=memory"]
    pipeline.train(compose([*RUN, *data, *WAYS["plain"], *places, "trainer.generate=false"]))
    assert held == [0]


def test_sharded_weights_are_not_decoded_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="task=evaluate in=RUN"):
        launch.start(compose(["trainer.generate=true"]))
    launch.start(compose([]))


# The card -------------------------------------------------------------------------------------------------------------


def test_the_card_is_filled_in_and_tells_no_data_and_no_place(
    trained: tuple[str, Path], splits: Splits, home: Path
) -> None:
    _, run = trained
    card = ModelCard.load(run / "policy" / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert {"massdpo", "lora"} <= set(card.data.tags)
    terms = card.data.license, card.data.license_name, card.data.license_link
    assert terms == ("other", "its-own", "https://example.org/terms")  # as the base's own card says
    assert card.data.base_model == "Qwen/Qwen3-0.6B"  # by its name, never by the folder
    metrics = read(run / "metrics.json")
    for name in (*SHOWN, "hr@1", "constrained_agreement"):
        assert re.search(rf"\| {re.escape(name)} \|.*\| {metrics[name]:.4f} \|", card.content), name
    for told in (run.name, "jsonl", "LoRA, rank 4", "`mass`, k = 2", "beta = 0.5", "40 prompts", "25 prompts"):
        assert told in card.content
    for example in [*splits.train, *splits.val, *splits.test]:
        assert example.prompt not in card.content and example.chosen not in card.content
    assert str(home) not in card.content and "downloaded" not in card.content
    assert "<!--" not in card.content and "More Information Needed" not in card.content  # peft's template


def test_the_cards_own_code_runs(trained: tuple[str, Path], splits: Splits, capsys: pytest.CaptureFixture[str]) -> None:
    way, run = trained
    (code,) = re.findall(r"```python\n(.*?)```", (run / "policy" / "README.md").read_text(), re.DOTALL)
    example = splits.test[0]
    code = code.replace('folder = "."', f"folder = {str(run / 'policy')!r}")
    names: dict[str, Any] = {}
    exec(code.replace('"Your prompt:"', repr(example.prompt)), names)
    assert capsys.readouterr().out.strip() == names["answer"]
    # the tokens that the model was trained on
    (row,) = tokenize_split([example], names["tokenizer"], 256, way == "chat")
    assert names["inputs"].input_ids[0].tolist() == row.prompt_ids


@pytest.mark.parametrize(
    ("overrides", "front", "told"),
    [
        (
            ["model=llama3_2_1b", "trainer=lora", "dataset=openbookqa"],
            {"base_model": "meta-llama/Llama-3.2-1B-Instruct", "base_model_relation": "adapter", "library_name": "peft",
             "datasets": ["allenai/openbookqa"], "license": "llama3.2"},
            ["Terms of these data: OpenBookQA, Allen Institute for AI: Apache 2.0", "commit 0123456789"],
        ),
        (
            ["model=qwen2_5_1_5b", "dataset=lastfm", "method=sft"],
            {"base_model": "Qwen/Qwen2.5-1.5B-Instruct", "base_model_relation": "finetune"},
            ["non-commercial use only", "| preference stage | none |", "all trained"],
        ),
        (
            ["model=gemma3_270m_q4"],
            {"library_name": "transformers"},
            ["gguf-part1==1.0.0", "terms: the Gemma Terms of Use", ", dequantised from Q4_1"],
        ),
        (["selector=full"], {"library_name": "transformers"}, ["none: random weights", "without terms", "| `full`; "]),
        (["dataset=jsonl", "dataset.path=mine.jsonl"], {}, ["its author's own data", "not known here"]),
    ],
)  # fmt: skip
def test_the_cards_front_matter(
    overrides: list[str], front: dict[str, Any], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Llama in the hub's cache, in the hub's own layout, and Qwen not there."""
    repository = tmp_path / "models--meta-llama--Llama-3.2-1B-Instruct"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "README.md").write_text("---\nlicense: llama3.2\nlanguage: en\n---\n# Llama\n")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    metrics = dict.fromkeys(SHOWN, 0.25)
    counts, blocks = {"train": 7, "preference": 5, "test": 3}, "Q4_1" if "q4" in overrides[0] else None
    text = model_card(resolved(compose(overrides)), metrics, counts, "a-run", blocks)
    (tmp_path / "README.md").write_text(text)
    found = yaml.safe_load(text.split("---")[1])
    assert {name: found.get(name) for name in front} == front
    assert ("license" in found) == ("license" in front) and ("base_model" in found) == ("base_model" in front)
    assert all(part in text for part in told)
    assert "mine.jsonl" not in text
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == found  # as the hub reads it


# The families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_disk_learns_in_one_step_of_either_stage(
    family: str, adapter: bool, splits: Splits, tmp_path: Path
) -> None:
    save_policy(*load_tiny(family, tmp_path), tmp_path / "saved")
    model, tokenizer = PretrainedModel("a/b", str(tmp_path / "saved")).load([], 0, Cache(tmp_path))
    policy: Any = add_adapter(model, ADAPTER, 0) if adapter else model
    rows = tokenize_split(splits.train[:16], tokenizer, 512)
    batch = collate(list(enumerate(rows)), 0)
    scorer = PreferenceScorer(policy)

    def step(objective: Any) -> tuple[float, float]:
        """The batch's loss before and after one optimiser step on it, short enough to go downhill."""
        trained = [weight for weight in scorer.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        before = objective.loss(scorer, batch, 0, False)[0].mean()
        before.backward()
        optimizer.step()
        optimizer.zero_grad()
        return before.item(), objective.loss(scorer, batch, 0, False)[0].mean().item()

    score_split = SplitScorer(Accelerator(cpu=True), 16, 0)
    before, after = step(Sft(rows, rows, score_split))
    assert after < before
    reference = {"train": score_split(scorer, rows, "")}
    before, after = step(Preference(Full(), pl, 0.5, "step", 0, rows, rows, reference, score_split))
    assert before == pytest.approx(torch.tensor(7.0).log().item(), abs=1e-4)  # every reward is 0: log(1 + 6)
    assert after < before


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_an_adapter_and_generate_as_one(stand_in: Path, data: list[str], tmp_path: Path) -> None:
    """As README says for several GPUs, on two CPU processes; then one process evaluates what they left."""
    run, own = tmp_path / "runs" / "single" / "run", [*RUN, *data, *WAYS["plain"], f"cache_dir={tmp_path / 'cache'}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "run.py"), *own, f"model.path={stand_in}", f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run([*command, "name=run"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    tasks.run(compose([*own, "task=evaluate", f"in={run}", f"out={tmp_path / 'found.json'}"]))
    metrics = read(run / "metrics.json")
    assert metrics["processes"] == 2
    found = {name: value for name, value in read(tmp_path / "found.json").items() if isinstance(value, float)}
    assert "hr@1" in found
    for name, value in found.items():
        assert value == pytest.approx(metrics[name], abs=1e-6), name
    assert isinstance(AutoModelForCausalLM.from_pretrained(run / "policy"), PreTrainedModel)
