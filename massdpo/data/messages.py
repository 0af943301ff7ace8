"""Conversations, in the forms that people keep them in, as lists of {"role", "content"}."""

import re
from collections import Counter
from typing import Any

from massdpo.errors import UserError

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant", "tool")
# what others call the roles: ShareGPT, OpenAI, functions
OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # marks the turns of a dialogue in one text


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def checked_messages(where: str, name: str, value: Any, counts: Counter[str]) -> Messages:
    """The messages in the field `name`, each with a role and a content that is not blank; `counts` counts changes.

    Raises:
        UserError: it is not a list of messages, or one of them has an unknown role, no text, or something besides text.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: "{name}" must be a text or a list of messages, found {found(value)}')
    return [_checked(where, name, message, counts) for message in value]


def _checked(where: str, name: str, message: Any, counts: Counter[str]) -> dict[str, str]:
    if not is_message(message):
        raise UserError(f'{where}: "{name}" has a message without the texts "role" and "content": {found(message)}')
    role, content = (message["role"], message["content"]) if "role" in message else (message["from"], message["value"])
    given = str(role).lower()
    role = OTHER_NAMES.get(given, given)
    if role not in ROLES:
        raise UserError(
            f'{where}: "{name}" has a message with the unknown role {given!r}: use {", ".join(sorted(ROLES))}'
        )
    counts["roles_renamed"] += given == "developer"
    if isinstance(content, list):
        content = "".join(_part(where, name, part) for part in content)
    calls = bool(message.get("tool_calls") or message.get("function_call"))
    if content is None and calls:
        raise UserError(
            f'{where}: "{name}" has a message that only calls a tool (its content is null): a text is needed'
        )
    counts["tool_calls_dropped"] += calls
    if not isinstance(content, str):
        raise UserError(f'{where}: "{name}" has a message whose content is not a text: {found(content)}')
    if not content.strip():
        raise UserError(f'{where}: "{name}" has a message without content')
    return {"role": role, "content": content}


def _part(where: str, name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type", "unknown") if isinstance(part, dict) else found(part)
        raise UserError(f'{where}: "{name}" has a message with a part of the type {kind}: only text is read')
    return str(part["text"])


def dialogue(text: str) -> Messages:
    """The messages of a prompt that is a dialogue in one text and ends where the assistant is to answer; or none."""
    start, *turns = TURN.split(text)
    if start or len(turns) < 4 or turns[-2] != "Assistant" or turns[-1].strip():
        return []
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[name], "content": said} for name, said in zip(turns[:-2:2], turns[1:-2:2], strict=True)]


def as_text(messages: Messages) -> str:
    """Several messages as lines "role: content" that end with "assistant:", for models without a chat template."""
    return "\n".join([*(f"{message['role']}: {message['content']}" for message in messages), "assistant:"])


def found(value: Any) -> str:
    kind = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}.get(type(value), "")
    return "an empty list" if value == [] else kind or f"{str(value)[:40]!r}"
