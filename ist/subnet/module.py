"""Make the narrow network that a worker trains: an ordinary module of small, contiguous tensors.

Where it sits: `cut.py` cuts values; this file makes the module that holds them; `ist/training/worker.py` trains it.
Not here: masks. The masked full model is the check of a narrow one (`ist/checks/verify.py`), not an implementation.
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
"""A factor for all positions of a dim, or one for each."""


@dataclass(frozen=True)
class SubmodelPlan:
    """What a narrow network looks like.

    Attributes:
        specs: The narrow spec of every parameter and buffer that it has.
        sizes: Integer attributes with another value than in the whole network.
        scales: For a parameter, a dim of it and the factor of what is summed over it.
        absent: Paths of modules that are left out; what goes in comes out.
        calls: For the path of a module, what becomes of the sizes that its forward computes.
    """

    specs: Mapping[str, TensorSpec]
    sizes: Mapping[Origin, int] = field(default_factory=dict)
    scales: Mapping[str, tuple[int, Scale]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    calls: Mapping[str, Resizes] = field(default_factory=dict)


class Skip(nn.Module):
    """What stands in for a residual block that a worker does not hold: the first input comes out."""

    def forward(self, first: Any, *others: Any, **named: Any) -> Any:  # noqa: ARG002 (the block's arguments)
        """Return the first argument."""
        return first


def leave_out(module: nn.Module, path: str) -> None:
    """Put a `Skip` in the place of a network's block."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, Skip())


def make_submodel(
    template: nn.Module, plan: SubmodelPlan, device: torch.device, constants: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a copy of `template` with narrow tensors, in the same modes.

    Args:
        template: The whole network on the `meta` device: it costs no memory.
        plan: What the narrow network looks like.
        device: Where it lives.
        constants: Values, narrow, of tensors that are neither sent nor initialised here, such as buffers that are not
            persistent.

    Returns:
        The module; parameters have no values yet (`bind` gives them), buffers are as at the start.
    """
    module = copied(template)
    for path in plan.absent:
        leave_out(module, path)
    _replace_tensors(module, plan, device, constants or {})
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
    """Let a narrow module's parameters and buffers be the given tensors, without copying.

    Args:
        module: A module from `make_submodel`.
        tensors: Name to tensor of the module's shape, on its device; may leave buffers out.
    """
    for name, parameter in module.named_parameters():
        parameter.data = tensors[name]
        parameter.grad = None
    for prefix, child in module.named_modules():
        for name in list(child._buffers):
            path = _join(prefix, name)
            if path in tensors:
                # .data: views of one message share a version counter, and updating one buffer in the forward
                # would make autograd believe that all the others were changed.
                child._buffers[name] = tensors[path].data


def collect(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write what a forward has replaced, instead of written to, back into the bound tensors: the inverse of `bind`.

    A forward may give a module another buffer, or a parameter other `data`, in another dtype too.

    Raises:
        ModelError: What it put there has another shape.
    """
    for name, tensor in named_tensors(module).items():
        bound = tensors.get(name)
        if bound is None or (tensor.data_ptr(), tensor.stride()) == (bound.data_ptr(), bound.stride()):
            continue
        if tensor.shape != bound.shape:
            raise ModelError(
                f"the forward replaces '{name}', of shape {tuple(bound.shape)}, by a tensor of shape "
                f"{tuple(tensor.shape)}: what is trained must keep its shape"
            )
        bound.copy_(tensor.detach().clone())  # it may lie in the same memory in another order


def multiply(tensors: Mapping[str, Tensor], scales: Mapping[str, tuple[int, Scale]], inverse: bool = False) -> None:
    """Multiply narrow tensors by the scales that `input_scales` gives, or divide them by these, in place."""
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
    """Return, for every parameter that sums over hidden neurons, full width / narrow width.

    Multiplying a subnet's hidden activations by it keeps the scale of what the next layer sees, as
    inverted dropout does. Recurrent layers are left as they are: their states are bounded.

    Args:
        groups: The network's neuron groups.
        neurons: For each group, the neurons that the worker holds.
        template: The whole network.
        specs: The spec of every tensor of the whole network.

    Returns:
        For a parameter's name, the dim that is summed over and the factor; none where it would be 1.

    Reference: Srivastava et al., JMLR 15 (2014), section 10 (scaling at training time).
    """
    factors: dict[tuple[str, int], list[tuple[Indices, float]]] = {}
    for group, held in zip(groups, neurons, strict=True):
        # A group holds slots of optimiser state too; only the network's own are among `scaled`.
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
        narrow = covered + specs[tensor].shape[dim] - _slot_width(groups, tensor, dim)
        if len({factor for _, factor in pieces}) == 1 and narrow == covered:
            scales[tensor] = (dim, pieces[0][1])
        else:
            scales[tensor] = (dim, _by_position(pieces, groups, tensor, dim, specs[tensor].shape[dim]))
    return scales


def declared_sizes(
    template: nn.Module,
    declared: Mapping[str, Mapping[str, str]],
    whole: Mapping[str, TensorSpec],
    narrow: Mapping[str, TensorSpec],
) -> dict[Origin, int]:
    """Return the values of the attributes that a configuration declares (partition.sizes).

    Args:
        template: The whole network.
        declared: Pattern of module paths to attribute to the module's tensor in proportion to which it shrinks.
        whole: The specs of the whole network's tensors.
        narrow: Those of the narrow one.

    Raises:
        ConfigError: A pattern matches nothing, or a module has no such attribute or tensor.
        ModelError: The proportion is no integer.
    """
    values: dict[Origin, int] = {}
    for pattern, sizes in declared.items():
        modules = {path: child for path, child in template.named_modules() if fnmatchcase(path, pattern)}
        if not modules:
            raise ConfigError(f"'partition.sizes' holds '{pattern}', which matches no module")
        for path, child in modules.items():
            for attribute, tensor in sizes.items():
                size, name = getattr(child, attribute, None), _join(path, tensor)
                if not isinstance(size, int) or name not in whole:
                    missing = f"integer attribute '{attribute}'" if not isinstance(size, int) else f"tensor '{tensor}'"
                    raise ConfigError(f"'partition.sizes': '{path}' has no {missing}")
                if name in narrow:
                    value, rest = divmod(size * narrow[name].nbytes, whole[name].nbytes)
                    if rest:
                        raise ModelError(
                            f"'partition.sizes': {attribute} of '{path}' is {size} and '{tensor}' shrinks from "
                            f"{whole[name].shape} to {narrow[name].shape}, which makes no integer"
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


def _replace_tensors(
    module: nn.Module, plan: SubmodelPlan, device: torch.device, constants: Mapping[str, Tensor]
) -> None:
    """Replace every tensor by a narrow one; a tied one by one and the same."""
    made: dict[int, Tensor] = {}

    def resized(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            shape = plan.specs[name].shape if name in plan.specs else tuple(tensor.shape)
            if name in constants:
                made[id(tensor)] = constants[name].to(device, copy=True)
            else:
                made[id(tensor)] = torch.empty(shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = like(tensor, made[id(tensor)])
        return made[id(tensor)]

    for prefix, child in module.named_modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                setattr(child, name, resized(_join(prefix, name), parameter))  # recurrent layers note the new one
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = resized(_join(prefix, name), buffer)
        for name, value in list(vars(child).items()):
            if isinstance(value, Tensor):
                vars(child)[name] = resized(_join(prefix, name), value)


def along(scale: Scale, dim: int, like: Tensor) -> float | Tensor:
    """Return a scale in a form that multiplies a tensor like `like` along `dim`."""
    if isinstance(scale, float):
        return scale
    shape = [-1 if axis == dim else 1 for axis in range(like.ndim)]
    return torch.tensor(scale, dtype=like.dtype, device=like.device).view(shape)


def _scale(module: nn.Module, name: str, dim: int, scale: Scale) -> None:
    """Let a module read its parameter `name` multiplied along `dim`; the parameter itself stays as it is."""
    parameter = module._parameters[name]
    assert parameter is not None
    factor = along(scale, dim, parameter.detach().double())  # the network's precision may be changed later

    def scaled(self: nn.Module) -> Tensor:
        value = self._parameters[name]
        assert value is not None
        return value * (factor.to(value) if isinstance(factor, Tensor) else factor)

    base = type(module)
    module.__class__ = type(f"Scaled{base.__name__}", (base,), {name: property(scaled)})


def _set_size_attributes(module: nn.Module) -> None:
    # The forward of most of these does not read them, but a narrow module should describe itself rightly.
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
