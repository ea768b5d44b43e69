"""Labels of neurons, and which of them belong together: a union-find over tensors of integers.

Every element of an activation carries one label. Two labels are joined if a worker must hold both or neither.
Label `FROZEN` marks what every worker holds, label `FREE` marks constants that adapt to any width.

Where it sits: `ist/neurons/rules/operators.py` says which labels an operator joins; this file joins them.
Not here: the labels of parameters (`ist/neurons/rules/parameter_views.py`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]

FROZEN = 0
FREE = 1


class Activation(NamedTuple):
    """The labels of a computed tensor.

    Attributes:
        core: int64 labels; size 1 in every dim along which the labels do not vary.
        shape: The shape of the tensor itself.
        depth: The number of contractions with parameters on the longest path from the inputs.
    """

    core: Tensor
    shape: Shape
    depth: int = 0

    @property
    def full(self) -> Tensor:
        """The labels in the tensor's own shape, as a view that takes no memory."""
        return self.core.expand(self.shape)

    @property
    def varying(self) -> set[int]:
        """Dims along which labels differ."""
        return {dim for dim, size in enumerate(self.core.shape) if size > 1}


def slim(tensor: Tensor) -> Tensor:
    """Return a tensor reduced to size 1 in every dim along which it does not vary."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    for dim, size in enumerate(tensor.shape):
        if size > 1 and bool((tensor == tensor.narrow(dim, 0, 1)).all()):
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class Labels:
    """A growing set of labels, and which of them are joined."""

    def __init__(self) -> None:
        self._parent = torch.arange(1024)
        self._count = 2

    def fresh(self, *shape: int) -> Tensor:
        """Return new labels, all different, of the given shape."""
        start, self._count = self._count, self._count + torch.Size(shape).numel()
        if self._count > len(self._parent):
            grown = torch.arange(2 * self._count)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return torch.arange(start, self._count).view(shape)

    def roots(self, labels: Tensor) -> Tensor:
        """Return one representative for each set of joined labels."""
        found = self._parent[labels]
        while True:
            further = self._parent[found]
            if torch.equal(further, found):
                return found
            found = further

    def join(self, first: Tensor, second: Tensor | int) -> None:
        """Join labels elementwise, with broadcasting; `FREE` is never joined."""
        shape = torch.Size(np.broadcast_shapes(first.shape, torch.as_tensor(second).shape))
        a, b = first.expand(shape).reshape(-1), torch.as_tensor(second).expand(shape).reshape(-1)
        bound = (a != FREE) & (b != FREE)
        a, b = a[bound], b[bound]
        while True:
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            if not bool(apart.any()):
                return
            a, b = a[apart], b[apart]
            # If one root is written twice, only one of the writes survives; the loop joins the other pair next time.
            self._parent[torch.maximum(a, b)] = torch.minimum(a, b)

    def freeze(self, labels: Tensor) -> None:
        """Make every worker hold these labels."""
        self.join(labels, FROZEN)

    def activation(self, labels: Tensor, depth: int = 0) -> Activation:
        """Return an activation with the given labels, in the smallest form."""
        return self.reduced(Activation(slim(labels), tuple(labels.shape), depth))

    def reduced(self, value: Activation) -> Activation:
        """Return the same activation with its current labels."""
        return value._replace(core=slim(self.roots(value.core)))

    def constant(self, shape: Shape, label: int, depth: int = 0) -> Activation:
        """Return an activation that has one label everywhere."""
        return Activation(torch.full([1] * len(shape), label), shape, depth)

    def filled(self, value: Activation, dims: Iterable[int]) -> Activation:
        """Give constants the label of their neighbors along some dims, so that a worker holds both or neither.

        Args:
            value: An activation with a constant part, such as zeros in front of a sequence.
            dims: A constant is filled along such a dim if all its neighbors there carry the same label.
        """
        core = self.roots(value.core)
        for dim in dims:
            is_free = core == FREE
            if bool(is_free.any()):
                most = torch.where(is_free, -1, core).amax(dim, keepdim=True)
                least = torch.where(is_free, torch.iinfo(core.dtype).max, core).amin(dim, keepdim=True)
                core = torch.where(is_free & (most == least), most, core)
        return self.reduced(value._replace(core=core))

    def join_along(self, value: Activation, dims: Iterable[int]) -> Activation:
        """Join labels that differ only in their position along the given dims."""
        core = value.core
        for dim in dims:
            if core.shape[dim] > 1:
                self.join(core, core.narrow(dim, 0, 1))
        return self.reduced(value)

    def is_frozen(self, value: Activation) -> bool:
        """Return whether every worker holds every element."""
        return bool((self.roots(value.core) == FROZEN).all())

    def is_free(self, value: Activation) -> bool:
        """Return whether the activation is a constant that adapts to any width."""
        return bool((value.core == FREE).all())
