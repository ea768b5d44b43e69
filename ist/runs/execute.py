"""Execute a run: open this process's part, take part in every round that is left, write the result.

Where it sits: the command line, `ist.train`, benchmarks and tests come here with a job; `ist/runs/open.py` builds the
part, `ist/training/rounds.py` has the loop.
"""

from collections.abc import Callable

from ist.runs.open import CoordinatorPart, FollowerPart, open_run
from ist.storage.run_folder import RunFolder
from ist.subnet.job import Job
from ist.training.rounds import follow_rounds, run_rounds


def execute(
    job: Job,
    folder: RunFolder | None = None,
    resume: bool = False,
    progress: bool = True,
    opened: Callable[[CoordinatorPart], object] | None = None,
) -> CoordinatorPart | FollowerPart:
    """Run a job to its end in this process: lead the rounds, or take part in them as another rank.

    Args:
        job: The run.
        folder: Where rank 0 writes; None writes nothing.
        resume: Go on from the newest checkpoint in `folder`.
        progress: Whether to show progress.
        opened: Called where the run is led, after it is opened and before its first round.

    Returns:
        This process's part of the run, which is closed: where it is led, the trained network is `method.model` and the
        records of its rounds are `recorder.history`.

    Raises:
        ISTError: See `ist.runs.open.open_run` and `ist.training.rounds.run_rounds`.
    """
    with open_run(job, folder, resume, progress) as part:
        if isinstance(part, FollowerPart):
            follow_rounds(part.job, part.follower, part.first_round)
            return part
        if opened is not None:
            opened(part)
        run_rounds(part.job, part.method, part.recorder, part.first_round, part.device)
        part.recorder.finish(part.method.model)
    return part
