"""Functions of weights: a mask, noise, a norm, a product of two matrices.

An elementwise function of weights keeps their neurons: what it combines is cut alike. A neuron is masked by zeros in
the weights that read it: by zeros of their parameters, or by the values where a function such as softplus vanishes
(`mu + softplus(rho) * noise`). Where no values of the parameters make zeros (`cos(w)`), the weights can still be cut
along what they make, but not along what they read.

Where it sits: `ist/neurons/rules/operators.py` asks for operators whose arguments are all weights.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ist.neurons.rules.joins import Scene, Value, aligned, mix
from ist.neurons.rules.operator_call import Call, frozen
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.tracing.labels import FROZEN, Activation


def of_weights(scene: Scene, call: Call) -> ParameterView | None:
    """Return an elementwise function of weights as weights; None if something else is among the arguments."""
    views = [value for value in call.values if isinstance(value, ParameterView)]
    others = [value for value in call.values if isinstance(value, Activation)]
    if not views or not all(scene.labels.is_free(value) or torch.Size(value.shape).numel() == 1 for value in others):
        return None
    if any(not scene.labels.is_free(value) and not scene.labels.is_frozen(value) for value in others):
        return None
    made = scene.atoms.combined(views, call.shape())
    zeros = {pair for view in views for pair in view.zeros}
    zero, linear = _behaviour(call)
    view = views[0]
    if not zero and len(views) == 1 and view.zero and view.linear and _is_zero(call, _FAR_BELOW):
        # The parameter itself, in a function such as softplus or exp.
        zero, zeros = True, {(name, _FAR_BELOW) for name in scene.atoms.names(view)}
    zero = zero and len(dict(zeros)) == len(zeros)
    linear = linear and all(view.linear for view in views if view.zero)
    return made._replace(zero=zero, linear=linear, zeros=tuple(sorted(zeros)))


def product(scene: Scene, x: ParameterView, w: ParameterView, x_axes: str, w_axes: str, out_axes: str) -> ParameterView:
    """Return a product of two weights as weights: what is summed over stays whole; axes are as in `contract`."""
    moved = []
    for view, axes in ((x, x_axes), (w, w_axes)):
        scene.atoms.freeze_along(view, [axis for axis, a in enumerate(axes) if a not in out_axes])
        kept = {
            dim: plane for dim, plane in view.planes.items() if all(axes[axis] in out_axes for axis in view.axes(dim))
        }
        planes = {dim: aligned(plane, axes, out_axes) for dim, plane in kept.items()}
        sizes = dict(zip(axes, view.shape, strict=True))
        moved.append(view._replace(planes=planes, shape=tuple(sizes.get(a, 1) for a in out_axes)))
    shape = tuple(max(sizes) for sizes in zip(*[view.shape for view in moved], strict=True))
    zeros = tuple({*x.zeros, *w.zeros})
    return scene.atoms.combined(moved, shape)._replace(zero=x.zero and w.zero, linear=False, zeros=zeros)


def reduced(scene: Scene, view: ParameterView, axes: set[int], keepdim: bool, name: str) -> ParameterView | None:
    """Return a reduction of weights as weights: what is reduced stays whole. None if nothing else is left."""
    scene.atoms.freeze_along(view, axes)
    planes = {dim: plane for dim, plane in view.planes.items() if view.axes(dim) and not view.axes(dim) & axes}
    if not planes:
        return None
    for axis in sorted(axes, reverse=True):
        planes = {d: p.narrow(axis, 0, 1) if keepdim else p.select(axis, 0) for d, p in planes.items()}
    kept = [1 if axis in axes else size for axis, size in enumerate(view.shape) if keepdim or axis not in axes]
    zero = (
        view.zero
        and not view.zeros
        and name in ("sum", "mean", "norm", "linalg_vector_norm", "amax", "amin", "std", "var")
    )
    return ParameterView(view.name, planes, tuple(kept), zero, view.linear and name in ("sum", "mean"))


_KEEPING_ZERO = ("sum", "mean", "norm", "linalg_vector_norm", "amax", "amin", "std", "var")


def weight_norm(scene: Scene, call: Call) -> Sequence[Value]:
    """`g * v / |v|`, with one norm for each position along a dim."""
    direction, size, dim = call.args["v"], call.args["g"], call.args["dim"] % len(call.args["v"].shape)
    norms = scene.labels.constant(call.shape(1), FROZEN)
    if not isinstance(direction, ParameterView) or not isinstance(size, ParameterView):
        for value in (direction, size):
            scene.labels.freeze(scene.activation(value).core)
        return [scene.labels.constant(call.shape(), FROZEN), norms]
    scene.atoms.freeze_along(direction, set(range(len(direction.shape))) - {dim})
    return [scene.atoms.combined([direction, size], call.shape())._replace(zero=False, linear=False), norms]


def bilinear(scene: Scene, call: Call) -> Sequence[Value]:
    """The sums of a bilinear layer: each output weighs every product of one input of each side."""
    weight = call.args["i2"]
    sides = [scene.activation(mix(scene, call.args[name], {0})) for name in ("i1", "i3")]
    given = [call.args[name] for name in ("expand1", "expand2", "expand3", "sumdim")]
    if not isinstance(weight, ParameterView) or given != [[1, 3], [0], [1, 2], [2, 3]]:
        for value in call.values:
            scene.labels.freeze(scene.activation(value).core)
        return frozen(scene, call)
    made = scene.labels.fresh(weight.shape[0])
    scene.atoms.use(weight, made[:, None, None], {0})
    for axis, side in enumerate(sides, start=1):
        labels = side.core[0].reshape([-1 if a == axis else 1 for a in range(3)])
        scene.atoms.use(weight._replace(linear=False), labels, {axis}, outgoing=True)
    depth = max(side.depth for side in sides) + 1
    return [scene.labels.activation(made.expand(call.shape()), depth)]


_FAR_BELOW = -1e4
_SCALES = ((0.3, 0.6), (3.0, 6.0), (-3.0, -6.0))


def _is_zero(call: Call, parameter: float = 0.0) -> bool:
    """Whether an elementwise function is zero where its parameters have a value, whatever its masks are."""
    return _holds(call, lambda run: bool((run(parameter) == 0).all()))


def _behaviour(call: Call) -> tuple[bool, bool]:
    """Whether an elementwise function is zero where its parameters are, and whether it doubles when they double."""

    def doubles(run: Callable[[float], Tensor]) -> bool:
        return all(bool(torch.isclose(2 * run(once), run(twice)).all()) for once, twice in _SCALES)

    zero = _is_zero(call)
    return zero, zero and _holds(call, doubles)


def _holds(call: Call, check: Callable[[Callable[[float], Tensor]], bool]) -> bool:
    """Whether something holds for an operator on single numbers, for all values of its masks."""
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
    """Run an operator on single numbers: parameters have the given value, everything else another one."""
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
