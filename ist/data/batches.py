"""Assign the samples of a data set to workers, and read them in batches.

Each worker has a fixed shard, so its data never move. With a global shuffle, which needs all data on every machine,
each epoch draws new shards, as `torch.utils.data.DistributedSampler` does. In an epoch each worker goes through its
shard once, shuffled, and all workers make the same number of batches. The batches of a worker differ in size by at most
one, so no small last batch disturbs batch norm. The samples of a step are a function of (seed, worker, step), so a
resumed run needs no saved position.

Where it sits: `ist/loops/local_loop.py` and the checks fetch their batches here; `ist/evaluation/` as well.
Not here: loading a data set (`registry.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from ist.data.batched import BatchedDataset, Collated, WholeBatches
from ist.data.loading.stream import StreamPart
from ist.data.nested import moved
from ist.errors import DataError, ISTError, error_with_line, is_out_of_memory
from ist.rng import Indices, ItemDraws, Purpose, drawing, permutation


@dataclass(frozen=True)
class ShardedSampler:
    """The assignment of samples to workers and steps.

    Batches of an epoch have nearly equal sizes: at most `batch_size`, except that a batch has one sample more if a
    worker's shard would otherwise not last for the same number of steps.

    Attributes:
        num_samples: The number of samples in the data set.
        num_workers: The number of workers.
        batch_size: The intended number of samples in a batch.
        seed: The seed of the run.
        shuffle: `local`: a worker has the same shard in every epoch; `global`: each epoch draws new shards.

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
            raise DataError(
                f"{self.num_samples} training samples are too few for {self.num_workers} workers (train.workers): each "
                "worker needs at least one"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of each worker in an epoch."""
        largest_shard = -(-self.num_samples // self.num_workers)
        # A shard one sample smaller must still give every step a sample.
        return min(-(-largest_shard // self.batch_size), self.num_samples // self.num_workers)

    @property
    def smallest_batch(self) -> int:
        """The number of samples in the smallest batch of any worker."""
        return self.num_samples // self.num_workers // self.steps_per_epoch

    def shard(self, worker: int) -> Indices:
        """Return the numbers of the samples that worker `worker` needs: int64, sorted.

        Shards are disjoint and together contain every sample. With a global shuffle, each worker needs all samples.
        """
        if self.shuffle == "global":
            return np.arange(self.num_samples)
        return np.sort(permutation(self.num_samples, self.seed, Purpose.SHARD)[worker :: self.num_workers])

    def epoch(self, worker: int, step: int) -> int:  # noqa: ARG002  # of other samplers, it differs by worker
        """Return the epoch, from 0, to which a worker's local step `step` belongs."""
        return step // self.steps_per_epoch

    def batch(self, worker: int, step: int) -> Indices:
        """Return the positions in the worker's shard of the samples of its local step `step` (from 0): int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.shuffle == "global":
            order = epoch_order(self.num_samples, self.seed, epoch, 0)[worker :: self.num_workers]
        else:
            order = epoch_order(len(range(worker, self.num_samples, self.num_workers)), self.seed, epoch, worker)
        size, longer = divmod(len(order), self.steps_per_epoch)  # the first `longer` batches have one sample more
        start = position * size + min(position, longer)
        return order[start : start + size + (position < longer)]


def micro_batches(batch: Indices, number: int) -> list[Indices]:
    """Split the samples of a step into `number` consecutive parts whose sizes differ by at most one."""
    return np.array_split(batch, number)


@lru_cache(maxsize=64)
def epoch_order(shard_size: int, seed: int, epoch: int, worker: int) -> Indices:
    """Return the order in which a worker goes through its shard in an epoch: positions in the shard."""
    return permutation(shard_size, seed, Purpose.ORDER, epoch, worker)


def length(dataset: Dataset[Any]) -> int:
    """Return the number of samples.

    Raises:
        DataError: The data set has no length, or is an IterableDataset, whose items have no numbers.
    """
    if isinstance(dataset, Collated | WholeBatches):
        return length(dataset.items)
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{type(dataset).__name__} is an IterableDataset, which can only be training data that all workers share: "
            "give a map-style data set here (with __getitem__ and __len__)"
        )
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(
            f"{type(dataset).__name__} has no length: IST needs a map-style data set (with __getitem__ and __len__)"
        ) from error


def as_numbered(dataset: Dataset[Any], seed: int) -> Dataset[Any]:
    """Return a stream as a data set whose items have positions (`StreamPart`), and any other data set as it is.

    Args:
        dataset: The data set.
        seed: The seed of the run, for what a stream draws.
    """
    if isinstance(dataset, Collated | WholeBatches):
        return replace(dataset, items=as_numbered(dataset.items, seed))
    return StreamPart(dataset, seed) if isinstance(dataset, IterableDataset) else dataset


def is_stream(dataset: Any) -> bool:
    """Return whether a data set is a stream, whose items have no numbers and which has no length."""
    if isinstance(dataset, Collated | WholeBatches):
        return is_stream(dataset.items)
    return isinstance(dataset, IterableDataset | StreamPart)


def is_empty(dataset: Dataset[Any]) -> bool:
    """Return whether a data set has no samples; whether a stream has some, only reading it shows."""
    return not is_stream(dataset) and length(dataset) == 0


def stream_part(dataset: Dataset[Any], num_workers: int, worker: int) -> Dataset[Any]:
    """Return a worker's part of a stream that `as_numbered` has wrapped."""
    if isinstance(dataset, Collated | WholeBatches):
        return replace(dataset, items=stream_part(dataset.items, num_workers, worker))
    assert isinstance(dataset, StreamPart)
    return dataset.part(num_workers, worker)


def take_shard(dataset: Dataset[Any], indices: Indices) -> Dataset[Any]:
    """Return the part of a data set that one worker needs, without the memory of the rest if possible.

    Args:
        dataset: The data set.
        indices: The numbers of the items in the part: int64, sorted, without duplicates.
    """
    if len(indices) == length(dataset):
        return dataset
    if isinstance(dataset, WholeBatches):
        return WholeBatches(take_shard(dataset.items, indices))
    if isinstance(dataset, BatchedDataset):
        return dataset.part(indices)
    if isinstance(dataset, Collated):
        return Collated(take_shard(dataset.items, indices), dataset.collate)
    if type(dataset) is TensorDataset:  # a subclass may change what an item is
        rows = torch.from_numpy(indices)
        return TensorDataset(*(tensor[rows] for tensor in dataset.tensors))
    return Subset(dataset, indices.tolist())


def fetch(
    dataset: Dataset[Any],
    indices: Indices,
    device: torch.device,
    numbers: Callable[[], Indices] | None = None,
    draws: ItemDraws | None = None,
) -> tuple[Any, Any]:
    """Return the samples at `indices` as one batch (inputs, targets) on `device`.

    Inputs and targets are tensors, or tuples or mappings of tensors. A batch of `WholeBatches` is (batch, None).

    Args:
        dataset: The data set, or a part of it.
        indices: Positions in it: int64.
        device: The device of the batch.
        numbers: Returns the samples' numbers in the full data set, for messages and for `draws`; None: the numbers are
            `indices`.
        draws: The key of the random numbers that the data set draws: those of an item depend on this key and the item's
            number only. If the data set reads a whole batch at once, those of the batch depend on its first item. None:
            the data set draws from the process's generators as they are.

    Raises:
        DataError: A sample cannot be read, or the samples do not make a batch (inputs, targets); the message names
            them.
    """
    numbers = numbers or (lambda: indices)
    is_whole = isinstance(dataset, WholeBatches)
    if isinstance(dataset, WholeBatches):
        dataset = dataset.items
    if type(dataset) is TensorDataset:
        rows = torch.from_numpy(indices)
        batch: Any = [tensor[rows] for tensor in dataset.tensors]
    else:
        try:
            batch = _read(dataset, indices, numbers, draws)
        except (ISTError, MemoryError):
            raise
        except Exception as error:  # a data set may raise anything
            if is_out_of_memory(error):
                raise
            raise DataError(
                f"{named_samples(numbers())} of {class_name(dataset)} do not make a batch of (inputs, targets): "
                f"{error_with_line(error)}"
            ) from error
    if is_whole:
        return moved(batch, device), None
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"has {len(batch)} parts" if isinstance(batch, tuple | list) else f"is a {type(batch).__name__}"
        raise DataError(f"a batch of {class_name(dataset)} {found}: expected a pair (inputs, targets)")
    inputs, targets = batch
    return moved(inputs, device), moved(targets, device)


def _read(dataset: Dataset[Any], indices: Indices, numbers: Callable[[], Indices], draws: ItemDraws | None) -> Any:
    """Return the samples at `indices` as one batch; the process's generators are afterwards as before."""
    seeds = draws.seeds(numbers()) if draws is not None else [0] * len(indices)
    with drawing(draws) as seed:
        if isinstance(dataset, BatchedDataset):
            seed(seeds[0])
            return dataset.batch(indices)
        items = dataset.items if isinstance(dataset, Collated) else dataset
        collate = dataset.collate if isinstance(dataset, Collated) else default_collate
        found = _items(items, indices, numbers, lambda place: seed(seeds[place]))
        if isinstance(dataset, Collated):
            return collate(found)
        return _stacked(dataset, found, numbers)


_MOST_NAMED = 8


def named_samples(numbers: Indices) -> str:
    """Return the numbers of the first samples, and how many there are, for a message."""
    listed = ", ".join(map(str, numbers[:_MOST_NAMED].tolist()))
    more = f", ... ({len(numbers)})" if len(numbers) > _MOST_NAMED else ""
    return f"sample{'s' if len(numbers) > 1 else ''} {listed}{more}"


def item_at(dataset: Dataset[Any], index: int, numbers: Callable[[], Indices] | None = None, place: int = 0) -> Any:
    """Return an item of a data set.

    Args:
        dataset: The data set, or a part of it.
        index: A position in it.
        numbers: Returns the numbers in the full data set of the batch's samples, for messages; None: the number is
            `index`.
        place: The position of the item in the batch.

    Raises:
        DataError: The data set raises an exception; the message names the sample.
    """
    try:
        return dataset[index]
    except (ISTError, MemoryError):
        raise
    except Exception as error:  # a data set may raise anything
        if is_out_of_memory(error):
            raise
        number = numbers()[place] if numbers else index
        raise DataError(f"sample {number} of {class_name(dataset)}: {error_with_line(error)}") from error


def _items(
    dataset: Dataset[Any], indices: Indices, numbers: Callable[[], Indices], seed: Callable[[int], None]
) -> list[Any]:
    """Return the items at `indices`; `seed` seeds the generators for the item at a place of the batch."""
    if (read_all := _all_at_once(dataset)) is not None:
        seed(0)
        try:
            return list(read_all(indices.tolist()))
        except Exception as error:
            if isinstance(error, ISTError | MemoryError) or is_out_of_memory(error):
                raise
            for place, index in enumerate(indices.tolist()):  # name the sample, if only one is the cause
                seed(0)
                item_at(dataset, index, numbers, place)
            raise
    found = []
    for place, index in enumerate(indices.tolist()):
        seed(place)
        found.append(item_at(dataset, index, numbers, place))
    return found


def _all_at_once(dataset: Dataset[Any]) -> Callable[[list[int]], Any] | None:
    """Return the method `__getitems__` of a data set that reads several items at once, as PyTorch's loader does."""
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    if not callable(getattr(whole, "__getitems__", None)):
        return None
    found: Callable[[list[int]], Any] = dataset.__getitems__  # type: ignore[attr-defined]
    return found


def _stacked(dataset: Dataset[Any], items: list[Any], numbers: Callable[[], Indices]) -> Any:
    """Return items as a batch, by PyTorch's collate function; the message of an error names two that do not match."""
    try:
        return default_collate(items)
    except Exception as error:
        for place in range(1, len(items)):
            try:
                default_collate([items[0], items[place]])
            except Exception as single:
                pair = named_samples(numbers()[[0, place]])
                said = error_with_line(single)
                raise DataError(f"{pair} of {class_name(dataset)} do not make a batch: {said}") from error
        raise


def class_name(dataset: Dataset[Any]) -> str:
    """Return the name of a data set's class; of a `Subset`, that of the full data set."""
    if isinstance(dataset, StreamPart):
        return type(dataset.stream).__name__
    if isinstance(dataset, Collated | WholeBatches):
        return class_name(dataset.items)
    return type(dataset.dataset if isinstance(dataset, Subset) else dataset).__name__
