"""Callbacks: objects that receive what happens in a run, and may ask to end it.

Where it sits: users and `ist/callbacks/` subclass `Callback`; the display, TensorBoard and Prometheus do too.
`ist/monitoring/observers.py` creates callbacks and calls them.
Not here: the numbers in a record (`ist/measurements.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Stop:
    """The answer of a callback that asks to end the run after the current round.

    Attributes:
        reason: Why; the run's result and messages show it.

    Example:
        >>> class Budget(ist.Callback):
        ...     def on_round(self, record):
        ...         return ist.Stop("the byte budget is used up") if record["sent_bytes"] > 1e9 else None
        >>> Budget().on_round({"sent_bytes": 2e9}).reason
        'the byte budget is used up'
    """

    reason: str


@dataclass(frozen=True)
class RunStart:
    """What a callback receives about a run when it starts.

    Attributes:
        name: Name of the run folder, or of the configuration if the run has no folder.
        config: The whole configuration as nested mappings, without passwords.
        run_dir: The run folder; None: nothing is written.
        num_rounds: Number of rounds of the whole run.
        first_round: The first round to run, from 0; greater than 0 in a resumed run.
        parameters: Number of parameters (single numbers) of the full network.
        trained_parameters: Number of those that are trained.
        numbers: Names of the numbers that a record may have. Those of the evaluation are missing in rounds without one.
        history: The records of the rounds before `first_round`, if the run folder still has them.
        more_numbers: Whether records may have further numbers, which your own evaluation returns (`run.evaluate`).

    Example:
        >>> run = ist.RunStart("mine-1", {"seed": 0}, None, 20, 0, 354, 354, ("loss", "accuracy"), ())
        >>> run.num_rounds - run.first_round
        20
    """

    name: str
    config: Mapping[str, Any]
    run_dir: Path | None
    num_rounds: int
    first_round: int
    parameters: int
    trained_parameters: int
    numbers: Sequence[str]
    history: Sequence[Record]
    more_numbers: bool = False


class Callback:
    """Base class of callbacks; its methods do nothing, so a subclass has only those that it needs.

    All methods are called in the process that coordinates the run (rank 0 under torchrun), between rounds. A method
    that raises an error ends the run. The constructor checks the arguments; `on_start` opens files and connections,
    because a callback from a configuration is created once more for the checks before the run.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> class Losses(ist.Callback):
        ...     def on_start(self, run):
        ...         self.losses = []
        ...     def on_round(self, record):
        ...         self.losses.append(record["loss"])
        ...         return ist.Stop("three rounds are enough") if len(self.losses) == 3 else None
        >>> data, losses = TensorDataset(torch.ones(8, 2), torch.ones(8, 1)), Losses()
        >>> result = ist.train(
        ...     torch.nn.Linear(2, 1), data, loss="mse_loss", workers=1, rounds=100, progress=False, callbacks=[losses]
        ... )
        >>> len(losses.losses), result.stopped_early
        (3, 'three rounds are enough')
    """

    def on_start(self, run: RunStart) -> None:
        """Receive facts about the run, before its first round."""

    def on_round(self, record: Record) -> Stop | None:
        """Receive the record of a round, which is a line of metrics.jsonl; return `Stop` to end the run after it."""

    def on_evaluate(self, record: Record) -> Stop | None:
        """Receive a record with the numbers of an evaluation, after `on_round`; return `Stop` to end the run."""

    def on_checkpoint(self, rounds_done: int) -> None:
        """Receive the number of rounds that a checkpoint has behind it, after it was saved."""

    def on_end(self, result: Record) -> None:
        """Receive the final numbers, which are those of result.json, after the trained network was saved."""

    def close(self) -> None:
        """Release what `on_start` opened; called last, also if the run fails, but not if `on_start` failed."""
