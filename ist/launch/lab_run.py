"""Start the processes of a run on simulated hosts, and count the bytes on their links.

A host has one process; if several ranks are one worker (`pool.ranks_per_worker`), it has all of them, as a node has.

Where it sits: `ist/cli/main.py` calls `launch_on_hosts` if `pool.link` is set; it calls `ist/launch/start.py`.
Not here: the hosts themselves (`ist/launch/lab_hosts.py`).
"""

from ist.config.runtime import parse_link
from ist.config.schema import Config, first_worker_rank, num_processes, worker_of
from ist.errors import ConfigError
from ist.launch.lab_hosts import hosts, why_not
from ist.launch.start import launch
from ist.storage.run_folder import RunFolder


def check_hosts(config: Config) -> None:
    """Check that the simulated hosts of a run, if it has any, can be created on this machine.

    Raises:
        ConfigError: They cannot; the message gives the reason.
    """
    if config.pool.link is not None and (reason := why_not()):
        raise ConfigError(f"'pool.link' (--link) is '{config.pool.link}', but {reason}")


def launch_on_hosts(config: Config, folder: RunFolder, resume: bool) -> None:
    """Run the processes of a job to their end, each worker on its own simulated host that exists for this run.

    The run's result gets `link`, and `wire_bytes`: the bytes that all hosts sent, including headers, and
    `wire_bytes_by_host`: those of each host, in the order of ranks. A resumed run has neither, because the earlier
    count is lost.

    Raises:
        LabError: The hosts could not be created.
        WorkerLostError: A process died; the message names its rank.
        ISTError: A process ended with an error; this is that error.
        InterruptedRunError: The user or a signal ended the run.
    """
    assert config.pool.link is not None
    host_of = [worker_of(config, rank) + first_worker_rank(config) for rank in range(num_processes(config))]
    with hosts(host_of[-1] + 1, parse_link(config.pool.link)) as made:
        launch(config, folder.path, resume, [made[host] for host in host_of])
        by_host = [host.wire_bytes() for host in made]
        counted = {} if resume else {"wire_bytes": sum(by_host), "wire_bytes_by_host": by_host}
    folder.add_to_result({"link": config.pool.link, **counted})
