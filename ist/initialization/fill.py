"""Give a network its initial values, one tensor at a time.

Where it sits: `ist/runs/build.py` and `ist/api.py` fill networks whose weights are in files.
Law: a filled network is the network that is built with values and then loads them, bit for bit.
Not here: reading files (`ist/export/initial_weights.py`), constants (`constants.py`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from ist.initialization.constants import built_without_parameters
from ist.network.copies import like


def built_with(make: Callable[[], nn.Module], values: Mapping[str, Tensor]) -> nn.Module:
    """Build a network with the given values, which is never initialized if its constructor allows that.

    Args:
        make: Builds the network.
        values: The values of the tensors of its `state_dict`.
    """
    try:
        network = built_without_parameters(make)
    except Exception:  # a constructor that needs values may fail in any way without them
        network = make()
    fill(network, values)
    if any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()]):
        network = make()  # a tensor that is not in the `state_dict` depends on parameters
        fill(network, values)
    return network


def fill(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a network the values of its `state_dict`: tensors on `meta` get memory on the CPU.

    Its tensors remain the same objects, so that all references to them stay valid.

    Args:
        network: The network.
        values: Name to tensor of the network's shape and dtype.
    """
    filled = set[int]()
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            if id(tensor) in filled:
                continue
            filled.add(id(tensor))
            if tensor.is_meta:
                # Not the tensor that was read: torch aligns memory, on which the bits of a product may depend.
                swap_tensors(tensor, like(tensor, values[name].clone()))  # type: ignore[no-untyped-call]
            else:
                tensor.copy_(values[name])
