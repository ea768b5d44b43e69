"""Measure the cost of a step on this machine: seconds and memory, for the full network and for a worker's subnet.

It runs the workers' own loops on real data of the job, from its initial weights, and discards the result. With one
thread on a CPU, it measures processor time, as on an idle core: other load on this machine does not count.

Where it sits: `predict.py` measures here once for each number of workers.
Not here: bytes on links (`ist/config/methods.py`), several workers at once (`predict.py`).
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ist.config.methods import Sizes, trained_sizes
from ist.data.batches import micro_batches
from ist.data.nested import tensors_in
from ist.errors import ConfigError, DataError, ISTError, ModelError
from ist.loops.local_loop import TaskLoop
from ist.loops.local_step import smallest_micro_batch
from ist.loops.part import LocalSteps, completed
from ist.network.compiled import separated
from ist.optimization import optimizers
from ist.optimization.schedule import run_spans
from ist.rng import Purpose, seeded
from ist.subnet.cut import Cut, reassemble
from ist.subnet.job import Job, assignments, slot_of
from ist.subnet.stores.parameter_store import LocalStore
from ist.training.worker import Worker
from ist.transport.codec import MessageBuffers
from ist.transport.endpoints import SubnetWriter, WorkerEndpoint, message_layouts, read_trained
from ist.transport.frozen_parameters import FrozenSender
from ist.transport.interfaces import BufferCache

_SAMPLE_S = 0.05
_BUDGET_S = 0.4
_FEWEST, _MOST = 3, 31


@dataclass(frozen=True)
class StepCost:
    """The cost of a worker's step.

    Attributes:
        step_s: Seconds, including a step's share of the costs per round (a new optimizer).
        parameter_bytes: Bytes of the trained parameters; their gradients need the same.
        optimizer_bytes: Bytes of the optimizer's state.
        activation_bytes: Bytes that autograd saves for the backward pass of one micro-batch, without parameters and
            inputs.
    """

    step_s: float
    parameter_bytes: int
    optimizer_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class WholeCost:
    """The cost of a step of the full network, with the data that a prediction of data-parallel training needs.

    Attributes:
        step: Cost of the step.
        sizes: Sizes of the trained parameters, in the order in which their gradients are ready.
        left_s: For each parameter, the remaining seconds of the backward pass when its gradient is ready.
        pass_s: Seconds to add two vectors with as many numbers as there are trained parameters.
    """

    step: StepCost
    sizes: Sizes
    left_s: tuple[float, ...]
    pass_s: float


@dataclass(frozen=True)
class CoordinatorCost:
    """Seconds that the coordinator needs to cut and to merge the subnets of a round."""

    cut_s: float
    merge_s: float


def measure_whole(job: Job, device: torch.device) -> WholeCost:
    """Measure steps of the full network on worker 0's batches.

    Raises:
        ConfigError: A step fails.
    """
    with _failures_named(job):
        module = job.task.build_copy().to(device)
        slot = slot_of(job, 0)
        loop = TaskLoop(job, slot, device)
        local = LocalSteps(job.schedule, job.config.seed, slot, device, loop)
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        trained = list(named.values())
        optimizer = job.task.make_optimizer(named)

        def train(job: Job) -> None:
            loop.schedule = job.schedule
            local.schedule = job.schedule
            completed(local.of_round(0, module, named, optimizer))

        _try_smallest(job, loop, module)
        step_s = _step_s(train, job, device)
        batch, loss = _micro_batch(job, loop, module)
        sizes, left_s = _gradients(loss, module, device)
        cost = StepCost(
            step_s,
            sum(parameter.nbytes for parameter in trained),
            _state_bytes(job, module),
            _activation_bytes(loss, module, batch),
        )
    numbers = torch.zeros(2, sum(parameter.numel() for parameter in trained), device=device)
    return WholeCost(cost, sizes, left_s, _median_s(lambda: _synchronized(numbers[0].add_(numbers[1])), device))


def measure_subnet(job: Job, number: int, device: torch.device) -> StepCost:
    """Measure steps of one worker under IST.

    Raises:
        ConfigError: A step fails.
    """
    with _failures_named(job):
        held = assignments(job)
        slot = slot_of(job, number)
        loop = TaskLoop(job, slot, device)
        worker = Worker(job, slot, device, held, loop=loop)
        neurons, main = held.of(0)[number], held.of(job.schedule.main_round)[number]
        buffers = MessageBuffers(message_layouts(job.split, job.config.exchange, job.split.cut(main)), device)
        whole, exchange = _state(job, device), job.config.exchange
        writer, cut = SubnetWriter(job.split, exchange), job.split.cut(neurons)
        writer.write(LocalStore(whole), cut, 1, buffers)
        fresh = buffers.flat.clone()

        def train(job: Job) -> None:
            worker.job, worker.local.schedule, loop.schedule = job, job.schedule, job.schedule
            buffers.flat.copy_(fresh)
            completed(worker.train(0, buffers, None))

        frozen, _ = FrozenSender(job.split, exchange, held, whole, device).write("", number, 0, neurons)
        worker.frozen.update(neurons, number, 0, frozen, device)
        tensors = WorkerEndpoint(job.split, exchange, device).open(buffers).tensors
        worker.bind(0, separated(tensors, job.config.train.compile), worker.frozen.tensors)
        _try_smallest(job, loop, worker.module)
        step_s = _step_s(train, job, device)
        batch, loss = _micro_batch(job, loop, worker.module)
        return StepCost(
            step_s,
            sum(parameter.nbytes for parameter in worker.module.parameters() if parameter.requires_grad),
            _state_bytes(job, worker.module),
            _activation_bytes(loss, worker.module, batch),
        )


def measure_coordinator(job: Job, device: torch.device) -> CoordinatorCost:
    """Measure the coordinator's own work in a round: partition, cut, check and merge."""
    state, cache, writer = _state(job, device), BufferCache(device), SubnetWriter(job.split, job.config.exchange)
    held = assignments(job)
    rounds = iter(range(10**9))  # every round has its own partition, as in a run

    def cut() -> tuple[list[Cut], list[MessageBuffers]]:
        round_number = next(rounds)
        cuts = [job.split.cut(neurons) for neurons in held.of(round_number)]
        messages = [cache.buffers(worker, writer.layouts(part)) for worker, part in enumerate(cuts)]
        for part, buffers in zip(cuts, messages, strict=True):
            writer.write(LocalStore(state), part, 1, buffers)
        return cuts, messages

    cuts, messages = cut()

    def merge() -> None:
        trained = [
            (w, read_trained(job.config.exchange, LocalStore(state), cuts[w], buffers))
            for w, buffers in enumerate(messages)
        ]
        for _, tensors in trained:
            for tensor in tensors.values():
                if tensor.is_floating_point() and tensor.numel():
                    tensor.aminmax()
        reassemble(state, cuts, trained, held.exclusive(job.schedule.main_round))
        _synchronized(next(iter(state.values())))

    return CoordinatorCost(merge_s=_median_s(merge, device), cut_s=_median_s(cut, device))


def _try_smallest(job: Job, loop: TaskLoop, module: nn.Module) -> None:
    """Run a step on the smallest batch of any worker, which may fail: batch norm needs more than one sample."""
    rows = job.schedule.sampler.batch(loop.slot.worker, 0)[: smallest_micro_batch(job)]
    loop.step.loss(module, loop.read(rows), lambda: loop.numbers(rows))


def _micro_batch(job: Job, loop: TaskLoop, module: nn.Module) -> tuple[Any, Callable[[], Tensor]]:
    """Return the first micro-batch of a worker, which is one of the largest, and a function that computes its loss."""
    rows = micro_batches(job.schedule.sampler.batch(loop.slot.worker, 0), job.config.train.accumulate)[0]
    batch = loop.read(rows)
    return batch, lambda: loop.step.loss(module, batch, lambda: loop.numbers(rows))


def _state(job: Job, device: torch.device) -> dict[str, Tensor]:
    tensors = job.task.build_copy().to(device).state_dict()
    fresh = optimizers.initial_state(job.split.state_slots, job.split.state_specs, device)
    return {name: tensors[name].contiguous() for name in (*job.split.model_specs, *job.split.frozen_specs)} | fresh


def _with_steps(job: Job, steps: int) -> Job:
    train = job.config.train.model_copy(update={"local_steps": steps})
    config = job.config.model_copy(update={"train": train})
    return replace(job, config=config, schedule=replace(job.schedule, spans=run_spans(config, job.schedule.sampler)))


def _step_s(train: Callable[[Job], None], job: Job, device: torch.device) -> float:
    """Seconds of a step, measured by rounds with as many steps as fit into `_SAMPLE_S`."""
    # Created once: a job caches some results in its first call, which is not measured.
    short = _with_steps(job, 1)
    steps = max(1, int(_SAMPLE_S / _median_s(lambda: train(short), device, most=_FEWEST)))
    sample = _with_steps(job, min(job.config.train.local_steps, job.schedule.total_steps, steps))
    return _median_s(lambda: train(sample), device) / len(sample.schedule.steps(0))


def _median_s(action: Callable[[], object], device: torch.device, most: int = _MOST) -> float:
    """Median seconds of a call, over calls of at least `_BUDGET_S` in total."""
    clock = _clock(device)
    action()
    samples: list[float] = []
    while len(samples) < _FEWEST or (sum(samples) < _BUDGET_S and len(samples) < most):
        started = clock()
        action()
        samples.append(clock() - started)
    return statistics.median(samples)


def _clock(device: torch.device) -> Callable[[], float]:
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _gradients(loss: Callable[[], Tensor], module: nn.Module, device: torch.device) -> tuple[Sizes, tuple[float, ...]]:
    """Return the parameters' sizes in the order of their gradients, and the remaining seconds of the backward pass."""
    clock = _clock(device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def note(parameter: Tensor) -> None:
        _synchronized(parameter)
        at[parameter] = clock()

    register = nn.Parameter.register_post_accumulate_grad_hook
    hooks = [register(parameter, note) for parameter in trained]  # type: ignore[no-untyped-call]
    left: dict[Tensor, list[float]] = {parameter: [] for parameter in trained}
    for _ in range(_FEWEST):
        at: dict[Tensor, float] = {}
        module.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = clock()
        for parameter in trained:
            left[parameter].append(end - at.get(parameter, end))
    for hook in hooks:
        hook.remove()
    middle = {parameter: statistics.median(times) for parameter, times in left.items()}
    order = sorted(trained, key=lambda parameter: -middle[parameter])
    return trained_sizes(order), tuple(middle[p] for p in order)


def _state_bytes(job: Job, module: nn.Module) -> int:
    """Bytes of the optimizer's state after a step; 0 if the state travels in the message."""
    if job.split.state_slots:
        return 0
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizer = job.task.make_optimizer(named)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def _activation_bytes(loss: Callable[[], Tensor], module: nn.Module, batch: Any) -> int:
    """Bytes that autograd saves between a forward pass and its backward pass."""
    known = [*module.parameters(), *module.buffers(), *tensors_in(batch)]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in pointers:
            kept[storage.data_ptr()] = storage  # keep a reference, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for storage in kept.values())


def _synchronized(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


@contextmanager
def _failures_named(job: Job) -> Iterator[None]:
    """Turn torch's errors into a `ConfigError` that names the batch; keep the state of global random generators."""
    try:
        with seeded(torch.device("cpu"), job.config.seed, Purpose.REHEARSAL):
            yield
    except (DataError, ModelError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        what = str(error) if isinstance(error, ISTError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"with {job.config.train.workers} workers (train.workers) a step on a batch of "
            f"{smallest_micro_batch(job)} or more fails: {what}".splitlines()[0]
        ) from error
