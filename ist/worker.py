"""Local steps on a narrow network: the innermost loop of the system.

Where it sits: a pool hands a message in; this file trains the tensors in it, in place; the pool takes
it back.
Not here: how the message got here, whose neurons they are, what happens to them next.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ist import optim
from ist.blocks import scaled_blocks
from ist.data.batches import fetch, length, take_shard
from ist.data.nested import call_model
from ist.drift import Operators, check_forward, is_due, operators, warn_of_counters
from ist.errors import AbandonedRoundError, ConfigError, DataError, ISTError, ModelError
from ist.evaluate import evaluate, reestimate_statistics, statistics_batches
from ist.exchange import WorkerEnd
from ist.failures import located, loss_errors, loss_of, network_errors
from ist.finite import is_finite
from ist.frozen import FrozenParts, check_frozen, checksums
from ist.groups import TensorSpec, named_tensors
from ist.job import Job
from ist.kept import Keeper, Site
from ist.meter import MemoryGauge
from ist.narrow import bind, collect, multiply
from ist.optimizer_trial import check_optimizer
from ist.pool import Place
from ist.pool.coding import Envelope
from ist.pool.wire import Header, Message
from ist.reach import check_reach
from ist.rng import Indices, Purpose, seeded
from ist.schedule import apply_settings, matching_groups
from ist.start import check_start, what_is_not_finite
from ist.subnet import cut_specs
from ist.verify import verify_cuts


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
            optim.load_state(optimizer, named, job.state_slots, message.tensors)
        with scaled_blocks(module, job.held_block_scales(round_number)):
            total, samples = local_steps(
                job, self.number, self.shard, module, named, optimizer, round_number, self.device, is_over
            )
        optimizer.zero_grad(set_to_none=True)  # gradients need no memory while the subnet travels
        collect(module, message.tensors)
        check_frozen(module, fixed, sums)
        multiply(message.tensors, folded, inverse=True)
        if job.state_slots:
            optim.store_state(optimizer, named, job.state_slots, message.tensors)
        is_spoilt = self._is_spoilt(round_number, total, message)
        self._end.close(envelope, message, round_number)
        elapsed = time.perf_counter() - started - look_s
        # A GPU is nobody else's.
        cpu_s = time.thread_time() - cpu_started - look_cpu_s if self.device.type == "cpu" else elapsed
        memory_bytes = self.gauge.peak_bytes()
        if is_spoilt:
            self._end.taken = {}
        else:
            self._keeper.keep(optimizer, named, self._end.taken, round_number)
        if is_due(job, round_number):
            with located(f"round {round_number}, worker {self.number}"):
                neurons = job.neurons(round_number)[self.number]
                self._operators = check_forward(job, module, neurons, self._operators, self.device)
        envelope.up.write_header(
            Header(
                round_number,
                self.number,
                len(job.steps(round_number)),
                samples,
                total,
                elapsed,
                cpu_s,
                memory_bytes,
                aside_s=time.perf_counter() - started - elapsed,
            )
        )

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


def rehearse(job: Job) -> None:
    """Check the cuts, make one step of worker 0 on a small batch and evaluate it: what cannot work ends before the run.

    Costs the memory of two whole networks for a moment, then that of several subnets; changes nothing. Warns of data of
    which an item changes from look to look.

    Raises:
        ModelError: A narrow network computes something else than the masked whole one, or fails where it is evaluated.
        DataError: A sample cannot be read, or its loss fails.
        ConfigError: Network, data, loss, metric and optimiser do not fit each other; the message is torch's.
    """
    device = torch.device("cpu")
    _warn_of_unrepeatable(job)
    network = job.build()
    check_start(job, network)
    if job.config.method == "ist":
        verify_cuts(job, network)
    del network
    try:
        with seeded(device, job.config.seed, Purpose.REHEARSAL), warnings.catch_warnings():
            # What torch warns of, and computes: (N, 1) and (N,) are spread over each other.
            warnings.filterwarnings("error", message="Using a target size")
            _one_step(job, device)
    except ISTError:
        raise
    except Exception as error:  # network, data, loss and optimiser may be anybody's
        raise ConfigError(
            f"network, data, loss and optimiser do not fit each other: a step on a batch of "
            f"{job.dealing.smallest_batch} fails: {type(error).__name__}: {error}".splitlines()[0]
        ) from error


def _warn_of_unrepeatable(job: Job) -> None:
    """Warn of data sets that draw from generators which nobody can seed, or that change as they are looked at."""
    for which, dataset, content in zip(
        ("training", "test"), (job.train_data, job.test_data), job.contents, strict=True
    ):
        if dataset is not None and content.unrepeatable is not None:
            warnings.warn(
                f"the {which} data ({type(dataset).__name__}): item {content.unrepeatable} is another one at a second "
                "look, though the generators of torch, random and numpy.random are seeded alike: runs with one seed, "
                "and resumed ones, will differ. Draw from these generators, not from one that the data set holds, and "
                "let items not depend on those that were asked for before",
                stacklevel=3,
            )


def _one_step(job: Job, device: torch.device) -> None:
    worker = Worker(job, 0, device)
    message = Message(job.layout(0, 0), device)
    specs = cut_specs(job.frozen_specs, job.frozen_cut(0, 0))
    # Not zeros: an average that a forward makes in a frozen parameter would not move from there.
    fixed = {
        name: torch.full(spec.shape, _like_a_mean(spec), dtype=spec.dtype, device=device)
        for name, spec in specs.items()
    }
    sums = checksums(fixed)
    bind(worker.module, {**message.tensors, **fixed})
    named = {name: parameter for name, parameter in worker.module.named_parameters() if parameter.requires_grad}
    optimizer = optim.build_optimizer(job.config.train.optimizer, list(named.values()))
    if job.settings:
        apply_settings(optimizer, matching_groups(optimizer, named, job.group_of), job.settings[0])
    batch = job.dealing.batch(0, 0)[: job.dealing.smallest_batch]

    def numbers() -> Indices:
        return job.dealing.shard(0)[batch]

    inputs, targets = fetch(worker.shard, batch, device, numbers)
    with located("network, data and loss do not fit each other"):
        outputs = call_model(worker.module, inputs)
        loss = loss_of(job.loss, outputs, targets, numbers)
    check_reach(loss, lambda: job.loss(outputs, targets), worker.module, (inputs, targets), outputs, job.build)
    if not torch.isfinite(loss.detach()).all() and (bad := what_is_not_finite(inputs, targets)):
        raise DataError(
            f"the loss is not finite: a batch of the training data ({len(batch)} samples from {int(numbers()[0])} on) "
            f"holds {bad}. Leave such samples out, or mend them"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    check_optimizer(job, named)
    optimizer.step()
    check_frozen(worker.module, fixed, sums)
    _check_replaced(job, worker.module, message)
    _check_constants(job, worker.module)
    size = min(2, job.config.evaluate.batch_size)
    with located(f"evaluating with evaluate.batch_size {job.config.evaluate.batch_size}"):
        if job.config.train.running_statistics == "reestimate":
            batches = statistics_batches(job.train_data, size, 1, job.config.seed, device)
            reestimate_statistics(worker.module, batches)
        if job.test_data is not None:
            few = take_shard(job.test_data, np.arange(min(2, length(job.test_data))))
            evaluate(worker.module, few, job.loss, size, device, job.metric)


def _like_a_mean(spec: TensorSpec) -> float:
    """A value for all of a weight with which it takes the mean of what goes in: from layer to layer nothing grows."""
    inputs = math.prod(spec.shape[1:])
    return 1 / inputs if len(spec.shape) > 1 and inputs and spec.dtype.is_floating_point else 1.0


def _check_replaced(job: Job, module: nn.Module, message: Message) -> None:
    """Check that what a forward has put in the place of parameters and buffers can be written back.

    Raises:
        ModelError: It cannot.
    """
    collect(module, message.tensors)
    for name, parameter in module.named_parameters():
        if job.state_slots and parameter.requires_grad and parameter.dtype != message.tensors[name].dtype:
            raise ModelError(
                f"the forward makes '{name}', which is {message.tensors[name].dtype}, a {parameter.dtype}, and "
                "'train.optimizer_state' is 'carried', whose state has the dtype of what it was: use 'kept' or 'reset'"
            )


def _check_constants(job: Job, module: nn.Module) -> None:
    """Warn of buffers and numbers that training changes and that nobody sends or saves."""
    narrow = job.narrow(job.neurons(0)[0], torch.device("cpu"))
    warn_of_counters(module, narrow)
    fresh = named_tensors(narrow)
    for name, buffer in module.named_buffers():
        if name in job.constants and not torch.equal(buffer, fresh[name]):
            warnings.warn(
                f"buffer '{name}' changes in training but is not persistent: it is neither merged nor kept",
                stacklevel=2,
            )
