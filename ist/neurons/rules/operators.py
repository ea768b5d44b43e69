"""The table of rules: what each operator does to labels.

A rule takes the state of the trace and the call (operator, arguments by name, results) and returns the labels of each
result. Operators that only move data run on the labels themselves. Neurons that reach an operator without a rule
are not split, and the operator is reported by name.

Where it sits: `ist/neurons/trace.py` calls `labels_of_results` for every operator that the network runs.
Not here: the rules for layers (`layers.py`), indexing (`indexing.py`) and functions of weights (`weight_functions.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ist.neurons.rules.indexing import copy, gather, index, index_put, looked_up, scatter
from ist.neurons.rules.joins import TraceState, Value, elementwise, mix
from ist.neurons.rules.layers import (  # fmt: skip
    batch_norm,
    convolution,
    embedding,
    embedding_bag,
    group_norm,
    im2col,
    layer_norm,
    matmul,
    pad,
    pool,
)
from ist.neurons.rules.operator_call import Call, Rule, free, frozen, resized
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.rules.weight_functions import bilinear, of_weights, reduced, weight_norm
from ist.neurons.tracing.labels import FROZEN, Activation, slim

_MOVES = """
    view _unsafe_view reshape _reshape_alias permute transpose t expand squeeze unsqueeze slice select split
    split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind cat stack flip roll repeat unfold
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle diagonal movedim swapaxes narrow rot90 tile
"""
_VIEWS = ("view", "_unsafe_view", "_reshape_alias")
_SPLITTING = (*_VIEWS, "reshape", "unfold", "pixel_shuffle", "pixel_unshuffle")
_SAME = (
    "detach alias clone contiguous _to_copy lift_fresh lift_fresh_copy to positive _conj resolve_conj native_dropout "
    "log_sigmoid_forward"
)
_FILLED = """
    zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
    empty_strided new_empty_strided rand rand_like randn randn_like randint randint_like scalar_tensor
"""
_NUMBERED = "arange linspace logspace eye tril_indices triu_indices randperm hann_window"
_FILLING = "fill zero"
_DRAWN = """
    bernoulli normal uniform random exponential cauchy log_normal geometric poisson binomial _standard_gamma
"""
_REDUCTIONS = """
    sum mean amax amin max min prod var std var_mean std_mean logsumexp linalg_vector_norm norm any all argmax argmin
    count_nonzero median nansum aminmax mode _is_all_true _is_any_true
"""
_ALONG = "_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort"
_LOOKED_UP = """
    nonzero _unique2 unique_dim unique_consecutive bincount histc isin searchsorted bucketize
    _sparse_coo_tensor_with_dims_and_tensors sparse_compressed_tensor _to_sparse _to_sparse_csr _to_sparse_csc _coalesce
    _to_dense indices values _indices _values crow_indices col_indices _convert_indices_from_coo_to_csr
    _convert_indices_from_csr_to_coo
"""
_MATRIX_POSITIONS = "tril triu"
_POOLS = """
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    adaptive_avg_pool1d adaptive_max_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d
    adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d upsample_bilinear2d upsample_linear1d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d
    fractional_max_pool2d fractional_max_pool3d replication_pad1d replication_pad2d replication_pad3d grid_sampler_2d
"""
_LOSSES = """
    nll_loss_forward nll_loss nll_loss2d_forward nll_loss2d nll_loss_nd mse_loss binary_cross_entropy
    binary_cross_entropy_with_logits smooth_l1_loss huber_loss soft_margin_loss multi_margin_loss
    multilabel_margin_loss_forward _ctc_loss
"""
_BATCH_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update cudnn_batch_norm
"""


def labels_of_results(state: TraceState, call: Call) -> Sequence[Value] | None:
    """Return the labels of an operator's results; None if there is no rule for it."""
    rule = RULES.get(call.name)
    if rule is None and _is_pointwise(call):
        rule = _elementwise
    return None if rule is None else rule(state, call)


def _is_pointwise(call: Call) -> bool:
    """Whether torch tags the operator, or its out-of-place variant, as pointwise."""
    plain = getattr(getattr(torch.ops.aten, call.name, None), call.operator._overloadname, None)
    return any(torch.Tag.pointwise in found.tags for found in (call.operator, plain) if found is not None)


def _elementwise(state: TraceState, call: Call) -> Sequence[Value]:
    if not call.values:
        return free(state, call)
    weights = of_weights(state, call)
    if weights is not None:
        return [weights]
    return [elementwise(state, call.values, call.shape(), is_sum=call.name in ("add", "sub", "addcmul"))]


def _same(state: TraceState, call: Call) -> Sequence[Value]:  # noqa: ARG001 (every rule is called alike)
    return [call.values[0]] * len(call.results)


def _restrided(state: TraceState, call: Call) -> Sequence[Value]:
    """`as_strided`: the same elements if it changes strides in place and keeps the shape; otherwise unknown."""
    if call.values[0].shape == call.shape() and call.operator._schema.is_mutable:
        return [call.values[0]]
    state.labels.freeze(state.activation(call.values[0]).core)
    return frozen(state, call)


def _loss(state: TraceState, call: Call) -> Sequence[Value]:
    """A loss that the network itself computes: what it compares with targets is an output, which is not split."""
    for value in call.values:
        state.labels.freeze(state.activation(value).core)
    return frozen(state, call)


def _move(state: TraceState, call: Call) -> Sequence[Value]:
    """Run the operator on the labels; a single parameter stays a view of it."""
    values = call.values
    if len(values) == 1 and isinstance(values[0], ParameterView):
        view = values[0]
        moved = {dim: _run(call, [plane]) for dim, plane in view.planes.items()}
        return [
            view._replace(
                planes={dim: slim(planes[k]).expand(planes[k].shape) for dim, planes in moved.items()},
                shape=tuple(result.shape),
            )
            for k, result in enumerate(call.results)
        ]
    found = [state.activation(value) for value in values]
    depth = max(value.depth for value in found)
    if call.name == "expand" and torch.Size(found[0].shape).numel() == 1 and state.labels.is_frozen(found[0]):
        return free(state, call)  # one repeated number adapts to any width
    made = [state.labels.activation(labels, depth) for labels in _run(call, [value.full for value in found])]
    if call.name in ("cat", "stack") and found[0].shape:
        made = [state.labels.filled(made[0], [call.args["dim"] % len(made[0].shape)])]
    if call.name == "cat" and found[0].shape:
        # A class token before patches: pieces that vary only along other dims belong to the same neurons.
        dim = call.args["dim"] % len(made[0].shape)
        if len(made[0].varying) > 1 and not any(dim in value.varying for value in found):
            made = [state.labels.join_along(made[0], {dim})]
    if call.name in _SPLITTING:
        state.forms.extend(value for value in made if len(value.varying) > max(1, *(len(v.varying) for v in found)))
    return made


def _run(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    left = iter(tensors)

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return next(left) if isinstance(value, Activation | ParameterView) else value

    arguments = {name: replaced(value) for name, value in call.args.items()}
    if "size" in arguments and call.name in _VIEWS:
        # Labels are expanded where they do not vary, so a view of the requested shape may not exist.
        return [arguments["self"].reshape(arguments["size"])]
    made = call.operator(**arguments)
    return [made] if isinstance(made, Tensor) else list(made)


def _reduction(state: TraceState, call: Call) -> Sequence[Value]:
    value = call.values[0]
    dims = call.dims(value)
    if isinstance(value, ParameterView):
        weights = reduced(state, value, dims, bool(call.args.get("keepdim")), call.name)
        return [weights] * len(call.results) if weights is not None else frozen(state, call)
    mixed = state.activation(mix(state, value, dims))
    core = mixed.core
    for dim in sorted(dims, reverse=True):
        core = core.narrow(dim, 0, 1) if call.args.get("keepdim") else core.select(dim, 0)
    return [state.labels.activation(core.expand(result.shape), mixed.depth) for result in call.results]


def _along(state: TraceState, call: Call) -> Sequence[Value]:
    mixed = mix(state, call.values[0], call.dims(call.values[0]))
    return [mixed] * len(call.results)


def _matrix_positions(state: TraceState, call: Call) -> Sequence[Value]:
    ndim = len(call.values[0].shape)
    return [mix(state, call.values[0], {ndim - 2, ndim - 1})]


def _topk(state: TraceState, call: Call) -> Sequence[Value]:
    return resized(state, call, {call.args["dim"] % len(call.values[0].shape)})


def _last(state: TraceState, call: Call) -> Sequence[Value]:
    """Operators that mix along the last dim."""
    return [mix(state, call.values[0], {len(call.values[0].shape) - 1})]


def _transformed(state: TraceState, call: Call) -> Sequence[Value]:
    """A Fourier transform along some dims."""
    return resized(state, call, call.dims(call.values[0]))


def _gated(state: TraceState, call: Call) -> Sequence[Value]:
    """One half of a tensor, times a function of the other."""
    value = state.activation(call.values[0])
    halves = value.full.chunk(2, dim=call.args["dim"])
    return [elementwise(state, [state.labels.activation(half, value.depth) for half in halves], call.shape())]


def _packed(state: TraceState, call: Call) -> Sequence[Value]:
    """A packed batch: the steps of all sequences, sorted by step, and the number of sequences at each step."""
    value = state.activation(mix(state, call.values[0], {0, 1}))
    data = state.labels.activation(value.full[0, 0].expand(call.shape()), value.depth)
    return [data, *[state.labels.constant(tuple(result.shape), FROZEN) for result in call.results[1:]]]


def _chosen(state: TraceState, call: Call) -> Sequence[Value]:
    """Indices into the last dim, drawn at random."""
    return resized(state, call, {len(call.values[0].shape) - 1})


def _complex(state: TraceState, call: Call) -> Sequence[Value]:
    value = state.activation(call.values[0])
    if call.name == "view_as_real":
        return [state.labels.activation(value.full.unsqueeze(-1).expand(call.shape()), value.depth)]
    joined = state.labels.join_along(value, {len(value.shape) - 1})
    return [state.labels.activation(joined.full.select(-1, 0), value.depth)]


def _table() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    families: list[tuple[str, Rule]] = [
        (_MOVES, _move), (_SAME, _same), (_FILLED, free), (_NUMBERED, frozen), (_FILLING, _same),
        (_DRAWN, _elementwise), ("multinomial", _chosen), ("_sample_dirichlet", _last),
        (_REDUCTIONS, _reduction), (_ALONG, _along), (_MATRIX_POSITIONS, _matrix_positions), (_POOLS, pool),
        (_BATCH_NORMS, batch_norm), ("native_layer_norm _fused_rms_norm", layer_norm),
        ("native_group_norm", group_norm),
        ("convolution", convolution), ("embedding", embedding),
        ("_embedding_bag _embedding_bag_forward_only", embedding_bag), ("gather index_select", gather),
        ("index", index), ("scatter scatter_add scatter_reduce index_add index_reduce index_copy", scatter),
        ("copy", copy),
        ("index_put", index_put), (_LOOKED_UP, looked_up), ("topk", _topk), ("constant_pad_nd", pad),
        ("view_as_complex view_as_real", _complex), ("im2col", im2col),
        (_LOSSES, _loss), ("_weight_norm_interface", weight_norm), ("_trilinear", bilinear),
    ]  # fmt: skip
    for names, rule in families:
        rules |= dict.fromkeys(names.split(), rule)
    rules |= {
        "as_strided": _restrided,
        "_prelu_kernel": _elementwise,
        "hardswish": _elementwise,
        "glu": _gated,
        "_pack_padded_sequence": _packed,
        "floor_divide": _elementwise,
        "_grouped_mm": matmul("ik", "ekj", "ij"),
        **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _transformed),
        "polar": _elementwise,
        "mm": matmul("ik", "kj", "ij"),
        "bmm": matmul("bik", "bkj", "bij"),
        "mv": matmul("ik", "k", "i", second="vec"),
        "dot": matmul("k", "k", "", second="tensor"),
        "_sparse_addmm": matmul("ik", "kj", "ij", first="mat1"),
        "addmm": matmul("ik", "kj", "ij", first="mat1"),
        "baddbmm": matmul("bik", "bkj", "bij", first="batch1", second="batch2"),
        "addmv": matmul("ik", "k", "i", first="mat", second="vec"),
    }
    return rules


RULES = _table()
