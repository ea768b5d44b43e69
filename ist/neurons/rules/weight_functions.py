"""Rules for functions of weights: a mask, noise, a norm, a product of two matrices.

An elementwise function of weights preserves their neurons: the weights that it combines are cut together. Zeros in
the weights that read a neuron mask it. These zeros come from zero parameters, or from the values at which a function
such as softplus vanishes (`mu + softplus(rho) * noise`). If no parameter values give zeros (`cos(w)`), the weights can
be cut along their outputs, but not along their inputs.

Where it sits: `ist/neurons/rules/operators.py` calls it for operators whose tensor arguments are all weights.
Not here: operators that combine weights with activations (`joins.py`).
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ist.neurons.rules.joins import TraceState, Value, aligned, mix
from ist.neurons.rules.operator_call import Call, frozen
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.tracing.labels import FROZEN, Activation


def of_weights(state: TraceState, call: Call) -> ParameterView | None:
    """Return an elementwise function of weights as weights; None if an argument is not a weight."""
    views = [value for value in call.values if isinstance(value, ParameterView)]
    others = [value for value in call.values if isinstance(value, Activation)]
    if not views or not all(state.labels.is_free(value) or torch.Size(value.shape).numel() == 1 for value in others):
        return None
    if any(not state.labels.is_free(value) and not state.labels.is_frozen(value) for value in others):
        return None
    made = state.positions.combined(views, call.shape())
    zeros = {pair for view in views for pair in view.zeros}
    zero, linear = _behavior(call)
    view = views[0]
    if not zero and len(views) == 1 and view.zero and view.linear and _is_zero(call, _FAR_BELOW):
        # A function such as softplus or exp of one parameter.
        zero, zeros = True, {(name, _FAR_BELOW) for name in state.positions.names(view)}
    zero = zero and len(dict(zeros)) == len(zeros)
    linear = linear and all(view.linear for view in views if view.zero)
    return made._replace(zero=zero, linear=linear, zeros=tuple(sorted(zeros)))


def product(
    state: TraceState, x: ParameterView, w: ParameterView, x_axes: str, w_axes: str, out_axes: str
) -> ParameterView:
    """Return a product of two weights as weights; the summed dims are not split. Axes are as in `contract`."""
    moved = []
    for view, axes in ((x, x_axes), (w, w_axes)):
        state.positions.freeze_along(view, [axis for axis, a in enumerate(axes) if a not in out_axes])
        remaining = {
            dim: plane for dim, plane in view.planes.items() if all(axes[axis] in out_axes for axis in view.axes(dim))
        }
        planes = {dim: aligned(plane, axes, out_axes) for dim, plane in remaining.items()}
        sizes = dict(zip(axes, view.shape, strict=True))
        moved.append(view._replace(planes=planes, shape=tuple(sizes.get(a, 1) for a in out_axes)))
    shape = tuple(max(sizes) for sizes in zip(*[view.shape for view in moved], strict=True))
    zeros = tuple({*x.zeros, *w.zeros})
    return state.positions.combined(moved, shape)._replace(zero=x.zero and w.zero, linear=False, zeros=zeros)


def reduced(state: TraceState, view: ParameterView, axes: set[int], keepdim: bool, name: str) -> ParameterView | None:
    """Return a reduction of weights as weights; the reduced dims are not split. None if no other dim is left."""
    state.positions.freeze_along(view, axes)
    planes = {dim: plane for dim, plane in view.planes.items() if view.axes(dim) and not view.axes(dim) & axes}
    if not planes:
        return None
    for axis in sorted(axes, reverse=True):
        planes = {d: p.narrow(axis, 0, 1) if keepdim else p.select(axis, 0) for d, p in planes.items()}
    sizes = [1 if axis in axes else size for axis, size in enumerate(view.shape) if keepdim or axis not in axes]
    zero = view.zero and not view.zeros and name in _KEEPING_ZERO
    return ParameterView(view.name, planes, tuple(sizes), zero, view.linear and name in ("sum", "mean"))


_KEEPING_ZERO = ("sum", "mean", "norm", "linalg_vector_norm", "amax", "amin", "std", "var")


def weight_norm(state: TraceState, call: Call) -> Sequence[Value]:
    """Weight norm: `g * v / |v|`, with one norm per position along a dim."""
    direction, size, dim = call.args["v"], call.args["g"], call.args["dim"] % len(call.args["v"].shape)
    norms = state.labels.constant(call.shape(1), FROZEN)
    if not isinstance(direction, ParameterView) or not isinstance(size, ParameterView):
        for value in (direction, size):
            state.labels.freeze(state.activation(value).core)
        return [state.labels.constant(call.shape(), FROZEN), norms]
    state.positions.freeze_along(direction, set(range(len(direction.shape))) - {dim})
    return [state.positions.combined([direction, size], call.shape())._replace(zero=False, linear=False), norms]


def bilinear(state: TraceState, call: Call) -> Sequence[Value]:
    """A bilinear layer: each output is a weighted sum of all products of one input from each side."""
    weight = call.args["i2"]
    sides = [state.activation(mix(state, call.args[name], {0})) for name in ("i1", "i3")]
    given = [call.args[name] for name in ("expand1", "expand2", "expand3", "sumdim")]
    if not isinstance(weight, ParameterView) or given != [[1, 3], [0], [1, 2], [2, 3]]:
        for value in call.values:
            state.labels.freeze(state.activation(value).core)
        return frozen(state, call)
    made = state.labels.fresh(weight.shape[0])
    state.positions.use(weight, made[:, None, None], {0})
    for axis, side in enumerate(sides, start=1):
        labels = side.core[0].reshape([-1 if a == axis else 1 for a in range(3)])
        state.positions.use(weight._replace(linear=False), labels, {axis}, outgoing=True)
    depth = max(side.depth for side in sides) + 1
    return [state.labels.activation(made.expand(call.shape()), depth)]


_FAR_BELOW = -1e4
_SCALES = ((0.3, 0.6), (3.0, 6.0), (-3.0, -6.0))


def _is_zero(call: Call, parameter: float = 0.0) -> bool:
    """Whether an elementwise function is zero where its parameters have one value, for all values of its masks."""
    return _holds(call, lambda run: bool((run(parameter) == 0).all()))


def _behavior(call: Call) -> tuple[bool, bool]:
    """Whether an elementwise function is zero where its parameters are, and whether it doubles when they double."""

    def doubles(run: Callable[[float], Tensor]) -> bool:
        return all(bool(torch.isclose(2 * run(once), run(twice)).all()) for once, twice in _SCALES)

    zero = _is_zero(call)
    return zero, zero and _holds(call, doubles)


def _holds(call: Call, check: Callable[[Callable[[float], Tensor]], bool]) -> bool:
    """Whether a check holds for an operator on single numbers, for all values of its masks."""
    tensors = [(name, item) for name, item in call.args.items() if isinstance(item, Activation | ParameterView)]
    if len(tensors) != len(call.values):  # lists of tensors
        return False
    masks = [name for name, _ in tensors if call.raw[name].dtype == torch.bool]
    try:
        for values in itertools.product((True, False), repeat=len(masks)):
            if not check(partial(_run, call, tensors, dict(zip(masks, values, strict=True)))):
                return False
        return True
    except (RuntimeError, TypeError, ValueError):
        return False


def _run(call: Call, tensors: Sequence[tuple[str, Value]], masks: dict[str, bool], parameter: float) -> Tensor:
    """Run an operator on single numbers: parameters have the given value, all other arguments a fixed one."""
    arguments: dict[str, Any] = dict(call.raw)
    for name, item in tensors:
        dtype = call.raw[name].dtype
        of_parameters = isinstance(item, ParameterView) and item.zero
        value = masks.get(name, parameter if of_parameters else 0.37)
        arguments[name] = torch.full((1,), value, dtype=dtype if not dtype.is_floating_point else torch.float64)
        if not of_parameters and not dtype.is_floating_point and name not in masks:
            arguments[name].fill_(1)
    made: Tensor = call.operator(**arguments)
    return made.double()
