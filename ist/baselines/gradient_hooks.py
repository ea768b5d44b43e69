"""The exchange of gradients: PyTorch's own communication hooks of DDP, with a count of bytes and seconds.

Where it sits: `ist/baselines/ddp.py` registers a `GradientExchange` with DDP.
Not here: the hooks themselves (torch.distributed.algorithms.ddp_comm_hooks).
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from ist.config.schema import Config

Future = torch.futures.Future[Tensor]

CASTS: dict[str, tuple[Callable[[Any, Any], Future], int | None]] = {
    "none": (allreduce_hook, None),
    "float16": (fp16_compress_hook, 2),
    "bfloat16": (bf16_compress_hook, 2),
}
"""For each compression, PyTorch's hook and the sent bytes of a number; None: the bytes of its dtype."""


class GradientExchange:
    """A communication hook, with a count of bytes and seconds.

    Args:
        config: The run.
        compression: A key of `CASTS`, or 'low_rank' (PowerSGD).
        world_size: Number of ranks.

    Attributes:
        sent_bytes: Bytes that this rank has sent: in a ring all-reduce of B bytes, 2 (n - 1) / n * B.
        transfers_s: For each step since `start_round`, the seconds from the last ready gradient until all gradients
            are averaged; transfers during the backward pass do not count. With gloo, this includes compression on
            gloo's threads. With NCCL, which is asynchronous, it is only the time to start the transfers.
        rehearses: While true, nothing is sent, and gradients are not averaged.
    """

    def __init__(self, config: Config, compression: str, world_size: int) -> None:
        self._share = 2 * (world_size - 1) / world_size
        self._lock = threading.Lock()  # futures complete on another thread
        self._under_way = 0
        self._since: float | None = None
        self.sent_bytes = 0.0
        self.transfers_s: list[float] = []
        self.rehearses = False
        self.powersgd: PowerSGDState | None = None
        if compression == "low_rank":
            self.powersgd = PowerSGDState(
                None, config.baseline.powersgd_rank, config.baseline.powersgd_start, random_seed=config.seed
            )
        else:
            self._hook, self._item_bytes = CASTS[compression]

    def start_round(self) -> None:
        """Clear the seconds of earlier steps."""
        self.transfers_s = []

    def hook(
        self,
        group: Any,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> Future:
        """Average a bucket of gradients over the ranks; a communication hook of DDP."""
        if self.rehearses:
            gradients = bucket.buffer()
            devices = [gradients.device] if gradients.is_cuda else []  # a future knows the devices of its value
            unchanged: Future = torch.futures.Future(devices=devices)
            unchanged.set_result(gradients)
            return unchanged
        last = bucket.is_last()
        with self._lock:
            self._under_way += 1
        average = self._average(group, bucket)  # time for compression on this thread counts as compute time
        if last:
            with self._lock:
                self._since = time.perf_counter()
        return average.then(self._done)

    def _average(self, group: Any, bucket: Any) -> Future:
        buffer, state = bucket.buffer(), self.powersgd
        if state is None:
            self.sent_bytes += self._share * buffer.numel() * (self._item_bytes or buffer.element_size())
            return self._hook(group, bucket)
        before, numbers = state.total_numel_after_compression, buffer.numel()
        whole = state.iter < state.start_powerSGD_iter
        future: Future = powerSGD_hook(state, bucket)
        if not whole:
            numbers = state.total_numel_after_compression - before
        self.sent_bytes += self._share * numbers * buffer.element_size()
        return future

    def _done(self, future: Future) -> Tensor:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0 and self._since is not None:
                self.transfers_s.append(time.perf_counter() - self._since)
                self._since = None
        return future.value()
