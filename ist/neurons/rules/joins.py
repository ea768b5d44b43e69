"""Join labels where tensors are combined: elementwise, in a product, in a weighted sum.

All rules keep one invariant. If a worker holds the label of an element, it can compute the element from what it
holds. If it does not, the element is absent, and what the worker holds depends on it only through parameters that
are cut together with it. Where a rule does not know a finer answer, it joins or freezes labels: that is always safe.

Where it sits: `ist/neurons/rules/operators.py` maps operators to these functions.
Not here: the positions of parameters (`ist/neurons/rules/parameter_views.py`).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ist.neurons.rules.parameter_views import ParameterView, PositionLabels
from ist.neurons.tracing.labels import FREE, FROZEN, Activation, Labels, Shape

Value = Activation | ParameterView


@dataclass
class TraceState:
    """The state of a trace, which the rules change.

    Attributes:
        labels: The labels, and which of them are joined.
        positions: The labels of the positions of parameters.
        heads: Labels that were joined in a product of activations, as in attention heads.
        residual: Labels of sums of activations of different depth, as in residual streams.
        forms: Activations whose labels vary along several dims; a cut must be a box.
        sized: For the storage of a constant that the forward makes, the dims whose size comes from an attribute.
        runs: How many times the network ran.
    """

    labels: Labels = field(default_factory=Labels)
    positions: PositionLabels = field(init=False)
    heads: list[Tensor] = field(default_factory=list)
    residual: list[Tensor] = field(default_factory=list)
    forms: list[Activation] = field(default_factory=list)
    sized: dict[int, set[int]] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self) -> None:
        self.positions = PositionLabels(self.labels)

    def activation(self, value: Value) -> Activation:
        """Return a value as an activation with its current labels."""
        return self.positions.as_activation(value) if isinstance(value, ParameterView) else self.labels.reduced(value)

    def settle(self) -> None:
        """Join labels until every cut is a box."""
        while True:
            changed = self.positions.settle()
            for form in self.forms:
                value = self.labels.reduced(form)
                if len(value.varying) > 1:
                    changed = True
                    self.labels.join_along(value, sorted(value.varying)[1:])
            if not changed:
                return


def elementwise(state: TraceState, values: list[Value], shape: Shape, is_sum: bool = False) -> Value:
    """Return the labels of an elementwise function of several tensors that broadcast to `shape`."""
    if len(values) == 1 and isinstance(values[0], ParameterView) and values[0].shape == shape:
        return values[0]
    views = [value for value in values if isinstance(value, ParameterView)]
    found = [state.activation(value) for value in values if not isinstance(value, ParameterView)]
    if all(state.labels.is_free(value) for value in found) and views:
        found.append(state.activation(views.pop(0)))
    result, extents = _broadcast(found[0], shape), _extents(found[0], shape)
    for value in found[1:]:
        result = _pair(state, result, extents, _broadcast(value, shape), _extents(value, shape), is_sum)
        extents |= _extents(value, shape)
    for view in views:
        result = with_parameter(state, result, view)
    return result


def _broadcast(value: Activation, shape: Shape) -> Activation:
    """The same labels with leading dims added; dims of size 1 stay so in the core."""
    core = value.core.reshape((1,) * (len(shape) - value.core.ndim) + tuple(value.core.shape))
    return Activation(core, shape, value.depth)


def _extents(value: Activation, shape: Shape) -> set[int]:
    """The dims of `shape` along which a value has its own elements and is not broadcast."""
    lead = len(shape) - len(value.shape)
    return {lead + dim for dim, size in enumerate(value.shape) if size > 1}


def _pair(
    state: TraceState, a: Activation, a_extents: set[int], b: Activation, b_extents: set[int], is_sum: bool
) -> Activation:
    labels = state.labels
    depth = max(a.depth, b.depth)
    if labels.is_free(a) or labels.is_free(b):
        return (a if labels.is_free(b) else b)._replace(depth=depth)
    joined = meet(state, a, b, a_extents, b_extents)
    if is_sum and a.depth != b.depth and not labels.is_frozen(joined):
        state.residual.append(joined.core)
    return joined._replace(shape=a.shape, depth=depth)


def meet(state: TraceState, a: Activation, b: Activation, a_extents: set[int], b_extents: set[int]) -> Activation:
    """Join the labels of two activations that are combined element by element.

    Args:
        state: The state of the trace; it is changed.
        a: Labels, with the common number of dims.
        b: Labels, with the common number of dims.
        a_extents: Dims along which `a` has its own elements and is not broadcast.
        b_extents: The same for `b`.

    Returns:
        The labels of the result.
    """
    labels = state.labels
    if labels.is_frozen(a) or labels.is_frozen(b):
        other, extents = (b, a_extents) if labels.is_frozen(a) else (a, b_extents)
        # Along the dims of the frozen activation, the other one cannot be split either.
        return other if labels.is_frozen(other) else labels.join_along(other, extents & other.varying)
    a_lacks, b_lacks = b.varying - a_extents, a.varying - b_extents
    if a_lacks and b_lacks:
        if a.varying & b.varying:
            return meet(state, labels.join_along(a, b_lacks), labels.join_along(b, a_lacks), a_extents, b_extents)
        less = a if a.core.numel() < b.core.numel() else b
        labels.freeze(less.core)
        return meet(state, labels.reduced(a), labels.reduced(b), a_extents, b_extents)
    if a_lacks or b_lacks:
        short, wide, extents = (b, a, b_extents) if b_lacks else (a, b, a_extents)
        if short.varying and min(wide.varying) in extents:
            wide = labels.join_along(wide, wide.varying - extents)
            labels.join(wide.core, short.core)
        else:
            labels.freeze(short.core)
            wide = labels.join_along(wide, extents & wide.varying)
        return labels.reduced(wide)
    shape = np.broadcast_shapes(a.core.shape, b.core.shape)
    first, second = a.core.expand(shape), b.core.expand(shape)
    # An element may combine a frozen and a split label only where the frozen one is broadcast.
    frozen_first, frozen_second = first == FROZEN, second == FROZEN
    if b.varying & a_extents:
        labels.freeze(second[frozen_first])
    if a.varying & b_extents:
        labels.freeze(first[frozen_second])
    both = ~frozen_first & ~frozen_second
    labels.join(first[both], second[both])
    chosen = torch.where(frozen_first | (first == FREE), second, first)
    return labels.reduced(Activation(chosen, a.shape))


def with_parameter(state: TraceState, value: Activation, view: ParameterView) -> Activation:
    """Join the labels of an activation with those of a parameter that scales or shifts it, such as a bias."""
    labels = state.labels
    value = labels.reduced(value)
    lead = len(value.shape) - len(view.shape)
    extents = {lead + axis for axis in view.extents}
    lacking = value.varying - extents
    if lacking and value.varying & extents and min(value.varying) in extents:
        value, lacking = labels.join_along(value, lacking), set()
    if lacking or not value.varying or labels.is_frozen(value):
        state.positions.freeze(view)
        return labels.join_along(value, extents & value.varying)
    own = value.core
    for _ in range(lead):
        own = own.select(0, 0)
    state.positions.use(view, own, range(len(view.shape)))
    return labels.reduced(value)


def mix(state: TraceState, value: Value, axes: set[int]) -> Value:
    """Return the labels after an operator that makes every element depend on all others along some axes."""
    if isinstance(value, ParameterView):
        state.positions.freeze_along(value, axes)
        return value
    return state.labels.join_along(state.labels.reduced(value), axes)


def contract(
    state: TraceState, x: Value, w: Value, x_axes: str, w_axes: str, out_axes: str, shape: Shape
) -> Activation:
    """Return the labels of a sum of products, with the axes named by letters as in einsum.

    Args:
        state: The state of the trace; it is changed.
        x: The first tensor.
        w: The second tensor; the parameter if only one of them is a parameter.
        x_axes: A letter for each of the dims of `x`.
        w_axes: A letter for each of the dims of `w`.
        out_axes: The letters of the result.
        shape: The result's shape.
    """
    x, w = (
        state.activation(v) if isinstance(v, ParameterView) and state.positions.is_constant(v) else v for v in (x, w)
    )
    if isinstance(x, ParameterView) and not isinstance(w, ParameterView):
        x, w, x_axes, w_axes = w, x, w_axes, x_axes
    activation = state.activation(x)
    if isinstance(w, ParameterView):
        return _weighted_sum(state, activation, w, x_axes, w_axes, out_axes, shape)
    return _product(state, activation, state.activation(w), x_axes, w_axes, out_axes, shape)


def _weighted_sum(
    state: TraceState, x: Activation, w: ParameterView, x_axes: str, w_axes: str, out_axes: str, shape: Shape
) -> Activation:
    labels, depth = state.labels, x.depth + 1
    contracted = {a for a in x_axes if a in w_axes and a not in out_axes}
    batch = {a for a in x_axes if a in w_axes and a in out_axes}
    varying = {x_axes[dim] for dim in x.varying}
    if varying & set(out_axes) - batch:
        # Several neurons share these weights: the weights are not split, and all inputs of a neuron stay together.
        x = labels.join_along(x, [x_axes.index(a) for a in contracted])
        state.positions.freeze(w)
        return _relabelled(labels, x, x_axes, out_axes, shape, depth)
    if varying & contracted and varying & batch:
        x = labels.join_along(x, [x_axes.index(a) for a in batch])
        varying = {x_axes[dim] for dim in x.varying}
    x_labels = aligned(x.core, x_axes, w_axes)
    if varying & batch:
        state.positions.use(w, x_labels, [w_axes.index(a) for a in batch])
        state.positions.freeze_along(w, [axis for axis, a in enumerate(w_axes) if a not in batch])
        return _relabelled(labels, x, x_axes, out_axes, shape, depth)
    if not labels.is_free(x):
        state.positions.use(w, x_labels, [w_axes.index(a) for a in contracted], outgoing=True)
    rows = [a for a in w_axes if a in out_axes and a not in batch]
    fresh = labels.fresh(*[w.shape[w_axes.index(a)] for a in rows])
    state.positions.use(w, aligned(fresh, "".join(rows), w_axes), [w_axes.index(a) for a in rows])
    state.positions.freeze_along(w, [w_axes.index(a) for a in batch])
    return _relabelled(labels, Activation(fresh, tuple(fresh.shape)), "".join(rows), out_axes, shape, depth)


def _product(
    state: TraceState, x: Activation, w: Activation, x_axes: str, w_axes: str, out_axes: str, shape: Shape
) -> Activation:
    labels = state.labels
    every = out_axes + "".join(sorted(set(x_axes + w_axes) - set(out_axes)))
    sides = []
    for value, axes in ((x, x_axes), (w, w_axes)):
        core = aligned(value.core, axes, every)
        extents = {every.index(a) for a, size in zip(axes, value.shape, strict=True) if size > 1}
        sides.append((Activation(core, tuple(core.shape), value.depth), extents))
    (first, first_extents), (second, second_extents) = sides
    both = not labels.is_frozen(first) and not labels.is_frozen(second)
    met = meet(state, first, second, first_extents, second_extents)
    met = labels.join_along(met, range(len(out_axes), len(every)))
    if both and not labels.is_frozen(met):
        state.heads.append(met.core)
    return _relabelled(labels, met, every, out_axes, shape, max(x.depth, w.depth))


def aligned(core: Tensor, axes: str, wanted: str) -> Tensor:
    """Return labels or a plane with dims in the order of `wanted`: missing dims get size 1, other dims are dropped."""
    for axis in reversed(range(core.ndim)):
        if axes[axis] not in wanted:
            core, axes = core.select(axis, 0), axes[:axis] + axes[axis + 1 :]
    core = core.permute([axes.index(a) for a in wanted if a in axes])
    for position, a in enumerate(wanted):
        if a not in axes:
            core = core.unsqueeze(position)
    return core


def _relabelled(labels: Labels, x: Activation, x_axes: str, out_axes: str, shape: Shape, depth: int) -> Activation:
    return labels.reduced(Activation(aligned(x.core, x_axes, out_axes), shape, depth))
