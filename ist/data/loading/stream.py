"""Streams (`torch.utils.data.IterableDataset`) as training data: each worker takes its part of the items, in order.

Item number i of a stream belongs to worker i % num_workers. If the stream has shards (`num_shards` and `shard`, as the
streams of Hugging Face's `datasets`), and their number is a multiple of the number of workers, each worker reads only
its own shards. A stream that ends is read again from its start, after `set_epoch` if it has this method.

Law: the item at a position is always the same, so a resumed run skips the items before its first step and then equals
an uninterrupted one. Skipped items are read.

Where it sits: `ist/runs/build.py` wraps a stream in a `StreamPart`, and makes the `StreamSampler` of the run.
Not here: reading batches (`loader.py`), data sets whose items have numbers (`ist/data/batches.py`). The order is the
stream's own: shuffling is up to its buffer.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from ist.errors import DataError
from ist.rng import Indices, ItemDraws, Purpose, drawing

_END = object()


class StreamPart(Dataset[Any]):
    """A part of a stream as a data set whose items have positions; reading backwards starts the stream again.

    Args:
        stream: The stream. It can be iterated several times, and yields the same items if the process's generators
            are the same.
        seed: The seed of the run, for what the stream draws.
        num_parts: The number of parts.
        number: The number of this part.
    """

    def __init__(self, stream: IterableDataset[Any], seed: int, num_parts: int = 1, number: int = 0) -> None:
        self.stream = stream
        self._seed = seed
        self._num_parts = num_parts
        self._number = number
        shards, shard = getattr(stream, "num_shards", None), getattr(stream, "shard", None)
        self._reads_own = isinstance(shards, int) and callable(shard) and num_parts > 1 and shards % num_parts == 0
        self._part: Any = shard(num_parts, number) if callable(shard) and self._reads_own else stream
        self._process = os.getpid()
        self._rewind()

    def part(self, num_parts: int, number: int) -> "StreamPart":
        """Return a part of the stream, with an iterator of its own."""
        return StreamPart(self.stream, self._seed, num_parts, number)

    def __getitem__(self, position: int) -> Any:
        """Return the item at a position of the part; the stream is read up to it.

        Raises:
            DataError: The stream has no items.
        """
        wanted = position if self._reads_own else position * self._num_parts + self._number
        if wanted < self._read or self._process != os.getpid():  # a forked process would share open files
            self._rewind()
        while True:
            item = self._next()
            if self._read > wanted:
                return item

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the iterator, which another process starts again."""
        return {**vars(self), "_iterator": None, "_read": 0, "_pass": 0, "_process": -1}

    def _rewind(self) -> None:
        self._iterator: Iterator[Any] | None = None
        self._read, self._pass, self._process = 0, 0, os.getpid()

    def _next(self) -> Any:
        """Return the next item, read with generators that are seeded for it."""
        element = self._read * self._num_parts + self._number if self._reads_own else self._read
        with drawing(ItemDraws(self._seed, Purpose.TRAINING)) as seed:
            seed(ItemDraws(self._seed, Purpose.TRAINING).seeds(np.array([element]))[0])
            item = self._from_iterator()
            if item is _END:
                self._pass, self._iterator = self._pass + 1, None
                item = self._from_iterator()
        if item is _END:
            raise DataError(f"the stream {type(self.stream).__name__} has no items")
        self._read += 1
        return item

    def _from_iterator(self) -> Any:
        if self._iterator is None:
            set_epoch = getattr(self._part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self._pass)
            self._iterator = iter(self._part)
        return next(self._iterator, _END)


@dataclass(frozen=True)
class StreamSampler:
    """The assignment of a stream's items to workers and steps: each worker takes the next items of its part.

    Attributes:
        num_workers: The number of workers.
        batch_size: The number of items in a batch.
        seed: The seed of the run.
    """

    num_workers: int
    batch_size: int
    seed: int

    @property
    def num_samples(self) -> None:
        """None: a stream has no length."""
        return None

    @property
    def steps_per_epoch(self) -> None:
        """None: a stream has no length."""
        return None

    @property
    def smallest_batch(self) -> int:
        """The number of items in every batch."""
        return self.batch_size

    def epoch(self, worker: int, step: int) -> int:  # noqa: ARG002
        """Return 0: items are numbered through all passes."""
        return 0

    def batch(self, worker: int, step: int) -> Indices:  # noqa: ARG002
        """Return the positions in the worker's part of the items of its local step `step` (from 0): int64."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)

    def numbers(self, worker: int, positions: Indices) -> Indices:
        """Return numbers for the items at positions of a worker's part, which differ between workers."""
        return positions * self.num_workers + worker
