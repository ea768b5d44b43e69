"""What a few items of a data set hold, in a few numbers: to tell whether two processes have loaded the same data.

Where it sits: `ist/distributed/process_group.py` compares these numbers of all ranks before a run;
`ist/training/worker.py` warns of data that change from look to look. Items are compared within a tolerance: two kinds
of processors, or two versions of a decoder, may round differently.
Not here: dealing data to workers (`batches.py`).
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ist.data.batched import BatchedDataset
from ist.data.batches import fetch, item_at, length
from ist.rng import Purpose, seeded, uniform

_DRAWN = 3
LOOKED_AT = 2 + _DRAWN
"""Items that are looked at: the first, the last, and some that are drawn; in small data sets, some of them twice."""

_FEW = 16  # integers of an item that must agree one by one, such as its target
_MOST = 100_000  # numbers of one tensor that are looked at
_APART = 0.02
"""By how much sums may differ, relative to their size; those of two random items differ by about one and a half."""


@dataclass(frozen=True)
class Item:
    """What one item holds.

    Attributes:
        form: A checksum of its structure, shapes, dtypes, and what is no array of numbers.
        total: All its numbers, added up with fixed random weights.
        size: The root of the sum of the terms' squares.
    """

    form: int
    total: float
    size: float

    def is_like(self, other: "Item", apart: float = _APART) -> bool:
        """Return whether two items are the same, up to rounding."""
        return self.form == other.form and abs(self.total - other.total) <= apart * max(self.size, other.size)


_UNKNOWN = Item(0, 0.0, 0.0)
"""Stands for an item that is another one each time."""


@dataclass(frozen=True)
class Content:
    """What a data set holds.

    Attributes:
        count: Its number of items.
        indices: Those that were looked at.
        items: What they hold.
    """

    count: int
    indices: tuple[int, ...]
    items: tuple[Item, ...]

    @property
    def unrepeatable(self) -> int | None:
        """The first item that was another one at the second look, if there is one."""
        return next((index for index, item in zip(self.indices, self.items, strict=True) if item == _UNKNOWN), None)

    def to_numbers(self) -> list[float]:
        """Return the content as numbers, always as many; the inverse of `from_numbers`."""
        return [
            float(self.count),
            *map(float, self.indices),
            *(number for item in self.items for number in (float(item.form), item.total, item.size)),
        ]

    @staticmethod
    def from_numbers(numbers: list[float]) -> "Content":
        """Return the content that `to_numbers` turned into numbers."""
        indices, rest = numbers[1 : 1 + LOOKED_AT], numbers[1 + LOOKED_AT :]
        items = [
            Item(int(form), total, size) for form, total, size in zip(*(rest[i::3] for i in range(3)), strict=True)
        ]
        return Content(int(numbers[0]), tuple(map(int, indices)), tuple(items))

    def other_item(self, other: "Content") -> int | None:
        """Return the first item that two data sets of the same number of items do not share, among those looked at."""
        for index, mine, theirs in zip(self.indices, self.items, other.items, strict=True):
            if _UNKNOWN not in (mine, theirs) and not mine.is_like(theirs):
                return index
        return None


NOTHING = Content(0, (0,) * LOOKED_AT, (_UNKNOWN,) * LOOKED_AT)
"""The content of data that are not there."""


def content(dataset: Dataset[Any], seed: int) -> Content:
    """Look at a few items of a data set, twice each, with the process's own generators seeded alike.

    Args:
        dataset: The data set.
        seed: The run's seed: which items are drawn, and what random items draw.

    Raises:
        DataError: An item cannot be read.
    """
    count = length(dataset)
    drawn = (uniform(_DRAWN, seed, Purpose.CONTENT) * count).astype(np.int64)
    indices = (0, count - 1, *map(int, drawn))
    return Content(count, indices, tuple(_item(dataset, index, seed) for index in indices))


def _item(dataset: Dataset[Any], index: int, seed: int) -> Item:
    looks = []
    for _ in range(2):
        with seeded(torch.device("cpu"), seed, Purpose.CONTENT, index):
            if isinstance(dataset, BatchedDataset):
                looks.append(_summary(fetch(dataset, np.array([index]), torch.device("cpu"))))
            else:
                looks.append(_summary(item_at(dataset, index)))
    return looks[0] if looks[0].is_like(looks[1], apart=1e-9) else _UNKNOWN


def _summary(value: Any) -> Item:
    form, total, squares = 1, 0.0, 0.0
    for number, leaf in enumerate(_leaves(value)):
        if isinstance(leaf, bytes):
            form = zlib.crc32(leaf, form)
        else:
            # The mean apart from what differs from it: a large one must not hide the rest.
            numbers = torch.cat([leaf - leaf.mean(), leaf.mean()[None]])
            draws = torch.from_numpy(uniform(len(numbers), number, Purpose.CONTENT))
            terms = numbers * torch.where(draws < 0.5, -0.5 - draws, draws)
            total, squares = total + float(terms.sum()), squares + float(terms.square().sum())
    return Item(form, total, squares**0.5)


def _leaves(value: Any) -> Iterator[bytes | Tensor]:
    """Yield what is in an item: its structure and what must be the same as bytes, arrays of numbers as float64."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield repr(key).encode()
            yield from _leaves(part)
    elif isinstance(value, tuple | list):
        yield f"({len(value)}".encode()
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        yield value.dtype.name.encode()
        plain = {"b": np.bool_, "f": np.float64, "c": np.complex128}.get(value.dtype.kind, np.int64)
        yield from _leaves(torch.from_numpy(np.array(value, dtype=plain)))
    elif isinstance(value, float):
        yield from _leaves(torch.tensor(value, dtype=torch.float64))
    elif isinstance(value, str | int | bytes):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        if value.layout is torch.strided and not value.is_quantized and not value.is_meta and value.numel():
            yield from _numbers(value.detach().cpu().reshape(-1))
    else:
        yield type(value).__name__.encode()


def _numbers(flat: Tensor) -> Iterator[bytes | Tensor]:
    if not flat.is_floating_point() and not flat.is_complex() and len(flat) <= _FEW:
        yield repr(flat.tolist()).encode()
        return
    flat = flat[:: 1 + len(flat) // _MOST]
    real = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
    yield torch.nan_to_num(real.double(), nan=1.0, posinf=2.0, neginf=3.0)
