"""Start the processes of a run on hosts of the lab, one a host, and count what crosses their links.

Where it sits: `ist/cli/main.py` comes here where `pool.link` is set, instead of to `ist/launch/start.py`.
"""

from ist.config.link_rate import parse_link
from ist.config.schema import Config, num_processes
from ist.errors import ConfigError
from ist.launch.lab_hosts import hosts, why_not
from ist.launch.start import launch
from ist.storage.run_folder import RunFolder


def check_hosts(config: Config) -> None:
    """Check that the hosts of a run can be made here, if it has any.

    Raises:
        ConfigError: They cannot; the message says why.
    """
    if config.pool.link is not None and (reason := why_not()):
        raise ConfigError(f"'pool.link' (--link) is '{config.pool.link}', but {reason}")


def launch_on_hosts(config: Config, folder: RunFolder, resume: bool) -> None:
    """Run a job's processes until they are done, each on a host of its own that is made for this run.

    The run's result gets `link`, and `wire_bytes`: what all hosts sent, headers included. A resumed run has no
    `wire_bytes`, for what was counted before is gone.

    Raises:
        LabError: The hosts could not be made.
        WorkerLostError: A process died; the message names its rank.
        ISTError: A process stopped with an error; the message is its own.
        InterruptedRunError: The user interrupted it, or it was told to end.
    """
    assert config.pool.link is not None
    with hosts(num_processes(config), parse_link(config.pool.link)) as where:
        launch(config, folder.path, resume, where)
        counted = {} if resume else {"wire_bytes": sum(host.wire_bytes() for host in where)}
    folder.add_to_result({"link": config.pool.link, **counted})
