"""Predict the memory of a worker, of a rank of a baseline, and of the coordinator, by part.

Where it sits: `ist inspect` and `ist plan` show the prediction, `ist/runs/recorder.py` records it beside the measured
peaks.
Law: on a CPU, the sum is the peak of a process above what it holds before its network and its messages: interpreter,
libraries and data. Checkpoints need no memory: they are written tensor by tensor.
Not here: measuring (`ist/monitoring/meter.py`), counting the memory of a step (`ist/loops/step_memory.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ist.config.methods import trained_sizes
from ist.config.schema import first_worker_rank
from ist.errors import ISTError, first_line
from ist.loops.local_loop import TaskLoop
from ist.loops.step_memory import UncountedError, optimizer_bytes, step_memory
from ist.rng import Indices
from ist.subnet.cut import cut_specs
from ist.subnet.frozen_rest import Partly
from ist.subnet.job import Job, assignments, slot_of
from ist.subnet.partition import is_full_width
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.shards import shard_of
from ist.tensors import TensorSpec, constant_tensors, specs_of, tensor_specs
from ist.transport.codec import coded_specs
from ist.transport.endpoints import message_layouts
from ist.transport.frozen_parameters import frozen_bytes, rest_specs


@dataclass(frozen=True)
class MemoryBudget:
    """The predicted peak memory of a process, in bytes.

    Attributes:
        parts: Bytes by part, without interpreter, libraries and data. A part of 0 bytes is left out.
        notes: What is not counted, or why a part is large, as sentences.
    """

    parts: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class CountedStep:
    """What a step adds to the memory of a worker.

    Attributes:
        parts: Bytes by part: gradients, optimizer state, activations.
        notes: What is not counted, as sentences.
    """

    parts: Mapping[str, int]
    notes: tuple[str, ...]


def count_step(job: Job, device: torch.device, with_activations: bool) -> CountedStep:
    """Count the memory of a step of the largest worker.

    Args:
        job: The run.
        device: The device on which workers train.
        with_activations: Whether to run the forward and backward pass on a batch of the training data, without values,
            to count activations and temporary tensors.
    """
    if not job.config.method_spec.needs_groups:
        return _step(job, job.split.template, 0, device, with_activations)
    share = _largest_share(job)
    return _step(job, _module(job, share), share.worker, device, with_activations)


def memory_budgets(job: Job, step: CountedStep) -> dict[str, MemoryBudget]:
    """Predict the memory of the processes of a run.

    Args:
        job: The run.
        step: What a step of its largest worker adds: `count_step`.

    Returns:
        `worker`: the largest worker, in its largest round. With a method that has a coordinator also `coordinator`: the
        process that holds the full network; with a sharded store every worker also owns a shard of it instead.
    """
    if not job.config.method_spec.needs_groups:
        return {"worker": _rank_budget(job, step)}
    worker = _worker_budget(job, step)
    if job.config.pool.store == "sharded":
        return {"worker": _with_shard(job, worker)}
    return {"worker": worker, "coordinator": _coordinator_budget(job, worker)}


def _worker_budget(job: Job, counted: CountedStep) -> MemoryBudget:
    split, exchange = job.split, job.config.exchange
    step, notes = dict(counted.parts), list(counted.notes)
    share = _largest_share(job)
    neurons = share.neurons
    layouts = message_layouts(split, exchange, split.cut(neurons))
    plain = layouts.plain.specs
    model = sum(spec.nbytes for name, spec in plain.items() if name in split.model_specs)
    module = _module(job, share)
    fixed = cut_specs(split.frozen_specs, split.frozen_cut(neurons)) if not share.has_rest else {}
    rest = _nbytes(rest_specs(split, exchange).values()) if share.has_rest else 0
    constants = _nbytes(specs_of(constant_tensors(module)).values())
    messages = 0 if layouts.is_plain else layouts.nbytes
    if share.changes:  # the buffers of the next share are made before those of the last one are freed
        messages += layouts.nbytes
    if not job.config.pool.spec.coordinator_may_train:  # Ray copies messages into and out of its object store
        messages += layouts.down.nbytes + layouts.up.nbytes
    residuals, feedback = 0, 0
    if exchange.error_feedback:
        rounded = _rounded(job, split.specs)
        residuals = sum(4 * math.prod(spec.shape) for spec in rounded.values())
        feedback = sum(4 * math.prod(plain[name].shape) for name in rounded if name in plain)
        notes.append(
            "error-feedback residuals have the shape of the full network's matrices, in float32, on every worker"
        )
    if job.config.pool.ranks_per_worker != 1:
        notes.append(
            "a rank of a worker (pool.ranks_per_worker) needs activations of its part of the batch only; with "
            "pool.inside fsdp it has 1/k of gradients and optimizer state, and besides the message 1/k of the "
            "parameters and those that are gathered for a while"
        )
    if job.split.state_slots:
        step["optimizer state"] = sum(spec.nbytes for name, spec in plain.items() if name in split.state_specs)
    in_step = step["gradients"] + step["activations"]
    largest = max((spec.nbytes for spec in plain.values()), default=0)
    # The message up is written after the step's memory is free.
    step["work space"] = max(0 if step["activations"] else largest, feedback + largest - in_step if feedback else 0)
    frozen_message = frozen_bytes(split, exchange, neurons, None, share.has_rest) if fixed or rest else 0
    parts = {
        "weights": model,
        "frozen parameters": _nbytes(fixed.values()),
        "frozen rest": rest,
        "frozen message": max(0, frozen_message - in_step),  # freed before the first step
        "constants": constants,
        "messages": messages,
        "feedback residuals": residuals,
        **step,
    }
    return MemoryBudget(_present(parts), (*notes, *_loader_notes(job)))


def _with_shard(job: Job, worker: MemoryBudget) -> MemoryBudget:
    """Add what a worker of a sharded store holds as an owner."""
    shard = _store_parts(job, shard_of(job.split, 0, job.config.train.workers))
    parts = {("shard of the network" if name == "full network" else name): nbytes for name, nbytes in shard.items()}
    # The pieces that all workers get from this shard; and the pieces of its own subnet, which it joins.
    pieces = 2 * parts.pop("messages")
    parts["pieces of messages"] = pieces
    joined = {name: worker.parts.get(name, 0) + parts.get(name, 0) for name in (*worker.parts, *parts)}
    notes = (*worker.notes, "evaluation is not counted, which needs memory for the activations of a batch")
    return MemoryBudget(_present(joined), notes)


def _coordinator_budget(job: Job, worker: MemoryBudget) -> MemoryBudget:
    parts, split = _store_parts(job, job.split), job.split
    if first_worker_rank(job.config) == 0 and job.config.pool.spec.coordinator_may_train:
        # Its worker trains in the coordinator's own message, unless it has to decode it.
        neurons = assignments(job).of(0)[0]
        is_plain = message_layouts(split, job.config.exchange, split.cut(neurons)).is_plain
        common = ("weights", "messages") if is_plain else ("messages",)
        parts["its worker"] = worker.nbytes - sum(worker.parts.get(name, 0) for name in common)
    notes = ("evaluation is not counted, which needs memory for the activations of a batch",)
    return MemoryBudget(_present(parts), notes)


def _store_parts(job: Job, split: SplitModel) -> dict[str, int]:
    """Return the parts of a process that holds, cuts and merges a network, or a shard of one."""
    exchange, recipe = job.config.exchange, job.config.recipe
    held = assignments(job)
    is_plain = message_layouts(split, exchange, split.cut(held.of(0)[0])).is_plain
    sent = {**split.model_specs, **split.frozen_specs}
    others = [spec for name, spec in tensor_specs(split.template, with_statistics=True).items() if name not in sent]
    trained = _nbytes(spec for name, spec in split.model_specs.items() if name in _trained_names(split.template))
    constants = _nbytes(specs_of(constant_tensors(split.template)).values())
    messages, results = max((_messages(job, split, number) for number in _rounds(job)), key=sum)
    exclusive = frozenset.intersection(*(held.exclusive(number) for number in _rounds(job)))
    shared = max((spec.nbytes for name, spec in split.specs.items() if name not in exclusive), default=0)
    largest = 0 if is_plain else max((spec.nbytes for spec in split.specs.values()), default=0)
    scaled = max(_scaled_part(job, split, number) for number in _rounds(job))
    network, carried = _nbytes([*sent.values(), *others]), _nbytes(split.state_specs.values())
    momentum = trained if recipe.has_outer_optimizer else 0
    average = network if recipe.average.kind != "none" else 0
    compared = _nbytes(split.specs.values()) if job.config.chooses_merge_scale else 0
    return {
        "full network": network + constants,
        "carried state": carried,
        "outer optimizer": 2 * momentum,
        "average": average,
        "scale search": compared,
        "messages": messages,
        "results to average": results,
        # The mean of a tensor that several workers return needs its change, the merged values and the counts. A message
        # that is coded is decoded tensor by tensor. A scaled part needs its old and new values, and their difference.
        "work space": 3 * shared + largest + 3 * scaled,
    }


def _messages(job: Job, split: SplitModel, round_number: int) -> tuple[int, int]:
    """Return the bytes of a round's messages, and those of results that are copied until all of them can be averaged.

    Results are copied only if their memory is used again before (`pool.message_buffers`).
    """
    held, config = assignments(job), job.config
    cuts = [split.cut(neurons) for neurons in held.of(round_number)]
    sizes = [message_layouts(split, config.exchange, cut).nbytes for cut in cuts]
    first = 0 if first_worker_rank(config) else 1  # the first worker of another process than the coordinator's
    most = config.pool.message_buffers
    if most is None or most >= len(sizes) - first:
        return sum(sizes), 0
    exclusive = held.exclusive(round_number)
    copied = [
        spec.nbytes
        for cut in cuts[first:]
        for name, spec in cut_specs(split.specs, cut).items()
        if name not in exclusive or config.chooses_merge_scale
    ]
    return sum(sizes[:first]) + most * max(sizes[first:]), sum(copied)


def _rank_budget(job: Job, counted: CountedStep) -> MemoryBudget:
    """Predict the memory of a rank that trains the full network."""
    step, notes = dict(counted.parts), list(counted.notes)
    config, template = job.config, job.split.template
    sizes = trained_sizes(template.parameters())
    collective = config.method_spec.collective
    buffers = 0
    if collective is None:
        notes.append(f"the buffers of method '{config.method}' are unknown")
    elif config.train.workers > 1:
        buffers = round(collective.memory(sizes, config.baseline))
    whole = _nbytes(tensor_specs(template, with_statistics=True).values())
    constants = _nbytes(specs_of(constant_tensors(template)).values())
    notes.append("the copies of the initial weights that ranks exchange before the first round are not counted")
    parts = {"weights": whole, "constants": constants, "method buffers": buffers, **step}
    return MemoryBudget(_present(parts), (*notes, *_loader_notes(job)))


def _step(job: Job, module: nn.Module, worker: int, device: torch.device, with_activations: bool) -> CountedStep:
    gradients = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    parts, notes = {"gradients": gradients, "optimizer state": 0, "activations": 0}, []
    if with_activations and job.task.loop is None and job.task.worker is not None:
        try:
            found = step_memory(job, module, _samples(job, worker), device)
        except UncountedError as error:
            notes.append(f"activations are not counted, because a step needs values: {error}")
        except ISTError as error:
            notes.append(f"activations are not counted: {first_line(error)}")
        else:
            parts = {
                "gradients": found.gradient, "optimizer state": found.optimizer, "activations": found.activations,
            }  # fmt: skip
            return CountedStep(parts, ())
    else:
        notes.append("activations are not counted")
    try:
        parts["optimizer state"] = optimizer_bytes(job, module, device)
    except UncountedError as error:
        notes.append(f"the optimizer's state is not counted, because its step needs values: {error}")
    return CountedStep(parts, tuple(notes))


def _samples(job: Job, worker: int) -> tuple[Any, Any]:
    """Return the first micro-batch of a worker, which is one of the largest."""
    loop = TaskLoop(job, slot_of(job, worker), torch.device("cpu"))
    batch = job.schedule.sampler.batch(worker, 0)
    samples: tuple[Any, Any] = loop.read(batch[: -(-len(batch) // job.config.train.accumulate)])
    return samples


@dataclass(frozen=True)
class _LargestShare:
    """The largest share of any stage.

    Attributes:
        worker: The worker's number.
        neurons: Its neurons, by group.
        has_rest: Whether it also holds the frozen rest of the network.
        changes: Whether the sizes of shares change during the run.
    """

    worker: int
    neurons: Sequence[Indices]
    has_rest: bool
    changes: bool


def _largest_share(job: Job) -> _LargestShare:
    held, split = assignments(job), job.split
    rest = _nbytes(rest_specs(split, job.config.exchange).values())
    sizes: dict[tuple[int, ...], tuple[int, int, Sequence[Indices], bool]] = {}
    for round_number in _rounds(job):
        for worker, neurons in enumerate(held.of(round_number)):
            has_rest = held.has_rest(round_number, neurons)
            key = (has_rest, *map(len, neurons))
            if key not in sizes:
                sent = _nbytes(cut_specs(split.specs, split.cut(neurons)).values())
                fixed = rest if has_rest else _nbytes(cut_specs(split.frozen_specs, split.frozen_cut(neurons)).values())
                sizes[key] = (sent + fixed, worker, neurons, has_rest)
    _, number, largest, with_rest = max(sizes.values(), key=lambda found: found[0])
    return _LargestShare(number, largest, with_rest, len(sizes) > 1)


def _module(job: Job, share: _LargestShare) -> nn.Module:
    """Return the module of the worker with the largest share, without values."""
    if not share.has_rest:
        return job.split.module(share.neurons, torch.device("meta"))
    full = job.split.full_module(share.neurons, torch.device("meta"))
    specs = {name: job.split.all_specs[name] for name in full.split}
    full.parts.update(
        # Made where the step is counted.
        (name, Partly(partial(torch.empty, spec.shape, dtype=spec.dtype), job.split.cut(share.neurons).get(name)))
        for name, spec in specs.items()
    )
    return full.module


def _rounds(job: Job) -> list[int]:
    """Return the first round of each stage, and the main round."""
    spans = job.schedule.spans
    starts = [n for n, span in enumerate(spans) if n == 0 or span.stage != spans[n - 1].stage]
    return sorted({*starts, job.schedule.main_round})


def _scaled_part(job: Job, split: SplitModel, round_number: int) -> int:
    """Return the bytes of the largest part of a tensor whose update a round's merge scales."""
    held = assignments(job)
    if job.schedule.merge_scale(round_number, is_full_width(held.partition(round_number))).is_plain:
        return 0
    cut = split.cut(held.of(round_number)[0])
    return max((spec.nbytes for spec in cut_specs(split.specs, cut).values()), default=0)


def _rounded(job: Job, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    coding = job.config.exchange.up
    return {name: spec for name, spec in specs.items() if coded_specs({name: spec}, coding)[name] != spec}


def _trained_names(template: nn.Module) -> set[str]:
    return {name for name, parameter in template.named_parameters() if parameter.requires_grad}


def _loader_notes(job: Job) -> tuple[str, ...]:
    number = job.config.data.loader.workers
    return (f"each of the {number} loader processes of a worker has its own memory",) if number else ()


def _nbytes(specs: Any) -> int:
    return sum(spec.nbytes for spec in specs)


def _present(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: nbytes for name, nbytes in parts.items() if nbytes}
