"""A tokenizer's chat template: read the same every day, and its end of a turn is the end of every response.

A template is a program of whoever made the model. Jinja's sandbox, as `transformers` uses it, keeps it from files and
from Python's insides, but not from looping or filling the memory: so it runs in a process that the system ends.
"""

import json
import os
import re
import resource
import signal
import sys
import weakref
from contextlib import suppress
from datetime import date
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import psutil
from transformers import PreTrainedTokenizerBase

from massdpo.errors import UserError, one_line

SECONDS, MEGABYTES = 10, 256  # of one rendering, which takes some microseconds and kilobytes
TOO_MUCH = f"it takes more than {SECONDS} s or {MEGABYTES} MB"
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
        if added and added.content.strip():  # Gemma has added tokens of line breaks alone
            tokenizer.eos_token = added.content
            return


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, answer: bool = True
) -> str:
    """The messages as the template writes them, up to where the answer begins, or as they are.

    Raises:
        UserError: the template refuses them (a system message, an order of roles), or takes more than `SECONDS` or
            `MEGABYTES`; `where` names them.
    """
    if tokenizer not in _RENDERERS:
        _RENDERERS[tokenizer] = _Renderer(tokenizer)
    try:
        found = _RENDERERS[tokenizer](messages, tokenizer.chat_template, answer)
    except BaseException as error:  # the process has ended, or its answer stays unread
        del _RENDERERS[tokenizer]
        if not isinstance(error, EOFError | OSError):
            raise
        found = {"why": TOO_MUCH}
    if "text" in found:
        return found["text"]
    roles = ", ".join(message["role"] for message in messages)
    raise UserError(
        f"{where}: the chat template refuses messages of the roles {roles} ({found['why'][:200]}): "
        "use the roles that it expects, or set trainer.chat_template=false"
    )


class _Renderer:
    """A child process that renders what it is asked to, and goes with this object or with this process.

    It is forked: nothing is imported anew, and the tokenizer's own way of applying a template is what runs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._ours, theirs = Pipe()
        child = os.fork()
        if not child:
            self._ours.close()  # the end of this process is the end of the pipe then
            _render(tokenizer, theirs)
        theirs.close()
        weakref.finalize(self, _end, child, os.getpid())

    def __call__(self, *asked: Any) -> dict[str, str]:
        self._ours.send_bytes(json.dumps(asked).encode())
        found: dict[str, str] = json.loads(self._ours.recv_bytes())
        return found


_RENDERERS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _Renderer] = weakref.WeakKeyDictionary()


def _render(tokenizer: PreTrainedTokenizerBase, pipe: Connection) -> NoReturn:
    try:
        for number, what in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(number, what)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
        with suppress(ValueError, OSError):  # not every system limits it
            limit = psutil.Process().memory_info().vms + (MEGABYTES << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while True:
            messages, template, answer = json.loads(pipe.recv_bytes())
            signal.alarm(SECONDS)
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=answer
                )
                found = json.dumps({"text": str(text)})
            except MemoryError:
                found = json.dumps({"why": TOO_MUCH})
            except Exception as error:  # whatever a template makes of Jinja
                found = json.dumps({"why": one_line(error) or type(error).__name__})
            signal.alarm(0)
            pipe.send_bytes(found.encode())
    finally:
        os._exit(0)


def _end(child: int, parent: int) -> None:
    if os.getpid() == parent:  # not a copy of it
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
