"""The command, as `python run.py`, `massdpo` or `python -m massdpo`: composes the config and hands it to its task."""

import os
import re
import sys
import traceback
from pathlib import Path

# Otherwise Hydra would print several lines and exit with 1 on any failure; this makes it raise the exception instead.
os.environ["HYDRA_FULL_ERROR"] = "1"

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import massdpo
from massdpo.config import explain, without_secrets
from massdpo.config.options import on_search_path, root
from massdpo.config.sweeps import tell_of_sweep
from massdpo.console import LEVELS, in_any_locale, patiently, show_as, shows
from massdpo.errors import UserError
from massdpo.store import mapping_in

INTERRUPTED = 130
FAILURES: list[int] = []  # exit codes of the jobs that failed in this process
MAIN_PROCESS: list[int] = []  # set by main(): a launcher's own processes import this module but never call it

on_search_path()


@hydra.main(version_base="1.3", config_path=str(root() / "conf"), config_name="config")
def job(config: DictConfig) -> float | Exception | None:
    """A run's `trainer.keep_metric` on the validation split, which sweepers optimise, or why the job failed."""
    show_as(level if (level := config.get("verbosity")) in LEVELS else "normal")
    with patiently("loading PyTorch"):
        # It imports torch, which takes seconds that --help and a misspelt key need not wait for.
        from massdpo.tasks import run

    try:
        return validated(run(config), config.trainer.keep_metric)
    except UserError as error:
        say(f"error: {error}")
        if config.debug or shows("debug"):
            say(traceback.format_exc())
        return failed(2, error)
    except Exception as error:
        say(traceback.format_exc())
        return failed(1, error)


def validated(folder: Path | None, metric: str) -> float | None:
    """A metric of the run in a folder, on the validation split; None for a task that makes no run."""
    if folder is None:
        return None
    return mapping_in(folder / "metrics.json").get(f"val/{metric}")  # in a launcher's process, it may not be there yet


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a message quotes texts that could steer a terminal


def say(text: str) -> None:
    shown = CONTROL.sub(lambda found: repr(found[0])[1:-1], without_secrets(text.rstrip()))
    print(shown, file=sys.stderr)


def failed(code: int, error: Exception) -> Exception:
    """Note a failure and let the other jobs of a sweep run; a launcher's own processes can only tell by raising."""
    if os.getpid() not in MAIN_PROCESS:
        raise error
    FAILURES.append(code)
    return error


def main() -> int:
    """Run the command line's jobs; returns the exit code: 0, 1 (a defect), 2 (a mistake in what was asked), 130."""
    in_any_locale()
    if sys.argv[1:] == ["--version"]:
        print(f"massdpo {massdpo.__version__}")
        return 0
    MAIN_PROCESS.append(os.getpid())
    code = compute()
    if code != INTERRUPTED:
        tell_of_sweep()  # Hydra does not announce the end of a multirun if a launcher's process failed
    return code


def compute() -> int:
    """Run the jobs; returns the exit code."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # for a `_target_` of your own, wherever the command is installed
    try:
        job()
    except UserError:  # reported when it happened
        return 2
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:  # the last two are Hydra's own too
        say(f"error: {explain(error)}")
        return 2
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # a launcher's process reported it when it happened
        return 1
    return max(FAILURES, default=0)


if __name__ == "__main__":
    sys.exit(main())
