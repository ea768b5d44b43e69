"""Full data-parallel training with PyTorch's own DistributedDataParallel, with whole or compressed gradients.

Every rank holds the whole network and averages its gradient over all ranks every step. A round is the same number of
steps as in IST, so that evaluations and checkpoints fall alike.
Not here: the round loop, evaluation; what crosses the network (`gradient_hooks.py`).
"""

import inspect
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ist.baselines.gradient_hooks import GradientExchange
from ist.baselines.powersgd import restore_powersgd, saved_powersgd
from ist.baselines.ranks import RankRound, begin_together, report_round, spread
from ist.data.batches import fetch
from ist.data.nested import call_model
from ist.distributed.process_group import Membership, peer_errors
from ist.errors import ConfigError, ModelError
from ist.monitoring.meter import MemoryGauge, Meter, worker_numbers
from ist.optimization import optimizers
from ist.rng import Purpose, seeded
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.job import Job
from ist.tensors import is_finite
from ist.training.local_loop import TaskLoop, local_steps
from ist.training.rounds import RoundReport


class DataParallel:
    """Data-parallel training of the whole network; a `Method` on rank 0, and its mirror on every other rank.

    Args:
        job: The run.
        membership: This rank.
        model: The whole network with its start values; rank 0's are broadcast.
        state: Optimiser state of a checkpoint, by `optimizers.state_name`; empty at the start. Only rank 0's is used.
        meter: Counts the all-reduce.
        compression: How gradients cross the network: 'none', 'float16', 'bfloat16' or 'low_rank' (PowerSGD).

    Reference: Li et al., "PyTorch Distributed", VLDB 2020; Vogels et al., "PowerSGD", arXiv 1905.13727.
    """

    def __init__(
        self,
        job: Job,
        membership: Membership,
        model: nn.Module,
        state: Mapping[str, Tensor],
        meter: Meter,
        compression: str = "none",
    ) -> None:
        self.job = job
        self._membership = membership
        self._meter = meter
        self._gauge = MemoryGauge(membership.device)
        slot = WorkerSlot(membership.rank, Team(membership.world_size))
        self._loop = TaskLoop(job, slot, membership.device)
        self._model = model.to(membership.device)
        self._exchange = GradientExchange(job.config, compression, membership.world_size)
        if self._exchange.powersgd is not None and membership.device.type == "cpu" and torch.cuda.is_available():
            raise ConfigError(
                "pool.device is 'cpu', but PyTorch's PowerSGD waits for a GPU wherever it sees one: set "
                "CUDA_VISIBLE_DEVICES to nothing for these processes, or pool.device to 'cuda'"
            )
        # Buffers are batch norm's running statistics, re-estimated before evaluation: not worth a broadcast a step.
        # Newer versions of torch have renamed the option that says so.
        names = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {option: False}
        if self._exchange.powersgd is not None:
            # With several buckets over gloo, PowerSGD's callbacks wait for each other's all-reduces for ever.
            options["bucket_cap_mb"] = sys.maxsize >> 21
        with peer_errors("starting together"):
            self._ddp = DistributedDataParallel(self._model, gradient_as_bucket_view=True, **options)
        self._ddp.register_comm_hook(None, self._exchange.hook)
        self._named = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        dtypes = {parameter.dtype for parameter in self._named.values()}
        if self._exchange.powersgd is not None and len(dtypes) > 1:
            raise ModelError(
                "method 'powersgd' needs parameters of one dtype, but the network has "
                f"{' and '.join(sorted(map(str, dtypes)))}: "
                "DDP keeps each dtype in a bucket of its own, and PowerSGD hangs over several"
            )
        self._settle_order()
        self._optimizer = optimizers.build_optimizer(job.config.train.optimizer, list(self._named.values()))
        self._saved: Mapping[str, Tensor] = {}
        with peer_errors("starting together"):
            self._restore(spread(membership, state))

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
        begin_together(self._membership)
        started, cpu_started = time.perf_counter(), time.thread_time()
        exchange, self._saved = self._exchange, {}
        exchange.start_round()
        with peer_errors(f"rank {self._membership.rank} lost a peer in round {round_number}"):
            loss_sum, samples = local_steps(self._loop, round_number, self._ddp, self._named, self._optimizer)
            seconds = time.perf_counter() - started
            on_gpu = self._membership.device.type != "cpu"
            cpu_s = seconds - sum(exchange.transfers_s) if on_gpu else time.thread_time() - cpu_started
            numbers = worker_numbers(
                steps=len(self.job.schedule.steps(round_number)), samples=samples, loss_sum=loss_sum,
                compute_s=seconds - sum(exchange.transfers_s), cpu_s=cpu_s, gauge=self._gauge,
            )  # fmt: skip
            own = RankRound(numbers, is_finite(self._named.values()), exchange.sent_bytes, exchange.transfers_s)
            report = report_round(self.job, self._membership, self._meter, own, round_number)
            trained = time.perf_counter()
            if exchange.powersgd is not None and self.job.config.checkpoint.is_due(round_number + 1):
                self._saved = saved_powersgd(exchange.powersgd, self._membership)
        return replace(report, numbers={**report.numbers, "aside_s": time.perf_counter() - trained})

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the whole network's tensors, the optimiser's state, and what compression remembers."""
        state = optimizers.named_state(self._optimizer, self._named)
        return {**self._model.state_dict(), **state, **self._saved}

    def bytes_sent(self) -> int:
        """Return what all ranks have sent."""
        return self._meter.sent.total()

    def close(self) -> None:
        """Do nothing: the process group outlives the run."""

    def _settle_order(self) -> None:
        """Have gradients become ready once, without sending them.

        DDP lays gradients out as they became ready in a process's first step, from its second step on. Where a gradient
        lies decides in which order ranks are summed, and where PowerSGD keeps its errors: a resumed run is the same run
        only if the order is the same from the first step on.
        """
        job, device = self.job, self._membership.device
        before = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        dtypes = {name: parameter.dtype for name, parameter in self._named.items()}
        self._exchange.rehearses = True
        with seeded(device, job.config.seed, Purpose.REHEARSAL):
            inputs, targets = fetch(self._loop.shard, job.schedule.sampler.batch(self._membership.rank, 0), device)
            job.task.loss(call_model(self._ddp, inputs), targets).backward()  # type: ignore[no-untyped-call]
        self._exchange.rehearses = False
        for name, buffer in self._model.named_buffers():
            if name in before and buffer.shape == before[name].shape:  # a cache may have grown
                buffer.copy_(before[name])
        for name, parameter in self._named.items():
            if parameter.dtype != dtypes[name]:
                raise ModelError(
                    f"the forward makes '{name}', which is {dtypes[name]}, a {parameter.dtype}: method "
                    f"'{job.config.method}' averages gradients of the dtype that it has at the start: change that"
                )
        unused = [name for name, parameter in self._named.items() if parameter.requires_grad and parameter.grad is None]
        if unused:
            raise ModelError(
                f"'{unused[0]}' gets no gradient ({len(unused)} such parameters): method '{job.config.method}' waits "
                "for all of them; freeze what is not used (requires_grad_(False))"
            )
        self._model.zero_grad(set_to_none=True)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with rank 0's optimiser state."""
        if self._exchange.powersgd is not None:
            state = restore_powersgd(self._exchange.powersgd, state, self._membership)
        optimizers.restore_named_state(self._optimizer, self._named, state)
