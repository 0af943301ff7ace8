"""What the options are and may be: mistakes in a configuration are told in one line, before anything is computed.

`validate` works through four questions: is the value one that the option takes (`RULES`), does the part it configures
know the option (its signature), do the options make sense together, and can this machine do it.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from massdpo.errors import UserError

# What an option may be ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a value may be, in words and as a test; `names` are the words it is compared with if it is none of them."""

    allowed: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()

    def __or__(self, other: "Rule") -> "Rule":
        return Rule(
            f"{self.allowed}, or {other.allowed}",
            lambda value: self.holds(value) or other.holds(value),
            self.names + other.names,
        )


def one_of(*names: str) -> Rule:
    return Rule(" | ".join(names), lambda value: isinstance(value, str) and value in names, names)


def whole(least: int, most: int | None = None) -> Rule:
    allowed = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    return Rule(allowed, lambda value: type(value) is int and least <= value <= (value if most is None else most))


def number(allowed: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(
        allowed, lambda value: type(value) in (int, float) and math.isfinite(value) and holds(value)
    )  # bool is no number here


def flag() -> Rule:
    return Rule("true | false", lambda value: isinstance(value, bool))


def text(allowed: str) -> Rule:
    return Rule(allowed, lambda value: isinstance(value, str) and value != "")


SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]{0,199}")
METRIC = re.compile(r"(accuracy|mrr|(recall|ndcg)@(1|3|5|10))(_sum)?|reward_accuracy(_pairwise)?|margin(_max)?")

positive = number("a number above 0", lambda value: value > 0)
not_negative = number("a number of at least 0", lambda value: value >= 0)
share = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
between = number("a number between 0 and 1", lambda value: 0 < value < 1)
path = text("a path")
folder_name = Rule(
    "a plain folder name (letters, digits, . _ + = , @ -)",
    lambda value: isinstance(value, str) and SAFE_NAME.fullmatch(value) is not None,
)
metric_name = Rule(
    "accuracy | mrr | recall@N | ndcg@N (N is 1, 3, 5 or 10; each also with _sum) | reward_accuracy"
    " | reward_accuracy_pairwise | margin | margin_max",
    lambda value: isinstance(value, str) and METRIC.fullmatch(value) is not None,
    ("accuracy", "mrr", "recall@5", "ndcg@5", "reward_accuracy", "reward_accuracy_pairwise", "margin", "margin_max"),
)
module_names = Rule(
    "a list of module names",
    lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value),
)
wandb_name = Rule(  # never an address, which may hold a password
    "a name without / \\ # ? % : @",
    lambda value: isinstance(value, str) and re.fullmatch(r"[^\s/\\#?%:@][^/\\#?%:@]{0,127}", value) is not None,
)
null = Rule("null", lambda value: value is None)

RULES: dict[str, Rule] = {
    "task": one_of("train", "evaluate", "select", "rank", "inspect", "study"),
    "k": whole(1),
    "beta": positive,
    "refresh": one_of("step", "epoch", "once"),
    "seed": whole(0),
    "size": one_of("mini", "paper"),
    "sweep": folder_name,
    "name": folder_name | null,
    "runs_dir": path,
    "cache_dir": path,
    "data_dir": path | null,
    "force": flag(),
    "debug": flag(),
    "in": path | null,
    "policy": path | null,
    "out": path | null,
    "split": one_of("train", "val", "test") | null,
    "study": one_of("optimality", "features", "refresh", "loglinear") | null,
    "trainer.device": one_of("cpu", "cuda", "auto"),
    "trainer.precision": one_of("float32", "bfloat16"),
    "trainer.threads": whole(1) | null,
    "trainer.workers": whole(0),
    "trainer.max_length": whole(8),
    "trainer.chat_template": flag(),
    "trainer.gradient_checkpointing": flag(),
    "trainer.layout": one_of("auto", "packed", "repeated"),
    "trainer.adapter": Rule("null or {r, alpha, targets, stages}", lambda value: value is None),
    "trainer.adapter.r": whole(1),
    "trainer.adapter.alpha": positive,
    "trainer.adapter.targets": text("all-linear or a module name") | module_names,
    "trainer.adapter.stages": one_of("one", "two"),
    "trainer.batch_size": whole(1),
    "trainer.accumulate": whole(1),
    "trainer.eval_batch_size": whole(1),
    "trainer.weight_decay": not_negative,
    "trainer.max_grad_norm": positive,
    "trainer.warmup": share,
    "trainer.sft.epochs": whole(0),
    "trainer.sft.learning_rate": positive,
    "trainer.preference.epochs": whole(0),
    "trainer.preference.learning_rate": positive,
    "trainer.preference.limit": whole(1) | null,
    "trainer.log_every": whole(1),
    "trainer.checkpoint_every": whole(1),
    "trainer.keep": one_of("last", "best"),
    "trainer.keep_metric": metric_name,
    "trainer.generate": flag(),
    "trainer.save_policy": flag(),
    "dataset.name": folder_name,
    "dataset.terms": text("the data's terms of use"),
    "dataset.seed": whole(0),
    "dataset.num_negatives": whole(1) | one_of("own"),  # own where its class takes text
    "dataset.num_train": whole(1),
    "dataset.num_val": whole(1),
    "dataset.num_test": whole(1),
    "dataset.limit_train": whole(1) | null,
    "dataset.limit_val": whole(1) | null,
    "dataset.limit_test": whole(1) | null,
    "dataset.val_size": whole(1),
    "dataset.val_fraction": between,
    "dataset.test_fraction": between,
    "model.vocab_size": whole(1),
    "model.config.hidden_size": whole(1),
    "model.config.intermediate_size": whole(1),
    "model.config.num_hidden_layers": whole(1),
    "model.config.num_attention_heads": whole(1),
    "model.config.num_key_value_heads": whole(1),
    "model.config.max_position_embeddings": whole(1),
    "model.dtype": one_of("float32", "bfloat16"),
    "selector.k": whole(1),
    "selector.variant": one_of("centered", "relative", "subset_fisher"),
    "selector.features": one_of("mean", "last", "head"),
    "selector.normalize": flag(),
    "selector.ridge": positive,
    "selector.ridge_relative": flag(),
    "selector.solver": one_of("greedy", "swap", "exact"),
    "selector.score": one_of("mean", "sum"),
    "selector.short_pool": one_of("error", "all"),
    "logger.project": wandb_name,
    "logger.entity": wandb_name | null,
    "logger.mode": one_of("offline", "online"),
    "logger.timeout": positive,
}
OWN_POOL = Rule(
    "own", lambda value: value == "own", ("own",)
)  # a question's own wrong options, where the class knows it

TASKS_OF = {"study": ("study",), "split": ("inspect",), "in": ("evaluate", "rank"), "policy": ("rank",)}
PARTS = ("dataset", "model", "selector", "loss", "logger")  # groups whose node builds an object, by `_target_`
CHOICES = ("dataset", "model", "selector", "loss", "method")  # what `choices` holds
HANDLED = {"dataset": ("name", "terms", "limit_train", "limit_val", "limit_test")}  # options no class ever sees

# Options that cannot change what a run computes; content (weights, data) has digests of its own.
NOT_IDENTITY = (
    *("sweep", "name", "runs_dir", "cache_dir", "data_dir", "force", "debug", "policy", "out", "size", "logger"),
    *("choices", "trainer.workers", "trainer.checkpoint_every", "dataset.name", "dataset.terms"),
    *("dataset.raw_dir", "dataset.path", "dataset.val_path", "dataset.test_path"),
)


def validate(config: DictConfig) -> None:
    """Refuse a configuration that cannot be run as it stands.

    Raises:
        UserError: one line that names the key, its value, what is allowed, and the nearest right name.
    """
    try:
        values = _plain(config)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    _check_keys(values)
    _check_values(values)
    for part in PARTS:
        _check_part(part, values[part])
    _check_together(values)
    _check_model(values["model"], values["trainer"]["max_length"])
    _check_machine(values["trainer"])


def _check_keys(values: Mapping[str, Any]) -> None:
    """Every top-level and trainer key is one of ours, and none was removed."""
    top = {key.split(".")[0] for key in RULES} | set(PARTS) | {"choices"}
    for key in values:
        if key not in top:
            raise UserError(f"unknown key '{key}'{_nearest(str(key), sorted(top))}")
    for key in (*sorted(top), *(f"choices.{group}" for group in CHOICES)):
        _require(values, key)
    for group, choice in values["choices"].items():
        if not isinstance(choice, str) and not (group == "method" and choice is None):
            raise UserError(f"the group '{group}' needs one option: {group}=NAME{_nearest('', _options(group))}")
    for part in (*PARTS, "trainer"):
        if not isinstance(values[part], dict):
            raise UserError(f"unknown {part} {_shown(values[part])}{_nearest(str(values[part]), _options(part))}")
    _check_trainer(values)


def _check_trainer(values: Mapping[str, Any]) -> None:
    known = [key for key in RULES if key.startswith("trainer.")]
    if values["trainer"].get("adapter") is None:
        known = [key for key in known if not key.startswith("trainer.adapter.")]
    else:
        known.remove("trainer.adapter")
    for node in ("sft", "preference", "adapter"):
        given = values["trainer"].get(node, {})
        if not isinstance(given, dict) and f"trainer.{node}" not in known:
            inside = [key.split(".")[-1] for key in RULES if key.startswith(f"trainer.{node}.")]
            raise UserError(f"trainer.{node}={_shown(given)} is not possible: {{{', '.join(inside)}}}")
    for key, _ in _leaves({"trainer": values["trainer"]}):
        if key not in known:
            raise UserError(f"unknown key '{key}'{_nearest(key, known)}")
    for key in known:
        _require(values, key)


def _require(values: Mapping[str, Any], key: str) -> None:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            raise UserError(f"the key '{key}' is missing: it was removed or overwritten")
        values = values[name]


def _check_values(values: Mapping[str, Any]) -> None:
    for key, rule in RULES.items():  # in this order: where selector.k is ${k}, k is at fault
        node, last = _node_of(values, key)
        if last not in node or (key == "trainer.adapter" and isinstance(node[last], dict)):
            continue
        value = node[last]
        if not rule.holds(value):
            raise UserError(f"{key}={_shown(value)} is not possible: {rule.allowed}{_near(value, rule.names)}")


def _node_of(values: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], str]:
    """The mapping that a dotted key stands in (an empty one, where there is none), and the key's last part."""
    *above, last = key.split(".")
    for name in above:
        inside = values.get(name)
        values = inside if isinstance(inside, dict) else {}
    return values, last


def _check_part(part: str, node: Mapping[str, Any]) -> None:
    """The object that a group's node builds exists and takes its options, by name and type."""
    target = node.get("_target_")
    try:
        module, _, name = str(target).rpartition(".")
        built = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may fail in any way while it is imported
        raise UserError(f"{part}._target_={_shown(target)} cannot be imported: {str(error).splitlines()[0]}") from error
    hints = typing.get_type_hints(built.__init__ if inspect.isclass(built) else built)
    parameters = dict(inspect.signature(built).parameters)
    if node.get("_partial_"):  # training fills in the positional ones
        parameters = {key: value for key, value in parameters.items() if value.default is not inspect.Parameter.empty}
    known = [*parameters, *HANDLED.get(part, ())]
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in known and not any(given.kind is given.VAR_KEYWORD for given in parameters.values()):
            names = [f"{part}.{name}" for name in known]
            raise UserError(f"unknown key '{part}.{key}'{_nearest(f'{part}.{key}', names)}")
        if key in hints and not _is_a(value, hints[key]):
            raise UserError(f"{part}.{key}={_shown(value)} is not possible: {_type_name(hints[key])}")
    for key, parameter in parameters.items():
        if key not in node and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise UserError(f"the key '{part}.{key}' is missing: it was removed or overwritten")
    if part in ("dataset", "model", "selector"):  # their constructors compute nothing, but check what is theirs
        built(**{key: value for key, value in node.items() if key in parameters})


def _check_together(values: Mapping[str, Any]) -> None:
    """What is meaningless in combination."""
    task, trainer, dataset, selector = (values[key] for key in ("task", "trainer", "dataset", "selector"))
    needed = {"evaluate": ("in",), "rank": ("in", "policy", "out"), "select": ("out",), "study": ("study",)}
    meaning = {
        "in": "a run's folder" if task == "evaluate" else "a file",
        "policy": "the folder of a trained policy",
        "out": "a folder" if task == "select" else "a file",
        "study": RULES["study"].names,
    }
    for key in needed.get(task, ()):
        if values[key] is None:
            said = meaning[key] if isinstance(meaning[key], str) else " | ".join(meaning[key])
            raise UserError(f"task={task} needs {key}={said}")
    for key, tasks in TASKS_OF.items():
        if values[key] is not None and task not in tasks:
            raise UserError(f"{key}={_shown(values[key])} is for task={' | '.join(tasks)}, not for task={task}")
    if dataset.get("val_fraction", 0) + dataset.get("test_fraction", 0) >= 1:
        raise UserError("dataset.val_fraction + dataset.test_fraction must be below 1: no row is left for training")
    if task == "select" or (task == "train" and trainer["preference"]["epochs"] > 0):
        _check_slate(values["k"], values["loss"], selector, dataset)


def _check_slate(k: int, loss: Mapping[str, Any], selector: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    takes_k = "k" in selector  # selector=full trains on the whole pool
    if loss["_target_"] == "massdpo.losses.dpo" and not takes_k:
        raise UserError("loss=dpo takes one negative, but this selector takes the whole pool: use loss=pl or pairwise")
    if loss["_target_"] == "massdpo.losses.dpo" and selector["k"] != 1:
        raise UserError(f"loss=dpo takes one negative, but k={selector['k']}: use k=1, or loss=pl or pairwise")
    pool = dataset.get("num_negatives")
    if takes_k and type(pool) is int and selector["k"] > pool and selector.get("short_pool", "error") == "error":
        raise UserError(
            f"k={selector['k']} is above dataset.num_negatives={pool}: use a smaller k, a larger pool,"
            " or selector.short_pool=all to train on the whole pool"
        )


def _check_model(model: Mapping[str, Any], max_length: int) -> None:
    """A model from scratch holds the texts, and its sizes divide; a pretrained one brings its own."""
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


def _check_machine(trainer: Mapping[str, Any]) -> None:
    if trainer["device"] == "cpu":
        return  # PyTorch computes bfloat16 on every CPU
    import torch  # seconds

    if trainer["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but PyTorch finds no GPU here: use trainer.device=cpu or auto")
    on_gpu = torch.cuda.is_available()
    if on_gpu and trainer["precision"] == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("trainer.precision=bfloat16, but this GPU has none: use trainer.precision=float32")


def _is_a(value: Any, hint: Any) -> bool:
    """Is a plain value of the type that a parameter names? Whole numbers are floats too, true and false no numbers."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, option) for option in inside)
    if origin is typing.Literal:
        return value in inside
    if hint in (None, types.NoneType):
        return value is None
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if hint is int:
        return type(value) is int
    if hint in (str, bool):
        return isinstance(value, hint)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(_is_a(item, inside[0]) for item in value)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return isinstance(value, dict)
    return True  # a class of the user's own: theirs to check


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true | false", types.NoneType: "null"}


def _type_name(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(_type_name(option) for option in inside)
    if origin is typing.Literal:
        return " | ".join(map(str, inside))
    if origin in (list, tuple, Sequence):
        return "a list"
    return _TYPE_NAMES.get(hint, "a mapping of names to values")


# How mistakes are told ------------------------------------------------------------------------------------------------


def explain(error: Exception) -> str:
    """One line for what Hydra or OmegaConf say in several: what is wrong, and the nearest right name."""
    said = str(error)
    if isinstance(error, MissingConfigException) and (found := re.search(r"Could not find '(\w+)/([^']*)'", said)):
        group, option = found.groups()
        return f"unknown {group} '{option}'{_nearest(option, _options(group))}"
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", said):
        return f"unknown key '{found[1]}'{_nearest(found[1], _known_keys())}"
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", said):
        return f"the key '{found[1]}' is there already: write {found[1]}=VALUE, without the +"
    if found := re.search(r"Multiple values for (\S+)\. ", said):
        return f"the group '{found[1]}' is there already: write {found[1]}=NAME, without the +"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", said):
        return f"'{found[1]}' has several values: add -m to run one after the other, or write a list as key=[a,b]"
    if isinstance(error, OverrideParseException):
        given = f" '{error.override}'" if getattr(error, "override", None) else ""
        reason = said.split("\nSee https")[0].splitlines()[-1].strip(" ^") if said else ""
        return f"cannot read the argument{given}: write KEY=VALUE, with quotes around special characters ({reason})"
    if found := re.search(r"Missing mandatory value: (\S+)", said):
        return f"the key '{found[1]}' has no value: write {found[1]}=VALUE"
    if isinstance(error, InterpolationKeyError) and (found := re.search(r"Interpolation key '([^']+)'", said)):
        if found[1] in _known_keys():
            return f"the key '{found[1]}' is missing: it was removed or overwritten"
        return f"the reference ${{{found[1]}}} leads nowhere{_nearest(found[1], _known_keys())}"
    if said.startswith("Config group override must be"):
        return "a group needs the name of an option: write GROUP=NAME, as in selector=mass"
    if found := re.search(r"hydra:runtime\.choices\.(\w+)|runtime\.choices\.(\w+)", said):
        return f"the group '{found[1] or found[2]}' needs one option: write {found[1] or found[2]}=NAME"
    if found := re.search(r"Environment variable '(\w+)' not found", said):
        return f"the environment variable {found[1]} that the configuration refers to is not set"
    return " ".join(said.split())


def _nearest(word: str, names: Sequence[str]) -> str:
    """'; did you mean NAME?', or all names where none is near and they are not many."""
    return _near(word, names) or (f"; there are {', '.join(names)}" if 0 < len(names) <= 20 else "")


OTHER_WORDS = {"lr": "learning_rate", "gamma": "ridge", "lora": "adapter", "lora_alpha": "alpha"}  # people's for ours


def _near(word: Any, names: Sequence[str]) -> str:
    """'; did you mean NAME?' for a word near a name, or near the last part of a dotted one; else nothing."""
    if not isinstance(word, str):
        return ""
    last = word.lower().split(".")[-1]
    last, last_parts = OTHER_WORDS.get(last, last), [name.lower().split(".")[-1] for name in names]
    if near := difflib.get_close_matches(last, last_parts, n=1, cutoff=0.6):
        alike = [name for name, part in zip(names, last_parts, strict=True) if part == near[0]]
        return f"; did you mean '{difflib.get_close_matches(word, alike, n=1, cutoff=0.0)[0]}'?"
    return ""


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# For conf/setting and sweeps/: where raw files are below data_dir (null: fetched), and what goes with a size.
OmegaConf.register_new_resolver(
    "within", lambda folder, name: None if folder is None else f"{folder}/{name}", replace=True
)
OmegaConf.register_new_resolver("pick", lambda name, options: options[name], replace=True)


# Where the options come from ------------------------------------------------------------------------------------------


def _root() -> Path:
    return Path(os.environ.get("MASSDPO_ROOT") or Path(__file__).resolve().parents[1])


def _options(group: str) -> list[str]:
    """The options of a group: files in conf/, or beside it (sweeps/)."""
    return sorted(file.stem for place in ("conf", ".") for file in (_root() / place / group).glob("*.yaml"))


def _known_keys() -> list[str]:
    """Every dotted key and group that conf/ knows."""
    keys = dict.fromkeys([*RULES, *PARTS, "trainer", "method", "setting", "sweeps"])
    for file in sorted((_root() / "conf").glob("*/*.yaml")):
        if file.parent.name in (*PARTS, "trainer"):
            node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            node.pop("defaults", None)
            keys |= dict.fromkeys(key for key, _ in _leaves({file.parent.name: node}) if not key.endswith("_"))
    return list(keys)


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that `python run.py OVERRIDES` runs with, outside of a Hydra job: for tests and notebooks.

    Raises:
        UserError: an unknown key or option, or an override that cannot be read.
    """
    os.environ.setdefault("MASSDPO_ROOT", str(_root()))
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(_root() / "conf")):
            config = hydra_compose("config", list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:  # a group that is no name
        raise UserError(explain(error)) from error
    return as_composed(config)


def as_composed(config: DictConfig) -> DictConfig:
    """A config with Hydra's own node, as Hydra composes it outside of a job -> as a job sees it, resolved.

    Raises:
        UserError: a reference that leads nowhere.
    """
    choices = config.hydra.runtime.choices
    OmegaConf.set_struct(config, False)
    config.choices = {group: choices.get(group) for group in CHOICES}
    config.pop("hydra")
    try:
        whole_config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(whole_config, DictConfig)
    OmegaConf.set_struct(whole_config, True)
    return whole_config


EXPECTED = "expected.json"  # in a sweep's folder: name -> {"job", "command", "config"} of every run that was asked for

# What makes a run the same --------------------------------------------------------------------------------------------


def identity(config: DictConfig) -> dict[str, Any]:
    """The resolved options that can change what a run computes or writes, as plain values for json.

    Data and package version belong to a run's identity too, but are not options: pass them to `run_name` beside this.
    """
    values = _plain(config)
    for key in NOT_IDENTITY:
        *above, last = key.split(".")
        node = values
        for name in above:
            node = node[name]
        node.pop(last, None)
    if not values["trainer"]["generate"]:
        del values["trainer"]["generate"]  # it came after the first runs: off, it changes none of their names
    return values


def run_name(config: DictConfig, *content: str) -> str:
    """A folder name: `<dataset>-<model>-<selector>-<loss>-k<k>-b<beta>-s<seed>-<hash>`.

    The hash is of the identity and of `content`: what else the numbers depend on (the data's digest, the version).
    """
    values, choices = _plain(config), _plain(config)["choices"]
    key = json.dumps([identity(config), *content], sort_keys=True)
    parts = [choices[group] for group in ("dataset", "model", "selector", "loss")]
    parts += [f"k{values['k']}", f"b{values['beta']:g}", f"s{values['seed']}"]
    name = "-".join([*parts, hashlib.blake2b(key.encode(), digest_size=4).hexdigest()])
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def resolved(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration for `config.yaml`, with secrets taken out of keys, addresses and values."""
    cleaned = without_secrets(_plain(config))
    assert isinstance(cleaned, dict)
    return cleaned


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    values.pop("hydra", None)
    return typing.cast(dict[str, Any], values)


HIDDEN = "(hidden)"
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSW|_KEY$|APIKEY|CREDENTIAL", re.IGNORECASE)
USER_IN_ADDRESS = re.compile(r"(:/{1,2})[^/@\s]+@")  # a path makes one slash of two


def without_secrets(value: Any, key: str = "") -> Any:
    """A text, or plain values, as they may be written down: without tokens and keys.

    These are the values of the environment's variables that are named like one, of options that are named like one,
    and what stands before the @ of an address.
    """
    if isinstance(value, dict):
        return {name: without_secrets(inside, str(name)) for name, inside in value.items()}
    if isinstance(value, list):
        return [without_secrets(inside, key) for inside in value]
    if not isinstance(value, str):
        return value
    if SECRET_KEY.search(key):
        return HIDDEN
    value = USER_IN_ADDRESS.sub(r"\1", value)
    for name, secret in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(secret) >= 8:
            value = value.replace(secret, HIDDEN)
    return value
