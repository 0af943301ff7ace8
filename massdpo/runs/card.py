"""The model card of a saved policy: what it was trained on and how, its terms, its metrics, how to load it.

It is made from the options, never from the data: it holds no text of a dataset and no path of the machine.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

import massdpo
from massdpo.console import markdown_table
from massdpo.data.download import SOURCES, HubSet
from massdpo.runs.shown import GENERATED, SHOWN
from massdpo.store import mapping_in, plain_yaml

HUB = "https://huggingface.co"
FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)
LICENCE = ("license", "license_name", "license_link")


def model_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    sizes: Mapping[str, int],
    name: str,
    dequantised_from: str | None = None,
) -> str:
    """The README.md of a policy, with the front matter that the hub reads.

    `config` is the run's resolved configuration, `metrics` its metrics.json, `sizes` its prompts by split (`train`,
    `preference`, `test`), `name` the run's; `dequantised_from` is the block type of the GGUF file behind the start
    weights, if there is one.
    """
    trainer = config["trainer"]
    blocks = [
        f"---\n{ModelCardData(**_front_matter(config))}\n---",
        f"# {name}",
        "A causal language model, fine-tuned on chosen responses and then trained on preferences between each of them "
        f"and several rejected ones, with massdpo {massdpo.__version__}: see [MASS-DPO](https://arxiv.org/abs/2605.10784).",
        markdown_table(["", ""], _summary(config, sizes, dequantised_from).items()),
        "## Data\n\n" + _terms(config),
        f"## Metrics\n\nOn the {sizes['test']} prompts of the test split. {METRICS_TEXT}\n\n" + _metrics(metrics),
        "## Use\n\n" + (CHAT_TEXT if trainer["chat_template"] else PLAIN_TEXT) + "\n\n" + _code(trainer),
    ]
    return "\n\n".join(blocks) + "\n"


def merged_card(text: str) -> str:
    """Turn the card of an adapter into that of the merged model; ValueError if it is not a card."""
    if head := FRONT_MATTER.match(text):
        plain_yaml(head[1])  # refuses YAML of which a few lines could fill the memory
    card = ModelCard(text)
    card.data["library_name"] = "transformers"
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if tag != "lora"]
    if card.data.get("base_model_relation"):
        card.data["base_model_relation"] = "finetune"
    card.text = card.text.replace("Needs `transformers` and `peft`.", "Needs `transformers`.")
    card.text = re.sub(r"(\| weights \| LoRA[^|]*) \|", r"\1, merged into the base's weights |", card.text)
    return str(card)


def _front_matter(config: Mapping[str, Any]) -> dict[str, Any]:
    model, adapter = config["model"], config["trainer"]["adapter"]
    tags = ["massdpo", "dpo", "preference-optimization", *(["lora"] if adapter else [])]
    known: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if "hub_id" in model:
        base = read_front_matter(_base_folder(model) / "README.md")  # its card, if it lies beside the weights
        known |= {key: base[key] for key in LICENCE if isinstance(base.get(key), str)}
    if model.get("hub_id"):
        known |= {"base_model": model["hub_id"], "base_model_relation": "adapter" if adapter else "finetune"}
    if isinstance(source := SOURCES.get(config["choices"]["dataset"]), HubSet):
        known["datasets"] = [source.repo]
    return known


def read_front_matter(card: Path) -> dict[str, Any]:
    """The front matter of a card; empty if there is no card, or it cannot be read."""
    return mapping_in(card, lambda text: plain_yaml(front[1]) if (front := FRONT_MATTER.match(text)) else None)


def _base_folder(model: Mapping[str, Any]) -> Path:
    if model["path"]:
        return Path(model["path"]).expanduser()
    config = try_to_load_from_cache(model["hub_id"], "config.json", revision=model["revision"])
    return Path(str(config)).parent


def _summary(config: Mapping[str, Any], sizes: Mapping[str, int], dequantised_from: str | None) -> dict[str, str]:
    trainer, adapter = config["trainer"], config["trainer"]["adapter"]
    weights = f"LoRA, rank {adapter['r']}, alpha {adapter['alpha']:g}" if adapter else "all trained"
    if adapter and adapter.get("quantize"):
        weights += f" on a base quantised to {adapter['quantize']} by bitsandbytes"
    k = f", k = {config['selector']['k']}" if "k" in config["selector"] else ""
    stages = {
        stage: f"{sizes[count]} prompts, epochs: {trainer[stage]['epochs']}, peak learning rate: "
        f"{trainer[stage]['learning_rate']:g}"
        for stage, count in (("sft", "train"), ("preference", "preference"))
    }
    preference = {
        "preference stage": stages["preference"],
        "negatives trained on": f"`{config['choices']['selector']}`{k}; `refresh={config['refresh']}`",
        "loss": f"`{config['choices']['loss']}`, beta = {config['beta']:g}",
    }
    return {
        "base model": _base(config) + (f", dequantised from {dequantised_from}" if dequantised_from else ""),
        "weights": weights,
        "data": f"`{config['choices']['dataset']}`",
        "supervised fine-tuning": stages["sft"],
        **(preference if trainer["preference"]["epochs"] else {"preference stage": "none"}),
        "prompts per optimiser step": f"{trainer['batch_size'] * trainer['accumulate']} per process",
        "precision": trainer["precision"],
        "longest text": f"{trainer['max_length']} tokens",
        "seed": str(config["seed"]),
    }


def _base(config: Mapping[str, Any]) -> str:
    model, option = config["model"], config["choices"]["model"]
    if "packages" in model:
        return f"`{option}`, from {', '.join(model['packages'])}; terms: {model['terms']}"
    if "hub_id" not in model:
        return f"none: random weights (`{option}`, family {model['config']['model_type']})"
    if model["path"]:
        name = model["hub_id"]
        return f"[{name}]({HUB}/{name}), from a copy on disk" if name else f"from disk (option `{option}`)"
    folder = _base_folder(model)
    commit = f", commit {folder.name}" if folder.parent.name == "snapshots" else ""
    return f"[{model['hub_id']}]({HUB}/{model['hub_id']}){commit}"


def _terms(config: Mapping[str, Any]) -> str:
    option = config["choices"]["dataset"]
    if terms := config["dataset"].get("terms"):
        return f"Trained on `{option}`. Terms of these data: {terms}."
    if option.startswith("synthetic"):
        return f"Trained on `{option}`: an invented world, without terms of use."
    return f"Trained on its author's own data (`{option}`), whose terms are not known here."


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows = [(name, f"{metrics.get(f'sft/{name}', 0.0):.4f}", f"{metrics[name]:.4f}") for name in SHOWN]
    rows += [(name, "", f"{metrics[name]:.4f}") for name in GENERATED if name in metrics]
    return markdown_table(["metric", "SFT start", "this policy"], rows)


METRICS_TEXT = (
    "`accuracy`, `ndcg@5` and `mrr` rank the chosen response among all candidates by mean log-prob per token "
    "(`_sum`: by their sum); rewards and margins are relative to the SFT start."
)
PLAIN_TEXT = (
    "It was trained on texts of the form `PROMPT RESPONSE`, joined by one space, after the tokenizer's begin token (if "
    "it has one) and before its end token."
)
CHAT_TEXT = (
    "It was trained on prompts as a user's turn in the tokenizer's chat template, each followed directly by its "
    "response and the tokenizer's end token."
)


def _code(trainer: Mapping[str, Any]) -> str:
    needs = "Needs `transformers` and `peft`." if trainer["adapter"] else "Needs `transformers`."
    chat = """turn = [{"role": "user", "content": prompt}]
text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)"""
    text = chat if trainer["chat_template"] else 'text = (tokenizer.bos_token or "") + prompt'
    return f"""{needs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
prompt = "Your prompt:"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
{text}
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id)
answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
print(answer)
```

To score given candidates with massdpo: `python run.py task=rank policy=FOLDER in=FILE out=FILE`."""
