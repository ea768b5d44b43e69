"""Start a run's processes on this machine, and tell why one of them failed.

Where it sits: `ist train` and `ist compare` come here when no launcher has started them; the children
run `ist process`, and find everything else in the run folder.
Not here: several machines (use torchrun), watching and ending processes (`ist/launch/ranks.py`), what they do
(`ist/runs/open.py`).
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from ist import errors
from ist.config.schema import Config, num_processes
from ist.distributed.environment import ERROR_FILE, LAUNCHER, PRIVATE_STORE, is_started_by_ist
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
    """A rank that did not end well.

    Attributes:
        death: How its process ended.
        kind: The class of the error that it told; None: it told none.
        message: What that error says.
    """

    death: Death
    kind: type[ISTError] | None
    message: str


def launch(config: Config, folder: Path, resume: bool, where: Sequence[Host] = ()) -> None:
    """Run a job's processes until they are done.

    Args:
        config: The run's configuration, as written in `folder`.
        folder: The run folder.
        resume: Go on from the newest checkpoint.
        where: Hosts of the lab, rank r on the r-th; none: this machine as it is.

    Raises:
        WorkerLostError: A process died; the message names its rank.
        ISTError: A process stopped with an error; the message is its own.
        InterruptedRunError: The user interrupted it, or it was told to end.
    """
    command = [sys.executable, "-m", "ist", "process", str(folder), *(["--resume"] if resume else [])]
    number = num_processes(config)
    with TemporaryDirectory(prefix="ist-") as private:  # for its owner only
        shared = {**os.environ, **_child_environment(config, Path(private), where)}
        told = [Path(private) / f"error-{rank}.json" for rank in range(number)]
        environments = [
            {**shared, **_rank_environment(rank, number), ERROR_FILE: str(told[rank])} for rank in range(number)
        ]
        commands = [host.command(command) for host in where] or [command] * number
        try:
            deaths = run_ranks(commands, environments)
        except (Stopped, KeyboardInterrupt) as error:
            raise InterruptedRunError(stopped_text(error, folder)) from error
        failures = [Failure(death, *_recorded(told[death.rank])) for death in deaths]
    if failures:
        raise _explain(failures, config, folder)


def report_to_launcher(error: BaseException) -> bool:
    """Leave an error where a torchrun-like launcher looks for it.

    Returns:
        Whether `ist` itself is that launcher and will print the error.
    """
    if ERROR_FILE in os.environ:
        ErrorHandler().record_exception(error)
    return is_started_by_ist()


def _child_environment(config: Config, private: Path, where: Sequence[Host] = ()) -> dict[str, str]:
    """What the children find in their environment: a secret of this run, and no way to listen to other machines."""
    environment = {
        LAUNCHER: str(os.getpid()),
        PRIVATE_STORE: str(private / "ranks"),
        SECRET_VARIABLE: new_secret(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(config.pool.threads)),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    if config.pool.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # PyTorch's PowerSGD waits for a GPU wherever it sees one
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if where:
        interface = INTERFACE
        # NCCL sees that these hosts are one machine, and would go around the links.
        environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    if interface:
        environment["GLOO_SOCKET_IFNAME"] = environment["NCCL_SOCKET_IFNAME"] = interface
    return environment


def _rank_environment(rank: int, number: int) -> dict[str, str]:
    """What torchrun would tell a rank, on one machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    return {name: str(value) for name, value in ranks.items()}


def _explain(failures: Sequence[Failure], config: Config, folder: Path) -> ISTError:
    """Turn the deaths, in their order, into the one cause: what failed by itself, before what failed because of it."""
    go_on = f"Go on from the last checkpoint with: {resume_command(folder)}"
    by_itself = [failure for failure in failures if not failure.death.was_told]
    for failure in by_itself:
        number = signal_of(failure.death.return_code)
        if number and failure.kind in (None, InterruptedRunError):
            return WorkerLostError(f"{_who(failure, config)} was killed ({number.name}). {go_on}")
    if paused := [failure for failure in failures if failure.death.was_paused]:
        return WorkerLostError(
            f"{_who(paused[0], config)} is paused (SIGSTOP), and others timed out waiting for it "
            f"(pool.timeout_s: {config.pool.timeout_s:g}). {go_on}"
        )
    # One that has told its error may be ended because of another's, before it has left by itself.
    told = [failure for failure in failures if failure.kind not in (None, InterruptedRunError)]
    if told:
        # Whoever lost a peer tells of a consequence, even where it was the first to tell; rank 0 knows best of whom.
        failure = min(told, key=lambda failure: _is_consequence(failure) and 1 + (failure.death.rank > 0))
        assert failure.kind is not None
        again = not issubclass(failure.kind, ConfigError | DataError | ModelError | MemoryLimitError)
        hint = f" {go_on}" if again else ""
        return failure.kind(f"{failure.message} [{_who(failure, config)}]{hint}")
    first = failures[0]
    return WorkerLostError(f"{_who(first, config)} ended with exit code {first.death.return_code}, see above. {go_on}")


def _is_consequence(failure: Failure) -> bool:
    return failure.kind is not None and issubclass(failure.kind, PoolError)


def _who(failure: Failure, config: Config) -> str:
    rank = failure.death.rank
    worker = rank - (num_processes(config) - config.train.workers)
    return f"rank {rank} (worker {worker})" if worker >= 0 else f"rank {rank} (the coordinator)"


def _recorded(file: Path) -> tuple[type[ISTError] | None, str]:
    """Return the class and the text of the error that a process recorded, if it did."""
    try:
        message = json.loads(file.read_text(encoding="utf-8"))["message"]
        text = str(message["message"] if isinstance(message, dict) else message)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or the process died while it wrote
        return None, ""
    name, _, rest = text.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, ISTError):
        return kind, rest
    return ISTError, text
