"""Store the full network's tensors during training, extract subnets and merge trained ones.

Where it sits: the coordinator extracts subnets from a store and merges the returned ones into it. `LocalStore` holds
full tensors in this process; a store that shards tensors over processes would have the same three methods.
Law: if every worker's part is extracted and merged back unchanged, the store stays the same, bit for bit.
Not here: which positions a worker holds (`ist/subnet/cut.py`), messages (`ist/transport/`).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ist.subnet.cut import NOT_SCALED, Cut, Merge, UpdateScale, extract


class RoundMerge(Protocol):
    """The merge of a round into a store."""

    def add(self, worker: int, tensors: Mapping[str, Tensor], are_lasting: bool = True) -> None:
        """Merge a worker's trained tensors; unless they are lasting, they may change before `finish` returns."""
        ...

    def finish(self) -> None:
        """Complete the merge: entries of several workers become their mean."""
        ...


class ParameterStore(Protocol):
    """The tensors that are sent and returned, by name."""

    def extract(self, cut: Cut, into: Mapping[str, Tensor]) -> None:
        """Copy a worker's part of each tensor into the one of that name in `into`: contiguous, of the part's shape."""
        ...

    def merge(self, cuts: Sequence[Cut], exclusive: frozenset[str], scale: UpdateScale = NOT_SCALED) -> RoundMerge:
        """Start the merge of a round.

        Args:
            cuts: Every worker's positions.
            exclusive: The tensors of which no entry has two holders.
            scale: The factors of the updates.
        """
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the full tensors by name."""
        ...


class LocalStore:
    """A `ParameterStore` that holds full tensors in this process.

    Args:
        tensors: Contiguous tensors by name; `merge` writes into them.

    >>> import torch
    >>> store = LocalStore({"w": torch.arange(6.0)})
    >>> part = {"w": torch.empty(2)}
    >>> store.extract({"w": (torch.tensor([1, 4]),)}, into=part)
    >>> part["w"]
    tensor([1., 4.])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def extract(self, cut: Cut, into: Mapping[str, Tensor]) -> None:
        """Copy a worker's part of each tensor into the one of that name in `into`: contiguous, of the part's shape."""
        extract(self._tensors, cut, into)

    def merge(self, cuts: Sequence[Cut], exclusive: frozenset[str], scale: UpdateScale = NOT_SCALED) -> Merge:
        """Start the merge of a round; see `ist.subnet.cut.Merge`."""
        return Merge(self._tensors, cuts, exclusive, scale)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the full tensors by name."""
        return self._tensors
