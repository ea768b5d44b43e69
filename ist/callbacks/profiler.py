"""A trace of chosen rounds by torch.profiler, for TensorBoard's profiler page, Perfetto or chrome://tracing.

Where it sits: a callback; `profiler` in `watch.callbacks`.
Not here: other processes. Under torchrun the trace is of rank 0, on Ray of the driver.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ist.errors import ConfigError, RunFolderError
from ist.monitoring.callback import Callback, Record, RunStart


class Profiler(Callback):
    """Writes a trace of each chosen round to profile/round-N.pt.trace.json in the run folder.

    The trace covers this process: with `pool.kind: inline` all workers, under torchrun rank 0. It begins when the round
    before has been recorded, so it includes that round's checkpoint, and ends with this round's evaluation.

    Args:
        rounds: The rounds, from 0. The first round of a run is slower than others.
        shapes: Whether to record the shapes of operators' inputs.
        memory: Whether to record allocations.
        stack: Whether to record the source lines of operators.
        folder: Where to write; None: profile/ in the run folder.

    Raises:
        ConfigError: A round is not a whole number, or (at the start) there is no folder or no such round.
        RunFolderError: A trace cannot be written.
    """

    def __init__(
        self,
        rounds: Sequence[int] = (1,),
        shapes: bool = False,
        memory: bool = False,
        stack: bool = False,
        folder: str | Path | None = None,
    ) -> None:
        if not rounds or any(type(number) is not int or number < 0 for number in rounds):
            raise ConfigError(f"Profiler: rounds is {rounds!r}: give a list of round numbers, from 0")
        self._rounds = frozenset(rounds)
        self._shapes, self._memory, self._stack = shapes, memory, stack
        self._given = folder
        self._profile: profile | None = None

    def on_start(self, run: RunStart) -> None:
        """Begin the trace if the first round is chosen."""
        if max(self._rounds) >= run.num_rounds:
            raise ConfigError(
                f"Profiler: rounds has {max(self._rounds)}, but the run's last round is {run.num_rounds - 1} (rounds "
                "count from 0)"
            )
        if self._given is None and run.run_dir is None:
            raise ConfigError("Profiler: the run has no folder to write to: give run_dir, or the Profiler's folder")
        self._folder = Path(self._given) if self._given is not None else Path(run.run_dir or ".") / "profile"
        self._begin(run.first_round)

    def on_round(self, record: Record) -> None:
        """Write the trace of this round, and begin that of the next one."""
        self._end(record["round"])
        self._begin(record["round"] + 1)

    def close(self) -> None:
        """Discard the trace of a round that has not ended."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _begin(self, round_number: int) -> None:
        if round_number not in self._rounds:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(
            activities=activities, record_shapes=self._shapes, profile_memory=self._memory, with_stack=self._stack
        )
        self._profile.start()

    def _end(self, round_number: int) -> None:
        if self._profile is None:
            return
        ended, self._profile = self._profile, None
        ended.stop()
        path = self._folder / f"round-{round_number}.pt.trace.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass  # torch reports a failure to write by a line on stderr only
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
        ended.export_chrome_trace(str(path))
