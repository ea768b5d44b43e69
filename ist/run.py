"""Put a run together: what this process does, from the configuration and its place among the processes.

Where it sits: `ist/cli.py` and `ist/api.py` open a run here and hand it to the round loop.
Not here: starting processes (`ist/launch.py`), the loop itself (`ist/coordinator.py`).
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ist.checkpoint import Progress
from ist.config import Config
from ist.coordinator import Coordinator, Follower, Method
from ist.display import Display
from ist.errors import CheckpointError, ConfigError
from ist.job import Job
from ist.meter import MemoryGauge, Meter
from ist.methods import METHODS
from ist.pool import WorkerPool
from ist.pool.inline import InlinePool
from ist.pool.torchrun import (
    Membership,
    RankWorker,
    TorchrunPool,
    agree_on_start,
    check_world_size,
    compute_device,
    is_launched,
    is_rank_zero,
    join,
)
from ist.recorder import RunRecorder
from ist.registry import resolve
from ist.run_folder import RunFolder


@dataclass(frozen=True)
class Leading:
    """A run as the process sees it that evaluates and records."""

    job: Job
    method: Method
    recorder: RunRecorder
    first_round: int
    device: torch.device


@dataclass(frozen=True)
class Following:
    """A run as any other rank sees it."""

    job: Job
    follower: Follower
    first_round: int


def check_method(config: Config) -> None:
    """Check that the configured method exists and can run on the configured pool.

    Raises:
        ConfigError: It is not known, or needs processes.
    """
    if config.method == "ist":
        return
    resolve(config.method, "method", {"ist": "", **METHODS})
    if config.pool.kind == "inline":
        raise ConfigError(f"method '{config.method}' needs processes: pool.kind must be 'torchrun', not 'inline'")


@contextmanager
def open_run(job: Job, folder: RunFolder | None, resume: bool, progress: bool = True) -> Iterator[Leading | Following]:
    """Build this process's part of a run, and take it down afterwards.

    Args:
        job: The run.
        folder: Where rank 0 writes; None writes nothing. Other ranks do not touch it.
        resume: Go on from the newest checkpoint in `folder`.
        progress: Whether to show progress.

    Raises:
        ConfigError: The processes that were started do not fit the configuration.
        PoolError: The process group cannot be formed.
        RunFolderError: `folder` cannot be read, or its checkpoint is damaged.
    """
    config = job.config
    check_method(config)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.pool.threads)
    # Before the others are joined: a damaged checkpoint must not leave them waiting.
    leads = config.pool.kind == "inline" or is_rank_zero()
    tensors, before = folder.rewind() if leads and resume and folder else ({}, Progress())
    membership = None
    if config.pool.kind == "torchrun":
        if not is_launched():
            raise ConfigError("pool.kind is 'torchrun', but no launcher started this process: run it with torchrun")
        check_world_size(job)
        membership = join(config.pool)
    first_round = before.rounds_done
    if membership:
        first_round = agree_on_start(membership, first_round, _fingerprint(config))
    meter = Meter()
    part = _follower(job, membership, meter) if membership and not leads else None
    if part is not None:
        yield Following(job, part, first_round)
        part.close()
        torch.set_num_threads(threads_before)
        return
    device = membership.device if membership else compute_device(config.pool)
    gauge = MemoryGauge(device)
    model, optimizer_state = _restored(job, tensors)
    method = _method(job, membership, model.to(device), optimizer_state, meter, device)
    display = Display(config.method, job.num_rounds, first_round, progress)
    recorder = RunRecorder(job, folder, display, before, meter, gauge)
    try:
        yield Leading(job, method, recorder, first_round, device)
    finally:
        display.close()
        torch.set_num_threads(threads_before)
    method.close()


def _method(
    job: Job,
    membership: Membership | None,
    model: torch.nn.Module,
    state: Mapping[str, Tensor],
    meter: Meter,
    device: torch.device,
) -> Method:
    if job.config.method == "ist":
        pool: WorkerPool = TorchrunPool(job, membership, meter) if membership else InlinePool(job, device, meter)
        return Coordinator(job, pool, model, meter, state)
    made: Method = resolve(job.config.method, "method", METHODS)(job, membership, model, state, meter)
    return made


def _follower(job: Job, membership: Membership, meter: Meter) -> Follower:
    if job.config.method == "ist":
        return RankWorker(job, membership)
    made: Follower = resolve(job.config.method, "method", METHODS)(job, membership, job.build(), {}, meter)
    return made


def _restored(job: Job, tensors: Mapping[str, Tensor]) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Make the whole network, with a checkpoint's values if there is one; return it and the optimiser's state."""
    model = job.build()
    names = set(model.state_dict())
    if tensors:
        try:
            model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in names})
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit the configured network: {error}") from error
    return model, {name: tensor for name, tensor in tensors.items() if name not in names}


def _fingerprint(config: Config) -> int:
    """A number that differs when two processes would not train the same thing the same way."""
    local: dict[str, Any] = {
        "output": True,
        "name": True,
        "compare": True,
        "checkpoint": True,
        "data": {"root"},
        "pool": {"port"},
    }
    tree = config.model_dump(exclude=local)
    return zlib.crc32(json.dumps(tree, sort_keys=True, default=str).encode())
