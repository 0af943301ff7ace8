"""Conversations as TRL has them: lists of {"role", "content"}."""

from typing import Any

from massdpo.errors import UserError

ROLES = {"system", "user", "assistant", "tool"}
Messages = list[dict[str, str]]


def checked_messages(where: str, name: str, value: Any) -> Messages:
    """The messages of the field `name`, each with its role and a content that is not blank."""
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: "{name}" must be a text or a list of messages, found {found(value)}')
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f'{where}: "{name}" has a message without the texts "role" and "content": {found(message)}')
        if message["role"] not in ROLES:
            raise UserError(
                f'{where}: "{name}" has a message of the role {message["role"]!r}: {", ".join(sorted(ROLES))}'
            )
        if not message["content"].strip():
            raise UserError(f'{where}: "{name}" has a message without content')
    return [{"role": message["role"], "content": message["content"]} for message in value]


def with_prompt(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row whose prompt stands only in its conversations: what comes before the last message of each is the prompt."""
    rejected = row["rejected"]
    several = isinstance(rejected, list) and rejected and isinstance(rejected[0], list)
    chosen = checked_messages(where, "chosen", row["chosen"])
    others = [checked_messages(where, "rejected", each) for each in (rejected if several else [rejected])]
    if any(each[:-1] != chosen[:-1] for each in others):
        raise UserError(
            f'{where}: no "prompt", and "chosen" and "rejected" do not begin alike up to their last message'
        )
    if len(chosen) < 2:
        raise UserError(f'{where}: no "prompt", neither as a field nor as the messages before the last')
    return row | {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": [each[-1:] for each in others]}


def as_text(messages: Messages) -> str:
    """Several messages as lines "role: content" that end with "assistant:", for models without a chat template."""
    return "\n".join([*(f"{message['role']}: {message['content']}" for message in messages), "assistant:"])


def found(value: Any) -> str:
    kind = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}.get(type(value), "")
    return "an empty list" if value == [] else kind or f"{str(value)[:40]!r}"
