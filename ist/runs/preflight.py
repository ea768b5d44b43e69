"""Prepare a configuration for the command line: check everything before a folder is created or a process started.

Where it sits: `ist/cli/` calls this before `ist/runs/execute.py` or `ist/launch/start.py`.
Not here: reading the file (`ist/config/load.py`), the checks of one training step (`ist/runs/rehearsal.py`).
"""

from pathlib import Path

from ist.config.load import validate
from ist.config.schema import Config
from ist.distributed.device import compute_device
from ist.distributed.environment import is_launched
from ist.launch.lab_run import check_hosts
from ist.monitoring.observers import check_callbacks
from ist.runs.build import build_job
from ist.runs.open import check_method
from ist.runs.rehearsal import rehearse
from ist.subnet.job import Job


def with_pool_of_launcher(config: Config) -> Config:
    """Return the configuration with the pool 'torchrun' if torchrun, or another launcher, started this process."""
    if not is_launched():
        return config
    pool = {**config.pool.model_dump(), "kind": "torchrun"}
    for key in config.pool.spec.keys if not config.pool.spec.is_launched else ():  # keys of the other pool only
        del pool[key]
    return validate({**config.model_dump(), "pool": pool}, "under torchrun")


def checked_job(config: Config) -> Job:
    """Build the job, and run all checks that need no folder and no other process.

    Raises:
        ConfigError: A name, an argument or a combination is wrong, or a requirement is missing on this machine.
        DataError: The data set is missing, malformed or too small.
        ModelError: The network cannot be split among that many workers.
    """
    check_method(config)
    check_callbacks(config)
    check_hosts(config)
    if config.pool.spec.coordinator_may_train:
        compute_device(config.pool)
    job = build_job(config)
    rehearse(job)
    return job


def with_storage_for(config: Config, parent: Path) -> Config:
    """Return the configuration with `checkpoint.storage` in a folder of its own for each comparison.

    Run folders are named after methods, so the checkpoints of two comparisons would otherwise overwrite each other.
    """
    if config.checkpoint.storage is None:
        return config
    storage = f"{config.checkpoint.storage.rstrip('/')}/{parent.name}"
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"storage": storage})})
