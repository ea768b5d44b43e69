"""Which networks are refused for what they hold, by name, before anything starts.

Workers train narrow copies of a network. What hangs on it and cannot go with a copy would be dropped in silence: it is
refused here, with what would be right.

Where it sits: `ist/runs/build.py` and `ist/api.py` ask before a job is made.
Not here: whether a network can be split (`ist/neurons/`), or copied (`ist/network/copies.py`).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ist.data.nested import tensors_in
from ist.errors import ModelError, first_line

_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def check_network(network: nn.Module, is_split: bool) -> None:
    """Refuse a network that cannot be copied and narrowed.

    Args:
        network: The network as it was made; may be on the `meta` device.
        is_split: Whether narrow copies of it are trained; else it is trained itself.

    Raises:
        ModelError: It is compiled to TorchScript or wrapped for parallel training, some of its parameters have no shape
            yet, something hangs on a parameter that a narrow one cannot have, or its `state_dict` is something else
            than its parameters and buffers.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ModelError(
            "the network is TorchScript, whose forward cannot be watched: pass the module it was made from"
        )
    for path, module in network.named_modules():
        for kind in {kind.__name__ for kind in type(module).__mro__} & _WRAPPERS:
            where = f"'{path}'" if path else "the network"
            raise ModelError(
                f"{where} is a {kind}, which trains in processes or on devices of its own: pass the module in it"
            )
    for name, tensor in _saved_tensors(network).items():
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ModelError(
                f"some parameters have no shape yet ('{name}', of a lazy module): run the network on an input first"
            )
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
    """Refuse a network some of whose tensors have no values, or share memory with others.

    Raises:
        ModelError: One does.
    """
    tensors = _saved_tensors(network)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"'{name}' is on the device 'meta' and has no values: give the network values first "
                "(model.to_empty(device='cpu') and its initialisation, or load_state_dict(..., assign=True))"
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
                "tie them by making them one, as in decoder.weight = encoder.weight"
                if kinds == {True}
                else "give one of them memory of its own (clone())"
            )
            what = "parameters" if kinds == {True} else "tensors"
            raise ModelError(f"'{first}' and '{second}' are two {what} in the same memory: {remedy}")


def _extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to behind its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _saved_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, a tied one by all its names."""
    tensors: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    for path, module in network.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{path}.{name}" if path else name] = buffer
    return tensors


def _check_state(network: nn.Module) -> None:
    """Refuse a network whose `state_dict` is something else than its parameters and buffers.

    What is trained is taken from there, and saved and resumed by these names.

    Raises:
        ModelError: It fails, names them otherwise, gives copies of them, or holds what is no tensor.
    """
    for path, module in network.named_modules():
        where = f"'{path}'" if path else "the network"
        if ".ao.nn." in type(module).__module__ and ".quantized" in type(module).__module__:
            raise ModelError(
                f"{where} is quantised ({type(module).__name__}), and cannot be trained: pass it as it was"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                f"{where} ({type(module).__name__}) has a get_extra_state: what it holds is neither merged nor saved. "
                "Make it a buffer (register_buffer), or leave it out"
            )
    tensors = _saved_tensors(network)
    try:
        state = network.state_dict(keep_vars=True)
    except Exception as error:  # whatever a hook raises
        raise ModelError(f"the network's state_dict fails: {type(error).__name__}: {first_line(error)}") from error
    for name in [*tensors, *state]:
        if name not in state or name not in tensors:
            has, lacks = ("state_dict", "parameters and buffers") if name in state else ("parameters", "state_dict")
            raise ModelError(
                f"the network's {has} have '{name}', which its {lacks} have not (a state_dict of its own, or a hook on "
                "it?): what is trained is saved by the names of parameters and buffers"
            )
        if not isinstance(state[name], Tensor) or state[name].data_ptr() != tensors[name].data_ptr():
            raise ModelError(
                f"the network's state_dict gives a copy of '{name}', or something made of it (a hook?): what is merged "
                "would be written into that"
            )


def _check_attachments(name: str, parameter: nn.Parameter) -> None:
    """Refuse hooks on a parameter, and attributes of it that would have to be narrowed.

    Raises:
        ModelError: It has one.
    """
    if parameter.requires_grad:
        for kind, hook in _hooks(parameter):
            raise ModelError(
                f"'{name}' has a hook on its gradient ({kind}: {_described(hook)}): workers train narrow copies of the "
                "parameter, which cannot have it. Do the same in the forward (such as weight * mask), in the step of "
                "an optimizer of your own (train.optimizer.name: module:Class), or freeze the parameter"
            )
    for attribute, value in vars(parameter).items():
        if any(True for _ in tensors_in(value)):
            raise ModelError(
                f"'{name}' has an attribute '{attribute}' that holds a tensor, which would not be narrowed with it: "
                "make it a buffer of the module (register_buffer)"
            )


def _hooks(parameter: Tensor) -> Iterator[tuple[str, Any]]:
    for hook in (parameter._backward_hooks or {}).values():
        yield "register_hook", hook
    for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
        yield "register_post_accumulate_grad_hook", hook


def _described(hook: Any) -> str:
    """Return a hook's name, and the line where it is written."""
    name, code = getattr(hook, "__qualname__", type(hook).__name__), getattr(hook, "__code__", None)
    return f"{name}, {code.co_filename}:{code.co_firstlineno}" if code else name
