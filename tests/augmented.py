"""Data sets whose items are drawn again each time, from each of the generators of the process."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from ist.data.images.digits import digits


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """A data set with noise that torch, `random` and `numpy.random` have drawn; about every tenth target is drawn."""

    def __init__(self, inner: TensorDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item, target = self.inner[index]
        noise = torch.randn_like(item) * random.random() + float(np.random.normal())
        return item + noise / 10, self.inner[random.randrange(len(self))][1] if np.random.rand() < 0.1 else target


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The items of `Augmented`, in order, as a stream."""

    def __init__(self, inner: TensorDataset) -> None:
        self.inner = Augmented(inner)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self.inner)):
            yield self.inner[index]


def load(root: Path | None) -> tuple[Dataset[Any], Dataset[Any]]:
    """The digits, augmented; the training data in an order that is drawn."""
    train, test = digits(root)
    assert isinstance(train, TensorDataset)
    assert isinstance(test, TensorDataset)
    order = np.random.permutation(len(train))[:200]
    return Augmented(TensorDataset(*train[torch.from_numpy(order)])), Augmented(test)
