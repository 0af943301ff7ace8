"""A tokenizer's chat template: read the same every day, and its end of a turn is the end of every response."""

import re
import sys
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from massdpo.errors import UserError

TODAY = date(2024, 7, 26)  # for templates that print the date: what Llama 3's prints where it has no clock
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def settle_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `TODAY` where the template asks a clock, and make the token that closes a turn the end token, in place.

    A saved tokenizer keeps both, so that whoever loads the policy gives it the prompts that it was trained on and stops
    where it stops. A template that closes turns with no token of its own leaves the end token as it is.

    Raises:
        UserError: there is no template, or none for a user's turn and its answer.
    """
    if tokenizer.chat_template is None:
        raise UserError("trainer.chat_template=true, but the tokenizer has no chat template: set it to false")
    template = tokenizer.get_chat_template()
    tokenizer.chat_template = CLOCK.sub(lambda call: repr(TODAY.strftime(call[2])), template)
    if tokenizer.chat_template != template:
        print(f"note: the chat template prints a date: {TODAY:%d %b %Y}, whatever the day", file=sys.stderr)
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "massdpo"}]
    after = rendered(tokenizer, turns, "trainer.chat_template", answer=False).rpartition("massdpo")[2]
    for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
        added = tokenizer.added_tokens_decoder.get(token)
        if added and added.content.strip():  # Gemma has added tokens of line breaks alone
            tokenizer.eos_token = added.content
            return


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, answer: bool = True
) -> str:
    """The messages as the template writes them, up to where the answer begins, or as they are.

    Raises:
        UserError: the template refuses them (a system message, an order of roles); `where` names them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{where}: the chat template refuses messages of the roles {roles} ({' '.join(str(error).split())[:200]}): "
            "give them as it wants them, or set trainer.chat_template=false"
        ) from error
