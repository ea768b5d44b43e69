"""Measure a process: bytes by direction and peer, seconds by phase, peak memory.

Where it sits: code that sends and receives messages counts bytes here; `ist/runs/recorder.py` records the numbers.
Times come from one monotonic clock per process.
Not here: the meaning of the numbers (`ist/measurements.py`), writing them (`ist/storage/run_folder.py`), showing them
(`ist/report/page.py`).
"""

import os
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

_Item = TypeVar("_Item")


class Stopwatch:
    """Seconds by phase.

    Attributes:
        seconds: Seconds so far, by phase; 0 for one that was never entered.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def timed(self, name: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """Yield the items of an iterator, and add the time that it takes to produce them to a phase."""
        while True:
            try:
                with self.phase(name):
                    item = next(items)
            except StopIteration:
                return
            yield item


class Meter:
    """Counters of one process.

    Attributes:
        sent: Bytes sent so far, by the worker they went to.
        received: Bytes received so far, by the worker they came from.
        gathered: Bytes that rank 0 has received so far, between rounds, of a network in shards.
    """

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self.gathered = 0

    @property
    def total_bytes(self) -> int:
        """Bytes in both directions on this process's link."""
        return self.sent.total() + self.received.total()


class MemoryGauge:
    """Peak memory since this gauge was created, above the memory that the process held then.

    On a GPU: bytes that torch allocated. On a CPU: growth of the resident set, so that the interpreter, libraries and
    earlier data do not count. `process_peak_bytes` counts these too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # before that there are no statistics to reset
            torch.cuda.reset_peak_memory_stats(device)
            self._start = 0
        else:
            _reset_resident_peak()
            self._start = _resident_peak_bytes()

    def peak_bytes(self) -> int:
        """Return the peak so far, in bytes."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return max(0, _resident_peak_bytes() - self._start)


def worker_numbers(
    *, steps: int, samples: int, loss_sum: float, compute_s: float, cpu_s: float, gauge: MemoryGauge
) -> dict[str, float]:
    """Return the measurements of a worker, or of a rank that trains the full network, at the end of a round.

    `ist/measurements.py` describes each number. `aside_s` and `inside_bytes` are 0; callers
    that do more than train, or have several ranks, set them.
    """
    return {
        "steps": steps,
        "samples": samples,
        "loss_sum": loss_sum,
        "compute_s": compute_s,
        "cpu_s": cpu_s,
        "memory_bytes": gauge.peak_bytes(),
        "inside_bytes": 0.0,
        "process_memory_bytes": process_peak_bytes(),
        "aside_s": 0.0,
    }


def process_peak_bytes() -> int:
    """Return the peak resident memory of this process since it started, in bytes.

    It includes the interpreter, libraries and data, and everything that was freed before the first round. On a GPU, it
    is the memory of the host.
    """
    return max(_resident_peak_bytes(), _before_resets.get(os.getpid(), 0))


def resident_bytes() -> int:
    """Return the resident memory of this process now, in bytes; where only its peak is known, the peak."""
    return _status_bytes("VmRSS") if sys.platform == "linux" else _resident_peak_bytes()


_before_resets: dict[int, int] = {}
"""By process id, the highest peak that a gauge has reset. The id matters after a fork: the child has its own peak."""


def _reset_resident_peak() -> None:
    # Linux lets a process reset its own high-water mark. On other systems, and in a sandbox that forbids it, growth
    # below an earlier peak is not seen: the reading is then too low, never too high.
    _before_resets[os.getpid()] = process_peak_bytes()
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _resident_peak_bytes() -> int:
    if sys.platform == "linux":
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
