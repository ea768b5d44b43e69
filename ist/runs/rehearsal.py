"""The rehearsal of a run: check the cuts, run one local step of worker 0, and evaluate its submodel.

Where it sits: `ist/runs/preflight.py` (the command line) and `ist/api.py` call it before a folder is created or a
process started, to find errors early.
Not here: the single checks (`ist/checks/`), real training (`ist/training/worker.py`).
"""

import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ist.checks.drift import warn_of_counters
from ist.checks.finite_values import check_example, checked_start, non_finite_values
from ist.checks.gradient_reach import check_reach
from ist.checks.made_values import read_initial
from ist.checks.optimizer_trial import check_optimizer
from ist.checks.verify import is_checked_whole, verify_cuts
from ist.config.recipe import Recipe
from ist.data.batches import class_name, length, take_shard
from ist.data.nested import call_model
from ist.distributed.device import check_autocast, compute_device
from ist.distributed.environment import is_launched
from ist.distributed.process_group import checked_by_rank_zero
from ist.errors import ConfigError, DataError, ISTError, ModelError
from ist.evaluation.evaluate import evaluate, reestimate_statistics, statistics_batches
from ist.initialization.in_files import OneAtATime, large_tensors_in_files
from ist.loops.local_loop import TaskLoop
from ist.loops.local_step import smallest_micro_batch
from ist.network.compiled import separated
from ist.network.copies import like
from ist.network.failures import located, loss_of
from ist.network.versions import check_unchanged, versions
from ist.optimization.factory import shown
from ist.optimization.step_settings import apply_settings, group_settings, matching_groups, stand_ins
from ist.rng import Indices, Purpose, seeded
from ist.subnet.cut import cut_specs
from ist.subnet.frozen_rest import writes_refused
from ist.subnet.job import Job, assignments, slot_of
from ist.tensors import TensorSpec, checksums, named_tensors
from ist.training.worker import Worker
from ist.transport.codec import encode
from ist.transport.frozen_parameters import check_frozen, needed
from ist.transport.message import EVERY_WORKER, Header, Message, layout_of


def rehearse(job: Job) -> None:
    """Check the cuts, run one step of worker 0 on a small batch, and evaluate the result; warn of unrepeatable data.

    Among ranks that a launcher has started, only rank 0 does this. Another rank tries a step only if it has data of its
    own, which no other process can read. This needs memory for several subnets, and for the check of the cuts
    (`ist/checks/verify.py`); it changes nothing.

    Raises:
        ModelError: A submodel computes other outputs than the masked full network, or its evaluation fails.
        DataError: A sample cannot be read, or its loss fails.
        ConfigError: Network, data, loss, metric and optimizer do not work together; the message contains torch's. Or
            the device does not support `train.autocast`.
        StartFailedError: This is another rank of an existing process group, and rank 0 has failed.
    """
    pool = job.config.pool
    if not (pool.spec.is_launched and is_launched()):
        _rehearse(job)
        return
    with checked_by_rank_zero(pool, compute_device(pool)) as checks:
        if checks:
            _rehearse(job)
        elif job.task.own_data is not None and job.task.loop is None:
            _try_step(job, 0)


def _rehearse(job: Job) -> None:
    config = job.config
    if config.pool.spec.coordinator_may_train:
        check_autocast(config.train, compute_device(config.pool))
    if job.task.loop is None:
        _warn_of_unrepeatable(job)
    _check_network(job)
    _warn_of_overshooting(job)
    if job.task.loop is not None:
        _try_optimizer(job, torch.device("cpu"))
        return
    for tried, number in _tried_rounds(job):
        _try_step(tried, number)


def _tried_rounds(job: Job) -> Iterator[tuple[Job, int]]:
    """Yield the rounds of which a step is tried, each with its run.

    They are the first round, and the first one in which workers hold the frozen rest of the network. If that is the
    first round too, and the network has frozen parameters, a submodel is tried as well: only it shows whether training
    changes them.
    """
    yield job, 0
    first = _first_with_rest(job)
    if first is None:
        return
    if first > 0:
        yield job, first
    elif job.split.frozen_specs:
        partition = job.config.partition.model_copy(update={"rest": "absent"})
        config = job.config.model_copy(update={"partition": partition, "recipe": Recipe()})
        yield replace(job, config=config, schedule=replace(job.schedule, recipe=Recipe())), 0


def _first_with_rest(job: Job) -> int | None:
    """Return the first round in which workers hold the frozen rest of the network; None: there is none."""
    if not job.config.has_frozen_rest:
        return None
    held = assignments(job)
    return next((number for number in range(job.schedule.num_rounds) if held.has_rest(number)), None)


def _try_step(job: Job, round_number: int) -> None:
    device = torch.device("cpu")
    try:
        with seeded(device, job.config.seed, Purpose.REHEARSAL), warnings.catch_warnings():
            # Torch only warns if it broadcasts (N, 1) and (N,), which gives a wrong loss: refuse it.
            warnings.filterwarnings("error", message="Using a target size")
            _one_step(job, device, round_number)
    except ISTError:
        raise
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"network, data, loss and optimizer do not work together: a step on a batch of "
            f"{smallest_micro_batch(job)} fails: {type(error).__name__}: {error}".splitlines()[0]
        ) from error


def _check_network(job: Job) -> None:
    """Check the initial values of the network, and the cuts.

    Raises:
        ModelError: A value is not finite, or a submodel computes other outputs than the masked full network.
        DataError: The first samples contain NaN.
    """
    check_example(job)
    needs_groups = job.config.method_spec.needs_groups
    if is_checked_whole(job):
        network = job.task.build()
        deque(checked_start(job, named_tensors(network).items()), maxlen=0)
        if needs_groups:
            verify_cuts(job, network)
        return
    initial = read_initial(job.split, checked_start(job, _initial_tensors(job)))
    if needs_groups:
        verify_cuts(job, initial=initial)


def _initial_tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Yield the initial values of the network, of which only one tensor at a time is in memory."""
    if job.task.weights is not None:
        values = job.task.weights()
    else:
        with large_tensors_in_files() as files:
            network = job.task.build()
        values = OneAtATime(named_tensors(network), files)
    for name in named_tensors(job.split.template):
        if name in values:
            yield name, values[name]


def _warn_of_overshooting(job: Job) -> None:
    """Warn of workers that all correct the same error, and whose changes are added up unscaled."""
    first = _first_with_rest(job)
    if first is None or len(job.schedule.steps(first)) == 1:
        return
    if job.schedule.merge_scale(first, is_full_width=False).own == 1:
        workers = job.config.train.workers
        warnings.warn(
            f"'partition.rest' is 'frozen' and 'recipe.merge_scale' is 1: each of the {workers} workers corrects the "
            "same error, so that in long rounds their changes add up to too much. Set 'recipe.merge_scale' to "
            f"{{own: auto}}, or to a number such as {{own: {workers**-0.5:.2g}}} (docs/frozen_rest.md)",
            stacklevel=3,
        )


def _warn_of_unrepeatable(job: Job) -> None:
    """Warn of data sets whose items depend on generators that IST does not seed, or on earlier reads."""
    for which, dataset, content in zip(
        ("training", "test"), (job.task.train_data, job.task.test_data), job.task.contents, strict=True
    ):
        if dataset is not None and content.unrepeatable is not None:
            warnings.warn(
                f"the {which} data ({class_name(dataset)}): item {content.unrepeatable} differs between two reads "
                "with the same seeds of torch, random and numpy.random, so runs with the same seed, and resumed runs, "
                "will differ. Draw random numbers from these generators, not from one of the data set, and do not let "
                "an item depend on earlier reads",
                stacklevel=3,
            )


def _try_optimizer(job: Job, device: torch.device) -> None:
    """Check the optimizer of worker 0 for a loop of the user's own.

    Raises:
        ConfigError: The optimizer cannot be built, or a step fails.
    """
    slot = slot_of(job, 0)
    worker = Worker(job, slot, device, assignments(job))
    named = {name: parameter for name, parameter in worker.module.named_parameters() if parameter.requires_grad}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    check_optimizer(job, named)


def _one_step(job: Job, device: torch.device, round_number: int) -> None:
    number = job.task.worker
    if number is None:
        return  # this process has no worker, and no data of one
    slot = slot_of(job, number)
    loop = TaskLoop(job, slot, device)
    worker = Worker(job, slot, device, assignments(job), loop=loop)
    neurons = worker.neurons(round_number)
    message = Message(layout_of(cut_specs(job.split.specs, job.split.cut(neurons))), device)
    beside = _frozen_message(job, neurons, number, device, round_number)
    worker.frozen.update(neurons, number, round_number, beside, device)
    fixed = worker.frozen.tensors
    sums = checksums(fixed)
    worker.bind(round_number, separated(message.tensors, job.config.train.compile), fixed)
    named = {name: parameter for name, parameter in worker.module.named_parameters() if parameter.requires_grad}
    optimizer = job.task.make_optimizer(named)
    if job.schedule.settings:
        apply_settings(optimizer, matching_groups(optimizer, named, job.schedule.group_of), job.schedule.settings[0])
    else:
        _warn_of_settings_by_shape(job, named, optimizer)
    batch = job.schedule.sampler.batch(number, 0)[: smallest_micro_batch(job)]

    def numbers() -> Indices:
        return loop.numbers(batch)

    inputs, targets = loop.read(batch)
    outputs: Any = None

    def loss_again() -> Tensor:
        if job.task.step is None:
            return job.task.loss(outputs, targets)
        return loop.step.loss(worker.module, (inputs, targets), numbers)

    with located("network, data and loss do not work together"), loop.step.precision(), writes_refused():
        if job.task.step is None:
            outputs = call_model(worker.module, inputs)
            loss = loss_of(job.task.loss, outputs, targets, numbers)
        else:
            loss = loss_again()
        if job.config.train.compile is not None:
            loop.step.loss(worker.module, (inputs, targets), numbers)  # compiled, which may fail
    check_reach(loss, loss_again, worker.module, (inputs, targets), outputs, job.task.build)
    if not torch.isfinite(loss.detach()).all() and (bad := non_finite_values(inputs, targets)):
        raise DataError(
            f"the loss is not finite: a batch of the training data ({len(batch)} samples from {int(numbers()[0])} on) "
            f"holds {bad}. Remove or correct such samples"
        )
    if is_checked_whole(job):
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        named = _with_narrow_gradients(named, loss)
        optimizer = job.task.make_optimizer(named)
        if job.schedule.settings:
            groups = matching_groups(optimizer, named, job.schedule.group_of)
            apply_settings(optimizer, groups, job.schedule.settings[0])
    _check_gradients(job, named)
    check_optimizer(job, named)
    loop.step.finish(worker.module, list(named.values()), optimizer)
    check_frozen(worker.module, fixed, sums)
    _check_replaced(job, worker, message)
    _check_constants(job, worker, round_number)
    size = min(2, job.config.evaluate.batch_size)
    with located(f"evaluating with evaluate.batch_size {job.config.evaluate.batch_size}"):
        if job.config.train.running_statistics == "reestimate":
            batches = statistics_batches(job.task.train_data, size, 1, job.config.seed, device)
            reestimate_statistics(worker.module, batches, job.task.forward)
        if job.task.test_data is not None:
            few = take_shard(job.task.test_data, np.arange(min(2, length(job.task.test_data))))
            before = versions(worker.module) if job.config.store_is_sharded else {}
            evaluate(worker.module, few, job.task.loss, size, device, job.task.metric, step=job.task.step)
            check_unchanged(worker.module, before, "it is evaluated in a copy")


_NARROW = 16


def _with_narrow_gradients(named: Mapping[str, nn.Parameter], loss: Tensor) -> dict[str, nn.Parameter]:
    """Compute the gradients of a loss, and return a corner of each parameter with a corner of its gradient.

    A step of an optimizer on the corners needs no memory. A gradient is dropped as soon as it is complete.

    Args:
        named: The parameters; they have no gradients afterwards.
        loss: The loss.
    """
    corners = {name: tuple(slice(_NARROW) for _ in parameter.shape) for name, parameter in named.items()}
    narrow = {name: like(p, p.detach()[corners[name]].clone()) for name, p in named.items()}

    def keep(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        corner = gradient.to_dense()[corners[name]].clone()
        before = narrow[name].grad
        corner = corner if before is None else before.to_dense() + corner
        narrow[name].grad = corner.to_sparse(1) if gradient.is_sparse else corner

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(keep, name))  # type: ignore[no-untyped-call]
        for name, parameter in named.items()
    ]
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return cast("dict[str, nn.Parameter]", narrow)


def _check_gradients(job: Job, named: Mapping[str, nn.Parameter]) -> None:
    """Check that several ranks can average the gradients of a worker: each parameter has one.

    Raises:
        ModelError: A parameter has none.
    """
    unused = [name for name, parameter in named.items() if parameter.grad is None]
    if job.config.pool.ranks_per_worker != 1 and unused:
        raise ModelError(
            f"'{unused[0]}' gets no gradient ({len(unused)} such parameters), but 'pool.ranks_per_worker' is "
            f"{job.config.pool.ranks_per_worker!r}, and the ranks of a worker average all gradients: freeze unused "
            "parameters (requires_grad_(False))"
        )


def _warn_of_settings_by_shape(job: Job, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Warn of a parameter with other settings in a subnet than in the full network; with a schedule it is refused."""
    full_named, full_optimizer = stand_ins(job.split.template, job.task.make_optimizer)
    full, own = group_settings(full_optimizer, full_named), group_settings(optimizer, named)
    for name, settings in own.items():
        for key, value in settings.items():
            if full.get(name, settings).get(key) != value:
                warnings.warn(
                    f"{shown(job.config.train.optimizer)}, which gives '{name}' the {key} {value} in a subnet and "
                    f"{full[name].get(key)} in the full network: let settings depend on names or numbers of dims, not "
                    "on sizes",
                    stacklevel=2,
                )
                return


def _like_a_mean(spec: TensorSpec) -> float:
    """Return the value for all entries of a weight that makes its output the mean of its inputs, so nothing grows."""
    inputs = math.prod(spec.shape[1:])
    return 1 / inputs if len(spec.shape) > 1 and inputs and spec.dtype.is_floating_point else 1.0


def _frozen_message(
    job: Job, neurons: Sequence[Indices], number: int, device: torch.device, round_number: int
) -> Message | None:
    """Return what the worker reads and does not train, with values that show whether it changes."""
    has_rest = assignments(job).has_rest(round_number, neurons)
    parts = needed(job.split, job.config.exchange, neurons, round_number if has_rest else None)
    if not parts.specs:
        return None
    message = Message(parts.layout(parts.specs), device)
    message.write_header(Header(round_number, EVERY_WORKER if has_rest else number))
    for name, spec in parts.specs.items():
        # Not zeros: a weight that a forward masks, or updates as a moving average, would stay zero, and look unchanged.
        value = torch.full(spec.shape, _like_a_mean(spec), dtype=spec.dtype, device=device)
        encode({name: value}, message.tensors, parts.coding)
    return message


def _check_replaced(job: Job, worker: Worker, message: Message) -> None:
    """Check that parameters and buffers that a forward has replaced can be written back.

    Raises:
        ModelError: One cannot.
    """
    worker.collect(message.tensors)
    for name, parameter in worker.module.named_parameters():
        if job.split.state_slots and parameter.requires_grad and parameter.dtype != message.tensors[name].dtype:
            raise ModelError(
                f"the forward changes the dtype of '{name}' from {message.tensors[name].dtype} to {parameter.dtype}, "
                "but with 'train.optimizer_state' 'carried' the state has the original dtype: use 'kept' or 'reset'"
            )


def _check_constants(job: Job, worker: Worker, round_number: int) -> None:
    """Warn of buffers and counters that training changes but that are neither sent nor saved."""
    module, new_module = worker.module, worker.new_module(round_number, torch.device("cpu"))
    warn_of_counters(module, new_module)
    fresh = named_tensors(new_module)
    for name, buffer in module.named_buffers():
        if name in job.split.constants and not torch.equal(buffer, fresh[name]):
            warnings.warn(
                f"buffer '{name}' changes in training but is not persistent: it is neither merged nor saved",
                stacklevel=2,
            )
