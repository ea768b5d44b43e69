"""Split a data set among workers with a skewed mix of classes, for studies of data that differ between workers.

Where it sits: `ist.dirichlet_split`; `unequal.py` beside this file assigns the samples of a run by it (`data.skew`).
Not here: data that workers really have of their own (`unequal.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ist.data.batched import BatchedDataset, Collated, WholeBatches
from ist.data.batches import fetch, item_at, length
from ist.errors import DataError
from ist.rng import Indices, Purpose, permutation, uniform

_TRIES = 64
"""Candidates for a gamma variate; each is accepted with a probability above 0.95."""


def dirichlet_split(
    labels: Dataset[Any] | Tensor | NDArray[Any] | Sequence[int], num_workers: int, alpha: float, seed: int = 0
) -> list[Indices]:
    """Split samples among workers so that the mix of classes differs between workers.

    For each class, the fractions of its samples that the workers get are drawn from a symmetric Dirichlet distribution
    with concentration `alpha`. With a large `alpha` all workers have nearly the same mix; with a small one, a class is
    with few workers, and workers have very different numbers of samples. A worker without samples gets one from the
    worker with the most.

    Args:
        labels: The class number of each sample, shape (samples,); or a data set of pairs (input, class number), or of
            mappings with a class number `label` or `labels`. The items of a data set are read one by one, unless it is
            a `TensorDataset`, has an attribute `targets`, or is one of Hugging Face.
        num_workers: The number of workers.
        alpha: The concentration, > 0; studies use 0.1 to 1 for skewed data, and 100 for nearly equal mixes.
        seed: The seed of the split, >= 0; a run's split with `data.skew` has the run's seed.

    Returns:
        For each worker the indices of its samples: int64, sorted. Each sample belongs to one worker.

    Raises:
        DataError: The labels are not class numbers, there are fewer samples than workers, or `alpha` or `num_workers`
            is not positive.

    Example:
        >>> import torch
        >>> labels = torch.arange(1000) % 4
        >>> parts = ist.dirichlet_split(labels, num_workers=3, alpha=0.3)
        >>> sum(len(part) for part in parts)
        1000
        >>> [torch.bincount(labels[part], minlength=4).tolist() for part in parts]
        [[...], [...], [...]]
        >>> data = torch.utils.data.TensorDataset(torch.randn(1000, 5), labels)
        >>> own = [torch.utils.data.Subset(data, part.tolist()) for part in parts]

    Reference:
        M. Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", arXiv 1905.12022, which
        splits each class in this way. T.-M. H. Hsu et al., "Measuring the Effects of Non-Identical Data Distribution
        for Federated Visual Classification", arXiv 1909.06335, draws the mix of each worker instead, so that all
        workers have equally many samples.
    """
    numbers = class_numbers(labels)
    if not (alpha > 0 and np.isfinite(alpha)) or num_workers < 1:
        raise DataError(f"alpha is {alpha} and num_workers is {num_workers}: both must be positive numbers")
    if len(numbers) < num_workers:
        raise DataError(f"{len(numbers)} samples are too few for {num_workers} workers: each worker needs at least one")
    owner = np.empty(len(numbers), dtype=np.int64)
    for label in np.unique(numbers):
        members = np.flatnonzero(numbers == label)
        members = members[permutation(len(members), seed, Purpose.SKEW, 0, int(label))]
        bounds = np.rint(np.cumsum(_proportions(num_workers, alpha, seed, int(label))) * len(members))
        owner[members] = np.searchsorted(bounds[:-1], np.arange(len(members)), side="right")
    _leave_none_empty(owner, num_workers)
    return [np.flatnonzero(owner == worker) for worker in range(num_workers)]


def _leave_none_empty(owner: Indices, num_workers: int) -> None:
    counts = np.bincount(owner, minlength=num_workers)
    for worker in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        owner[np.flatnonzero(owner == largest)[0]] = worker
        counts[largest] -= 1
        counts[worker] += 1


def _proportions(num_workers: int, alpha: float, seed: int, label: int) -> NDArray[np.float64]:
    """Draw from a symmetric Dirichlet distribution: gamma variates, divided by their sum.

    They are made of uniform numbers by the method of Marsaglia and Tsang, because NumPy may change its own method in
    any version, and all processes must draw the same. Logarithms avoid the underflow of a small `alpha`.
    """
    draws = uniform(num_workers * (3 * _TRIES + 1), seed, Purpose.SKEW, 1, label).reshape(num_workers, -1)
    first, second, third = (draws[:, number * _TRIES : (number + 1) * _TRIES] for number in range(3))
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    shape = alpha + 1 - 1 / 3  # of a variate with concentration alpha + 1; the last uniform number reduces it to alpha
    cubes = (1 + normal / np.sqrt(9 * shape)) ** 3
    safe = np.maximum(cubes, 1e-300)
    is_accepted = (cubes > 0) & (np.log1p(-third) < normal**2 / 2 + shape * (1 - safe + np.log(safe)))
    chosen = safe[np.arange(num_workers), is_accepted.argmax(axis=1)]
    logarithms = np.log(shape * chosen) + np.log1p(-draws[:, -1]) / alpha
    weights = np.exp(logarithms - logarithms.max())
    return np.asarray(weights / weights.sum())


def class_numbers(labels: Dataset[Any] | Tensor | NDArray[Any] | Sequence[int]) -> Indices:
    """Return the class number of each sample, int64 of shape (samples,).

    Args:
        labels: The class numbers, or a data set of pairs (input, class number).

    Raises:
        DataError: They are not class numbers, or a sample cannot be read.
    """
    is_given = isinstance(labels, Tensor | np.ndarray | Sequence) and not isinstance(labels, Dataset)
    values = labels if is_given else _targets(labels)  # type: ignore[arg-type]
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if found.ndim != 1 or found.dtype.kind not in "iu" or (len(found) and found.min() < 0):
        what = (
            f"{found.dtype} of shape {found.shape}" if found.dtype.kind not in "iu" or found.ndim != 1 else "negative"
        )
        of = "the labels" if is_given else f"the targets of {type(labels).__name__}"
        raise DataError(
            f"{of} are {what}: a split by classes (data.skew, ist.dirichlet_split) needs one class number >= 0 for "
            "each sample"
        )
    return found.astype(np.int64)


_LABELS = ("labels", "label")
"""Names of the class number in an item that is a mapping."""


def _targets(dataset: Dataset[Any]) -> Any:
    count = length(dataset)
    if isinstance(dataset, Collated | WholeBatches):
        return class_numbers(dataset.items)
    if type(dataset) is TensorDataset:
        return dataset.tensors[1] if len(dataset.tensors) > 1 else dataset.tensors[0]
    if isinstance(dataset, Subset):
        return class_numbers(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, BatchedDataset):
        return fetch(dataset, np.arange(count), torch.device("cpu"))[1]
    columns = getattr(dataset, "column_names", None)  # of a data set of Hugging Face
    if isinstance(columns, list) and (named := [name for name in _LABELS if name in columns]):
        return list(dataset[named[0]])
    given = getattr(dataset, "targets", None)  # as the image data sets of torchvision have it
    if isinstance(given, Tensor | np.ndarray | list | tuple) and len(given) == count:
        return given
    return [_target(item_at(dataset, index), index) for index in range(count)]


def _target(item: Any, index: int) -> int:
    target = item[1] if isinstance(item, tuple | list) and len(item) == 2 else None
    if isinstance(item, Mapping):
        target = next((item[name] for name in _LABELS if name in item), None)
    if isinstance(target, Tensor | np.ndarray | np.generic) and target.ndim == 0:
        target = target.item()
    if type(target) is not int:
        raise DataError(
            f"the target of sample {index} is {type(target).__name__}, not a class number: a split by classes "
            "(data.skew, ist.dirichlet_split) needs one for each sample"
        )
    return target
