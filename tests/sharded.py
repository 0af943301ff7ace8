"""`run.py` on CPU processes that shard their weights.

Accelerate shards over GPUs alone: on a CPU `AcceleratorState` passes over the FSDP settings that it is given, though
PyTorch's FSDP works there. This opens that one gate; the rest is what GPUs run.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from massdpo.runs.folder import CHECKPOINTS
from massdpo.training import checkpoints
from tests.conftest import ROOT

closed, save = AcceleratorState.__init__, checkpoints.save


def opened(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    closed(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type


def save_and_die(
    folder: Path, position: checkpoints.Position, state: Any, accelerator: Accelerator, last: bool
) -> None:
    save(folder, position, state, accelerator, last)
    accelerator.wait_for_everyone()
    if folder.name == CHECKPOINTS:  # of the run itself, the preference stage's
        os._exit(1)


if __name__ == "__main__":
    AcceleratorState.__init__ = opened  # type: ignore[method-assign]
    if "DIE_AFTER_CHECKPOINT" in os.environ:
        checkpoints.save = save_and_die
    sys.argv[0] = str(ROOT / "run.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
