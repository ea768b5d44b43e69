"""Assign samples to the steps of workers whose shards differ in length.

Each worker goes through its own epochs, whose number of steps depends on its number of samples, so all workers make the
same number of steps in a round, and a worker with few samples sees them more often.

Where it sits: the schedule of a run has this sampler with `data.skew`, and else a
`ShardedSampler` (`ist/data/batches.py`).
Not here: the split by classes (`dirichlet.py`), loading (`ist/runs/build.py`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ist.data.batches import ShardedSampler, epoch_order
from ist.data.shards.dirichlet import dirichlet_split
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


Sampler = ShardedSampler | SkewedSampler
"""An assignment of samples to workers and steps."""
