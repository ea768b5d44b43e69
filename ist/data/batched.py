"""Data sets that make their batches themselves: graphs of many sizes, sparse rows.

Any other map-style data set works as well (`ist/data/batches.py` collates its items); this is for data whose items do
not stack.
"""

from abc import abstractmethod
from typing import Any

from torch.utils.data import Dataset

from ist.rng import Indices

IGNORED = -100
"""A target that counts for nothing: what PyTorch's cross entropy, and our accuracy, leave out."""


class BatchedDataset(Dataset[Any]):
    """A map-style data set whose batches are not a stack of its items."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of items."""

    @abstractmethod
    def batch(self, indices: Indices) -> tuple[Any, Any]:
        """Return the items at `indices`, int64 of shape (items,), as one batch (inputs, targets).

        Inputs and targets are tensors, or tuples or mappings of tensors, on the CPU.
        """

    @abstractmethod
    def part(self, indices: Indices) -> "BatchedDataset":
        """Return a data set of the items at `indices` alone, which keeps no memory of the others alive."""
