"""A user's own network on the `meta` device, which gets its weights from files.

The files have the tensors of its `state_dict`. Its other tensors, such as rotary frequencies, are computed again as its
classes do it: by `reset_parameters`, or by `_init_weights` of a network of transformers.

Where it sits: `ist/runs/build.py` calls it for networks that are passed from Python.
Not here: networks that a function builds (`constants.py`).
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from ist.errors import ModelError
from ist.initialization.constants import UnknownValues
from ist.network.copies import like
from ist.rng import Purpose, seeded
from ist.tensors import constant_tensors, memory_key


def is_on_meta(network: nn.Module) -> bool:
    """Return whether a tensor of a network has no values."""
    return any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])


def restore_constants(network: nn.Module) -> None:
    """Give a network on `meta` the tensors that are not in its `state_dict`, which no file of weights contains.

    Raises:
        ModelError: A class cannot compute one of them again.
    """
    by_owner: dict[str, list[str]] = defaultdict(list)
    for name, tensor in constant_tensors(network).items():
        if tensor.is_meta:
            by_owner[name.rpartition(".")[0]].append(name)
    for path, names in by_owner.items():
        owner = network.get_submodule(path)
        found = [_computed_again(network, owner, value) for value in (0, 1)]
        for name in names:
            key = name.rpartition(".")[2]
            first, second = (values.get(key) for values in found)
            if first is None or second is None or not _same_bits(first, second):
                raise ModelError(
                    f"'{name}' is on the device 'meta' and is not in the network's state_dict, so files of weights do "
                    f"not contain it, and {type(owner).__name__} cannot compute it again (by reset_parameters): create "
                    "the network with its parameters alone on 'meta' (accelerate.init_empty_weights), or compute the "
                    "tensor in reset_parameters"
                )
            swap_tensors(constant_tensors(network)[name], first)  # type: ignore[no-untyped-call]


def _computed_again(network: nn.Module, owner: nn.Module, value: int) -> dict[str, Tensor]:
    """Return the own tensors of a module, set by its class, by name; those with unknown values are left out.

    Args:
        network: The network.
        owner: The module.
        value: The value of its tensors before: a tensor is known to be set if its values do not depend on this one.
    """
    reset: Callable[[nn.Module], object] | None = getattr(network, "_init_weights", None)
    if hasattr(type(owner), "reset_parameters"):
        reset = type(owner).reset_parameters  # type: ignore[attr-defined]
    if reset is None:
        return {}
    own = {name: value for name, value in vars(owner).items() if isinstance(value, Tensor)}
    of_tensors: list[dict[str, Any]] = [owner._parameters, owner._buffers, own]
    holders: list[dict[str, Any]] = [owner._parameters, owner._buffers, vars(owner)]
    before = [dict(holder) for holder in holders]
    unknown = UnknownValues()
    try:
        for holder in of_tensors:
            for name, tensor in holder.items():
                if tensor is not None and tensor.is_meta:
                    setattr(owner, name, like(tensor, torch.full_like(tensor, value, device="cpu")))
        with unknown, torch.no_grad(), warnings.catch_warnings(), seeded(torch.device("cpu"), 0, Purpose.MODEL):
            warnings.simplefilter("ignore")
            reset(owner)
        made = {**owner._buffers, **{name: getattr(owner, name) for name in own}}
        return {name: tensor for name, tensor in made.items() if tensor is not None and not unknown.holds(tensor)}
    except Exception:  # a class that does not compute its tensors this way may fail in any way
        return {}
    finally:
        for changed, values in zip(holders, before, strict=True):
            changed.clear()
            changed.update(values)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.is_meta or second.is_meta or (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return memory_key(first) != memory_key(second) and torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
