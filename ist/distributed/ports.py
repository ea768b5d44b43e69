"""The ports of a rank: refuse public interfaces, and close ports once all ranks are connected.

Where it sits: `ist/distributed/process_group.py` calls `refuse_public` before it forms the process group, and forms the
group inside `closed_afterwards`.
Not here: ports that torchrun opens before a rank runs. SECURITY.md lists what remains exposed.
"""

import ctypes
import ipaddress
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ist.distributed.environment import PRIVATE_STORE
from ist.errors import ConfigError

_SO_ATTACH_FILTER = 26
_SIOCGIFCONF = 0x8912
_RECORD_BYTES = 40  # struct ifreq: name, 16 bytes; family and port, 4; IPv4 address, 4


@dataclass(frozen=True)
class Listener:
    """An address on which this rank, or torchrun for this rank, will listen.

    Attributes:
        what: What listens, and why there; the beginning of a sentence.
        interface: Name of the network interface; '' if unknown.
        address: The address.
        remedy: How to make it listen elsewhere.
    """

    what: str
    interface: str
    address: str
    remedy: str


def refuse_public(backend: str) -> None:
    """Check that this rank will not listen on a public address.

    Args:
        backend: 'gloo' or 'nccl'.

    Raises:
        ConfigError: It would; the message names the address and the interface.
    """
    for listener in listeners(backend):
        if is_public(listener.address):
            where = f"{listener.interface} ({listener.address})" if listener.interface else listener.address
            raise ConfigError(
                f"{listener.what} on {where}, a public address: {listener.remedy}, or pass --allow-insecure "
                "(pool.allow_insecure: true) if a firewall lets only this run's machines connect"
            )


def is_public(address: str) -> bool:
    """Return whether an address belongs to the public internet, judged by the address alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_global


def listeners(backend: str) -> list[Listener]:
    """Return the addresses on which this rank, or torchrun for it, listens while the group is formed."""
    variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    wanted = [name for name in os.environ.get(variable, "").split(",") if name]
    exposed = _gloo_addresses(wanted) if backend == "gloo" else _nccl_addresses(wanted)
    remedy = f"name an interface with a private address in {variable}"
    found = [Listener(f"{backend} would listen", *where, remedy) for where in exposed]
    if PRIVATE_STORE in os.environ:
        return found
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("GROUP_RANK") == "0":
            what = "torchrun's rendezvous store listens on all interfaces of this machine, so"
            remedy = (
                "start torchrun on machines without a public address (on a single machine, use ist train without "
                "torchrun)"
            )
            found += [Listener(what, *where, remedy) for where in addresses()]
    elif os.environ.get("RANK") == "0":
        remedy = "set MASTER_ADDR to a private address of this machine"
        own = _store_address()
        where_to = addresses() if own is None else [("", own)]
        found += [Listener("the rendezvous store would listen", *where, remedy) for where in where_to]
    return found


def addresses() -> list[tuple[str, str]]:
    """Return (interface, address) for every address of this machine that the system reports."""
    if sys.platform != "linux":
        return [("", address) for address in _resolved(socket.gethostname())]
    import fcntl

    buffer = ctypes.create_string_buffer(_RECORD_BYTES * 1024)
    request = struct.pack("iL", len(buffer), ctypes.addressof(buffer))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        size = struct.unpack("iL", fcntl.ioctl(asked, _SIOCGIFCONF, request))[0]
    records = [buffer.raw[start : start + _RECORD_BYTES] for start in range(0, size, _RECORD_BYTES)]
    found = [(record[:16].rstrip(b"\0").decode(), socket.inet_ntoa(record[20:24])) for record in records]
    sixes = Path("/proc/net/if_inet6")
    for line in sixes.read_text().splitlines() if sixes.exists() else []:
        digits, *_, name = line.split()
        found.append((name, str(ipaddress.IPv6Address(int(digits, 16)))))
    return found


def store_socket() -> socket.socket | None:
    """Return a socket that listens on MASTER_ADDR and MASTER_PORT only.

    Returns:
        None if that is not possible: MASTER_ADDR is not an address of this machine (a forwarded one), or is the
        loopback address of a host name that other machines resolve differently.

    Raises:
        OSError: The port is in use.
    """
    address, port = _store_address(), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        return None
    return socket.create_server((address, int(port)), family=_family(address), backlog=128)


def loopback_interface() -> str | None:
    """Return the name of the network interface that other machines cannot reach; None if it has another name."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


@contextmanager
def closed_afterwards() -> Iterator[None]:
    """Close ports that the body opens when the body ends: later connections get no answer. Linux only.

    Gloo accepts any connection for the lifetime of the process, and ends the process if file descriptors run out. Once
    all ranks are connected, nobody else needs to connect; open connections stay open. Until then, the limit on file
    descriptors is raised to the system's maximum.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    before = {number for number, _ in _listening()}
    try:
        yield
    finally:
        for number, listener in _listening():
            if number not in before:
                _drop_everything(listener)


def _listening() -> Iterator[tuple[int, socket.socket]]:
    """Yield the inode and a duplicate (closed afterwards) of every TCP socket on which this process listens."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed in the meantime, or not a socket
            status = os.fstat(int(descriptor.name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as found:
                inet = found.family in (socket.AF_INET, socket.AF_INET6)
                if inet and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield status.st_ino, found


def _drop_everything(listener: socket.socket) -> None:
    """Make the kernel drop every packet for a listening socket; its owner does not notice, connections stay open."""
    program = struct.pack("HBBI", 0x06, 0, 0, 0)  # one instruction of the packet filter: accept 0 bytes of the packet
    buffer = ctypes.create_string_buffer(program, len(program))
    with suppress(OSError):  # a sandbox may forbid packet filters: then the port stays open, as SECURITY.md says
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(buffer)))


def _gloo_addresses(wanted: list[str]) -> list[tuple[str, str]]:
    """The first address of each named interface; without names, the first local address of the host name."""
    if wanted:
        by_name = dict(reversed(addresses()))
        return [(name, by_name[name]) for name in wanted if name in by_name]
    return [("", address) for address in _resolved(socket.gethostname()) if _is_here(address)][:1]


def _nccl_addresses(wanted: list[str]) -> list[tuple[str, str]]:
    """Interfaces selected by NCCL's rules: a name is a prefix, '=name' is exact, '^name' excludes."""
    if not wanted or wanted[0].startswith("^"):
        return addresses()
    return [
        (name, address)
        for name, address in addresses()
        if any(name == want[1:] if want.startswith("=") else name.startswith(want) for want in wanted)
    ]


def _store_address() -> str | None:
    host = os.environ.get("MASTER_ADDR")
    found = _resolved(host) if host else []
    certain = host in ("localhost", *found) or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not certain and any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        return None
    return next((address for address in found if _is_here(address)), None)


def _resolved(host: str) -> list[str]:
    with suppress(OSError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))
    return []


def _is_here(address: str) -> bool:
    with closing(socket.socket(_family(address), socket.SOCK_STREAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
