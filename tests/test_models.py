"""Every option builds, weights follow the seed, saved folders load to the same function, no foreign code runs."""

import json
import pickle
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from massdpo.config import compose
from massdpo.errors import UserError
from massdpo.model import hub, scratch
from massdpo.model.load import PackagedModel, PretrainedModel, disable_dropout, load_model, load_tokenizer
from massdpo.model.save import add_adapter, load_policy, merge_adapter, save_policy, weights_digest
from massdpo.model.scratch import TinyModel, learn_tokenizer
from massdpo.runs.start import load_start, trainable
from massdpo.store import Cache, is_whole
from tests.conftest import ROOT

FAMILIES = ["llama", "gemma", "phi", "qwen"]
OPTIONS = sorted((ROOT / "conf" / "model").glob("*.yaml"))
TEXTS = [f"viewer {i} saw film {i % 7}, then film {i * i % 31}; next: film {i % 13}" for i in range(300)]
ODD_TEXTS = ["", " two  spaces ", "Füße 日本語 🙂\n\ttab", "a" * 300, "bytes \x00\x7f"]
ADAPTER = {"r": 4, "alpha": 8, "targets": "all-linear"}

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def option(name: str, **changes: object) -> Any:
    return instantiate(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml"), **changes)


def load_tiny(family: str, folder: Path, seed: int = 0) -> Loaded:
    return option(f"tiny_{family}").load(TEXTS, seed, Cache(folder / "cache"))


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Loaded:
    return load_tiny(request.param, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Loaded:
    return load_tiny("llama", tmp_path)


def logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    batch = tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return output.logits[batch.attention_mask.bool()].float()


def train_adapter(model: PeftModel) -> None:
    """Weights as after training: peft starts with B = 0, where an adapter that got lost would not be noticed."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


# the options


def test_the_options_are_those_promised() -> None:
    pretrained = ["llama3_2_1b", "llama3_2_3b", "gemma2_2b", "phi3_mini", "qwen2_5_1_5b", "qwen3_0_6b", "smollm2_135m"]
    pretrained += ["pretrained", "smollm2_135m_q4", "gemma3_270m_q4"]
    scratch = [f"{size}_{family}" for size in ("tiny", "small") for family in FAMILIES]
    assert [path.stem for path in OPTIONS] == sorted(pretrained + scratch)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_each_option_builds_and_says_what_each_line_does(path: Path) -> None:
    built = instantiate(OmegaConf.load(path), **({"path": "DIR"} if path.stem == "pretrained" else {}))
    assert isinstance(built, TinyModel | PretrainedModel | PackagedModel)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all(" # " in line for line in lines[1:] if not line.startswith("_target_"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "least", "most"), [("tiny", 80_000, 200_000), ("small", 20e6, 60e6)])
def test_size(family: str, size: str, least: float, most: float) -> None:
    built = option(f"{size}_{family}")
    assert isinstance(built, TinyModel)
    # a full vocabulary: the corpus here is too small for one. The meta device counts without memory.
    config = AutoConfig.for_model(**{**built.options, "vocab_size": built.vocab_size, "pad_token_id": 0})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert least <= sum(weight.numel() for weight in model.parameters()) <= most


def test_misspelt_options_are_told() -> None:
    with pytest.raises(UserError, match="hiden_size"):
        TinyModel({"model_type": "llama", "hiden_size": 64}, 300)
    with pytest.raises(UserError, match="no such family"):
        TinyModel({"model_type": "lama"}, 300)
    with pytest.raises(UserError, match="at least 259"):
        TinyModel({"model_type": "llama"}, 100)
    with pytest.raises(UserError, match="float16"):
        PretrainedModel("some/model", dtype="float16")


def test_values_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.config"):
        TinyModel({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}, 300).load(
            TEXTS, 0, Cache(tmp_path)
        )


# from scratch


def test_family_dtype_and_special_tokens(tiny: Loaded) -> None:
    model, tokenizer = tiny
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == model.config.vocab_size
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id] == ids
    assert len(set(ids)) == 3
    tokenizer_ids = tokenizer("film").input_ids
    assert tokenizer_ids[0] == tokenizer.bos_token_id
    assert tokenizer_ids.count(tokenizer.bos_token_id) == 1


def test_weights_follow_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = weights_digest(load_tiny("llama", tmp_path)[0])
    after = torch.rand(())
    again = weights_digest(load_tiny("llama", tmp_path / "elsewhere")[0])  # another state of the global generator
    other = weights_digest(load_tiny("llama", tmp_path, seed=1)[0])
    assert first == again != other
    torch.manual_seed(0)
    assert torch.rand(()) == after  # building a model draws nothing from it


def test_weights_digest_sees_one_changed_number(llama: Loaded) -> None:
    before = weights_digest(llama[0])
    next(llama[0].parameters()).data.view(-1)[-1] += 1e-6
    assert weights_digest(llama[0]) != before


def test_tokenizer_round_trip(llama: Loaded) -> None:
    tokenizer = llama[1]
    for text in [*TEXTS[:5], *ODD_TEXTS]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    # merges were learned: far fewer tokens than the bytes that an untrained vocabulary would give
    assert len(tokenizer(TEXTS[0]).input_ids) < 0.5 * len(TEXTS[0])


def test_learning_a_tokenizer_is_deterministic() -> None:
    first, second = (learn_tokenizer(TEXTS, 400).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_tokenizer_is_cached_by_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, built = Cache(tmp_path), option("tiny_llama")
    vocabulary = built.load(lambda: iter(TEXTS), 0, cache)[1].get_vocab()
    (folder,) = (path for path in (tmp_path / "tokenizer").iterdir() if path.is_dir())
    assert is_whole(folder)
    assert json.loads((folder / "learned_from.json").read_text()) == {"texts": len(TEXTS), "texts_left_out": 0}
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "learn_tokenizer", lambda *_: pytest.fail("learned again"))
        assert built.load(TEXTS, 1, cache)[1].get_vocab() == vocabulary
    built.load([*TEXTS, "quite another text"], 0, cache)
    assert len([path for path in (tmp_path / "tokenizer").iterdir() if path.is_dir()]) == 2


def test_a_huge_corpus_is_cut_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scratch, "TOKENIZER_BYTES", sum(len(text) for text in TEXTS[:100]))
    option("tiny_llama").load(TEXTS, 0, Cache(tmp_path))
    assert "first 100 of 300 training texts" in capsys.readouterr().err


def test_no_training_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        option("tiny_llama").load([], 0, Cache(tmp_path))


# through the pretrained path


def test_saved_and_loaded_as_pretrained(tiny: Loaded, tmp_path: Path) -> None:
    model, tokenizer = tiny
    save_policy(model, tokenizer, tmp_path / "saved")
    pretrained = PretrainedModel("owner/name", path=str(tmp_path / "saved"))
    loaded, loaded_tokenizer = pretrained.load([], 0, Cache(tmp_path / "cache"))
    assert torch.equal(logits(model, tokenizer), logits(loaded, loaded_tokenizer))
    assert weights_digest(loaded) == weights_digest(model)
    assert loaded.config._attn_implementation == model.config._attn_implementation
    for text in [*TEXTS[:5], *ODD_TEXTS]:
        assert loaded_tokenizer(text).input_ids == tokenizer(text).input_ids


def test_dtype_of_pretrained_weights(llama: Loaded, tmp_path: Path) -> None:
    save_policy(*llama, tmp_path / "saved")
    loaded, _ = option("smollm2_135m", path=str(tmp_path / "saved"), dtype="bfloat16").load([], 0, Cache(tmp_path))
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


def test_pad_token_where_a_tokenizer_has_none(llama: Loaded, tmp_path: Path) -> None:
    save_policy(*llama, tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token is None
    _, tokenizer = PretrainedModel("a/b", path=str(tmp_path / "saved")).load([], 0, Cache(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|eos|>"


def test_a_tokenizer_written_in_python_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a</w>": 0, "<unk>": 1}')
    (tmp_path / "merges.txt").write_text("#version\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    with pytest.raises(UserError, match=r"CTRLTokenizer is written in Python, and only .*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("extra", ["pad", "word", "turn", "image"])
def test_a_token_beyond_the_embedding_is_refused_where_texts_can_bring_it(
    llama: Loaded, tmp_path: Path, extra: str
) -> None:
    """A pad token added without resizing, a word, or what the template writes, for a base model and a policy; not a
    special token that nothing writes (as in Gemma 3)."""
    model, tokenizer = llama
    if extra == "pad":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    else:
        tokenizer.add_tokens([f"<{extra}>"], special_tokens=extra != "word")
    if extra == "turn":
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<turn>{% endfor %}"
    save_policy(model, tokenizer, tmp_path / "saved")
    pretrained = PretrainedModel(path=str(tmp_path / "saved"))
    if extra == "image":
        assert len(pretrained.load([], 0, Cache(tmp_path))[1]) == model.config.vocab_size + 1
    else:
        rows = model.config.vocab_size
        refused = f"'<{extra}>' has the id {rows}, but the model's embedding has {rows} rows"
        assert refused in told(pretrained, tmp_path)
        with pytest.raises(UserError, match=re.escape(refused)):
            load_policy(tmp_path / "saved")


def test_hub_model_comes_from_its_snapshot(llama: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder in the hub's own layout, offline: loaded, named by its commit, and named by a saved adapter."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--name"
    save_policy(*llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    offline(tmp_path, monkeypatch)
    pretrained = PretrainedModel("owner/name")
    model, tokenizer = pretrained.load([], 0, Cache(tmp_path))
    assert torch.equal(logits(model, tokenizer), logits(*llama))

    adapted = add_adapter(model, ADAPTER, 0)
    train_adapter(adapted)
    save_policy(adapted, tokenizer, tmp_path / "policy")
    saved = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/name", commit)
    assert torch.equal(logits(*load_policy(tmp_path / "policy")), logits(adapted, tokenizer))


# what users can get wrong


def offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))


def told(pretrained: PretrainedModel, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        pretrained.load([], 0, Cache(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_offline_with_nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    message = told(PretrainedModel("owner/name"), tmp_path)
    assert all(part in message for part in ("owner/name", str(tmp_path / "hub"), "model.path=DIR"))


def test_hub_unreachable_with_nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HF_HUB_OFFLINE set: the hub's address is a port of this machine at which nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    message = told(PretrainedModel("owner/name"), tmp_path)
    assert all(part in message for part in ("owner/name", str(tmp_path / "hub"), "model.path=DIR"))


def test_cache_with_a_part_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    offline(tmp_path, monkeypatch)
    message = told(PretrainedModel("owner/name"), tmp_path)
    assert all(part in message for part in ("owner/name", str(tmp_path / "hub"), "model.path=DIR"))


def test_gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise GatedRepoError("gated", response=MagicMock())

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    message = told(PretrainedModel("owner/name"), tmp_path)
    assert all(part in message for part in ("https://huggingface.co/owner/name", "HF_TOKEN", "model.path=DIR"))


def test_folders_that_are_no_model(llama: Loaded, tmp_path: Path) -> None:
    assert "no folder" in told(PretrainedModel("a/b", path=str(tmp_path / "nowhere")), tmp_path)
    (tmp_path / "empty").mkdir()
    assert "config.json" in told(PretrainedModel("a/b", path=str(tmp_path / "empty")), tmp_path)

    save_policy(*llama, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in told(PretrainedModel("a/b", path=str(tmp_path / "cut")), tmp_path)

    # a decoder without its output matrix: transformers would draw a random one and only warn
    untied = TinyModel({**option("tiny_llama").options, "tie_word_embeddings": False}, 300)
    model, tokenizer = untied.load(TEXTS, 0, Cache(tmp_path / "cache"))
    model.model.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    assert "lm_head" in told(PretrainedModel("a/b", path=str(tmp_path / "headless")), tmp_path)


class Harm:
    """What a malicious pickle does: a call of its choice while it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (Path.mkdir, (self.mark,))  # type: ignore[return-value]


def test_pickled_weights_are_refused_unread(llama: Loaded, tmp_path: Path) -> None:
    save_policy(*llama, tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with open(tmp_path / "saved" / "pytorch_model.bin", "wb") as file:
        pickle.dump(Harm(tmp_path / "harm"), file)
    message = told(PretrainedModel("a/b", path=str(tmp_path / "saved")), tmp_path)
    assert "pytorch_model.bin" in message
    assert not (tmp_path / "harm").exists()


def test_code_beside_a_model_is_not_run(llama: Loaded, tmp_path: Path) -> None:
    save_policy(*llama, tmp_path / "saved")
    (tmp_path / "saved" / "own.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    path = tmp_path / "saved" / "config.json"
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": own}))
    told(PretrainedModel("a/b", path=str(tmp_path / "saved")), tmp_path)
    assert not (tmp_path / "harm").exists()


def test_code_beside_a_tokenizer_is_not_run(llama: Loaded, tmp_path: Path) -> None:
    save_policy(*llama, tmp_path / "saved")
    (tmp_path / "saved" / "own.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    path = tmp_path / "saved" / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    load_policy_or_refuse(tmp_path / "saved")
    assert not (tmp_path / "harm").exists()


def load_policy_or_refuse(folder: Path) -> str:
    try:
        load_policy(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize(
    "planted",
    [
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2},
        {"megatron_config": {"a": 1}, "megatron_core": "own"},  # a module that peft would import
        {"auto_mapping": {"base_model_class": "Own", "parent_library": "own"}},  # the same, of its AutoPeftModel
        {"target_modules": ["nowhere"]},
        {"r": 7},
        {"no_such_option": 1, "r": "os.system"},
    ],
    ids=str,
)
def test_a_strangers_adapter_runs_nothing(
    llama: Loaded, tmp_path: Path, planted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config is data: what does not describe a LoRA of these weights is refused in one line."""
    save_policy(add_adapter(llama[0], ADAPTER, 0), llama[1], tmp_path / "saved")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **planted}))
    said = load_policy_or_refuse(tmp_path / "saved")
    assert said or "auto_mapping" in planted
    assert not (tmp_path / "harm").exists()


def test_a_broken_adapter_is_told(llama: Loaded, tmp_path: Path) -> None:
    save_policy(add_adapter(llama[0], ADAPTER, 0), llama[1], tmp_path / "saved")
    weights = tmp_path / "saved" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in load_policy_or_refuse(tmp_path / "saved")


def test_an_adapter_whose_base_has_gone_is_told(llama: Loaded, tmp_path: Path) -> None:
    save_policy(*llama, tmp_path / "base")
    model, tokenizer = PretrainedModel("a/b", str(tmp_path / "base")).load([], 0, Cache(tmp_path))
    save_policy(add_adapter(model, ADAPTER, 0), tokenizer, tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert f"no longer in {tmp_path / 'base'}" in load_policy_or_refuse(tmp_path / "saved")


def test_pickled_adapter_is_refused(llama: Loaded, tmp_path: Path) -> None:
    save_policy(add_adapter(llama[0], ADAPTER, 0), llama[1], tmp_path / "saved")
    (tmp_path / "saved" / "adapter_model.safetensors").rename(tmp_path / "saved" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_policy(tmp_path / "saved")


def test_an_adapter_is_no_start(llama: Loaded, tmp_path: Path) -> None:
    save_policy(add_adapter(llama[0], ADAPTER, 0), llama[1], tmp_path / "saved")
    assert "adapter" in told(PretrainedModel("a/b", path=str(tmp_path / "saved")), tmp_path)


# adapters and dropout


def test_a_new_adapter_changes_nothing_and_follows_its_seed(tiny: Loaded) -> None:
    model, tokenizer = tiny
    before, state = logits(model, tokenizer), torch.get_rng_state()
    adapted = add_adapter(model, ADAPTER, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(adapted, tokenizer), before)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)

    first = weights_digest(adapted)
    again, other = (weights_digest(add_adapter(adapted.unload(), ADAPTER, seed)) for seed in (0, 1))
    assert first == again != other


def test_adapter_is_float32_on_a_bfloat16_model(llama: Loaded) -> None:
    adapted = add_adapter(llama[0].bfloat16(), ADAPTER, 0)
    types = {(".lora_" in name, weight.dtype) for name, weight in adapted.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("trainer", ["gpu", "lora"])
def test_a_small_step_moves_everything_that_is_trained_on_a_bfloat16_model(
    trainer: str, llama: Loaded, tmp_path: Path
) -> None:
    """In both stages; AdamW's first step moves a weight by the learning rate, whatever its gradient."""
    config = compose([f"trainer={trainer}", "trainer.gradient_checkpointing=false"])
    sft = trainable(config, llama[0].bfloat16())
    save_policy(sft, llama[1], tmp_path / "start")
    for policy in (sft, load_start(tmp_path / "start", config)):
        trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in trained.items()}
        for weight in trained.values():
            weight.grad = torch.ones_like(weight)
        torch.optim.AdamW(trained.values(), lr=config.trainer.preference.learning_rate, weight_decay=0.0).step()
        assert trained and all((weight != before[name]).all() for name, weight in trained.items())


def test_adapter_targets(llama: Loaded) -> None:
    adapted = add_adapter(llama[0], OmegaConf.create({**ADAPTER, "targets": ["q_proj", "v_proj"]}), 0)
    modules = {name.split(".lora_")[0].rsplit(".")[-1] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert modules == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match="nowhere"):
        add_adapter(adapted.unload(), {**ADAPTER, "targets": ["nowhere"]}, 0)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "embed_tokens"]], ids=str)
def test_an_adapter_on_a_matrix_shared_by_input_and_output_is_refused(llama: Loaded, targets: list[str]) -> None:
    """Merged, its update would reach both: the policy would no longer be the one that was trained."""
    assert llama[0].config.tie_word_embeddings
    with pytest.raises(UserError, match="share one matrix"):
        add_adapter(llama[0], {**ADAPTER, "targets": targets}, 0)


def test_an_adapter_on_an_output_matrix_of_its_own_is_merged_as_it_was(tmp_path: Path) -> None:
    untied = TinyModel({**option("tiny_llama").options, "tie_word_embeddings": False}, 300)
    model, tokenizer = untied.load(TEXTS, 0, Cache(tmp_path))
    adapted = add_adapter(model, {**ADAPTER, "targets": ["q_proj", "lm_head"]}, 0)
    train_adapter(adapted)
    trained = logits(adapted, tokenizer)
    torch.testing.assert_close(logits(merge_adapter(adapted), tokenizer), trained, atol=1e-5, rtol=1e-5)


def test_merging_keeps_the_function(tiny: Loaded) -> None:
    model, tokenizer = tiny
    plain = logits(model, tokenizer)
    adapted = add_adapter(model, ADAPTER, 0)
    train_adapter(adapted)
    with_adapter = logits(adapted, tokenizer)
    assert (with_adapter - plain).abs().max() > 0.01  # the adapter does something
    merged = merge_adapter(adapted)
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    # float32: W x + s B A x against (W + s B A) x, some units in the last place of numbers near 1
    torch.testing.assert_close(logits(merged, tokenizer), with_adapter, atol=1e-5, rtol=1e-5)


def test_dropout_is_off_everywhere() -> None:
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=50, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert model.config.resid_pdrop == 0.0

    llama = AutoConfig.for_model(  # its attention holds the probability as a plain number, not in a module
        "llama",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
        attention_dropout=0.5,
    )
    model = AutoModelForCausalLM.from_config(llama, attn_implementation="sdpa").train()
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


# saved policies


def check_saved(policy: Any, tokenizer: Any, folder: Path, by_others: bool = True) -> None:
    """What is saved gives the same log-probs when it is loaded here, and, `by_others`, with transformers alone."""
    save_policy(policy, tokenizer, folder)
    expected = logits(policy, tokenizer)
    assert torch.equal(logits(*load_policy(folder)), expected)
    if by_others:
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(plain, AutoTokenizer.from_pretrained(folder)), expected)


def from_folder(start: Loaded, folder: Path, dtype: str = "float32") -> Loaded:
    """The model as a pretrained one that lies in `folder`."""
    save_policy(*start, folder)
    return PretrainedModel("a/b", str(folder), dtype=dtype).load([], 0, Cache(folder.parent))


def trained_adapter(model: Any, seed: int = 0) -> Any:
    adapted = add_adapter(model, ADAPTER, seed)
    train_adapter(adapted)
    return adapted


def test_full_policy_is_an_ordinary_folder(tiny: Loaded, tmp_path: Path) -> None:
    check_saved(*tiny, tmp_path / "policy")
    assert not [path for path in (tmp_path / "policy").iterdir() if path.suffix in (".bin", ".pt")]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_card_that_stays_is_ours(llama: Loaded, tmp_path: Path, adapter: bool) -> None:
    """peft writes one of its own."""
    save_policy(add_adapter(llama[0], ADAPTER, 0) if adapter else llama[0], llama[1], tmp_path / "policy", "# Ours\n")
    assert (tmp_path / "policy" / "README.md").read_text() == "# Ours\n"


def test_adapter_on_random_weights_is_saved_with_them(tiny: Loaded, tmp_path: Path) -> None:
    model, tokenizer = tiny
    check_saved(trained_adapter(model), tokenizer, tmp_path / "policy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_on_a_base_in_a_folder(tiny: Loaded, tmp_path: Path, dtype: str) -> None:
    model, tokenizer = from_folder(tiny, tmp_path / "base", dtype)
    by_others = dtype == "float32"  # the base's own type, in which others load it
    check_saved(trained_adapter(model), tokenizer, tmp_path / "policy", by_others)
    assert not (tmp_path / "policy" / "model.safetensors").exists()  # the adapter alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_adapter_on_a_merged_first_is_saved_with_its_base(tiny: Loaded, tmp_path: Path, dtype: str) -> None:
    model, tokenizer = from_folder(tiny, tmp_path / "base", dtype)
    second = trained_adapter(merge_adapter(trained_adapter(model)), seed=1)
    check_saved(second, tokenizer, tmp_path / "policy", by_others=False)


@pytest.mark.parametrize("known_base", [False, True])
def test_a_loaded_adapter_trains_on_merges_and_is_saved_again(llama: Loaded, tmp_path: Path, known_base: bool) -> None:
    """As the preference stage takes up the SFT policy, in both of its ways."""
    model, tokenizer = llama
    if known_base:
        save_policy(model, tokenizer, tmp_path / "base")
        model, _ = PretrainedModel("a/b", str(tmp_path / "base")).load([], 0, Cache(tmp_path))
    adapted = add_adapter(model, ADAPTER, 0)
    train_adapter(adapted)
    save_policy(adapted, tokenizer, tmp_path / "sft")

    going_on, _ = load_policy(tmp_path / "sft")
    assert isinstance(going_on, PeftModel)
    trained = {name for name, weight in going_on.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert weights_digest(going_on) == weights_digest(adapted)
    train_adapter(going_on)
    save_policy(going_on, tokenizer, tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").exists() != known_base
    assert torch.equal(logits(*load_policy(tmp_path / "one")), logits(going_on, tokenizer))

    start, _ = load_policy(tmp_path / "sft")
    assert isinstance(start, PeftModel)
    second = add_adapter(merge_adapter(start), ADAPTER, 1)
    assert (logits(second, tokenizer) - logits(adapted, tokenizer)).abs().max() < 1e-5  # float32 rounding of the merge
    train_adapter(second)
    save_policy(second, tokenizer, tmp_path / "two")
    assert torch.equal(logits(*load_policy(tmp_path / "two")), logits(second, tokenizer))


def test_a_policy_does_not_depend_on_the_folder_that_its_start_came_from(llama: Loaded, tmp_path: Path) -> None:
    save_policy(*llama, tmp_path / "start")
    model, tokenizer = load_policy(tmp_path / "start")
    assert isinstance(model, PreTrainedModel)
    adapted = add_adapter(model, ADAPTER, 0)
    save_policy(adapted, tokenizer, tmp_path / "policy")
    (tmp_path / "start" / "model.safetensors").unlink()
    assert torch.equal(logits(*load_policy(tmp_path / "policy")), logits(adapted, tokenizer))


@pytest.mark.timeout(60)  # 10 million layers would take hours
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 48},
        {"num_hidden_layers": 10_000_000},
        {"vocab_size": 10**12},
        {"intermediate_size": 7},
        {"hidden_size": "wide"},
        {"hidden_size": [16]},
        {"num_attention_heads": 0},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": [1]},
        {"model_type": "none such"},
        {"rope_parameters": []},
    ],
    ids=lambda change: f"{next(iter(change))}-{next(iter(change.values()))}"[:40],
)
def test_a_foreign_models_folder_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    load_tiny("llama", tmp_path / "cache")[0].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        load_model(tmp_path, "float32")
