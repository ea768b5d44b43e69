"""Rules of the operators that read or write at positions given by other tensors.

Nobody knows which positions, so labels are joined along the indexed dims.

Where it sits: `ist/neurons/rules/operators.py` has the table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ist.neurons.rules.joins import Scene, Value, elementwise, mix
from ist.neurons.rules.operator_call import Call, frozen, resized
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.tracing.labels import Activation, slim
from ist.neurons.tracing.untaken_paths import not_empty


def gather(scene: Scene, call: Call) -> Sequence[Value]:
    """Elements picked along one dim, nobody knows which."""
    value = call.args["self"]
    dim = call.args["dim"] % max(1, len(value.shape))
    scene.labels.freeze(scene.activation(call.args["index"]).core)
    if isinstance(value, ParameterView):
        scene.atoms.freeze_along(value, {dim})
        planes = {
            d: p.narrow(dim, 0, 1).expand(call.shape()) for d, p in value.planes.items() if dim not in value.axes(d)
        }
        return [value._replace(planes=planes, shape=call.shape())] if planes else frozen(scene, call)
    return resized(scene, call._replace(args={"self": value}), {dim})


def index(scene: Scene, call: Call) -> Sequence[Value]:
    """Indexing by tensors: labels are joined along the indexed dims, so that any position does for the others."""
    value, indices = call.args["self"], call.args["indices"]
    indexed = {dim for dim, where in enumerate(indices) if where is not None}
    raw = [None if i is None else _stand_in(i) for i in call.raw["indices"]]
    for where in indices:
        if where is not None:
            scene.labels.freeze(scene.activation(where).core)
    if isinstance(value, ParameterView):
        scene.atoms.freeze_along(value, indexed)
        planes = {d: call.operator(p, raw) for d, p in value.planes.items() if not indexed & value.axes(d)}
        moved = {dim: slim(plane).expand(plane.shape) for dim, plane in planes.items()}
        return [value._replace(planes=moved, shape=call.shape())] if moved else frozen(scene, call)
    mixed = scene.labels.join_along(scene.labels.reduced(value), indexed)
    return [scene.labels.activation(call.operator(mixed.full, raw), value.depth)]


def _stand_in(index: Tensor) -> Tensor | None:
    return torch.zeros(index.shape, dtype=torch.int64) if index.device.type == "meta" else not_empty(index)


def scatter(scene: Scene, call: Call) -> Sequence[Value]:
    """Elements added or written at unknown positions of one dim of another tensor."""
    target = call.args["self"]
    dim = call.args["dim"] % max(1, len(target.shape))
    source = call.args.get("src", call.args.get("source"))
    into = scene.activation(mix(scene, target, {dim}))
    if not isinstance(source, Activation | ParameterView):
        return [into]
    brought = scene.activation(mix(scene, source, {dim}))
    core = brought.core.narrow(dim, 0, 1)
    shape = tuple(1 if d == dim else size for d, size in enumerate(into.shape))
    fits = all(d == dim or size == into.shape[d] for d, size in enumerate(brought.shape))
    if not fits:
        scene.labels.freeze(core)
        scene.labels.freeze(into.core)
        return frozen(scene, call)
    slim = Activation(core, shape, brought.depth)
    made = scene.activation(elementwise(scene, [Activation(into.core, shape, into.depth), slim], shape))
    return [Activation(made.core, into.shape, made.depth)]


def copy(scene: Scene, call: Call) -> Sequence[Value]:
    """Another tensor's elements, written over all of this one."""
    target, source = call.args["self"], call.args["src"]
    if isinstance(target, ParameterView) and isinstance(source, ParameterView):
        made = scene.atoms.combined([target, source], call.shape())
        return [made._replace(zero=source.zero, linear=source.linear, zeros=source.zeros)]
    source = scene.activation(source)
    return [scene.labels.activation(source.full.expand(call.shape()), source.depth)]


def index_put(scene: Scene, call: Call) -> Sequence[Value]:
    """Writing at positions given by tensors: only along whole leading dims."""
    indices = call.args["indices"]
    one = len(indices) == 1 or all(index is None for index in indices[1:])
    target, source = scene.activation(call.args["self"]), scene.activation(call.args["values"])
    if one and len(source.shape) == len(target.shape) and len(call.raw["indices"][0].shape) == 1:
        args = {"self": target, "dim": 0, "source": source}
        return scatter(scene, call._replace(args=args))
    scene.labels.freeze(source.core)
    scene.labels.freeze(target.core)
    return frozen(scene, call)


def looked_up(scene: Scene, call: Call) -> Sequence[Value]:
    """Positions or values that are found by looking at all of a tensor: it stays whole."""
    for value in call.values:
        scene.labels.freeze(scene.activation(value).core)
    return frozen(scene, call)
