"""`run.py` on CPU processes that shard their weights.

Accelerate shards on accelerators alone: `AcceleratorState` passes over its own FSDP settings on a CPU, where PyTorch's
FSDP works as well. This opens that one gate; the rest is what a GPU runs.
"""

import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tests.conftest import ROOT

closed = AcceleratorState.__init__


def opened(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    closed(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    AcceleratorState.__init__ = opened  # type: ignore[method-assign]
    sys.argv[0] = str(ROOT / "run.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
