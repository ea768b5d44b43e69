"""Deal a data set to workers and cut it into batches.

Each worker owns a fixed shard (its own data never moves); or, where every machine holds all data, shards are dealt anew
every epoch, as `torch.utils.data.DistributedSampler` does. An epoch is one shuffled pass of every worker over its
shard, in the same number of batches for all; batches of an epoch differ in size by at most one, so there is no runt
batch to upset batch norm. Which samples a step uses is a pure function of (seed, worker, step): a resumed run needs no
saved position.

Not here: which data set, what is done with a batch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from ist.data.batched import BatchedDataset
from ist.data.nested import moved
from ist.errors import DataError
from ist.rng import Indices, Purpose, permutation


@dataclass(frozen=True)
class Dealing:
    """How `num_samples` samples are dealt to `num_workers` workers in batches of `batch_size`.

    Batches are made even, so they may be smaller; where a shard holds fewer samples than another gives it steps,
    larger by one.

    Attributes:
        shuffle: `local`: a worker's shard is the same in every epoch; `global`: it is drawn anew.

    Raises:
        DataError: There are fewer samples than workers.
    """

    num_samples: int
    num_workers: int
    batch_size: int
    seed: int
    shuffle: Literal["local", "global"] = "local"

    def __post_init__(self) -> None:
        if self.num_samples < self.num_workers:
            raise DataError(f"{self.num_samples} training samples cannot be dealt to {self.num_workers} workers")

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every worker in an epoch: enough for the largest shard."""
        largest_shard = -(-self.num_samples // self.num_workers)
        # A shard one sample smaller must still give every step a sample.
        return min(-(-largest_shard // self.batch_size), self.num_samples // self.num_workers)

    @property
    def smallest_batch(self) -> int:
        """Samples of the smallest batch that any worker's step will have."""
        return self.num_samples // self.num_workers // self.steps_per_epoch

    def shard(self, worker: int) -> Indices:
        """Return the sample numbers that worker `worker` needs: int64, sorted.

        Disjoint and complete over workers; with a global shuffle, all of them.
        """
        if self.shuffle == "global":
            return np.arange(self.num_samples)
        return np.sort(permutation(self.num_samples, self.seed, Purpose.SHARD)[worker :: self.num_workers])

    def batch(self, worker: int, step: int) -> Indices:
        """Return the positions, within the worker's shard, of the samples of its local step `step` (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.shuffle == "global":
            order = _epoch_order(self.num_samples, self.seed, epoch, 0)[worker :: self.num_workers]
        else:
            order = _epoch_order(len(range(worker, self.num_samples, self.num_workers)), self.seed, epoch, worker)
        size, longer = divmod(len(order), self.steps_per_epoch)  # the first `longer` batches hold one sample more
        start = position * size + min(position, longer)
        return order[start : start + size + (position < longer)]


@lru_cache(maxsize=64)
def _epoch_order(shard_size: int, seed: int, epoch: int, worker: int) -> Indices:
    return permutation(shard_size, seed, Purpose.ORDER, epoch, worker)


def length(dataset: Dataset[Any]) -> int:
    """Return the number of samples.

    Raises:
        DataError: The data set has no length (a stream cannot be dealt).
    """
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(f"{type(dataset).__name__} has no length: IST deals map-style data sets") from error


def take_shard(dataset: Dataset[Any], indices: Indices) -> Dataset[Any]:
    """Return the part of a data set that one worker needs, without keeping the rest alive where that can be.

    Args:
        dataset: The data set.
        indices: What is needed of it, int64, sorted, none twice.
    """
    if len(indices) == length(dataset):
        return dataset
    if isinstance(dataset, BatchedDataset):
        return dataset.part(indices)
    if type(dataset) is TensorDataset:  # a subclass may change what an item is
        rows = torch.from_numpy(indices)
        return TensorDataset(*(tensor[rows] for tensor in dataset.tensors))
    return Subset(dataset, indices.tolist())


def fetch(dataset: Dataset[Any], indices: Indices, device: torch.device) -> tuple[Any, Any]:
    """Return the samples at `indices` as one batch (inputs, targets) on `device`.

    Inputs and targets are tensors, or tuples or mappings of tensors.
    """
    if isinstance(dataset, BatchedDataset):
        inputs, targets = dataset.batch(indices)
    elif type(dataset) is TensorDataset:
        rows = torch.from_numpy(indices)
        inputs, targets = (tensor[rows] for tensor in dataset.tensors)
    else:
        inputs, targets = default_collate([dataset[int(index)] for index in indices])
    return moved(inputs, device), moved(targets, device)
