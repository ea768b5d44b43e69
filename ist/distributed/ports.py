"""The ports of a rank: on which interfaces it listens, and shut as soon as everybody is there.

Where it sits: `ist/distributed/process_group.py` asks here before it forms the process group, and forms it inside
`briefly_open`.
Not here: ports that torchrun opens before a rank runs. What remains exposed is in SECURITY.md.
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
class Door:
    """Where something of this rank can be reached.

    Attributes:
        what: What listens, and why there; the beginning of a sentence.
        interface: Name of the network interface, or '' where it is not known.
        address: Its address.
        remedy: How to have it listen elsewhere.
    """

    what: str
    interface: str
    address: str
    remedy: str


def refuse_public(backend: str) -> None:
    """See to it that this rank will not listen where anybody can connect.

    Args:
        backend: 'gloo' or 'nccl'.

    Raises:
        ConfigError: It would; the message names address and interface.
    """
    for door in doors(backend):
        if is_public(door.address):
            where = f"{door.interface} ({door.address})" if door.interface else door.address
            raise ConfigError(
                f"{door.what} on {where}, a public address: {door.remedy}, or pass --allow-insecure "
                "(pool.allow_insecure: true) where a firewall lets only this run's machines connect"
            )


def is_public(address: str) -> bool:
    """Return whether an address is reachable from the whole internet, as far as the address tells."""
    return ipaddress.ip_address(address.partition("%")[0]).is_global


def doors(backend: str) -> list[Door]:
    """Return where this rank, and torchrun on its behalf, will listen while the group is formed."""
    variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    wanted = [name for name in os.environ.get(variable, "").split(",") if name]
    exposed = _gloo_addresses(wanted) if backend == "gloo" else _nccl_addresses(wanted)
    remedy = f"name an interface with a private address in {variable}"
    found = [Door(f"{backend} would listen", *where, remedy) for where in exposed]
    if PRIVATE_STORE in os.environ:
        return found
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("GROUP_RANK") == "0":
            what = "torchrun's rendezvous store listens on all interfaces of this machine, so"
            remedy = "start torchrun on machines without one (on a single machine, use ist train without torchrun)"
            found += [Door(what, *where, remedy) for where in addresses()]
    elif os.environ.get("RANK") == "0":
        remedy = "let MASTER_ADDR be a private address of this machine"
        own = _store_address()
        where_to = addresses() if own is None else [("", own)]
        found += [Door("the rendezvous store would listen", *where, remedy) for where in where_to]
    return found


def addresses() -> list[tuple[str, str]]:
    """Return (interface, address) for every address of this machine, as far as the system tells."""
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
    """Return a socket that listens at MASTER_ADDR and MASTER_PORT, and nowhere else.

    Returns:
        None where that is not possible: it is no address of this machine (a forwarded one), or it is the loopback of a
        host name that other machines resolve otherwise.

    Raises:
        OSError: The port is in use.
    """
    address, port = _store_address(), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        return None
    return socket.create_server((address, int(port)), family=_family(address), backlog=128)


@contextmanager
def briefly_open() -> Iterator[None]:
    """Shut the ports that are opened in the body, at its end: later connections get no answer.

    Gloo accepts whoever connects for as long as the process lives, and ends the process when it has no file
    descriptors left. Nobody has to connect once all ranks are there; what is connected stays so. The number of
    descriptors is raised to what the system permits, for those who connect until then. Only on Linux.
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
    """Yield the inode and a copy, closed afterwards, of every TCP socket on which this process listens."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or not asked this way
            status = os.fstat(int(descriptor.name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as found:
                inet = found.family in (socket.AF_INET, socket.AF_INET6)
                if inet and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield status.st_ino, found


def _drop_everything(listener: socket.socket) -> None:
    """Have the kernel drop every packet for a listening socket; its owner need not know, and connections stay."""
    program = struct.pack("HBBI", 0x06, 0, 0, 0)  # one instruction of the packet filter: return 0 bytes of it
    held = ctypes.create_string_buffer(program, len(program))
    with suppress(OSError):  # a sandbox may not have packet filters: then the port stays open, as SECURITY.md says
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(held)))


def _gloo_addresses(wanted: list[str]) -> list[tuple[str, str]]:
    """The first address of each interface; without names, the first address of the host name that is this machine's."""
    if wanted:
        by_name = dict(reversed(addresses()))
        return [(name, by_name[name]) for name in wanted if name in by_name]
    return [("", address) for address in _resolved(socket.gethostname()) if _is_here(address)][:1]


def _nccl_addresses(wanted: list[str]) -> list[tuple[str, str]]:
    """Interfaces that begin with one of the names, or '=name' for one, '^name' for all but those."""
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
