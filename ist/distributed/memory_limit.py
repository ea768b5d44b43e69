"""A limit on a worker's memory, which the operating system enforces, and torch's allocator on a GPU.

Where it sits: `ist/runs/open.py` puts it around a worker's part of a run.
Not here: how much memory was used (`ist/monitoring/meter.py`).
"""

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ist.errors import ConfigError, MemoryLimitError, is_out_of_memory


@contextmanager
def limited_memory(limit_bytes: int | None, text: str, device: torch.device) -> Iterator[None]:
    """Let this process allocate only so much where it computes, as long as the context lasts.

    On a CPU: so much beyond what it holds now (RLIMIT_DATA); the interpreter, libraries and data that are there already
    do not count. On a GPU: so much of it; CUDA's own context does not count, nor does memory that is not the GPU's.

    Args:
        limit_bytes: The limit; None: there is none.
        text: The limit as the configuration has it, for the message.
        device: Where this process computes.

    Raises:
        ConfigError: This system cannot enforce it.
        MemoryLimitError: More was asked for.
    """
    if limit_bytes is None:
        yield
        return
    with _limited_gpu(limit_bytes, device) if device.type == "cuda" else _limited_process(limit_bytes, text):
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise MemoryLimitError(
                    f"a worker needs more memory than 'pool.memory_limit' ({text}) gives it: use a narrower network, "
                    "or more workers by IST, each of which holds a smaller part of it"
                ) from error
            raise


@contextmanager
def _limited_gpu(limit_bytes: int, device: torch.device) -> Iterator[None]:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def _limited_process(limit_bytes: int, text: str) -> Iterator[None]:
    if sys.platform != "linux":
        raise ConfigError(
            f"'pool.memory_limit' is '{text}', but only Linux limits a process's own memory: leave it out"
        )
    before = resource.getrlimit(resource.RLIMIT_DATA)
    gc.collect()  # what is garbage now would be so much more than the limit when it is freed
    allowed = _data_bytes() + limit_bytes
    if before[1] != resource.RLIM_INFINITY:
        allowed = min(allowed, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def lifted_limit() -> Iterator[None]:
    """Let this process allocate beyond its limit for what is no part of training: files that are written.

    safetensors ends the process, without an error, where it gets no memory.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024
