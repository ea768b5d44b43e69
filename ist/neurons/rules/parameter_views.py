"""Join the labels of activations with the positions of parameters and buffers.

A parameter is followed through transposes, slices and reshapes as a *view*. For each dim of the parameter, the
view has a *plane*: a tensor with the position in that dim of each element of the view. Every (tensor, dim,
position) has its own label. When an operator combines the view with activations, their labels are joined with the
labels of the positions.

Where it sits: `ist/neurons/rules/joins.py` calls `use`; `ist/neurons/find.py` reads the labels of positions.
Not here: which operators use a parameter, and how (`joins.py`, `layers.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ist.neurons.tracing.labels import FREE, FROZEN, Activation, Labels, Shape


class ParameterView(NamedTuple):
    """A view of some elements of a parameter or buffer, or of an elementwise function of parameters.

    Attributes:
        name: The tensor.
        planes: For each dim of the tensor that is still known, the positions of the view's elements: int64, of the
            view's shape, expanded (stride 0) where they do not vary.
        shape: The view's shape.
        zero: Whether certain values of the parameters make the view zero.
        linear: Whether the view doubles when the parameters double.
        zeros: The values that make it zero, by parameter, where they are not 0: `softplus` vanishes far below zero.
    """

    name: str
    planes: dict[int, Tensor]
    shape: Shape
    zero: bool = True
    linear: bool = True
    zeros: tuple[tuple[str, float], ...] = ()

    def axes(self, dim: int) -> set[int]:
        """Return the view's axes along which the position in `dim` varies."""
        plane = self.planes[dim]
        return {axis for axis, size in enumerate(plane.shape) if size > 1 and plane.stride(axis) != 0}

    @property
    def extents(self) -> set[int]:
        """The axes along which the view has different elements."""
        return {axis for dim in self.planes for axis in self.axes(dim)}


def is_repeated(view: ParameterView) -> bool:
    """Return whether a view contains an element several times, as when a learned query is expanded over a batch."""
    number, known = torch.zeros((), dtype=torch.int64), 1
    for plane in view.planes.values():
        number = number + plane * known
        known *= int(plane.max()) + 1 if plane.numel() else 1
    numbers = number.expand(view.shape)
    return len(np.unique(numbers.numpy())) < numbers.numel()


_MADE = "made of several: "
"""The prefix of names of views that are made of several parameters."""


class _Table(NamedTuple):
    """Labels of a parameter that depend on several dims at once; `settle` resolves them after the trace."""

    name: str
    dims: tuple[int, ...]
    labels: Tensor


class PositionLabels:
    """A label for every position of every dim of every parameter and buffer."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.of: dict[tuple[str, int], Tensor] = {}
        self.buffers: set[str] = set()
        self.outgoing: set[tuple[str, int]] = set()
        self.incoming: set[tuple[str, int]] = set()
        self.masked_by: dict[str, float] = {}  # for a parameter, the value that masks a neuron
        self.members: dict[
            str, dict[int, list[tuple[str, int]]]
        ] = {}  # for combined views, their (tensor, dim) by axis
        self.uses: Counter[str] = Counter()  # for a parameter, how many weighted sums use it
        self._sized: dict[str, set[int]] = {}  # for a constant, the dims whose size comes from an attribute
        self._tables: list[_Table] = []

    def view(self, name: str, shape: Shape) -> ParameterView:
        """Register a parameter or buffer, and return the view of all of it."""
        planes = {}
        for dim, size in enumerate(shape):
            if (name, dim) not in self.of:
                self.of[name, dim] = self.labels.fresh(size)
            planes[dim] = torch.arange(size).view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
        is_parameter = name not in self.buffers
        return ParameterView(name, planes, shape, is_parameter, is_parameter)

    def combined(self, views: Sequence[ParameterView], shape: Shape) -> ParameterView:
        """Return the view of an elementwise function of several views: their positions are cut together.

        Args:
            views: Views that broadcast to `shape`.
            shape: The shape of the result.
        """
        wide = [
            view._replace(planes={d: plane.expand(shape) for d, plane in view.planes.items()}, shape=shape)
            for view in views
        ]
        different = [view for view in wide if view.extents]
        if len(different) <= 1:
            return different[0] if different else wide[0]
        name = f"{_MADE}{len(self.members)}"
        self.members[name] = defaultdict(list)
        made = self.view(name, shape)
        for view in different:
            for dim, plane in view.planes.items():
                axes = view.axes(dim)
                if len(axes) == 1:
                    (axis,) = axes
                    self.labels.join(self.of[view.name, dim][_at(plane, axes).reshape(-1)], self.of[name, axis])
                    self.members[name][axis].append((view.name, dim))
                elif axes:  # several axes come from one dim, and it is unknown along which of them it is cut
                    self.freeze(view, [dim])
                    self.freeze(made, axes)
        return made

    def constant(self, shape: Shape, dims: set[int]) -> ParameterView:
        """Return a constant that a forward makes (zeros, say), whose size along some dims comes from an attribute."""
        name = f"{_MADE}{len(self.members)}"
        self.members[name] = defaultdict(list)
        self._sized[name] = dims
        return self.view(name, shape)._replace(zero=False, linear=False)

    def is_constant(self, view: ParameterView) -> bool:
        """Return whether a view contains no tensor of the network."""
        return not any(self.real(view.name, dim) for dim in view.planes)

    def real(self, name: str, dim: int) -> set[tuple[str, int]]:
        """Return the (tensor, dim) of the network's own tensors from which a dim of a view is made."""
        if name not in self.members:
            return {(name, dim)}
        return {found for member in self.members[name][dim] for found in self.real(*member)}

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Every (tensor, dim) of the network's own tensors."""
        return [(name, dim) for name, dim in self.of if name not in self.members]

    def freeze(self, view: ParameterView, dims: Iterable[int] | None = None) -> None:
        """Make every worker hold all positions of the given dims (default: all dims)."""
        for dim in view.planes if dims is None else dims:
            self.labels.freeze(self.of[view.name, dim])

    def freeze_along(self, view: ParameterView, axes: Iterable[int]) -> None:
        """Freeze the dims that vary along some axes of the view, because an operator mixes along these axes."""
        self.freeze(view, [dim for dim in view.planes if view.axes(dim) & set(axes)])

    def use(self, view: ParameterView, labels: Tensor, axes: Iterable[int], outgoing: bool = False) -> None:
        """Join the positions of a view with the labels of activations.

        Args:
            view: The view of a parameter.
            labels: Labels that broadcast to the view's shape.
            axes: The axes of the view to which the labels apply; dims that vary only along other axes are unchanged.
            outgoing: Whether the operator sums over the labels, weighted by the parameter: zeros then mask a neuron.
        """
        wanted, core = set(axes), self.labels.roots(labels)
        varying = {axis for axis, size in enumerate(core.shape) if size > 1}
        concerned = [dim for dim in view.planes if view.axes(dim) & wanted]
        torn = [dim for dim in concerned if not view.axes(dim) <= wanted]
        if torn:
            self.freeze(view, concerned)
            self.labels.freeze(core)
            return
        held = [dim for dim in concerned if view.axes(dim) & varying]
        self.freeze(view, [dim for dim in concerned if dim not in held])
        if not held:
            self.labels.freeze(core) if concerned and not varying else None
            return
        if outgoing and not self._can_mask(view):
            self.freeze(view, held)
            self.labels.freeze(core)
            return
        met = {key for dim in held for key in self.real(view.name, dim)}
        if outgoing:
            self.uses.update({name for name, _ in met})
            self.outgoing |= {key for key in met if key[0] not in self.buffers}
        if not outgoing or not view.linear:
            self.incoming |= met
        if len(held) == 1:
            plane = _at(view.planes[held[0]], view.axes(held[0]) | varying)
            self.labels.join(self.of[view.name, held[0]][plane], core)
        else:
            self._tabulate(view, tuple(held), core, varying)

    def as_activation(self, view: ParameterView) -> Activation:
        """Return the labels of a parameter that is used like an activation: it can be split along its last axis only.

        A buffer with several dims is data and is not split. A constant can be split along its last axis whose size
        comes from an attribute.
        """
        sized = self._sized.get(view.name, set())
        axes = sorted(axis for dim in view.planes for axis in view.axes(dim) if dim in sized) or sorted(view.extents)
        along = [dim for dim in view.planes if axes and view.axes(dim) == {axes[-1]}]
        if len(along) != 1 or (view.name in self.buffers and len(axes) > 1):
            self.freeze(view)
            return self.labels.constant(view.shape, FROZEN)
        self.freeze(view, [dim for dim in view.planes if dim != along[0]])
        plane = _at(view.planes[along[0]], {axes[-1]})
        return self.labels.activation(self.of[view.name, along[0]][plane].expand(view.shape))

    def names(self, view: ParameterView) -> set[str]:
        """Return the parameters from which a view is made."""
        names = {name for dim in view.planes for name, _ in self.real(view.name, dim)}
        return names - self.buffers

    def _can_mask(self, view: ParameterView) -> bool:
        """Whether the same values of its parameters mask a neuron wherever they are used; records these values."""
        wanted = {name: dict(view.zeros).get(name, 0.0) for name in self.names(view)}
        if not view.zero or any(self.masked_by.get(name, value) != value for name, value in wanted.items()):
            return False
        self.masked_by |= wanted
        return True

    def along(self, view: ParameterView, axis: int) -> Tensor | None:
        """Return the labels of the positions along one axis of a view; None if more than one dim varies along it."""
        dims = [dim for dim in view.planes if axis in view.axes(dim)]
        if len(dims) != 1 or view.axes(dims[0]) != {axis}:
            return None
        return self.of[view.name, dims[0]][_at(view.planes[dims[0]], {axis}).reshape(-1)]

    def settle(self) -> bool:
        """Give each parameter with labels along several dims one dim along which it is cut; return whether any changed.

        A cut is along whole rows or columns, so labels that differ along several dims are joined along all but the
        outermost.
        """
        changed = False
        for table in self._tables:
            roots = self.labels.roots(table.labels)
            if bool((roots == FREE).any()):
                self.labels.freeze(roots)
            value = self.labels.activation(roots)
            if len(value.varying) > 1:
                changed = True
                value = self.labels.join_along(value, sorted(value.varying)[1:])
            for axis, dim in enumerate(table.dims):
                core = value.core if axis in value.varying else torch.full([1], FROZEN)
                own = self.of[table.name, dim]
                before = self.labels.roots(own)
                self.labels.join(own, core.reshape(-1))
                changed = changed or not torch.equal(before, self.labels.roots(own))
        return changed

    def _tabulate(self, view: ParameterView, dims: tuple[int, ...], core: Tensor, axes: set[int]) -> None:
        sizes = [len(self.of[view.name, dim]) for dim in dims]
        keep = axes | {axis for dim in dims for axis in view.axes(dim)}
        spread = [*[_at(view.planes[dim], keep) for dim in dims], core]
        shape = np.broadcast_shapes(*[tensor.shape for tensor in spread])
        *indices, labels = [tensor.expand(shape).reshape(-1) for tensor in spread]
        table = torch.full(sizes, FREE)
        table[tuple(indices)] = labels
        self.labels.join(table[tuple(indices)], labels)  # joins labels that fall on the same element
        self._tables.append(_Table(view.name, dims, table))


def _at(plane: Tensor, axes: set[int]) -> Tensor:
    """Return the plane at position 0 of every axis that is not in `axes`."""
    for axis in range(plane.ndim):
        if axis not in axes:
            plane = plane.narrow(axis, 0, min(1, plane.shape[axis]))
    return plane
