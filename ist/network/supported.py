"""Refuse networks that cannot be trained as submodels, by name, before anything starts.

Workers train smaller copies of a network. Anything attached to it that a copy cannot have would be dropped silently,
so it is refused here, with a remedy.

Where it sits: `ist/runs/build.py` and `ist/api.py` call it before they build a run.
Not here: whether a network can be split (`ist/neurons/`) or copied (`ist/network/copies.py`).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ist.data.nested import tensors_in
from ist.errors import ModelError, first_line

_WRAPPERS = {
    "DataParallel": ("pass the module inside it (model.module)", "ddp"),
    "DistributedDataParallel": ("pass the module inside it (model.module)", "ddp"),
    "FullyShardedDataParallel": ("pass the module inside it (model.module)", "fsdp"),
    "FSDPModule": ("pass the network before fully_shard", "fsdp"),
}
"""Classes that train a network on several devices: what to pass instead, and the value of `pool.inside`."""


def check_network(network: nn.Module, is_split: bool) -> None:
    """Refuse a network that cannot be copied and split.

    Args:
        network: The network; may be on the `meta` device.
        is_split: Whether workers train submodels; otherwise the network itself is trained.

    Raises:
        ModelError: The network is TorchScript or wrapped for parallel training, a parameter has no shape yet, is not
            dense or has an attachment that a submodel cannot have, or the `state_dict` differs from the parameters
            and buffers.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ModelError(
            "the network is TorchScript, whose forward cannot be traced: pass the module from which it was made"
        )
    for path, module in network.named_modules():
        for kind in [kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS]:
            where, (remedy, inside) = f"'{path}'" if path else "the network", _WRAPPERS[kind]
            raise ModelError(
                f"{where} is a {kind}, which uses its own processes or devices: {remedy}. To train each subnet on "
                "several GPUs, start a process for each of them and give pool=ist.Pool(ranks_per_worker='node', "
                f"inside='{inside}')"
            )
    for name, tensor in _saved_tensors(network).items():
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ModelError(f"'{name}' (of a lazy module) has no shape yet: run the network on an input first")
        if tensor.layout != torch.strided:
            raise ModelError(f"'{name}' has the layout {tensor.layout}: only dense tensors are trained and saved")
    for name, parameter in network.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            raise ModelError(
                f"'{name}' is a {type(parameter).__name__}, which holds its values in other tensors: pass the network "
                "with plain parameters"
            )
        if is_split:
            _check_attachments(name, parameter)
    _check_state(network)


def check_values(network: nn.Module) -> None:
    """Refuse a network in which a tensor has no values, or overlaps another tensor in memory.

    Raises:
        ModelError: A tensor does.
    """
    tensors = _saved_tensors(network)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"'{name}' is on the device 'meta' and has no values: give the network values first "
                "(weights=PATH, a file or folder of safetensors; or model.to_empty(device='cpu') and its "
                "initialization; or load_state_dict(..., assign=True))"
            )
    spans = sorted(
        (start, start + _extent(tensor), name)
        for name, tensor in tensors.items()
        if tensor.numel() and (start := tensor.data_ptr())
    )
    for (_, stop, first), (start, _, second) in pairwise(spans):
        if start < stop and tensors[first] is not tensors[second]:
            first, second = sorted((first, second), key=list(tensors).index)
            kinds = {isinstance(tensors[name], nn.Parameter) for name in (first, second)}
            remedy = (
                "tie them by using one parameter, as in decoder.weight = encoder.weight"
                if kinds == {True}
                else "give one of them its own memory (clone())"
            )
            what = "parameters" if kinds == {True} else "tensors"
            raise ModelError(f"'{first}' and '{second}' are two {what} in the same memory: {remedy}")


def _extent(tensor: Tensor) -> int:
    """Return the number of bytes from a tensor's first element to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _saved_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; a tied one appears under each of its names."""
    tensors: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    for path, module in network.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{path}.{name}" if path else name] = buffer
    return tensors


def _check_state(network: nn.Module) -> None:
    """Refuse a network whose `state_dict` differs from its parameters and buffers.

    Training reads and writes the tensors of the `state_dict`, and checkpoints use its names.

    Raises:
        ModelError: The `state_dict` fails, uses other names, contains copies, or contains something other than tensors.
    """
    for path, module in network.named_modules():
        where = f"'{path}'" if path else "the network"
        if ".ao.nn." in type(module).__module__ and ".quantized" in type(module).__module__:
            raise ModelError(
                f"{where} is quantized ({type(module).__name__}) and cannot be trained: pass the network before "
                "quantization"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                f"{where} ({type(module).__name__}) has a get_extra_state, whose state is neither merged nor saved. "
                "Make it a buffer (register_buffer), or remove it"
            )
    tensors = _saved_tensors(network)
    try:
        state = network.state_dict(keep_vars=True)
    except Exception as error:  # whatever a hook raises
        raise ModelError(f"the network's state_dict fails: {type(error).__name__}: {first_line(error)}") from error
    for name in [*tensors, *state]:
        if name not in state or name not in tensors:
            where, missing = (
                ("state_dict", "parameters and buffers") if name in state else ("parameters and buffers", "state_dict")
            )
            raise ModelError(
                f"'{name}' is in the network's {where} but not in its {missing} (does it override state_dict, or have "
                "a hook on it?): checkpoints use the names of parameters and buffers"
            )
        if not isinstance(state[name], Tensor) or state[name].data_ptr() != tensors[name].data_ptr():
            raise ModelError(
                f"the network's state_dict returns a copy or a function of '{name}' (does it have a hook on it?): "
                "merged values would be written to the copy"
            )


def _check_attachments(name: str, parameter: nn.Parameter) -> None:
    """Refuse hooks on a parameter, and tensors in its attributes, which a submodel would have to cut.

    Raises:
        ModelError: The parameter has a hook, or an attribute with a tensor.
    """
    if parameter.requires_grad:
        for kind, hook in _hooks(parameter):
            raise ModelError(
                f"'{name}' has a hook on its gradient ({kind}: {_described(hook)}): workers train smaller copies of "
                "the parameter, which cannot have the hook. Do the same in the forward (such as weight * mask), or in "
                "the step of your own optimizer (train.optimizer.name: module:Class), or freeze the parameter"
            )
    for attribute, value in vars(parameter).items():
        if any(True for _ in tensors_in(value)):
            raise ModelError(
                f"'{name}' has an attribute '{attribute}' with a tensor, which would not be cut with the parameter: "
                "make it a buffer of the module (register_buffer)"
            )


def _hooks(parameter: Tensor) -> Iterator[tuple[str, Any]]:
    for hook in (parameter._backward_hooks or {}).values():
        yield "register_hook", hook
    for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
        yield "register_post_accumulate_grad_hook", hook


def _described(hook: Any) -> str:
    """Return a hook's name, and the line where it is defined."""
    name, code = getattr(hook, "__qualname__", type(hook).__name__), getattr(hook, "__code__", None)
    return f"{name}, {code.co_filename}:{code.co_firstlineno}" if code else name
