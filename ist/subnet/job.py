"""A run as four values that all its processes have: configuration, task, split network, schedule.

Where it sits: `ist/runs/build.py` builds it once in each process.
Not here: methods, which each of the four has of its own. Code that needs only one or two of the values takes those.
"""

from dataclasses import dataclass, replace

from ist.config.schema import Config
from ist.data.batches import take_shard
from ist.data.loading.stream import StreamSampler
from ist.evaluation.task import Task
from ist.optimization.schedule import Schedule, run_spans
from ist.subnet.assignments import Assignments, Team, WorkerSlot
from ist.subnet.split_model import SplitModel


@dataclass(frozen=True)
class Job:
    """The values of a run; the same in every process.

    Attributes:
        config: The validated configuration.
        task: The network, its data, its loss and its metrics.
        split: The network's neuron groups and tensors.
        schedule: Rounds, stages, and the settings and samples of each step.
    """

    config: Config
    task: Task
    split: SplitModel
    schedule: Schedule


def assignments(job: Job) -> Assignments:
    """Return who holds which neurons in each round of a run."""
    return Assignments(job.split, job.schedule, job.config.partition)


def slot_of(job: Job, worker: int) -> WorkerSlot:
    """Return a worker's slot in a round with the configured number of workers."""
    return WorkerSlot(worker, Team(job.config.train.workers))


def with_workers(job: Job, num_workers: int) -> Job:
    """Return the run for another number of workers, at most the configured one."""
    if num_workers == job.config.train.workers:
        return job
    train = job.config.train.model_copy(update={"workers": num_workers})
    config = job.config.model_copy(update={"train": train})
    sampler = job.schedule.sampler_for(num_workers)
    schedule = replace(job.schedule, sampler=sampler, spans=run_spans(config, sampler))
    return replace(job, config=config, schedule=schedule)


def is_saved_after(job: Job, round_number: int) -> bool:
    """Return whether the run is saved after a round."""
    rounds_done = round_number + 1
    return rounds_done == job.schedule.num_rounds or job.config.checkpoint.is_due(rounds_done)


def for_one_worker(job: Job, worker: int) -> Job:
    """Return the part of a run that a process needs which is one worker to its end, with no other worker's samples.

    The whole data set stays in memory only if something else holds it. It is needed if workers may get other numbers
    during the run, or other samples in every epoch.
    """
    train, task = job.config.train, job.task
    if train.is_elastic or job.config.data.shuffle == "global" or task.own_data is not None or task.loop is not None:
        return job
    sampler = job.schedule.sampler
    if isinstance(sampler, StreamSampler):  # no process holds its items
        return job
    shard = take_shard(task.train_data, sampler.shard(worker))
    return replace(job, task=replace(task, train_data=shard, test_data=None, worker=worker, compared=task.contents))


def for_workers(job: Job) -> Job:
    """Return the part of a run that a worker needs: without initial weights and test data."""
    return replace(job, task=job.task.for_workers())


def remote_workers(config: Config) -> range:
    """Return the workers whose messages cross a link; measured and predicted bytes count these messages.

    If rank 0 is also a worker (`pool.coordinator` is `trains`), its own subnet crosses no link. Workers that share one
    process count as if each had its own. Ray's driver is not a worker. With a sharded store all workers count: each
    exchanges pieces with all other ranks.
    """
    pool = config.pool
    if config.store_is_sharded:
        return range(config.train.workers)
    trains = pool.coordinator == "trains" and pool.spec.coordinator_may_train
    return range(int(trains), config.train.workers)
