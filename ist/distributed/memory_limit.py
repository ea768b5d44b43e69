"""A limit on a worker's memory, enforced by the operating system, or by torch's allocator on a GPU.

Where it sits: `ist/runs/open.py` runs a worker's part of a run inside `limited_memory`.
Not here: measuring memory (`ist/monitoring/meter.py`).
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
    """Limit the memory that this process can allocate within the context.

    On a CPU, the limit applies to memory in addition to what the process holds now (RLIMIT_DATA): the interpreter,
    libraries and loaded data do not count. On a GPU, it applies to the GPU's memory; CUDA's context and host memory do
    not count.

    Args:
        limit_bytes: The limit; None: no limit.
        text: The limit as written in the configuration, for the message.
        device: Device on which this process computes.

    Raises:
        ConfigError: This system cannot enforce a limit.
        MemoryLimitError: The process tried to allocate more.
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
                    f"a worker needs more memory than 'pool.memory_limit' ({text}) allows: use a narrower network, "
                    "or, with method ist, more workers, each of which holds a smaller part"
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
            f"'pool.memory_limit' is '{text}', but only Linux can limit the memory of a process: leave it out"
        )
    before = resource.getrlimit(resource.RLIMIT_DATA)
    gc.collect()  # garbage that is freed later would raise the effective limit
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
    """Suspend the limit within the context, for work that is not training, such as writing files.

    If an allocation fails, safetensors ends the process without an error.
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
