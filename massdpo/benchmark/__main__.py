"""`python -m massdpo.benchmark engine|selection|real|gpu [folder]`: all sides in one run; tables, figures, JSON."""

import sys
from pathlib import Path

from massdpo.benchmark import engine, gpu, real, selection
from massdpo.errors import UserError

USAGE = "usage: python -m massdpo.benchmark engine|selection|real|gpu [folder, results/benchmarks by default]"
RUNS = {"engine": engine.run, "selection": selection.run, "real": real.run, "gpu": gpu.run}

if __name__ == "__main__":
    match sys.argv[1:]:
        case [name, *rest] if name in RUNS and len(rest) <= 1 and not sys.argv[-1].startswith("-"):
            try:
                RUNS[name](Path(rest[0] if rest else "results/benchmarks"))
            except UserError as error:
                sys.exit(str(error))
        case _:
            sys.exit(USAGE)
