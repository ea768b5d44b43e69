"""Neuron groups: which positions of which tensors belong to the same hidden neuron.

A *neuron* is the unit that a worker gets as a whole: a hidden unit, a channel, an attention head. A *group*
is a set of neurons that are alike. It lists *slots*: along dim `dim` of tensor `tensor`, neuron k of the group
occupies the `block` consecutive positions that start at `offset + k * block` (or `offset + order[k] * block`).
This covers more than perceptrons: a channel that is flattened into h*w inputs is a slot with block h*w; a head
in a fused query-key-value projection has three slots with different offsets. Positions that no slot covers, and
tensors without slots, are *shared*: every worker holds them.

Where it sits: `ist/neurons/trace.py` traces a network, and `ist/neurons/find.py` makes groups from the trace;
`ist/subnet/partition.py` assigns neurons to workers; `ist/subnet/cut.py` cuts tensors by group.
Not here: which groups are split (`ist/neurons/select.py`).
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
        """Return the positions of some neurons: int64, one block per neuron, in the given order of the neurons."""
        places = neurons if self.order is None else np.asarray(self.order, dtype=np.int64)[neurons]
        starts = self.offset + places * self.block
        return starts if self.block == 1 else (starts[:, None] + np.arange(self.block)).reshape(-1)


@dataclass(frozen=True)
class Group:
    """A set of `size` interchangeable hidden neurons, and all positions that they occupy.

    Attributes:
        name: The module that contains them.
        size: The number of neurons.
        slots: The positions of the neurons.
        kind: A description for the user: "hidden units", "attention heads, 64 wide".
        residual: Whether the neurons are channels of a residual stream.
        outgoing: The (tensor, dim) over which the network sums the neurons' outputs: zeros there mask a neuron.
        scaled: Those of `outgoing` with no other use, so that a factor on them scales the outputs by that factor.
        masked_by: For parameters in `outgoing` that enter through a function, the value that masks a neuron.
        modules: If the neurons are whole modules (residual blocks), their paths; the group then has no slots.
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
    """Check that groups match a network's tensors and do not overlap.

    Raises:
        ModelError: A slot names a tensor or positions that do not exist, or two slots overlap.
    """
    covered: dict[tuple[str, int], NDArray[np.bool_]] = {}
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
            used = covered.setdefault((slot.tensor, slot.dim), np.zeros(shape[slot.dim], bool))
            if used[places].any() or len(np.unique(places)) != len(places):
                raise ModelError(
                    f"group '{group.name}' overlaps another group, or itself, in dim {slot.dim} of '{slot.tensor}'"
                )
            used[places] = True
