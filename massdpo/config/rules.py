"""What the value of an option may be: `RULES` is the table, by key."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value may be, in words and as a test; a wrong value is compared with `names` for the nearest one."""

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
    """True and false are not numbers here."""
    return Rule(allowed, lambda value: type(value) in (int, float) and math.isfinite(value) and holds(value))


def flag() -> Rule:
    return Rule("true | false", lambda value: isinstance(value, bool))


def text(allowed: str) -> Rule:
    return Rule(allowed, lambda value: isinstance(value, str) and value != "")


SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]{0,199}")

positive = number("a number above 0", lambda value: value > 0)
not_negative = number("a number of at least 0", lambda value: value >= 0)
share = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
between = number("a number between 0 and 1", lambda value: 0 < value < 1)
path = text("a path")
folder_name = Rule(
    "a plain folder name (letters, digits, . _ + = , @ -)",
    lambda value: isinstance(value, str) and SAFE_NAME.fullmatch(value) is not None,
)
module_names = Rule(
    "a list of module names",
    lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value),
)
wandb_name = Rule(  # never an address, which may contain a password
    "a name without / \\ # ? % : @",
    lambda value: isinstance(value, str) and re.fullmatch(r"[^\s/\\#?%:@][^/\\#?%:@]{0,127}", value) is not None,
)
null = Rule("null", lambda value: value is None)

RULES: dict[str, Rule] = {
    "task": one_of(
        "train", "plan", "show", "explain", "evaluate", "select", "rank", "merge", "push", "inspect", "study"
    ),
    "k": whole(1),
    "beta": positive,
    "refresh": one_of("step", "epoch", "once"),
    "seed": whole(0),
    "size": one_of("mini", "small", "paper"),
    "sweep": folder_name,
    "name": folder_name | null,
    "runs_dir": path,
    "cache_dir": path,
    "data_dir": path | null,
    "force": flag(),
    "debug": flag(),
    "verbosity": one_of("quiet", "normal", "debug"),
    "in": path | null,
    "id": text("a prompt's id") | whole(0) | null,
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
    "trainer.adapter": Rule("null or {r, alpha, targets, stages, quantize}", lambda value: value is None),
    "trainer.adapter.r": whole(1),
    "trainer.adapter.alpha": positive,
    "trainer.adapter.targets": text("all-linear or a module name") | module_names,
    "trainer.adapter.stages": one_of("one", "two"),
    "trainer.adapter.quantize": one_of("4bit", "8bit") | null,
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
    "trainer.patience": whole(1) | null,
    "trainer.keep_metric": text("a metric of the validation split"),  # the evaluation knows which there are
    "trainer.picks": one_of("last", "all"),
    "trainer.generate": flag(),
    "trainer.save_policy": flag(),
    "dataset.name": folder_name,
    "dataset.terms": text("the data's terms of use"),
    "dataset.seed": whole(0),
    "dataset.num_negatives": whole(1) | one_of("own"),  # own where the reader takes text
    "dataset.min_history": whole(1),
    "dataset.max_history": whole(1),
    "dataset.num_train": whole(1),
    "dataset.num_val": whole(1),
    "dataset.num_test": whole(1),
    "dataset.long_rows": one_of("error", "skip", "truncate"),
    "dataset.limit_train": whole(1) | null,
    "dataset.limit_val": whole(1) | null,
    "dataset.limit_test": whole(1) | null,
    "dataset.val_size": whole(1) | between,  # a share where the reader takes one
    "dataset.test_size": whole(1) | between,
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
    "selector.top": whole(1) | null,
    "selector.beta_margin": positive | null,
    "selector.screen": whole(1) | null,
    "selector.short_pool": one_of("error", "all"),
    "logger.project": wandb_name,
    "logger.entity": wandb_name | null,
    "logger.mode": one_of("offline", "online"),
    "logger.timeout": positive,
}

PARTS = ("dataset", "model", "selector", "loss", "logger")  # groups whose node builds an object, its `_target_`
CHOICES = ("dataset", "model", "selector", "loss", "method")  # what `choices` holds
