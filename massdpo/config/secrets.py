"""Removes tokens and keys from what is written down or printed."""

import os
import re
from typing import Any

HIDDEN = "(hidden)"
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSW|_KEY$|APIKEY|CREDENTIAL", re.IGNORECASE)
USER_IN_ADDRESS = re.compile(r"(:/{1,2})[^/@\s]+@")  # a Path turns two slashes into one


def without_secrets(value: Any, key: str = "") -> Any:
    """A text, or plain values, without tokens and keys, so that they may be written down.

    Removed are the values of environment variables and of options that are named like one, and what precedes the @ of
    an address.
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
