"""Neuron groups: which positions of which tensors belong to the same hidden neuron.

A *neuron* is whatever can be handed to a worker as a whole: a hidden unit, a channel, an attention
head. A *group* is a set of neurons that are alike. It lists *slots*: along dim `dim` of tensor
`tensor`, neuron k of the group occupies the `block` consecutive positions that begin at
`offset + k * block`. That covers more than perceptrons: a channel that is flattened into h*w inputs
is a slot with block h*w; a head in a fused query-key-value projection has three slots that differ
in offset; positions that no slot covers (and tensors without slots) are *shared* by all workers.

Where it sits: `ist/groups/sequential.py` finds the groups of a network; `ist/partition.py` deals their
neurons; `ist/subnet.py` cuts tensors by them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ist.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """The positions that a group's neurons occupy along one dim of one tensor."""

    tensor: str
    dim: int
    block: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Group:
    """A set of `size` interchangeable hidden neurons and every place where they live."""

    name: str
    size: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, without its values."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def tensor_specs(module: nn.Module, with_statistics: bool) -> dict[str, TensorSpec]:
    """Return the specs of the tensors that are trained: parameters, and buffers that hold state.

    Args:
        module: The whole network; may be on the `meta` device.
        with_statistics: Whether batch norm's running statistics are among them. They mean nothing after
            a merge (the subnets that made them are gone), so normally they neither travel nor merge.

    Returns:
        Name to spec, in the order of the module's `state_dict`.
    """
    skipped = set() if with_statistics else set(statistics_names(module))
    return {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in module.state_dict().items()
        if name not in skipped
    }


def statistics_names(module: nn.Module) -> list[str]:
    """Return the names of batch norm's running statistics."""
    return [
        f"{name}.{buffer}" if name else buffer
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
        for buffer, tensor in child.named_buffers(recurse=False)
        if tensor is not None
    ]


def check_groups(groups: Sequence[Group], tensors: Mapping[str, TensorSpec | Tensor]) -> None:
    """Check that groups fit a network's tensors and do not overlap.

    Raises:
        ModelError: A slot names a tensor or positions that are not there, or two slots overlap.
    """
    taken: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for group in groups:
        if group.size < 1:
            raise ModelError(f"group '{group.name}' has {group.size} neurons: expected at least one")
        for slot in group.slots:
            if slot.tensor not in tensors:
                raise ModelError(f"group '{group.name}': the network has no tensor '{slot.tensor}'")
            shape = tuple(tensors[slot.tensor].shape)
            end = slot.offset + slot.block * group.size
            if slot.dim >= len(shape) or slot.offset < 0 or slot.block < 1 or end > shape[slot.dim]:
                raise ModelError(
                    f"group '{group.name}': positions {slot.offset} to {end} of dim {slot.dim} are not within "
                    f"'{slot.tensor}' of shape {shape}"
                )
            spans = taken.setdefault((slot.tensor, slot.dim), [])
            for start, stop, other in spans:
                if slot.offset < stop and start < end:
                    raise ModelError(
                        f"groups '{other}' and '{group.name}' overlap in dim {slot.dim} of '{slot.tensor}'"
                    )
            spans.append((slot.offset, end, group.name))
