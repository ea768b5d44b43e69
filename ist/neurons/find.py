"""From joined labels to neuron groups: which neurons are alike, where they live, and what to call them.

A neuron is a set of joined labels: the positions that hold them are kept or left out together. Neurons
are alike, and one group, if they occupy equally many positions of the same dims of the same tensors.
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
from ist.neurons.tracing.call_sites import Call, CallSize, Resize, Resizes, Site
from ist.neurons.tracing.labels import FROZEN, Labels
from ist.neurons.tracing.untaken_paths import Detour

Positions = NDArray[np.int64]
Places = dict[tuple[str, int], Positions]
"""For every (tensor, dim), the positions of a group's neurons: shape (neurons, positions of one neuron)."""


@dataclass(frozen=True)
class AttributeSize:
    """An integer attribute of the network, and what it counts.

    Attributes:
        origin: The attribute.
        factor: The count is this multiple of it.
        whole: How many of the counted positions no worker is without.
        counted: For each group, by name, the neurons at the other positions.
        user: The module whose forward uses it.
    """

    origin: Origin
    factor: int
    whole: int
    counted: Mapping[str, Positions]
    user: str = ""


class ResizedCall(NamedTuple):
    """A call that a narrow network makes with another size than its forward computes.

    Attributes:
        size: Which, and what it counts.
        is_inferred: Whether the size is left to torch (-1).
    """

    size: CallSize
    is_inferred: bool


@dataclass(frozen=True)
class Found:
    """What is known of a network.

    Attributes:
        groups: Every group of at least two neurons, residual streams included, in the order of the network.
        sizes: Integer attributes that are sizes of what is split.
        unknown: Operators without a rule, and where each was first met: module and line of the network's code.
        on_meta: Whether the network could be traced without values.
        causes: What keeps neurons whole: operator, module and line.
        unreached: Parameters that the example did not reach; they stay whole.
        detours: Ways of the forward that the example does not take.
        calls: Sizes that calls of torch functions were given, of a number that is known.
        sites: For each module, the places in its code that make such calls, and how many times one run makes them.
        resized: The modules that make calls with other sizes than their forward computes, and these sizes.
    """

    groups: tuple[Group, ...]
    sizes: tuple[AttributeSize, ...]
    unknown: Mapping[str, str]
    on_meta: bool = True
    causes: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    detours: tuple[Detour, ...] = ()
    calls: tuple[CallSize, ...] = ()
    sites: Mapping[str, Mapping[Site, int]] = field(default_factory=dict)
    resized: Mapping[str, tuple["ResizedCall", ...]] = field(default_factory=dict)


def find_neurons(template: nn.Module, example: Any, build: Callable[[], nn.Module] | None = None) -> Found:
    """Find the neuron groups of a network by running it once on an example.

    Args:
        template: The network, on any device.
        example: What its forward takes, of one batch: a tensor, a tuple or a mapping.
        build: Makes the network with values: used if its forward depends on values.

    Raises:
        ModelError: The network fails on the example.
    """
    traced = trace(template, example, build)
    labels, atoms = traced.scene.labels, traced.scene.atoms
    keys = atoms.keys
    roots = [labels.roots(atoms.of[key]).numpy() for key in keys]
    heads, streams = _roots_in(labels, traced.scene.heads), _roots_in(labels, traced.scene.residual)
    found = [
        (members, places)
        for members, places in _alike(keys, roots)
        if len(members) > 1 and any(key in atoms.outgoing for key in places)
    ]
    again = {name for name, number in atoms.uses.items() if number > traced.scene.runs}
    dims = Counter(tensor for tensor, _ in keys)
    names = _names([list(places) for _, places in found], dims, atoms.outgoing)
    groups = tuple(
        Group(
            name,
            len(members),
            tuple(slot for (tensor, dim), where in places.items() for slot in _slots(tensor, dim, where)),
            _kind(places, template, members[0] in heads),
            members[0] in streams and members[0] not in heads and not _is_recurrent(places, template, again),
            frozenset(key for key in places if key in atoms.outgoing),
            frozenset(key for key in places if key in atoms.outgoing and key not in atoms.incoming),
            masked_by=tuple(sorted({(name, atoms.masked_by[name]) for name, _ in places if atoms.masked_by.get(name)})),
        )
        for name, (members, places) in zip(names, found, strict=True)
    )
    neuron = {
        root: (name, k) for name, (members, _) in zip(names, found, strict=True) for k, root in enumerate(members)
    }
    return Found(
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
    """Return, for each group, the neurons that some labels stand for."""
    counted: dict[str, list[int]] = defaultdict(list)
    for root in labels.tolist():
        if root in neuron:
            name, number = neuron[root]
            counted[name].append(number)
    return {name: np.array(numbers) for name, numbers in counted.items()}


def _attribute_size(size: SizeLabels, neuron: Mapping[int, tuple[str, int]]) -> AttributeSize:
    counted = _counted(size.labels, neuron)
    whole = len(size.labels) - sum(map(len, counted.values()))
    return AttributeSize(size.origin, size.factor, whole, counted, size.user)


def _call_size(found: CallLabels, neuron: Mapping[int, tuple[str, int]]) -> CallSize:
    assert found.size is not None
    assert found.labels is not None
    size = found.size
    counted = _counted(found.labels, neuron)
    return CallSize(found.call, size.location, int(size.number), counted, size.in_shape, found.where)


def _sites(calls: Sequence[Call]) -> dict[str, dict[Site, int]]:
    sites: dict[str, dict[Site, int]] = defaultdict(dict)
    for call in calls:
        sites[call.path][call.site] = max(call.visit + 1, sites[call.path].get(call.site, 0))
    return dict(sites)


def narrow_sizes(sizes: Sequence[AttributeSize], held: Mapping[str, Positions]) -> dict[Origin, int]:
    """Return the value of each attribute in a narrow network, where it is another than in the whole one.

    Args:
        sizes: The attributes.
        held: For each group that is split, by name, the sorted neurons that a worker holds.

    Raises:
        ModelError: An attribute would need two values.
    """
    narrow = {}
    for origin, values in _wanted(sizes, held).items():
        if len(values) > 1:
            raise ModelError(
                f"{origin} is the size of two things that are split differently: a narrow network would need it to be "
                f"{' and '.join(map(str, values))} at once. Share one of them (partition.exclude)"
            )
        if any(is_split for is_split in values.values()):
            narrow[origin] = next(iter(values))
    return narrow


def of_two_values(sizes: Sequence[AttributeSize], held: Mapping[str, Positions]) -> set[Origin]:
    """Return the attributes that would need two values at once; arguments as in `narrow_sizes`."""
    return {origin for origin, values in _wanted(sizes, held).items() if len(values) > 1}


def _wanted(sizes: Sequence[AttributeSize], held: Mapping[str, Positions]) -> dict[Origin, dict[int, bool]]:
    """Return the values that each attribute should have, and whether what they count is split."""
    wanted: dict[Origin, dict[int, bool]] = {}
    # A multiple may be narrow because of its other factor: it counts only where nothing plainer is known.
    for size in sorted(sizes, key=lambda size: size.factor > 1):
        split = [(numbers, held[name]) for name, numbers in size.counted.items() if name in held]
        count = size.whole + sum(map(len, size.counted.values())) - sum(len(numbers) for numbers, _ in split)
        count += sum(int(np.isin(numbers, owned).sum()) for numbers, owned in split)
        value, rest = divmod(count, size.factor)
        if size.factor == 1 or not (rest or size.origin in wanted):
            values = wanted.setdefault(size.origin, {})
            values[value] = values.get(value, False) or bool(split)
    return wanted


def narrow_calls(found: Found, held: Mapping[str, Positions]) -> dict[str, Resizes]:
    """Return, for each module that makes calls with other sizes than its forward computes, what becomes of them.

    Args:
        found: What is known of the network.
        held: For each group that is split, by name, the neurons that a worker holds.
    """
    made: dict[str, Resizes] = {}
    for path, resized in found.resized.items():
        visits = {site: [list[Resize]() for _ in range(number)] for site, number in found.sites[path].items()}
        for size, is_inferred in resized:
            narrow = None if is_inferred else size.narrow(held)
            visits[size.call.site][size.call.visit].append(Resize(size.location, size.size, narrow, size.in_proportion))
        made[path] = {site: each[:1] if all(one == each[0] for one in each) else each for site, each in visits.items()}
    return made


def _alike(keys: Sequence[tuple[str, int]], roots: Sequence[Positions]) -> list[tuple[list[int], Places]]:
    """Sort neurons into sets that occupy equally many positions of the same dims, in order of their first label."""
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
    """Describe positions (neurons, each) by runs of neighbouring columns."""
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
    """Name each group after the module that holds all of it, or else after the one whose weights make it."""

    def maker(group: Sequence[tuple[str, int]]) -> str:
        first = min(group, key=lambda key: (key in outgoing, num_dims[key[0]] == 1, key[1]))[0]
        return first.rpartition(".")[0] or first

    firsts = [maker(group) for group in keys]
    wholes = [_common(group) for group in keys]
    names = [
        whole if whole and wholes.count(whole) == 1 else first for whole, first in zip(wholes, firsts, strict=True)
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


def _is_recurrent(places: Places, template: nn.Module, again: set[str]) -> bool:
    """Whether neurons are the state of a recurrent cell: they are read by weights that make them, again and again.

    Its gates add what is of different depth, as a residual stream does.

    Args:
        places: Where they live.
        template: The network.
        again: Parameters that were used several times in one run.
    """
    own = [name for name, dim in places if dim == 0 and (name, 1) in places]
    return any(name in again or isinstance(_owner(template, name), _RECURRENT) for name in own)


_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def _owner(template: nn.Module, tensor: str) -> nn.Module:
    return template.get_submodule(tensor.rpartition(".")[0])


def _kind(places: Places, template: nn.Module, is_head: bool) -> str:
    tensor, dim = next(iter(places))
    width = places[tensor, dim].shape[1]
    if is_head:
        narrow = min(p.shape[1] for p in places.values())
        return f"attention heads, {narrow} wide"
    module = template.get_submodule(tensor.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvNd):
        return "channels" if width == 1 or module.groups == 1 else f"groups of {width} channels"
    if isinstance(module, _RECURRENT):
        return "recurrent units"
    return "hidden units" if width == 1 else f"hidden units, {width} positions each"
