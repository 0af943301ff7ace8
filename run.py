"""The entry point of a checkout: `python run.py selector=mass k=4`. The command itself is massdpo/__main__.py."""

import sys

if __name__ == "__main__":
    try:
        from massdpo.__main__ import main
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the package {error.name} is missing here: run `make setup`, then `.venv/bin/python run.py ...`"
        )
    sys.exit(main())
