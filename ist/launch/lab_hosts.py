"""Hosts on one machine: Linux network namespaces, joined by a switch over links of a given rate.

A namespace lives as long as a process in it. Here that is a `cat` that reads from a pipe of the process that made the
host: when that process ends, whatever ended it, the pipe closes, `cat` ends, and the kernel takes namespace, interfaces
and queues away. Nothing has a name that could stay behind. What runs on a host is killed when its parent ends.

Where it sits: `ist/launch/lab_run.py`, benchmarks and tests run things on hosts.
Needs Linux, iproute2 and util-linux, and the kernel's tbf; root, or a kernel that lets users make user namespaces.
Not here: delay and loss of packets; more than one machine.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ist.config.link_rate import Link
from ist.errors import LabError

INTERFACE = "veth0"
"""Every host's interface to the switch."""

_SYSTEM_FOLDERS = "/usr/sbin:/sbin"  # where tc is, and not on every user's PATH
_FRAME_BYTES = 1514
_BURST_S = 0.004
_QUEUE_S = 0.4
_CAPABILITIES = 1 << 21 | 1 << 12  # CAP_SYS_ADMIN and CAP_NET_ADMIN
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
_LIMITS = {
    "kernel/unprivileged_userns_clone": "0",  # Debian
    "kernel/apparmor_restrict_unprivileged_userns": "1",  # Ubuntu
    "user/max_user_namespaces": "0",
}
"""Settings under /proc/sys, and the value with which users may not make user namespaces."""


@dataclass(frozen=True)
class Host:
    """A namespace with one interface.

    Attributes:
        name: For messages.
        address: Of its interface; private.
        pid: The process that holds the namespace.
        own_user: Whether it is in a user namespace that was made for it.
    """

    name: str
    address: str
    pid: int
    own_user: bool

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs `arguments` on this host; killed when the process that starts it ends."""
        return command_in(Path(f"/proc/{self.pid}/ns"), self.own_user, arguments)

    def counters(self) -> dict[str, int]:
        """Return what the interface has sent (`tx`) and received (`rx`) so far, in bytes.

        The kernel shows the same numbers in /sys/class/net, but there only to whoever mounts it inside the namespace.
        It hands up to 64 kB to such an interface in one piece, which then counts with the headers of one frame: see
        `wire_bytes`.

        Raises:
            LabError: The host is gone.
        """
        try:
            lines = Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()
        except OSError as error:
            raise LabError(f"{self.name} is gone: its counters cannot be read") from error
        (values,) = [line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:")]
        return {"tx": int(values[8]), "rx": int(values[0])}

    def wire_bytes(self) -> int:
        """Return what has gone out onto the link so far, in bytes: frames of at most 1,514, each with its headers.

        That is what the link's rate is held against, and what the counter of a real interface card would show.

        Raises:
            LabError: The host is gone, or has a link of no rate.
        """
        shown = _run(self.command(["tc", "-statistics", "-json", "qdisc", "show", "dev", INTERFACE]))
        counted = [queue["bytes"] for queue in json.loads(shown) if queue["kind"] == "tbf"]
        if not counted:
            raise LabError(f"{self.name} has a link of no rate, on which bytes are not counted")
        return int(counted[0])


def why_not() -> str | None:
    """Return why hosts cannot be had here, or None; tries to make one."""
    if sys.platform != "linux":
        return f"hosts are network namespaces of Linux, and this is {sys.platform}"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_environment()["PATH"]) is None]
    if missing:
        packages = ", ".join(sorted({_TOOLS[tool] for tool in missing}))
        return f"network namespaces need {', '.join(missing)}: install {packages}"
    try:
        with hosts(1, Link(10, 10)):
            return None
    except LabError as error:
        if not _needs_user_namespace():
            return f"network namespaces are not permitted here: {error}"
        files = {name: Path("/proc/sys", name) for name in _LIMITS}
        found = [name for name, file in files.items() if file.exists() and file.read_text().strip() == _LIMITS[name]]
        settings = "".join(f"; {name.replace('/', '.')} is {_LIMITS[name]}" for name in found)
        return (
            "network namespaces need root (CAP_SYS_ADMIN and CAP_NET_ADMIN), or a user namespace, which is not "
            f"permitted here: {error}{settings}"
        )


@contextmanager
def hosts(number: int, link: Link | None = None) -> Iterator[list[Host]]:
    """Make hosts that can reach each other, for as long as the body runs.

    Args:
        number: How many, 1 to 250.
        link: Of each host to the switch; None: as fast as the kernel.

    Raises:
        LabError: The kernel refuses; see `why_not`.
    """
    own_user = _needs_user_namespace()
    with ExitStack() as stack:
        user = ["--user", "--map-root-user"] if own_user else []
        bridge = "ip link add br0 type bridge && ip link set br0 up"
        switch = stack.enter_context(_held(["unshare", *user, "--net"], bridge))
        enter = ["nsenter", f"--user=/proc/{switch}/ns/user", "--preserve-credentials", "--"] if own_user else []
        made = []
        for index in range(number):
            pid = stack.enter_context(_held([*enter, "unshare", "--net"], "ip link set lo up"))
            made.append(Host(f"host {index}", f"10.77.0.{index + 1}", pid, own_user))
        for index, host in enumerate(made):
            port = f"port{index}"
            _plug(switch, host, port)
            if link is not None:
                _shape(host.command([]), INTERFACE, link.up_mbit)
                _shape(command_in(Path(f"/proc/{switch}/ns"), own_user, []), port, link.down_mbit)
        yield made


def command_in(namespaces: Path, own_user: bool, arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs `arguments` in namespaces; killed when the process that starts it ends.

    Args:
        namespaces: Their folder under /proc, or a link to it.
        own_user: Whether a user namespace is to be entered too.
        arguments: What to run.
    """
    user = [f"--user={namespaces}/user", "--preserve-credentials"] if own_user else []
    # The signal is asked for after nsenter, whose change of credentials would undo it.
    return ["nsenter", *user, f"--net={namespaces}/net", "--", "setpriv", "--pdeathsig", "KILL", "--", *arguments]


def run_ranks(where: Sequence[Host], arguments: Sequence[str], timeout_s: float) -> list[str]:
    """Run a command as one rank on every host, as torchrun over several nodes would.

    Args:
        where: Rank r runs on the r-th host; rank 0's address is the rendezvous.
        arguments: The command.
        timeout_s: After so many seconds all ranks are killed.

    Returns:
        Every rank's stderr.

    Raises:
        LabError: A rank failed; the message holds what it said.
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
        LabError: One failed; the message holds what it said.
        subprocess.TimeoutExpired: One was not done in time; all are killed.
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
            raise LabError(f"{host.name} ended with {process.returncode}:\n{text[-3000:]}")
    return said


def _needs_user_namespace() -> bool:
    """Whether this process lacks what making network namespaces takes; in a user namespace of its own it has it."""
    status = Path("/proc/self/status").read_text().splitlines()
    (effective,) = [int(line.split()[1], 16) for line in status if line.startswith("CapEff:")]
    return effective & _CAPABILITIES != _CAPABILITIES


@contextmanager
def _held(unshare: Sequence[str], setup: str) -> Iterator[int]:
    """Make a namespace, run a line of shell in it, and hold it; yields the holder's process id."""
    line = f"({setup}) && echo made && exec cat"
    # In a session of its own, so that an interrupt from the terminal leaves it to be read from.
    with subprocess.Popen(
        [*unshare, "sh", "-c", line],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    ) as holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != "made\n":
                _, said = holder.communicate()
                raise LabError(f"{' '.join(unshare)}: {said.strip()}")
            yield holder.pid
        finally:
            holder.kill()


def _plug(switch: int, host: Host, port: str) -> None:
    """Join a host to the switch."""
    in_switch = command_in(Path(f"/proc/{switch}/ns"), host.own_user, ["ip", "-batch", "-"])
    _run(
        in_switch,
        f"link add {port} type veth peer name {INTERFACE} netns {host.pid}\nlink set {port} master br0 up\n",
    )
    _run(
        host.command(["ip", "-batch", "-"]),
        f"address add {host.address}/24 dev {INTERFACE}\nlink set {INTERFACE} up\n",
    )


def _shape(enter: Sequence[str], device: str, rate_mbit: float) -> None:
    """Let no more than a rate out of an interface.

    What may pass at once, after a pause, is what the rate makes in a few milliseconds, for this process's machine may
    not run it sooner; but a few frames.
    """
    bytes_per_s = rate_mbit * 1e6 / 8
    burst = max(4 * _FRAME_BYTES, int(bytes_per_s * _BURST_S))
    limit = burst + int(bytes_per_s * _QUEUE_S)
    shape = ["rate", f"{rate_mbit * 1e6:.0f}bit", "burst", f"{burst}b", "limit", f"{limit}b"]
    _run([*enter, "tc", "qdisc", "add", "dev", device, "root", "tbf", *shape])


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_FOLDERS}"}


def _run(command: Sequence[str], said: str = "") -> str:
    done = subprocess.run(command, input=said, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
