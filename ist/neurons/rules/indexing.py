"""Rules of the operators that read or write at positions given by other tensors.

The positions are unknown, so labels are joined along the indexed dims.

Where it sits: `ist/neurons/rules/operators.py` has the table of rules.
Not here: indexing by slices, which only moves data (`operators.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ist.neurons.rules.joins import TraceState, Value, elementwise, mix
from ist.neurons.rules.operator_call import Call, frozen, resized
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.tracing.labels import Activation, slim
from ist.neurons.tracing.untaken_paths import not_empty


def gather(state: TraceState, call: Call) -> Sequence[Value]:
    """Elements at unknown positions along one dim."""
    value = call.args["self"]
    dim = call.args["dim"] % max(1, len(value.shape))
    state.labels.freeze(state.activation(call.args["index"]).core)
    if isinstance(value, ParameterView):
        state.positions.freeze_along(value, {dim})
        planes = {
            d: p.narrow(dim, 0, 1).expand(call.shape()) for d, p in value.planes.items() if dim not in value.axes(d)
        }
        return [value._replace(planes=planes, shape=call.shape())] if planes else frozen(state, call)
    return resized(state, call._replace(args={"self": value}), {dim})


def index(state: TraceState, call: Call) -> Sequence[Value]:
    """Indexing by tensors: labels are joined along the indexed dims, so that any position represents the others."""
    value, indices = call.args["self"], call.args["indices"]
    indexed = {dim for dim, where in enumerate(indices) if where is not None}
    raw = [None if i is None else _stand_in(i) for i in call.raw["indices"]]
    for where in indices:
        if where is not None:
            state.labels.freeze(state.activation(where).core)
    if isinstance(value, ParameterView):
        state.positions.freeze_along(value, indexed)
        planes = {d: call.operator(p, raw) for d, p in value.planes.items() if not indexed & value.axes(d)}
        moved = {dim: slim(plane).expand(plane.shape) for dim, plane in planes.items()}
        return [value._replace(planes=moved, shape=call.shape())] if moved else frozen(state, call)
    mixed = state.labels.join_along(state.labels.reduced(value), indexed)
    return [state.labels.activation(call.operator(mixed.full, raw), value.depth)]


def _stand_in(index: Tensor) -> Tensor | None:
    return torch.zeros(index.shape, dtype=torch.int64) if index.device.type == "meta" else not_empty(index)


def scatter(state: TraceState, call: Call) -> Sequence[Value]:
    """Elements added or written at unknown positions of one dim of another tensor."""
    target = call.args["self"]
    dim = call.args["dim"] % max(1, len(target.shape))
    source = call.args.get("src", call.args.get("source"))
    into = state.activation(mix(state, target, {dim}))
    if not isinstance(source, Activation | ParameterView):
        return [into]
    brought = state.activation(mix(state, source, {dim}))
    core = brought.core.narrow(dim, 0, 1)
    shape = tuple(1 if d == dim else size for d, size in enumerate(into.shape))
    same_size = all(d == dim or size == into.shape[d] for d, size in enumerate(brought.shape))
    if not same_size:
        state.labels.freeze(core)
        state.labels.freeze(into.core)
        return frozen(state, call)
    slim = Activation(core, shape, brought.depth)
    made = state.activation(elementwise(state, [Activation(into.core, shape, into.depth), slim], shape))
    return [Activation(made.core, into.shape, made.depth)]


def copy(state: TraceState, call: Call) -> Sequence[Value]:
    """Another tensor's elements, copied over all of this one."""
    target, source = call.args["self"], call.args["src"]
    if isinstance(target, ParameterView) and isinstance(source, ParameterView):
        made = state.positions.combined([target, source], call.shape())
        return [made._replace(zero=source.zero, linear=source.linear, zeros=source.zeros)]
    source = state.activation(source)
    return [state.labels.activation(source.full.expand(call.shape()), source.depth)]


def index_put(state: TraceState, call: Call) -> Sequence[Value]:
    """Writing at positions given by tensors; labels survive only if one index tensor covers the leading dim."""
    indices = call.args["indices"]
    one = len(indices) == 1 or all(index is None for index in indices[1:])
    target, source = state.activation(call.args["self"]), state.activation(call.args["values"])
    if one and len(source.shape) == len(target.shape) and len(call.raw["indices"][0].shape) == 1:
        args = {"self": target, "dim": 0, "source": source}
        return scatter(state, call._replace(args=args))
    state.labels.freeze(source.core)
    state.labels.freeze(target.core)
    return frozen(state, call)


def looked_up(state: TraceState, call: Call) -> Sequence[Value]:
    """Positions or values that depend on all of a tensor, so it is not split."""
    for value in call.values:
        state.labels.freeze(state.activation(value).core)
    return frozen(state, call)
