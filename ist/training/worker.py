"""Local steps on a narrow network: the innermost loop of the system.

Where it sits: a pool hands a message in; this file trains the tensors in it, in place; the pool takes
it back.
Not here: how the message got here, whose neurons they are, what happens to them next.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch

from ist.checks.drift import Operators, check_forward, is_due, operators
from ist.monitoring.meter import MemoryGauge, worker_numbers
from ist.network.failures import located
from ist.optimization import optimizers
from ist.rng import Indices
from ist.subnet.assignments import Assignments, WorkerSlot
from ist.subnet.job import Job
from ist.subnet.module import bind, collect, multiply
from ist.subnet.residual_blocks import scaled_blocks
from ist.subnet.split_model import ShapeKeys
from ist.tensors import checksums, is_finite
from ist.training.local_loop import TaskLoop, local_steps
from ist.training.worker_state import CheckpointLocation, WorkerState
from ist.transport.codec import MessageBuffers
from ist.transport.endpoints import WorkerEndpoint
from ist.transport.frozen_parameters import FrozenCache, check_frozen
from ist.transport.message import Header, Message


class Worker:
    """One worker: its shard of the data, its narrow network, and the loop that trains it.

    Args:
        job: The run.
        slot: Which worker this is, of which team.
        device: Where it computes.
        held: Who holds which neurons; the workers of a process share it.
        location: Where this worker saves what it is_used; None: nowhere.
        frozen: What its process holds of frozen parameters; None: nothing yet.
    """

    def __init__(
        self,
        job: Job,
        slot: WorkerSlot,
        device: torch.device,
        held: Assignments,
        location: CheckpointLocation | None = None,
        frozen: FrozenCache | None = None,
    ) -> None:
        self.job = job
        self.slot = slot
        self.device = device
        self.loop = TaskLoop(job, slot, device)
        self.gauge = MemoryGauge(device)
        self._held = held
        self._shape_keys = ShapeKeys(job.split)
        self._shape_key = self._shape_keys.of(self.neurons(0))
        self.module = job.split.module(self.neurons(0), device)
        self._state = WorkerState(job, slot, held, location)
        self._is_new = True
        self._end = WorkerEndpoint(job.split, job.config.exchange, device)
        self.frozen = frozen or FrozenCache(job.split, job.config.exchange)
        self._buffers = {name for name, _ in job.split.template.named_buffers()}
        self._operators: Operators | None = None

    @property
    def number(self) -> int:
        """Which worker of its team this is, from 0."""
        return self.slot.worker

    def neurons(self, round_number: int) -> Sequence[Indices]:
        """Return the neurons that this worker holds in a round, by group."""
        return self._held.of(round_number, self.slot.team)[self.slot.worker]

    def train(
        self,
        round_number: int,
        buffers: MessageBuffers,
        frozen: Message | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        """Make a round's local steps on the subnet in `buffers`, and write what goes back into it.

        Args:
            round_number: The round, from 0.
            buffers: On this worker's device; where nothing is rounded on the way, the parameters are its tensors while
                this runs.
            frozen: What came beside it: frozen parameters that this worker lacks; None: it has them all.
            is_over: Asked before each step whether the round has gone on without this worker; None: it never does.

        Raises:
            AbandonedRoundError: It has.
            DataError: A sample cannot be read, or its loss fails.
            ModelError: The network fails, training changes a frozen parameter, or the network has changed so that its
                neurons cannot be split any more.
            PoolError: This worker was not sent what it lacks.
        """
        started, cpu_started = time.perf_counter(), time.thread_time()
        job = self.job
        if self._is_new:
            self._restore(round_number)
        message = self._end.open(buffers)
        neurons = self.neurons(round_number)
        if self._shape_key != (key := self._shape_keys.of(neurons)):
            self._shape_key, self.module = key, job.split.module(neurons, self.device)
        module = self.module
        fixed = dict(self.frozen.update(neurons, self.number, round_number, frozen, self.device))
        scales = job.split.folded_scales(neurons)
        folded = {name: scale for name, scale in scales.items() if name in message.tensors}
        # What is frozen is held as it came: to multiply it and divide it again would move it.
        fixed |= {name: fixed[name].clone() for name in scales if name in fixed}
        multiply(fixed, {name: scale for name, scale in scales.items() if name in fixed})
        sums = checksums(fixed)
        bind(module, {**message.tensors, **fixed})
        multiply(message.tensors, folded)
        trace_started, trace_cpu_started = time.perf_counter(), time.thread_time()
        if self._operators is None:
            self._operators = operators(job, module, self.device)
        trace_s, trace_cpu_s = time.perf_counter() - trace_started, time.thread_time() - trace_cpu_started
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        optimizer = self._state.optimizer(named, round_number)
        if job.split.state_slots and round_number > 0:
            optimizers.load_state(optimizer, named, job.split.state_slots, message.tensors)
        with scaled_blocks(module, self._held.training_block_scales(round_number, self.slot.team)):
            total, samples = local_steps(self.loop, round_number, module, named, optimizer, is_over)
        optimizer.zero_grad(set_to_none=True)  # gradients need no memory while the subnet travels
        collect(module, message.tensors)
        check_frozen(module, fixed, sums)
        multiply(message.tensors, folded, inverse=True)
        if job.split.state_slots:
            optimizers.store_state(optimizer, named, job.split.state_slots, message.tensors)
        is_invalid = self._is_invalid(round_number, total, message)
        self._end.close(buffers, message, neurons)
        elapsed = time.perf_counter() - started - trace_s
        # A GPU is nobody else's.
        cpu_s = time.thread_time() - cpu_started - trace_cpu_s if self.device.type == "cpu" else elapsed
        steps = len(job.schedule.steps(round_number))
        numbers = worker_numbers(
            steps=steps, samples=samples, loss_sum=total, compute_s=elapsed, cpu_s=cpu_s, gauge=self.gauge
        )
        if is_invalid:
            self._end.residuals = {}
        else:
            self._state.store(optimizer, named, self._end.residuals, round_number)
        if is_due(job, round_number):
            with located(f"round {round_number}, worker {self.number}"):
                self._operators = check_forward(job, module, neurons, self._operators, self.device)
        numbers["aside_s"] = time.perf_counter() - started - elapsed
        buffers.up.write_header(Header(round_number, self.number, numbers))

    def _restore(self, round_number: int) -> None:
        """Take up what was kept where this worker's first round follows a checkpoint."""
        residuals = self._state.restore(round_number)
        self._end.residuals = {name: tensor.to(self.device) for name, tensor in residuals.items()}
        self._is_new = False

    def _is_invalid(self, round_number: int, loss_sum: float, trained: Message) -> bool:
        """Return whether the coordinator will refuse a round of which something would be kept.

        It would spoil the rounds to come.
        """
        is_used = self._state.is_used_after(round_number)
        values = (
            tensor for name, tensor in trained.tensors.items() if name not in self._buffers
        )  # masks hold infinities
        return is_used and not (math.isfinite(loss_sum) and is_finite(values))


class WorkerHost:
    """Where a worker sits whose number and share may change from round to round.

    Args:
        job: The run, for as many workers as there may be.
        device: Where it computes.
        held: Who holds which neurons.
        location: Where workers save what they keep; None: nowhere.
    """

    def __init__(
        self, job: Job, device: torch.device, held: Assignments, location: CheckpointLocation | None = None
    ) -> None:
        self._job = job
        self._held = held
        self._location = location
        self._device = device
        self._frozen = FrozenCache(job.split, job.config.exchange)
        self._worker: Worker | None = None

    def worker(self, slot: WorkerSlot) -> Worker:
        """Return the worker of a slot: the same as before, while the slot is."""
        if self._worker is None or self._worker.slot != slot:
            self._worker = Worker(self._job, slot, self._device, self._held, self._location, self._frozen)
        return self._worker
