"""Form the process group of a run, of ranks that hold its secret and nobody else.

Where it sits: `ist/runs/open.py` has a launched process join here, before it builds its part of the run. Secrets and
proofs are in `secret.py`, ports in `ports.py`.
Not here: what the ranks then send each other (`ist/pools/torchrun.py`, `ist/baselines/ddp.py`).
"""

import atexit
import hashlib
import logging
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ist.config.schema import Pool
from ist.data.content import Content
from ist.distributed.device import compute_device
from ist.distributed.environment import PRIVATE_STORE, end_with_launcher
from ist.distributed.ports import briefly_open, refuse_public, store_socket
from ist.distributed.secret import FILE_VARIABLE, is_proven, new_challenge, opened, prove, run_secret, seal
from ist.errors import ConfigError, DataError, PoolError, first_line
from ist.network.failures import is_peer_failure

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_PROOF_TIMEOUT_S = 30.0
_POLL_S = 0.02
_MOST_TOLD = 500


@dataclass(frozen=True)
class Membership:
    """This process's place in the job."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    start: str = ""
    """A name of this start of the ranks that no other start has; '' where the user's own program formed the group."""

    @property
    def carrier(self) -> torch.device:
        """Where tensors must lie for the backend to carry them: NCCL's on the GPU, gloo's on the CPU."""
        return self.device if self.backend == "nccl" else torch.device("cpu")


def join(settings: Pool) -> Membership:
    """Join the process group that the launcher's environment describes, or use the one that is there.

    Either way all ranks have proven to each other that they hold the run's secret when this returns.

    Raises:
        ConfigError: The backend does not fit the devices, there is no secret, or a public interface would be used.
        PoolError: The group could not be formed: the port is in use, a peer did not come, or holds another secret.
    """
    device = compute_device(settings)
    own_gpu = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
    # With one visible GPU it may be this process's own, as Slurm hands them out: NCCL will tell.
    if settings.backend == "nccl" and not own_gpu and torch.cuda.device_count() > 1:
        raise ConfigError("pool.backend is 'nccl', which needs a GPU for every process: use 'gloo' or 'auto'")
    backend = ("nccl" if own_gpu else "gloo") if settings.backend == "auto" else settings.backend
    if device.type == "cuda":
        torch.cuda.set_device(device)
    secret = run_secret()
    if dist.is_initialized():  # by an earlier run of this process, or by the user's own program
        membership = Membership(dist.get_rank(), dist.get_world_size(), device, dist.get_backend())
        if wrong := _ranks_without(secret, membership, settings.timeout_s):
            raise PoolError(_differ(membership.rank, wrong))
        return membership
    if not settings.allow_insecure:
        refuse_public(backend)
    end_with_launcher()
    membership = Membership(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, backend)
    membership = replace(membership, start=_form_group(membership, secret, settings))
    # Not when the run ends: a process that runs another one needs the group, and cannot form it twice.
    atexit.register(_leave)
    return membership


def _form_group(membership: Membership, secret: bytes, settings: Pool) -> str:
    """Form a process group of ranks that hold the secret, and return the name of this start.

    Gloo gives a rank's place to whoever connects and guesses a small number in the moment when ranks connect. A group
    with a stranger in it is given up before it carries anything, and formed anew at other ports.
    """
    rank, gloo = membership.rank, membership.backend == "gloo"
    problem = ""
    with briefly_open() if gloo else nullcontext():  # NCCL connects later too, and tells strangers by a random number
        store = _store(membership, settings)
        start = _meet(store, membership, settings.timeout_s)
        for attempt in range(_ATTEMPTS if gloo else 1):
            if problem:
                _log.warning("%s: forming the group anew", problem)
            meeting = PrefixStore(f"ist/{start}/{attempt}", store)
            verdict, problem = "proven", ""
            try:
                _init_group(membership, meeting, settings.timeout_s)
                if wrong := _ranks_without(secret, membership, min(settings.timeout_s, _PROOF_TIMEOUT_S)):
                    verdict, problem = "wrong", _differ(rank, wrong)
            except PoolError as error:
                verdict, problem = "stranger", str(error)
            verdicts = _verdicts(meeting, membership, verdict)
            if set(verdicts) == {"proven"}:
                return start
            met = [number for number, said in enumerate(verdicts) if said != "proven"]
            problem = problem or f"rank {rank} heard that rank {_listed(met)} met one that does not hold the run secret"
            _leave()
            if "wrong" in verdicts:
                break
    raise PoolError(problem)


def _store(membership: Membership, settings: Pool) -> Store:
    """Reach the place where ranks find each other: a private file, torchrun's store, or rank 0's own."""
    timeout = timedelta(seconds=settings.timeout_s)
    if PRIVATE_STORE in os.environ:
        file = FileStore(os.environ[PRIVATE_STORE], membership.world_size)
        file.set_timeout(timeout)
        return file
    host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
    hosts_it = membership.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        own = store_socket() if hosts_it and not settings.allow_insecure else None
        if own is not None:
            return TCPStore(
                host, int(port), membership.world_size, is_master=True, timeout=timeout, wait_for_workers=False,
                master_listen_fd=own.detach(),
            )  # fmt: skip
        store, _, _ = next(rendezvous("env://", membership.rank, membership.world_size, timeout=timeout))
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise PoolError(f"{host}:{port} is in use by another program: set another MASTER_PORT") from error
        raise PoolError(f"could not join the process group at {host}:{port}: {first_line(error)}") from error
    made: Store = store
    return made


def _meet(store: Store, membership: Membership, timeout_s: float) -> str:
    """Wait until all ranks have come, and return a name for this start that no earlier one had.

    When torchrun starts ranks anew, the store still holds what those before them said. So each rank says a fresh word,
    rank 0 repeats all of them, and every rank confirms the list that holds its own; then rank 0 has all begin.
    """
    me, world_size = membership.rank, membership.world_size
    word, words, confirmed = secrets.token_hex(8), [""], ""
    deadline = time.monotonic() + timeout_s
    try:
        store.set(f"ist/word/{me}", word)
        while time.monotonic() < deadline:
            if me == 0:
                words = [_heard(store, f"ist/word/{rank}") for rank in range(world_size)]
            else:
                words = _heard(store, "ist/words").split(",")
            heard = ",".join(words)
            if heard != confirmed and all(words) and len(words) == world_size and words[me] == word:
                store.set("ist/words" if me == 0 else f"ist/confirmed/{me}", heard)
                confirmed = heard
            if me == 0 and confirmed == heard:
                late = [rank for rank in range(1, world_size) if _heard(store, f"ist/confirmed/{rank}") != heard]
                if not late:
                    store.set("ist/begin", heard)
            if confirmed and _heard(store, "ist/begin") == confirmed:
                return hashlib.sha256(confirmed.encode()).hexdigest()
            time.sleep(_POLL_S)
    except RuntimeError as error:
        raise PoolError(f"rank {me} lost the rendezvous store: {first_line(error)}") from error
    absent = [rank for rank, said in enumerate(words) if not said] if me == 0 else []
    who = f"rank {_listed(absent)}" if absent else "all ranks"
    raise PoolError(f"rank {me} waited {timeout_s:g} s (pool.timeout_s) for {who} in vain")


def _heard(store: Store, key: str) -> str:
    return str(store.get(key).decode(errors="replace")) if store.check([key]) else ""


def _verdicts(store: Store, membership: Membership, own: str) -> list[str]:
    """Tell all ranks this one's verdict, and return theirs; strangers at the store can only end a start."""
    keys = [f"verdict/{rank}" for rank in range(membership.world_size)]
    try:
        store.set(keys[membership.rank], own)
        store.wait(keys, timedelta(seconds=2 * _PROOF_TIMEOUT_S))
        return [_heard(store, key) for key in keys]
    except RuntimeError as error:
        raise PoolError(
            f"rank {membership.rank} does not know whether all ranks hold the run secret: {first_line(error)}"
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
    """Prove the secret to the ranks that this one will talk to, and return those that did not prove it in turn."""
    me, world_size = membership.rank, membership.world_size
    peers = [rank for rank in range(world_size) if rank != me and (membership.backend == "gloo" or 0 in (rank, me))]
    posed = {peer: new_challenge() for peer in peers}
    with peer_errors(f"rank {me} found a peer that does not prove the run secret"):
        answered = _swap(membership, posed, timeout_s)
        own = {peer: prove(secret, me, peer, world_size, answered[peer], posed[peer]) for peer in peers}
        theirs = _swap(membership, own, timeout_s)
    return [
        peer for peer in peers if not is_proven(secret, peer, me, world_size, posed[peer], answered[peer], theirs[peer])
    ]


def _swap(membership: Membership, outgoing: Mapping[int, bytes], timeout_s: float) -> dict[int, bytes]:
    """Send 32 bytes to each of some ranks, and return the 32 bytes that each sends."""
    where = membership.carrier
    mine = {peer: torch.frombuffer(bytearray(data), dtype=torch.uint8).to(where) for peer, data in outgoing.items()}
    theirs = {peer: torch.zeros_like(data) for peer, data in mine.items()}
    operations = [dist.P2POp(dist.isend, data, peer) for peer, data in mine.items()]
    operations += [dist.P2POp(dist.irecv, data, peer) for peer, data in theirs.items()]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait(timedelta(seconds=timeout_s))
    return {peer: data.cpu().numpy().tobytes() for peer, data in theirs.items()}


def _differ(rank: int, others: Sequence[int]) -> str:
    return (
        f"rank {rank} and rank {_listed(others)} hold different run secrets: give all ranks the same "
        f"{FILE_VARIABLE}, or copy ~/.ist/secret from one machine to the others"
    )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def agree_on_start(
    membership: Membership, first_round: int, fingerprint: int, contents: tuple[Content, Content]
) -> int:
    """Return the first round as rank 0 knows it, after checking that all ranks run the same configuration and data.

    Warns on rank 0 of test data that are not the same: rank 0 alone evaluates.

    Args:
        membership: This process.
        first_round: Where rank 0 begins; other ranks' value does not matter.
        fingerprint: A number made of the configuration.
        contents: What the training data and the test data hold.

    Raises:
        PoolError: A rank's configuration is not rank 0's. Every rank raises it.
        DataError: A rank's training data are not rank 0's. Every rank raises it.
    """
    train, test = (content.to_numbers() for content in contents)
    own = torch.tensor([first_round, fingerprint, *train, *test], dtype=torch.float64, device=membership.carrier)
    said = [torch.empty_like(own) for _ in range(membership.world_size)]
    with peer_errors("starting together"):
        dist.all_gather(said, own)
    first, expected, *_ = said[0].tolist()
    training, testing = {}, {}
    for rank, (_, theirs, *numbers) in enumerate(numbers.tolist() for numbers in said):
        if theirs != expected:
            raise PoolError(f"rank {rank} runs another configuration than rank 0: give all nodes the same file")
        half = len(numbers) // 2
        training[rank] = Content.from_numbers(numbers[:half])
        testing[rank] = Content.from_numbers(numbers[half:])
    if differing := _differing(training, "training"):
        raise DataError(
            f"{differing}: every process must load the same whole data set, which is dealt to workers here. Load it "
            "from a file, or seed what makes it"
        )
    there = {rank: content for rank, content in testing.items() if content.count}
    if membership.rank == 0 and 0 in there and (differing := _differing(there, "test")):
        warnings.warn(f"{differing}: rank 0 alone evaluates, on its own", stacklevel=2)
    return int(first)


def _differing(contents: Mapping[int, Content], which: str) -> str:
    """Say which ranks have loaded other data than rank 0, and what differs first; nothing where none has."""
    first = contents[0]
    counts = {rank: theirs.count for rank, theirs in contents.items() if theirs.count != first.count}
    if counts:
        rank, count = next(iter(counts.items()))
        return f"rank {rank} has {count} {which} samples, rank 0 has {first.count}"
    items = {rank: first.other_item(theirs) for rank, theirs in contents.items()}
    apart = [rank for rank, item in items.items() if item is not None]
    if not apart:
        return ""
    looked_at = _listed(sorted(set(first.indices)))
    return (
        f"the {which} data of rank {_listed(apart)} are not those of rank 0: sample {items[apart[0]]} is another one "
        f"(samples {looked_at} were compared)"
    )


def broadcast_bytes(membership: Membership, data: Tensor) -> Tensor:
    """Return rank 0's bytes, uint8, on every rank, where the backend carries them; other ranks' own do not matter."""
    data = data.to(membership.carrier)
    size = torch.tensor([len(data)], device=membership.carrier)
    dist.broadcast(size, src=0)
    if membership.rank != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=membership.carrier)
    dist.broadcast(data, src=0)
    return data


def tell(membership: Membership, text: str) -> str:
    """Return rank 0's text on every rank; other ranks' own do not matter."""
    with peer_errors("starting together"):
        data = broadcast_bytes(membership, torch.tensor(list(text.encode()), dtype=torch.uint8))
    return bytes(data.tolist()).decode()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def peer_errors(what: str) -> Iterator[None]:
    """Turn the failure of a peer into a `PoolError` that says what was going on; let other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        said = first_line(error)
        if "imed out" in said or "imeout" in said:
            said = f"no answer within pool.timeout_s ({said})"
        raise PoolError(f"{what}: {said}") from error


@contextmanager
def causes_told(membership: Membership) -> Iterator[None]:
    """Let all ranks know why one of them fails, so that those who only lose a peer can say what has happened to it.

    A stranger may write to torchrun's store: what is told carries a proof, and anything else is passed over.

    Raises:
        PoolError: A peer is gone; the message is what it has told, where it could.
    """
    store = dist.distributed_c10d._get_default_store()
    secret = run_secret()
    keys = [f"ist/cause/{membership.start}/{rank}" for rank in range(membership.world_size)]
    with suppress(RuntimeError):  # a rank must not fail because it cannot tell why
        store.set(keys[membership.rank], "")  # what an earlier run of these processes may have left
    try:
        yield
    except PoolError as error:
        if not (told := _told(store, keys, secret)):
            raise
        raise type(error)(told) from error
    except Exception as error:
        with suppress(RuntimeError):
            key = keys[membership.rank]
            store.set(key, seal(secret, key, f"{type(error).__name__}: {first_line(error)}"))
        raise


def _told(store: Store, keys: Sequence[str], secret: bytes) -> str:
    """Return what the first rank has told that knows why it failed; nothing where none has."""
    with suppress(RuntimeError):  # the store may be gone with rank 0
        for rank, key in enumerate(keys):
            if cause := opened(secret, key, _heard(store, key)):
                text = "".join(letter if letter.isprintable() else " " for letter in cause[:_MOST_TOLD])
                return f"rank {rank} failed: {text}"
    return ""
