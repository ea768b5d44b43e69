"""Form the process group of a run; only ranks that hold the run's secret can join.

Where it sits: in a launched process, `ist/runs/open.py` calls `join` before it builds its part of the run. Secrets and
proofs are in `secret.py`, ports in `ports.py`.
Not here: the data that ranks then exchange (`ist/pools/torchrun.py`, `ist/baselines/ddp.py`).
"""

import atexit
import hashlib
import itertools
import logging
import os
import re
import secrets
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, ProcessGroup, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ist.config.runtime import Pool
from ist.data.fingerprint import ALL, DataFingerprint
from ist.distributed.environment import PRIVATE_STORE, end_with_launcher
from ist.distributed.ports import closed_afterwards, refuse_public, store_socket
from ist.distributed.secret import FILE_VARIABLE, is_proven, new_challenge, prove, run_secret, seal, unseal
from ist.distributed.start_failure import begin_start, failure_text, publish, raise_if_failed
from ist.errors import ConfigError, DataError, ISTError, PoolError, StartFailedError, first_line
from ist.network.failures import is_peer_failure

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_PROOF_TIMEOUT_S = 30.0
_POLL_S = 0.02
_MAX_CAUSE_CHARACTERS = 500
_WATCH_S = 1.0
_LINGER_S = 0.5
_LOOPBACK = "127.0.0.1"
_SOURCE_LINE = re.compile(r"\[[^\[\]]*\.(?:cc|cpp|h):\d+\] *")
"""The place in the source of gloo or torch with which some messages start."""

_published: list[str] = []
"""The keys under which this process has published why it fails, until it leaves its group."""

_hosted: dict[tuple[str, str], TCPStore] = {}
"""By host and port, the stores that this process hosts, until it ends."""


@dataclass(frozen=True)
class Membership:
    """This process's rank in the job, and how it communicates."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    start: str = ""
    """A unique id of this incarnation of the ranks; '' if the user's program formed the group."""

    @property
    def carrier(self) -> torch.device:
        """The device on which tensors must be for the backend to send them: the GPU for NCCL, the CPU for gloo."""
        return self.device if self.backend == "nccl" else torch.device("cpu")


def join(settings: Pool, device: torch.device) -> Membership:
    """Join the process group that the launcher's environment describes, or use an existing one.

    When this returns, all ranks have proven to each other that they hold the run's secret.

    Args:
        settings: The configured pool.
        device: Where this process computes: `compute_device`.

    Raises:
        ConfigError: The backend does not support the devices, there is no secret, or a public interface would be used.
        PoolError: The group could not be formed: the port is in use, a peer is missing, or a peer has another secret.
    """
    own_gpu = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
    # A single visible GPU may belong to this process alone (Slurm assigns them so): NCCL fails if it does not.
    if settings.backend == "nccl" and not own_gpu and torch.cuda.device_count() > 1:
        raise ConfigError("pool.backend is 'nccl', which needs a GPU for every process: use 'gloo' or 'auto'")
    backend = ("nccl" if own_gpu else "gloo") if settings.backend == "auto" else settings.backend
    if settings.message_buffers is not None and backend == "nccl":
        raise ConfigError(
            f"'pool.message_buffers' is {settings.message_buffers}, but every process has its own GPU, so that "
            "'pool.backend' is nccl, which sends all messages together: set 'pool.backend' to 'gloo'"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    secret = run_secret()
    if dist.is_initialized():  # by an earlier run of this process, or by the user's own program
        membership = Membership(dist.get_rank(), dist.get_world_size(), device, dist.get_backend())
        if wrong := _ranks_without(secret, membership, settings.timeout_s):
            raise PoolError(secrets_differ(membership.rank, wrong))
        return membership
    if not settings.allow_insecure:
        refuse_public(backend)
    end_with_launcher()
    membership = Membership(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, backend)
    membership = replace(membership, start=_form_group(membership, secret, settings))
    # Not at the end of the run: a process that starts another run needs the group, and cannot form it twice.
    atexit.register(leave)
    return membership


def _form_group(membership: Membership, secret: bytes, settings: Pool) -> str:
    """Form a process group of ranks that hold the secret, and return the id of this incarnation.

    While ranks connect, gloo accepts anybody who guesses a small number in place of a rank. A group with a stranger in
    it is destroyed before it carries any data, and formed again on other ports.
    """
    rank, gloo = membership.rank, membership.backend == "gloo"
    problem = ""
    with closed_afterwards() if gloo else nullcontext():  # NCCL also connects later; it recognizes peers by a number
        store = _store(membership, settings)
        start = _rendezvous(store, membership, settings.timeout_s)
        for attempt in range(_ATTEMPTS if gloo else 1):
            if problem:
                _log.warning("%s: forming the group again", problem)
            meeting = PrefixStore(f"ist/{start}/{attempt}", store)
            verdict, problem = "proven", ""
            try:
                _init_group(membership, meeting, settings.timeout_s)
                if wrong := _ranks_without(secret, membership, min(settings.timeout_s, _PROOF_TIMEOUT_S)):
                    verdict, problem = "wrong", secrets_differ(rank, wrong)
            except PoolError as error:
                verdict, problem = "stranger", str(error)
            verdicts = _exchange_verdicts(meeting, membership, verdict)
            if set(verdicts) == {"proven"}:
                return start
            met = [number for number, other in enumerate(verdicts) if other != "proven"]
            problem = problem or f"rank {rank}: rank {_listed(met)} found a peer that does not hold the run secret"
            leave()
            if "wrong" in verdicts:
                break
    raise PoolError(problem)


def _store(membership: Membership, settings: Pool) -> Store:
    """Connect to the rendezvous store: a private file, torchrun's store, or rank 0's own."""
    timeout = timedelta(seconds=settings.timeout_s)
    if PRIVATE_STORE in os.environ:
        file = FileStore(os.environ[PRIVATE_STORE], membership.world_size)
        file.set_timeout(timeout)
        return file
    host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
    hosts_it = membership.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if hosts_it and (host, port) in _hosted:  # of an earlier run of this process, whose group was closed
            _hosted[host, port].set_timeout(timeout)
            return _hosted[host, port]
        own = store_socket() if hosts_it and not settings.allow_insecure else None
        if own is not None:
            _hosted[host, port] = TCPStore(
                host, int(port), membership.world_size, is_master=True, timeout=timeout, wait_for_workers=False,
                master_listen_fd=own.detach(),
            )  # fmt: skip
            return _hosted[host, port]
        store, _, _ = next(rendezvous("env://", membership.rank, membership.world_size, timeout=timeout))
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise PoolError(f"{host}:{port} is in use by another program: set another MASTER_PORT") from error
        raise PoolError(f"could not join the process group at {host}:{port}: {first_line(error)}") from error
    made: Store = store
    return made


def host_store(world_size: int, timeout_s: float) -> tuple[str, int]:
    """Host a rendezvous store that only processes of this machine reach, for a group whose rank 0 this process will be.

    Args:
        world_size: How many processes will meet.
        timeout_s: Seconds to wait for a peer.

    Returns:
        MASTER_ADDR and MASTER_PORT for all of them.

    Raises:
        PoolError: No port can be opened.
    """
    try:
        own = socket.create_server((_LOOPBACK, 0), backlog=128)
        port = int(own.getsockname()[1])
        _hosted[_LOOPBACK, str(port)] = TCPStore(
            _LOOPBACK, port, world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
            master_listen_fd=own.detach(),
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise PoolError(f"could not open a rendezvous store at {_LOOPBACK}: {first_line(error)}") from error
    return _LOOPBACK, port


@contextmanager
def checked_by_rank_zero(settings: Pool, device: torch.device) -> Iterator[bool]:
    """Let rank 0 check a run before the ranks meet, and tell the others if it fails.

    Args:
        settings: The configured pool.
        device: Where this process computes.

    Yields:
        Whether this process checks. The others do not wait here: they hear of an error while they wait for rank 0.

    Raises:
        StartFailedError: This is another rank of an existing group, and rank 0 has failed.
    """
    if dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with _told_to_group(Membership(dist.get_rank(), dist.get_world_size(), device, dist.get_backend())) as checks:
            yield checks
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    begin_start()
    try:
        yield rank == 0
    except Exception as error:
        if rank == 0 and world_size > 1:
            with suppress(ISTError, RuntimeError):  # its own error matters more
                briefly = settings.model_copy(update={"timeout_s": min(settings.timeout_s, _PROOF_TIMEOUT_S)})
                store = _store(Membership(rank, world_size, device, "gloo"), briefly)
                publish(store, error, world_size, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
        raise


@contextmanager
def _told_to_group(membership: Membership) -> Iterator[bool]:
    """Do the work of `checked_by_rank_zero` in an existing group, in which ranks wait for each other's messages."""
    if membership.rank != 0:
        yield False
        if cause := broadcast_text(membership, ""):
            raise StartFailedError(failure_text(cause))
        return
    try:
        yield True
    except Exception as error:
        with suppress(PoolError):
            broadcast_text(membership, f"{type(error).__name__}: {first_line(error)}")
        raise
    broadcast_text(membership, "")


def _rendezvous(store: Store, membership: Membership, timeout_s: float) -> str:
    """Wait for all ranks, and return a new id for this incarnation of the ranks.

    After torchrun restarts ranks, the store still contains keys of the earlier ones. So each rank writes a fresh random
    word, rank 0 publishes the list of all words, and every rank confirms a list that contains its own word; then rank 0
    signals the start.
    """
    me, world_size = membership.rank, membership.world_size
    word, words, confirmed = secrets.token_hex(8), [""], ""
    deadline = time.monotonic() + timeout_s
    try:
        store.set(f"ist/word/{me}", word)
        while time.monotonic() < deadline:
            if me == 0:
                words = [_read(store, f"ist/word/{rank}") for rank in range(world_size)]
            else:
                raise_if_failed(store, me)
                words = _read(store, "ist/words").split(",")
            listed = ",".join(words)
            if listed != confirmed and all(words) and len(words) == world_size and words[me] == word:
                store.set("ist/words" if me == 0 else f"ist/confirmed/{me}", listed)
                confirmed = listed
            if me == 0 and confirmed == listed:
                late = [rank for rank in range(1, world_size) if _read(store, f"ist/confirmed/{rank}") != listed]
                if not late:
                    store.set("ist/begin", listed)
            if confirmed and _read(store, "ist/begin") == confirmed:
                return hashlib.sha256(confirmed.encode()).hexdigest()
            time.sleep(_POLL_S)
    except RuntimeError as error:
        raise PoolError(f"rank {me} lost the rendezvous store: {first_line(error)}") from error
    absent = [rank for rank, word_of in enumerate(words) if not word_of] if me == 0 else []
    who = f"rank {_listed(absent)}" if absent else "all ranks"
    raise PoolError(f"rank {me} timed out after {timeout_s:g} s waiting for {who} (pool.timeout_s)")


def _read(store: Store, key: str) -> str:
    return str(store.get(key).decode(errors="replace")) if store.check([key]) else ""


def _exchange_verdicts(store: Store, membership: Membership, own: str) -> list[str]:
    """Publish this rank's verdict, and return the verdicts of all ranks; a stranger can only make the start fail."""
    keys = [f"verdict/{rank}" for rank in range(membership.world_size)]
    try:
        store.set(keys[membership.rank], own)
        store.wait(keys, timedelta(seconds=2 * _PROOF_TIMEOUT_S))
        return [_read(store, key) for key in keys]
    except RuntimeError as error:
        raise PoolError(
            f"rank {membership.rank} could not learn whether all ranks hold the run secret: {first_line(error)}"
        ) from error


def _init_group(membership: Membership, store: Store, timeout_s: float) -> None:
    rank, world_size = membership.rank, membership.world_size
    try:
        dist.init_process_group(
            membership.backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise PoolError(f"rank {rank} could not join the process group: {first_line(error)}") from error


def _ranks_without(secret: bytes, membership: Membership, timeout_s: float) -> list[int]:
    """Prove the secret to the ranks that this one communicates with; return those that did not prove it in turn."""
    me, world_size = membership.rank, membership.world_size
    peers = [rank for rank in range(world_size) if rank != me and (membership.backend == "gloo" or 0 in (rank, me))]
    return unproven(secret, membership, peers, timeout_s)


def unproven(
    secret: bytes, membership: Membership, peers: Sequence[int], timeout_s: float, group: ProcessGroup | None = None
) -> list[int]:
    """Prove the secret to other ranks, and return those that did not prove it in turn.

    Args:
        secret: The run secret.
        membership: This rank.
        peers: The other ranks, which prove it at the same time.
        timeout_s: Seconds to wait for an answer.
        group: The group whose connections are used; None: the group of all ranks.

    Raises:
        PoolError: A peer does not answer.
    """
    me, world_size = membership.rank, membership.world_size
    posed = {peer: new_challenge() for peer in peers}
    with peer_errors(f"rank {me} found a peer that does not prove the run secret"):
        answered = _exchange(membership, posed, timeout_s, group)
        own = {peer: prove(secret, me, peer, world_size, answered[peer], posed[peer]) for peer in peers}
        theirs = _exchange(membership, own, timeout_s, group)
    return [
        peer for peer in peers if not is_proven(secret, peer, me, world_size, posed[peer], answered[peer], theirs[peer])
    ]


def _exchange(
    membership: Membership, outgoing: Mapping[int, bytes], timeout_s: float, group: ProcessGroup | None = None
) -> dict[int, bytes]:
    """Send 32 bytes to each of these ranks, and return the 32 bytes that each sends back."""
    where = membership.carrier
    mine = {peer: torch.frombuffer(bytearray(data), dtype=torch.uint8).to(where) for peer, data in outgoing.items()}
    theirs = {peer: torch.zeros_like(data) for peer, data in mine.items()}
    operations = [dist.P2POp(dist.isend, data, peer, group) for peer, data in mine.items()]
    operations += [dist.P2POp(dist.irecv, data, peer, group) for peer, data in theirs.items()]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait(timedelta(seconds=timeout_s))
    return {peer: data.cpu().numpy().tobytes() for peer, data in theirs.items()}


def secrets_differ(rank: int, others: Sequence[int]) -> str:
    """Return the message of a rank that finds others with another run secret."""
    return (
        f"rank {rank} and rank {_listed(others)} hold different run secrets: give all ranks the same "
        f"{FILE_VARIABLE}, or copy ~/.ist/secret from one machine to the others"
    )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def agree_on_start(
    membership: Membership,
    first_round: int,
    fingerprint: int,
    contents: tuple[DataFingerprint, DataFingerprint],
    own_data: bool = False,
    workers: Sequence[int] = (),
) -> int:
    """Check that all ranks have the same configuration and data, and return rank 0's first round.

    If the test data differ, rank 0 warns, because only rank 0 evaluates. If ranks have training data of their own, rank
    0 warns of ranks whose data are the same.

    Args:
        membership: This process.
        first_round: The first round on rank 0; the value on other ranks is ignored.
        fingerprint: A number derived from the configuration.
        contents: Summaries of the training data and of the test data.
        own_data: Whether each worker has training data of its own (`data.shard`).
        workers: The worker of each rank; its ranks must have the same data.

    Raises:
        PoolError: A rank's configuration differs from rank 0's. Every rank raises it.
        DataError: A rank's training data differ from rank 0's. Every rank raises it.
    """
    train, test = (content.to_numbers() for content in contents)
    own = torch.tensor([first_round, fingerprint, *train, *test], dtype=torch.float64, device=membership.carrier)
    gathered = [torch.empty_like(own) for _ in range(membership.world_size)]
    with peer_errors("starting together"):
        dist.all_gather(gathered, own)
    first, expected, *_ = gathered[0].tolist()
    training, testing = {}, {}
    for rank, (_, theirs, *numbers) in enumerate(numbers.tolist() for numbers in gathered):
        if theirs != expected:
            raise PoolError(f"rank {rank} has a different configuration than rank 0: give all nodes the same file")
        half = len(numbers) // 2
        training[rank] = DataFingerprint.from_numbers(numbers[:half])
        testing[rank] = DataFingerprint.from_numbers(numbers[half:])
    if own_data:
        for worker in set(workers):
            ranks = [rank for rank in training if workers[rank] == worker]
            check_data_of_worker(worker, {rank: training[rank] for rank in ranks})
        leads = {workers.index(worker) for worker in workers} if workers else set(training)
        _warn_of_same({rank: content for rank, content in training.items() if rank in leads}, membership)
    elif differing := _differing(training, "training"):
        raise DataError(
            f"{differing}: every process must load the same full data set, which IST shards among workers. Load it "
            "from a file, or seed the code that generates it. If each worker has data of its own on purpose, set "
            "'data.shard' to 'own' (shard='own' in Python)"
        )
    with_data = {rank: content for rank, content in testing.items() if content.count}
    if membership.rank == 0 and 0 in with_data and (differing := _differing(with_data, "test")):
        warnings.warn(f"{differing}: only rank 0 evaluates, on its own test data", stacklevel=2)
    return int(first)


def check_data_of_worker(worker: int, training: Mapping[int, DataFingerprint]) -> None:
    """Check that the ranks of a worker that has data of its own have loaded the same.

    Args:
        worker: The number of the worker.
        training: Summaries of the training data, by rank.

    Raises:
        DataError: They have not.
    """
    if differing := _differing(training, "training"):
        raise DataError(
            f"{differing}, but both are ranks of worker {worker} ('pool.ranks_per_worker'): all ranks of a "
            "worker must load the same data"
        )


def _warn_of_same(training: Mapping[int, DataFingerprint], membership: Membership) -> None:
    with_data = {rank: content for rank, content in training.items() if content.count}
    for (one, mine), (other, theirs) in itertools.combinations(with_data.items(), 2):
        if membership.rank == 0 and mine.count == theirs.count and mine.first_different_item(theirs) is None:
            warnings.warn(
                f"ranks {one} and {other} have loaded the same {mine.count} training samples, but 'data.shard' is "
                "'own': each should load its own, by its argument 'worker' or by files of its own",
                stacklevel=3,
            )
            return


def _differing(contents: Mapping[int, DataFingerprint], which: str) -> str:
    """Describe which ranks have other data than the first one, and the first difference; '' if none has."""
    lead, first = next(iter(contents.items()))
    counts = {rank: theirs.count for rank, theirs in contents.items() if theirs.count != first.count}
    if counts:
        rank, count = next(iter(counts.items()))
        return f"rank {rank} has {count} {which} samples, rank {lead} has {first.count}"
    items = {rank: first.first_different_item(theirs) for rank, theirs in contents.items()}
    apart = [rank for rank, item in items.items() if item is not None]
    if not apart:
        return ""
    compared = _listed(sorted(set(first.indices) - {ALL}))
    what = f"sample {items[apart[0]]} differs" if items[apart[0]] != ALL else "samples differ that are in memory"
    theirs = f"the {which} data of rank {_listed(apart)}"
    return f"{theirs} differ from those of rank {lead}: {what} (compared samples {compared})"


def broadcast_bytes(membership: Membership, data: Tensor) -> Tensor:
    """Return rank 0's bytes (uint8) on every rank, on the backend's device; other ranks' data is ignored."""
    data = data.to(membership.carrier)
    size = torch.tensor([len(data)], device=membership.carrier)
    dist.broadcast(size, src=0)
    if membership.rank != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=membership.carrier)
    dist.broadcast(data, src=0)
    return data


def broadcast_text(membership: Membership, text: str) -> str:
    """Return rank 0's text on every rank; other ranks' text is ignored."""
    with peer_errors("starting together"):
        data = broadcast_bytes(membership, torch.tensor(list(text.encode()), dtype=torch.uint8))
    return bytes(data.tolist()).decode()


def gather_texts(membership: Membership, text: str) -> list[str]:
    """Return the texts of all ranks, on every rank, in the order of the ranks.

    Raises:
        PoolError: A peer is lost.
    """
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=membership.carrier)
    with peer_errors(f"rank {membership.rank} lost a peer between two rounds"):
        sizes = [torch.empty(1, dtype=torch.int64, device=membership.carrier) for _ in range(membership.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=membership.carrier))
        padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8, device=membership.carrier)
        padded[: len(mine)] = mine
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded)
    return [bytes(found[: int(size)].tolist()).decode() for found, size in zip(texts, sizes, strict=True)]


def broadcast_flag(membership: Membership, flag: bool) -> bool:
    """Return rank 0's flag on every rank; other ranks' flag is ignored.

    Raises:
        PoolError: A peer is lost.
    """
    sent = torch.tensor([flag], dtype=torch.uint8, device=membership.carrier)
    with peer_errors(f"rank {membership.rank} lost a peer between two rounds"):
        dist.broadcast(sent, src=0)
        return bool(sent.item())


def leave() -> None:
    """Close this process's group; the other ranks then learn at once that it is gone."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if _hosted and _published:  # a store of this process ends with it: let the others read first
        time.sleep(_LINGER_S)
    _published.clear()


@contextmanager
def peer_errors(what: str) -> Iterator[None]:
    """Turn the failure of a peer into a `PoolError` that starts with `what`; let other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        message = _SOURCE_LINE.sub("", first_line(error)).partition(" This may indicate")[0]
        if "imed out" in message or "imeout" in message:
            message = f"no answer within pool.timeout_s ({message})"
        raise PoolError(f"{what}: {message}") from error


@contextmanager
def failures_published(membership: Membership) -> Iterator[None]:
    """Publish the error of a rank that fails, so that ranks that only lose a peer can report the cause.

    Strangers may write to torchrun's store, so each published error carries a proof; others are ignored.

    Raises:
        PoolError: A peer is gone; the message is the peer's own error, if it published one.
    """
    store = dist.distributed_c10d._get_default_store()
    secret = run_secret()
    keys = _cause_keys(membership)
    with suppress(RuntimeError):  # a rank must not fail because it cannot publish
        store.set(keys[membership.rank], "")  # clear a value from an earlier run of these processes
    try:
        yield
    except PoolError as error:
        if not (cause := _published_cause(store, keys, secret)):
            raise
        raise type(error)(cause) from error
    except Exception as error:
        with suppress(RuntimeError):
            key = keys[membership.rank]
            store.set(key, seal(secret, key, f"{type(error).__name__}: {first_line(error)}"))
            _published.append(key)
        raise


class PeerWatch:
    """Looks, now and then, whether another rank has published that it failed.

    Args:
        membership: This rank.
    """

    def __init__(self, membership: Membership) -> None:
        self._keys = _cause_keys(membership)
        self._secret = run_secret()
        self._next = time.monotonic() + _WATCH_S

    def is_over(self) -> bool:
        """Return False: this rank's round is never continued without it.

        Raises:
            PoolError: Another rank has failed; the message is that rank's error.
        """
        if time.monotonic() < self._next or not dist.is_initialized():
            return False
        self._next = time.monotonic() + _WATCH_S
        if cause := _published_cause(dist.distributed_c10d._get_default_store(), self._keys, self._secret):
            raise PoolError(cause)
        return False


def _cause_keys(membership: Membership) -> list[str]:
    return [f"ist/cause/{membership.start}/{rank}" for rank in range(membership.world_size)]


def _published_cause(store: Store, keys: Sequence[str], secret: bytes) -> str:
    """Return the error of the lowest rank that published one; '' if none did."""
    with suppress(RuntimeError):  # the store may be gone with rank 0
        for rank, key in enumerate(keys):
            if cause := unseal(secret, key, _read(store, key)):
                text = "".join(letter if letter.isprintable() else " " for letter in cause[:_MAX_CAUSE_CHARACTERS])
                return f"rank {rank} failed: {text}"
    return ""
