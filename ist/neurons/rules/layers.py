"""Rules of the operators that layers are made of: products with weights, convolutions, norms, pooling.

Where it sits: `ist/neurons/rules/operators.py` has the table.
"""

from collections.abc import Sequence

from ist.neurons.rules.joins import Scene, Value, contract, elementwise, mix, with_parameter
from ist.neurons.rules.operator_call import Call, Rule, resized
from ist.neurons.rules.parameter_views import ParameterView, is_repeated
from ist.neurons.rules.weight_functions import product
from ist.neurons.tracing.labels import FROZEN, Activation, Shape


def pool(scene: Scene, call: Call) -> Sequence[Value]:
    """Pooling, resizing and padding of images: positions mix, channels do not."""
    spatial = int(next(char for char in call.name if char.isdigit()))
    ndim = len(call.values[0].shape)
    return resized(scene, call, set(range(ndim - spatial, ndim)))


def pad(scene: Scene, call: Call) -> Sequence[Value]:
    """Padding: what is padded keeps its size."""
    value, pad = scene.activation(call.values[0]), call.args["pad"]
    ndim = len(value.shape)
    padded = {ndim - 1 - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1]}
    return resized(scene, call._replace(args={"self": value}), padded)


def batch_norm(scene: Scene, call: Call) -> Sequence[Value]:
    """Each channel is normalised by itself."""
    value = call.values[0]
    mixed = mix(scene, value, set(range(len(value.shape))) - {1})
    for vector in call.values[1:]:
        mixed = _scaled(scene, mixed, vector, 1)
    return _with_statistics(scene, call, mixed)


def layer_norm(scene: Scene, call: Call) -> Sequence[Value]:
    """Everything that is normalised together belongs together."""
    value, width = call.values[0], len(call.args["normalized_shape"])
    ndim = len(value.shape)
    mixed = mix(scene, value, set(range(ndim - width, ndim)))
    for vector in call.values[1:]:
        mixed = elementwise(scene, [mixed, vector], value.shape)
    return _with_statistics(scene, call, mixed)


def group_norm(scene: Scene, call: Call) -> Sequence[Value]:
    """The channels of a group belong together."""
    value, groups = scene.activation(call.values[0]), call.args["group"]
    full = value.full
    grouped = scene.labels.activation(full.reshape(full.shape[0], groups, -1))
    joined = scene.labels.join_along(grouped, {2})
    mixed: Value = scene.labels.activation(joined.full.reshape(full.shape), value.depth)
    for vector in call.values[1:]:
        mixed = _scaled(scene, mixed, vector, 1)
    return _with_statistics(scene, call, mixed)


def _scaled(scene: Scene, value: Value, vector: Value, axis: int) -> Value:
    """Join a vector along one axis of an activation."""
    if isinstance(value, ParameterView):
        scene.atoms.freeze(value)
        value = scene.activation(value)
    after = (1,) * (len(value.shape) - axis - 1)
    shape = (len(scene.activation(vector).full), *after)
    if isinstance(vector, ParameterView):
        planes = {dim: plane.view(shape) for dim, plane in vector.planes.items()}
        return with_parameter(scene, value, vector._replace(planes=planes, shape=shape))
    return elementwise(scene, [value, Activation(vector.full.reshape(shape), shape, vector.depth)], value.shape)


def _with_statistics(scene: Scene, call: Call, value: Value) -> Sequence[Value]:
    """The normalised result, and means and deviations that no network uses."""
    rest = [scene.labels.constant(tuple(result.shape), FROZEN) for result in call.results[1:]]
    return [value, *rest]


def matmul(x_axes: str, w_axes: str, out_axes: str, first: str = "self", second: str = "mat2") -> Rule:
    """Return the rule of a matrix product, with its axes named as in einsum."""

    def rule(scene: Scene, call: Call) -> Sequence[Value]:
        x, w = call.args[first], call.args[second]
        if (
            first == "self"
            and isinstance(x, ParameterView)
            and isinstance(w, ParameterView)
            and not any(scene.atoms.is_constant(view) or is_repeated(view) for view in (x, w))
        ):
            return [product(scene, x, w, x_axes, w_axes, out_axes)]
        made: Value = contract(scene, x, w, x_axes, w_axes, out_axes, call.shape())
        if first != "self" and call.args.get("beta", 1) != 0:
            made = elementwise(scene, [made, call.args["self"]], call.shape())
        return [made]

    return rule


def convolution(scene: Scene, call: Call) -> Sequence[Value]:
    """Channels are summed over with weights; positions mix."""
    x, w, groups, transposed = call.args["input"], call.args["weight"], call.args["groups"], call.args["transposed"]
    shape = call.shape()
    mixed = mix(scene, x, set(range(2, len(shape))))
    channels = scene.activation(mixed)
    flat = Activation(channels.core.reshape(channels.core.shape[:2]), channels.shape[:2], channels.depth)
    kernel = set(range(2, len(w.shape)))
    filters = mix(scene, w, kernel)
    if isinstance(filters, ParameterView):
        filters = _without(filters, kernel)
    else:
        filters = Activation(filters.core.reshape(filters.core.shape[:2]), filters.shape[:2], filters.depth)
    if groups == 1:
        made = contract(scene, flat, filters, "nc", "co" if transposed else "oc", "no", shape[:2])
    else:
        made = _grouped(scene, flat, filters, groups, shape[:2], transposed)
    core = made.core.reshape(*made.core.shape, *([1] * (len(shape) - 2)))
    result: Value = Activation(core, shape, made.depth)
    bias = call.args.get("bias")
    return [result if bias is None else _scaled(scene, result, bias, 1)]


def _without(view: ParameterView, axes: set[int]) -> ParameterView:
    """A view at position 0 of some axes, which are dropped."""
    planes = view.planes
    for axis in sorted(axes, reverse=True):
        planes = {dim: plane.select(axis, 0) for dim, plane in planes.items()}
    shape = tuple(size for axis, size in enumerate(view.shape) if axis not in axes)
    return view._replace(planes=planes, shape=shape)


def _grouped(scene: Scene, x: Activation, w: Value, groups: int, shape: Shape, transposed: bool) -> Activation:
    """A grouped convolution: input and output channels of a group belong together."""
    labels = scene.labels
    by_group = labels.activation(x.full.reshape(x.shape[0], groups, -1))
    joined = labels.join_along(by_group, {0, 2})
    out = labels.activation(joined.full[:, :, :1].expand(-1, -1, shape[1] // groups).reshape(shape), x.depth + 1)
    own = labels.activation(joined.full.reshape(x.shape), x.depth) if transposed else out
    if isinstance(w, ParameterView):
        scene.atoms.use(w, own.core[0].unsqueeze(1), {0})
        scene.atoms.freeze_along(w, {1})
    else:
        labels.freeze(w.core)
        labels.freeze(out.core)
    return out


def embedding(scene: Scene, call: Call) -> Sequence[Value]:
    """A row of the table for each index: new neurons, whose width is that of the table."""
    table = mix(scene, call.args["weight"], {0})
    scene.labels.freeze(scene.activation(call.args["indices"]).core)
    width = table.shape[1]
    depth = 1
    if isinstance(table, ParameterView):
        core = scene.labels.fresh(width)
        scene.atoms.use(table, core.unsqueeze(0), {1})
    else:
        table = scene.activation(table)
        core, depth = table.core[0].expand(width), table.depth
    return [scene.labels.activation(core.expand(result.shape), depth) for result in call.results[:1]] + [
        scene.labels.constant(tuple(result.shape), FROZEN) for result in call.results[1:]
    ]


def embedding_bag(scene: Scene, call: Call) -> Sequence[Value]:
    """Some rows of a table, combined: as one row, and nothing that chooses or scales them is split."""
    for name in ("indices", "offsets", "per_sample_weights"):
        value = call.args.get(name)
        if isinstance(value, ParameterView):
            scene.atoms.freeze(value)
        elif isinstance(value, Activation):
            scene.labels.freeze(value.core)
    return embedding(scene, call)


def im2col(scene: Scene, call: Call) -> Sequence[Value]:
    """Every patch of an image as a column."""
    value = scene.activation(mix(scene, call.values[0], {2, 3}))
    repeats = call.shape()[1] // value.shape[1]
    labels = value.full[:, :, 0, 0].repeat_interleave(repeats, dim=1).unsqueeze(-1)
    return [scene.labels.activation(labels.expand(call.shape()), value.depth)]
