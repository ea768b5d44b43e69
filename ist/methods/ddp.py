"""Full data-parallel training with PyTorch's own DistributedDataParallel.

Every rank holds the whole network and all-reduces its gradient every step. A round is the same number
of steps as in IST, so that evaluations and checkpoints fall alike.
Not here: the round loop, evaluation.
"""

import inspect
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ist import optim
from ist.coordinator import RoundReport, diverged
from ist.data.batches import take_shard
from ist.job import Job
from ist.meter import MemoryGauge, Meter
from ist.pool.group import Membership, peer_errors
from ist.worker import local_steps


class AllReduceCounter:
    """DDP's default all-reduce of gradients, counted.

    Attributes:
        sent_bytes: What this rank has sent: a ring all-reduce of B bytes sends 2 (n - 1) / n * B from each rank.
        seconds: Time during which an all-reduce was under way.
    """

    def __init__(self, world_size: int) -> None:
        self._share = 2 * (world_size - 1) / world_size
        self._lock = threading.Lock()  # futures complete on another thread
        self._under_way = 0
        self._since = 0.0
        self.sent_bytes = 0.0
        self.seconds = 0.0

    def hook(
        self,
        group: Any,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        """All-reduce a bucket; a communication hook of DDP."""
        self.sent_bytes += self._share * bucket.buffer().nbytes
        with self._lock:
            if self._under_way == 0:
                self._since = time.perf_counter()
            self._under_way += 1
        return allreduce_hook(group, bucket).then(self._done)

    def _done(self, future: torch.futures.Future[Tensor]) -> Tensor:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self.seconds += time.perf_counter() - self._since
        return future.value()


class DataParallel:
    """Data-parallel training of the whole network; a `Method` on rank 0, and its mirror on every other rank.

    Args:
        job: The run.
        membership: This rank.
        model: The whole network with its start values; rank 0's are broadcast.
        state: Optimiser state of a checkpoint, by `optim.state_name`; empty at the start. Only rank 0's is used.
        meter: Counts the all-reduce.

    Reference: Li et al., "PyTorch Distributed", VLDB 2020.
    """

    def __init__(
        self, job: Job, membership: Membership, model: nn.Module, state: Mapping[str, Tensor], meter: Meter
    ) -> None:
        self.job = job
        self._membership = membership
        self._meter = meter
        self._gauge = MemoryGauge(membership.device)
        self._shard = take_shard(job.train_data, job.dealing.shard(membership.rank))
        self._model = model.to(membership.device)
        # Buffers are batch norm's running statistics, re-estimated before evaluation: not worth a broadcast a step.
        # Newer versions of torch have renamed the option that says so.
        names = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {option: False}
        with peer_errors("starting together"):
            self._ddp = DistributedDataParallel(self._model, gradient_as_bucket_view=True, **options)
        self._counter = AllReduceCounter(membership.world_size)
        self._ddp.register_comm_hook(None, self._counter.hook)
        self._named = dict(self._model.named_parameters())
        self._optimizer = optim.build_optimizer(job.config.train.optimizer, list(self._named.values()))
        with peer_errors("starting together"):
            self._restore(state)

    @property
    def model(self) -> nn.Module:
        """The whole network, the same on every rank."""
        return self._model

    def train_round(self, round_number: int) -> RoundReport:
        """Make a round's steps on all ranks together; every rank returns the report of all.

        Raises:
            DivergedError: A rank's loss is not finite.
            PoolError: A rank is gone.
        """
        started = time.perf_counter()
        exchanged = self._counter.seconds
        with peer_errors(f"rank {self._membership.rank} lost a peer in round {round_number}"):
            loss_sum, samples = local_steps(
                self.job, self._membership.rank, self._shard, self._ddp, self._optimizer, round_number,
                self._membership.device,
            )  # fmt: skip
            own = [loss_sum, samples, 0.0, self._counter.sent_bytes, self._gauge.peak_bytes()]
            own[2] = time.perf_counter() - started
            gathered = self._gather(own)
        for rank, (rank_loss, *_) in enumerate(gathered):
            if not math.isfinite(rank_loss):
                raise diverged(rank, f"a loss of {rank_loss}", round_number)
        losses, counts, seconds, sent, memory = zip(*gathered, strict=True)
        for rank, count in enumerate(sent):
            self._meter.sent[rank] = round(count)
        exchange = self._counter.seconds - exchanged
        return RoundReport(
            steps=len(self.job.steps(round_number)),
            samples=int(sum(counts)),
            loss=sum(losses) / sum(counts),
            compute_s=max(0.0, sum(seconds) / len(seconds) - exchange),
            exchange_s=exchange,
            idle_s=max(0.0, time.perf_counter() - started - sum(seconds) / len(seconds)),
            cut_s=0.0,
            merge_s=0.0,
            memory_bytes=tuple(int(peak) for peak in memory),
            workers=self._membership.world_size,
        )

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the whole network's tensors and the optimiser's state."""
        state = {
            optim.state_name(key, name): value
            for name, parameter in self._named.items()
            for key, value in self._optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
        return {**self._model.state_dict(), **state}

    def bytes_sent(self) -> int:
        """Return what all ranks have sent."""
        return self._meter.sent.total()

    def close(self) -> None:
        """Nothing to let go: the process group outlives the run."""

    def _gather(self, own: list[float]) -> list[list[float]]:
        """Give every rank's numbers to every rank: 40 bytes each, once a round, not counted as training traffic."""
        where = self._membership.device if self._membership.backend == "nccl" else torch.device("cpu")
        mine = torch.tensor(own, dtype=torch.float64, device=where)
        all_ranks = [torch.zeros_like(mine) for _ in range(self._membership.world_size)]
        dist.all_gather(all_ranks, mine)
        return [numbers.tolist() for numbers in all_ranks]

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        """Give every rank rank 0's optimiser state, as the bytes of a safetensors file."""
        where = self._membership.device if self._membership.backend == "nccl" else torch.device("cpu")
        data = torch.frombuffer(bytearray(safetensors.torch.save(dict(state))), dtype=torch.uint8).to(where)
        size = torch.tensor([len(data)], device=where)
        dist.broadcast(size, src=0)
        if self._membership.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8, device=where)
        dist.broadcast(data, src=0)
        for full_name, tensor in safetensors.torch.load(data.cpu().numpy().tobytes()).items():
            key, _, name = full_name.partition("@")
            parameter = self._named[name]
            device = parameter.device if tensor.ndim else optim.scalar_device(self._optimizer, parameter)
            self._optimizer.state[parameter][key] = tensor.to(device)
