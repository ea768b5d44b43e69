"""Turn joined labels into neuron groups: which neurons are alike, which positions they occupy, and their names.

A neuron is one set of joined labels: a worker gets all positions that carry them, or none. Neurons form one
group if they occupy equally many positions of the same dims of the same tensors.

Where it sits: `ist/neurons/trace.py` makes the labels; `ist/neurons/select.py` chooses which groups are split;
`ist/subnet/` uses the sizes of attributes and calls to build submodels.
Not here: joining labels (`ist/neurons/rules/`).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ist.errors import ModelError
from ist.neurons.attribute_sizes import Origin, SizeLabels
from ist.neurons.group import Group, Slot
from ist.neurons.trace import CallLabels, trace
from ist.neurons.tracing.call_sites import Call, CallSite, CallSize, Resize, Resizes
from ist.neurons.tracing.labels import FROZEN, Labels
from ist.neurons.tracing.untaken_paths import Detour

Positions = NDArray[np.int64]
Places = dict[tuple[str, int], Positions]
"""For every (tensor, dim), the positions of a group's neurons: int64 of shape (neurons, positions per neuron)."""


@dataclass(frozen=True)
class AttributeSize:
    """An integer attribute of the network, and the positions that it counts.

    Attributes:
        origin: The attribute.
        factor: The number of counted positions is this multiple of the attribute.
        shared: The number of counted positions that every worker holds.
        counted: For each group, by name, the neurons at the other counted positions.
        user: The module whose forward uses the attribute.
    """

    origin: Origin
    factor: int
    shared: int
    counted: Mapping[str, Positions]
    user: str = ""


class ResizedCall(NamedTuple):
    """A call for which a submodel replaces the size that its forward computes.

    Attributes:
        size: The size argument, and the neurons that it counts.
        is_inferred: Whether the replacement is -1, so that torch infers the size.
    """

    size: CallSize
    is_inferred: bool


@dataclass(frozen=True)
class Neurons:
    """The neurons of a network, and everything that a submodel needs to know about their sizes.

    Attributes:
        groups: Every group of at least two neurons, including residual streams, in the order of the network.
        sizes: Integer attributes that are sizes of axes with neurons.
        unknown: Operators without a rule, and where each first ran: module and line of the network's code.
        on_meta: Whether the trace ran on the `meta` device, without values.
        causes: Operators that prevent a split: operator, module and line.
        unreached: Parameters that the example did not reach; they are not split.
        detours: Branches of the forward that the example does not take.
        calls: Size arguments in calls of torch functions, where the counted neurons are known.
        sites: For each module, the places in its code that make such calls, and how often one forward makes each.
        resized: For each module that needs it, the calls whose sizes a submodel replaces.
    """

    groups: tuple[Group, ...]
    sizes: tuple[AttributeSize, ...]
    unknown: Mapping[str, str]
    on_meta: bool = True
    causes: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    detours: tuple[Detour, ...] = ()
    calls: tuple[CallSize, ...] = ()
    sites: Mapping[str, Mapping[CallSite, int]] = field(default_factory=dict)
    resized: Mapping[str, tuple["ResizedCall", ...]] = field(default_factory=dict)


def find_neurons(template: nn.Module, example: Any, build: Callable[[], nn.Module] | None = None) -> Neurons:
    """Find the neuron groups of a network by tracing its forward on an example.

    Args:
        template: The network, on any device.
        example: The input of its forward for one batch: a tensor, a tuple or a mapping.
        build: Makes the network with values; called only if the forward depends on values.

    Returns:
        The groups, and the sizes of attributes and calls that depend on them.

    Raises:
        ModelError: The network fails on the example.
    """
    traced = trace(template, example, build)
    labels, positions = traced.state.labels, traced.state.positions
    keys = positions.keys
    roots = [labels.roots(positions.of[key]).numpy() for key in keys]
    heads, streams = _roots_in(labels, traced.state.heads), _roots_in(labels, traced.state.residual)
    found = [
        (members, places)
        for members, places in _alike(keys, roots)
        if len(members) > 1 and any(key in positions.outgoing for key in places)
    ]
    reused = {name for name, number in positions.uses.items() if number > traced.state.runs}
    dims = Counter(tensor for tensor, _ in keys)
    names = _names([list(places) for _, places in found], dims, positions.outgoing)
    groups = tuple(
        Group(
            name,
            len(members),
            tuple(slot for (tensor, dim), where in places.items() for slot in _slots(tensor, dim, where)),
            _kind(places, template, members[0] in heads),
            members[0] in streams and members[0] not in heads and not _is_recurrent(places, template, reused),
            frozenset(key for key in places if key in positions.outgoing),
            frozenset(key for key in places if key in positions.outgoing and key not in positions.incoming),
            masked_by=tuple(
                sorted({(name, positions.masked_by[name]) for name, _ in places if positions.masked_by.get(name)})
            ),
        )
        for name, (members, places) in zip(names, found, strict=True)
    )
    neuron = {
        root: (name, k) for name, (members, _) in zip(names, found, strict=True) for k, root in enumerate(members)
    }
    return Neurons(
        groups,
        tuple(_attribute_size(size, neuron) for size in traced.sizes),
        traced.unknown,
        traced.on_meta,
        causes=tuple(traced.causes),
        unreached=tuple(traced.unreached),
        detours=tuple(traced.detours),
        calls=tuple(_call_size(call, neuron) for call in traced.calls if call.labels is not None),
        sites=_sites([call.call for call in traced.calls]),
    )


def _roots_in(labels: Labels, cores: Sequence[Tensor]) -> set[int]:
    return {root for core in cores for root in labels.roots(core).reshape(-1).tolist()}


def _counted(labels: Tensor, neuron: Mapping[int, tuple[str, int]]) -> dict[str, Positions]:
    """Return, for each group, the neurons to which the labels belong."""
    counted: dict[str, list[int]] = defaultdict(list)
    for root in labels.tolist():
        if root in neuron:
            name, number = neuron[root]
            counted[name].append(number)
    return {name: np.array(numbers) for name, numbers in counted.items()}


def _attribute_size(size: SizeLabels, neuron: Mapping[int, tuple[str, int]]) -> AttributeSize:
    counted = _counted(size.labels, neuron)
    shared = len(size.labels) - sum(map(len, counted.values()))
    return AttributeSize(size.origin, size.factor, shared, counted, size.user)


def _call_size(found: CallLabels, neuron: Mapping[int, tuple[str, int]]) -> CallSize:
    assert found.size is not None
    assert found.labels is not None
    size = found.size
    counted = _counted(found.labels, neuron)
    return CallSize(found.call, size.location, int(size.number), counted, size.in_shape, found.where)


def _sites(calls: Sequence[Call]) -> dict[str, dict[CallSite, int]]:
    sites: dict[str, dict[CallSite, int]] = defaultdict(dict)
    for call in calls:
        sites[call.path][call.site] = max(call.visit + 1, sites[call.path].get(call.site, 0))
    return dict(sites)


def submodel_sizes(sizes: Sequence[AttributeSize], held: Mapping[str, Positions]) -> dict[Origin, int]:
    """Return the values of the attributes that differ between a worker's submodel and the full network.

    Args:
        sizes: The attributes.
        held: For each group that is split, by name, the sorted neurons that the worker holds.

    Raises:
        ModelError: An attribute would need two values.
    """
    values_in_submodel = {}
    for origin, values in _required_values(sizes, held).items():
        if len(values) > 1:
            raise ModelError(
                f"{origin} is the size of two things that are split differently: a submodel would need the values "
                f"{' and '.join(map(str, values))} at once. Share one of them (partition.exclude)"
            )
        if any(is_split for is_split in values.values()):
            values_in_submodel[origin] = next(iter(values))
    return values_in_submodel


def conflicting_sizes(sizes: Sequence[AttributeSize], held: Mapping[str, Positions]) -> set[Origin]:
    """Return the attributes that would need two values at once; arguments as in `submodel_sizes`."""
    return {origin for origin, values in _required_values(sizes, held).items() if len(values) > 1}


def _required_values(sizes: Sequence[AttributeSize], held: Mapping[str, Positions]) -> dict[Origin, dict[int, bool]]:
    """Return the values that each attribute would need, and for each whether the counted neurons are split."""
    required: dict[Origin, dict[int, bool]] = {}
    # The other factor of a product may be the one that shrinks, so products decide only if there is nothing else.
    for size in sorted(sizes, key=lambda size: size.factor > 1):
        split = [(numbers, held[name]) for name, numbers in size.counted.items() if name in held]
        count = size.shared + sum(map(len, size.counted.values())) - sum(len(numbers) for numbers, _ in split)
        count += sum(int(np.isin(numbers, owned).sum()) for numbers, owned in split)
        value, rest = divmod(count, size.factor)
        if size.factor == 1 or not (rest or size.origin in required):
            values = required.setdefault(size.origin, {})
            values[value] = values.get(value, False) or bool(split)
    return required


def submodel_calls(neurons: Neurons, held: Mapping[str, Positions]) -> dict[str, Resizes]:
    """Return, for each module whose calls need other sizes than its forward computes, the replacements.

    Args:
        neurons: The neurons of the network.
        held: For each group that is split, by name, the neurons that a worker holds.
    """
    resizes: dict[str, Resizes] = {}
    for path, resized in neurons.resized.items():
        visits = {site: [list[Resize]() for _ in range(number)] for site, number in neurons.sites[path].items()}
        for size, is_inferred in resized:
            new = None if is_inferred else size.in_submodel(held)
            visits[size.call.site][size.call.visit].append(Resize(size.location, size.size, new, size.in_proportion))
        resizes[path] = {
            site: each[:1] if all(one == each[0] for one in each) else each for site, each in visits.items()
        }
    return resizes


def _alike(keys: Sequence[tuple[str, int]], roots: Sequence[Positions]) -> list[tuple[list[int], Places]]:
    """Group neurons that occupy equally many positions of the same dims; groups are ordered by their first label."""
    everywhere: dict[int, list[tuple[int, int]]] = defaultdict(list)  # root: (number of the key, how many)
    positions: list[dict[int, Positions]] = []
    for number, found in enumerate(roots):
        order = np.argsort(found, kind="stable")
        unique, starts, counts = np.unique(found[order], return_index=True, return_counts=True)
        here = {}
        for root, start, count in zip(unique.tolist(), starts.tolist(), counts.tolist(), strict=True):
            if root != FROZEN:
                everywhere[root].append((number, count))
                here[root] = order[start : start + count]
        positions.append(here)
    classes: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, counts_by_key in everywhere.items():
        classes[tuple(counts_by_key)].append(root)
    made = []
    for signature, members in classes.items():
        first = signature[0][0]
        members.sort(key=lambda root: int(positions[first][root][0]))
        places = {keys[number]: np.stack([positions[number][root] for root in members]) for number, _ in signature}
        made.append((members, places))
    return sorted(made, key=lambda entry: min(entry[0]))


def _slots(tensor: str, dim: int, positions: Positions) -> list[Slot]:
    """Describe positions of shape (neurons, positions per neuron) by runs of neighboring columns."""
    steps = (np.diff(positions, axis=1) == 1).all(axis=0)
    starts = [0, *(np.flatnonzero(~steps) + 1).tolist(), positions.shape[1]]
    slots = []
    for start, stop in pairwise(starts):
        block, first = stop - start, positions[:, start]
        offset = int(first.min())
        order, rest = np.divmod(first - offset, block)
        if rest.any():
            slots += [Slot(tensor, dim, 1, 0, tuple(positions[:, column].tolist())) for column in range(start, stop)]
        elif (order == np.arange(len(order))).all():
            slots.append(Slot(tensor, dim, block, offset))
        else:
            slots.append(Slot(tensor, dim, block, offset, tuple(order.tolist())))
    return slots


def _names(
    keys: Sequence[Sequence[tuple[str, int]]], num_dims: Mapping[str, int], outgoing: set[tuple[str, int]]
) -> list[str]:
    """Name each group after the module that contains all of it, or else after the module whose weights compute it."""

    def producer(group: Sequence[tuple[str, int]]) -> str:
        first = min(group, key=lambda key: (key in outgoing, num_dims[key[0]] == 1, key[1]))[0]
        return first.rpartition(".")[0] or first

    producers = [producer(group) for group in keys]
    containers = [_common(group) for group in keys]
    names = [
        container if container and containers.count(container) == 1 else made_by
        for container, made_by in zip(containers, producers, strict=True)
    ]
    seen: dict[str, int] = defaultdict(int)
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _common(group: Sequence[tuple[str, int]]) -> str:
    modules = [tensor.split(".")[:-1] for tensor, _ in group]
    shared = [parts[0] for parts in zip(*modules, strict=False) if len(set(parts)) == 1]
    prefix = modules[0][: len(shared)]
    return ".".join(prefix) if prefix == shared else ""


def _is_recurrent(places: Places, template: nn.Module, reused: set[str]) -> bool:
    """Whether neurons are the state of a recurrent cell: the same weights read them and compute them, repeatedly.

    The gates of a recurrent cell add activations of different depth, as a residual stream does. This tells them apart.

    Args:
        places: The positions of the neurons.
        template: The network.
        reused: Parameters that one run used several times.
    """
    own = [name for name, dim in places if dim == 0 and (name, 1) in places]
    return any(name in reused or isinstance(_owner(template, name), _RECURRENT) for name in own)


_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def _owner(template: nn.Module, tensor: str) -> nn.Module:
    return template.get_submodule(tensor.rpartition(".")[0])


def _kind(places: Places, template: nn.Module, is_head: bool) -> str:
    tensor, dim = next(iter(places))
    width = places[tensor, dim].shape[1]
    if is_head:
        head_dim = min(p.shape[1] for p in places.values())
        return f"attention heads, {head_dim} wide"
    module = template.get_submodule(tensor.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvNd):
        return "channels" if width == 1 or module.groups == 1 else f"groups of {width} channels"
    if isinstance(module, _RECURRENT):
        return "recurrent units"
    return "hidden units" if width == 1 else f"hidden units, {width} positions each"
