"""Where the full network's tensors are stored while they are trained, and how trained parts are merged into them.

Where it sits: the coordinator extracts subnets from a store and merges what comes back. `LocalStore` keeps whole
tensors in this process; a store whose tensors are spread over processes has the same three methods.
Law: extracting every worker's part and merging it back untouched leaves the store as it was, bit for bit.
Not here: which positions are whose (`ist/subnet/cut.py`), messages (`ist/transport/`).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ist.subnet.cut import Cut, Merge, extract


class ParameterStore(Protocol):
    """The tensors that travel both ways, by name."""

    def extract(self, cut: Cut, into: Mapping[str, Tensor]) -> None:
        """Copy a worker's part of every tensor of `into`, which holds contiguous tensors of the cut shapes."""
        ...

    def merge(self, cuts: Sequence[Cut], exclusive: frozenset[str]) -> Merge:
        """Begin to merge the trained parts of a round; see `ist.subnet.cut.Merge`."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Return whole tensors by name."""
        ...


class LocalStore:
    """A store of whole tensors in this process; a `ParameterStore`.

    Args:
        tensors: Contiguous, by name; merging writes into them.

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
        """Copy a worker's part of every tensor of `into`, which holds contiguous tensors of the cut shapes."""
        extract(self._tensors, cut, into)

    def merge(self, cuts: Sequence[Cut], exclusive: frozenset[str]) -> Merge:
        """Begin to merge the trained parts of a round; see `ist.subnet.cut.Merge`."""
        return Merge(self._tensors, cuts, exclusive)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return whole tensors by name."""
        return self._tensors
