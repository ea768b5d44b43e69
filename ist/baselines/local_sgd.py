"""Local SGD and DiLoCo: every rank trains a full network of its own for a round, then all networks are averaged.

Local SGD averages the ranks' networks. DiLoCo averages their changes, and an outer optimizer (SGD with Nesterov
momentum) applies the mean change, as a gradient, to the common network; changes may be sent in a few bits.
The optimizer of local steps keeps its state on its rank from round to round, as in both papers. At a checkpoint rank 0
collects these states, which does not count as training traffic.
Where it sits: `ist/training/rounds.py` runs it as a `Method` on rank 0, and as a `Follower` on other ranks.
Not here: the local steps (`ist/loops/local_loop.py`), quantized means (`ist/baselines/quantized_mean.py`), the round
loop, evaluation.
"""

import functools
import logging
import re
import time
from collections.abc import Generator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.utils import average_parameters

from ist.baselines.quantized_mean import quantized_mean
from ist.baselines.ranks import RankRound, broadcast_tensors, gather_tensors, report_round, wait_for_all_ranks
from ist.distributed.process_group import Membership, peer_errors
from ist.errors import CheckpointError
from ist.loops.local_loop import TaskLoop
from ist.loops.part import LocalSteps, Part
from ist.monitoring.meter import MemoryGauge, Meter, worker_numbers
from ist.optimization import optimizers
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.job import Job, is_saved_after
from ist.tensors import is_finite
from ist.training.rounds import RoundReport

_log = logging.getLogger(__name__)

_OUTER = "outer/"
_RANK = "rank-{}/"


class LocalTraining:
    """Local SGD and DiLoCo; a `Method` on rank 0, and a `Follower` on every other rank.

    Args:
        job: The run.
        membership: This rank.
        model: The full network with its initial values; rank 0 broadcasts its own.
        state: Optimizer states from a checkpoint; empty for a new run. Only rank 0's are used.
        meter: Counts the bytes of the all-reduce.
        has_outer_optimizer: Whether an outer optimizer updates the common network (DiLoCo); otherwise the common
            network is the mean (local SGD).
        bits: Bits in which a number of the change is sent; None: its own dtype.

    Reference: Stich, "Local SGD Converges Fast and Communicates Little", arXiv 1805.09767; Douillard et al., "DiLoCo",
    arXiv 2311.08105, Algorithm 1 (outer learning rate 0.7, momentum 0.9).
    """

    def __init__(
        self,
        job: Job,
        membership: Membership,
        model: nn.Module,
        state: Mapping[str, Tensor],
        meter: Meter,
        *,
        has_outer_optimizer: bool,
        bits: int | None = None,
    ) -> None:
        self.job = job
        self._bits = bits
        self._membership = membership
        self._meter = meter
        self._gauge = MemoryGauge(membership.device)
        slot, device = WorkerSlot(membership.rank, Team(membership.world_size)), membership.device
        self._local = LocalSteps(job.schedule, job.config.seed, slot, device, TaskLoop(job, slot, device))
        self._model = model.to(membership.device)
        with peer_errors("starting together"):
            self._model.load_state_dict(broadcast_tensors(membership, self._model.state_dict()))
            state = broadcast_tensors(membership, state)
        ranks = [_RANK.format(rank) for rank in range(membership.world_size)]
        state = self._of_ranks(state)
        prefixes = (*ranks, _OUTER) if has_outer_optimizer else tuple(ranks)
        if foreign := [name for name in state if not name.startswith(prefixes)]:
            raise CheckpointError(
                f"the checkpoint contains '{foreign[0]}', which method '{job.config.method}' does not use: resume with "
                "the method of the saved run"
            )
        trained = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        self._named = trained
        self._optimizer = job.task.make_optimizer(trained)
        self._sent_bytes = 0.0
        self._saved: dict[str, Tensor] = {}
        # The network after the last exchange, which is the same on all ranks, and the optimizer that updates it.
        self._common: dict[str, nn.Parameter] = {}
        self._outer: torch.optim.Optimizer | None = None
        if has_outer_optimizer:
            outer = job.config.baseline.outer
            self._common = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in trained.items()}
            self._outer = torch.optim.SGD(
                list(self._common.values()),
                lr=outer.lr,
                momentum=outer.momentum,
                nesterov=outer.momentum > 0,
            )
            optimizers.restore_named_state(self._outer, self._common, _part(state, _OUTER))
        optimizers.restore_named_state(self._optimizer, trained, _part(state, _RANK.format(membership.rank)))

    @property
    def model(self) -> nn.Module:
        """The full network; between rounds it is the same on every rank, except for running statistics."""
        return self._model

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Run the steps of a round on every rank by itself, then average; every rank returns the report of all ranks.

        Raises:
            DivergedError: A rank's loss or network is not finite.
            PoolError: A rank is lost.
        """
        wait_for_all_ranks(self._membership)
        started, cpu_started = time.perf_counter(), time.thread_time()
        self._saved = {}
        part = yield from self._local.of_round(round_number, self._model, self._named, self._optimizer)
        loss_sum, logged = part.loss_sum, part.value_sums(self.job.config.train.logged)
        trained, cpu_trained = time.perf_counter(), time.thread_time()
        with peer_errors(f"rank {self._membership.rank} lost a peer in round {round_number}"):
            self._average()
            if self._membership.device.type == "cuda":  # with NCCL, calls return before the exchange is done
                torch.cuda.synchronize(self._membership.device)
            seconds = time.perf_counter() - started
            on_gpu = self._membership.device.type != "cpu"
            cpu_s = trained - started if on_gpu else cpu_trained - cpu_started
            transfers = [time.perf_counter() - trained]
            numbers = worker_numbers(
                steps=part.steps_made, samples=part.samples, loss_sum=loss_sum,
                compute_s=seconds - sum(transfers), cpu_s=cpu_s, gauge=self._gauge,
            )  # fmt: skip
            own = RankRound(numbers, is_finite(self._named.values()), self._sent_bytes, transfers, logged)
            report = report_round(self.job, self._membership, self._meter, own, round_number)
            ended = time.perf_counter()
            if is_saved_after(self.job, round_number):
                self._saved = self._states()
        return replace(report, numbers={**report.numbers, "aside_s": time.perf_counter() - ended})

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return the full network's tensors, and in a round with a checkpoint the optimizer states of all ranks."""
        return {**self._model.state_dict(), **self._saved}

    def bytes_sent(self) -> int:
        """Return the bytes that all ranks have sent."""
        return self._meter.sent.total()

    def close(self) -> None:
        """End the loader processes; the process group outlives the run."""
        self._local.close()

    def _of_ranks(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the optimizer states of ranks that the run does not have any more, and warn of ranks without one."""
        saved = {int(found[1]) for name in state if (found := re.match(r"rank-(\d+)/", name))}
        gone = {rank for rank in saved if rank >= self._membership.world_size}
        new = set(range(self._membership.world_size)) - saved if saved else set()
        if (gone or new) and self._membership.rank == 0:
            _log.warning(
                "the run was saved with the optimizer states of %d ranks and has %d now: %s",
                len(saved), self._membership.world_size,
                "the states of the other ranks are dropped" if gone else "the other ranks start with fresh states",
            )  # fmt: skip
        dropped = tuple(_RANK.format(rank) for rank in gone)
        return {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}

    def _average(self) -> None:
        """Average over ranks, so that the network is the same on all of them."""
        parameters = list(self._named.values())
        size = self._membership.world_size
        ring = 2 * (size - 1) / size
        if self._outer is None:
            # PyTorch averages all parameters as one vector, in the widest dtype among them.
            widest = functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters))
            self._sent_bytes += ring * widest.itemsize * sum(parameter.numel() for parameter in parameters)
            average_parameters(iter(parameters), dist.group.WORLD)  # type: ignore[arg-type]
            return
        common = list(self._common.values())
        change = torch.cat([(old - new).detach().flatten() for old, new in zip(common, parameters, strict=True)])
        if self._bits is not None:
            change, sent = quantized_mean(change, self._membership, self._bits)
            self._sent_bytes += sent
        else:
            self._sent_bytes += ring * change.nbytes
            change /= size
            dist.all_reduce(change)
        sizes = [parameter.numel() for parameter in common]
        for parameter, part in zip(common, torch.split(change, sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        self._outer.step()
        self._outer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for old, new in zip(common, parameters, strict=True):
                new.copy_(old)

    def _states(self) -> dict[str, Tensor]:
        """Return the optimizer states of all ranks, by name, on rank 0."""
        ranks = gather_tensors(self._membership, optimizers.named_state(self._optimizer, self._named))
        found = {
            _RANK.format(rank) + name: tensor for rank, theirs in enumerate(ranks) for name, tensor in theirs.items()
        }
        if self._outer is not None:
            outer = optimizers.named_state(self._outer, self._common)
            found |= {_OUTER + name: tensor for name, tensor in outer.items()}
        return found


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
