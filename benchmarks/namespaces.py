"""Hosts on one machine: Linux network namespaces, joined by a switch over links of a given rate.

Needs root, iproute2 and the kernel's tbf. Everything made here is removed again, whatever happens.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

INTERFACE = "veth0"


@dataclass(frozen=True)
class Host:
    """A namespace with one interface."""

    name: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs `arguments` on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def counters(self) -> dict[str, int]:
        """Return what the interface has sent and received so far, in bytes, headers included."""
        found = {}
        for direction in ("tx", "rx"):
            path = f"/sys/class/net/{INTERFACE}/statistics/{direction}_bytes"
            done = subprocess.run(self.command(["cat", path]), capture_output=True, text=True, check=True)
            found[direction] = int(done.stdout)
        return found


def why_not() -> str | None:
    """Return why namespaces cannot be had here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need ip and tc (Debian: iproute2)"
    probe = f"ist-probe-{uuid4().hex[:6]}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return None if done.returncode == 0 else f"network namespaces are not permitted here: {done.stderr.strip()}"


@contextmanager
def hosts(number: int, rate_mbit: float | None = None) -> Iterator[list[Host]]:
    """Make hosts that can reach each other.

    Args:
        number: How many, 1 to 250.
        rate_mbit: Rate of each host's link in each direction, in Mbit/s; None: as fast as the kernel.
    """
    run = uuid4().hex[:6]
    switch = f"ist-{run}-switch"
    made = [Host(f"ist-{run}-{index}", f"10.77.0.{index + 1}") for index in range(number)]
    namespaces = [switch, *(host.name for host in made)]
    try:
        for namespace in namespaces:
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for index, host in enumerate(made):
            port = f"port{index}"
            _run("ip", "-n", host.name, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch)
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _run("ip", "-n", host.name, "link", "set", INTERFACE, "up")
            if rate_mbit is not None:
                for namespace, device in ((host.name, INTERFACE), (switch, port)):
                    shape = ["rate", f"{rate_mbit}mbit", "burst", "64kb", "latency", "400ms"]
                    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *shape)
        yield made
    finally:
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def run_ranks(where: Sequence[Host], arguments: Sequence[str], timeout_s: float) -> list[str]:
    """Run a command as one rank on every host, as torchrun over several nodes would.

    Args:
        where: Rank r runs on the r-th host; rank 0's address is the rendezvous.
        arguments: The command.
        timeout_s: After so many seconds all ranks are killed.

    Returns:
        Every rank's stderr.

    Raises:
        RuntimeError: A rank failed; the message holds what it said.
    """
    environments = [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(where)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": where[0].address,
            "MASTER_PORT": "29511",
        }
        for rank in range(len(where))
    ]
    return run_everywhere(where, arguments, environments, timeout_s)


def run_everywhere(
    where: Sequence[Host], arguments: Sequence[str], environments: Sequence[Mapping[str, str]], timeout_s: float
) -> list[str]:
    """Run a command on every host at the same time, each with variables of its own.

    Returns:
        What each wrote to stderr.

    Raises:
        RuntimeError: One failed; the message holds what it said.
    """
    processes = [
        subprocess.Popen(
            host.command(arguments),
            env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, environment in zip(where, environments, strict=True)
    ]
    try:
        said = [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for host, process, text in zip(where, processes, said, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{host.name} ended with {process.returncode}:\n{text[-3000:]}")
    return said


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
