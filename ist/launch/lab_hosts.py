"""Simulated hosts on one machine: Linux network namespaces, connected by a switch over links of a given rate.

Where it sits: `ist/launch/lab_run.py`, benchmarks and tests run commands on hosts.
Law: nothing is left behind. A namespace exists as long as a process in it. Here that process is a `cat` that reads from
a pipe of the process that created the host. When that process ends for any reason, the pipe closes, `cat` ends, and the
kernel removes the namespace, its interfaces and queues. A command that runs on a host is killed when its parent ends.
Not here: packet delay and loss; several machines.

Needs Linux, iproute2, util-linux, and the kernel's tbf; and root, or a kernel that allows user namespaces.
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

from ist.config.runtime import Link
from ist.errors import LabError

INTERFACE = "veth0"
"""Every host's interface to the switch."""

_SYSTEM_FOLDERS = "/usr/sbin:/sbin"  # contain tc, and are not on every user's PATH
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
"""Settings under /proc/sys, and the value that forbids user namespaces."""


@dataclass(frozen=True)
class Host:
    """A namespace with one interface.

    Attributes:
        name: Name for messages.
        address: Private address of its interface.
        pid: The process that keeps the namespace alive.
        own_user: Whether the host is in its own user namespace.
    """

    name: str
    address: str
    pid: int
    own_user: bool

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs `arguments` on this host; the command is killed when its parent ends."""
        return command_in(Path(f"/proc/{self.pid}/ns"), self.own_user, arguments)

    def counters(self) -> dict[str, int]:
        """Return the bytes that the interface has sent (`tx`) and received (`rx`) so far.

        The kernel hands up to 64 kB to such an interface at once and counts the headers of only one frame; for the
        bytes on the link see `wire_bytes`. (/sys/class/net has the same numbers, but only if it is mounted inside the
        namespace.)

        Raises:
            LabError: The host is gone.
        """
        try:
            lines = Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()
        except OSError as error:
            raise LabError(f"{self.name}: the host is gone, so its counters cannot be read") from error
        (values,) = [line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:")]
        return {"tx": int(values[8]), "rx": int(values[0])}

    def wire_bytes(self) -> int:
        """Return the bytes that this host has sent onto its link so far, in frames of at most 1,514 bytes with headers.

        The link's rate applies to these bytes, and the counter of a real network card would show them.

        Raises:
            LabError: The host is gone, or its link has no rate.
        """
        shown = _run(self.command(["tc", "-statistics", "-json", "qdisc", "show", "dev", INTERFACE]))
        counted = [queue["bytes"] for queue in json.loads(shown) if queue["kind"] == "tbf"]
        if not counted:
            raise LabError(f"{self.name}: bytes are not counted on a link without a rate")
        return int(counted[0])


def why_not() -> str | None:
    """Return the reason why hosts cannot be created on this machine, or None; tries to create one."""
    if sys.platform != "linux":
        return f"hosts need network namespaces of Linux, and this system is {sys.platform}"
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
            "network namespaces need root (CAP_SYS_ADMIN and CAP_NET_ADMIN) or a user namespace, and user namespaces "
            f"are not permitted here: {error}{settings}"
        )


@contextmanager
def hosts(number: int, link: Link | None = None) -> Iterator[list[Host]]:
    """Create hosts that can reach each other; they exist while the body runs.

    Args:
        number: Number of hosts, 1 to 250.
        link: Link of each host to the switch; None: no limit on the rate.

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
    """Return the command line that runs `arguments` in namespaces; the command is killed when its parent ends.

    Args:
        namespaces: Folder of the namespaces under /proc, or a link to it.
        own_user: Whether to enter the user namespace too.
        arguments: The command to run.
    """
    user = [f"--user={namespaces}/user", "--preserve-credentials"] if own_user else []
    # setpriv comes after nsenter, whose change of credentials would reset the signal.
    return ["nsenter", *user, f"--net={namespaces}/net", "--", "setpriv", "--pdeathsig", "KILL", "--", *arguments]


def run_ranks(where: Sequence[Host], arguments: Sequence[str], timeout_s: float) -> list[str]:
    """Run a command as one rank on every host, like torchrun on several nodes.

    Args:
        where: Rank r runs on the r-th host; rank 0's address is the rendezvous.
        arguments: The command.
        timeout_s: After this many seconds all ranks are killed.

    Returns:
        The stderr of every rank.

    Raises:
        LabError: A rank failed; the message contains its stderr.
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
    """Run a command on every host at the same time, each with its own environment variables.

    Returns:
        The stderr of each.

    Raises:
        LabError: One failed; the message contains its stderr.
        subprocess.TimeoutExpired: One did not finish in time; all are killed.
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
        outputs = [process.communicate(timeout=timeout_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for host, process, text in zip(where, processes, outputs, strict=True):
        if process.returncode != 0:
            raise LabError(f"{host.name}: the command exited with code {process.returncode}:\n{text[-3000:]}")
    return outputs


def _needs_user_namespace() -> bool:
    """Whether this process may not create network namespaces; inside its own user namespace it may."""
    status = Path("/proc/self/status").read_text().splitlines()
    (effective,) = [int(line.split()[1], 16) for line in status if line.startswith("CapEff:")]
    return effective & _CAPABILITIES != _CAPABILITIES


@contextmanager
def _held(unshare: Sequence[str], setup: str) -> Iterator[int]:
    """Create a namespace, run a shell command in it, and keep it alive; yields the process id of its holder."""
    line = f"({setup}) && echo made && exec cat"
    # In its own session, so that an interrupt from the terminal does not end it before its counters are read.
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
                _, stderr = holder.communicate()
                raise LabError(f"{' '.join(unshare)}: {stderr.strip()}")
            yield holder.pid
        finally:
            holder.kill()


def _plug(switch: int, host: Host, port: str) -> None:
    """Connect a host to the switch."""
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
    """Limit the rate at which an interface sends.

    The burst is the amount of a few milliseconds, because the kernel may not run the queue more often, but at least a
    few frames.
    """
    bytes_per_s = rate_mbit * 1e6 / 8
    burst = max(4 * _FRAME_BYTES, int(bytes_per_s * _BURST_S))
    limit = burst + int(bytes_per_s * _QUEUE_S)
    shape = ["rate", f"{rate_mbit * 1e6:.0f}bit", "burst", f"{burst}b", "limit", f"{limit}b"]
    _run([*enter, "tc", "qdisc", "add", "dev", device, "root", "tbf", *shape])


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_FOLDERS}"}


def _run(command: Sequence[str], stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
