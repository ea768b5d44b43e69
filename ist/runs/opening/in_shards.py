"""Make the method of a network that is stored in shards, on ranks or on Ray.

Where it sits: `methods.py` beside this file calls it on the process that coordinates, `ist/runs/open.py` on others.
Not here: the stores and their exchange (`ist/pools/shard_store.py`, `ist/pools/ray_shards/`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ist.config.schema import Config
from ist.distributed.process_group import (
    Membership,
    broadcast_flag,
)
from ist.errors import ConfigError
from ist.initialization.constants import check_constants
from ist.initialization.in_files import OneAtATime, large_tensors_in_files
from ist.network.compiled import plain_name
from ist.optimization.optimizers import unchanged_names
from ist.pools.shard_network import shard_network
from ist.pools.shard_pool import ShardPool
from ist.pools.shard_store import ShardedMethod, ShardFollower, ShardStore, check_shared
from ist.runs.opening.process import (
    OpenProcess,
    SharedCheckpoints,
    by_owner,
    completed_method,
    connected_to_ray,
    implementation,
    restored,
)
from ist.storage.checkpoint import check_tensors, load_newest, saved_tensors
from ist.storage.shards.read import SavedTensors
from ist.subnet.job import Job
from ist.subnet.stores.shards import shard_of
from ist.training.average import PREFIX as AVERAGE
from ist.training.rounds import Method
from ist.training.worker_state import CheckpointLocation


def sharded_method(process: OpenProcess, membership: Membership, saved: Mapping[str, Tensor] | None) -> ShardedMethod:
    """Create rank 0's method for a network in shards, and give every rank its rows."""
    config = process.job.config
    tensors: Mapping[str, Tensor] = {}
    if process.shared.saved is None:
        tensors = initial_values(process.job) if saved is None else _all_tensors(process.job, saved)
    method, store = _shard_method(process, membership, tensors, saved is not None)
    prefix = "" if config.recipe.average.kind == "none" else f"{AVERAGE}module."
    return ShardedMethod(
        method, store, process.job.split, prefix, process.device, process.meter, config.pool.evaluation or "layers"
    )


def initial_values(job: Job) -> Mapping[str, Tensor]:
    """Return the network's tensors at the start of a run, without memory for more than one of them."""
    if job.task.weights is not None:
        return job.task.weights()
    with large_tensors_in_files() as files:
        network = job.task.build()
    check_constants(job.split.constants, network)
    return OneAtATime(network.state_dict(), files)


def _all_tensors(job: Job, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of a state that a process has given, and of the network without them."""
    model, further = restored(job, saved)
    return {**model.state_dict(), **further}


def ray_method(process: OpenProcess, saved: Mapping[str, Tensor] | None) -> Method:
    """Create the driver's method for a network in shards on Ray; the stack releases what it needs."""
    from ist.pools.ray_shards.method import RayShardedMethod, StartingPoint
    from ist.pools.ray_shards.owners import Owners
    from ist.pools.ray_shards.pool import ShardWorkers

    job, folder, meter, first_round = process.job, process.folder, process.meter, process.first_round
    saved = saved if saved is None else _of_this_run(saved, folder.changed if folder else (), job.config)

    def start(again: bool) -> StartingPoint:
        newest = load_newest(folder.storage, lazily=True) if again and folder else None
        if newest is not None and newest[1].rounds_done > first_round:
            return StartingPoint(newest[1].rounds_done, newest[0], True)
        if saved is not None:
            return StartingPoint(first_round, saved, True)
        return StartingPoint(0, initial_values(job), False)

    label = connected_to_ray(process)
    workers = ShardWorkers(job, meter, label, location=process.location)
    process.stack.callback(workers.close)
    owners = Owners(job, label)
    process.stack.callback(owners.close)
    method = RayShardedMethod(job, workers, owners, meter, start, folder.storage if folder else None)
    workers.gather(0)  # start actors now, so that the first round's time does not include it
    return method


def _of_this_run(saved: Mapping[str, Tensor], changed: Sequence[str], config: Config) -> Mapping[str, Tensor]:
    """Return a checkpoint's tensors by the names of this run, without those whose settings have changed."""
    if isinstance(saved, SavedTensors):
        return saved.named({plain_name(name): name for name in unchanged_names(saved, changed, config.train.optimizer)})
    return {plain_name(name): tensor for name, tensor in saved.items()}


def shared_checkpoints(
    config: Config, membership: Membership, location: CheckpointLocation | None, is_resumed: bool
) -> SharedCheckpoints:
    """Open the checkpoints of a network in shards; all ranks call this together.

    Raises:
        ConfigError: Not all ranks see them.
        CheckpointError: A file is missing or truncated. Rank 0 has verified the checkpoint.
        RunFolderError: A file cannot be read.
    """
    if location is None:
        return SharedCheckpoints()
    storage = location.storage()
    check_shared(storage, membership, location.run_id)
    if not is_resumed:
        return SharedCheckpoints(storage)
    saved = saved_tensors(storage, location.first_round)
    kept = unchanged_names(saved, location.changed, config.train.optimizer)
    return SharedCheckpoints(storage, saved.named({plain_name(name): name for name in kept}))


def check_evaluation(config: Config, device: torch.device) -> None:
    """Check that rank 0 can evaluate a network that no process holds.

    Raises:
        ConfigError: Its device is a GPU, and the network is evaluated in layers.
    """
    if device.type != "cpu" and config.pool.evaluation != "whole":
        raise ConfigError(
            f"'pool.store' is 'sharded' and the device is '{device.type}', but the network is evaluated in layers on "
            "CPUs alone: set pool.evaluation to 'whole' (rank 0 then keeps the network in memory), or "
            "pool.device to 'cpu'"
        )


def shard_follower(process: OpenProcess, membership: Membership) -> ShardFollower:
    """Create the part of a rank that owns a shard and does not coordinate."""
    return ShardFollower(*_shard_method(process, membership, None, False))


def _shard_method(
    process: OpenProcess, membership: Membership, tensors: Mapping[str, Tensor] | None, is_resumed: bool
) -> tuple[Method, ShardStore]:
    """Create the method that trains this rank's shard; all ranks call this together.

    It has the rows of the checkpoint, which each rank reads, or else of rank 0's tensors.
    """
    job, saved = process.job, process.shared.saved
    store = ShardStore(job.split, membership, process.shared.storage)
    is_resumed = broadcast_flag(membership, is_resumed)
    if saved is not None:
        state = job.split.template.state_dict()
        check_tensors({name: spec for name, spec in saved.specs().items() if name in state}, state)
    rows = store.scatter(tensors) if saved is None else store.read(saved)
    shard = shard_of(job.split, membership.rank, membership.world_size)
    network = shard_network(shard, rows)
    names = network.state_dict()
    average_state, method_state = by_owner({name: part for name, part in rows.items() if name not in names})
    pool = ShardPool(job, membership, process.meter, process.location)
    method = implementation(job.config)(
        replace(job, split=shard), pool, network.to(process.device), process.meter, method_state if is_resumed else None
    )
    return completed_method(process, method, average_state, is_resumed), store
