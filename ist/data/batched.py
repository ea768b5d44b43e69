"""Data whose items cannot be stacked: data sets that build their own batches, and data sets with a collate function.

`BatchedDataset` is the interface of the former: graphs of different sizes, sparse rows. `ist/data/batches.py` collates
the items of any other map-style data set, with PyTorch's function or the user's.

Where it sits: users and the shipped data sets implement it; `batches.py` calls it.
Not here: shards and batches of other data sets (`batches.py`).
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from ist.rng import Indices

IGNORED = -100
"""A target that PyTorch's cross entropy and our accuracy ignore."""


class BatchedDataset(Dataset[Any]):
    """A map-style data set that builds its own batches, because its items cannot be stacked.

    Example:
        >>> import torch
        >>> class Sentences(ist.BatchedDataset):
        ...     def __init__(self, words, classes):
        ...         self.words, self.classes = words, classes
        ...     def __len__(self):
        ...         return len(self.words)
        ...     def batch(self, indices):
        ...         rows = [torch.tensor(self.words[i]) for i in indices]
        ...         return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), self.classes[indices]
        ...     def part(self, indices):
        ...         return Sentences([self.words[i] for i in indices], self.classes[indices])
        >>> inputs, classes = Sentences([[1, 2, 3], [4]], torch.tensor([0, 1])).batch([0, 1])
        >>> inputs
        tensor([[1, 2, 3],
                [4, 0, 0]])
    """

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
        """Return a data set of only the items at `indices`; it must not hold the memory of the other items."""


@dataclass(frozen=True)
class Collated(Dataset[Any]):
    """A map-style data set and the function that makes batches of its items, as in `torch.utils.data.DataLoader`.

    Attributes:
        items: The data set.
        collate: Turns a list of items into a batch, such as tensors padded to the longest item.
    """

    items: Dataset[Any]
    collate: Callable[[list[Any]], Any]

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """Return an item."""
        return self.items[index]


@dataclass(frozen=True)
class WholeBatches(Dataset[Any]):
    """A map-style data set whose batches a `step` function gets as they are, so its items need not be pairs.

    A batch that is read from it is (batch, None): all of it counts as inputs.

    Attributes:
        items: The data set.
    """

    items: Dataset[Any]

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """Return an item."""
        return self.items[index]
