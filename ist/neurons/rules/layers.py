"""Rules of the operators in layers: products with weights, convolutions, norms, pooling, embeddings.

Where it sits: `ist/neurons/rules/operators.py` has the table of rules.
Not here: elementwise operators and reductions (`operators.py`).
"""

from collections.abc import Sequence

from ist.neurons.rules.joins import TraceState, Value, contract, elementwise, mix, with_parameter
from ist.neurons.rules.operator_call import Call, Rule, resized
from ist.neurons.rules.parameter_views import ParameterView, is_repeated
from ist.neurons.rules.weight_functions import product
from ist.neurons.tracing.labels import FROZEN, Activation, Shape


def pool(state: TraceState, call: Call) -> Sequence[Value]:
    """Pooling, resizing and padding of images: positions mix, channels do not."""
    spatial = int(next(char for char in call.name if char.isdigit()))
    ndim = len(call.values[0].shape)
    return resized(state, call, set(range(ndim - spatial, ndim)))


def pad(state: TraceState, call: Call) -> Sequence[Value]:
    """Padding: padded dims are not split."""
    value, pad = state.activation(call.values[0]), call.args["pad"]
    ndim = len(value.shape)
    padded = {ndim - 1 - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1]}
    return resized(state, call._replace(args={"self": value}), padded)


def batch_norm(state: TraceState, call: Call) -> Sequence[Value]:
    """Batch norm: each channel is normalized separately."""
    value = call.values[0]
    mixed = mix(state, value, set(range(len(value.shape))) - {1})
    for vector in call.values[1:]:
        mixed = _scaled(state, mixed, vector, 1)
    return _with_statistics(state, call, mixed)


def layer_norm(state: TraceState, call: Call) -> Sequence[Value]:
    """Layer norm: everything that is normalized together belongs together."""
    value, width = call.values[0], len(call.args["normalized_shape"])
    ndim = len(value.shape)
    mixed = mix(state, value, set(range(ndim - width, ndim)))
    for vector in call.values[1:]:
        mixed = elementwise(state, [mixed, vector], value.shape)
    return _with_statistics(state, call, mixed)


def group_norm(state: TraceState, call: Call) -> Sequence[Value]:
    """Group norm: the channels of a group belong together."""
    value, groups = state.activation(call.values[0]), call.args["group"]
    full = value.full
    grouped = state.labels.activation(full.reshape(full.shape[0], groups, -1))
    joined = state.labels.join_along(grouped, {2})
    mixed: Value = state.labels.activation(joined.full.reshape(full.shape), value.depth)
    for vector in call.values[1:]:
        mixed = _scaled(state, mixed, vector, 1)
    return _with_statistics(state, call, mixed)


def _scaled(state: TraceState, value: Value, vector: Value, axis: int) -> Value:
    """Join a vector along one axis of an activation."""
    if isinstance(value, ParameterView):
        state.positions.freeze(value)
        value = state.activation(value)
    after = (1,) * (len(value.shape) - axis - 1)
    shape = (len(state.activation(vector).full), *after)
    if isinstance(vector, ParameterView):
        planes = {dim: plane.view(shape) for dim, plane in vector.planes.items()}
        return with_parameter(state, value, vector._replace(planes=planes, shape=shape))
    return elementwise(state, [value, Activation(vector.full.reshape(shape), shape, vector.depth)], value.shape)


def _with_statistics(state: TraceState, call: Call, value: Value) -> Sequence[Value]:
    """The normalized result, and means and deviations that no network uses."""
    rest = [state.labels.constant(tuple(result.shape), FROZEN) for result in call.results[1:]]
    return [value, *rest]


def matmul(x_axes: str, w_axes: str, out_axes: str, first: str = "self", second: str = "mat2") -> Rule:
    """Return the rule of a matrix product, with its axes named as in einsum."""

    def rule(state: TraceState, call: Call) -> Sequence[Value]:
        x, w = call.args[first], call.args[second]
        if (
            first == "self"
            and isinstance(x, ParameterView)
            and isinstance(w, ParameterView)
            and not any(state.positions.is_constant(view) or is_repeated(view) for view in (x, w))
        ):
            return [product(state, x, w, x_axes, w_axes, out_axes)]
        made: Value = contract(state, x, w, x_axes, w_axes, out_axes, call.shape())
        if first != "self" and call.args.get("beta", 1) != 0:
            made = elementwise(state, [made, call.args["self"]], call.shape())
        return [made]

    return rule


def convolution(state: TraceState, call: Call) -> Sequence[Value]:
    """Convolution: a weighted sum over channels; spatial positions mix."""
    x, w, groups, transposed = call.args["input"], call.args["weight"], call.args["groups"], call.args["transposed"]
    shape = call.shape()
    mixed = mix(state, x, set(range(2, len(shape))))
    channels = state.activation(mixed)
    flat = Activation(channels.core.reshape(channels.core.shape[:2]), channels.shape[:2], channels.depth)
    kernel = set(range(2, len(w.shape)))
    filters = mix(state, w, kernel)
    if isinstance(filters, ParameterView):
        filters = _without(filters, kernel)
    else:
        filters = Activation(filters.core.reshape(filters.core.shape[:2]), filters.shape[:2], filters.depth)
    if groups == 1:
        made = contract(state, flat, filters, "nc", "co" if transposed else "oc", "no", shape[:2])
    else:
        made = _grouped(state, flat, filters, groups, shape[:2], transposed)
    core = made.core.reshape(*made.core.shape, *([1] * (len(shape) - 2)))
    result: Value = Activation(core, shape, made.depth)
    bias = call.args.get("bias")
    return [result if bias is None else _scaled(state, result, bias, 1)]


def _without(view: ParameterView, axes: set[int]) -> ParameterView:
    """Return a view without some axes, at their position 0."""
    planes = view.planes
    for axis in sorted(axes, reverse=True):
        planes = {dim: plane.select(axis, 0) for dim, plane in planes.items()}
    shape = tuple(size for axis, size in enumerate(view.shape) if axis not in axes)
    return view._replace(planes=planes, shape=shape)


def _grouped(state: TraceState, x: Activation, w: Value, groups: int, shape: Shape, transposed: bool) -> Activation:
    """A grouped convolution: input and output channels of a group belong together."""
    labels = state.labels
    by_group = labels.activation(x.full.reshape(x.shape[0], groups, -1))
    joined = labels.join_along(by_group, {0, 2})
    out = labels.activation(joined.full[:, :, :1].expand(-1, -1, shape[1] // groups).reshape(shape), x.depth + 1)
    own = labels.activation(joined.full.reshape(x.shape), x.depth) if transposed else out
    if isinstance(w, ParameterView):
        state.positions.use(w, own.core[0].unsqueeze(1), {0})
        state.positions.freeze_along(w, {1})
    else:
        labels.freeze(w.core)
        labels.freeze(out.core)
    return out


def embedding(state: TraceState, call: Call) -> Sequence[Value]:
    """Embedding: a row of the table for each index; each column of the table is a new neuron."""
    table = mix(state, call.args["weight"], {0})
    state.labels.freeze(state.activation(call.args["indices"]).core)
    width = table.shape[1]
    depth = 1
    if isinstance(table, ParameterView):
        core = state.labels.fresh(width)
        state.positions.use(table, core.unsqueeze(0), {1})
    else:
        table = state.activation(table)
        core, depth = table.core[0].expand(width), table.depth
    return [state.labels.activation(core.expand(result.shape), depth) for result in call.results[:1]] + [
        state.labels.constant(tuple(result.shape), FROZEN) for result in call.results[1:]
    ]


def embedding_bag(state: TraceState, call: Call) -> Sequence[Value]:
    """Embedding bag: combined rows of a table; the tensors that choose or scale rows are not split."""
    for name in ("indices", "offsets", "per_sample_weights"):
        value = call.args.get(name)
        if isinstance(value, ParameterView):
            state.positions.freeze(value)
        elif isinstance(value, Activation):
            state.labels.freeze(value.core)
    return embedding(state, call)


def im2col(state: TraceState, call: Call) -> Sequence[Value]:
    """im2col: every patch of an image becomes a column."""
    value = state.activation(mix(state, call.values[0], {2, 3}))
    repeats = call.shape()[1] // value.shape[1]
    labels = value.full[:, :, 0, 0].repeat_interleave(repeats, dim=1).unsqueeze(-1)
    return [state.labels.activation(labels.expand(call.shape()), value.depth)]
