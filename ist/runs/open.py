"""Open a run: build this process's part of it, from the configuration and the process's rank.

Where it sits: `ist/runs/execute.py` opens a run here and passes the part to the round loop; `ist/runs/preflight.py`
calls `check_method` earlier.
Not here: starting processes (`ist/launch/start.py`), the round loop (`ist/training/rounds.py`).
"""

import difflib
import functools
import inspect
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ist.config.base import run_fingerprint
from ist.config.methods import METHODS
from ist.config.registry import resolve
from ist.config.schema import Config, first_worker_rank, worker_of
from ist.distributed.device import check_autocast, compute_device
from ist.distributed.environment import PRIVATE_STORE, is_launched, is_rank_zero
from ist.distributed.memory_limit import limited_memory
from ist.distributed.process_group import (
    Membership,
    agree_on_start,
    broadcast_flag,
    broadcast_text,
    failures_published,
    join,
)
from ist.distributed.worker_group import WorkerGroup, worker_group
from ist.errors import CheckpointError, ConfigError
from ist.initialization.constants import check_constants
from ist.initialization.in_files import OneAtATime, large_tensors_in_files
from ist.launch.signals import resume_command
from ist.monitoring.callback import Callback
from ist.monitoring.display import Progress as ProgressDisplay
from ist.monitoring.meter import MemoryGauge, Meter
from ist.monitoring.observers import make_callbacks, run_start, started
from ist.network.compiled import plain_name
from ist.optimization.optimizers import unchanged_names, without_changed_settings
from ist.pools.inline import InlinePool
from ist.pools.shard_network import MethodInShards, shard_network
from ist.pools.shard_pool import ShardPool
from ist.pools.shard_store import ShardedMethod, ShardFollower, ShardStore, check_shared
from ist.pools.torchrun import RankWorker, TorchrunPool, for_world_size
from ist.runs.recorder import RunRecorder
from ist.storage.backend import Storage
from ist.storage.checkpoint import Progress, check_tensors, load_newest, saved_tensors
from ist.storage.run_folder import RunFolder
from ist.storage.run_lock import sole_writer
from ist.storage.shards.read import SavedTensors
from ist.subnet.job import Job
from ist.subnet.stores.shards import shard_of
from ist.training.average import PREFIX as AVERAGE
from ist.training.average import averaged
from ist.training.rounds import Follower, Method
from ist.training.worker_state import CheckpointLocation
from ist.transport.interfaces import WorkerPool


@dataclass(frozen=True)
class CoordinatorPart:
    """The part of the process that coordinates, evaluates and records.

    Attributes:
        job: The run, with the number of workers that the processes allow.
        method: The method that trains.
        recorder: Receives the report of every round.
        first_round: The first round to run.
        device: The device of the full network.
    """

    job: Job
    method: Method
    recorder: RunRecorder
    first_round: int
    device: torch.device


@dataclass(frozen=True)
class FollowerPart:
    """The part of every other rank.

    Attributes:
        job: The run, with the number of workers that the processes allow.
        follower: The rank's side of the method.
        first_round: The first round to run.
        ends_early: Hears after a round whether a callback on rank 0 ends the run; None: there are no such callbacks.
    """

    job: Job
    follower: Follower
    first_round: int
    ends_early: Callable[[], bool] | None = None


@dataclass(frozen=True)
class _Shared:
    """The checkpoints that all ranks write and read together, if the full network is stored in shards.

    Attributes:
        storage: Where they are saved; None: nowhere.
        saved: The tensors of the one from which the run is resumed; None: there is none, or not in the storage.
    """

    storage: Storage | None = None
    saved: SavedTensors | None = None


@dataclass(frozen=True)
class _Process:
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
    shared: _Shared
    first_round: int
    stack: ExitStack
    group: WorkerGroup | None = None


def check_method(config: Config) -> None:
    """Check that the configured method exists and can run on the configured pool, and that the pool is installed.

    Raises:
        ConfigError: The method is unknown or does not run on this pool, a package is missing, or `pool.link` is set
            for processes that another launcher has started.
    """
    pool, method = config.pool.spec, config.method_spec
    if config.pool.ranks_per_worker != 1 and not config.method_spec.has_coordinator:
        raise ConfigError(
            f"'pool.ranks_per_worker' is {config.pool.ranks_per_worker!r}, but with method '{config.method}' every "
            "process is a worker: set it to 1, and 'train.workers' to the number of processes (for `ist compare`, in "
            f"'compare.overrides.{config.method}')"
        )
    if config.pool.link is not None and is_launched() and PRIVATE_STORE not in os.environ:
        raise ConfigError(
            f"'pool.link' (--link) is '{config.pool.link}', but torchrun or another launcher started this process. "
            "Start the run with 'ist train' or 'ist compare', which create hosts and links, or remove 'pool.link'"
        )
    if pool.package is not None and find_spec(pool.package) is None:
        raise ConfigError(
            f"pool.kind is '{pool.name}', but {pool.package} is not installed: pip install 'ist[{pool.package}]'"
        )
    if config.label == config.method and config.method not in METHODS and ":" not in config.method:
        near = difflib.get_close_matches(config.method, METHODS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(
            f"compare.methods: '{config.label}' is not a method: {hint}Methods are {', '.join(METHODS)}. If it is a "
            f"label, set its method in compare.overrides, such as {{{config.label}: {{method: powersgd}}}}"
        )
    _check_arguments(config)
    if method.fixed_workers is not None and config.train.is_elastic:
        raise ConfigError(
            f"method '{config.method}' needs a fixed number of workers, {method.fixed_workers}, but "
            f"'train.min_workers' is {config.train.min_workers}: remove 'train.min_workers'"
        )
    if pool.name not in method.pools:
        able = "' or '".join(method.pools)
        raise ConfigError(f"method '{config.method}' needs pool.kind '{able}', not '{pool.name}'")


def implementation(config: Config) -> Callable[..., Any]:
    """Return the class or function that creates the configured method, with the options of its registry entry.

    Raises:
        ConfigError: The method is unknown, or cannot be imported.
    """
    made = resolve(config.method, "method", {name: spec.implementation for name, spec in METHODS.items()})
    return functools.partial(made, **config.method_spec.options)


METHOD_ARGUMENTS = ("job", "membership", "model", "state", "meter")
"""The positional arguments that create a method of equal ranks; a method with a coordinator has as many."""


def _check_arguments(config: Config) -> None:
    """Check that the implementation accepts the arguments of a method, before any process starts."""
    made = implementation(config)
    try:
        inspect.signature(made).bind(*METHOD_ARGUMENTS)
    except TypeError as error:
        raise ConfigError(
            f"'method' is '{config.method}', which cannot be called with ({', '.join(METHOD_ARGUMENTS)}): {error}"
        ) from error
    except ValueError:
        pass  # some builtins have no signature; a wrong one then fails when the method is created


@contextmanager
def open_run(
    job: Job,
    folder: RunFolder | None,
    resume: bool,
    progress: ProgressDisplay = True,
    callbacks: Sequence[Callback] = (),
    saved: tuple[Mapping[str, Tensor], Progress] | None = None,
) -> Iterator[CoordinatorPart | FollowerPart]:
    """Build this process's part of a run, and release it afterwards.

    Args:
        job: The run.
        folder: The run folder, in which rank 0 writes; None writes nothing. Other ranks do not need it: rank 0
            broadcasts where workers save their state.
        resume: Whether to resume from the newest checkpoint in `folder`.
        progress: How to show progress.
        callbacks: Callbacks besides the configured ones; used only in the process that coordinates.
        saved: A checkpoint's tensors and progress to resume from, instead of one in `folder`; only rank 0's is used.

    Raises:
        CallbackError: A callback fails.
        ConfigError: The number of started processes does not match the configuration.
        DataError: Processes have loaded different training data.
        PoolError: The process group cannot be formed, or the Ray cluster cannot be reached.
        RunFolderError: `folder` cannot be read, its checkpoints are damaged, or another process writes to it.
    """
    leads = not job.config.pool.spec.is_launched or is_rank_zero()
    with sole_writer(folder.path) if folder and leads else nullcontext():
        if folder and leads:
            folder.sweep()
            if not resume:
                folder.begin()
        with _opened(job, folder, leads, resume, progress, callbacks, saved) as run:
            yield run


@contextmanager
def _opened(
    job: Job,
    folder: RunFolder | None,
    leads: bool,
    resume: bool,
    progress: ProgressDisplay,
    callbacks: Sequence[Callback],
    saved: tuple[Mapping[str, Tensor], Progress] | None,
) -> Iterator[CoordinatorPart | FollowerPart]:
    """Do the work of `open_run`, while this process is the only one that writes to the folder, if it leads."""
    config = job.config
    check_method(config)
    # Read the checkpoint before joining the group: a damaged one must not leave the other ranks waiting.
    is_sharded = config.store_is_sharded
    tensors, before = folder.rewind(is_sharded) if leads and resume and folder else saved or ({}, Progress())
    if not (is_sharded and isinstance(tensors, SavedTensors)):
        tensors = without_changed_settings(tensors, folder.changed if folder else (), config.train.optimizer)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.pool.threads)
        computes = config.pool.spec.is_launched or config.pool.spec.in_process
        device = compute_device(config.pool) if computes else torch.device("cpu")
        if computes:
            check_autocast(config.train, device)
        membership = None
        if config.pool.spec.is_launched:
            if not is_launched():
                raise ConfigError(
                    f"pool.kind is '{config.pool.kind}', but no launcher started this process: run it with torchrun"
                )
            job = for_world_size(job)
            membership = join(config.pool, device)
            stack.enter_context(failures_published(membership))
        if computes:
            # The first optimizer imports much of torch, which must not count as memory and time of the first round.
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 3))])
        first_round = before.rounds_done
        if first_round > job.schedule.num_rounds:
            raise CheckpointError(
                f"the checkpoint was saved after {first_round} rounds, but the configured run has only "
                f"{job.schedule.num_rounds}: restore the configuration of the saved run"
            )
        if membership:
            of_rank = [worker_of(job.config, rank) for rank in range(membership.world_size)]
            own_data = config.data.shard == "own"
            first_round = agree_on_start(
                membership, first_round, run_fingerprint(config), job.task.contents, own_data, of_rank
            )
        run_id = secrets.token_hex(4)
        workers_have_state = config.workers_have_state or job.task.loop is not None  # the positions in its loaders
        location = None
        if workers_have_state or is_sharded:
            location = _location(config, folder, membership, run_id, before)
        shared = _Shared()
        if is_sharded and membership:
            _check_evaluation(config, device)
            shared = _shared(
                config, membership, location, broadcast_flag(membership, isinstance(tensors, SavedTensors))
            )
        own_location = location if workers_have_state else None
        group = worker_group(job.config, membership) if membership else None
        process = _Process(job, folder, membership, Meter(), device, own_location, shared, first_round, stack, group)
        if not (leads and first_worker_rank(config)):  # a dedicated coordinator is not a worker
            stack.enter_context(limited_memory(config.pool.memory_limit_bytes, str(config.pool.memory_limit), device))
        may_end = bool(callbacks or config.watch.callbacks)
        announce = None
        if is_sharded and membership and not leads:
            follower = _shard_follower(process, membership)
            yield FollowerPart(job, follower, first_round, lambda: follower.is_ended)
            follower.finish()
            return
        if membership and not is_sharded and broadcast_flag(membership, may_end):
            announce = functools.partial(broadcast_flag, membership)
        if membership and not leads:
            ends_early = functools.partial(announce, False) if announce else None
            yield FollowerPart(job, _follower(process, membership), first_round, ends_early)
            return
        gauge = MemoryGauge(device)
        method = _method(process, tensors if before.rounds_done else None)
        made = make_callbacks(config, callbacks, progress)
        stack.enter_context(started(made, run_start(config, job, folder, first_round)))
        recorder = RunRecorder(job, folder, made, before, process.meter, gauge, run_id, announce)
        yield CoordinatorPart(job, method, recorder, first_round, device)
        if isinstance(method, MethodInShards):
            method.end(folder.trained().__getitem__ if folder else None)


def _method(process: _Process, saved: Mapping[str, Tensor] | None) -> Method:
    """Create the method, with a checkpoint's tensors if the run is resumed; the stack releases what it needs."""
    job, config, meter = process.job, process.job.config, process.meter
    if config.store_is_sharded:
        if process.membership is not None:
            return _sharded_method(process, process.membership, saved)
        return _ray_sharded_method(process, saved)
    model, further = _restored(job, saved)
    model = model.to(process.device)
    make = implementation(config)
    average_state, method_state = _by_owner(further)
    if config.method_spec.has_coordinator:
        state = method_state if saved is not None else None
        method = make(job, _pool(process), model, meter, state)
    else:
        method = make(job, process.membership, model, method_state, meter)
    return _completed(process, method, average_state, saved is not None)


def _by_owner(further: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide a checkpoint's tensors besides the network's into those of the average and those of the method."""
    average = {name: tensor for name, tensor in further.items() if name.startswith(AVERAGE)}
    return average, {name: tensor for name, tensor in further.items() if name not in average}


def _completed(process: _Process, method: Any, average_state: Mapping[str, Tensor], is_resumed: bool) -> Method:
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


def _sharded_method(process: _Process, membership: Membership, saved: Mapping[str, Tensor] | None) -> ShardedMethod:
    """Create rank 0's method for a network in shards, and give every rank its rows."""
    config = process.job.config
    tensors: Mapping[str, Tensor] = {}
    if process.shared.saved is None:
        tensors = _initial_values(process.job) if saved is None else _all_tensors(process.job, saved)
    method, store = _shard_method(process, membership, tensors, saved is not None)
    prefix = "" if config.recipe.average.kind == "none" else f"{AVERAGE}module."
    return ShardedMethod(
        method, store, process.job.split, prefix, process.device, process.meter, config.pool.evaluation or "layers"
    )


def _initial_values(job: Job) -> Mapping[str, Tensor]:
    """Return the network's tensors at the start of a run, without memory for more than one of them."""
    if job.task.weights is not None:
        return job.task.weights()
    with large_tensors_in_files() as files:
        network = job.task.build()
    check_constants(job.split.constants, network)
    return OneAtATime(network.state_dict(), files)


def _all_tensors(job: Job, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of a state that a process has given, and of the network without them."""
    model, further = _restored(job, saved)
    return {**model.state_dict(), **further}


def _ray_sharded_method(process: _Process, saved: Mapping[str, Tensor] | None) -> Method:
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
        return StartingPoint(0, _initial_values(job), False)

    label = _connected(process)
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


def _connected(process: _Process) -> str:
    """Connect to a Ray cluster until the run ends; return a prefix of the names of its actors."""
    from ist.pools.ray_cluster import connected

    job, folder = process.job, process.folder
    resume_hint = f"Resume from the last checkpoint with: {resume_command(folder.path)}" if folder else ""
    process.stack.enter_context(connected(job.config, resume_hint))
    return f"{folder.path.name if folder else job.config.name}-{secrets.token_hex(3)}"


def _shared(config: Config, membership: Membership, location: CheckpointLocation | None, is_resumed: bool) -> _Shared:
    """Open the checkpoints of a network in shards; all ranks call this together.

    Raises:
        ConfigError: Not all ranks see them.
        CheckpointError: A file is missing or truncated. Rank 0 has verified the checkpoint.
        RunFolderError: A file cannot be read.
    """
    if location is None:
        return _Shared()
    storage = location.storage()
    check_shared(storage, membership, location.run_id)
    if not is_resumed:
        return _Shared(storage)
    saved = saved_tensors(storage, location.first_round)
    kept = unchanged_names(saved, location.changed, config.train.optimizer)
    return _Shared(storage, saved.named({plain_name(name): name for name in kept}))


def _check_evaluation(config: Config, device: torch.device) -> None:
    """Check that rank 0 can evaluate a network that no process holds.

    Raises:
        ConfigError: Its device is a GPU, and the network is evaluated in layers.
    """
    if device.type != "cpu" and config.pool.evaluation != "whole":
        raise ConfigError(
            f"'pool.store' is 'sharded' and the device is '{device.type}', but the network is evaluated in layers on "
            "CPUs alone: set pool.evaluation to 'whole' (rank 0 then holds the network while it evaluates), or "
            "pool.device to 'cpu'"
        )


def _shard_follower(process: _Process, membership: Membership) -> ShardFollower:
    return ShardFollower(*_shard_method(process, membership, None, False))


def _shard_method(
    process: _Process, membership: Membership, tensors: Mapping[str, Tensor] | None, is_resumed: bool
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
    average_state, method_state = _by_owner({name: part for name, part in rows.items() if name not in names})
    pool = ShardPool(job, membership, process.meter, process.location)
    method = implementation(job.config)(
        replace(job, split=shard), pool, network.to(process.device), process.meter, method_state if is_resumed else None
    )
    return _completed(process, method, average_state, is_resumed), store


def _pool(process: _Process) -> WorkerPool:
    """Create the pool; the stack releases what it needs when the run ends."""
    job, meter, location = process.job, process.meter, process.location
    if process.membership:
        return TorchrunPool(job, process.membership, meter, location, process.group)
    if job.config.pool.spec.in_process:
        return InlinePool(job, process.device, meter, location)
    from ist.pools.ray_pool import RayPool

    pool = RayPool(job, meter, _connected(process), location=location)
    process.stack.callback(pool.close)
    pool.gather(0)  # start actors now, so that the first round's time does not include it
    return pool


def _location(
    config: Config, folder: RunFolder | None, membership: Membership | None, run_id: str, before: Progress
) -> CheckpointLocation | None:
    """Return where this process's workers save their state: rank 0's checkpoint location; None if it has none."""
    location = None
    if folder:
        checkpoint = folder.load_config().checkpoint
        location = CheckpointLocation(
            str(folder.path.resolve()), checkpoint, run_id, before.rounds_done, before.start, folder.changed
        )
    if membership is None:
        return location
    text = broadcast_text(membership, location.to_text() if location else "")
    return CheckpointLocation.from_text(text, config.checkpoint) if text else None


def _follower(process: _Process, membership: Membership) -> Follower:
    job = process.job
    follower: Follower
    if job.config.method_spec.has_coordinator:
        follower = RankWorker(job, membership, process.location, process.group)
    else:
        follower = implementation(job.config)(job, membership, job.task.build(), {}, process.meter)
    process.stack.callback(follower.close)
    return follower


def _restored(job: Job, saved: Mapping[str, Tensor] | None) -> tuple[torch.nn.Module, dict[str, Tensor]]:
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
