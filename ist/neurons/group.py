"""Neuron groups: which positions of which tensors belong to the same hidden neuron.

A *neuron* is whatever can be handed to a worker as a whole: a hidden unit, a channel, an attention
head. A *group* is a set of neurons that are alike. It lists *slots*: along dim `dim` of tensor
`tensor`, neuron k of the group occupies the `block` consecutive positions that begin at
`offset + k * block` (or `offset + order[k] * block`). That covers more than perceptrons: a channel that
is flattened into h*w inputs is a slot with block h*w; a head in a fused query-key-value projection has
three slots that differ in offset. Positions that no slot covers (and tensors without slots) are *shared*
by all workers.

Where it sits: `ist/neurons/trace.py` watches a network run, and `ist/neurons/find.py` makes groups of what
it found; `ist/subnet/partition.py` deals their neurons; `ist/subnet/cut.py` cuts tensors by them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ist.errors import ModelError
from ist.rng import Indices
from ist.tensors import TensorSpec


@dataclass(frozen=True)
class Slot:
    """The positions that a group's neurons occupy along one dim of one tensor."""

    tensor: str
    dim: int
    block: int = 1
    offset: int = 0
    order: tuple[int, ...] | None = None

    def positions(self, neurons: Indices) -> Indices:
        """Return the positions of some neurons: int64, a neuron's block after another's, in the order given."""
        places = neurons if self.order is None else np.asarray(self.order, dtype=np.int64)[neurons]
        starts = self.offset + places * self.block
        return starts if self.block == 1 else (starts[:, None] + np.arange(self.block)).reshape(-1)


@dataclass(frozen=True)
class Group:
    """A set of `size` interchangeable hidden neurons and every place where they live.

    Attributes:
        name: The module that holds them.
        size: How many they are.
        slots: Where they live.
        kind: What they are, for a person: "hidden units", "attention heads, 64 wide".
        residual: Whether they are channels of a residual stream.
        outgoing: (tensor, dim) over which the network sums the neurons' outputs: zeros there mask a neuron.
        scaled: Those of them that do nothing else, so that a factor on them is a factor on the outputs.
        masked_by: For parameters among `outgoing` that are not used as they are, the values that mask a neuron.
        modules: Where the neurons are whole modules (residual blocks): their paths; there are no slots then.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    kind: str = "hidden units"
    residual: bool = False
    outgoing: frozenset[tuple[str, int]] = frozenset()
    scaled: frozenset[tuple[str, int]] = frozenset()
    modules: tuple[str, ...] = ()
    masked_by: tuple[tuple[str, float], ...] = ()


def check_groups(groups: Sequence[Group], tensors: Mapping[str, TensorSpec | Tensor]) -> None:
    """Check that groups fit a network's tensors and do not overlap.

    Raises:
        ModelError: A slot names a tensor or positions that are not there, or two slots overlap.
    """
    taken: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for group in groups:
        if group.size < 1:
            raise ModelError(f"group '{group.name}' has {group.size} neurons: expected at least one")
        for slot in group.slots:
            if slot.tensor not in tensors:
                raise ModelError(f"group '{group.name}': the network has no tensor '{slot.tensor}'")
            shape = tuple(tensors[slot.tensor].shape)
            if slot.order is not None and len(slot.order) != group.size:
                raise ModelError(f"group '{group.name}': a slot orders {len(slot.order)} of its {group.size} neurons")
            places = slot.positions(np.arange(group.size)) if slot.block >= 1 else np.array([-1])
            if slot.dim >= len(shape) or places.min() < 0 or places.max() >= shape[slot.dim]:
                raise ModelError(
                    f"group '{group.name}': positions {places.min()} to {places.max()} of dim {slot.dim} are not "
                    f"within '{slot.tensor}' of shape {shape}"
                )
            used = taken.setdefault((slot.tensor, slot.dim), np.zeros(shape[slot.dim], bool))
            if used[places].any() or len(np.unique(places)) != len(places):
                raise ModelError(
                    f"group '{group.name}' overlaps another group, or itself, in dim {slot.dim} of '{slot.tensor}'"
                )
            used[places] = True
