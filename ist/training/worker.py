"""Local steps on a narrow network: the innermost loop of the system.

Where it sits: a pool hands a message in; this file trains the tensors in it, in place; the pool takes
it back.
Not here: how the message got here, whose neurons they are, what happens to them next.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ist.checks.drift import Operators, check_forward, is_due, operators
from ist.data.batches import fetch, take_shard
from ist.data.nested import call_model
from ist.errors import AbandonedRoundError
from ist.monitoring.meter import MemoryGauge, worker_numbers
from ist.network.failures import located, loss_errors, loss_of, network_errors
from ist.optimization import optimizers
from ist.optimization.step_settings import apply_settings, matching_groups
from ist.rng import Indices, Purpose, seeded
from ist.subnet.job import Job
from ist.subnet.module import bind, collect, multiply
from ist.subnet.residual_blocks import scaled_blocks
from ist.tensors import is_finite
from ist.training.worker_state import Keeper, Site
from ist.transport.codec import Envelope
from ist.transport.endpoints import WorkerEnd
from ist.transport.frozen_parameters import FrozenParts, check_frozen, checksums
from ist.transport.interfaces import Place
from ist.transport.message import Header, Message


class Worker:
    """One worker: its shard of the data, its narrow network, and the loop that trains it.

    Args:
        job: The run.
        number: Which worker this is, from 0.
        device: Where it computes.
        site: Where this worker saves what it keeps; None: nowhere.
        frozen: What its process holds of frozen parameters; None: nothing yet.
    """

    def __init__(
        self,
        job: Job,
        number: int,
        device: torch.device,
        site: Site | None = None,
        frozen: FrozenParts | None = None,
    ) -> None:
        self.job = job
        self.number = number
        self.device = device
        self.shard: Dataset[Any] = take_shard(job.train_data, job.dealing.shard(number))
        self.gauge = MemoryGauge(device)
        self.module = job.narrow(job.neurons(0)[number], device)
        self._keeper = Keeper(job, number, site)
        self._is_new = True
        self._looks = job.looks(number, 0)
        self._end = WorkerEnd(job, number, device)
        self.frozen = frozen or FrozenParts()
        self._buffers = {name for name, _ in job.template.named_buffers()}
        self._operators: Operators | None = None

    def train(
        self,
        round_number: int,
        envelope: Envelope,
        frozen: Message | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        """Make a round's local steps on the subnet in `envelope`, and write what goes back into it.

        Args:
            round_number: The round, from 0.
            envelope: On this worker's device; where nothing is rounded on the way, the parameters are its tensors while
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
            self._recover(round_number)
        message = self._end.open(envelope)
        if self._looks != (looks := job.looks(self.number, round_number)):
            self._looks, self.module = looks, job.narrow(job.neurons(round_number)[self.number], self.device)
        module = self.module
        fixed = dict(self.frozen.update(job, self.number, round_number, frozen, self.device))
        scales = job.folded_scales(self.number, round_number)
        folded = {name: scale for name, scale in scales.items() if name in message.tensors}
        # What is frozen is held as it came: to multiply it and divide it again would move it.
        fixed |= {name: fixed[name].clone() for name in scales if name in fixed}
        multiply(fixed, {name: scale for name, scale in scales.items() if name in fixed})
        sums = checksums(fixed)
        bind(module, {**message.tensors, **fixed})
        multiply(message.tensors, folded)
        look_started, look_cpu_started = time.perf_counter(), time.thread_time()
        if self._operators is None:
            self._operators = operators(job, module, self.device)
        look_s, look_cpu_s = time.perf_counter() - look_started, time.thread_time() - look_cpu_started
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        optimizer = self._keeper.optimizer(named, round_number)
        if job.state_slots and round_number > 0:
            optimizers.load_state(optimizer, named, job.state_slots, message.tensors)
        with scaled_blocks(module, job.held_block_scales(round_number)):
            total, samples = local_steps(
                job, self.number, self.shard, module, named, optimizer, round_number, self.device, is_over
            )
        optimizer.zero_grad(set_to_none=True)  # gradients need no memory while the subnet travels
        collect(module, message.tensors)
        check_frozen(module, fixed, sums)
        multiply(message.tensors, folded, inverse=True)
        if job.state_slots:
            optimizers.store_state(optimizer, named, job.state_slots, message.tensors)
        is_spoilt = self._is_spoilt(round_number, total, message)
        self._end.close(envelope, message, round_number)
        elapsed = time.perf_counter() - started - look_s
        # A GPU is nobody else's.
        cpu_s = time.thread_time() - cpu_started - look_cpu_s if self.device.type == "cpu" else elapsed
        steps = len(job.steps(round_number))
        numbers = worker_numbers(
            steps=steps, samples=samples, loss_sum=total, compute_s=elapsed, cpu_s=cpu_s, gauge=self.gauge
        )
        if is_spoilt:
            self._end.taken = {}
        else:
            self._keeper.keep(optimizer, named, self._end.taken, round_number)
        if is_due(job, round_number):
            with located(f"round {round_number}, worker {self.number}"):
                neurons = job.neurons(round_number)[self.number]
                self._operators = check_forward(job, module, neurons, self._operators, self.device)
        numbers["aside_s"] = time.perf_counter() - started - elapsed
        envelope.up.write_header(Header(round_number, self.number, numbers))

    def _recover(self, round_number: int) -> None:
        """Take up what was kept where this worker's first round follows a checkpoint."""
        taken = self._keeper.recover(round_number)
        self._end.taken = {name: tensor.to(self.device) for name, tensor in taken.items()}
        self._is_new = False

    def _is_spoilt(self, round_number: int, loss_sum: float, trained: Message) -> bool:
        """Return whether the coordinator will refuse a round of which something would be kept.

        It would spoil the rounds to come.
        """
        keeps = self._keeper.keeps(round_number)
        values = (
            tensor for name, tensor in trained.tensors.items() if name not in self._buffers
        )  # masks hold infinities
        return keeps and not (math.isfinite(loss_sum) and is_finite(values))


class Seat:
    """Where a worker sits whose number and share may change from round to round.

    Args:
        job: The run, for as many workers as there may be.
        device: Where it computes.
        site: Where workers save what they keep; None: nowhere.
    """

    def __init__(self, job: Job, device: torch.device, site: Site | None = None) -> None:
        self._job = job
        self._site = site
        self._device = device
        self._frozen = FrozenParts()
        self._taken: tuple[Place, Worker] | None = None

    def worker(self, place: Place) -> Worker:
        """Return the worker of a place: the same as before, while the place is."""
        if self._taken is None or self._taken[0] != place:
            job = self._job.with_workers(place.num_workers, place.capacities)
            self._taken = place, Worker(job, place.worker, self._device, self._site, self._frozen)
        return self._taken[1]


def local_steps(
    job: Job,
    worker: int,
    shard: Dataset[Any],
    module: nn.Module,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    round_number: int,
    device: torch.device,
    is_over: Callable[[], bool] | None = None,
) -> tuple[float, int]:
    """Make a round's optimiser steps on one worker's data: the local training step.

    Args:
        job: The run.
        worker: Whose data and random numbers to use.
        shard: The worker's data.
        module: What to train: a narrow network, or a whole one that averages its gradients.
        named: Its parameters that are trained, by their names in the whole network.
        optimizer: Over them.
        round_number: The round, from 0.
        device: Where the module is.
        is_over: Asked before each step whether the round has gone on without this worker; None: it never does.

    Returns:
        The sum of the samples' losses, and the number of samples. The device is done when it returns.

    Raises:
        AbandonedRoundError: It has.
        DataError: A sample cannot be read, or its loss fails; the message names it, the round and the worker.
        ModelError: The network fails; the message names the module.
    """
    loss_sum, samples = torch.zeros((), device=device), 0
    groups = matching_groups(optimizer, named, job.group_of) if job.settings else []
    with seeded(device, job.config.seed, Purpose.TRAINING, round_number, worker):
        for step in job.steps(round_number):
            if is_over is not None and is_over():
                raise AbandonedRoundError(f"round {round_number} went on without worker {worker}")
            if job.settings:
                apply_settings(optimizer, groups, job.settings[step])
            batch = job.dealing.batch(worker, step)
            with located(f"round {round_number}, worker {worker}"):
                loss = _step(job, worker, shard, module, optimizer, batch, device)
            loss_sum.add_(loss, alpha=len(batch))
            samples += len(batch)
    return float(loss_sum), samples


def _step(
    job: Job,
    worker: int,
    shard: Dataset[Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Indices,
    device: torch.device,
) -> Tensor:
    """Make one optimiser step on a batch, and return its loss."""

    def numbers() -> Indices:
        return job.dealing.shard(worker)[batch]

    inputs, targets = fetch(shard, batch, device, numbers)
    optimizer.zero_grad(set_to_none=True)
    with network_errors(module):
        outputs = call_model(module, inputs)
    with loss_errors(numbers):
        loss = loss_of(job.loss, outputs, targets, numbers)
    with network_errors(module, "the backward pass"):
        loss.backward()  # type: ignore[no-untyped-call]
    with network_errors(module, f"a step of {type(optimizer).__name__}"):
        optimizer.step()
    return loss.detach()
