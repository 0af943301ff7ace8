"""The one entry point: `python run.py selector=mass k=4`. Composes the config and hands it to massdpo.experiment."""

import os
import sys
import traceback
from pathlib import Path

# Hydra would print several lines and exit with 1 for any failure; with this set, it lets us see the exception instead.
os.environ["HYDRA_FULL_ERROR"] = "1"
os.environ["MASSDPO_ROOT"] = str(Path(__file__).resolve().parent)  # conf/config.yaml puts it on Hydra's search path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from massdpo.config import explain
from massdpo.errors import UserError


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(config: DictConfig) -> None:
    from massdpo.experiment import run  # torch and transformers take seconds to import: not for --help or a misspelt key

    try:
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if config.debug:
            traceback.print_exc()
        raise
    except Exception:
        traceback.print_exc()  # in a sweep Hydra runs the other jobs before it lets this one's exception through
        raise


def main() -> int:
    try:
        job()
    except UserError:  # told when it happened
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception:  # told when it happened
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
