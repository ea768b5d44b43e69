"""Start a run's processes on this machine, and report the cause if one of them fails.

Where it sits: `ist train` and `ist compare` call `launch` if no launcher started them. The child processes run
`ist process` and read everything else from the run folder.
Not here: several machines (torchrun), waiting for processes and ending them (`ist/launch/ranks.py`), the work of a
process (`ist/runs/open.py`).
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from ist import errors
from ist.config.schema import Config, first_worker_rank, num_processes, worker_of
from ist.distributed.device import compute_device
from ist.distributed.environment import ERROR_FILE, LAUNCHER, PRIVATE_STORE, is_started_by_ist
from ist.distributed.memory_limit import start_environment, start_limit, under_limit
from ist.distributed.ports import loopback_interface
from ist.distributed.secret import SECRET_VARIABLE, new_secret
from ist.errors import (
    ConfigError,
    DataError,
    InterruptedRunError,
    ISTError,
    MemoryLimitError,
    ModelError,
    PoolError,
    WorkerLostError,
)
from ist.launch.lab_hosts import INTERFACE, Host
from ist.launch.ranks import Death, run_ranks
from ist.launch.signals import Stopped, resume_command, signal_of, stopped_text


@dataclass(frozen=True)
class Failure:
    """A failed rank and its error.

    Attributes:
        death: How its process ended.
        kind: Class of the error that it recorded; None if it recorded none.
        message: The message of that error.
    """

    death: Death
    kind: type[ISTError] | None
    message: str


def launch(config: Config, folder: Path, resume: bool, where: Sequence[Host] = ()) -> None:
    """Run the processes of a job to their end.

    Args:
        config: The run's configuration, as written in `folder`.
        folder: The run folder.
        resume: Whether to resume from the newest checkpoint.
        where: Simulated hosts, rank r on the r-th; if empty, the ranks run directly on this machine.

    Raises:
        WorkerLostError: A process died; the message names its rank.
        ISTError: A process ended with an error; this is that error.
        InterruptedRunError: The user or a signal ended the run.
    """
    command = [sys.executable, "-m", "ist", "process", str(folder), *(["--resume"] if resume else [])]
    number = num_processes(config)
    with TemporaryDirectory(prefix="ist-") as private:  # readable by its owner only
        shared = {**os.environ, **_child_environment(config, Path(private), where)}
        error_files = [Path(private) / f"error-{rank}.json" for rank in range(number)]
        environments = [
            {**shared, **_rank_environment(rank, number), ERROR_FILE: str(error_files[rank])} for rank in range(number)
        ]
        inner = limited_commands(config, command, environments)
        commands = [host.command(own) for host, own in zip(where, inner, strict=True)] if where else inner
        try:
            deaths = run_ranks(commands, environments)
        except (Stopped, KeyboardInterrupt) as error:
            raise InterruptedRunError(stopped_text(error, folder)) from error
        failures = [Failure(death, *_recorded(error_files[death.rank])) for death in deaths]
    if failures:
        raise _explain(failures, config, folder)


def limited_commands(
    config: Config, command: Sequence[str], environments: Sequence[dict[str, str]]
) -> list[Sequence[str]]:
    """Return each rank's command; with `pool.memory_limit`, workers on a CPU start under the limit.

    Rank 0 reads checkpoints and builds the full network: if it is a worker too, its limit applies from its first round.

    Args:
        config: The run's configuration.
        command: The command of a rank.
        environments: The environment of each rank; that of a limited rank is completed.
    """
    limit, text = config.pool.memory_limit_bytes, str(config.pool.memory_limit)
    if limit is None or sys.platform != "linux" or compute_device(config.pool).type != "cpu":
        return [command] * len(environments)
    nbytes, first = start_limit(limit), max(1, first_worker_rank(config))
    for environment in environments[first:]:
        environment |= start_environment(text)
    return [command if rank < first else under_limit(command, nbytes) for rank in range(len(environments))]


def report_to_launcher(error: BaseException) -> bool:
    """Record an error in the file in which a launcher such as torchrun expects it.

    Returns:
        Whether the launcher is `ist` itself, which will print the error.
    """
    if ERROR_FILE in os.environ:
        ErrorHandler().record_exception(error)
    return is_started_by_ist()


def _child_environment(config: Config, private: Path, where: Sequence[Host] = ()) -> dict[str, str]:
    """Return variables for all ranks: this run's secret, and network interfaces that other machines cannot reach."""
    environment = {
        LAUNCHER: str(os.getpid()),
        PRIVATE_STORE: str(private / "ranks"),
        SECRET_VARIABLE: new_secret(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(config.pool.threads)),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    if config.pool.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # PyTorch's PowerSGD waits for a GPU whenever it sees one
    interface = loopback_interface()
    if where:
        interface = INTERFACE
        # NCCL detects that these hosts are one machine, and would bypass the links.
        environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    if interface:
        environment["GLOO_SOCKET_IFNAME"] = environment["NCCL_SOCKET_IFNAME"] = interface
    return environment


def _rank_environment(rank: int, number: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank on one machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    return {name: str(value) for name, value in ranks.items()}


def _explain(failures: Sequence[Failure], config: Config, folder: Path) -> ISTError:
    """Find the cause among failed ranks, listed in the order in which they ended: a rank that failed by itself."""
    remedy = f"Resume from the last checkpoint with: {resume_command(folder)}"
    by_itself = [failure for failure in failures if not failure.death.was_terminated]
    for failure in by_itself:
        number = signal_of(failure.death.return_code)
        if number and failure.kind in (None, InterruptedRunError):
            return WorkerLostError(f"{_who(failure, config)} was killed ({number.name}). {remedy}")
    if paused := [failure for failure in failures if failure.death.was_paused]:
        return WorkerLostError(
            f"{_who(paused[0], config)} is paused (SIGSTOP), and others timed out waiting for it "
            f"(pool.timeout_s: {config.pool.timeout_s:g}). {remedy}"
        )
    # A rank that has recorded its error may be terminated because of another one before it exits.
    recorded = [failure for failure in failures if failure.kind not in (None, InterruptedRunError)]
    if recorded:
        # A lost peer is a consequence, even if its error came first; among such errors, rank 0's names the peer best.
        failure = min(recorded, key=lambda failure: _is_consequence(failure) and 1 + (failure.death.rank > 0))
        assert failure.kind is not None
        can_resume = not issubclass(failure.kind, ConfigError | DataError | ModelError | MemoryLimitError)
        hint = f" {remedy}" if can_resume else ""
        return failure.kind(f"{failure.message} [{_who(failure, config)}]{hint}")
    first = failures[0]
    return WorkerLostError(f"{_who(first, config)} exited with code {first.death.return_code}, see above. {remedy}")


def _is_consequence(failure: Failure) -> bool:
    return failure.kind is not None and issubclass(failure.kind, PoolError)


def _who(failure: Failure, config: Config) -> str:
    rank = failure.death.rank
    worker = worker_of(config, rank)
    return f"rank {rank} (worker {worker})" if worker >= 0 else f"rank {rank} (the coordinator)"


def _recorded(file: Path) -> tuple[type[ISTError] | None, str]:
    """Return the class and the message of the error that a process recorded, or (None, '')."""
    try:
        message = json.loads(file.read_text(encoding="utf-8"))["message"]
        text = str(message["message"] if isinstance(message, dict) else message)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or the process died while writing it
        return None, ""
    name, _, rest = text.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, ISTError):
        return kind, rest
    return ISTError, text
