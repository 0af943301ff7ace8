"""`massdpo.MultiNegativeTrainer` against the loop of a run on the same batches, and what a Trainer brings with it."""

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PreTrainedTokenizerBase, TrainingArguments

from massdpo import MultiNegativeTrainer, UserError
from massdpo.config import compose
from massdpo.data.batches import in_order
from massdpo.evaluation.logps import SplitScorer
from massdpo.model.load import load_model, load_tokenizer
from massdpo.model.scoring import PreferenceScorer
from massdpo.model.scratch import TinyModel
from massdpo.runs.trackers import NoLogger
from massdpo.selection import Mass, Random, Selector
from massdpo.store import Cache
from massdpo.training.hf_trainer import tokenized
from massdpo.training.history import History
from massdpo.training.loop import Stage, fit
from massdpo.training.losses import pl
from massdpo.training.objectives import Preference
from tests.conftest import ROOT

COLOURS = ("red", "green", "blue", "white", "black", "brown", "dark green", "light grey")
ROWS = [
    {
        "prompt": f"Which colour has the thing with the number {number}?",
        "chosen": COLOURS[number % 8],
        "rejected": [colour for place, colour in enumerate(COLOURS) if place != number % 8][: 4 + number % 4],
    }
    for number in range(14)
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    texts = [f"{row['prompt']} {text}" for row in ROWS for text in (row["chosen"], *row["rejected"])]
    tiny = TinyModel({"model_type": "llama", "num_key_value_heads": 2, **sizes}, 300)
    model, tokenizer = tiny.load(texts, 0, Cache(folder / "cache"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**given | more)


class InOrder(Sampler[int]):
    """The runner's order of each epoch."""

    def __init__(self) -> None:
        self.epoch = -1

    def __len__(self) -> int:
        return len(ROWS)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(in_order(len(ROWS), 3, "preference", self.epoch))


class Ordered(MultiNegativeTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return InOrder()


@pytest.mark.parametrize(("selector", "precision"), [(Mass(3), "no"), (Mass(3), "bf16"), (Random(2), "no")])
def test_it_has_the_losses_of_a_run(selector: Selector, precision: str, saved: Path, tmp_path: Path) -> None:
    """Two epochs on pools of 4 to 7, the last batch smaller: losses, margins, log-probs, final weights."""
    tokenizer = load_tokenizer(saved)
    model = load_model(saved, "float32")
    ours = copy.deepcopy(model)
    given = ["trainer.batch_size=4", "trainer.log_every=1", "trainer.weight_decay=0.0", "trainer.warmup=0.25"]
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    score_split = SplitScorer(accelerator, 8, tokenizer.pad_token_id)
    rows = tokenized(ROWS, "train_dataset", tokenizer, 1024, False)  # ids, and with them the noise, are the same
    scorer = PreferenceScorer(ours, selector.features)
    reference = {"train": score_split(scorer, rows, ""), "val": score_split(scorer, rows, "")}
    objective = Preference(selector, pl, 0.5, "step", 3, rows, rows, reference, score_split)
    stage = Stage("preference", objective, 2, 1e-3, tmp_path / "checkpoints", 3, tokenizer.pad_token_id)
    history = History(tmp_path / "history.csv")
    fit(stage, scorer, compose(given).trainer, accelerator, history, NoLogger())
    expected = [row for row in history.rows if "loss" in row]

    AcceleratorState._reset_state(reset_partial_state=True)
    args = arguments(tmp_path, seed=3, warmup_steps=len(expected) // 4, bf16=precision == "bf16")
    trainer = Ordered(model, args, ROWS, processing_class=tokenizer, selector=selector, beta=0.5)
    trainer.train()
    found = [row for row in trainer.state.log_history if "loss" in row]
    assert len(found) == len(expected) == 8
    for name in ("loss", "margin", "chosen_logp", "rejected_logp", "k_effective"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-6), name
    assert len({row["loss"] for row in found[2:]}) == 6, "something is learned"
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_what_a_trainer_brings_works(saved: Path, tmp_path: Path) -> None:
    """Evaluation, the best checkpoint, early stopping, going on from a checkpoint, a model that transformers loads."""
    tokenizer = load_tokenizer(saved)
    args = arguments(
        tmp_path,
        num_train_epochs=6,
        learning_rate=1e-9,  # nothing improves: stopped after two epochs
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
    )
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    made = {"processing_class": tokenizer, "eval_dataset": ROWS[:6], "selector": "hardest", "k": 2, "loss": "dmpo"}
    trainer = MultiNegativeTrainer(load_model(saved, "float32"), args, ROWS, callbacks=[stop], **made)  # type: ignore[arg-type]
    trainer.train()
    assert trainer.state.epoch == 2.0
    metrics = trainer.evaluate()
    assert (
        metrics["eval_reward_accuracy_pairwise"] == pytest.approx(0.5, abs=0.5) and 0 <= metrics["eval_accuracy"] <= 1
    )
    assert trainer.evaluate(ROWS[6:8], metric_key_prefix="other").keys() >= {"other_mrr"}
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    again = MultiNegativeTrainer(load_model(saved, "float32"), arguments(tmp_path, num_train_epochs=3), ROWS, **made)  # type: ignore[arg-type]
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.state.global_step == 12


def test_an_adapter_and_messages(saved: Path, tmp_path: Path) -> None:
    """Rows in TRL's conversational form train an adapter alone; the reference is the model before it."""
    talk = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [[{"role": "assistant", "content": text}] for text in row["rejected"]],
        }
        for row in ROWS
    ]
    tokenizer = load_tokenizer(saved)
    texts, messages = (tokenized(rows, "rows", tokenizer, 1024, False) for rows in (ROWS, talk))
    assert list(texts) == list(messages)
    model: Any = get_peft_model(load_model(saved, "float32"), LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = MultiNegativeTrainer(
        model, arguments(tmp_path, num_train_epochs=1), talk, processing_class=tokenizer, k=2
    )
    trainer.train()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all("lora_" in name for name in changed)
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-6)  # equal rewards: log(1 + 2)
    trainer.save_model(str(tmp_path / "adapter"))
    PeftModel.from_pretrained(load_model(saved, "float32"), tmp_path / "adapter")


@pytest.mark.parametrize(("dtype", "adapter"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_weights_that_lose_small_steps_are_told(dtype: str, adapter: bool, saved: Path, tmp_path: Path) -> None:
    """Below an adapter, which is float32, they may be anything."""
    model: Any = load_model(saved, dtype)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if adapter else model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MultiNegativeTrainer(model, arguments(tmp_path), ROWS, processing_class=load_tokenizer(saved))
    told = [str(warning.message) for warning in caught if "float32" in str(warning.message)]
    assert len(told) == (dtype == "bfloat16" and not adapter) and all("learning_rate=0.001" in line for line in told)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selector": "masss"}, "unknown selector 'masss'"),
        ({"loss": "_mean_of_negatives"}, "unknown loss"),
        ({"processing_class": None}, "tokenizer"),
        ({"train_dataset": [{"prompt": "a", "chosen": "b"}]}, r'train_dataset\[0\].*"rejected"'),
        ({"train_dataset": [{"prompt": "a", "chosen": "b", "rejected": ["c", "b"]}]}, r"also rejected\[1\]"),
    ],
)
def test_a_mistake_is_told_in_one_line(given: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    made = {"processing_class": load_tokenizer(saved), "train_dataset": ROWS} | given
    with pytest.raises(UserError, match=message) as error:
        MultiNegativeTrainer(load_model(saved, "float32"), arguments(tmp_path), **made)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_scripts_run_as_they_stand(saved: Path, tmp_path: Path) -> None:
    """The trainer's own, and TRL's on pairs in the form that task=select writes."""
    pairs = [
        {"prompt": row["prompt"], "chosen": f" {row['chosen']}", "rejected": f" {text}"}
        for row in ROWS
        for text in row["rejected"][:2]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for script, arguments, said in (
        ("trainer.py", [], r"accuracy \d\.\d+, margin"),
        ("trl_pairs.py", ["pairs.jsonl"], r"loss \d\.\d+ over 28 pairs"),
    ):
        command = [sys.executable, str(ROOT / "examples" / script), str(saved), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and re.search(said, done.stdout), done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(saved: Path, tmp_path: Path) -> None:
    """Gradients are averaged over processes: two with batches of 2 end where one with batches of 4 does."""
    rows = ROWS[:12]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", __file__, str(saved), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = all_at_once(saved, tmp_path / "one", 4, load_tokenizer(saved))
    two = json.loads((tmp_path / "two.json").read_text())
    assert len(two) == len(rows) // 4 and two == pytest.approx(alone, abs=1e-5)


def all_at_once(saved: Path, folder: Path, size: int, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """Validation margins after each step over rows in their order, so that every process has its share of each."""
    args = arguments(
        folder,
        per_device_train_batch_size=size,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=1,
    )
    made: dict[str, Any] = {"processing_class": tokenizer, "eval_dataset": ROWS, "selector": "full", "loss": "pairwise"}
    trainer = MultiNegativeTrainer(load_model(saved, "float32"), args, ROWS[:12], **made)
    trainer.train()
    return [row["eval_margin"] for row in trainer.state.log_history if "eval_margin" in row]


if __name__ == "__main__":  # a process of torchrun's
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    margins = all_at_once(model, out / "two", 2, load_tokenizer(model))
    if os.environ["RANK"] == "0":
        (out / "two.json").write_text(json.dumps(margins))
