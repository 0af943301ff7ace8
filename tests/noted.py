"""`run.py` with every pick of `mass` written down, a file a process: `[call, example, picks]` a line."""

import json
import os
import runpy
import sys
from pathlib import Path

from massdpo.selection import Mass
from massdpo.tensors import Picks, PoolStatistics
from tests.conftest import ROOT

select = Mass.__call__


def note(self: Mass, pool: PoolStatistics) -> Picks:
    global calls
    picks = select(self, pool)
    with open(Path(os.environ["NOTED"]) / f"{os.getpid()}.jsonl", "a") as file:
        for name, index_K in zip(pool.ids, picks.index_BK.tolist(), strict=True):
            file.write(json.dumps([calls, name, index_K]) + "\n")
    calls += 1
    return picks


if __name__ == "__main__":
    calls = 0
    Mass.__call__ = note  # type: ignore[method-assign]
    sys.argv[0] = str(ROOT / "run.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
