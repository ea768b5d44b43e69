"""Make the submodel that a worker trains: an ordinary module with small, contiguous tensors.

Where it sits: `cut.py` extracts values; this file makes the module that holds them; `ist/training/worker.py` trains it.
Not here: masks. The masked full model only checks a submodel (`ist/checks/verify.py`); it is not an implementation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ist.errors import ConfigError, ModelError
from ist.network.attention import with_some_heads
from ist.network.copies import copied, like
from ist.neurons.attribute_sizes import Origin, set_integer
from ist.neurons.group import Group
from ist.neurons.tracing.call_sites import Resizes
from ist.rng import Indices
from ist.subnet.call_sizes import resize_calls
from ist.tensors import TensorSpec, named_tensors

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

Scale = float | tuple[float, ...]
"""One factor for all positions of a dim, or one factor for each position."""


@dataclass(frozen=True)
class SubmodelPlan:
    """How a submodel differs from the full network.

    Attributes:
        specs: The spec of each of its parameters and buffers.
        sizes: Integer attributes whose value differs from that in the full network.
        scales: For a parameter, the dim over which its layer sums, and the factor of the terms.
        absent: Paths of modules that are left out; each is replaced by the identity.
        calls: For the path of a module, the replacements of the sizes that its forward computes.
    """

    specs: Mapping[str, TensorSpec]
    sizes: Mapping[Origin, int] = field(default_factory=dict)
    scales: Mapping[str, tuple[int, Scale]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    calls: Mapping[str, Resizes] = field(default_factory=dict)


class Skip(nn.Module):
    """Replaces a residual block that a worker does not hold; returns its first input."""

    def forward(self, first: Any, *others: Any, **named: Any) -> Any:  # noqa: ARG002 (the block's arguments)
        """Return the first argument."""
        return first


def leave_out(module: nn.Module, path: str) -> None:
    """Replace a block of a network by a `Skip`."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, Skip())


def make_submodel(
    template: nn.Module, plan: SubmodelPlan, device: torch.device, constants: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a copy of `template` with the tensors of a submodel, in the same modes.

    Args:
        template: The full network on the `meta` device, where it needs no memory.
        plan: How the submodel differs from it.
        device: The submodel's device.
        constants: The submodel's part of tensors that are neither sent nor initialized here, such as buffers that are
            not persistent.

    Returns:
        The module. Its parameters have no values until `bind`; its buffers have their initial values.
    """
    module = copied(template)
    for path in plan.absent:
        leave_out(module, path)
    replace_tensors(module, plan.specs, device, constants or {})
    for origin, value in plan.sizes.items():
        if not _is_absent(origin.path, plan):
            set_integer(module, origin, value)
    for child in module.modules():
        _set_size_attributes(child)
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            child.reset_running_stats()
    for path, resizes in plan.calls.items():
        if not _is_absent(path, plan):
            resize_calls(module.get_submodule(path), resizes)
    for tensor, (dim, scale) in plan.scales.items():
        path, _, name = tensor.rpartition(".")
        _scale(module.get_submodule(path), name, dim, scale)
    return module


def _is_absent(path: str, plan: SubmodelPlan) -> bool:
    return path in plan.absent or path.startswith(tuple(f"{absent}." for absent in plan.absent))


def bind(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the given tensors the parameters and buffers of a submodel, without copying.

    Args:
        module: A module from `make_submodel`.
        tensors: Name to tensor of the module's shape, on its device; buffers may be missing.
    """
    for name, parameter in module.named_parameters():
        parameter.data = tensors[name]
        parameter.grad = None
    for prefix, child in module.named_modules():
        for name in list(child._buffers):
            path = _join(prefix, name)
            if path in tensors:
                # Views of one message share a version counter. Without .data, autograd would take an update of one
                # buffer in the forward for a change of all the others.
                child._buffers[name] = tensors[path].data


def collect(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors that a forward has replaced back into the bound tensors: the inverse of `bind`.

    Instead of writing to a tensor, a forward may assign a new buffer, or new `data` to a parameter, also of another
    dtype.

    Raises:
        ModelError: A new tensor has another shape.
    """
    for name, tensor in named_tensors(module).items():
        bound = tensors.get(name)
        if bound is None or (tensor.data_ptr(), tensor.stride()) == (bound.data_ptr(), bound.stride()):
            continue
        if tensor.shape != bound.shape:
            raise ModelError(
                f"the forward replaces '{name}', of shape {tuple(bound.shape)}, by a tensor of shape "
                f"{tuple(tensor.shape)}: trained tensors must keep their shape"
            )
        bound.copy_(tensor.detach().clone())  # it may be another view of the same memory


def multiply(tensors: Mapping[str, Tensor], scales: Mapping[str, tuple[int, Scale]], inverse: bool = False) -> None:
    """Multiply a submodel's tensors by the scales of `input_scales`, or divide them by these, in place."""
    with torch.no_grad():
        for name, (dim, scale) in scales.items():
            factor = along(scale, dim, tensors[name])
            tensors[name].div_(factor) if inverse else tensors[name].mul_(factor)


def input_scales(
    groups: Sequence[Group],
    neurons: Sequence[Indices],
    template: nn.Module,
    specs: Mapping[str, TensorSpec],
) -> dict[str, tuple[int, Scale]]:
    """Return full width / submodel width for every parameter whose layer sums over hidden neurons.

    A submodel's hidden activations are multiplied by it, so that the next layer's inputs keep their scale, as in
    inverted dropout. Recurrent layers are not scaled, because their states are bounded.

    Args:
        groups: The network's neuron groups.
        neurons: For each group, the neurons that the worker holds.
        template: The full network.
        specs: The spec of every tensor of the full network.

    Returns:
        For a parameter's name, the dim of the sum and the factor; parameters with factor 1 are left out.

    Reference: Srivastava et al., JMLR 15 (2014), section 10 (scaling at training time).
    """
    factors: dict[tuple[str, int], list[tuple[Indices, float]]] = {}
    for group, held in zip(groups, neurons, strict=True):
        # A group also has slots in optimizer state; `scaled` holds only slots of the network.
        for slot in group.slots:
            key = (slot.tensor, slot.dim)
            recurrent = key in group.scaled and isinstance(_owner(template, slot.tensor), _RECURRENT)
            if key in group.scaled and not recurrent:
                factors.setdefault(key, []).append((slot.positions(held), group.size / max(1, len(held))))
    scales: dict[str, tuple[int, Scale]] = {}
    for (tensor, dim), pieces in factors.items():
        covered = sum(len(places) for places, _ in pieces)
        if all(factor == 1 for _, factor in pieces) or tensor not in specs:
            continue
        width = covered + specs[tensor].shape[dim] - _slot_width(groups, tensor, dim)
        if len({factor for _, factor in pieces}) == 1 and width == covered:
            scales[tensor] = (dim, pieces[0][1])
        else:
            scales[tensor] = (dim, _by_position(pieces, groups, tensor, dim, specs[tensor].shape[dim]))
    return scales


def declared_sizes(
    template: nn.Module,
    declared: Mapping[str, Mapping[str, str]],
    full: Mapping[str, TensorSpec],
    submodel: Mapping[str, TensorSpec],
) -> dict[Origin, int]:
    """Return a submodel's values of the attributes that a configuration declares (partition.sizes).

    Args:
        template: The full network.
        declared: Pattern of module paths to attribute to tensor: the attribute shrinks in proportion to that tensor.
        full: The specs of the full network's tensors.
        submodel: The specs of the submodel's tensors.

    Raises:
        ConfigError: A pattern matches nothing, or a module has no such attribute or tensor.
        ModelError: The attribute's value would not be an integer.
    """
    values: dict[Origin, int] = {}
    for pattern, sizes in declared.items():
        modules = {path: child for path, child in template.named_modules() if fnmatchcase(path, pattern)}
        if not modules:
            raise ConfigError(f"'partition.sizes' holds '{pattern}', which matches no module")
        for path, child in modules.items():
            for attribute, tensor in sizes.items():
                size, name = getattr(child, attribute, None), _join(path, tensor)
                if not isinstance(size, int) or name not in full:
                    missing = f"integer attribute '{attribute}'" if not isinstance(size, int) else f"tensor '{tensor}'"
                    raise ConfigError(f"'partition.sizes': '{path}' has no {missing}")
                if name in submodel:
                    value, rest = divmod(size * submodel[name].nbytes, full[name].nbytes)
                    if rest:
                        raise ModelError(
                            f"'partition.sizes': {attribute} of '{path}' is {size} and '{tensor}' shrinks from "
                            f"{full[name].shape} to {submodel[name].shape}: the result would not be an integer"
                        )
                    values[Origin(path, attribute)] = value
    return values


def _by_position(
    pieces: Sequence[tuple[Indices, float]], groups: Sequence[Group], tensor: str, dim: int, size: int
) -> tuple[float, ...]:
    factor = np.ones(size)
    absent = np.zeros(size, bool)
    for group in groups:
        for slot in group.slots:
            if (slot.tensor, slot.dim) == (tensor, dim):
                absent[slot.positions(np.arange(group.size))] = True
    for places, value in pieces:
        factor[places], absent[places] = value, False
    return tuple(factor[~absent].tolist())


def _slot_width(groups: Sequence[Group], tensor: str, dim: int) -> int:
    return sum(g.size * s.block for g in groups for s in g.slots if (s.tensor, s.dim) == (tensor, dim))


def _owner(template: nn.Module, tensor: str) -> nn.Module:
    return template.get_submodule(tensor.rpartition(".")[0])


def replace_tensors(
    module: nn.Module, specs: Mapping[str, TensorSpec], device: torch.device, constants: Mapping[str, Tensor]
) -> None:
    """Replace every tensor of a module by one without values; tied tensors stay tied.

    Args:
        module: The module; it may be on the `meta` device.
        specs: The specs of the new tensors; a tensor that is not in them keeps its shape.
        device: The device of the new tensors.
        constants: Values for some of them, of the new shapes.
    """
    made: dict[int, Tensor] = {}

    def resized(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            shape = specs[name].shape if name in specs else tuple(tensor.shape)
            if name in constants:
                made[id(tensor)] = constants[name].to(device, copy=True)
            else:
                made[id(tensor)] = torch.empty(shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = like(tensor, made[id(tensor)])
        return made[id(tensor)]

    for prefix, child in module.named_modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                setattr(child, name, resized(_join(prefix, name), parameter))  # recurrent layers record it
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = resized(_join(prefix, name), buffer)
        for name, value in list(vars(child).items()):
            if isinstance(value, Tensor):
                vars(child)[name] = resized(_join(prefix, name), value)


def along(scale: Scale, dim: int, like: Tensor) -> float | Tensor:
    """Return a scale in a form that can multiply a tensor like `like` along `dim`."""
    if isinstance(scale, float):
        return scale
    shape = [-1 if axis == dim else 1 for axis in range(like.ndim)]
    return torch.tensor(scale, dtype=like.dtype, device=like.device).view(shape)


def _scale(module: nn.Module, name: str, dim: int, scale: Scale) -> None:
    """Make a module read its parameter `name` multiplied along `dim`; the parameter itself does not change."""
    parameter = module._parameters[name]
    assert parameter is not None
    factor = along(scale, dim, parameter.detach().double())  # the network's precision may change later

    def scaled(self: nn.Module) -> Tensor:
        value = self._parameters[name]
        assert value is not None
        return value * (factor.to(value) if isinstance(factor, Tensor) else factor)

    base = type(module)
    module.__class__ = type(f"Scaled{base.__name__}", (base,), {name: property(scaled)})


def _set_size_attributes(module: nn.Module) -> None:
    # Most of these modules do not read them in the forward, but a submodel should describe itself correctly.
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = next((t for t in (*module.parameters(), *module.buffers()) if t.ndim == 1), None)
        if sized is not None:
            module.num_features = len(sized)
    elif isinstance(module, nn.modules.conv._ConvNd):
        transposed = module.transposed
        inner, outer = (0, 1) if transposed else (1, 0)
        module.in_channels = module.weight.shape[inner] * (1 if transposed else module.groups)
        module.out_channels = module.weight.shape[outer] * (module.groups if transposed else 1)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.GroupNorm) and module.affine:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.RNNBase):
        tensors = dict(module.named_parameters())
        rows, columns = tensors["weight_hh_l0"].shape
        module.input_size = tensors["weight_ih_l0"].shape[1]
        module.hidden_size = rows // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        if module.proj_size:
            module.proj_size = columns
    elif isinstance(module, nn.RNNCellBase):
        (_, module.hidden_size), (_, module.input_size) = module.weight_hh.shape, module.weight_ih.shape
    elif isinstance(module, nn.MultiheadAttention) and module.out_proj.weight.shape[1] != module.embed_dim:
        with_some_heads(module)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
