"""Execute a run: open this process's part, take part in every remaining round, write the result.

Where it sits: the command line, `ist.train`, benchmarks and tests call `execute` with a job.
Not here: building this process's part (`ist/runs/open.py`), the round loop (`ist/training/rounds.py`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ist.errors import ConfigError
from ist.loops.part import completed
from ist.monitoring.callback import Callback
from ist.monitoring.display import Progress
from ist.runs.open import CoordinatorPart, FollowerPart, open_run
from ist.storage.run_folder import RunFolder
from ist.subnet.job import Job
from ist.training.rounds import follow_rounds, run_rounds


def execute(
    job: Job,
    folder: RunFolder | None = None,
    resume: bool = False,
    progress: Progress = True,
    opened: Callable[[CoordinatorPart], object] | None = None,
    callbacks: Sequence[Callback] = (),
) -> CoordinatorPart | FollowerPart:
    """Run a job to its end in this process: coordinate the rounds, or take part in them as another rank.

    Args:
        job: The run.
        folder: The run folder, in which rank 0 writes; None writes nothing.
        resume: Whether to resume from the newest checkpoint in `folder`.
        progress: How to show progress.
        opened: Called on the coordinator, after the run is opened and before its first round.
        callbacks: Callbacks besides the configured ones; used only on the coordinator.

    Returns:
        This process's part of the run, which is closed. On the coordinator, the trained network is `method.model`, and
        the records of the rounds are `recorder.history`.

    Raises:
        ISTError: See `ist.runs.open.open_run` and `ist.training.rounds.run_rounds`.
    """
    with open_run(job, folder, resume, progress, callbacks) as part:
        if isinstance(part, FollowerPart):
            completed(follow_rounds(part.job, part.follower, part.first_round, part.ends_early))
            return part
        if opened is not None:
            opened(part)
        completed(run_rounds(part.job, part.method, part.recorder, part.first_round, part.device))
        part.recorder.finish(part.method.model)
    return part


_running: dict[int, object] = {}
"""By process id, a token of the running call. The id matters after a fork: a child inherits its parent's entry, which
must not block the child."""


@contextmanager
def sole_run() -> Iterator[None]:
    """Refuse a second run in this process while one is running.

    Both would use the process's random generators and number of threads, so both would give other results than alone.

    Raises:
        ConfigError: Another call is running, in another thread or as the caller of this one.
    """
    me = object()
    if _running.setdefault(os.getpid(), me) is not me:
        raise ConfigError(
            "another ist.train, ist.split or ist.join is running in this process (in another thread, or as the caller "
            "of this one), and all would use the process's random generators and number of threads: run them one "
            "after the other, or each in a process of its own"
        )
    try:
        yield
    finally:
        del _running[os.getpid()]
