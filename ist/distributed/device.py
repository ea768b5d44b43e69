"""The device on which a process computes.

Where it sits: `ist/runs/open.py` and the Ray actors choose the device here.
Not here: how much of its memory a process may allocate (`ist/distributed/memory_limit.py`).
"""

import os

import torch

from ist.config.runtime import Pool
from ist.config.schema import Train
from ist.errors import ConfigError


def compute_device(settings: Pool) -> torch.device:
    """Return the device on which this process computes.

    Raises:
        ConfigError: The configuration asks for CUDA or NCCL, and there is no GPU.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("pool.device is 'cuda', but torch finds no CUDA device: use 'cpu' or 'auto'")
    if settings.backend == "nccl" and (settings.device == "cpu" or not available):
        raise ConfigError("pool.backend is 'nccl', which needs a GPU for every process: use 'gloo' or 'auto'")
    if settings.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def check_autocast(train: Train, device: torch.device) -> None:
    """Check that a worker's device supports the configured autocast.

    Raises:
        ConfigError: It does not.
    """
    if train.autocast == "float16" and device.type != "cuda":
        raise ConfigError(
            "'train.autocast' is 'float16', which needs a GPU for every worker, but this worker computes on a "
            f"{device.type.upper()}: use 'bfloat16', which CPUs support too"
        )
