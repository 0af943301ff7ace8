"""A tokenizer's chat template, made to print the same date every day; what ends a turn also ends every response."""

import json
import re
import subprocess
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from massdpo.errors import UserError

SECONDS, MEGABYTES = 10, 256  # the limits of one rendering, which needs microseconds and kilobytes
TODAY = date(2024, 7, 26)  # for templates that print the date: Llama 3's prints this one where it has no clock
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def settle_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `TODAY` where the template asks for the date, and make the token that ends a turn the end token, in place.

    A saved tokenizer keeps both, so that whoever loads the policy builds the prompts that it was trained on and stops
    where it stops. Where the template ends turns without a token of its own, the end token stays as it is.

    Raises:
        UserError: there is no template, or none for a user's turn and its answer.
    """
    if tokenizer.chat_template is None:
        raise UserError("trainer.chat_template=true, but the tokenizer has no chat template: set it to false")
    templates: Any = tokenizer.chat_template
    template = templates.get("default") if isinstance(templates, dict) else templates
    if not isinstance(template, str):
        raise UserError("trainer.chat_template=true, but the tokenizer has several chat templates and no default one")
    tokenizer.chat_template = CLOCK.sub(lambda call: repr(TODAY.strftime(call[2])), template)
    if tokenizer.chat_template != template:
        print(f"note: the chat template prints a date: {TODAY:%d %b %Y}, whatever the day", file=sys.stderr)
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "massdpo"}]
    after = rendered(tokenizer, turns, "trainer.chat_template", answer=False).rpartition("massdpo")[2]
    for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
        added = tokenizer.added_tokens_decoder.get(token)
        if added and added.content.strip():  # Gemma has added tokens that are only line breaks
            tokenizer.eos_token = added.content
            return


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, answer: bool = True
) -> str:
    """The messages as the template writes them; with `answer`, up to where the assistant's answer begins.

    Raises:
        UserError: the template refuses them (a system message, an order of roles), or needs more than `SECONDS` or
            `MEGABYTES`; `where` says whose messages they are.
    """
    found = _asked(
        {
            "seconds": SECONDS,
            "conversations": [messages],
            "chat_template": tokenizer.chat_template,
            "add_generation_prompt": answer,
            **tokenizer.special_tokens_map,
        }
    )
    if "text" in found:
        return found["text"]
    roles = ", ".join(message["role"] for message in messages)
    raise UserError(
        f"{where}: the chat template refuses messages of the roles {roles} ({found['why']}): "
        "use the roles that it expects, or set trainer.chat_template=false"
    )


@cache
def _renderer() -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", str(Path(__file__).with_name("render.py")), str(MEGABYTES)]
    # In a session of its own, Ctrl-C does not reach it; it ends when its input does, and so with this process.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii", start_new_session=True
    )


def _asked(request: dict[str, Any]) -> dict[str, str]:
    """The answer of the rendering process to a request."""
    process = _renderer()
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        found: dict[str, str] = json.loads(process.stdout.readline())
        return found
    except BaseException as error:  # it has ended, or this process was interrupted before it answered
        process.kill()
        process.communicate()
        _renderer.cache_clear()
        if isinstance(error, OSError | ValueError):
            return {"why": f"it takes more than {SECONDS} s or {MEGABYTES} MB"}
        raise
