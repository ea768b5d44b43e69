"""The ranks that together are one worker (`pool.ranks_per_worker`), and their process group.

The first of them, the lead, exchanges the worker's messages with the coordinator. The others get them from the lead,
over the links inside a node. Under torchrun, the group of a worker is part of the process group of all ranks; on Ray,
the actors of a worker, which are on one node, form one of their own.
Where it sits: `ist/runs/open.py` forms the groups after the process group, and `ist/pools/ray_actor.py` that of a
bundle of actors; the pools pass messages on, and `ist/loops/inside.py` trains a subnet on all ranks of a worker.
Not here: the process group of all ranks (`ist/distributed/process_group.py`).
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ist.config.runtime import Pool
from ist.config.schema import Config, lead_rank, ranks_per_worker, worker_of
from ist.data.fingerprint import DataFingerprint
from ist.distributed.ports import closed_afterwards, loopback_interface
from ist.distributed.process_group import (
    Membership,
    check_data_of_worker,
    host_store,
    join,
    peer_errors,
    secrets_differ,
    unproven,
)
from ist.distributed.secret import SECRET_VARIABLE, new_secret, run_secret
from ist.errors import PoolError


@dataclass(frozen=True)
class WorkerGroup:
    """The ranks of one worker, as one of them sees them.

    Attributes:
        group: Their process group.
        lead: The rank, in the process group that this process has joined, of the first of them.
        rank: The number of this process among them, from 0.
        size: How many they are.
        device: The device of this process.
        carrier: The device on which a tensor must be for the backend to send it.
        backend: 'gloo' or 'nccl'.
    """

    group: ProcessGroup
    lead: int
    rank: int
    size: int
    device: torch.device
    carrier: torch.device
    backend: str

    @property
    def is_lead(self) -> bool:
        """Whether this process exchanges the worker's messages with the coordinator."""
        return self.rank == 0

    def broadcast(self, flat: Tensor) -> None:
        """Overwrite a tensor by the lead's.

        Raises:
            PoolError: A peer is lost.
        """
        with peer_errors(f"rank {self.lead + self.rank} lost a rank of its worker"):
            dist.broadcast(flat, src=self.lead, group=self.group)

    def agreed(self, flag: bool) -> bool:
        """Return the lead's flag on every rank.

        Raises:
            PoolError: A peer is lost.
        """
        sent = torch.tensor([flag], dtype=torch.uint8, device=self.carrier)
        self.broadcast(sent)
        return bool(sent.item())

    def check_data(self, worker: int, content: DataFingerprint) -> None:
        """Check that the ranks have loaded the same data of their worker.

        Args:
            worker: The number of the worker.
            content: The summary of the data of this process.

        Raises:
            DataError: They have not; every rank raises it.
            PoolError: A peer is lost.
        """
        found = map(DataFingerprint.from_numbers, self.gather(content.to_numbers()))
        check_data_of_worker(worker, dict(enumerate(found, self.lead)))

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every rank of the worker, in the order of ranks; each gives as many.

        Raises:
            PoolError: A peer is lost.
        """
        own = torch.tensor(numbers, dtype=torch.float64, device=self.carrier)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        with peer_errors(f"rank {self.lead + self.rank} lost a rank of its worker"):
            dist.all_gather(gathered, own, group=self.group)
            return [numbers.tolist() for numbers in gathered]


_formed: dict[tuple[int, int], tuple[ProcessGroup, list[ProcessGroup]]] = {}
"""By first rank and number of ranks of a worker: the process group of all ranks, and the groups of the workers in it.

They live as long as the process group. A run that follows in the same processes uses them again, because PyTorch's
sharded tensors remember the group of a mesh."""


def worker_group(config: Config, membership: Membership) -> WorkerGroup | None:
    """Return the group of this process's worker; all ranks of the run call it together.

    A group carries data only after its ranks have proven to each other that they hold the run secret.

    Args:
        config: The run, with the number of workers that the processes allow.
        membership: This rank.

    Returns:
        The group; None if workers have one rank each, and for a dedicated coordinator.

    Raises:
        PoolError: The groups cannot be formed, or a peer holds another secret.
    """
    ranks, first = ranks_per_worker(config), lead_rank(config, 0)
    if ranks == 1:
        return None
    everybody, groups = _formed.get((first, ranks), (None, []))
    if everybody is not dist.group.WORLD:
        groups = _form(config, membership)
        everybody = dist.group.WORLD
        assert everybody is not None
        _formed[first, ranks] = everybody, groups
    worker = worker_of(config, membership.rank)
    if worker < 0:
        return None
    lead = lead_rank(config, worker)
    return WorkerGroup(
        groups[worker], lead, membership.rank - lead, ranks, membership.device, membership.carrier, membership.backend
    )


def _form(config: Config, membership: Membership) -> list[ProcessGroup]:
    own, found = worker_of(config, membership.rank), []
    with (
        closed_afterwards() if membership.backend == "gloo" else nullcontext(),
        peer_errors(f"rank {membership.rank} could not form the group of its worker"),
    ):
        for worker in range(config.train.workers):
            ranks = list(range(lead_rank(config, worker), lead_rank(config, worker + 1)))
            found.append(dist.new_group(ranks))
            if worker == own:
                peers = [rank for rank in ranks if rank != membership.rank]
                if wrong := unproven(run_secret(), membership, peers, config.pool.timeout_s, found[own]):
                    raise PoolError(secrets_differ(membership.rank, wrong))
    return found


@dataclass(frozen=True)
class Meeting:
    """How the processes of a worker on one node, which no launcher has started, find each other.

    Attributes:
        address: Where the lead hosts a rendezvous store.
        port: Its port.
        secret: The secret of this group alone.
    """

    address: str
    port: int
    secret: str


def host_meeting(size: int, timeout_s: float) -> Meeting:
    """Let the processes of a worker meet at this one, the lead; each calls `meet`.

    Args:
        size: How many they are.
        timeout_s: Seconds to wait for a peer.

    Raises:
        PoolError: No port can be opened.
    """
    return Meeting(*host_store(size, timeout_s), new_secret())


def meet(meeting: Meeting, rank: int, size: int, device: torch.device, settings: Pool) -> WorkerGroup:
    """Form the process group of a worker whose processes are on one node; it stays inside the node.

    Args:
        meeting: What the lead has returned.
        rank: The number of this process in the worker.
        size: How many they are.
        device: Where this process computes.
        settings: The configured pool.

    Raises:
        PoolError: The group cannot be formed.
    """
    shares_gpu = settings.ray.num_gpus < 1  # otherwise each process sees a GPU of its own
    variables = {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size if shares_gpu else 1,
        "MASTER_ADDR": meeting.address, "MASTER_PORT": meeting.port, SECRET_VARIABLE: meeting.secret,
    }  # fmt: skip
    if (interface := loopback_interface()) is not None:
        variables |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    os.environ.update({name: str(value) for name, value in variables.items()})
    membership = join(settings, device)
    group = dist.group.WORLD
    assert group is not None
    return WorkerGroup(group, 0, rank, size, device, membership.carrier, membership.backend)
