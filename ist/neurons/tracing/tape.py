"""The tape of a run: its operators in order, and which of them the outputs depend on.

Steps that no output depends on get no labels: a check of values (`assert h.isfinite().all()`), a mean that a hook
prints.

Where it sits: `ist/neurons/trace.py` records a run, and gives labels to the tensors of the needed steps.
Not here: the labels (`ist/neurons/tracing/labels.py`).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ist.data.nested import tensors_in
from ist.neurons.tracing.labels import Shape


class Step(NamedTuple):
    """One call of an operator.

    Attributes:
        operator: For instance `torch.ops.aten.addmm.default`.
        arguments: Its arguments by name, tensors included.
        results: The tensors that it returned.
        shapes: Their shapes when it returned; a later step may change a tensor's shape in place.
        value: The number that left torch here (`item()`, `bool()`, `equal()`), or None.
        path: The module that was running.
        line: 'file:line' of the network's code.
        reads: The memory (storages) of its arguments.
        writes: The memory of its results, and of the arguments that it writes to.
        is_empty: Whether a tensor argument or the first result has no elements.
    """

    operator: Any
    arguments: dict[str, Any]
    results: list[Tensor]
    shapes: list[Shape]
    value: bool | int | float | None
    path: str
    line: str
    reads: frozenset[int]
    writes: frozenset[int]
    is_empty: bool


def step_of(operator: Any, arguments: dict[str, Any], result: Any, path: str, line: str) -> Step:
    """Return the step of an operator that has just run."""
    results = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
    mutated = [
        arguments.get(argument.name)
        for argument in operator._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    reads = storages(tensors_in(list(arguments.values())))
    writes = storages([*results, *tensors_in(mutated)])
    shapes = [tuple(t.shape) for t in results]
    value = result if isinstance(result, bool | int | float) else None
    is_empty = any(not tensor.numel() for tensor in [*results[:1], *tensors_in(list(arguments.values()))])
    return Step(operator, arguments, results, shapes, value, path, line, reads, writes, is_empty)


def storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Return ids of the tensors' storages (for sparse tensors, of the tensors); valid only while the tensors live."""
    return frozenset(t.untyped_storage()._cdata if t.layout == torch.strided else id(t) for t in tensors)


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Return the tensors that a network holds: parameters, buffers, and tensors in attributes of its modules."""
    found = [*network.parameters(), *network.buffers()]
    for child in network.modules():
        for value in vars(child).values():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            found += [item for item in items if isinstance(item, Tensor)]
    return found


def needed(steps: Sequence[Step], wanted: Iterable[Tensor], reads: Iterable[int] = ()) -> list[bool]:
    """Return for each step whether a wanted tensor or value depends on it.

    Args:
        steps: The steps, in order.
        wanted: Tensors, such as a network's outputs.
        reads: Indices of steps that are needed for the value that they read.
    """
    live, chosen = set(storages(wanted)), set(reads)
    found = [False] * len(steps)
    for number in reversed(range(len(steps))):
        step = steps[number]
        if number in chosen or live & step.writes:
            found[number] = True
            live |= step.reads
    return found


def influenced(steps: Sequence[Step], sources: Iterable[Tensor]) -> list[bool]:
    """Return for each step whether it depends on some tensors, such as a network's parameters."""
    reached = set(storages(sources))
    found = []
    for step in steps:
        depends = bool(reached & step.reads)
        found.append(depends)
        if depends:
            reached |= step.writes
    return found
