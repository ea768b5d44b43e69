"""A fingerprint of a data set: do two processes have the same data?

A few items are read and compared, and all samples that are in memory: class numbers exactly, other numbers by a sum.
Numbers are compared with a tolerance, because two kinds of processors, or two versions of a decoder, may round
differently. Samples that are read from files, other than these few, are not compared.

Where it sits: `ist/distributed/process_group.py` compares the fingerprints of all ranks before a run;
`ist/runs/rehearsal.py` warns of data that differ between two reads.
Not here: assigning data to workers (`batches.py`).
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ist.data.batched import BatchedDataset, Collated, WholeBatches
from ist.data.batches import fetch, is_stream, item_at, length
from ist.rng import Purpose, seeded, uniform

_DRAWN = 3
NUM_COMPARED = 2 + _DRAWN
"""The number of items in a fingerprint: the first, the last, and some at random, perhaps with repetitions."""

ALL = -1
"""Stands for all samples in memory, in place of the index of an item."""

_FEW = 16  # a tensor of at most this many integers, such as a target, must agree exactly
_MOST = 100_000  # at most about this many numbers of a tensor enter the sum
_TOLERANCE = 0.02
"""The largest difference of two sums relative to their size; those of two random items differ by about 1.5."""


@dataclass(frozen=True)
class Item:
    """The fingerprint of one item.

    Attributes:
        form: A checksum of its structure, shapes, dtypes, and all values that are not arrays of numbers.
        total: The sum of all its numbers with fixed random weights.
        size: The root of the sum of the squared terms.
    """

    form: int
    total: float
    size: float

    def is_close(self, other: "Item", tolerance: float = _TOLERANCE) -> bool:
        """Return whether two items are the same up to rounding."""
        return self.form == other.form and abs(self.total - other.total) <= tolerance * max(self.size, other.size)


_UNKNOWN = Item(0, 0.0, 0.0)
"""The fingerprint of an item that differs between two reads."""


@dataclass(frozen=True)
class DataFingerprint:
    """The fingerprint of a data set.

    Attributes:
        count: The number of items in the data set; of a stream, the number of compared items.
        indices: The indices of the items in the fingerprint; the last one is `ALL`.
        items: The fingerprints of these items, and of all samples in memory.
    """

    count: int
    indices: tuple[int, ...]
    items: tuple[Item, ...]

    @property
    def unrepeatable(self) -> int | None:
        """The index of the first item that differs between two reads, if there is one."""
        if self == NO_DATA:
            return None
        return next((index for index, item in zip(self.indices, self.items, strict=True) if item == _UNKNOWN), None)

    def to_numbers(self) -> list[float]:
        """Return the fingerprint as a list of fixed length; the inverse of `from_numbers`."""
        return [
            float(self.count),
            *map(float, self.indices),
            *(number for item in self.items for number in (float(item.form), item.total, item.size)),
        ]

    @staticmethod
    def from_numbers(numbers: list[float]) -> "DataFingerprint":
        """Return the fingerprint from the result of `to_numbers`."""
        indices, rest = numbers[1 : 2 + NUM_COMPARED], numbers[2 + NUM_COMPARED :]
        items = [
            Item(int(form), total, size) for form, total, size in zip(*(rest[i::3] for i in range(3)), strict=True)
        ]
        return DataFingerprint(int(numbers[0]), tuple(map(int, indices)), tuple(items))

    def first_different_item(self, other: "DataFingerprint") -> int | None:
        """Return the index of the first compared item that differs between two data sets of equal length.

        `ALL`: no compared item differs, but others do; None: no difference was found.
        """
        for index, mine, theirs in zip(self.indices, self.items, other.items, strict=True):
            if _UNKNOWN not in (mine, theirs) and not mine.is_close(theirs):
                return index
        return None


NO_DATA = DataFingerprint(0, (0,) * NUM_COMPARED + (ALL,), (_UNKNOWN,) * (NUM_COMPARED + 1))
"""The fingerprint that stands for no data set."""


def data_fingerprint(dataset: Dataset[Any], seed: int) -> DataFingerprint:
    """Return the fingerprint of a data set: of a few items, read twice with the same seeds, and of all in memory.

    Of a stream, these are its first items.

    Args:
        dataset: The data set.
        seed: The seed of the run; it determines which items are read, and the random draws of the items.

    Raises:
        DataError: An item cannot be read.
    """
    if is_stream(dataset):
        first = tuple(range(NUM_COMPARED))
        items = (*(_item(dataset, index, seed) for index in first), _in_memory(dataset))
        return DataFingerprint(NUM_COMPARED, (*first, ALL), items)
    count = length(dataset)
    drawn = (uniform(_DRAWN, seed, Purpose.CONTENT) * count).astype(np.int64)
    indices = (0, count - 1, *map(int, drawn))
    items = (*(_item(dataset, index, seed) for index in indices), _in_memory(dataset))
    return DataFingerprint(count, (*indices, ALL), items)


def _item(dataset: Dataset[Any], index: int, seed: int) -> Item:
    reads = []
    items = dataset.items if isinstance(dataset, WholeBatches) else dataset
    for _ in range(2):
        with seeded(torch.device("cpu"), seed, Purpose.CONTENT, index):
            if isinstance(items, BatchedDataset):
                reads.append(_summary(fetch(dataset, np.array([index]), torch.device("cpu"))))
            else:
                reads.append(_summary(item_at(dataset, index)))
    return reads[0] if reads[0].is_close(reads[1], tolerance=1e-9) else _UNKNOWN


def _in_memory(dataset: Dataset[Any]) -> Item:
    """Return the fingerprint of all samples in memory: exact for rows of few integers, such as class numbers."""
    tensors = [
        tensor
        for tensor in _tensors(dataset)
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_quantized
    ]
    found = _summary(tensors)
    form = found.form
    for tensor in tensors:
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= _FEW * len(tensor):
            form = zlib.crc32(tensor.numpy().data, form)
    return Item(form, found.total, found.size)


def _tensors(dataset: Dataset[Any]) -> list[Tensor]:
    """Return the tensors in which a data set holds samples, targets, or the indices of a part, as far as known."""
    if isinstance(dataset, Collated | WholeBatches):
        return _tensors(dataset.items)
    if isinstance(dataset, Subset):
        return [torch.as_tensor(dataset.indices, dtype=torch.int64), *_tensors(dataset.dataset)]
    if isinstance(dataset, TensorDataset):
        return [tensor.detach() for tensor in dataset.tensors if tensor.layout is torch.strided and tensor.ndim]
    targets = getattr(dataset, "targets", None)  # as the image data sets of torchvision have it
    if isinstance(targets, list) and targets and all(type(target) is int for target in targets):
        return [torch.tensor(targets)]
    return [targets.detach()] if isinstance(targets, Tensor) and targets.ndim else []


def _summary(value: Any) -> Item:
    form, total, squares = 1, 0.0, 0.0
    for number, leaf in enumerate(_leaves(value)):
        if isinstance(leaf, bytes):
            form = zlib.crc32(leaf, form)
        else:
            # Separate the mean from the deviations, so that a large mean does not hide them.
            numbers = torch.cat([leaf - leaf.mean(), leaf.mean()[None]])
            draws = torch.from_numpy(uniform(len(numbers), number, Purpose.CONTENT))
            terms = numbers * torch.where(draws < 0.5, -0.5 - draws, draws)
            total, squares = total + float(terms.sum()), squares + float(terms.square().sum())
    return Item(form, total, squares**0.5)


def _leaves(value: Any) -> Iterator[bytes | Tensor]:
    """Yield the parts of an item: structure and values that must be equal as bytes, arrays of numbers as float64."""
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
