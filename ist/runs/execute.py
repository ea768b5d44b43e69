"""Execute a run: open this process's part, take part in every remaining round, write the result.

Where it sits: the command line, `ist.train`, benchmarks and tests call `execute` with a job.
Not here: building this process's part (`ist/runs/open.py`), the round loop (`ist/training/rounds.py`).
"""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ist.distributed.process_group import leave
from ist.errors import ConfigError
from ist.initialization.on_meta import is_on_meta
from ist.loops.part import Part, completed
from ist.monitoring.callback import Callback
from ist.monitoring.display import Progress
from ist.runs.open import CoordinatorPart, FollowerPart, open_run
from ist.storage.checkpoint import Progress as SavedProgress
from ist.storage.run_folder import RunFolder
from ist.subnet.job import Job
from ist.training.rounds import follow_rounds, run_rounds


def run_parts(
    job: Job,
    folder: RunFolder | None = None,
    resume: bool = False,
    progress: Progress = True,
    opened: Callable[[CoordinatorPart | FollowerPart], object] | None = None,
    callbacks: Sequence[Callback] = (),
    saved: tuple[Mapping[str, Tensor], SavedProgress] | None = None,
) -> Generator[Part, None, CoordinatorPart | FollowerPart]:
    """Run a job to its end in this process, as `execute` does; yield each part whose steps the caller makes.

    Args:
        job: The run.
        folder: The run folder, in which rank 0 writes; None writes nothing.
        resume: Whether to resume from the newest checkpoint in `folder`.
        progress: How to show progress.
        opened: Called in every process, after the run is opened and before its first round.
        callbacks: Callbacks besides the configured ones; used only on the coordinator.
        saved: What to resume from, instead of a checkpoint in `folder`; see `ist.runs.open.open_run`.
    """
    with open_run(job, folder, resume, progress, callbacks, saved) as run:
        if opened is not None:
            opened(run)
        if isinstance(run, FollowerPart):
            yield from follow_rounds(run.job, run.follower, run.first_round, run.ends_early)
            return run
        yield from run_rounds(run.job, run.method, run.recorder, run.first_round, run.device)
        run.recorder.finish(run.method.model)
    return run


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

    has_begun = False

    def on_coordinator(run: CoordinatorPart | FollowerPart) -> None:
        nonlocal has_begun
        has_begun = True
        if opened is not None and isinstance(run, CoordinatorPart):
            opened(run)

    try:
        return completed(run_parts(job, folder, resume, progress, on_coordinator, callbacks))
    except BaseException:
        if has_begun:  # what is wrong before that, all ranks find together
            leave()  # this process may go on after the error, but the others must not wait for it
        raise


def give_back(run: CoordinatorPart, model: nn.Module, device: torch.device) -> None:
    """Leave the trained values in the user's network, on its own device.

    Args:
        run: The coordinator's part of a run that has ended.
        model: The user's network.
        device: The device on which it was before the run.
    """
    if is_on_meta(model):
        return  # the store is sharded: the trained network is in the run folder
    if run.method.model is not model:  # an average of it
        model.load_state_dict(run.method.model.state_dict())
    model.to(device)


def device_of(model: nn.Module) -> torch.device:
    """Return the device to which a network returns after a run: a network on `meta` gets its values on the CPU."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


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
