"""What the command line does with a configuration before a folder is made or a process started.

Where it sits: between `ist/cli/main.py` and `ist/runs/open.py` or `ist/launch/start.py`.
Not here: reading the file (`ist/config/load.py`), running anything but a rehearsal.
"""

from pathlib import Path

from ist.config.load import validate
from ist.config.schema import Config
from ist.distributed.device import compute_device
from ist.distributed.environment import is_launched
from ist.launch.lab_run import check_hosts
from ist.monitoring.observers import check_observers
from ist.runs.build import build_job
from ist.runs.open import check_method
from ist.runs.rehearsal import rehearse
from ist.subnet.job import Job


def with_launchers_pool(config: Config) -> Config:
    """Under torchrun the processes are there: they are the pool."""
    if not is_launched():
        return config
    pool = {**config.pool.model_dump(), "kind": "torchrun"}
    for key in config.pool.spec.keys if not config.pool.spec.is_launched else ():  # what is for the other pool alone
        del pool[key]
    return validate({**config.model_dump(), "pool": pool}, "under torchrun")


def prepare(config: Config) -> Job:
    """Build the job, and find whatever cannot work before a folder is made or a process started.

    Raises:
        ConfigError: A name, an argument or a combination in it is wrong, or something that it needs is not there.
        DataError: The data set is missing, malformed or too small.
        ModelError: The network cannot be split among that many workers.
    """
    check_method(config)
    check_observers(config)
    check_hosts(config)
    if config.pool.spec.coordinator_may_train:
        compute_device(config.pool)
    job = build_job(config)
    rehearse(job)
    return job


def stored_under(config: Config, parent: Path) -> Config:
    """Keep the checkpoints of several comparisons apart, whose run folders all are named after methods."""
    if config.checkpoint.storage is None:
        return config
    storage = f"{config.checkpoint.storage.rstrip('/')}/{parent.name}"
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"storage": storage})})
