"""Set up before anything is computed: threads, devices, processes, and what libraries may print."""

import ctypes
import logging
import os
import signal
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from massdpo.console import show_as
from massdpo.errors import UserError
from massdpo.runs.machine import reset_peak_memory


def end_with_launcher() -> None:
    """End a torchrun process when torchrun is killed: it would wait for its peers until they time out.

    Only Linux notifies a process that its parent has ended.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent or parent == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # it was gone already


def in_multirun() -> bool:
    config: Any = HydraConfig.instance().cfg  # None in a notebook
    return config is not None and OmegaConf.select(config, "hydra.mode") == RunMode.MULTIRUN


def start(config: DictConfig) -> Accelerator:
    """A fresh Accelerator: several jobs run in one process, and its state would keep the first one's precision."""
    end_with_launcher()
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    level = config.get("verbosity", "normal")
    if level != "debug":
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    # Renamed in the newest transformers; peft still uses the old names, and so do we, for older versions.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    # It reports every tied weight at every checkpoint, and bitsandbytes every product that it rounds.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = config.trainer.device == "cpu" or (config.trainer.device == "auto" and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if config.trainer.precision == "bfloat16" else "no")
    level = "quiet" if not accelerator.is_main_process else "sweep" if level == "normal" and in_multirun() else level
    show_as(level)
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise UserError(f"{expected} processes were asked for, {accelerator.num_processes} started: use torchrun")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        check_sharding(accelerator)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if config.trainer.generate and sharded:
        raise UserError(
            "trainer.generate=true cannot decode with sharded weights: leave it out here, and run "
            "task=evaluate in=RUN trainer.generate=true afterwards"
        )
    if config.trainer.adapter and config.trainer.adapter.get("quantize") and sharded:
        raise UserError(
            "trainer.adapter.quantize: quantised weights cannot be sharded: leave out Accelerate's FSDP settings"
        )
    reset_peak_memory()
    return accelerator


def check_sharding(accelerator: Accelerator) -> None:
    """Check Accelerate's FSDP settings against what a run needs; log-probs stay in float32 whatever the precision."""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("Accelerate shards weights only over several GPUs: leave out its FSDP settings here")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("Accelerate's FSDP settings: set fsdp_version: 2")
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "Accelerate's FSDP settings: set fsdp_cpu_ram_efficient_loading: false, as every process scores the "
            "reference with whole weights before they are sharded"
        )
    if plugin.mixed_precision_policy is not None:
        in_float32 = {"reduce_dtype": torch.float32, "output_dtype": None}  # None: as the scorer returns them
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **in_float32)
