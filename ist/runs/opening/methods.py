"""Make the method that trains, with its pool: on the process that coordinates, and on other ranks.

Where it sits: `ist/runs/open.py` calls it when the processes of a run have agreed on its start.
Not here: a network in shards (`in_shards.py`).
"""

from collections.abc import Mapping

from torch import Tensor

from ist.distributed.process_group import (
    Membership,
)
from ist.pools.inline import InlinePool
from ist.pools.torchrun import RankWorker, TorchrunPool
from ist.runs.opening.in_shards import ray_method, sharded_method
from ist.runs.opening.process import (
    OpenProcess,
    by_owner,
    completed_method,
    connected_to_ray,
    implementation,
    restored,
)
from ist.training.rounds import Follower, Method
from ist.transport.interfaces import WorkerPool


def make_method(process: OpenProcess, saved: Mapping[str, Tensor] | None) -> Method:
    """Create the method, with a checkpoint's tensors if the run is resumed; the stack releases what it needs."""
    job, config, meter = process.job, process.job.config, process.meter
    if config.store_is_sharded:
        if process.membership is not None:
            return sharded_method(process, process.membership, saved)
        return ray_method(process, saved)
    model, further = restored(job, saved)
    model = model.to(process.device)
    make = implementation(config)
    average_state, method_state = by_owner(further)
    if config.method_spec.has_coordinator:
        state = method_state if saved is not None else None
        method = make(job, _pool(process), model, meter, state)
    else:
        method = make(job, process.membership, model, method_state, meter)
    return completed_method(process, method, average_state, saved is not None)


def _pool(process: OpenProcess) -> WorkerPool:
    """Create the pool; the stack releases what it needs when the run ends."""
    job, meter, location = process.job, process.meter, process.location
    if process.membership:
        return TorchrunPool(job, process.membership, meter, location, process.group)
    if job.config.pool.spec.in_process:
        return InlinePool(job, process.device, meter, location)
    from ist.pools.ray_pool import RayPool

    pool = RayPool(job, meter, connected_to_ray(process), location=location)
    process.stack.callback(pool.close)
    pool.gather(0)  # start actors now, so that the first round's time does not include it
    return pool


def make_follower(process: OpenProcess, membership: Membership) -> Follower:
    """Create the part of a rank that does not coordinate; the stack closes it."""
    job = process.job
    follower: Follower
    if job.config.method_spec.has_coordinator:
        follower = RankWorker(job, membership, process.location, process.group)
    else:
        follower = implementation(job.config)(job, membership, job.task.build(), {}, process.meter)
    process.stack.callback(follower.close)
    return follower
