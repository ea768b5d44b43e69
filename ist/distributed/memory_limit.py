"""A limit on a worker's memory, enforced by the operating system, or by torch's allocator on a GPU.

On Linux the limit is RLIMIT_DATA: it counts what a process allocates for itself (the heap, anonymous memory, the stacks
of threads), touched or not. It does not count the code of libraries, files that are mapped, and shared memory.

Where it sits: `ist/launch/start.py` starts workers under a limit, so that it applies before Python does;
`ist/runs/open.py` runs a worker's part of a run inside `limited_memory`.
Not here: measuring memory (`ist/monitoring/meter.py`).
"""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ist.distributed.environment import START_LIMIT
from ist.errors import ConfigError, MemoryLimitError, is_out_of_memory

_held: dict[int, int] = {}
"""By process id, what `note_held` has measured. The id matters after a fork: the child is another process."""


def note_held() -> None:
    """Measure what this process holds; to be called when libraries and data are loaded, and no network is built."""
    if sys.platform == "linux":
        _held[os.getpid()] = _data_bytes()


def start_limit(limit_bytes: int) -> int:
    """Return the limit on a new process that imports and loads what this process has, and then trains.

    Interpreter, libraries and data count as much as this process held at `note_held`: checks that came later have left
    memory that cannot be returned.

    Args:
        limit_bytes: The limit in addition to interpreter, libraries and data (`pool.memory_limit`).
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc keeps what was freed
        ctypes.CDLL(None).malloc_trim(0)
    now = _data_bytes()
    return min(now, _held.get(os.getpid(), now)) + limit_bytes


def under_limit(command: Sequence[str], nbytes: int) -> list[str]:
    """Return a command that runs another one under a limit (RLIMIT_DATA), which applies before its first instruction.

    The limit is a soft one: files of checkpoints are written without it, see `lifted_limit`.
    """
    return ["/bin/sh", "-c", 'ulimit -S -d "$0" && exec "$@"', str(nbytes // 1024), *command]


def start_environment(text: str) -> dict[str, str]:
    """Return variables for a process under a limit.

    glibc keeps freed memory below a threshold that grows to 32 MB, and would let the process reach the limit early:
    blocks from 1 MB on are returned at once.
    """
    return {START_LIMIT: text, "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(2**20))}


@contextmanager
def limited_memory(limit_bytes: int | None, text: str, device: torch.device) -> Iterator[None]:
    """Limit the memory that this process can allocate within the context.

    On a CPU, the limit applies to memory in addition to what the process holds now (RLIMIT_DATA): the interpreter,
    libraries and loaded data do not count. A process that was started under a limit (`under_limit`) keeps it: the lower
    one of both applies. On a GPU, it applies to the GPU's memory; CUDA's context and host memory do not count.

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
    for bound in (before[1], before[0] if START_LIMIT in os.environ else resource.RLIM_INFINITY):
        if bound != resource.RLIM_INFINITY:
            allowed = min(allowed, bound)
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
