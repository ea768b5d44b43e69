"""Data-parallel training with PyTorch's DistributedDataParallel (DDP), with full or compressed gradients.

Every rank holds the full network and averages its gradient over all ranks in every step. A round has as many steps as
in IST, so that evaluations and checkpoints come at the same steps.
Where it sits: `ist/training/rounds.py` runs it as a `Method` on rank 0, and as a `Follower` on other ranks.
Not here: the exchange of gradients (`ist/baselines/gradient_hooks.py`), the round loop, evaluation.
"""

import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ist.baselines.gradient_hooks import GradientExchange
from ist.baselines.powersgd import restore_powersgd, saved_powersgd
from ist.baselines.ranks import RankRound, broadcast_tensors, report_round, wait_for_all_ranks
from ist.distributed.process_group import Membership, peer_errors
from ist.errors import ConfigError, ModelError
from ist.loops.inside import distributed
from ist.loops.local_loop import TaskLoop
from ist.loops.part import LocalSteps, Part
from ist.monitoring.meter import MemoryGauge, Meter, worker_numbers
from ist.optimization import optimizers
from ist.rng import Purpose, seeded
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.job import Job, is_saved_after
from ist.tensors import is_finite
from ist.training.rounds import RoundReport


class DataParallel:
    """Data-parallel training of the full network; a `Method` on rank 0, and a `Follower` on every other rank.

    Args:
        job: The run.
        membership: This rank.
        model: The full network with its initial values; rank 0 broadcasts its own.
        state: Optimizer state from a checkpoint, by `optimizers.state_name`; empty for a new run. Ranks other than 0
            ignore it.
        meter: Counts the bytes of the all-reduce.
        compression: The compression of gradients: 'none', 'float16', 'bfloat16' or 'low_rank' (PowerSGD).

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
        self._local = LocalSteps(job.schedule, job.config.seed, slot, membership.device, self._loop)
        self._model = model.to(membership.device)
        self._exchange = GradientExchange(job.config, compression, membership.world_size)
        if self._exchange.powersgd is not None and membership.device.type == "cpu" and torch.cuda.is_available():
            raise ConfigError(
                "pool.device is 'cpu', but PyTorch's PowerSGD synchronizes with a GPU whenever one is visible: set "
                "CUDA_VISIBLE_DEVICES to an empty string for these processes, or pool.device to 'cuda'"
            )
        options: dict[str, Any] = {}
        if self._exchange.powersgd is not None:
            # Use one bucket: with several over gloo, PowerSGD's callbacks wait forever for each other's all-reduces.
            options["bucket_cap_mb"] = sys.maxsize >> 21
        with peer_errors("starting together"):
            # Buffers are not broadcast: they are batch norm's running statistics, re-estimated before evaluation.
            self._ddp = distributed(self._model, **options)
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
        self._optimizer = job.task.make_optimizer(self._named)
        self._saved: Mapping[str, Tensor] = {}
        with peer_errors("starting together"):
            self._restore(broadcast_tensors(membership, state))

    @property
    def model(self) -> nn.Module:
        """The full network, the same on every rank."""
        return self._model

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Run the steps of a round on all ranks together; every rank returns the report of all ranks.

        Raises:
            DivergedError: A rank's loss or network is not finite.
            PoolError: A rank is lost.
        """
        wait_for_all_ranks(self._membership)
        started, cpu_started = time.perf_counter(), time.thread_time()
        exchange, self._saved = self._exchange, {}
        exchange.start_round()
        with peer_errors(f"rank {self._membership.rank} lost a peer in round {round_number}"):
            part = yield from self._local.of_round(round_number, self._ddp, self._named, self._optimizer)
            loss_sum, logged = part.loss_sum, part.value_sums(self.job.config.train.logged)
            seconds = time.perf_counter() - started
            on_gpu = self._membership.device.type != "cpu"
            cpu_s = seconds - sum(exchange.transfers_s) if on_gpu else time.thread_time() - cpu_started
            numbers = worker_numbers(
                steps=part.steps_made, samples=part.samples, loss_sum=loss_sum,
                compute_s=seconds - sum(exchange.transfers_s), cpu_s=cpu_s, gauge=self._gauge,
            )  # fmt: skip
            own = RankRound(numbers, is_finite(self._named.values()), exchange.sent_bytes, exchange.transfers_s, logged)
            report = report_round(self.job, self._membership, self._meter, own, round_number)
            trained = time.perf_counter()
            if exchange.powersgd is not None and is_saved_after(self.job, round_number):
                self._saved = saved_powersgd(exchange.powersgd, self._membership)
        return replace(report, numbers={**report.numbers, "aside_s": time.perf_counter() - trained})

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the full network's tensors, the optimizer's state, and PowerSGD's state."""
        state = optimizers.named_state(self._optimizer, self._named)
        return {**self._model.state_dict(), **state, **self._saved}

    def bytes_sent(self) -> int:
        """Return the bytes that all ranks have sent."""
        return self._meter.sent.total()

    def close(self) -> None:
        """End the loader processes; the process group outlives the run."""
        self._local.close()

    def _settle_order(self) -> None:
        """Run one backward pass without sending gradients, so that DDP fixes their order before the first step.

        From the second step of a process on, DDP orders gradients as they became ready in the first step. The order
        decides how ranks are summed, and where PowerSGD stores its errors. A resumed run equals an uninterrupted one
        only if both have the same order from the first step on.
        """
        job, device = self.job, self._membership.device
        before = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        dtypes = {name: parameter.dtype for name, parameter in self._named.items()}
        self._exchange.rehearses = True
        with seeded(device, job.config.seed, Purpose.REHEARSAL):
            batch, loop = job.schedule.sampler.batch(self._membership.rank, 0), self._loop
            loss = loop.step.loss(self._ddp, loop.read(batch), lambda: loop.numbers(batch))
            loss.backward()  # type: ignore[no-untyped-call]
        self._exchange.rehearses = False
        for name, buffer in self._model.named_buffers():
            if name in before and buffer.shape == before[name].shape:  # a cache may have grown
                buffer.copy_(before[name])
        for name, parameter in self._named.items():
            if parameter.dtype != dtypes[name]:
                raise ModelError(
                    f"the forward changes the dtype of '{name}' from {dtypes[name]} to {parameter.dtype}, but method "
                    f"'{job.config.method}' averages gradients in the initial dtype: use the final dtype from the start"
                )
        unused = [name for name, parameter in self._named.items() if parameter.requires_grad and parameter.grad is None]
        if unused:
            raise ModelError(
                f"'{unused[0]}' gets no gradient ({len(unused)} such parameters), but method '{job.config.method}' "
                "needs all gradients: freeze unused parameters (requires_grad_(False))"
            )
        self._model.zero_grad(set_to_none=True)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        """Load rank 0's optimizer state."""
        if self._exchange.powersgd is not None:
            state = restore_powersgd(self._exchange.powersgd, state, self._membership)
        optimizers.restore_named_state(self._optimizer, self._named, state)
