"""What becomes of a trained policy: an adapter merged into a whole model, a folder pushed to the hub (a stand-in)."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from massdpo import tasks
from massdpo.config import compose, resolved
from massdpo.errors import UserError
from massdpo.model.load import PretrainedModel
from massdpo.model.save import add_adapter, load_policy, save_policy
from massdpo.runs.card import model_card
from massdpo.runs.shown import SHOWN
from tests.test_hf_trainer import saved  # noqa: F401  a fixture

push_module = import_module("massdpo.tasks.push")
NAME = "meta-llama/Llama-3.2-1B-Instruct"


@pytest.fixture
def adapter(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A policy's folder: an adapter that changes something, its card, beside it a base in a folder of this machine."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    options = {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
    model, tokenizer = PretrainedModel(NAME, str(saved)).load([], 0, None)  # type: ignore[arg-type]
    policy = add_adapter(model, options, 0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    config = resolved(compose(["model=llama3_2_1b", f"model.path={saved}", "trainer=lora", "dataset=openbookqa"]))
    card = model_card(config, dict.fromkeys(SHOWN, 0.25), {"train": 1, "preference": 1, "test": 1}, "a-run")
    (tmp_path / "policy").mkdir()
    save_policy(policy, tokenizer, tmp_path / "policy", card)
    return tmp_path / "policy"


def call(task: str, policy: Path, out: Any, *more: str) -> None:
    tasks.run(compose([f"task={task}", f"policy={policy}", f"out={out}", *more]))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def test_a_merged_model_computes_what_its_adapter_did(adapter: Path, saved: Path, tmp_path: Path) -> None:  # noqa: F811
    call("merge", adapter, tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(tmp_path / "whole"), logits(adapter), rtol=1e-4, atol=1e-5)
    assert (logits(saved) - logits(adapter)).abs().max() > 0.1, "the adapter changes something"
    load_policy(tmp_path / "whole")  # as task=rank loads it
    card = ModelCard.load(tmp_path / "whole" / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model == NAME
    assert card.data.to_dict()["base_model_relation"] == "finetune" and "lora" not in card.data.tags
    assert "merged into the base's weights" in card.text and "`peft`" not in card.text
    for message, policy, out in (
        ("there is no adapter", tmp_path / "whole", tmp_path / "again"),
        ("exists already", adapter, tmp_path / "whole"),
    ):
        with pytest.raises(UserError, match=message):
            call("merge", policy, out)
    assert not (tmp_path / "again").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hub as a list of what it was told; nothing leaves the machine."""
    told: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            told.append((name, options))

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
            told.append({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    monkeypatch.setattr(push_module, "HfApi", Hub)
    monkeypatch.setattr(push_module, "get_token", lambda: "token")
    return told


def test_push_shows_first_and_sends_when_told_to(
    adapter: Path,
    saved: Path,  # noqa: F811
    hub: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every file is shown; the base is named by the hub, and no place of this machine goes out."""
    (adapter / ".cache").write_text("not of the policy")
    call("push", adapter, "me/policy")
    said = capsys.readouterr().out
    assert hub == [] and "force=true" in said
    call("push", adapter, "me/policy", "force=true")
    (name, options), sent = hub
    assert name == "me/policy" and options["private"] is True
    assert all(f"  {file} " in said for file in sent) and said.count(" MB") == len(sent)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= sent.keys()
    assert not {".cache", "manifest.json"} & sent.keys()
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == NAME
    assert not [file for file, content in sent.items() if str(saved).encode() in content]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(saved)


def refused(message: str, do: Callable[[], None]) -> None:
    with pytest.raises(UserError, match=message) as error:
        do()
    assert "\n" not in str(error.value)


def test_push_refuses_in_one_line(adapter: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refused("not a name on the hub", lambda: call("push", adapter, "a/b/c", "force=true"))
    refused("there is no policy", lambda: call("push", adapter.parent / "nosuch", "me/policy", "force=true"))
    refused("needs out=OWNER/NAME", lambda: tasks.run(compose(["task=push", f"policy={adapter}"])))
    monkeypatch.setattr(push_module, "get_token", lambda: None)
    refused("HF_TOKEN", lambda: call("push", adapter, "me/policy", "force=true"))
    monkeypatch.undo()
    (adapter / "README.md").write_text("# No front matter\n")
    refused("model.hub_id=OWNER/NAME", lambda: call("push", adapter, "me/policy"))
    assert hub == []


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.timeout(60)
def test_a_card_that_would_fill_the_memory_costs_the_card_alone(
    adapter: Path, hub: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "README.md").write_text(f"---\n{BOMB}base_model: *i\n---\n# A trap\n")
    call("merge", adapter, tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert "warning: the model card is left out" in capsys.readouterr().err
    refused("model.hub_id=OWNER/NAME", lambda: call("push", adapter, "me/policy"))
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    refused("adapter_config.json cannot be read", lambda: call("push", adapter, "me/policy"))


def test_what_the_hub_says_is_one_line(adapter: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def upload_folder(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(push_module.HfApi, "upload_folder", upload_folder)
    refused(
        "the hub did not accept me/policy: no route to host", lambda: call("push", adapter, "me/policy", "force=true")
    )
