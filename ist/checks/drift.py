"""Notice a network whose forward computes something else later than when its neurons were found.

Neurons are found, and cuts checked, by runs of the network as it is at the start. A forward that counts its runs and
then changes (a norm that is switched on after a warm-up) can make a narrow network compute something else than the
masked whole one. So each worker runs its narrow network on the example at the start and again after some rounds, fewer
and fewer of them, and compares which operators its modules call. Where one is new, the neurons are found again, with
the modules' attributes as they are by then.

Where it sits: `ist/training/worker.py` asks after a round.
Not here: what data alone change; a branch that the example does not take; what has changed before a worker's first
round in another place or share.
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
"""Paths of modules, and the names of the torch functions that they call."""

_Attributes = Mapping[tuple[str, str], Any]
"""Paths of modules and the names of their attributes, to the values."""


def operators(job: Job, module: nn.Module, device: torch.device) -> Operators:
    """Return what a network's modules call for the example; the network is left as it is.

    Raises:
        ModelError: It fails.
    """
    module = copied(module)
    watch = _Watch()
    for path, child in module.named_modules():
        child.register_forward_pre_hook(lambda *_, path=path: watch.path.append(path), prepend=True)
        child.register_forward_hook(lambda *_: watch.leave(), always_call=True)
    with seeded(device, job.config.seed, Purpose.REHEARSAL), network_errors(module):
        dry_run(module, moved(job.task.example, device), watch)
    return frozenset(watch.seen)


def is_due(job: Job, round_number: int) -> bool:
    """Return whether to look again after a round: the 2nd, 4th, 8th, ..., the first of a later stage, and the last."""
    number = round_number + 1
    stages = [span.stage for span in job.schedule.spans[max(0, round_number - 1) : number]]
    is_doubled = number > 1 and number & round_number == 0
    return is_doubled or number == job.schedule.num_rounds or stages[0] != stages[-1]


def check_forward(
    job: Job, module: nn.Module, neurons: Sequence[Indices], known: Operators, device: torch.device
) -> Operators:
    """Check that a narrow network may still be cut as it is, after some training.

    Args:
        job: The run.
        module: The narrow network.
        neurons: Those of each group that it holds.
        known: What its modules called before.
        device: Where it is.

    Returns:
        What they have called so far.

    Raises:
        ModelError: Neurons can no longer be told apart: a narrow network computes something else than the whole one.
    """
    if all(len(held) == group.size for group, held in zip(job.split.groups, neurons, strict=True)):
        return known  # it is the whole network
    try:
        copy = copied(module)
    except ModelError as error:  # it holds something that a forward has made
        warnings.warn(
            f"whether the network still computes as at the start cannot be looked at: {first_line(error)}", stacklevel=2
        )
        return known
    seen = operators(job, copy, device)
    if seen <= known:
        return known
    changed = _changed(module, job.split.module(neurons, torch.device("meta")))
    news = _news(module, seen - known, changed)
    joined: Sequence[str] = ()
    why = ": a run of the whole network does not come there"
    try:
        joined, reached = _joined(job, module, changed)
        is_checked = seen - known <= reached
    except ModelError as error:
        is_checked, why = False, f": {first_line(error)}"
    if joined:
        raise ModelError(
            f"{news}: neurons of '{joined[0]}' can no longer be split. A network must compute the same from its first "
            "step on; or leave these neurons whole (partition.exclude)"
        )
    if not is_checked:
        warnings.warn(
            f"{news}. Whether neurons may be split as before could not be checked again{why}",
            stacklevel=2,
        )
    return known | seen


def warn_of_counters(module: nn.Module, fresh: nn.Module) -> None:
    """Warn of numbers that modules hold and that have changed since a network was made.

    Args:
        module: The narrow network, after a step.
        fresh: The same, as it was made.
    """
    before = _attributes(fresh)
    for (path, name), value in _attributes(module).items():
        old = before.get((path, name))
        if name != "training" and type(value) is type(old) and isinstance(value, int | float) and value != old:
            warnings.warn(
                f"attribute '{path + '.' if path else ''}{name}' of the network changes as it runs ({old} -> {value}): "
                "every worker has its own, which is neither merged nor saved, and begins again with a new narrow "
                "network and where a run is resumed. Make it a buffer if what the network computes depends on it",
                stacklevel=2,
            )


class _Watch(TorchFunctionMode):
    """Sees which torch functions are called, and by which module."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.seen: set[tuple[str, str]] = set()

    def leave(self) -> None:
        """Note that the innermost module is done."""
        self.path.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and note it; how attributes of tensors are read is no operator."""
        name = getattr(func, "__name__", str(func))
        if name != "__get__":
            self.seen.add((self.path[-1] if self.path else "", name))
        return func(*args, **(kwargs or {}))


def _joined(job: Job, module: nn.Module, changed: _Attributes) -> tuple[tuple[str, ...], Operators]:
    """Find the neurons of the network again, with what has changed in a narrow one.

    Returns:
        The split groups that are none any more, and what the changed network calls.
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


def _with(network: nn.Module, narrow: nn.Module, changed: _Attributes) -> nn.Module:
    """Give a whole network what has changed in a narrow one: attributes, and buffers of which no part is cut."""
    for (path, name), value in changed.items():
        vars(network.get_submodule(path))[name] = value
    theirs = dict(narrow.named_buffers())
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name in theirs and buffer.shape == theirs[name].shape and not buffer.is_meta:
                buffer.copy_(theirs[name])
    return network


def _changed(module: nn.Module, fresh: nn.Module) -> dict[tuple[str, str], Any]:
    before = _attributes(fresh)
    return {key: value for key, value in _attributes(module).items() if key not in before or before[key] != value}


def _attributes(network: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the plain Python values that modules hold."""
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
    """Say which module calls what is new, and what has changed in it."""
    path, operator = min(new)
    where = f"'{path}' ({type(module.get_submodule(path)).__name__})" if path else "its forward"
    values = [f"'{'.'.join(filter(None, key))}' is now {value!r}" for key, value in list(changed.items())[:3]]
    since = f" ({', '.join(values)})" if values else ""
    return f"the network has changed: {where} now calls {operator}{since}, which it did not at the start"
