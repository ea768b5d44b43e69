"""Load the data of a run: one data set for all workers, or one of its own for each worker (`data.shard: own`).

Where it sits: `ist/runs/build.py` loads the data that a configuration names, `ist/api.py` wraps the data that a script
passes.
Not here: the shipped data sets (`ist/data/registry.py`), the samples of each step (`ist/data/shards/unequal.py`).
"""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.utils.data import Dataset

from ist.config.registry import call, resolve
from ist.config.schema import Config, first_worker_rank, num_processes, worker_of
from ist.data.batched import BatchedDataset, Collated
from ist.data.registry import DATASETS, Splits
from ist.data.shards.unequal import OwnData
from ist.distributed.environment import is_launched, own_rank, world_size
from ist.errors import ConfigError, DataError
from ist.rng import Purpose, seeded


def load_data(config: Config, worker: int | None = None) -> Splits:
    """Load the data set that a configuration names.

    Args:
        config: The configuration.
        worker: With `data.shard: own`, the worker whose data are loaded; None: those of a coordinator that does not
            train. Passed to the loader as `worker`, together with `num_workers`, if it has such arguments.

    Returns:
        Training data and test data; the training data of a coordinator that does not train may be None.

    Raises:
        ConfigError: The name or an argument is wrong.
        DataError: The data set is missing or malformed.
    """
    loader = resolve(config.data.name, "data.name", DATASETS)
    root = Path(config.data.root) if config.data.root is not None else None
    args = {"root": root, **config.data.args}
    if config.data.shard == "own":
        args |= _which_worker(config, loader, worker)
    with seeded(torch.device("cpu"), config.seed, Purpose.DATA):  # random data are then the same in all processes
        found = call(loader, args, "data.args")
    if not isinstance(found, tuple) or len(found) != 2:
        raise DataError(f"'data.name' is '{config.data.name}', which must return a pair (train, test) of data sets")
    return Splits(*found)


def collated(config: Config, splits: Splits) -> Splits:
    """Return the data with the collate function that a configuration names.

    Raises:
        ConfigError: The function cannot be imported, or the data set makes its own batches.
    """
    if config.data.collate is None:
        return splits
    function = resolve(config.data.collate, "data.collate", {})
    for data in splits:
        if isinstance(data, BatchedDataset):
            raise ConfigError(
                f"'data.collate' is '{config.data.collate}', but {type(data).__name__} makes its own batches (a "
                "BatchedDataset): leave 'data.collate' out"
            )
    return Splits(*(None if data is None else Collated(data, function) for data in splits))


def _which_worker(config: Config, loader: Callable[..., Any], worker: int | None) -> dict[str, Any]:
    """Return the arguments that tell a loader whose data to load, as far as it has them.

    Raises:
        ConfigError: `data.args` sets one of them, or a loader without `worker` would load the same data for all
            workers of this process.
    """
    told = {"worker": worker, "num_workers": config.train.workers}
    if taken := sorted(told.keys() & config.data.args.keys()):
        raise ConfigError(
            f"'data.args.{taken[0]}' is set, but with 'data.shard' 'own' each process passes this argument: remove it"
        )
    try:
        known = inspect.signature(loader).parameters
    except ValueError:  # some builtins have no signature
        known = {}  # type: ignore[assignment]
    if "worker" not in known and config.pool.spec.in_process and config.train.workers > 1:
        raise ConfigError(
            f"'data.shard' is 'own' and 'pool.kind' is '{config.pool.kind}', but the loader '{config.data.name}' has "
            "no argument 'worker', so all workers of this process would have the same data: add the argument"
        )
    return {name: value for name, value in told.items() if name in known}


def following_worker(config: Config) -> int | None:
    """Return the worker that this rank is to the end of the run; None for the coordinator, or if there are no ranks."""
    if not (config.pool.spec.is_launched and is_launched()):
        return None
    rank = own_rank()
    return worker_of(config, rank) if rank > 0 and world_size() == num_processes(config) else None


def own_worker(config: Config) -> int | None:
    """Return the worker that this process is; the first one if it is all of them; None if it only coordinates.

    Raises:
        ConfigError: This rank is neither a worker nor the coordinator.
    """
    if not config.pool.spec.coordinator_may_train:
        return None
    if not (config.pool.spec.is_launched and is_launched()):
        return 0
    started, processes = world_size(), num_processes(config)
    if started != processes:
        raise ConfigError(
            f"{started} processes were started (WORLD_SIZE), but train.workers is {config.train.workers}, "
            f"pool.ranks_per_worker is {config.pool.ranks_per_worker} and pool.coordinator is "
            f"'{config.pool.coordinator}': start {processes} processes, or change train.workers"
        )
    worker = worker_of(config, own_rank())
    return worker if worker >= 0 else None


def has_other_coordinator(config: Config) -> bool:
    """Return whether this process will start a coordinator that does not train, and is not one of the ranks itself."""
    return config.pool.spec.is_launched and not is_launched() and first_worker_rank(config) > 0


def load_own(config: Config) -> tuple[Splits, OwnData]:
    """Load the data of this process, and return how those of other workers are loaded.

    Returns:
        The training data of this process's worker and the test data; and the workers' data sets.

    Raises:
        ConfigError: The name or an argument is wrong, or this rank is neither a worker nor the coordinator.
        DataError: The data set is missing or malformed.
    """
    worker = own_worker(config)
    splits = collated(config, load_data(config, worker))
    own = OwnData(partial(_train_data, config))
    if worker is not None:
        own.keep(worker, splits.train)
    return splits, own


def _train_data(config: Config, worker: int) -> Dataset[Any]:
    return collated(config, load_data(config, worker)).train


def is_function(data: Any) -> TypeGuard[Callable[[int], Any]]:
    """Return whether the argument `data` of `ist.train` is a function that returns data sets, not a data set."""
    return callable(data) and not hasattr(data, "__getitem__") and not isinstance(data, Dataset)


def own_from_python(config: Config, data: Dataset[Any] | Callable[[int], Any]) -> OwnData:
    """Return the workers' data sets from the argument `data` of `ist.train`.

    Args:
        config: The configuration.
        data: The data set of this process's worker, or a function that returns the data set of a worker.

    Raises:
        ConfigError: One data set is given for several workers.
    """
    if is_function(data):
        return OwnData(data)
    pool = config.pool.spec
    if not pool.is_launched and not (pool.in_process and config.train.workers == 1):
        raise ConfigError(
            f"shard is 'own' and data is a {type(data).__name__}, but pool '{config.pool.kind}' needs the data set of "
            "each worker: give a function of the worker's number, data=lambda worker: ..., which returns it"
        )
    return OwnData(lambda _: data)
