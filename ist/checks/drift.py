"""Detect a network whose forward changes during training.

The neurons are found, and cuts are checked, before the run starts. A forward that changes later (for example one that
counts its runs and switches on a norm after a warm-up) can make a submodel compute other values than the masked full
network. So each worker runs its submodel on the example at the start and again after some rounds, at growing
intervals, and compares which operators its modules call. If an operator is new, the neurons are found again, with the
current attributes of the modules.

Where it sits: `ist/training/worker.py` calls it after a round.
Not here: changes that depend on the data; branches that the example does not take; changes before the first round that
a worker trains in another slot.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ist.data.nested import moved
from ist.errors import ModelError, first_line
from ist.network.copies import copied
from ist.network.failures import network_errors
from ist.neurons.find import find_neurons
from ist.neurons.group import Group
from ist.neurons.trace import dry_run
from ist.rng import Indices, Purpose, seeded
from ist.subnet.job import Job

Operators = frozenset[tuple[str, str]]
"""Pairs: the path of a module, and the name of a torch function that it calls."""

_Attributes = Mapping[tuple[str, str], Any]
"""(path of a module, name of its attribute) to the attribute's value."""


def operators(job: Job, module: nn.Module, device: torch.device) -> Operators:
    """Return the torch functions that a network's modules call on the example; the network does not change.

    Raises:
        ModelError: The network fails.
    """
    return _called(job, copied(module), device)


def _called(job: Job, module: nn.Module, device: torch.device) -> Operators:
    """Return the torch functions that the modules of a network call on the example; the network gets hooks."""
    recorder = _OperatorRecorder()
    for path, child in module.named_modules():
        child.register_forward_pre_hook(lambda *_, path=path: recorder.path.append(path), prepend=True)
        child.register_forward_hook(lambda *_: recorder.leave(), always_call=True)
    with seeded(device, job.config.seed, Purpose.REHEARSAL), network_errors(module):
        dry_run(module, moved(job.task.example, device), recorder)
    return frozenset(recorder.seen)


def is_due(job: Job, round_number: int) -> bool:
    """Return whether to check after a round: the 2nd, 4th, 8th, ..., the first of each later stage, and the last."""
    number = round_number + 1
    stages = [span.stage for span in job.schedule.spans[max(0, round_number - 1) : number]]
    is_doubled = number > 1 and number & round_number == 0
    return is_doubled or number == job.schedule.num_rounds or stages[0] != stages[-1]


def check_forward(
    job: Job, module: nn.Module, neurons: Sequence[Indices], known: Operators, device: torch.device
) -> Operators:
    """Check after some training that the network can still be split in the same way.

    Args:
        job: The run.
        module: The submodel.
        neurons: For each group, the neurons that it holds.
        known: The operators that its modules have called so far.
        device: The submodel's device.

    Returns:
        `known` and the new operators.

    Raises:
        ModelError: A group can no longer be split: a submodel would compute other values than the full network.
    """
    if all(len(held) == group.size for group, held in zip(job.split.groups, neurons, strict=True)):
        return known  # the module is the full network
    try:
        copy = copied(module)
    except ModelError as error:  # it holds an object that the forward has made
        warnings.warn(
            f"cannot check whether the network still computes the same as at the start: {first_line(error)}",
            stacklevel=2,
        )
        return known
    seen = _called(job, copy, device)
    del copy  # a share's memory
    if seen <= known:
        return known
    changed = _changed(module, job.split.module(neurons, torch.device("meta")))
    news = _news(module, seen - known, changed)
    joined: Sequence[str] = ()
    why = ": a run of the full network does not reach this call"
    try:
        joined, reached = _joined(job, module, changed)
        is_checked = seen - known <= reached
    except ModelError as error:
        is_checked, why = False, f": {first_line(error)}"
    if joined:
        raise ModelError(
            f"{news}: neurons of '{joined[0]}' can no longer be split. Make the network compute the same from its "
            "first step on, or do not split these neurons (partition.exclude)"
        )
    if not is_checked:
        warnings.warn(
            f"{news}. Cannot check whether its neurons can still be split{why}",
            stacklevel=2,
        )
    return known | seen


def take_attributes(module: nn.Module, trained: nn.Module) -> None:
    """Give a module the plain Python values that a copy of it has in its attributes after training."""
    for (path, name), value in _attributes(trained).items():
        if not name.startswith("_fsdp") and name != "_is_fsdp_managed_module":  # of PyTorch's own
            vars(module.get_submodule(path))[name] = value


def warn_of_counters(module: nn.Module, fresh: nn.Module) -> None:
    """Warn of numbers in attributes of modules that training changes.

    Args:
        module: The submodel, after a step.
        fresh: The same submodel, before it was run.
    """
    before = _attributes(fresh)
    for (path, name), value in _attributes(module).items():
        old = before.get((path, name))
        if name != "training" and type(value) is type(old) and isinstance(value, int | float) and value != old:
            warnings.warn(
                f"attribute '{path + '.' if path else ''}{name}' of the network changes as it runs ({old} -> {value}): "
                "every worker has its own value, which is neither merged nor saved, and starts again with each new "
                "submodel and when the run is resumed. Make it a buffer if the network's results depend on it",
                stacklevel=2,
            )


class _OperatorRecorder(TorchFunctionMode):
    """Records which torch functions are called, and by which module."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.seen: set[tuple[str, str]] = set()

    def leave(self) -> None:
        """Record that the innermost module has returned."""
        self.path.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and record it, unless it only reads an attribute of a tensor."""
        name = getattr(func, "__name__", str(func))
        if name != "__get__":
            self.seen.add((self.path[-1] if self.path else "", name))
        return func(*args, **(kwargs or {}))


def _joined(job: Job, module: nn.Module, changed: _Attributes) -> tuple[tuple[str, ...], Operators]:
    """Find the neurons of the network again, with the attributes that changed in a submodel.

    Returns:
        The split groups that are no longer found, and the operators that the changed network calls.
    """

    def build() -> nn.Module:
        return _with(job.task.build_copy(), module, changed)

    def keys(groups: Sequence[Group]) -> dict[str, Any]:
        return {group.name: (group.size, frozenset(group.slots), group.outgoing) for group in groups}

    before = keys(job.split.found.groups)
    found = find_neurons(_with(copied(job.split.template), module, changed), job.task.example, build)
    after = set(keys(found.groups).values())
    cpu = torch.device("cpu")
    network = _with(copied(job.split.template), module, changed) if found.on_meta else build()
    split = [group.name for group in job.split.groups if group.name in before]
    return tuple(name for name in split if before[name] not in after), operators(job, network, cpu)


def _with(network: nn.Module, submodel: nn.Module, changed: _Attributes) -> nn.Module:
    """Copy a submodel's changed attributes, and its buffers that are not split, to a full network."""
    for (path, name), value in changed.items():
        vars(network.get_submodule(path))[name] = value
    theirs = dict(submodel.named_buffers())
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name in theirs and buffer.shape == theirs[name].shape and not buffer.is_meta:
                buffer.copy_(theirs[name])
    return network


def _changed(module: nn.Module, fresh: nn.Module) -> dict[tuple[str, str], Any]:
    before = _attributes(fresh)
    return {key: value for key, value in _attributes(module).items() if key not in before or before[key] != value}


def _attributes(network: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the attributes of modules that are plain Python values."""
    return {
        (path, name): value
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _news(module: nn.Module, new: Operators, changed: _Attributes) -> str:
    """Describe a new operator: the module that calls it, and the attributes that changed."""
    path, operator = min(new)
    where = f"'{path}' ({type(module.get_submodule(path)).__name__})" if path else "its forward"
    values = [f"'{'.'.join(filter(None, key))}' is now {value!r}" for key, value in list(changed.items())[:3]]
    since = f" ({', '.join(values)})" if values else ""
    return f"the network has changed: {where} now calls {operator}{since}, which it did not at the start"
