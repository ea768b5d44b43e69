"""Assign samples to the steps of workers whose shards differ in length.

Each worker goes through its own epochs, whose number of steps depends on its number of samples, so all workers make the
same number of steps in a round, and a worker with few samples sees them more often.

Where it sits: the schedule of a run has one of these samplers with `data.skew` or `data.shard: own`, and else a
`ShardedSampler` (`ist/data/batches.py`).
Not here: the split by classes (`dirichlet.py`), loading (`ist/runs/loading/load.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ist.data.batches import ShardedSampler, epoch_order, length
from ist.data.loading.stream import StreamSampler
from ist.data.shards.dirichlet import dirichlet_split
from ist.errors import DataError, ISTError, error_with_line, is_out_of_memory
from ist.rng import Indices


def _steps(samples: int, batch_size: int) -> int:
    """Return the number of steps in which a worker goes through its shard once."""
    return -(-samples // batch_size)


def _batch(samples: int, batch_size: int, seed: int, worker: int, step: int) -> Indices:
    """Return the positions in a worker's shard of the samples of a step; batches differ in size by at most one."""
    epoch, position = divmod(step, _steps(samples, batch_size))
    order = epoch_order(samples, seed, epoch, worker)
    size, longer = divmod(samples, _steps(samples, batch_size))
    start = position * size + min(position, longer)
    return order[start : start + size + (position < longer)]


@dataclass(frozen=True, eq=False)
class SkewedSampler:
    """The assignment of a common data set to workers by classes; see `dirichlet_split`.

    Attributes:
        labels: The class number of each sample: int64 of shape (samples,).
        alpha: The concentration of the Dirichlet distribution.
        num_workers: The number of workers.
        batch_size: The largest number of samples in a batch.
        seed: The seed of the run.

    Raises:
        DataError: There are fewer samples than workers.
    """

    labels: Indices
    alpha: float
    num_workers: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        _ = self.shards  # report too few samples at once

    @cached_property
    def shards(self) -> list[Indices]:
        """The samples of each worker."""
        return dirichlet_split(self.labels, self.num_workers, self.alpha, self.seed)

    @property
    def num_samples(self) -> int:
        """The number of samples in the data set."""
        return len(self.labels)

    @property
    def steps_per_epoch(self) -> None:
        """None: it differs between workers."""
        return None

    @property
    def smallest_batch(self) -> int:
        """The number of samples in the smallest batch of any worker."""
        return min(len(shard) // _steps(len(shard), self.batch_size) for shard in self.shards)

    @property
    def samples_by_class(self) -> tuple[tuple[int, ...], ...]:
        """For each worker, the number of its samples of each class, in the order of class numbers."""
        classes = np.unique(self.labels)
        return tuple(tuple(int((self.labels[shard] == label).sum()) for label in classes) for shard in self.shards)

    def shard(self, worker: int) -> Indices:
        """Return the numbers of a worker's samples: int64, sorted."""
        return self.shards[worker]

    def epoch(self, worker: int, step: int) -> int:
        """Return the epoch of the worker, from 0, to which its local step `step` belongs."""
        return step // _steps(len(self.shards[worker]), self.batch_size)

    def batch(self, worker: int, step: int) -> Indices:
        """Return the positions in the worker's shard of the samples of its local step `step` (from 0): int64."""
        return _batch(len(self.shards[worker]), self.batch_size, self.seed, worker, step)


class OwnData:
    """The workers' own data sets: each is loaded once, in the process that asks for it, and is never sent.

    Args:
        load: Returns the data set of a worker.
    """

    def __init__(self, load: Callable[[int], Any]) -> None:
        self._load = load
        self._loaded: dict[int, Dataset[Any]] = {}

    def __call__(self, worker: int) -> Dataset[Any]:
        """Return the data set of a worker.

        Raises:
            DataError: It cannot be loaded, is no data set, or is empty.
        """
        if worker not in self._loaded:
            try:
                dataset = self._load(worker)
            except (ISTError, MemoryError):
                raise
            except Exception as error:  # the user's function may raise anything
                if is_out_of_memory(error):
                    raise
                raise DataError(f"the data of worker {worker} cannot be loaded: {error_with_line(error)}") from error
            self.keep(worker, dataset)
        return self._loaded[worker]

    def keep(self, worker: int, dataset: Any) -> None:
        """Keep the data set of a worker that is already loaded.

        Raises:
            DataError: It is no data set, or is empty.
        """
        if not isinstance(dataset, Dataset) and not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"the data of worker {worker} are a {type(dataset).__name__}: expected a map-style data set of pairs "
                "(input, target)"
            )
        if length(dataset) == 0:
            raise DataError(f"the data set of worker {worker} is empty: every worker needs at least one sample")
        self._loaded[worker] = dataset

    def lengths(self) -> dict[int, int]:
        """Return the numbers of samples of the data sets that are loaded, by worker."""
        return {worker: length(dataset) for worker, dataset in self._loaded.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without data sets: another process loads its own."""
        return {"_load": self._load, "_loaded": {}}


@dataclass(frozen=True, eq=False)
class OwnSampler:
    """The order in which each worker reads a data set of its own.

    Attributes:
        data: The workers' data sets; only those of this process's workers may be asked for.
        worker: The worker of this process, or the first one; None: this process has no worker.
        num_workers: The number of workers.
        batch_size: The largest number of samples in a batch.
        seed: The seed of the run.
        lengths: The numbers of samples of workers, as far as they are known without their data sets.
    """

    data: OwnData = field(repr=False)
    worker: int | None
    num_workers: int
    batch_size: int
    seed: int
    lengths: Mapping[int, int] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the lengths that are known, which a loader process then need not find out."""
        return {**vars(self), "lengths": {**self.lengths, **self.data.lengths()}}

    def _length(self, worker: int) -> int:
        return self.lengths[worker] if worker in self.lengths else length(self.data(worker))

    @property
    def num_samples(self) -> None:
        """None: no process knows the number of samples of all workers."""
        return None

    @property
    def steps_per_epoch(self) -> None:
        """None: it differs between workers."""
        return None

    @property
    def smallest_batch(self) -> int:
        """The number of samples in the smallest batch of this process's worker."""
        if self.worker is None:
            return self.batch_size
        samples = self._length(self.worker)
        return samples // _steps(samples, self.batch_size)

    def shard(self, worker: int) -> Indices:
        """Return the numbers of a worker's samples in its own data set, which are all of them: int64."""
        return np.arange(self._length(worker))

    def epoch(self, worker: int, step: int) -> int:
        """Return the epoch of the worker, from 0, to which its local step `step` belongs."""
        return step // _steps(self._length(worker), self.batch_size)

    def batch(self, worker: int, step: int) -> Indices:
        """Return the positions in the worker's data set of the samples of its local step `step` (from 0): int64."""
        return _batch(self._length(worker), self.batch_size, self.seed, worker, step)


Sampler = ShardedSampler | StreamSampler | SkewedSampler | OwnSampler
"""An assignment of samples to workers and steps."""
