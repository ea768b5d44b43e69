"""The driver of a run whose network is in shards on Ray: it schedules rounds, and never holds the network.

A round: every owner cuts a piece of each worker's subnet; the workers fetch their pieces, train, and return pieces; the
owners fetch those and keep them. When enough workers have returned, and every owner has all of their pieces, all owners
merge. So a round is merged by all owners or repeated, and what a lost worker leaves behind is as with one coordinator:
its neurons keep their values.

If an owner is lost, its rows come back from the replica that another owner holds (`pool.store_replicas`), or else those
of all owners from the last checkpoint. The rounds since then are trained again, as after a resumption.
Where it sits: `ist/runs/opening/in_shards.py` creates it if `pool.kind` is `ray` and `pool.store` is `sharded`.
Not here: cutting and merging (`owner.py`), training (`worker.py`), starting actors (`owners.py`, `pool.py`).
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from ist.config.schema import min_returned
from ist.errors import PoolError, WorkerLostError, first_line
from ist.loops.part import Part
from ist.monitoring.meter import Meter
from ist.pools.ray_shards.owner import Rows
from ist.pools.ray_shards.owners import Owners, OwnersLostError
from ist.pools.ray_shards.pool import ShardWorkers
from ist.pools.ray_workers.bundle import cause_of
from ist.pools.shard_network import MethodInShards, StoredSpecs
from ist.storage.backend import Storage
from ist.storage.checkpoint import check_tensors, shards_folder
from ist.storage.shards.plan import ShardFile, plan_shards
from ist.storage.shards.write import ShardedTensors, Written, begin, write_shards
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.job import Job
from ist.subnet.stores.shards import owned_rows, shard_shape
from ist.tensors import TensorSpec
from ist.training.average import PREFIX as AVERAGE
from ist.training.coordinator import Arrivals, attempts, diverged, invalid
from ist.training.rounds import RoundReport
from ist.transport.interfaces import Lost

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """A state between two rounds, from which a run starts or continues.

    Attributes:
        rounds_done: The number of rounds before it.
        tensors: Full tensors by name, of the network and of all else that a checkpoint has.
        is_resumed: Whether they are a checkpoint's.
    """

    rounds_done: int
    tensors: Mapping[str, Tensor]
    is_resumed: bool


class RayState(ShardedTensors):
    """Every tensor of a checkpoint, on the driver: one that is asked for is gathered from the owners.

    Args:
        method: The method.
        specs: The full shapes of all tensors.
        storage: Where checkpoints are saved; None: nowhere.
    """

    def __init__(self, method: "RayShardedMethod", specs: Mapping[str, TensorSpec], storage: Storage | None) -> None:
        self._method = method
        self._specs = specs
        self._storage = storage

    def __getitem__(self, name: str) -> Tensor:
        """Gather a tensor."""
        if name not in self._specs:
            raise KeyError(name)
        return self._method.gather(name)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._specs)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._specs)

    def write(self, rounds_done: int) -> tuple[Sequence[ShardFile], Mapping[str, Written]]:
        """Write the files of a checkpoint, tensor by tensor; only the driver needs to see the storage."""
        assert self._storage is not None
        storage, folder = self._storage, shards_folder(rounds_done)
        network = self._method.network_names()
        files = plan_shards(
            {name: spec for name, spec in self._specs.items() if name in network},
            {name: spec for name, spec in self._specs.items() if name not in network},
            1,
        )
        while True:
            state = self._method.restored
            written = write_shards(storage, folder, files, lambda name, to: self._method.gather(name), 0)  # noqa: ARG005
            if self._method.restored == state:
                return files, written
            begin(storage, folder)  # an owner was lost meanwhile: all tensors must be of the same state


class RayShardedMethod(MethodInShards):
    """Independent Subnet Training on Ray with the full network in shards; a `Method`.

    Args:
        job: The run.
        workers: The actors that train.
        owners: The actors that own the rows.
        meter: Counts payload bytes.
        start: Returns the state from which the run starts. Called again with True after a loss, it returns the newest
            checkpoint.
        storage: Where checkpoints are saved; None: nowhere.

    Attributes:
        restored: How often lost rows have been restored.

    Raises:
        CheckpointError: A tensor is missing in the starting point, or the configuration does not use one of it.
    """

    def __init__(
        self,
        job: Job,
        workers: ShardWorkers,
        owners: Owners,
        meter: Meter,
        start: Callable[[bool], StartingPoint],
        storage: Storage | None = None,
    ) -> None:
        config = job.config
        prefix = "" if config.recipe.average.kind == "none" else f"{AVERAGE}module."
        spec = StoredSpecs(job.split)
        super().__init__(job.split, spec, prefix, torch.device("cpu"), config.pool.evaluation or "layers")
        self._job = job
        self._workers = workers
        self._owners = owners
        self._meter = meter
        self._start = start
        self._storage = storage
        self._specs: dict[str, TensorSpec] = {}
        self._buffers_of: dict[str, Tensor] = {}
        self._rounds_done = 0
        self._replicas: tuple[int, list[Any]] | None = None
        self._left_out: dict[int, set[int]] = {}  # by round: workers that its merge left out
        self.restored = 0
        self._repeated(0, lambda: self._restart(False))

    def own_buffer(self, name: str) -> Tensor:
        """Return a buffer that every owner has as a whole, such as re-estimated statistics."""
        return self._buffers_of[self._prefix + name]

    def network_names(self) -> set[str]:
        """Return the names of the evaluated network's tensors in a checkpoint."""
        return set(self._split.template.state_dict())

    def checkpoint_state(self) -> RayState:
        """Return every tensor that the method needs to resume; one that is asked for is gathered."""
        return RayState(self, self._specs, self._storage)

    def bytes_sent(self) -> int:
        """Return the bytes of all pieces so far, in both directions."""
        return self._meter.total_bytes

    def close(self) -> None:
        """Release all actors."""
        self._workers.close()
        self._owners.close()

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Train for a round; if an owner is lost, restore its rows, and train the rounds since that state again.

        Raises:
            DivergedError: Too few results are valid, no worker was lost, and the first invalid result is non-finite.
            PoolError: Owners are lost again and again, or too few results are valid.
            WorkerLostError: Too few workers returned a result, or too few are available at the start.
        """
        yield from ()  # the workers' parts are in other processes
        report: RoundReport = self._repeated(round_number, lambda: self._train(round_number))
        self._left_out[round_number] = {lost.worker for lost in report.lost}
        return report

    def gather(self, name: str) -> Tensor:
        """Return a full tensor of a checkpoint.

        Raises:
            PoolError: Owners are lost again and again.
        """
        if name in self._buffers_of:
            return self._buffers_of[name]
        owners = range(self._owners.count if self._spec(name) else 1)
        parts: list[Rows] = self._repeated(
            self._rounds_done,
            lambda: self._owners.answers({owner: self._owners.begin(owner, "rows", [name]) for owner in owners}),
        )
        rows, spec = [part.tensors()[name] for part in parts], self._specs[name]
        self._meter.gathered += spec.nbytes
        return torch.cat(rows) if spec.shape else rows[0].clone()

    def _repeated(self, rounds_done: int, action: Callable[[], Any]) -> Any:
        """Do something with the owners' rows of the state after so many rounds; restore lost rows, and repeat it.

        Raises:
            PoolError: Owners are lost more often than `pool.round_attempts` allows.
        """
        lost: list[OwnersLostError] = []
        while True:
            try:
                if lost:
                    self._restore(lost[-1])
                while (again := self._rounds_done) < rounds_done:
                    if {each.worker for each in self._train(again).lost} != self._left_out.get(again, set()):
                        _log.warning("round %d is trained again without the same workers: its values differ", again)
                return action()
            except OwnersLostError as error:
                lost.append(error)
                if len(lost) >= max(2, self._job.config.pool.round_attempts):
                    raise PoolError(
                        f"owners of the network's rows were lost {len(lost)} times in a row (pool.round_attempts), in "
                        f"the end {error}"
                    ) from error

    def _restore(self, lost: OwnersLostError) -> None:
        """Start new actors for lost owners, and give all owners the rows of the same state between two rounds."""
        for owner in lost.causes:
            self._owners.replace(owner)
        self.restored += 1
        if self._replicas is not None and self._replicas[0] == self._rounds_done and self._restore_replicas():
            _log.warning(
                "%s; its rows are restored from a replica, as they were after %d rounds", lost, self._rounds_done
            )
            return
        before = self._rounds_done
        self._restart(True)
        _log.warning(
            "%s; all rows are restored as they were after %d rounds, and rounds from there to %d are trained again",
            lost, self._rounds_done, before,
        )  # fmt: skip
        if self._job.config.workers_have_state or self._job.task.loop is not None:
            self._workers.restart()  # their state is of later rounds; new actors restore what was saved

    def _restart(self, again: bool) -> None:
        """Give all owners the rows of the starting point."""
        point = self._start(again)
        count, found, state = self._owners.count, {}, self._split.template.state_dict()
        for name in point.tensors:  # this process holds one tensor at a time
            tensor = point.tensors[name].detach().cpu()
            found[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)
            self._owners.answers(
                {
                    owner: self._owners.begin(owner, "load", Rows.of({name: self._rows_of(tensor, name, owner)}))
                    for owner in range(count)
                }
            )
        check_tensors(
            {name: spec for name, spec in found.items() if name in state},
            {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()},
        )
        shapes = self._owners.call("restore", None, point.is_resumed)
        self._specs = {name: self._full_spec(name, spec) for name, spec in shapes[0].items()}
        if not again:
            whole = [name for name, _ in self._split.template.named_buffers() if name in state]
            whole = [name for name in whole if self._spec(name) is None]
            self._buffers_of = {
                stored: point.tensors[stored if stored in point.tensors else name].clone()
                for name in whole
                for stored in {name, self._prefix + name}
            }
        self._rounds_done = point.rounds_done
        self._replicate(point.rounds_done)

    def _full_spec(self, name: str, own: TensorSpec) -> TensorSpec:
        full = self._spec(name)
        return own if full is None else TensorSpec(full.shape, own.dtype)

    def _rows_of(self, tensor: Tensor, name: str, owner: int) -> Tensor:
        """Return an owner's rows of a full tensor; a tensor that is not in shards as a whole."""
        full, count = self._spec(name), self._owners.count
        if full is None:
            return tensor
        if not full.shape:
            return tensor if owner == 0 else tensor.new_empty(shard_shape((), owner, count))
        owned = owned_rows(full.shape[0], owner, count)
        return tensor[owned.start : owned.stop]

    def _replicate(self, rounds_done: int) -> None:
        """Let another owner hold each owner's rows as they are now, after so many rounds."""
        if self._job.config.pool.store_replicas < 2:
            return
        count = self._owners.count
        rows = [self._owners.begin(owner, "rows") for owner in range(count)]
        held = {}
        for holder in range(count):
            owner = (holder - 1) % count
            held[holder] = self._owners.begin(holder, "hold", owner, rounds_done, rows[owner])
        self._owners.answers(held)
        self._replicas = rounds_done, rows

    def _restore_replicas(self) -> bool:
        """Give all owners the rows of this state, from the object store or a replica; return whether all exist."""
        assert self._replicas is not None
        number, rows = self._replicas
        count = self._owners.count
        for attempt in range(2):
            # The object store of a node outlives the owners on it, but not the node.
            sources = rows
            if attempt:
                sources = [self._owners.begin((owner + 1) % count, "held", owner, number) for owner in range(count)]
            found = self._owners.outcomes(
                {owner: self._owners.begin(owner, "restore", source, True) for owner, source in enumerate(sources)}
            )
            if not any(isinstance(outcome, RayTaskError) for outcome in found):
                self._replicate(number)
                return True
        return False

    def _train(self, round_number: int) -> RoundReport:
        """Train for a round, with new attempts if too many workers are lost; then all owners merge.

        Raises:
            OwnersLostError: An owner is lost. It is unknown which owners have merged.
        """
        config = self._job.config
        failed: list[Lost] = []
        for left in reversed(range(attempts(config))):
            names = self._workers.gather(round_number)
            team = Team(len(names))
            arrivals = Arrivals(team.num_workers, min_returned(config))
            processes = tuple(map(self._workers.process, range(team.num_workers)))
            self._submit(round_number, team, names, processes)
            try:
                order = self._collect(round_number, arrivals)
                break
            except WorkerLostError:
                self._owners.call("alive")  # a worker also fails if an owner is lost whose piece it needs
                if not left:
                    raise
                failed += arrivals.lost
        report: RoundReport = self._owners.call("merge", order, arrivals.lost)[0]
        for name, tensor in self._buffers_of.items():  # the average has the network's buffers after every round
            if self._prefix and name.startswith(self._prefix):
                tensor.copy_(self._buffers_of[name.removeprefix(self._prefix)])
        self._replicate(round_number + 1)  # if an owner is lost here, the round is repeated
        self._rounds_done = round_number + 1
        return replace(report, lost=(*failed, *report.lost))

    def _submit(self, round_number: int, team: Team, names: tuple[str, ...], processes: tuple[str, ...]) -> None:
        """Let every owner cut its pieces, and call the workers with them."""
        count = self._owners.count
        cut = [
            self._owners.begin(owner, "cut", round_number, names, processes, num_returns=1 + team.num_workers)
            for owner in range(count)
        ]
        sizes = self._owners.answers({owner: of_owner[0] for owner, of_owner in enumerate(cut)})
        for worker in range(team.num_workers):
            pieces = [of_owner[1 + worker] for of_owner in cut]
            self._workers.submit(round_number, WorkerSlot(worker, team), pieces, sum(size[worker] for size in sizes))

    def _collect(self, round_number: int, arrivals: Arrivals) -> list[int]:
        """Wait until all owners have the trained pieces; return the workers to merge, in the order of arrival.

        Raises:
            ISTError: Too few workers are left; see `train_round`.
        """
        received: dict[int, dict[int, Any]] = {}
        with closing(self._workers.results()) as results:
            for result in results:
                if isinstance(result, Lost):
                    arrivals.lose(result, arrivals.lost_error(result, round_number))
                    continue
                assert result.header is not None
                what = invalid(self._split, result.header)
                if what is not None:
                    error = diverged(self._job, arrivals.num_workers, result.worker, what, round_number)
                    arrivals.lose(Lost(result.worker, str(error), "rejected"), error)
                    continue
                received[result.worker] = {
                    owner: self._owners.begin(owner, "receive", result.worker, piece)
                    for owner, piece in enumerate(result.pieces)
                }
        order = []
        for worker, calls in received.items():
            outcomes = self._owners.outcomes(calls)
            bad = next((outcome for outcome in outcomes if isinstance(outcome, RayTaskError)), None)
            if bad is None:
                self._meter.received[worker] += sum(outcomes)
                order.append(worker)
                continue
            cause = cause_of(bad)
            if isinstance(cause, PoolError):
                arrivals.lose(Lost(worker, str(cause), "rejected"), cause)
            else:  # a piece is gone with its node
                lost = Lost(worker, f"a piece of its subnet cannot be fetched: {first_line(cause)}")
                arrivals.lose(lost, arrivals.lost_error(lost, round_number))
        return order
