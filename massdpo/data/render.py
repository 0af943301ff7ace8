"""Renders chat templates in a process of its own, which `chat.py` starts: one JSON request and one answer per line.

A template is a program by whoever made the model. Jinja's sandbox, as `transformers` uses it, keeps it away from files
and from Python's internals, but it could still loop or fill the memory: then the system ends this process.
This file imports neither torch nor the rest of the package, so that it starts in less than a second.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

import psutil
from transformers.utils.chat_template_utils import render_jinja_template


def main(megabytes: int) -> None:
    with suppress(ValueError, OSError):  # not every system has such a limit
        limit = psutil.Process().memory_info().vms + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(request.pop("seconds"))  # nothing catches it
        print(json.dumps(answer(request)), flush=True)
        signal.alarm(0)


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        rendered: Any = render_jinja_template(**request)  # the texts, and spans in them
        return {"text": rendered[0][0]}
    except MemoryError:
        return {"why": "it fills the memory"}
    except Exception as error:  # a template can make Jinja raise anything
        return {"why": " ".join(str(error).split())[:200] or type(error).__name__}


if __name__ == "__main__":
    main(int(sys.argv[1]))
