"""The network of a sharded store as a module: a rank's rows of it, or the whole without values.

Where it sits: `ist/runs/open.py` makes every rank's network of rows; `shard_store.py` makes the network that rank 0
evaluates.
Not here: where the values are (`shard_store.py`).
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ist.network.copies import copied, like
from ist.network.lazy_tensor import make_lazy
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.shards import ModelShard
from ist.tensors import constant_tensors, named_tensors


def shard_network(shard: ModelShard, rows: Mapping[str, Tensor]) -> nn.Module:
    """Return a network whose parameters and buffers have only the rows of a shard; it cannot compute anything.

    Args:
        shard: The shard.
        rows: By name, the shard's rows, and buffers that every rank has as a whole.
    """
    memo = {
        id(tensor): like(tensor, rows[name]) for name, tensor in named_tensors(shard.template).items() if name in rows
    }
    return copied(shard.template, memo)


def lazy_network(split: SplitModel, values: Callable[[str], Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
    """Return the full network on the CPU, whose parameters have no values: operators fetch them, one at a time.

    Args:
        split: The full split network.
        values: Fetches the values of a parameter.
        buffers: The persistent buffers, which the network shares.
    """
    buffers = {**{name: tensor.clone() for name, tensor in split.constants.items()}, **buffers}
    tensors = {**dict(split.template.named_buffers()), **constant_tensors(split.template)}
    memo = {id(tensor): like(tensor, buffers[name]) for name, tensor in tensors.items() if name in buffers}
    return make_lazy(copied(split.template, memo), values)
