"""Where a process of a pool computes."""

import os

import torch

from ist.config.schema import Pool
from ist.errors import ConfigError


def compute_device(settings: Pool) -> torch.device:
    """Return where this process computes.

    Raises:
        ConfigError: CUDA or NCCL is asked for and not there.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("pool.device is 'cuda', but torch finds no CUDA device: use 'cpu' or 'auto'")
    if settings.backend == "nccl" and (settings.device == "cpu" or not available):
        raise ConfigError("pool.backend is 'nccl', which needs a GPU for every process: use 'gloo' or 'auto'")
    if settings.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
