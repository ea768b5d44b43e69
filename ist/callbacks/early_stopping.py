"""Early stopping: end a run when a number of its records no longer improves.

Where it sits: a callback; `early_stopping` in `watch.callbacks`.
Not here: ending the run (`ist/training/rounds.py`).
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from ist.errors import ConfigError
from ist.monitoring.callback import Callback, Record, RunStart, Stop

Mode = Literal["min", "max"]


class EarlyStopping(Callback):
    """Ends the run when a number has not improved for some observations.

    A round counts if its record has the number: with `evaluate.every: 5`, only every fifth round has a test loss. A
    resumed run counts its earlier rounds, so it ends where an uninterrupted run would.

    Args:
        metric: The number, by its name in metrics.jsonl, such as 'test_loss', 'accuracy' or 'loss'.
        patience: Number of observations without improvement after which the run ends; > 0.
        mode: Whether smaller ('min') or larger ('max') values are better.
        min_delta: The least change that counts as an improvement; >= 0.

    Raises:
        ConfigError: An argument is not valid, or (at the start) the run does not have the number.

    Example:
        >>> stopping = EarlyStopping("accuracy", patience=2, mode="max")
        >>> stopping.on_start(ist.RunStart("mine", {}, None, 9, 0, 10, 10, ("loss", "accuracy"), ()))
        >>> [bool(stopping.on_round({"round": n, "accuracy": value})) for n, value in enumerate([0.5, 0.7, 0.6, 0.7])]
        [False, False, False, True]
    """

    def __init__(
        self, metric: str = "test_loss", patience: int = 3, mode: Mode = "min", min_delta: float = 0.0
    ) -> None:
        if type(patience) is not int or patience < 1:
            raise ConfigError(f"EarlyStopping: patience is {patience!r}: give a whole number above 0")
        if mode not in get_args(Mode):
            raise ConfigError(f"EarlyStopping: mode is {mode!r}: give 'min' or 'max'")
        if not isinstance(min_delta, int | float) or not 0 <= min_delta < math.inf:
            raise ConfigError(f"EarlyStopping: min_delta is {min_delta!r}: give a number of at least 0")
        self._metric, self._patience, self._mode, self._min_delta = metric, patience, mode, min_delta

    def on_start(self, run: RunStart) -> None:
        """Count the earlier rounds of a resumed run."""
        if self._metric not in run.numbers and not run.more_numbers:
            without = "" if "test_loss" in run.numbers else "; without test data there is no evaluation"
            raise self._unknown(run.numbers, without)
        self._best, self._best_round, self._without = math.nan, -1, 0
        for record in run.history:
            self.on_round(record)

    def _unknown(self, numbers: Sequence[str], without: str = "") -> ConfigError:
        near = difflib.get_close_matches(self._metric, numbers, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return ConfigError(
            f"EarlyStopping: metric is '{self._metric}', which the records of this run do not have: {hint}They have "
            f"{', '.join(numbers)}{without}"
        )

    def on_evaluate(self, record: Record) -> None:
        """Check that the user's own evaluation returns the number.

        Raises:
            ConfigError: It does not.
        """
        if record.get(self._metric) is None:
            raise self._unknown([name for name, value in record.items() if type(value) in (int, float)])

    def on_round(self, record: Record) -> Stop | None:
        """Compare a round with the best one so far."""
        value: Any = record.get(self._metric)
        if value is None:
            return None
        better = self._best - value if self._mode == "min" else value - self._best
        if math.isfinite(value) and (math.isnan(self._best) or better > self._min_delta):
            self._best, self._best_round, self._without = value, record["round"], 0
            return None
        self._without += 1
        if self._without < self._patience:
            return None
        return Stop(
            f"{self._metric} has not improved in {self._without} observations; best: {self._best:.6g} in round "
            f"{self._best_round}"
        )
