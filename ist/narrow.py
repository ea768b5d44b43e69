"""Make the narrow network that a worker trains: an ordinary module of small, contiguous tensors.

Where it sits: subnet.py cuts values; this file makes the module that holds them; worker.py trains it.
Not here: masks. The masked full model is the test oracle (tests/test_subnet.py), not an implementation.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ist.groups import Group, TensorSpec


class ScaledLinear(nn.Linear):
    """A linear layer that multiplies its inputs by `input_scale` first, shape (batch, in) to (batch, out)."""

    input_scale: float = 1.0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Return `linear(input * input_scale)`."""
        return F.linear(input * self.input_scale, self.weight, self.bias)


def narrow_module(
    template: nn.Module,
    specs: Mapping[str, TensorSpec],
    device: torch.device,
    scales: Mapping[str, float],
) -> nn.Module:
    """Return a copy of `template` with the narrow tensor shapes of `specs`, in training mode.

    Args:
        template: The whole network on the `meta` device: it costs no memory.
        specs: The narrow spec of every entry of its `state_dict`.
        device: Where the narrow network lives.
        scales: Names of linear layers and the factor for their inputs, where it is not 1.

    Returns:
        The module; parameters have no values yet (`bind` gives them), buffers are as at the start.
    """
    module = copy.deepcopy(template)
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            shape = specs[_join(prefix, name)].shape
            child._parameters[name] = nn.Parameter(parameter.new_empty(shape), parameter.requires_grad)
        for name, buffer in child.named_buffers(recurse=False):
            narrow = specs.get(_join(prefix, name))
            child._buffers[name] = buffer.new_empty(narrow.shape if narrow else buffer.shape)
        _narrow_attributes(child)
        if prefix in scales:
            child.__class__ = ScaledLinear  # same tensors, same names: only its forward differs
            assert isinstance(child, ScaledLinear)
            child.input_scale = scales[prefix]
    module.to_empty(device=device)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.reset_running_stats()
    return module.train()


def bind(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let a narrow module's parameters and buffers be the given tensors, without copying.

    Args:
        module: A module from `narrow_module`.
        tensors: Name to tensor of the module's shape, on its device; may leave buffers out.
    """
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            parameter.data = tensors[_join(prefix, name)]
            parameter.grad = None
        for name in list(child._buffers):
            path = _join(prefix, name)
            if path in tensors:
                # .data: views of one message share a version counter, and updating one buffer in the forward
                # would make autograd believe that all the others were changed.
                child._buffers[name] = tensors[path].data


def input_scales(groups: Sequence[Group], template: nn.Module, specs: Mapping[str, TensorSpec]) -> dict[str, float]:
    """Return, for every linear layer fed by hidden neurons, full width / narrow width.

    Multiplying a subnet's hidden activations by it keeps the scale of what the next layer sees, as
    inverted dropout does.

    Args:
        groups: The network's neuron groups.
        template: The whole network.
        specs: The narrow spec of every tensor.

    Reference: Srivastava et al., JMLR 15 (2014), section 10 (scaling at training time).
    """
    scales = {}
    parameters = dict(template.named_parameters())
    # A group may hold slots of optimiser state too.
    for slot in (slot for group in groups for slot in group.slots if slot.tensor in parameters):
        path, _, name = slot.tensor.rpartition(".")
        if name == "weight" and slot.dim == 1:
            layer = template.get_submodule(path)
            if isinstance(layer, nn.Linear):
                scales[path] = layer.in_features / specs[slot.tensor].shape[1]
    return {path: scale for path, scale in scales.items() if scale != 1}


def _narrow_attributes(module: nn.Module) -> None:
    # The forward of these does not read them, but a narrow module should describe itself rightly.
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        sized = next((t for t in (*module.parameters(), *module.buffers()) if t.ndim == 1), None)
        if sized is not None:
            module.num_features = len(sized)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
