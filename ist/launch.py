"""Start a run's processes on this machine, with torch's elastic agent (what torchrun is made of).

Where it sits: `ist train` and `ist compare` come here when no launcher has started them; the children
run `ist process`, and find everything else in the run folder.
Not here: several machines (use torchrun), what the processes do (`ist/run.py`).
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ist import errors
from ist.config import Config, num_processes
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
from ist.lab.hosts import INTERFACE, Host, command_in
from ist.pool.ports import PRIVATE_STORE
from ist.pool.secret import SECRET_VARIABLE, new_secret

LAUNCHED_BY_IST = "IST_LAUNCHED"
"""Set in children: the parent reports their errors."""

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


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
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own; errors are told below
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # For its owner only. A rendezvous store of torch's own would listen on all interfaces.
    with TemporaryDirectory(prefix="ist-") as private, _environment(_child_environment(config, Path(private), where)):
        if where:
            command = _on_hosts(where, Path(private), command)
        launch_config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes(config),
            run_id=folder.name,
            rdzv_backend="c10d",
            rdzv_configs={"store_type": "file"},
            rdzv_endpoint=f"{private}/agent",
            local_addr="127.0.0.1",  # whatever this machine's host name resolves to
            max_restarts=0,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(launch_config, command[0])(*command[1:])
        except ChildFailedError as error:
            raise _explain(error, config, folder) from error
        except (SignalException, KeyboardInterrupt) as error:
            raise InterruptedRunError(f"interrupted. Go on with: ist train --resume {folder}") from error


def report_to_launcher(error: BaseException) -> bool:
    """Leave an error where a torchrun-like launcher looks for it.

    Returns:
        Whether `ist` itself is that launcher and will print the error.
    """
    if _ERROR_FILE in os.environ:
        ErrorHandler().record_exception(error)
    return LAUNCHED_BY_IST in os.environ


def _on_hosts(where: Sequence[Host], private: Path, command: Sequence[str]) -> list[str]:
    """Return the one command line that runs on another host in every rank; the agent puts the rank's number in."""
    for rank, host in enumerate(where):
        (private / f"host-{rank}").symlink_to(f"/proc/{host.pid}/ns")
    return command_in(private / "host-${local_rank}", where[0].own_user, command)


def _child_environment(config: Config, private: Path, where: Sequence[Host] = ()) -> dict[str, str]:
    """What the children find in their environment: a secret of this run, and no way to listen to other machines."""
    environment = {
        LAUNCHED_BY_IST: "1",
        PRIVATE_STORE: str(private / "ranks"),
        SECRET_VARIABLE: new_secret(),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
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


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a while."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _explain(error: ChildFailedError, config: Config, folder: Path) -> ISTError:
    """Turn the agent's report into the one cause: what died by itself, before what failed because of it."""
    failures: list[tuple[int, ProcessFailure]] = sorted(error.failures.items())
    killed = [(rank, f) for rank, f in failures if f.exitcode < 0 and f.signal_name() != "SIGTERM"]
    # One that has told its error may be ended by the agent, because of another's, before it has left by itself.
    ended = [(rank, f) for rank, f in failures if f.exitcode > 0 or f.signal_name() == "SIGTERM"]
    told = [(rank, f) for rank, f in ended if f.error_file_data["message"] != "<NONE>"]
    go_on = f"Go on from the last checkpoint with: ist train --resume {folder}"
    if killed:
        rank, failure = killed[0]
        return WorkerLostError(f"{_who(rank, config)} was killed ({failure.signal_name()}). {go_on}")
    if told:
        # Whoever lost a peer tells of a consequence, even where it was the first to tell.
        rank, failure = min(told, key=lambda item: (issubclass(_recorded(item[1])[0], PoolError), item[1].timestamp))
        kind, message = _recorded(failure)
        again = not issubclass(kind, ConfigError | DataError | ModelError | MemoryLimitError)
        hint = f" {go_on}" if again else ""
        return kind(f"{message} [{_who(rank, config)}]{hint}")
    rank, failure = min(failures, key=lambda item: item[1].timestamp)
    return WorkerLostError(f"{_who(rank, config)} ended with exit code {failure.exitcode}, see above. {go_on}")


def _who(rank: int, config: Config) -> str:
    worker = rank - (num_processes(config) - config.train.workers)
    return f"rank {rank} (worker {worker})" if worker >= 0 else f"rank {rank} (the coordinator)"


def _recorded(failure: ProcessFailure) -> tuple[type[ISTError], str]:
    """The class and the text of the error that a process recorded."""
    message = failure.error_file_data["message"]
    text = str(message["message"] if isinstance(message, dict) else message)
    with suppress(ValueError):
        text = str(json.loads(text))
    name, _, rest = text.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, ISTError):
        return kind, rest
    return ISTError, text
