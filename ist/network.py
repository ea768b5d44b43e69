"""Which networks are refused for what they hold, by name, before anything starts.

Workers train narrow copies of a network. What hangs on it and cannot go with a copy would be dropped in silence: it is
refused here, with what would be right.

Where it sits: `ist/build.py` and `ist/api.py` ask before a job is made.
Not here: whether a network can be split (`ist/groups/`), or copied (`ist/copies.py`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ist.data.nested import tensors_in
from ist.errors import ModelError

_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def check_network(network: nn.Module, is_split: bool) -> None:
    """Refuse a network that cannot be copied and narrowed.

    Args:
        network: The network as it was made; may be on the `meta` device.
        is_split: Whether narrow copies of it are trained; else it is trained itself.

    Raises:
        ModelError: It is compiled to TorchScript or wrapped for parallel training, some of its parameters have no shape
            yet, or something hangs on a parameter that a narrow one cannot have.
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
    for name, parameter in network.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"some parameters have no shape yet ('{name}', of a lazy module): run the network on an input first"
            )
        if is_traceable_wrapper_subclass(parameter):
            raise ModelError(
                f"'{name}' is a {type(parameter).__name__}, which holds its values in other tensors: pass the network "
                "with plain parameters"
            )
        if is_split:
            _check_attachments(name, parameter)


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
