"""Refuses a configuration that cannot be run, before anything is computed.

`validate` asks four questions: may the option have this value (`RULES`), does the part it configures know the option
(by its signature), do the options make sense together, and can this machine do it.
"""

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from massdpo.config.composition import plain
from massdpo.config.messages import comes_with, explain, near, nearest, shown
from massdpo.config.options import leaves, node_of, options_of, read_option
from massdpo.config.parts import check_part
from massdpo.config.precision import fast_precision
from massdpo.config.rules import CHOICES, PARTS, RULES
from massdpo.errors import UserError

TRAINING = ("train", "plan", "select")  # tasks that train a policy
OF_POLICIES = ("rank", "merge", "push")
OF_RUNS = ("evaluate", "explain", "show")  # tasks whose `in` is a run's folder
TASKS_OF = {  # options that only these tasks take
    **{"study": ("study",), "split": ("inspect",), "policy": OF_POLICIES, "id": ("explain",), "in": (*OF_RUNS, "rank")},
}
NEEDED = {  # options that a task cannot do without
    **{"evaluate": ("in",), "show": ("in",), "explain": ("in", "id"), "rank": ("in", "policy", "out")},
    **{"select": ("out",), "merge": ("policy", "out"), "push": ("policy", "out"), "study": ("study",)},
}


def validate(config: DictConfig) -> None:
    """Refuse a configuration that cannot be run as it stands.

    Raises:
        UserError: one line that names the key, its value, what is allowed, and the nearest right name.
    """
    try:
        values = plain(config)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    _check_keys(values)
    _check_values(values)
    for part in PARTS:
        check_part(part, values[part])
    _check_together(values)
    _check_model(values["model"], values["trainer"]["max_length"])
    if values["task"] in TRAINING and (bits := (values["trainer"]["adapter"] or {}).get("quantize")):
        _check_quantize(bits, values["model"], values["trainer"])
    _check_machine(values["trainer"])


def check_dataset(node: Mapping[str, Any]) -> None:
    """Refuse a dataset's node (resolved) if its reader does not take one of the options or values."""
    _check_values({"dataset": node})
    check_part("dataset", node)


def _check_keys(values: dict[str, Any]) -> None:
    """Refuse top-level and trainer keys that do not exist, and a node that lacks one."""
    top = {key.split(".")[0] for key in RULES} | set(PARTS) | {"choices"}
    for key in values:
        if key not in top:
            raise UserError(f"unknown key '{key}'{nearest(str(key), sorted(top))}")
    for key in (*sorted(top), *(f"choices.{group}" for group in CHOICES)):
        _require(values, key)
    for group, choice in values["choices"].items():
        if not isinstance(choice, str) and not (group == "method" and choice is None):
            raise UserError(f"the group '{group}' needs one option: {group}=NAME{nearest('', options_of(group))}")
    for part in (*PARTS, "trainer"):
        if not isinstance(values[part], dict):
            raise UserError(f"unknown {part} {shown(values[part])}{nearest(str(values[part]), options_of(part))}")
    _check_trainer(values)


def _check_trainer(values: dict[str, Any]) -> None:
    known = [key for key in RULES if key.startswith("trainer.")]
    if values["trainer"].get("adapter") is None:
        known = [key for key in known if not key.startswith("trainer.adapter.")]
    else:
        known.remove("trainer.adapter")
    for node in ("sft", "preference", "adapter"):
        given = values["trainer"].get(node, {})
        if not isinstance(given, dict) and f"trainer.{node}" not in known:
            inside = [key.split(".")[-1] for key in RULES if key.startswith(f"trainer.{node}.")]
            raise UserError(f"trainer.{node}={shown(given)} is not allowed: use {{{', '.join(inside)}}}")
    for key, _ in leaves({"trainer": values["trainer"]}):
        if key not in known:
            raise UserError(f"unknown key '{key}'{nearest(key, known)}")
    for key in known:
        if key != "trainer.adapter.quantize":  # an adapter given on the command line may leave this out
            _require(values, key)


def _require(values: dict[str, Any], key: str) -> None:
    node, last = node_of(values, key)
    if last not in node:
        raise UserError(f"the key '{key}' is missing: it was removed or overwritten")


def _check_values(values: dict[str, Any]) -> None:
    for key, rule in RULES.items():  # in this order: where selector.k is ${k}, k is to blame
        node, last = node_of(values, key)
        if last not in node or (key == "trainer.adapter" and isinstance(node[last], dict)):
            continue
        value = node[last]
        if not rule.holds(value):
            raise UserError(f"{key}={shown(value)} is not allowed: use {rule.allowed}{near(value, rule.names)}")


def _check_together(values: Mapping[str, Any]) -> None:
    """Refuse options that make no sense together."""
    task, trainer, dataset, selector = (values[key] for key in ("task", "trainer", "dataset", "selector"))
    _check_method(values["choices"])
    meaning = {
        "in": "a run's folder" if task in OF_RUNS else "a file",
        "id": "a prompt's id, as picks.jsonl and predictions.jsonl have it",
        "policy": "the folder of a trained policy",
        "out": {"select": "a folder", "merge": "a new folder", "push": "OWNER/NAME"}.get(task, "a file"),
        "study": " | ".join(RULES["study"].names),
    }
    for key in NEEDED.get(task, ()):
        if values[key] is None:
            raise UserError(f"task={task} needs {key}={meaning[key]}")
    for key, tasks in TASKS_OF.items():
        if values[key] is not None and task not in tasks:
            raise UserError(f"{key}={shown(values[key])} is for task={' | '.join(tasks)}, not for task={task}")
    if task == "select" or (task in ("train", "plan") and trainer["preference"]["epochs"] > 0):
        _check_slate(values["loss"], selector, dataset)


def _check_method(choices: Mapping[str, Any]) -> None:
    """Refuse another selector or loss than the method's: tables would call the run by the method's name."""
    if (method := choices["method"]) not in options_of("method"):
        return
    lines = read_option("method", method).get("defaults", [])
    own = {key: option for line in lines if not isinstance(line, str) for key, option in line.items()}
    for group in ("selector", "loss"):
        if choices[group] != (option := own.get(f"override /{group}", choices[group])):
            raise UserError(
                f"{group}={choices[group]} contradicts method={method}, which has {group}={option}: leave out method="
            )


def _check_slate(loss: Mapping[str, Any], selector: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    takes_k = "k" in selector  # selector=full trains on the whole pool
    if loss["_target_"] == "massdpo.training.losses.dpo" and not takes_k:
        raise UserError("loss=dpo takes one negative, but this selector takes the whole pool: use loss=pl or pairwise")
    if loss["_target_"] == "massdpo.training.losses.dpo" and selector["k"] != 1:
        raise UserError(f"loss=dpo takes one negative, but k={selector['k']}: use k=1, or loss=pl or pairwise")
    _check_draws(loss, selector)
    pool, screen = dataset.get("num_negatives"), selector.get("screen")
    if screen is not None and screen < selector["k"]:
        raise UserError(
            f"selector.screen={screen} is below k={selector['k']}: the k negatives are picked from those screened"
        )
    if takes_k and type(pool) is int and selector["k"] > pool and selector.get("short_pool", "error") == "error":
        raise UserError(
            f"k={selector['k']} is above dataset.num_negatives={pool}: use a smaller k, a larger pool,"
            " or selector.short_pool=all to train on the whole pool"
        )


def _check_draws(loss: Mapping[str, Any], selector: Mapping[str, Any]) -> None:
    """A loss that corrects for how negatives were drawn needs a selector that draws them, from the whole pool."""
    room, _, name = str(selector["_target_"]).rpartition(".")
    if loss["_target_"] != "massdpo.training.losses.is_pl" or not room.startswith("massdpo."):
        return
    if name not in ("Random", "Sampled", "TopRandom"):
        raise UserError("loss=is_pl corrects for negatives drawn by chance: use selector=random, sampled or top_random")
    if selector.get("screen") is not None:
        raise UserError("loss=is_pl knows the chances of draws from the whole pool: use selector.screen=null")


def _check_model(model: Mapping[str, Any], max_length: int) -> None:
    """Refuse a model from scratch that is too short for the texts, or whose sizes do not divide."""
    options = model.get("config") or {}
    context = options.get("max_position_embeddings", math.inf)
    if max_length > context:
        raise UserError(f"trainer.max_length={max_length} is above model.config.max_position_embeddings={context}")
    for size, parts in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if "head_dim" in options and size == "hidden_size":
            continue
        if size in options and parts in options and options[size] % options[parts]:
            raise UserError(
                f"model.config.{parts}={options[parts]} does not divide model.config.{size}={options[size]}"
            )


def _check_quantize(bits: str, model: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Refuse weights in few bits where they cannot be made: bitsandbytes loads them from a folder or the hub."""
    asked = f"trainer.adapter.quantize={bits}"
    if not importlib.util.find_spec("bitsandbytes"):
        raise UserError(f"{asked} needs bitsandbytes, which {comes_with('quantized')}")
    if "hub_id" not in model or str(model["path"]).endswith(".gguf"):
        raise UserError(f"{asked} needs a model from the hub or a folder: model.hub_id=OWNER/NAME or model.path=DIR")
    if bits == "8bit" and not _has_gpu(trainer):
        raise UserError(f"{asked} needs a GPU: on a CPU, training and evaluation would differ; use 4bit")
    if trainer["adapter"]["stages"] == "two":
        raise UserError(f"{asked} cannot merge the SFT adapter into the weights: use trainer.adapter.stages=one")


def _has_gpu(trainer: Mapping[str, Any]) -> bool:
    import torch  # seconds

    return trainer["device"] != "cpu" and torch.cuda.is_available()


def _check_machine(trainer: Mapping[str, Any]) -> None:
    if trainer["device"] == "cpu":
        return
    import torch  # seconds

    if trainer["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but PyTorch finds no GPU here: use trainer.device=cpu or auto")
    slow = trainer["precision"] == "bfloat16" and fast_precision(trainer["device"]) == "float32"
    if slow and torch.cuda.is_available():
        raise UserError("trainer.precision=bfloat16, but this GPU does not support it: use trainer.precision=float32")
