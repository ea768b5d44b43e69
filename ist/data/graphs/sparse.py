"""Sparse matrices in compressed row format (CSR), as NumPy arrays.

Where it sits: features of graphs (`graph.py`) and of WordNet's glosses (`ist/data/wordnet/tfidf.py`).
Not here: batches of graphs (`graph.py`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ist.rng import Indices


@dataclass(frozen=True)
class SparseRows:
    """A float32 matrix of shape (rows, width).

    Args:
        offsets: int64, shape (rows + 1,): the start of each row's entries, and the end of the last one's.
        columns: int32, shape (entries,): the column of each entry.
        values: float32, shape (entries,).
        width: The number of columns.
    """

    offsets: Indices
    columns: NDArray[np.int32]
    values: NDArray[np.float32]
    width: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def rows(self, indices: Indices) -> "SparseRows":
        """Return a copy of the rows at `indices`, in that order."""
        entries, offsets = expand(self.offsets, indices)
        return SparseRows(offsets, self.columns[entries], self.values[entries], self.width)

    def row_of_entries(self) -> Indices:
        """Return the row of each entry: int64, shape (entries,)."""
        return np.repeat(np.arange(len(self), dtype=np.int64), np.diff(self.offsets))

    def dense(self) -> Tensor:
        """Return the dense matrix, float32 of shape (rows, width)."""
        full = np.zeros((len(self), self.width), dtype=np.float32)
        full[self.row_of_entries(), self.columns] = self.values
        return torch.from_numpy(full)


def expand(offsets: Indices, indices: Indices) -> tuple[Indices, Indices]:
    """Find the entries of some rows.

    Args:
        offsets: int64, shape (rows + 1,): the start of each row's entries, and the end of the last one's.
        indices: int64, shape (n,): the numbers of the rows.

    Returns:
        The positions of their entries, row by row, and the offsets of the rows in this list, shape (n + 1,).
    """
    lengths = offsets[indices + 1] - offsets[indices]
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    return np.repeat(offsets[indices] - ends[:-1], lengths) + np.arange(ends[-1], dtype=np.int64), ends
