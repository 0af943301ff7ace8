"""Checks a group's node against what it builds: does that exist, and take these options by its signature and hints?"""

import importlib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import hydra.errors
import hydra.utils

from massdpo.config.messages import nearest, shown
from massdpo.errors import UserError

HANDLED = {  # options that are handled before a class is built
    "dataset": ("name", "terms", "long_rows", "limit_train", "limit_val", "limit_test"),
    "selector": ("screen",),
}


def check_part(part: str, node: Mapping[str, Any]) -> None:
    """Refuse a group's node whose object does not exist, or does not take its options by name and type."""
    target = node.get("_target_")
    try:
        module, _, name = str(target).rpartition(".")
        built = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a module can raise anything
        raise UserError(f"{part}._target_={shown(target)} cannot be imported: {str(error).splitlines()[0]}") from error
    hints = typing.get_type_hints(built.__init__ if inspect.isclass(built) else built)
    parameters = dict(inspect.signature(built).parameters)
    if node.get("_partial_"):  # training passes the positional ones
        parameters = {key: value for key, value in parameters.items() if value.default is not inspect.Parameter.empty}
    known = [*parameters, *HANDLED.get(part, ())]
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in known and not any(given.kind is given.VAR_KEYWORD for given in parameters.values()):
            names = [f"{part}.{name}" for name in known]
            raise UserError(f"unknown key '{part}.{key}'{nearest(f'{part}.{key}', names)}")
        if key in hints and not _is_a(value, hints[key]):
            raise UserError(f"{part}.{key}={shown(value)} is not allowed: use {_type_name(hints[key])}")
    for key, parameter in parameters.items():
        if key not in node and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise UserError(f"the key '{part}.{key}' is missing: it was removed or overwritten")
    if part in ("dataset", "model", "selector"):  # their constructors compute nothing, but check the options
        built(**{key: value for key, value in node.items() if key in parameters})


def instantiate(node: Mapping[str, Any], **how: Any) -> Any:
    """The object that a group's node describes; a UserError of its own is raised as it is."""
    given = {key: value for key, value in node.items() if key != "screen"} if "screen" in node else node
    try:
        return hydra.utils.instantiate(given, **how)
    except hydra.errors.InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None


def _is_a(value: Any, hint: Any) -> bool:
    """Is a plain value of a parameter's type? Whole numbers are floats too; true and false are not numbers."""
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
    return True  # a type of the user's own, which their class checks


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
