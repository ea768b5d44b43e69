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
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ist.config.base import run_fingerprint
from ist.config.methods import METHODS
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
from ist.distributed.worker_group import worker_group
from ist.errors import CheckpointError, ConfigError
from ist.monitoring.callback import Callback
from ist.monitoring.display import Progress as ProgressDisplay
from ist.monitoring.meter import MemoryGauge, Meter
from ist.monitoring.observers import make_callbacks, run_start, started
from ist.optimization.optimizers import without_changed_settings
from ist.pools.shard_network import MethodInShards
from ist.pools.torchrun import for_world_size
from ist.runs.opening.in_shards import check_evaluation, shard_follower, shared_checkpoints
from ist.runs.opening.methods import make_follower, make_method
from ist.runs.opening.process import OpenProcess, SharedCheckpoints, implementation
from ist.runs.recorder import RunRecorder
from ist.storage.checkpoint import Progress
from ist.storage.run_folder import RunFolder
from ist.storage.run_lock import sole_writer
from ist.storage.shards.read import SavedTensors
from ist.subnet.job import Job
from ist.training.rounds import Follower, Method
from ist.training.worker_state import CheckpointLocation


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
        shared = SharedCheckpoints()
        if is_sharded and membership:
            check_evaluation(config, device)
            shared = shared_checkpoints(
                config, membership, location, broadcast_flag(membership, isinstance(tensors, SavedTensors))
            )
        own_location = location if workers_have_state else None
        group = worker_group(job.config, membership) if membership else None
        process = OpenProcess(job, folder, membership, Meter(), device, own_location, shared, first_round, stack, group)
        if not (leads and first_worker_rank(config)):  # a dedicated coordinator is not a worker
            stack.enter_context(limited_memory(config.pool.memory_limit_bytes, str(config.pool.memory_limit), device))
        may_end = bool(callbacks or config.watch.callbacks)
        announce = None
        if is_sharded and membership and not leads:
            follower = shard_follower(process, membership)
            yield FollowerPart(job, follower, first_round, lambda: follower.is_ended)
            follower.finish()
            return
        if membership and not is_sharded and broadcast_flag(membership, may_end):
            announce = functools.partial(broadcast_flag, membership)
        if membership and not leads:
            ends_early = functools.partial(announce, False) if announce else None
            yield FollowerPart(job, make_follower(process, membership), first_round, ends_early)
            return
        gauge = MemoryGauge(device)
        method = make_method(process, tensors if before.rounds_done else None)
        tensors = {}  # the network has them: during the run, this process does not hold them twice
        made = make_callbacks(config, callbacks, progress)
        stack.enter_context(started(made, run_start(config, job, folder, first_round)))
        recorder = RunRecorder(job, folder, made, before, process.meter, gauge, run_id, announce)
        yield CoordinatorPart(job, method, recorder, first_round, device)
        if isinstance(method, MethodInShards):
            method.end(folder.trained().__getitem__ if folder else None)


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
