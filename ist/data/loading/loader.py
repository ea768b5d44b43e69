"""Read batches by number, in this process or ahead of time in loader processes (`torch.utils.data.DataLoader`).

Law: a batch is a function of its number, so loader processes change the time of a run, not its bits.

Where it sits: `ist/loops/local_loop.py` reads the batches of local steps here, `ist/evaluation/evaluate.py` those of
an evaluation.
Not here: the samples of a batch, and reading it (`ist/data/batches.py`).
"""

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as TorchSampler

from ist.data.batches import fetch, micro_batches, stream_part, take_shard
from ist.data.loading.stream import StreamSampler
from ist.data.nested import mapped, moved
from ist.data.shards.unequal import Sampler
from ist.errors import DataError, ISTError, first_line, is_out_of_memory
from ist.rng import Indices, ItemDraws, Purpose

_CPU = torch.device("cpu")

Read = Callable[[int, torch.device], Any]
"""Returns the batch with a number, on a device."""


@dataclass(frozen=True)
class LoaderSettings:
    """How a worker reads its batches.

    Attributes:
        workers: The number of loader processes; 0: the worker reads its batches itself, when it needs them.
        prefetch: The number of batches that a loader process reads ahead.
        pin_memory: Whether batches for a GPU are copied to pinned memory first.
        timeout_s: Seconds to wait for a batch of a loader process; 0: forever.
        start_method: How loader processes are started; None: Python's default.
        worker_init: Called with its number in each loader process when it starts; None: nothing is called.
    """

    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    timeout_s: float = 0
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    worker_init: Callable[[int], object] | None = None


class BatchReader:
    """Returns batches by number; loader processes, if there are any, read those that follow.

    The processes start with the first batch, and stay until `close`: also if numbers are skipped, because a round was
    abandoned, or repeated.

    Args:
        read: Returns the batch with a number on a device; must be picklable if loader processes are not forked.
        count: No batch with this number or a larger one is read ahead.
        settings: How batches are read.
        device: The device of the batches.
        is_stream: Whether `read` reads a stream. Streams may take other items in a loader process (`get_worker_info`),
            so a stream does not learn that it is in one.
    """

    def __init__(
        self, read: Read, count: int, settings: LoaderSettings, device: torch.device, is_stream: bool = False
    ) -> None:
        self._read = read
        self._count = count
        self._settings = settings
        self._device = device
        self._pins = settings.pin_memory and device.type == "cuda"
        self._is_stream = is_stream
        self._feed = _Feed(count)
        self._batches: Iterator[Any] | None = None
        self._expected = -1

    def batch(self, number: int) -> Any:
        """Return a batch on the device.

        Raises:
            DataError: A sample cannot be read, or the loader processes fail.
        """
        if self._settings.workers == 0 or number >= self._count:
            if not self._pins:
                return self._read(number, self._device)
            return moved(mapped(self._read(number, _CPU), torch.Tensor.pin_memory), self._device)
        if number != self._expected:
            self._feed.next = number
        batch, error = self._received(number)
        if error is not None:
            raise error
        self._expected = number + 1
        if self._expected == self._count:
            self.close()
        return moved(batch, self._device)

    def close(self) -> None:
        """End the loader processes."""
        batches, self._batches, self._expected = self._batches, None, -1
        while batches is not None:
            try:
                batches._shutdown_workers()  # type: ignore[attr-defined]  # PyTorch has no public name for it
                return
            except RuntimeError:  # PyTorch's signal handler reports another process that was killed meanwhile
                continue

    def _received(self, number: int) -> tuple[Any, ISTError | None]:
        """Return what the loader processes have read for a number, and discard what they have read before it."""
        try:
            while True:
                if self._batches is None:
                    self._feed.next = number
                    self._batches = self._started()
                found = next(self._batches, None)
                if found is None:  # the processes have read everything up to `count`, and are gone
                    self._batches = None
                elif found[0] == number:
                    return found[1], found[2]
        except Exception as error:
            self.close()
            if isinstance(error, ISTError | MemoryError) or is_out_of_memory(error):
                raise
            raise DataError(
                f"the loader processes (data.loader.workers {self._settings.workers}) failed to read batch {number}: "
                f"{type(error).__name__}: {first_line(error)}. To see an error of the data set itself, read without "
                "them (data.loader.workers 0)"
            ) from error

    def _started(self) -> Iterator[Any]:
        settings = self._settings
        loader: DataLoader[Any] = DataLoader(
            _Numbered(self._read),
            batch_size=None,
            sampler=self._feed,
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch,
            collate_fn=_unchanged,
            pin_memory=self._pins,
            timeout=settings.timeout_s,
            multiprocessing_context=settings.start_method,
            worker_init_fn=partial(_begin, settings.worker_init, self._is_stream),
            generator=torch.Generator(),  # PyTorch would draw from the generator that dropout uses
        )
        return iter(loader)


class _Feed(TorchSampler[int]):
    """Yields the numbers of batches from `next` on; `next` may be changed at any time."""

    def __init__(self, count: int) -> None:
        self.next = 0
        self._count = count

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.next >= self._count:
            raise StopIteration
        self.next += 1
        return self.next - 1


@dataclass(frozen=True)
class _Numbered(Dataset[Any]):
    """Batches as items of a data set, in a loader process; an error of this package is returned, not raised.

    PyTorch would put the whole traceback into its message.
    """

    read: Read

    def __getitem__(self, number: int) -> tuple[int, Any, ISTError | None]:
        try:
            return number, self.read(number, _CPU), None
        except ISTError as error:
            return number, None, error


def _unchanged(item: Any) -> Any:
    return item


def _begin(worker_init: Callable[[int], object] | None, is_stream: bool, number: int) -> None:
    """Prepare a loader process: its parent decides what ends it, also if the terminal signals both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, signal.SIG_DFL)
    if worker_init is not None:
        worker_init(number)
    if is_stream:
        torch.utils.data._utils.worker._worker_info = None  # PyTorch has no public name for it


def worker_data(dataset: Dataset[Any], sampler: Sampler, worker: int) -> Dataset[Any]:
    """Return the data of a worker: its shard of a data set, or its part of a stream."""
    if isinstance(sampler, StreamSampler):
        return stream_part(dataset, sampler.num_workers, worker)
    return take_shard(dataset, sampler.shard(worker))


@dataclass(frozen=True)
class StepBatches:
    """The batches of a worker's local steps: each step has `parts` of nearly equal size, numbered consecutively.

    If several ranks are one worker, each has `parts` of its own in every step, and the step `ranks` times as many.

    Attributes:
        shard: The worker's data.
        sampler: The samples of each step.
        worker: The worker's number.
        parts: The number of this rank's batches in a step.
        rank: The number of this rank among those of the worker, from 0.
        ranks: The number of ranks of the worker.
    """

    shard: Dataset[Any]
    sampler: Sampler
    worker: int
    parts: int
    rank: int = 0
    ranks: int = 1

    def __call__(self, number: int, device: torch.device) -> tuple[Any, Any]:
        """Return the batch with a number (inputs, targets), on a device.

        Raises:
            DataError: A sample cannot be read.
        """
        step, part = divmod(number, self.parts)
        positions = micro_batches(self.of_step(step), self.parts)[part]
        draws = ItemDraws(self.sampler.seed, Purpose.TRAINING, self.sampler.epoch(self.worker, step))
        return fetch(self.shard, positions, device, lambda: self.numbers(positions), draws)

    def of_step(self, step: int) -> Indices:
        """Return the positions in the shard of this rank's samples of a step: int64."""
        return micro_batches(self.sampler.batch(self.worker, step), self.ranks)[self.rank]

    def numbers(self, positions: Indices) -> Indices:
        """Return the numbers in the full data set of the samples at positions in the shard: int64."""
        if isinstance(self.sampler, StreamSampler):
            return self.sampler.numbers(self.worker, positions)
        return self._numbers[positions]

    @cached_property
    def _numbers(self) -> Indices:
        assert not isinstance(self.sampler, StreamSampler)
        return self.sampler.shard(self.worker)


@dataclass(frozen=True)
class _ListedBatches:
    dataset: Dataset[Any]
    batches: Sequence[Indices]
    draws: ItemDraws

    def __call__(self, number: int, device: torch.device) -> Any:
        return fetch(self.dataset, self.batches[number], device, None, self.draws)


def read_batches(
    dataset: Dataset[Any],
    batches: Sequence[Indices],
    device: torch.device,
    settings: LoaderSettings,
    draws: ItemDraws,
) -> Generator[tuple[Any, Any]]:
    """Yield batches (inputs, targets) of a data set, on `device`.

    Args:
        dataset: The data set.
        batches: The samples of each batch.
        device: The device of the batches.
        settings: How batches are read; loader processes end with the last batch.
        draws: The key of the random numbers that the data set draws.

    Raises:
        DataError: A sample cannot be read.
    """
    if len(batches) < 2:  # starting processes would only take time
        settings = replace(settings, workers=0)
    settings = replace(settings, workers=min(settings.workers, len(batches)))
    with closing(BatchReader(_ListedBatches(dataset, batches, draws), len(batches), settings, device)) as reader:
        for number in range(len(batches)):
            yield reader.batch(number)
