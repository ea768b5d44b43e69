"""The state that a worker carries from one round to the next, and its checkpoints.

The state is the optimizer, which continues if the worker's neurons are those of the round before, and the residuals of
quantization (the error-feedback buffer), which are added to the next update. No other process needs it: when the run
is saved, each worker writes a file of its own to the checkpoint location (on its own machine, unless the location is
shared storage), and sends nothing.

Where it sits: `ist/training/worker.py` reads the state at the start of a round and stores it at the end.
Law: a worker that restores saved state trains exactly as the worker that saved it would have. If saving or restoring
fails, the worker warns and continues with fresh state: losing this state never ends the run.
Not here: writing files (`ist/storage/checkpoint.py`), quantization (`ist/transport/endpoints.py`).
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
from ist.loops.batch_source import BatchSources
from ist.optimization import optimizers
from ist.redact import redacted
from ist.rng import Indices
from ist.storage.backend import Storage, is_url, run_storage
from ist.storage.checkpoint import load_worker_state, save_worker_state
from ist.subnet.assignments import Assignments, WorkerSlot
from ist.subnet.job import Job

_log = logging.getLogger(__name__)

_RESIDUAL = "taken/"
_LOADERS = "loaders/"
_A_URL = "url"

GIVEN_STATE = "given"
"""Instead of the id of an incarnation: the user's program loads the state of workers itself (`ist.join(state=)`)."""


@dataclass(frozen=True)
class CheckpointLocation:
    """Where and when a run is saved; workers on every machine get it from rank 0.

    Attributes:
        folder: The run folder on rank 0's machine, an absolute path.
        checkpoint: Rank 0's checkpoint settings.
        run_id: The id of this incarnation of the run (one start of its processes).
        first_round: The first round of this incarnation.
        previous_run_id: The id of the incarnation whose checkpoint this one resumes; empty for a new run.
        changed: Keys of the configuration that have changed since that checkpoint.
    """

    folder: str
    checkpoint: Checkpoint
    run_id: str = ""
    first_round: int = 0
    previous_run_id: str = ""
    changed: tuple[str, ...] = ()

    def saved_by(self, round_number: int) -> str:
        """Return the id of the incarnation that saved the run before a round; files with other ids are stale."""
        return self.previous_run_id if round_number == self.first_round else self.run_id

    def storage(self) -> Storage:
        """Return the storage of the run's checkpoints, on any machine.

        Raises:
            ConfigError: It cannot be opened.
        """
        return run_storage(self.checkpoint.storage, Path(self.folder))

    def to_text(self) -> str:
        """Return the location as text that may be sent unencrypted: without the storage URL and its password."""
        checkpoint = self.checkpoint
        if checkpoint.storage and is_url(checkpoint.storage):
            checkpoint = checkpoint.model_copy(update={"storage": _A_URL})
        return json.dumps({**asdict(self), "checkpoint": checkpoint.model_dump()})

    @classmethod
    def from_text(cls, text: str, own: Checkpoint) -> "CheckpointLocation":
        """Undo `to_text`, with the storage URL from this rank's own settings."""
        received = json.loads(text)
        checkpoint = Checkpoint(**received["checkpoint"])
        if checkpoint.storage == _A_URL:
            checkpoint = checkpoint.model_copy(update={"storage": own.storage})
        return cls(**{**received, "checkpoint": checkpoint, "changed": tuple(received["changed"])})


@dataclass(frozen=True)
class _LastRound:
    """The last round's optimizer, the parameters that it trained, and their neurons."""

    optimizer: torch.optim.Optimizer
    named: Mapping[str, nn.Parameter]
    neurons: Sequence[Indices]


class WorkerState:
    """The state of one worker between rounds.

    Args:
        job: The run.
        slot: The worker's number and its team.
        held: The neurons of each worker in each round.
        location: Where to save the state; None: nowhere.
        sources: The positions in the loaders of the user's own loop; None: there are none.

    Attributes:
        is_restored: Whether `restore` has found a saved state.
    """

    def __init__(
        self,
        job: Job,
        slot: WorkerSlot,
        held: Assignments,
        location: CheckpointLocation | None,
        sources: BatchSources | None = None,
    ) -> None:
        self._job = job
        self._slot = slot
        self._assignments = held
        self._worker = slot.worker
        self._file = slot.worker * slot.ranks + slot.rank  # each rank of a worker has a file of its own
        self._location = location
        self._sources = sources or BatchSources()
        self._last: _LastRound | None = None
        self._restored: dict[str, Tensor] | None = None
        self.is_restored = False
        self._warned_of_failure = False

    def restore(self, round_number: int) -> dict[str, Tensor]:
        """Load the state that was saved before this round; to be called once, in the worker's first round.

        Returns:
            The residuals by name; empty without error feedback, or if no state was found.
        """
        if self._location is None or round_number == 0 or not self._is_saved_after(round_number - 1):
            return {}
        if round_number == self._location.first_round and self._location.previous_run_id == GIVEN_STATE:
            return {}
        checkpoint = self._location.checkpoint
        of = self._fingerprint(self._held(round_number - 1), self._location.saved_by(round_number))
        is_resumed = round_number == self._location.first_round
        why, damaged = "no file with matching neurons, number of workers and run id", False
        found = None
        try:
            found = load_worker_state(self._storage, self._file, round_number, of)
        except (ConfigError, RunFolderError) as error:
            why = str(error)
            damaged = isinstance(error, CheckpointError)
        if found is None:
            if damaged or checkpoint.is_due(round_number) or is_resumed:
                _log.warning(
                    "worker %d: no saved state from before round %d in %s (%s); starting with fresh state",
                    self._worker, round_number + 1, redacted(checkpoint.storage or self._location.folder), why,
                )  # fmt: skip
            return {}
        self.is_restored = True
        state, residuals = split_state(found, self._sources)
        if self._optimizer_is_used_after(round_number - 1):
            changed = self._location.changed if is_resumed else ()
            self._restored = optimizers.without_changed_settings(state, changed, self._job.config.train.optimizer)
        return residuals

    def forget(self) -> None:
        """Start with fresh state after all, because another rank of the worker has no saved state."""
        if self.is_restored:
            _log.warning("worker %d: a rank of it has no saved state; its other ranks start fresh too", self._worker)
        self.is_restored, self._restored = False, None
        self._sources.restore({})

    def optimizer(self, named: Mapping[str, nn.Parameter], round_number: int) -> torch.optim.Optimizer:
        """Return the optimizer of a round: the last round's if its state and neurons are the same, or a new one."""
        last, self._last = self._last, None  # a failed round must not leave its optimizer to the next
        state, self._restored = self._restored, None
        if last is not None and _same(last.neurons, self._held(round_number)):
            if all(last.named.get(name) is parameter for name, parameter in named.items()):
                return last.optimizer
            # The same neurons in another module, because the rest of the network is there or not.
            state = optimizers.named_state(last.optimizer, last.named)
        made = self._job.task.make_optimizer(named)
        if state is not None:
            optimizers.restore_named_state(made, named, state)
        return made

    def is_used_after(self, round_number: int) -> bool:
        """Return whether a later round uses this worker's state of a round."""
        return self._job.config.exchange.error_feedback or self._optimizer_is_used_after(round_number)

    def _is_saved_after(self, round_number: int) -> bool:
        """Return whether this worker has anything to save after a round."""
        return self.is_used_after(round_number) or self._job.task.loop is not None

    def store(
        self,
        optimizer: torch.optim.Optimizer,
        named: Mapping[str, nn.Parameter],
        residuals: Mapping[str, Tensor],
        round_number: int,
    ) -> None:
        """Store the state of a finished round for the next one, and save it if the run is saved after this round."""
        job, held, rounds_done = self._job, self._held(round_number), round_number + 1
        is_used = self._optimizer_is_used_after(round_number)
        if is_used:  # otherwise its state would waste memory until the next round
            self._last = _LastRound(optimizer, named, held)
        if self._location is None or not self._is_saved_after(round_number):
            return
        checkpoint = self._location.checkpoint
        if rounds_done == job.schedule.num_rounds or not checkpoint.is_due(rounds_done):
            return
        try:
            tensors = named_tensors_of(optimizer if is_used else None, named, residuals, self._sources)
            of = self._fingerprint(held, self._location.run_id)
            save_worker_state(self._storage, self._file, rounds_done, tensors, of, checkpoint.keep)
        except (ConfigError, RunFolderError) as error:
            if not self._warned_of_failure:
                _log.warning(
                    "worker %d cannot save its state: %s. If the run is resumed, it starts with fresh state",
                    self._worker, error,
                )  # fmt: skip
            self._warned_of_failure = True

    @cached_property
    def _storage(self) -> Storage:
        assert self._location is not None
        return self._location.storage()

    def _held(self, round_number: int) -> Sequence[Indices]:
        return self._assignments.of(round_number, self._slot.team)[self._worker]

    def _optimizer_is_used_after(self, round_number: int) -> bool:
        """Return whether the next round continues with the optimizer of this round."""
        job = self._job
        if job.config.train.optimizer_state != "kept" or round_number + 1 >= job.schedule.num_rounds:
            return False
        return _same(self._held(round_number), self._held(round_number + 1))

    def _fingerprint(self, neurons: Sequence[Indices], run_id: str) -> str:
        """Return a key of the worker's neurons, the number of workers and their shares, which decide its data too."""
        capacities = self._slot.team.capacities
        code = zlib.crc32(repr(list(capacities) if capacities else self._job.config.partition.capacities).encode())
        for held in neurons:
            code = zlib.crc32(held.tobytes(), zlib.crc32(str(len(held)).encode(), code))
        ranks = "" if self._slot.ranks == 1 else f" in {self._slot.ranks} by {self._job.config.pool.inside}"
        return f"{code:08x} of {self._slot.team.num_workers}{ranks} by {run_id}"


def named_tensors_of(
    optimizer: torch.optim.Optimizer | None,
    named: Mapping[str, nn.Parameter],
    residuals: Mapping[str, Tensor],
    sources: BatchSources,
) -> dict[str, Tensor]:
    """Return a worker's state as tensors by name.

    Args:
        optimizer: The optimizer; None: its state is not needed.
        named: Its parameters, by their names in the full network.
        residuals: The error-feedback buffer, by name.
        sources: The positions in the loaders of the user's own loop.

    Raises:
        CheckpointError: A loader's state holds something that cannot be saved.
    """
    return {
        **(optimizers.named_state(optimizer, named) if optimizer is not None else {}),
        **{_RESIDUAL + name: tensor for name, tensor in residuals.items()},
        **{_LOADERS + name: tensor for name, tensor in sources.state().items()},
    }


def split_state(tensors: Mapping[str, Tensor], sources: BatchSources) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo `named_tensors_of`: return the optimizer's state and the residuals, and restore the positions in loaders."""
    sources.restore(_part(tensors, _LOADERS))
    optimizer = {name: tensor for name, tensor in tensors.items() if not name.startswith((_RESIDUAL, _LOADERS))}
    return optimizer, _part(tensors, _RESIDUAL)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _same(neurons: Sequence[Indices], others: Sequence[Indices]) -> bool:
    return all(map(np.array_equal, neurons, others))
