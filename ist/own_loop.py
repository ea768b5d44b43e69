"""`ist.join`: keep your own training loop; Independent Subnet Training is the `for` around it.

Where it sits: `ist/__init__.py` exports it; it builds a job (`ist/runs/build.py`) and iterates the round loop
(`ist/training/rounds.py`), which yields this process's part of each round.
Law: a loop that makes the steps of the built-in loop gives the same weights, bit for bit.
Not here: the object of the loop's body (`ist/loops/part.py`), the built-in loop (`ist/api.py`).
"""

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Unpack

from ist.config.base import run_fingerprint
from ist.config.partition import Exchange, Partition
from ist.config.recipe import Recipe
from ist.config.runtime import Checkpoint, Pool, Watch
from ist.config.schema import (
    Config,
    Optimizer,
    Schedule,
    first_worker_rank,
    lead_rank,
    num_processes,
    ranks_per_worker,
    worker_of,
)
from ist.distributed.environment import is_launched, is_rank_zero, own_rank, ranks_of_node, world_size
from ist.distributed.process_group import leave
from ist.errors import ConfigError, LoopError, PoolError
from ist.evaluation.task import OwnEvaluation
from ist.loops.part import Part
from ist.monitoring.callback import Callback, Record, Stop
from ist.monitoring.display import Progress, check_progress
from ist.monitoring.observers import check_callbacks
from ist.network.compiled import uncompiled
from ist.network.copies import on_meta
from ist.network.modes import preserve_modes
from ist.network.supported import check_network
from ist.optimization.factory import MakeOptimizer
from ist.optimization.schedulers import MakeScheduler
from ist.pools.torchrun import for_world_size
from ist.rng import Purpose, seeded
from ist.runs.arguments import LoopKeys, join_config, optimizer_function, scheduler_function
from ist.runs.build import make_loop_job, start_of
from ist.runs.execute import device_of, give_back, run_parts, sole_run
from ist.runs.open import CoordinatorPart, FollowerPart
from ist.runs.preflight import check_result, folder_of_run
from ist.runs.rehearsal import rehearse
from ist.storage.checkpoint import Progress as SavedProgress
from ist.storage.run_folder import RunFolder
from ist.subnet.job import Job
from ist.training.worker_state import GIVEN_STATE

_log = logging.getLogger(__name__)


class Joined:
    """This process's part of a run whose local steps you make: iterate over it once, with `for`.

    Each item is an `ist.Part`. When the body ends, its subnet is sent back and merged, and the next part arrives. All
    processes must make the whole loop: if one leaves it early, or raises an exception, the others raise an error.

    Attributes:
        worker: The number of this process's worker, from 0; -1 for a dedicated coordinator, which yields no part and
            needs no loader (a DistributedSampler refuses -1: give it `max(run.worker, 0)`).
        num_workers: The number of workers.
        rank: The number of this process among the ranks of its worker, from 0; 0 for a dedicated coordinator.
        ranks: The number of ranks of a worker (`pool.ranks_per_worker`); each reads its own part of the worker's data,
            as of a DistributedSampler with `num_workers * ranks` replicas of which this is `worker * ranks + rank`.
        num_rounds: The number of rounds of the run.
        is_coordinator: Whether this process has the full network: `model` is trained, and `history` is filled.
        history: One record a round, as in metrics.jsonl; empty on a process that does not coordinate.
        stopped_early: Why the run ended before its last round, on the coordinator; None if it did not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, loader = nn.Linear(2, 1), [(torch.ones(4, 2), torch.ones(4, 1))]
        >>> run = ist.join(model, example=loader[0][0], workers=1, local_steps=5, rounds=3, progress=False)
        >>> run.evaluate(lambda network: {"loss": float((network(loader[0][0]) - loader[0][1]).square().mean())})
        >>> for part in run:
        ...     for inputs, targets in part.take(loader):
        ...         loss = nn.functional.mse_loss(part.model(inputs), targets)
        ...         loss.backward()
        ...         part.optimizer.step()
        ...         part.optimizer.zero_grad()
        ...         part.log(loss, len(inputs))
        >>> run.history[-1]["test_loss"] < 0.1, run.model is model
        (True, True)
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        folder: RunFolder | None,
        resume: bool,
        progress: Progress,
        callbacks: Sequence[Callback],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.worker = _own_worker(job.config)
        self.num_workers = job.config.train.workers
        self.rank = _rank_in_worker(job.config)
        self.ranks = ranks_per_worker(job.config)
        self.num_rounds = job.schedule.num_rounds
        self.is_coordinator = is_rank_zero()
        self.history: list[dict[str, Any]] = []
        self.stopped_early: str | None = None
        self._job = job
        self._model = model
        self._folder = folder
        self._resume = resume
        self._progress = progress
        self._stopping = _Stopping()
        self._callbacks = (*callbacks, self._stopping)
        self._state = state
        self._is_started = False
        self._part: Part | None = None
        self._coordinator: CoordinatorPart | None = None

    @property
    def model(self) -> nn.Module:
        """The given network; after the loop it is trained, on the coordinator."""
        return self._model

    def evaluate(self, function: Callable[[nn.Module], Mapping[str, float] | float], every: int = 1) -> None:
        """Evaluate the full network on the coordinator, every few rounds and after the last one.

        Call this before the loop. Batch norm's running statistics are re-estimated first (`statistics` of `join`).

        Args:
            function: Receives the full network in evaluation mode, without gradients; returns numbers by name, which
                are recorded ('loss' as test_loss), or the loss alone.
            every: The number of rounds between evaluations; > 0.

        Raises:
            LoopError: The loop has already started.
            ConfigError: `every` is not a positive number.
        """
        if self._is_started:
            raise LoopError("run.evaluate was called after the loop has started: call it before the loop")
        if not isinstance(every, int) or every < 1:
            raise ConfigError(f"run.evaluate: every is {every!r}: give a positive number of rounds")
        self._job = replace(self._job, task=replace(self._job.task, evaluation=OwnEvaluation(function, every)))

    def state_dict(self) -> dict[str, Any]:
        """Return what this process needs to resume the run later, for a checkpoint of your own.

        Call it in every process at the top of the loop's body, before the first step of the round, and give it to
        `ist.join(..., state=...)`. With `run_dir`, checkpoints are written without this.

        Returns:
            Nested dictionaries of tensors on the CPU, numbers and strings, as `torch.save` writes and
            `torch.load(weights_only=True)` reads them: `rounds_done`; `worker`, this worker's state and the positions
            in its loaders; on the coordinator also `network`, the full network with the state of the method.

        Raises:
            LoopError: The loop has not started, or a batch was already taken in this round.
            ConfigError: The coordinator is dedicated: it has no part, so it cannot call this in its loop's body. Or the
                store is sharded: no process holds the network.
        """
        if first_worker_rank(self._job.config):
            raise ConfigError(_DEDICATED)
        if self._job.config.store_is_sharded:
            raise ConfigError(_SHARDED)
        if self._part is None:
            raise LoopError("run.state_dict was called before the loop: call it at the top of the loop's body")
        state: dict[str, Any] = {
            "rounds_done": self._part.round,
            "workers": _place(self._job.config),
            "run": run_fingerprint(self._job.config),
            "worker": self._part.state_dict(),
        }
        if self._coordinator is not None:
            tensors = self._coordinator.method.checkpoint_state()
            progress = self._coordinator.recorder.progress(self._part.round)
            state["network"] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            state["progress"] = asdict(progress)
        return state

    def _saved(self) -> tuple[Mapping[str, Tensor], SavedProgress] | None:
        """Return the coordinator's part of the state that was given."""
        if self._state is None or "network" not in self._state:
            return None
        return self._state["network"], SavedProgress(**{**self._state["progress"], "start": GIVEN_STATE})

    def stop(self, reason: str) -> None:
        """End the run on all processes when this round is merged; only the coordinator's call counts.

        Args:
            reason: Why; the run's result shows it.
        """
        self._stopping.stop = Stop(reason)

    def __iter__(self) -> Iterator[Part]:
        """Yield this process's part of each remaining round.

        Raises:
            LoopError: The loop was already iterated, a body makes no optimizer step or logs no loss, or a loader ends.
            PoolError: Another process has left the loop, or cannot be reached.
            DivergedError: A worker returned a non-finite loss or weight.
            RunFolderError: The run folder cannot be written or read.
        """
        if self._is_started:
            raise LoopError("the loop over ist.join was already run: call ist.join again, with resume=True to continue")
        self._is_started = True
        rounds = self._rounds()
        try:
            for part in rounds:
                if self._part is None and self._state is not None:
                    part.load_state_dict(self._state["worker"])
                self._part = part
                yield part
        except GeneratorExit:  # the caller has left the loop
            if self._part is not None and self._part.peer_error is not None:  # because another process has failed
                with suppress(PoolError):
                    rounds.throw(self._part.peer_error)
                self._leave()
                raise
            where = f"in round {self._part.round} of {self.num_rounds}" if self._part else "before its first round"
            left = LoopError(
                f"worker {self.worker} has left the loop over ist.join {where} (a break, a return or an exception in "
                "its body)"
            )
            with suppress(LoopError):
                rounds.throw(left)
            closes = "; the process group is closed, so that the other processes stop" if self._has_peers else ""
            _log.error("%s%s", left, closes)
            self._leave()
            raise
        except BaseException:
            self._leave()  # this process may go on after the error, but the others must not wait for it
            raise

    @property
    def _has_peers(self) -> bool:
        return num_processes(self._job.config) > 1

    def _leave(self) -> None:
        """Close the process group, if there are other processes."""
        if self._has_peers:
            leave()

    def _rounds(self) -> Generator[Part]:
        """Open the run, yield the parts of this process, and write the result."""
        with ExitStack() as stack:
            stack.enter_context(sole_run())
            plain = stack.enter_context(uncompiled(self._model))
            stack.enter_context(preserve_modes(plain))
            device_before = device_of(plain)
            run = yield from run_parts(
                self._job, self._folder, self._resume, self._progress, self._opened, self._callbacks, self._saved()
            )
            if isinstance(run, CoordinatorPart):
                self.stopped_early = run.recorder.stopped_early
                give_back(run, plain, device_before)

    def _opened(self, run: CoordinatorPart | FollowerPart) -> None:
        """Check that all processes continue from the same round.

        Raises:
            LoopError: This process has the state of another round, or none.
        """
        if self._state is not None and self._state["rounds_done"] != run.first_round:
            raise LoopError(
                f"worker {self.worker} has the state after {self._state['rounds_done']} rounds, but the "
                f"coordinator has that after {run.first_round}: give all processes a state of the same round"
            )
        if run.first_round > 0 and self._state is None and not self._resume:
            raise LoopError(
                f"worker {self.worker} has no state=, but the coordinator continues after {run.first_round} rounds: "
                "give all processes their own state, or none"
            )
        if isinstance(run, CoordinatorPart):
            self._coordinator = run
            self.history = run.recorder.history


@seeded(torch.device("cpu"), 0, Purpose.REHEARSAL)  # checking the network must not change the caller's generators
def join(
    model: nn.Module,
    *,
    example: Any,
    workers: int | None = None,
    local_steps: int = 50,
    rounds: int,
    optimizer: str | Optimizer | Mapping[str, Any] | MakeOptimizer | type[torch.optim.Optimizer] = "SGD",
    schedule: str | Schedule | type[LRScheduler] | MakeScheduler | Mapping[str, Any] | None = None,
    statistics: Iterable[Any] | None = None,
    partition: Partition | Mapping[str, Any] | None = None,
    exchange: Exchange | Mapping[str, Any] | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | Mapping[str, Any] | None = None,
    pool: str | Pool | Mapping[str, Any] = "auto",
    watch: Watch | Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    state: Mapping[str, Any] | None = None,
    seed: int = 0,
    weights: str | Path | None = None,
    progress: Progress = True,
    callbacks: Sequence[Callback] = (),
    **keywords: Unpack[LoopKeys],
) -> Joined:
    """Join a run of Independent Subnet Training whose local steps your own loop makes.

    Every process of the run calls this: under torchrun, Slurm or `accelerate launch`, in a Ray Train worker function,
    or wherever your program has initialized torch.distributed. Each process is one worker; rank 0 also coordinates.
    Data, loss, precision, clipping and logging are your own. Within the body, the generators of torch, `random` and
    `numpy.random` are seeded for the round and the worker, and restored afterwards.

    What is given up against `ist.train`: a resumed run equals an uninterrupted one only if the loader can save its
    position (`state_dict` and `load_state_dict`); other loaders start their next epoch.

    Args:
        model: Any network, the same on every process. Rank 0's is trained in place.
        example: Inputs of a small batch (two samples), as the network accepts them: a tensor, a tuple of positional
            arguments, or a mapping of keyword arguments. The network is run on it to find its neuron groups.
        workers: Number of workers; it must be the number of processes, less a dedicated coordinator. Default: that
            number; a process that is alone must ask for one worker.
        local_steps: Optimizer steps of a worker in a round.
        rounds: Length of the run in rounds.
        optimizer: As in `ist.train`: most often a function of the subnet's named parameters, such as
            `lambda named: torch.optim.AdamW(named.values(), lr=3e-4)`. It makes `part.optimizer`.
        schedule: As in `ist.train`; it is applied before each optimizer step. Default: the learning rate is constant.
            Your own schedule can set the rate by `part.step`; a scheduler of torch on `part.optimizer` would lose its
            optimizer, which is another object in each round with other neurons.
        statistics: Inputs of training batches, from which rank 0 re-estimates the running statistics of batch norm
            before evaluations and at the end. Needed only for a network with batch norm.
        partition: How neurons are assigned to workers. Default: each neuron to one worker, at random every round.
        exchange: The number of bits of exchanged weights. Default: the bits of the network's dtypes.
        recipe: Stages of the run, outer optimizer, average over rounds. Default: none of them.
        checkpoint: How often the run is saved in `run_dir`, and where else. Default: every round.
        pool: `ist.Pool` with further keys, such as the timeout. Its kind is 'torchrun', or 'inline' for one worker.
            Unless it has `threads`, the process keeps its own number of torch threads.
        watch: TensorBoard and Prometheus. Default: neither.
        run_dir: Folder for metrics, checkpoints and the trained network; default: nothing is written.
        resume: Whether to resume from the newest checkpoint in `run_dir`; arguments may change as in `ist.train`.
        state: What `state_dict` of an earlier run returned in this process; the run continues from there, with the same
            arguments, and this process is the same worker. Give it to all processes, instead of `resume`; a dedicated
            coordinator cannot use it.
        seed: Seed of everything random except the network's initial weights; >= 0.
        weights: As in `ist.train`. Only rank 0 reads them; on other ranks, a network on `meta` stays there.
        progress: How to show progress, as in `ist.train`.
        callbacks: Receive the records of the rounds, and may end the run early; see `ist.Callback`. Only the
            coordinator's are used.
        **keywords: Further keys of the section `train`: `min_workers`, `logged`, `schedule_unit`,
            `optimizer_state`, `activation_scale`, `running_statistics`.

    Returns:
        The run: iterate over it.

    Raises:
        ConfigError: An argument is invalid, or the number of processes is not the number of workers.
        ModelError: The network cannot be split among that many workers, or has batch norm and no `statistics`.
        DataError: `example` contains no tensor.
        RunFolderError: `run_dir` cannot be written, or, with `resume`, contains no run, or an argument must not change.
        TypeError: An argument of that name does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> batches = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(4)]
        >>> run = ist.join(model, example=batches[0][0], workers=1, local_steps=4, rounds=2, progress=False)
        >>> for part in run:
        ...     for inputs, targets in part.take(batches):
        ...         with torch.autocast("cpu", torch.bfloat16):
        ...             loss = nn.functional.cross_entropy(part.model(inputs), targets)
        ...         loss.backward()
        ...         _ = nn.utils.clip_grad_norm_(part.model.parameters(), 1.0)
        ...         part.optimizer.step()
        ...         part.optimizer.zero_grad()
        ...         part.log(loss, len(inputs))
        >>> [record["samples"] for record in run.history]
        [64, 128]
    """
    config = join_config({**locals(), "workers": _num_workers(workers, pool)})
    check_progress(progress)
    check_callbacks(config, callbacks)
    with uncompiled(model) as plain, preserve_modes(plain):
        check_network(plain, is_split=True)
        start = start_of(plain, weights)
        check_result(config, plain, run_dir)
        make, scheduler = optimizer_function(optimizer), scheduler_function(schedule)
        job = make_loop_job(
            config, on_meta(plain), start.build, example, _made_outside, statistics, optimizer=make,
            scheduler=scheduler, construct=start.construct, weights=start.weights,
        )  # fmt: skip
        if is_launched():
            job = for_world_size(job)
        rehearse(job)
    if state is not None:
        _check_state(state, job.config, resume)
    folder = folder_of_run(job, config, run_dir, resume)
    return Joined(job, model, folder, resume, progress, callbacks, state)


def _own_worker(config: Config) -> int:
    """Return the number of this process's worker; -1 for a dedicated coordinator."""
    return worker_of(config, own_rank() if is_launched() else 0)


def _rank_in_worker(config: Config) -> int:
    """Return the number of this process among the ranks of its worker; 0 for a dedicated coordinator."""
    worker = _own_worker(config)
    return own_rank() - lead_rank(config, worker) if is_launched() and worker >= 0 else 0


def _place(config: Config) -> list[int]:
    """Return the place of this process in a run: worker, number of workers; rank and number of ranks if several."""
    ranks = ranks_per_worker(config)
    of_rank = [_rank_in_worker(config), ranks] if ranks > 1 else []
    return [_own_worker(config), config.train.workers, *of_rank]


def _shown_place(place: Sequence[int]) -> str:
    worker, workers, *of_rank = place
    ranks = f", rank {of_rank[0]} of {of_rank[1]}" if of_rank else ""
    return f"worker {worker} of {workers}{ranks}"


def _check_state(state: Mapping[str, Any], config: Config, resume: bool) -> None:
    """Check that a state is one of this worker.

    Raises:
        ConfigError: It is not, or `resume` is given as well.
    """
    if resume:
        raise ConfigError("state and resume=True both say where to continue: leave one out")
    if first_worker_rank(config):
        raise ConfigError(_DEDICATED)
    if config.store_is_sharded:
        raise ConfigError(_SHARDED)
    needed = {"rounds_done", "workers", "worker", "run"} | ({"network", "progress"} if is_rank_zero() else set())
    if missing := sorted(needed - state.keys()):
        raise ConfigError(f"state has no '{missing[0]}': give this process what its run.state_dict() returned")
    of, own = list(state["workers"]), _place(config)
    if of != own:
        raise ConfigError(f"state is of {_shown_place(of)}, but this process is {_shown_place(own)}")
    if state["run"] != run_fingerprint(config):
        raise ConfigError(
            "state is of a run with other arguments, such as seed, local_steps, rounds, partition or exchange: give "
            "the same ones, or resume from a run_dir, where some may change"
        )


_DEDICATED = (
    "pool.coordinator is 'dedicated', and a dedicated coordinator has no part in whose body it could save its state: "
    "use run_dir and resume=True"
)


_SHARDED = (
    "run.state_dict() returns the full network on rank 0, but pool.store is 'sharded', so that no process holds it: "
    "use run_dir and resume=True"
)


class _Stopping(Callback):
    """Ends the run if the user's loop has asked for it."""

    stop: Stop | None = None

    def on_round(self, record: Record) -> Stop | None:  # noqa: ARG002
        """Return the answer to the coordinator."""
        return self.stop


def _made_outside(part: Part) -> None:
    raise AssertionError(f"the steps of round {part.round} are made by the loop over ist.join")


def _num_workers(given: int | None, pool: str | Pool | Mapping[str, Any]) -> int:
    """Return the number of workers; by default, the number of processes without a dedicated coordinator.

    Raises:
        ConfigError: This process is alone, which must be asked for.
    """
    started = world_size() if is_launched() else 1
    remedy = f"start several processes (torchrun --nproc-per-node {given or 4} script.py)"
    if os.environ.get("SLURM_NTASKS", "1") != "1":
        remedy = "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every task of Slurm"
    if given is None and started == 1:
        raise ConfigError(
            f"ist.join: this process is alone, so there is nothing to split: {remedy}, or give workers=1 to train in "
            "this process"
        )
    if isinstance(given, int) and given > 1 and not is_launched():
        raise ConfigError(f"ist.join: workers is {given}, but this process is alone: {remedy}, or give workers=1")
    if given is not None:
        return given
    keys = dict(pool) if isinstance(pool, Mapping) else pool.model_dump() if isinstance(pool, Pool) else {}
    ranks = keys.get("ranks_per_worker", 1)
    if ranks == "node":
        ranks = ranks_of_node()
    spare = int(keys.get("coordinator") == "dedicated")
    if isinstance(ranks, int) and ranks > 0:
        if (started - spare) % ranks:
            raise ConfigError(
                f"ist.join: {started} processes were started (WORLD_SIZE){', one of them a coordinator' * spare}, but "
                f"pool.ranks_per_worker is {ranks}: start {ranks} for each worker{', and one more' * spare}"
            )
        return (started - spare) // ranks
    return started - spare
