"""Deal a data set to workers and cut it into batches.

Each worker owns a fixed shard (its own data never moves); or, where every machine holds all data, shards are dealt anew
every epoch, as `torch.utils.data.DistributedSampler` does. An epoch is one shuffled pass of every worker over its
shard, in the same number of batches for all; batches of an epoch differ in size by at most one, so there is no runt
batch to upset batch norm. Which samples a step uses is a pure function of (seed, worker, step): a resumed run needs no
saved position.

Not here: which data set, what is done with a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from ist.data.batched import BatchedDataset
from ist.data.nested import moved
from ist.errors import DataError, ISTError, is_out_of_memory, said_at
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
        DataError: The data set has no length (a stream cannot be dealt), or its items cannot be asked for by number.
    """
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{type(dataset).__name__} is an IterableDataset: IST deals samples by their numbers, and needs a "
            "map-style data set (with __getitem__ and __len__)"
        )
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


def fetch(
    dataset: Dataset[Any], indices: Indices, device: torch.device, numbers: Callable[[], Indices] | None = None
) -> tuple[Any, Any]:
    """Return the samples at `indices` as one batch (inputs, targets) on `device`.

    Inputs and targets are tensors, or tuples or mappings of tensors.

    Args:
        dataset: The data set, or a part of it.
        indices: Positions in it.
        device: Where the batch will be.
        numbers: Tells by which numbers these samples are known, for messages; None: by their positions.

    Raises:
        DataError: A sample cannot be read, or samples make no batch of (inputs, targets); the message names them.
    """
    numbers = numbers or (lambda: indices)
    if type(dataset) is TensorDataset:
        rows = torch.from_numpy(indices)
        batch: Any = [tensor[rows] for tensor in dataset.tensors]
    else:
        try:
            if isinstance(dataset, BatchedDataset):
                batch = dataset.batch(indices)
            else:
                batch = _collated(dataset, indices, numbers)
        except (ISTError, MemoryError):
            raise
        except Exception as error:  # whatever a data set raises
            if is_out_of_memory(error):
                raise
            raise DataError(
                f"{named_samples(numbers())} of {_class_name(dataset)} do not make a batch of (inputs, targets): "
                f"{said_at(error)}"
            ) from error
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{len(batch)} parts" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
        raise DataError(f"a batch of {_class_name(dataset)} is {what}, not a pair (inputs, targets)")
    inputs, targets = batch
    return moved(inputs, device), moved(targets, device)


_MOST_NAMED = 8


def named_samples(numbers: Indices) -> str:
    """Name samples by their numbers, the first of them at least."""
    listed = ", ".join(map(str, numbers[:_MOST_NAMED].tolist()))
    more = f", ... ({len(numbers)})" if len(numbers) > _MOST_NAMED else ""
    return f"sample{'s' if len(numbers) > 1 else ''} {listed}{more}"


def item_at(dataset: Dataset[Any], index: int, numbers: Callable[[], Indices] | None = None, place: int = 0) -> Any:
    """Return an item of a data set.

    Args:
        dataset: The data set, or a part of it.
        index: A position in it.
        numbers: Tells by which numbers the samples of a batch are known, for messages; None: by their positions.
        place: Which of the batch's samples this is.

    Raises:
        DataError: The data set raises something; the message names the sample.
    """
    try:
        return dataset[index]
    except (ISTError, MemoryError):
        raise
    except Exception as error:  # whatever a data set raises
        if is_out_of_memory(error):
            raise
        known = numbers()[place] if numbers else index
        raise DataError(f"sample {known} of {_class_name(dataset)}: {said_at(error)}") from error


def _collated(dataset: Dataset[Any], indices: Indices, numbers: Callable[[], Indices]) -> Any:
    items = [item_at(dataset, int(index), numbers, place) for place, index in enumerate(indices)]
    try:
        return default_collate(items)
    except Exception as error:
        for place in range(1, len(items)):
            try:
                default_collate([items[0], items[place]])
            except Exception as single:
                pair = named_samples(numbers()[[0, place]])
                raise DataError(f"{pair} of {_class_name(dataset)} do not make a batch: {said_at(single)}") from error
        raise


def _class_name(dataset: Dataset[Any]) -> str:
    """Name the class of a data set, not of the part of it that a worker has."""
    return type(dataset.dataset if isinstance(dataset, Subset) else dataset).__name__
