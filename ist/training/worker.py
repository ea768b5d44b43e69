"""A worker: it trains the submodel in a message for a round, in place, and writes the result into the reply.

Where it sits: a pool (`ist/pools/`) calls `Worker.train` with the buffers of a round's messages, and sends the reply.
Not here: the local steps (`ist/loops/local_loop.py`), state between rounds (`ist/training/worker_state.py`), the
assignment of neurons (`ist/subnet/assignments.py`), merging (`ist/training/coordinator.py`).
"""

import math
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ist.checks.drift import Operators, check_forward, is_due, operators, take_attributes
from ist.distributed.worker_group import WorkerGroup
from ist.loops.inside import inside_of, opened
from ist.loops.local_loop import worker_loop
from ist.loops.part import LocalLoop, LocalSteps, LoopMemory, Part
from ist.monitoring.meter import MemoryGauge, process_peak_bytes, worker_numbers
from ist.network.compiled import separated
from ist.network.failures import located
from ist.optimization import optimizers
from ist.rng import Indices
from ist.subnet.assignments import Assignments, WorkerSlot
from ist.subnet.cut import on_device
from ist.subnet.frozen_rest import FullModule
from ist.subnet.job import Job
from ist.subnet.module import bind, collect, multiply
from ist.subnet.residual_blocks import scaled_blocks
from ist.subnet.split_model import ShapeKeys
from ist.tensors import checksums, is_finite
from ist.training.worker_state import CheckpointLocation, WorkerState, named_tensors_of, split_state
from ist.transport.codec import MessageBuffers
from ist.transport.endpoints import WorkerEndpoint, down_bytes
from ist.transport.frozen_parameters import FrozenCache, check_frozen
from ist.transport.message import Header, Message


@dataclass(frozen=True)
class _Did:
    """What the ranks of a worker together did in a round; see `ist/measurements.py`."""

    loss_sum: float
    samples: int
    memory_bytes: int
    process_memory_bytes: int
    logged: tuple[float, ...]
    inside_bytes: int


class Worker:
    """One worker: its shard of the data, its subnet module, and the loop that trains it.

    Args:
        job: The run.
        slot: The worker's number and its team.
        device: The device on which it computes.
        held: The neurons of each worker in each round; all workers of a process share this object.
        location: Where the worker saves its state; None: nowhere.
        frozen: The process's cache of frozen parameters; None: a new, empty one.
        loop: Makes the local steps; None: the loop of the task.
        memory: What the user's own loop has kept in this process; None: nothing yet.
        group: The ranks that are this worker together, each with a `Worker`; None: this process alone.
    """

    def __init__(
        self,
        job: Job,
        slot: WorkerSlot,
        device: torch.device,
        held: Assignments,
        location: CheckpointLocation | None = None,
        frozen: FrozenCache | None = None,
        loop: LocalLoop | None = None,
        memory: LoopMemory | None = None,
        group: WorkerGroup | None = None,
    ) -> None:
        if group is not None:
            slot = replace(slot, rank=group.rank, ranks=group.size)
        self.job = job
        self.slot = slot
        self.device = device
        loop = loop or worker_loop(job, slot, device)
        self.local = LocalSteps(job.schedule, job.config.seed, slot, device, loop, memory)
        self.local.owner = self
        self._group = group
        self._inside = inside_of(job.config, group)
        self._state = WorkerState(job, slot, held, location, self.local.sources)
        self.gauge = MemoryGauge(device)
        self._held = held
        self._shape_keys = ShapeKeys(job.split)
        self._full: FullModule | None = None
        self._shape_key: Hashable = None
        self._take_module(0)
        self._is_new = True
        self._end = WorkerEndpoint(job.split, job.config.exchange, device)
        self.frozen = frozen or FrozenCache(job.split, job.config.exchange, held)
        self._buffers = {name for name, _ in job.split.template.named_buffers()}
        self._operators: Operators | None = None

    @property
    def number(self) -> int:
        """The worker's number in its team, from 0."""
        return self.slot.worker

    def neurons(self, round_number: int) -> Sequence[Indices]:
        """Return the neurons that this worker holds in a round, by group."""
        return self._held.of(round_number, self.slot.team)[self.slot.worker]

    def _take_module(self, round_number: int) -> None:
        """Make the module of a round, unless that of the last round has the same form."""
        neurons = self.neurons(round_number)
        has_rest = self._held.has_rest(round_number, neurons)
        key = (has_rest, self._shape_keys.of(neurons))
        if key == self._shape_key:
            return
        self._shape_key = key
        if self._full is not None:
            self._full.parts.clear()  # a module is freed by the garbage collector, which may take long
        self._full = self.job.split.full_module(neurons, self.device) if has_rest else None
        self.module = self._full.module if self._full else self.job.split.module(neurons, self.device)

    def bind(self, round_number: int, tensors: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> None:
        """Give the module of a round its values.

        Args:
            round_number: The round.
            tensors: The worker's part of what it trains.
            fixed: Its part of frozen parameters; with the frozen rest of the network, `frozen` has them.
        """
        self._take_module(round_number)
        if self._full is None:
            bind(self.module, {**tensors, **fixed})
            return
        neurons, names = self.neurons(round_number), self._full.split | tensors.keys()
        held = {name: dims for name, dims in self.job.split.cut(neurons).items() if name in names}
        [cut] = on_device([held], self.device)
        self._full.bind(tensors, cut, {name: tensor.decode for name, tensor in self.frozen.rest.items()})

    def collect(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what a forward has replaced in the module into the tensors that were given to `bind`."""
        if self._full is not None:
            self._full.collect(tensors)
        else:
            collect(self.module, tensors)

    def new_module(self, round_number: int, device: torch.device) -> nn.Module:
        """Return another module of a round, without trained values.

        Raises:
            ModelError: A layer cannot compute the full network with the frozen rest.
        """
        neurons = self.neurons(round_number)
        if self._held.has_rest(round_number, neurons):
            return self.job.split.full_module(neurons, device).module
        return self.job.split.module(neurons, device)

    def train(
        self,
        round_number: int,
        buffers: MessageBuffers,
        frozen: Message | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> Generator[Part]:
        """Train the subnet in `buffers` for a round, and write the reply into `buffers`.

        It yields this worker's part once, and continues when its local steps are made.

        Args:
            round_number: The round, from 0.
            buffers: The messages of the round, on this worker's device. Without quantization, the module's parameters
                are views of them during this call.
            frozen: The message with what this worker lacks of frozen parameters and of the frozen rest of the network;
                None: it lacks nothing.
            is_over: Called before each step: whether the coordinator has continued without this worker. None: never.

        Raises:
            AbandonedRoundError: The coordinator has continued without this worker.
            DataError: A sample cannot be read, or its loss fails.
            ModelError: The network fails, training changes a frozen parameter, or the network has changed so that its
                neurons can no longer be split.
            PoolError: Frozen parameters are missing.
        """
        started, cpu_started = time.perf_counter(), time.thread_time()
        job = self.job
        if self._is_new:
            self._restore(round_number)
        message = self._end.open(buffers)
        neurons = self.neurons(round_number)
        self.frozen.update(neurons, self.number, round_number, frozen, self.device)
        fixed = dict(self.frozen.tensors)
        has_rest = self._held.has_rest(round_number, neurons)
        scales = {} if has_rest else job.split.folded_scales(neurons)
        folded = {name: scale for name, scale in scales.items() if name in message.tensors}
        # Scale a copy: multiplying a frozen parameter and dividing it again would change its bits.
        fixed |= {name: fixed[name].clone() for name in scales if name in fixed}
        multiply(fixed, {name: scale for name, scale in scales.items() if name in fixed})
        sums = checksums(fixed)
        trained = separated(message.tensors, job.config.train.compile)
        self.bind(round_number, trained, fixed)
        module = self.module
        multiply(trained, folded)
        trace_started, trace_cpu_started = time.perf_counter(), time.thread_time()
        if self._operators is None and not has_rest:
            self._operators = operators(job, module, self.device)
        trace_s, trace_cpu_s = time.perf_counter() - trace_started, time.thread_time() - trace_cpu_started
        subnet = opened(self._inside, module)
        named = subnet.named
        optimizer = self._state.optimizer(named, round_number)
        if job.split.state_slots and round_number > 0:
            optimizers.load_state(optimizer, named, job.split.state_slots, message.tensors)
        with scaled_blocks(subnet.network, self._held.training_block_scales(round_number, self.slot.team)):
            part = yield from self.local.of_round(round_number, subnet.model, named, optimizer, is_over)
            down = down_bytes(job.split, buffers.layouts, round_number)
            did = self._did(part, down + (frozen.nbytes if frozen else 0))
        optimizer.zero_grad(set_to_none=True)  # free the gradients' memory until the next round
        if self._inside:
            self._inside.close(module)
        if subnet.network is not module:
            take_attributes(module, subnet.network)
        self.collect(message.tensors)
        check_frozen(module, fixed, sums)
        multiply(message.tensors, folded, inverse=True)
        if job.split.state_slots:
            optimizers.store_state(optimizer, named, job.split.state_slots, message.tensors)
        is_invalid = self._is_invalid(round_number, did.loss_sum, message)
        self._end.close(buffers, message, neurons)
        elapsed = time.perf_counter() - started - trace_s
        # A GPU serves one process only, so its elapsed time is its compute time.
        cpu_s = time.thread_time() - cpu_started - trace_cpu_s if self.device.type == "cpu" else elapsed
        numbers = worker_numbers(
            steps=part.steps_made, samples=did.samples, loss_sum=did.loss_sum, compute_s=elapsed, cpu_s=cpu_s,
            gauge=self.gauge,
        )  # fmt: skip
        numbers["memory_bytes"] = max(numbers["memory_bytes"], did.memory_bytes)
        numbers["process_memory_bytes"] = max(numbers["process_memory_bytes"], did.process_memory_bytes)
        numbers["inside_bytes"] = did.inside_bytes
        if is_invalid:
            self._end.residuals = {}
        else:
            self._state.store(optimizer, named, self._end.residuals, round_number)
        # The full network is computed whatever is cut, so it needs no check with the frozen rest.
        if self._operators is not None and not has_rest and is_due(job, round_number):
            with located(f"round {round_number}, worker {self.number}"):
                self._operators = check_forward(job, module, neurons, self._operators, self.device)
        numbers["aside_s"] = time.perf_counter() - started - elapsed
        buffers.up.write_header(Header(round_number, self.number, numbers, logged=did.logged))

    def close(self) -> None:
        """Release what the worker's loop holds."""
        self.local.close()

    def state_dict(self, part: Part) -> dict[str, Tensor]:
        """Return copies of the state with which a part starts; see `StateOwner`."""
        tensors = named_tensors_of(part.optimizer, part.named, self._end.residuals, self.local.sources)
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def load_state_dict(self, part: Part, state: Mapping[str, Tensor]) -> None:
        """Undo `state_dict`; see `StateOwner`."""
        optimizer, residuals = split_state(state, self.local.sources)
        optimizers.restore_named_state(part.optimizer, part.named, optimizer)
        self._end.residuals = {name: tensor.to(self.device, copy=True) for name, tensor in residuals.items()}

    def _did(self, part: Part, message_bytes: int) -> "_Did":
        """Return what all ranks of this worker did in a part; its first rank has sent the message to the others."""
        memory = [self.gauge.peak_bytes(), process_peak_bytes()]
        own = [part.loss_sum, part.samples, *memory, *part.value_sums(self.job.config.train.logged)]
        if self._group is None or self._inside is None:
            ranks, inside = [own], 0
        else:
            ranks = self._group.gather(own)
            inside = self._inside.sent_bytes(part.steps_made, self.job.config.train.accumulate)
            inside += (self._group.size - 1) * message_bytes
        losses, samples, above, whole, *logged = zip(*ranks, strict=True)
        peaks = int(max(above)), int(max(whole))
        return _Did(sum(losses), int(sum(samples)), *peaks, tuple(map(sum, logged)), inside)

    def _restore(self, round_number: int) -> None:
        """Load this worker's saved state if its first round follows a checkpoint."""
        residuals = self._state.restore(round_number)
        # Ranks that continue from different states would no longer train the same subnet.
        if self._group is not None and not all(found for (found,) in self._group.gather([self._state.is_restored])):
            self._state.forget()
            residuals = {}
        self._end.residuals = {name: tensor.to(self.device) for name, tensor in residuals.items()}
        self._is_new = False

    def _is_invalid(self, round_number: int, loss_sum: float, trained: Message) -> bool:
        """Return whether the coordinator will reject this result while a later round would use the worker's state.

        Such state must not be stored: it would make later rounds non-finite.
        """
        is_used = self._state.is_used_after(round_number)
        values = (
            tensor for name, tensor in trained.tensors.items() if name not in self._buffers
        )  # buffers are skipped: masks contain infinities
        return is_used and not (math.isfinite(loss_sum) and is_finite(values))


class WorkerHost:
    """Provides a process's `Worker` in each round, as its number, team and share may change from round to round.

    Args:
        job: The run, with the maximum number of workers.
        device: The device on which the worker computes.
        held: The neurons of each worker in each round.
        location: Where workers save their state; None: nowhere.
        memory: What the user's own loop keeps; None: a new, empty one.
        group: The processes that are the worker together; None: this process alone.
    """

    def __init__(
        self,
        job: Job,
        device: torch.device,
        held: Assignments,
        location: CheckpointLocation | None = None,
        memory: LoopMemory | None = None,
        group: WorkerGroup | None = None,
    ) -> None:
        self._job = job
        self._group = group
        self._slot: WorkerSlot | None = None
        self._held = held
        self._location = location
        self._device = device
        self._frozen = FrozenCache(job.split, job.config.exchange, held)
        self._memory = memory or LoopMemory()
        self._worker: Worker | None = None

    def worker(self, slot: WorkerSlot) -> Worker:
        """Return the worker for a slot; the previous worker if the slot has not changed."""
        if self._worker is None or self._slot != slot:
            self.close()
            self._slot = slot
            self._worker = Worker(
                self._job, slot, self._device, self._held, self._location, self._frozen, memory=self._memory,
                group=self._group,
            )  # fmt: skip
        return self._worker

    def close(self) -> None:
        """Release what the worker holds."""
        if self._worker is not None:
            self._worker.close()
