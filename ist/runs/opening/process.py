"""What this process's part of a run is built from, and steps that all methods share.

Where it sits: `ist/runs/open.py` makes an `OpenProcess`; `methods.py` and `in_shards.py` beside this file make the
method from it.
Not here: the order in which a run is opened (`ist/runs/open.py`).
"""

import functools
import inspect
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ist.config.methods import METHODS
from ist.config.registry import resolve
from ist.config.schema import Config
from ist.distributed.process_group import (
    Membership,
)
from ist.distributed.worker_group import WorkerGroup
from ist.errors import ConfigError
from ist.initialization.constants import check_constants
from ist.launch.signals import resume_command
from ist.monitoring.meter import Meter
from ist.network.compiled import plain_name
from ist.storage.backend import Storage
from ist.storage.checkpoint import check_tensors
from ist.storage.run_folder import RunFolder
from ist.storage.shards.read import SavedTensors
from ist.subnet.job import Job
from ist.training.average import PREFIX as AVERAGE
from ist.training.average import averaged
from ist.training.rounds import Method
from ist.training.worker_state import CheckpointLocation


@dataclass(frozen=True)
class SharedCheckpoints:
    """The checkpoints that all ranks write and read together, if the full network is stored in shards.

    Attributes:
        storage: Where they are saved; None: nowhere.
        saved: The tensors of the one from which the run is resumed; None: there is none, or not in the storage.
    """

    storage: Storage | None = None
    saved: SavedTensors | None = None


@dataclass(frozen=True)
class OpenProcess:
    """The objects from which this process's part of a run is built.

    Attributes:
        job: The run, with the number of workers that the processes allow.
        folder: The run folder, in which rank 0 writes; None: nothing is written.
        membership: This rank of the process group; None: there is no process group.
        meter: Counts payload bytes.
        device: The device on which this process computes.
        location: Where its workers save their state; None: nowhere.
        shared: The checkpoints of a network in shards.
        first_round: The first round to run.
        stack: Releases everything when the run ends.
        group: The ranks of this process's worker; None: it is one rank, or none.
    """

    job: Job
    folder: RunFolder | None
    membership: Membership | None
    meter: Meter
    device: torch.device
    location: CheckpointLocation | None
    shared: SharedCheckpoints
    first_round: int
    stack: ExitStack
    group: WorkerGroup | None = None


def implementation(config: Config) -> Callable[..., Any]:
    """Return the class or function that creates the configured method, with the options of its registry entry.

    Raises:
        ConfigError: The method is unknown, or cannot be imported.
    """
    made = resolve(config.method, "method", {name: spec.implementation for name, spec in METHODS.items()})
    return functools.partial(made, **config.method_spec.options)


def by_owner(further: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide a checkpoint's tensors besides the network's into those of the average and those of the method."""
    average = {name: tensor for name, tensor in further.items() if name.startswith(AVERAGE)}
    return average, {name: tensor for name, tensor in further.items() if name not in average}


def completed_method(
    process: OpenProcess, method: Any, average_state: Mapping[str, Tensor], is_resumed: bool
) -> Method:
    """Return a method with its average over rounds, if one is configured; the stack closes it.

    Raises:
        ConfigError: It does not yield its workers' parts.
        CheckpointError: The checkpoint contains an average, and none is configured.
    """
    job, config = process.job, process.job.config
    if not inspect.isgeneratorfunction(method.train_round):
        raise ConfigError(
            f"'method' is '{config.method}', whose train_round is not a generator: it yields the Part of each of its "
            "workers in this process (see ist.training.rounds.Method), and returns a RoundReport"
        )
    made = averaged(method, config.recipe.average, job.schedule.num_rounds, average_state, is_resumed)
    process.stack.callback(made.close)
    return made


def connected_to_ray(process: OpenProcess) -> str:
    """Connect to a Ray cluster until the run ends; return a prefix of the names of its actors."""
    from ist.pools.ray_cluster import connected

    job, folder = process.job, process.folder
    resume_hint = f"Resume from the last checkpoint with: {resume_command(folder.path)}" if folder else ""
    process.stack.enter_context(connected(job.config, resume_hint))
    return f"{folder.path.name if folder else job.config.name}-{secrets.token_hex(3)}"


def restored(job: Job, saved: Mapping[str, Tensor] | None) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Return the full network, with a checkpoint's values if there is one, and the checkpoint's other tensors."""
    model = job.task.build()
    check_constants(job.split.constants, model)
    if saved is None:
        return model, {}
    saved = {plain_name(name): tensor for name, tensor in saved.items()}
    state = model.state_dict()
    of_network = {name: tensor for name, tensor in saved.items() if name in state}
    check_tensors(of_network, state)
    model.load_state_dict(of_network)
    return model, {name: tensor for name, tensor in saved.items() if name not in state}
