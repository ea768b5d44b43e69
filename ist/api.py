"""The Python entry point: `ist.train` on a user's own network and data.

Not here: the command line (`ist/cli/main.py`), which builds the same job from a file.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ist.checks.gradient_reach import check_held
from ist.config.load import validate
from ist.config.schema import FROM_PYTHON
from ist.data.batched import BatchedDataset
from ist.data.batches import length
from ist.distributed.environment import is_launched, is_rank_zero
from ist.errors import ConfigError, DataError, ISTError, first_line
from ist.monitoring.observers import check_watch
from ist.network.compiled import original, uncompiled
from ist.network.copies import on_meta
from ist.network.modes import kept_modes
from ist.network.supported import check_network, check_values
from ist.rng import Purpose, seeded
from ist.runs.build import loss_function, make_job
from ist.runs.open import Following, open_run
from ist.runs.rehearsal import rehearse
from ist.storage.run_folder import RunFolder, create_run_folder, reopen
from ist.subnet.job import Job
from ist.training.rounds import follow_rounds, run_rounds


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        model: The network that was passed in, trained; on a rank that does not coordinate, left as it was.
        history: One record a round, as in metrics.jsonl; empty on a rank that does not coordinate.
        is_coordinator: Whether this process holds the trained network.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    is_coordinator: bool


_training: dict[int, object] = {}
"""By process id, what stands for the `train` that runs: a forked child inherits its parent's entry, not its own."""


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a second `train` in this process while one runs.

    They would seed and draw from the same generators in turns, and share the number of threads: both would differ from
    what each gives alone.

    Raises:
        ConfigError: One runs, in another thread or around this one.
    """
    me = object()
    if _training.setdefault(os.getpid(), me) is not me:
        raise ConfigError(
            "another ist.train runs in this process (in another thread, or around this one), and both would use the "
            "process's random generators and number of threads: run them one after the other, or each in a process of "
            "its own"
        )
    try:
        yield
    finally:
        del _training[os.getpid()]


@_alone()
@seeded(torch.device("cpu"), 0, Purpose.REHEARSAL)  # looking at data must not move the caller's generators
def train(
    model: nn.Module,
    data: Dataset[Any],
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    workers: int,
    local_steps: int = 50,
    rounds: int | None = None,
    epochs: int | None = None,
    batch_size: int = 32,
    optimizer: str = "SGD",
    optimizer_args: Mapping[str, Any] | None = None,
    schedule: str | None = None,
    schedule_args: Mapping[str, Any] | None = None,
    test_data: Dataset[Any] | None = None,
    pool: Literal["auto", "inline", "torchrun", "ray"] = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
    partition: Mapping[str, Any] | None = None,
    exchange: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    train_options: Mapping[str, Any] | None = None,
    evaluate_options: Mapping[str, Any] | None = None,
    pool_options: Mapping[str, Any] | None = None,
    checkpoint_options: Mapping[str, Any] | None = None,
    watch_options: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train a network by independent subnets.

    Run as a plain script, all workers train in this process, one after the other. Run under torchrun,
    every process calls this function and is one of the workers; rank 0 ends up with the network.

    One run at a time in a process: while it lasts, the generators of torch, `random` and `numpy.random` are seeded for
    each round, and are put back afterwards. Other threads should not draw from them meanwhile.

    Args:
        model: Any network; trained in place, and in the modes that it has: a module in evaluation mode (a frozen
            batch norm) stays so; one that is compiled is trained uncompiled. Its neuron groups are found by running it
            once on two inputs of `data`.
        data: Pairs (input, target); dealt to the workers. An input that is a tuple gives positional arguments, one
            that is a mapping gives keyword arguments.
        loss: Name of a function of torch.nn.functional, applied to the outputs or to their `logits`; or any mean loss
            of (outputs, targets). It must not hold `model`, of which workers train narrow copies, nor own weights.
        workers: How many subnets a round; where neurons are dealt disjointly, at most the size of the smallest group.
        local_steps: Optimiser steps of a worker in a round.
        rounds: Length of the run; give this or `epochs`.
        epochs: Length of the run in passes over the data.
        batch_size: Samples of one worker's step.
        optimizer: Class of torch.optim.
        optimizer_args: Its arguments; default: lr 0.1 for SGD, torch's own for others.
        schedule: Class of torch.optim.lr_scheduler, advanced every local step; it reaches every parameter group.
        schedule_args: Its arguments; the value 'total_steps' stands for the run's number of steps.
        test_data: Evaluated every round, if given; accuracy is reported where targets are class numbers.
        pool: 'auto' is 'torchrun' under torchrun and 'inline' otherwise; 'ray' trains on the cluster that this process
            is connected to, else on that of `pool_options={"ray": {"address": ...}}`, else on one of its own.
        run_dir: Where to write metrics, checkpoints and the trained network; default: nowhere.
        resume: Go on from the newest checkpoint in `run_dir`, with the same arguments as before.
        seed: Seed of everything random but the network's initial weights, which are `model`'s.
        progress: Whether to show progress on stderr.
        partition: How neurons are dealt: keys of the section `partition`, such as {"exclude": ["layers.0.*"]}.
        exchange: In how many bits slices travel: keys of the section `exchange`, such as {"up": "int8"}.
        recipe: Stages, outer step and average: keys of the section `recipe`, such as {"average": {"kind": "ema"}}.
        data_options: Keys of the section `data`, such as {"shuffle": "global"}.
        train_options: Further keys of the section `train` of a configuration, see `ist keys`.
        evaluate_options: Keys of the section `evaluate`.
        pool_options: Keys of the section `pool`.
        checkpoint_options: Keys of the section `checkpoint`.
        watch_options: Keys of the section `watch`.

    Returns:
        The trained network and the history.

    Raises:
        ConfigError: An argument is wrong, or another `train` runs in this process.
        DataError: The data cannot be dealt to the workers.
        ModelError: The network cannot be split among that many workers.
        DivergedError: A worker returned a loss or weight that is not finite.
        RunFolderError: `run_dir` cannot be written, or (with `resume`) holds no run, or another one.

    Example:
        >>> result = ist.train(model, dataset, workers=4, local_steps=50, rounds=200)
    """
    _check_arguments(locals())
    if optimizer_args is None:
        optimizer_args = {"lr": 0.1} if optimizer == "SGD" else {}
    config = validate(
        _plain(
            {
                "name": "api",
                "seed": seed,
                "model": {"name": FROM_PYTHON + type(original(model)).__name__},
                "data": {"name": type(data).__name__, **(data_options or {})},
                "train": {
                    "workers": workers,
                    "rounds": rounds,
                    "epochs": epochs,
                    "local_steps": local_steps,
                    "batch_size": batch_size,
                    "loss": loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__),
                    "optimizer": {"name": optimizer, "args": dict(optimizer_args)},
                    "schedule": {"name": schedule, "args": dict(schedule_args or {})} if schedule else None,
                    **(train_options or {}),
                },
                "partition": dict(partition or {}),
                "exchange": dict(exchange or {}),
                "recipe": dict(recipe or {}),
                "evaluate": {"metric": _metric(test_data), **(evaluate_options or {})},
                "checkpoint": dict(checkpoint_options or {}),
                "watch": dict(watch_options or {}),
                "pool": {
                    "kind": ("torchrun" if is_launched() else "inline") if pool == "auto" else pool,
                    **(pool_options or {}),
                },
            }
        ),
        "ist.train",
    )
    check_watch(config)
    check_held(loss, model)
    function = loss_function(loss) if isinstance(loss, str) else loss
    with uncompiled(model) as plain, kept_modes(plain):
        check_network(plain, is_split=True)
        check_values(plain)
        job = make_job(config, on_meta(plain), lambda: plain, data, test_data, function)
        return replace(_train(job, plain, run_dir, resume, progress), model=model)


def _train(job: Job, model: nn.Module, run_dir: str | Path | None, resume: bool, progress: bool) -> TrainResult:
    """Rehearse a job and run it; see `train`."""
    config = job.config
    device_before = next(model.parameters()).device
    rehearse(job)
    folder: RunFolder | None = None
    if run_dir is not None and is_rank_zero():
        folder = (reopen if resume else create_run_folder)(config, Path(run_dir))
    with open_run(job, folder, resume, progress) as run:
        if isinstance(run, Following):
            follow_rounds(run.job, run.follower, run.first_round)
            return TrainResult(model, [], is_coordinator=False)
        run_rounds(run.job, run.method, run.recorder, run.first_round, run.device)
        run.recorder.finish(run.method.model)
        if run.method.model is not model:  # an average of it
            model.load_state_dict(run.method.model.state_dict())
        model.to(device_before)
        return TrainResult(model, run.recorder.history, is_coordinator=True)


_MAPPINGS = ("optimizer_args", "schedule_args", "partition", "exchange", "recipe")


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `train` of which torch or pydantic would speak in other words.

    Raises:
        ConfigError: A class is given for its name or for what it makes, or something else for a mapping.
        DataError: `data` or `test_data` is no data set.
    """
    if not isinstance(given["model"], nn.Module):
        raise ConfigError(f"model is {given['model']!r}: give a torch.nn.Module")
    if isinstance(given["optimizer"], type):
        name = given["optimizer"].__name__
        raise ConfigError(f"optimizer is the class {name}: give its name, '{name}', and optimizer_args")
    if isinstance(given["loss"], type):
        name = given["loss"].__name__
        raise ConfigError(f"loss is the class {name}: give a function, such as {name}()")
    for name, value in given.items():
        if (name in _MAPPINGS or name.endswith("_options")) and not isinstance(value, Mapping | None):
            raise ConfigError(f"{name} is {value!r} (a {type(value).__name__}): give a mapping of keys to values")
    _check_data(given["data"], "data")
    if given["test_data"] is not None:
        _check_data(given["test_data"], "test_data")


def _plain(value: Any) -> Any:
    """Return a nested value with numbers of NumPy and torch as Python's, and arrays as lists: as YAML has them."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _check_data(data: Any, name: str) -> None:
    """Refuse what looks like a data set and is none.

    Raises:
        DataError: It is a DataLoader, bare tensors, or its items are not pairs.
    """
    if isinstance(data, DataLoader):
        raise DataError(f"{name} is a DataLoader: pass its data set; batches are made for each worker")
    if isinstance(data, tuple | list | Tensor):
        raise DataError(f"{name} is a {type(data).__name__}: pass a data set, such as TensorDataset(inputs, targets)")
    if length(data) == 0:
        raise DataError("the data set is empty" if name == "data" else "the test data set is empty")
    if isinstance(data, BatchedDataset):
        return
    try:
        item = data[0]
    except ISTError:
        raise
    except Exception as error:  # whatever a data set raises
        raise DataError(
            f"item 0 of {type(data).__name__} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"an item of {type(data).__name__} is a {type(item).__name__}, not a pair (input, target)")


def _metric(test_data: Dataset[Any] | None) -> str:
    """Accuracy where the targets are class numbers."""
    if test_data is None:
        return "none"
    if isinstance(test_data, BatchedDataset):
        return "none"  # what a batch's targets are is for evaluate_options to say
    target = test_data[0][1]
    is_class = isinstance(target, int) or (
        isinstance(target, Tensor) and target.ndim == 0 and not target.is_floating_point()
    )
    return "accuracy" if is_class else "none"
