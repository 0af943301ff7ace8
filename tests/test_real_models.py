"""Real pretrained weights, out of the packages of requirements-pretrained.lock, through every stage of a run."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from massdpo import tasks
from massdpo.config import compose
from massdpo.model.gguf import converted, packaged
from massdpo.model.load import load_model, load_tokenizer
from massdpo.runs import pipeline
from massdpo.store import Cache
from tests.conftest import needs_fast_bfloat16, needs_real_models
from tests.test_gguf import gguf_name, stored

gguf = pytest.importorskip("gguf", reason="the real models' packages are not installed")

pytestmark = [pytest.mark.slow, needs_real_models]

MODELS = {  # an option, how its text goes on, and the vector that its file keeps one above the model's
    "smollm2_135m_q4": ("The capital of France is", "Paris", "never"),
    "gemma3_270m_q4": ("Water boils at a temperature of", "100 degrees Celsius", "norm"),
}
PRECISIONS = ["float32", pytest.param("bfloat16", marks=needs_fast_bfloat16)]
GEMMA_NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SHORT = ["Paris", "Rome", "Oslo", "Lima"]
LONG = [" ".join(f"{city} is item {number} of the tour," for number in range(10)) + " and the last" for city in SHORT]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> list[str]:
    """Prompts with one-word responses, and with responses of some sixty words."""
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        lines = []
        for row in range(count):
            texts = (LONG if row % 2 else SHORT)[row // 2 :] + (LONG if row % 2 else SHORT)[: row // 2]
            lines.append(
                {"prompt": f"{split} {row}: which city comes first?", "chosen": texts[0], "rejected": texts[1:]}
            )
        (cache / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {"path": "train", "val_path": "val", "test_path": "test"}
    return ["dataset=jsonl", *(f"dataset.{key}={cache / name}.jsonl" for key, name in paths.items())]


def folder_of(model: str, dtype: str, cache: Path) -> Path:
    return converted(packaged(compose([f"model={model}"]).model.packages), dtype, Cache(cache))


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_of_the_file_and_the_text_is_sensible(name: str, cache: Path, tmp_path: Path) -> None:
    """Each matrix equals the one that gguf's own code makes of its blocks, to the last bit of float32."""
    start, goes_on, shifted = MODELS[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(b"".join(part.read_bytes() for part in packaged(compose([f"model={name}"]).model.packages)))
    blocks = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    folder = folder_of(name, "float32", cache)
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    for parameter, weight in model.named_parameters():
        there = gguf_name(parameter, GEMMA_NAMES if name.startswith("gemma") else {})
        expected = gguf.dequantize(blocks[there].data, blocks[there].tensor_type)
        array = (
            weight.detach().numpy() if name.startswith("gemma") else stored(parameter, weight.detach(), model.config)
        )
        assert np.array_equal(array, expected - 1 if shifted in there else expected), parameter
    for text in ("It's 12,345 é 中 😀 twice  over", "\tindented\nlines"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    ids = tokenizer(start, return_tensors="pt").input_ids
    assert (ids[0, 0] == tokenizer.bos_token_id) == name.startswith("gemma")
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert goes_on in tokenizer.decode(answer[0])


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_a_whole_run(model: str, precision: str, trained: str, data: list[str], cache: Path, tmp_path: Path) -> None:
    """SFT, reference, two MASS steps, evaluation, generation, saving; the saved policy loads to the same numbers."""
    checkpointing = (precision == "bfloat16") != (trained == "lora")
    own = [
        *(*data, f"model={model}", "trainer=cpu_pretrained", f"trainer.precision={precision}", "logger=none", "k=2"),
        *("trainer.batch_size=2", "trainer.eval_batch_size=2", "trainer.log_every=1", "trainer.generate=true"),
        *(f"trainer.gradient_checkpointing={checkpointing}".lower(), f"cache_dir={cache}", f"runs_dir={tmp_path}"),
        "trainer.adapter={r: 4, alpha: 8, targets: all-linear, stages: one}" if trained == "lora" else "beta=0.1",
    ]
    run = pipeline.train(compose([*own, "name=run"]))
    with open(run / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["loss"]]  # the others are validation's
    assert [row["stage"] for row in steps] == ["sft"] * 2 + ["preference"] * 2
    assert all(math.isfinite(float(row["loss"])) for row in steps)
    first = next(row for row in steps if row["stage"] == "preference")
    # beta times a difference of two passes, in batches of other shapes: rounding, some hundredths of a nat per token in
    # bfloat16
    assert abs(float(first["margin"])) < (1e-3 if precision == "float32" else 2.0)
    tasks.run(compose([*own, "task=evaluate", f"in={run}", f"out={tmp_path / 'found.json'}"]))
    metrics = json.loads((run / "metrics.json").read_text())
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"accuracy", "hr@1"} <= found.keys()
    for name, value in found.items():
        if isinstance(value, float) and "seconds" not in name and "memory" not in name:
            assert math.isfinite(value) and value == pytest.approx(metrics[name], abs=1e-5), name
