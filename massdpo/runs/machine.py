"""What a run's numbers depend on besides its config: the code's commit and the machine; and the memory it takes."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from massdpo.errors import UserError


def commit() -> str:
    """The commit of the code that runs, `+changes` where files differ from it, `unknown` outside a checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # git would ask the folders above, which may be a repository of the user's
        return "unknown"
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(describe, cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What the numbers depend on of this machine, and nothing that identifies it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def in_words(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)


def reset_peak_memory() -> None:
    """Several jobs run in one process: let each count its own peak, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux: the peak of the whole process is reported


def check_memory(policy: nn.Module, accelerator: Accelerator) -> None:
    """Refuse what cannot fit before anything is trained: gradients and AdamW's two moments, besides the weights.

    Activations come on top and depend on the batch: a run that passes may still run out of memory.

    Raises:
        UserError: more memory is needed than is free.
    """
    trained = sum(weight.nbytes for weight in policy.parameters() if weight.requires_grad)
    there = 0 if accelerator.device.type == "cuda" else sum(weight.nbytes for weight in policy.parameters())
    needed, free = training_bytes(policy, accelerator) - there, free_bytes(accelerator)
    if needed > free:
        raise UserError(
            f"training {trained / 1e9:.1f} GB of weights needs {needed / 1e9:.1f} GB more (gradients and AdamW), and "
            f"{free / 1e9:.1f} GB are free: use trainer=lora, a smaller model, or FSDP over several GPUs"
        )


def training_bytes(policy: nn.Module, accelerator: Accelerator) -> int:
    """What a process holds of a policy in training: weights, gradients and AdamW's two moments."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    trained = sum(weight.nbytes for weight in policy.parameters() if weight.requires_grad)
    weights = sum(weight.nbytes for weight in policy.parameters())
    return weights + 3 * trained // (accelerator.num_processes if sharded else 1)


def free_bytes(accelerator: Accelerator) -> int:
    """Memory that is free for this process: the GPU's, or its share of the CPU's."""
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def peak_memory_mb() -> float:
    """Peak memory of this job: of the GPU if there is one, else the resident memory of the process, in MB."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()) / 1e6


def peak_resident() -> int:
    """Peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the peak of the process that started this one into ru_maxrss
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
