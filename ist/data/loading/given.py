"""A `torch.utils.data.DataLoader` that a user passes as data: take what a run can honour, refuse the rest by name.

Where it sits: `ist/runs/arguments.py` takes the loaders among the arguments of `ist.train` apart here.
Not here: reading batches (`loader.py`), the samples of each batch (`ist/data/batches.py`).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import default_collate

from ist.data.batched import Collated
from ist.data.loading.loader import LoaderSettings
from ist.errors import DataError

_KEEP = "ist.join keeps a loader of your own"


@dataclass(frozen=True)
class GivenLoader:
    """The parts of a `DataLoader`.

    Attributes:
        dataset: Its data set, with its collate function if that is not PyTorch's.
        batch_size: The number of samples in a batch.
        settings: How its batches are read.
    """

    dataset: Dataset[Any]
    batch_size: int
    settings: LoaderSettings


def taken_apart(loader: DataLoader[Any], name: str, is_training: bool) -> GivenLoader:
    """Return the parts of a loader that the run uses. The run decides which samples are in a batch.

    Warns if a loader of training data does not shuffle.

    Args:
        loader: The loader.
        name: The argument that holds it, for messages.
        is_training: Whether it holds training data.

    Raises:
        DataError: The run cannot honour an argument of the loader; the message names it.
    """
    for refused in _refused(loader, is_training):
        raise DataError(f"{name} is a DataLoader {refused}")
    if is_training and type(loader.sampler) is SequentialSampler:
        warnings.warn(
            f"{name} is a DataLoader with shuffle=False, but the samples of each worker are shuffled every epoch: give "
            "it shuffle=True",
            stacklevel=4,
        )
    dataset = loader.dataset
    if loader.collate_fn is not default_collate:
        dataset = Collated(dataset, loader.collate_fn)
    context = loader.multiprocessing_context
    settings = LoaderSettings(
        workers=loader.num_workers,
        prefetch=loader.prefetch_factor or LoaderSettings.prefetch,
        pin_memory=loader.pin_memory,
        timeout_s=loader.timeout,
        start_method=context.get_start_method() if context is not None else None,
        worker_init=loader.worker_init_fn,
    )
    assert loader.batch_size is not None
    return GivenLoader(dataset, loader.batch_size, settings)


def _refused(loader: DataLoader[Any], is_training: bool) -> Iterator[str]:
    """Yield each argument of a loader that the run cannot honour, and what to do."""
    sampler, batch_sampler = loader.sampler, loader.batch_sampler
    if type(loader) is not DataLoader:
        kind = f"{type(loader).__module__}.{type(loader).__name__}"
        yield f"of another class, {kind}: pass its data set (loader.dataset), or {_KEEP}"
    if isinstance(loader.dataset, IterableDataset):
        yield f"of a stream, {type(loader.dataset).__name__}: pass the stream itself (loader.dataset), or {_KEEP}"
    if batch_sampler is None:
        yield f"with batch_size=None, whose items are batches: pass a data set of single samples, or {_KEEP}"
    elif type(batch_sampler) is not BatchSampler:
        kind = type(batch_sampler).__name__
        yield f"with batch_sampler={kind}, but the run assigns samples to batches: leave it out, or {_KEEP}"
    if type(sampler) not in (RandomSampler, SequentialSampler):
        yield (
            f"with sampler={type(sampler).__name__}, but the run assigns samples to workers and batches: leave it out "
            f"(shuffle=True), or {_KEEP}"
        )
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler._num_samples is not None):
        yield (
            "whose RandomSampler has replacement or num_samples, but the run uses each sample once per epoch: give "
            f"shuffle=True instead, or {_KEEP}"
        )
    if loader.drop_last:
        yield "with drop_last=True, but the run uses every sample, in batches of nearly equal size: leave drop_last out"
    if loader.generator is not None and is_training:
        yield f"with a generator, but the argument 'seed' decides the order of samples: leave it out, or {_KEEP}"
    if not loader.in_order:
        yield f"with in_order=False, which makes the order of batches depend on time: leave it out, or {_KEEP}"
