"""What a worker keeps for itself from one round to the next, and how that outlives its process.

An optimiser goes on where the worker's neurons are those of the round before; what rounding took from its changes is
added to the next ones. Neither is anybody else's: when the run is saved, the worker writes a file of its own where the
checkpoint will be (on its own machine, unless that is a place that all see), and sends nobody a byte of it.

Where it sits: `ist/training/worker.py` asks for it when a round begins and hands it over when the round is done.
Law: a worker that is made anew from what was saved trains on as the one before it would have. One that cannot save, or
finds nothing, says so and trains on without: what it keeps is worth something, and never the run.
Not here: writing files (`ist/storage/checkpoint.py`), rounding (`ist/transport/endpoints.py`).
"""

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ist.config.runtime import Checkpoint
from ist.errors import CheckpointError, ConfigError, RunFolderError
from ist.optimization import optimizers
from ist.redact import redacted
from ist.rng import Indices
from ist.storage.backend import Storage, is_url, run_storage
from ist.storage.checkpoint import load_worker_state, save_worker_state
from ist.subnet.assignments import Assignments, WorkerSlot
from ist.subnet.job import Job

_log = logging.getLogger(__name__)

_RESIDUAL = "taken/"
_A_URL = "url"


@dataclass(frozen=True)
class CheckpointLocation:
    """Where and when a run is saved, as workers on any machine need to know it.

    Attributes:
        folder: The run folder on rank 0's machine, an absolute path.
        checkpoint: Rank 0's settings.
        start: A name for this start of the run's processes.
        first_round: The round that they begin with.
        before: The start whose checkpoint they go on from; empty at the beginning of a run.
    """

    folder: str
    checkpoint: Checkpoint
    run_id: str = ""
    first_round: int = 0
    previous_run_id: str = ""

    def saved_by(self, round_number: int) -> str:
        """Return the start in which the run was saved before a round: what others left there is of another course."""
        return self.previous_run_id if round_number == self.first_round else self.run_id

    def to_text(self) -> str:
        """Return what may be sent in clear: not a URL, which may hold a password."""
        checkpoint = self.checkpoint
        if checkpoint.storage and is_url(checkpoint.storage):
            checkpoint = checkpoint.model_copy(update={"storage": _A_URL})
        return json.dumps({**asdict(self), "checkpoint": checkpoint.model_dump()})

    @classmethod
    def from_text(cls, text: str, own: Checkpoint) -> "CheckpointLocation":
        """Undo `to_text` on a rank whose own settings have the URL."""
        told = json.loads(text)
        checkpoint = Checkpoint(**told["checkpoint"])
        if checkpoint.storage == _A_URL:
            checkpoint = checkpoint.model_copy(update={"storage": own.storage})
        return cls(**{**told, "checkpoint": checkpoint})


@dataclass(frozen=True)
class _LastRound:
    """The last round's optimiser, and the neurons whose it is."""

    optimizer: torch.optim.Optimizer
    neurons: Sequence[Indices]


class WorkerState:
    """Keeps for one worker.

    Args:
        job: The run.
        slot: Which worker, of which team.
        held: Who holds which neurons.
        location: Where to save; None: nowhere.
    """

    def __init__(self, job: Job, slot: WorkerSlot, held: Assignments, location: CheckpointLocation | None) -> None:
        self._job = job
        self._slot = slot
        self._assignments = held
        self._worker = slot.worker
        self._location = location
        self._last: _LastRound | None = None
        self._restored: dict[str, Tensor] | None = None
        self._warned_of_failure = False

    def restore(self, round_number: int) -> dict[str, Tensor]:
        """Look for what the worker kept when the run was saved before this round: to be called once, at its first.

        Returns:
            What rounding took, by name; empty where nothing is fed back, or found.
        """
        if self._location is None or round_number == 0 or not self.is_used_after(round_number - 1):
            return {}
        checkpoint = self._location.checkpoint
        of = self._fingerprint(self._held(round_number - 1), self._location.saved_by(round_number))
        why, damaged = "nothing that fits is there", False
        found = None
        try:
            found = load_worker_state(self._storage, self._worker, round_number, of)
        except (ConfigError, RunFolderError) as error:
            why = str(error)
            damaged = isinstance(error, CheckpointError)
        if found is None:
            if damaged or checkpoint.is_due(round_number):
                _log.warning(
                    "worker %d goes on without what it kept before round %d, which should be in %s: %s",
                    self._worker, round_number + 1, redacted(checkpoint.storage or self._location.folder), why,
                )  # fmt: skip
            return {}
        if self._optimizer_is_used_after(round_number - 1):
            self._restored = {name: tensor for name, tensor in found.items() if not name.startswith(_RESIDUAL)}
        return {name.removeprefix(_RESIDUAL): tensor for name, tensor in found.items() if name.startswith(_RESIDUAL)}

    def optimizer(self, named: Mapping[str, nn.Parameter], round_number: int) -> torch.optim.Optimizer:
        """Return a round's optimiser: a new one, or the last round's where its state is kept and still fits."""
        (last, self._last), (state, self._restored) = (
            (self._last, None),
            (self._restored, None),
        )  # not after a failed round
        if last is not None and _same(last.neurons, self._held(round_number)):
            return last.optimizer  # the network is the same too
        made = optimizers.build_optimizer(self._job.config.train.optimizer, list(named.values()))
        if state is not None:
            optimizers.restore_named_state(made, named, state)
        return made

    def is_used_after(self, round_number: int) -> bool:
        """Return whether anything of a round is of use to this worker afterwards."""
        return self._job.config.exchange.error_feedback or self._optimizer_is_used_after(round_number)

    def store(
        self,
        optimizer: torch.optim.Optimizer,
        named: Mapping[str, nn.Parameter],
        residuals: Mapping[str, Tensor],
        round_number: int,
    ) -> None:
        """Keep what is to be kept of a round that is done, and save it where the run will be."""
        job, held, rounds_done = self._job, self._held(round_number), round_number + 1
        is_used = self._optimizer_is_used_after(round_number)
        if is_used:  # else its state would be held in vain while the subnet travels
            self._last = _LastRound(optimizer, held)
        if self._location is None or not self.is_used_after(round_number):
            return
        checkpoint = self._location.checkpoint
        if rounds_done == job.schedule.num_rounds or not checkpoint.is_due(rounds_done):
            return
        state = optimizers.named_state(optimizer, named) if is_used else {}
        tensors = {**state, **{_RESIDUAL + name: tensor for name, tensor in residuals.items()}}
        try:
            of = self._fingerprint(held, self._location.run_id)
            save_worker_state(self._storage, self._worker, rounds_done, tensors, of, checkpoint.keep)
        except (ConfigError, RunFolderError) as error:
            if not self._warned_of_failure:
                _log.warning("worker %d cannot save what it keeps, and would go on without: %s", self._worker, error)
            self._warned_of_failure = True

    @cached_property
    def _storage(self) -> Storage:
        assert self._location is not None
        return run_storage(self._location.checkpoint.storage, Path(self._location.folder))

    def _held(self, round_number: int) -> Sequence[Indices]:
        return self._assignments.of(round_number, self._slot.team)[self._worker]

    def _optimizer_is_used_after(self, round_number: int) -> bool:
        """Whether the optimiser will be of use in the round after this one."""
        job = self._job
        if job.config.train.optimizer_state != "kept" or round_number + 1 >= job.schedule.num_rounds:
            return False
        return _same(self._held(round_number), self._held(round_number + 1))

    def _fingerprint(self, neurons: Sequence[Indices], run_id: str) -> str:
        """Name what a worker holds, of how much: another number of workers, or other shares, deal other data too."""
        capacities = self._slot.team.capacities
        code = zlib.crc32(repr(list(capacities) if capacities else self._job.config.partition.capacities).encode())
        for held in neurons:
            code = zlib.crc32(held.tobytes(), zlib.crc32(str(len(held)).encode(), code))
        return f"{code:08x} of {self._slot.team.num_workers} by {run_id}"


def _same(neurons: Sequence[Indices], others: Sequence[Indices]) -> bool:
    return all(map(np.array_equal, neurons, others))
