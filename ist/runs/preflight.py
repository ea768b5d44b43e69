"""Prepare a run: check everything before a folder is created or changed, and before a process is started.

Where it sits: `ist/cli/` calls this before `ist/runs/execute.py` or `ist/launch/start.py`; `ist/api.py` calls
`resumed_folder`.
Not here: reading the file (`ist/config/load.py`), the checks of one training step (`ist/runs/rehearsal.py`).
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ist.config.load import validate
from ist.config.schema import Config, num_processes
from ist.distributed.device import compute_device
from ist.distributed.environment import is_launched, is_rank_zero, ranks_of_node
from ist.distributed.memory_limit import note_held
from ist.errors import ConfigError, RunFolderError
from ist.initialization.on_meta import is_on_meta
from ist.launch.lab_run import check_hosts
from ist.monitoring.observers import check_callbacks
from ist.optimization.factory import dims_of, is_users_function
from ist.optimization.optimizers import state_keys
from ist.optimization.schedule import run_spans
from ist.runs.build import build_job
from ist.runs.open import check_method
from ist.runs.rehearsal import rehearse
from ist.storage.reopen import Reopened, reopen, save_config
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import Job


def with_pool_of_launcher(config: Config) -> Config:
    """Return the configuration with the pool 'torchrun' if torchrun, or another launcher, started this process."""
    if not is_launched():
        return config
    pool = {**config.pool.model_dump(), "kind": "torchrun"}
    for key in config.pool.spec.keys if not config.pool.spec.is_launched else ():  # keys of the other pool only
        pool.pop(key, None)
    if pool.get("ranks_per_worker") == "node":
        pool["ranks_per_worker"] = ranks_of_node()
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
    if config.pool.spec.is_launched:
        num_processes(config)  # known
    if config.pool.spec.coordinator_may_train:
        compute_device(config.pool)
    job = build_job(config)
    note_held()
    rehearse(job)
    return job


def check_result(config: Config, network: nn.Module, run_dir: str | Path | None) -> None:
    """Check that a network that is passed from Python can receive the result of its run, or a folder can.

    Raises:
        ConfigError: No process holds the network, and no folder is given.
    """
    if config.store_is_sharded and is_on_meta(network) and run_dir is None:
        raise ConfigError(
            "the network is on the device 'meta' and pool.store is 'sharded', so that no process holds the trained "
            "network: give run_dir, the folder in which it is saved"
        )


def folder_of_run(job: Job, config: Config, run_dir: str | Path | None, resume: bool) -> RunFolder | None:
    """Create the folder of a run that Python starts, or open that of a run that it resumes; None on other ranks.

    Args:
        job: The run with this configuration.
        config: The configuration, without what a launcher has decided.
        run_dir: The folder; None: nothing is written.
        resume: Whether the run is resumed.

    Raises:
        RunFolderError: The folder cannot be created, or the run in it cannot continue with this configuration.
        CheckpointError: All checkpoints are damaged.
    """
    if run_dir is None or not is_rank_zero():
        return None
    path = Path(run_dir)
    return resumed_folder(job, config, path) if resume else create_run_folder(config, path)


def resumed_folder(job: Job, config: Config, path: Path, explicit: Sequence[str] | None = None) -> RunFolder:
    """Open the folder of a run that is resumed, and make a configuration that of its remaining rounds.

    Rank 0 calls this, before any process reads the folder.

    Args:
        job: The run with this configuration.
        config: The configuration, without what a launcher has decided.
        path: The folder.
        explicit: The keys that the user has given; None: all keys.

    Raises:
        RunFolderError: The folder does not contain a run, or the run cannot continue with this configuration.
        CheckpointError: All checkpoints are damaged.
    """
    run = reopen(config, path, job.schedule.num_rounds, explicit)
    if run.is_changed:
        _refuse_other_state(run, job)
        _warn_of_skipped_steps(run, job)
    save_config(run, config)
    return run.folder


def _refuse_other_state(run: Reopened, job: Job) -> None:
    """Refuse arguments of the optimizer with which the saved state has other entries.

    Raises:
        RunFolderError: The entries differ.
    """
    config, before = job.config, run.before.train.optimizer
    has_none = config.train.optimizer_state == "reset" and config.method_spec.has_coordinator
    if has_none or before == config.train.optimizer or is_users_function(before, None):
        return
    old, new = (state_keys(spec, dims_of(job.split.template)) for spec in (before, config.train.optimizer))
    if old != new:
        raise RunFolderError(
            f"{run.folder.path}: 'train.optimizer.args' cannot become {config.train.optimizer.args}: {before.name} has "
            f"saved {_listed(old)} for each parameter, and would now need {_listed(new)}. Restore the arguments "
            f"{before.args} that decide it"
        )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(keys)) or "nothing"


def _warn_of_skipped_steps(run: Reopened, job: Job) -> None:
    """Warn if the remaining rounds do not begin at the local step at which the finished rounds end."""
    done, spans = run.rounds_done, job.schedule.spans
    if not 0 < done < len(spans):
        return
    sampler = replace(job.schedule.sampler, num_workers=run.before.train.workers)
    made, begins = run_spans(run.before, sampler)[done - 1].steps.stop, spans[done].steps.start
    if made != begins:
        warnings.warn(
            f"{run.folder.path}: the run has made {made} local steps, and its round {done + 1} now begins with local "
            f"step {begins + 1}: schedules and the order of the samples continue from there",
            stacklevel=2,
        )


def with_storage_for(config: Config, parent: Path) -> Config:
    """Return the configuration with `checkpoint.storage` in a folder of its own for each comparison.

    Run folders are named after methods, so the checkpoints of two comparisons would otherwise overwrite each other.
    """
    if config.checkpoint.storage is None:
        return config
    storage = f"{config.checkpoint.storage.rstrip('/')}/{parent.name}"
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"storage": storage})})
