"""The tensors of a network by name: shapes and dtypes, whether values are finite, and checksums.

Where it sits: below all rooms that work with tensors. Groups, cuts, messages and checkpoints use these names.
Not here: how tensors are split (`ist/subnet/`) or sent (`ist/transport/`).
"""

import math
import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, without its values."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return the specs of tensors, by name."""
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def tensor_specs(module: nn.Module, with_statistics: bool) -> dict[str, TensorSpec]:
    """Return the specs of the tensors in a network's `state_dict`: parameters and persistent buffers.

    Args:
        module: The full network; it may be on the `meta` device.
        with_statistics: Whether to include batch norm's running statistics. After a merge they no longer fit the
            network, because they were computed in subnets. So usually they are neither sent nor merged.

    Returns:
        Name to spec, in the order of the `state_dict`; a tied tensor has its first name only.
    """
    skipped = set() if with_statistics else set(statistics_names(module))
    first: dict[int, str] = {}
    return {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if first.setdefault(id(tensor), name) == name and name not in skipped
    }


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; a tied tensor has its first name only."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def constant_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network that are not in its `state_dict`.

    These are non-persistent buffers, and tensors that are plain attributes of modules.
    """
    saved = set(module.state_dict())
    constants = {name: buffer for name, buffer in module.named_buffers() if name not in saved}
    for path, child in module.named_modules():
        plain = {name: value for name, value in vars(child).items() if isinstance(value, Tensor)}
        constants |= {f"{path}.{name}" if path else name: value for name, value in plain.items()}
    return constants


def memory_key(tensor: Tensor) -> Hashable:
    """Return a key that is the same for all views of the same memory; it is not used again, also once they are gone."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def statistics_names(module: nn.Module) -> list[str]:
    """Return the names of the running statistics of batch norms in training mode.

    A norm that the network keeps in evaluation mode normalizes with its statistics: they are used like weights.

    Args:
        module: A network in its modes for training.
    """
    return [
        f"{name}.{buffer}" if name else buffer
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training
        for buffer, tensor in child.named_buffers(recurse=False)
        if tensor is not None
    ]


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor holds a NaN or an infinity; integer tensors never do."""
    real = (torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor for tensor in tensors)
    return all(_holds_finite(tensor) for tensor in real if tensor.is_floating_point() and tensor.numel())


def _holds_finite(tensor: Tensor) -> bool:
    # aminmax propagates NaN, and needs one pass and no temporary, unlike isfinite().all().
    low, high = tensor.detach().aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a checksum of each tensor's values; see `checksum`."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """Return a checksum of a tensor's values; different values very probably have different checksums."""
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(_INTEGERS[min(8, flat.element_size())]).sum(dtype=torch.int64)) if flat.numel() else 0


def local_rows(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor (DTensor) that this process holds; any other tensor is returned itself."""
    kinds = sys.modules.get("torch.distributed.tensor")  # slow to import, and if it is not, nothing is sharded
    if kinds is None or not isinstance(tensor, kinds.DTensor):
        return tensor
    rows: Tensor = tensor.to_local()
    return rows


def sharded_like(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `local_rows` for a tensor of the shape of another one; if that is not sharded, return `rows` itself."""
    kinds = sys.modules.get("torch.distributed.tensor")
    if kinds is None or not isinstance(like, kinds.DTensor):
        return rows
    made: Tensor = kinds.DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made
