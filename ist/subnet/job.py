"""A run in four values that all its processes know: configuration, task, split network, schedule.

Where it sits: `ist/runs/build.py` builds it once in each process. It has no methods: each of the four answers for
itself, and what needs one of them should ask for that one.
"""

from dataclasses import dataclass, replace

from ist.config.schema import Config
from ist.evaluation.task import Task
from ist.optimization.schedule import Schedule
from ist.subnet.assignments import Assignments, Team, WorkerSlot
from ist.subnet.split_model import SplitModel


@dataclass(frozen=True)
class Job:
    """The same in every process.

    Attributes:
        config: Every key of the validated configuration.
        task: What is trained, on what, and how it is measured.
        split: The network's neuron groups and tensors.
        schedule: Rounds, stages, the settings and samples of each step.
    """

    config: Config
    task: Task
    split: SplitModel
    schedule: Schedule


def assignments(job: Job) -> Assignments:
    """Return who holds which neurons in each round of a run."""
    return Assignments(job.split, job.schedule, job.config.partition)


def slot_of(job: Job, worker: int) -> WorkerSlot:
    """Return the slot of a worker in a round with as many workers as are configured."""
    return WorkerSlot(worker, Team(job.config.train.workers))


def with_workers(job: Job, num_workers: int) -> Job:
    """Return the run for another number of workers, at most as many as are configured."""
    if num_workers == job.config.train.workers:
        return job
    config = job.config
    train = config.train.model_copy(update={"workers": num_workers})
    schedule = replace(job.schedule, sampler=job.schedule.sampler_for(num_workers))
    return replace(job, config=config.model_copy(update={"train": train}), schedule=schedule)


def for_workers(job: Job) -> Job:
    """Return what a worker needs of a run: neither the initial weights nor the test data."""
    return replace(job, task=job.task.for_workers())


def remote_workers(config: Config) -> range:
    """Return the workers whose messages cross a link, whose bytes are what IST sends, measured and foretold.

    Where rank 0 is a worker too (`pool.coordinator` trains), its own subnet crosses none. Workers that are all in one
    process count as they would in processes of their own. Ray's driver is no worker.
    """
    pool = config.pool
    trains = pool.coordinator == "trains" and pool.spec.coordinator_may_train
    return range(int(trains), config.train.workers)
