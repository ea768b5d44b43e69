"""The exchange of subnets if the full network is stored in shards: each rank owns a shard, and is a worker.

In a round every owner sends every worker a piece, the part of the worker's subnet that is in the owner's shard. A
worker joins the pieces of all owners, trains the subnet, and returns a piece to every owner. So no link carries more
than about 1/n of what the link of a single coordinator carries.

Each rank runs its own `Coordinator`, of its own shard, with a `ShardPool`. For this coordinator a piece is a subnet, so
that it cuts, checks, merges and optimizes as a single coordinator does.
Law: the store has the same values as with one coordinator, bit for bit. All arithmetic on values of the store is entry
by entry, and a rounded matrix has a scale for each row, which one owner holds completely.
Where it sits: `ist/runs/opening/in_shards.py` creates it if `pool.store` is `sharded`.
Not here: which rows a rank owns (`ist/subnet/stores/shards.py`), what happens between rounds (`shard_store.py`).
"""

from collections.abc import Generator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ist.distributed.process_group import Membership, PeerWatch, peer_errors
from ist.loops.part import Part
from ist.monitoring.meter import Meter
from ist.pools.torchrun import Channel, WorkerBuffers, wait_for_all
from ist.rng import Indices
from ist.subnet.cut import Cut
from ist.subnet.job import Job, assignments, slot_of
from ist.tensors import is_finite
from ist.training.worker import Worker
from ist.training.worker_state import CheckpointLocation
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import BufferCache, Lost, Subnet
from ist.transport.message import Message
from ist.transport.pieces import Pieces


class ShardPool:
    """A rank's part of the exchange, as owner of a shard and as a worker; a `WorkerPool`.

    Args:
        job: The run, with the full split network.
        membership: This rank.
        meter: Counts payload bytes: those of all ranks.
        location: Where workers save their state; None: nowhere.
    """

    parallel = True

    def __init__(
        self, job: Job, membership: Membership, meter: Meter, location: CheckpointLocation | None = None
    ) -> None:
        me, ranks = membership.rank, membership.world_size
        self._job = job
        self._me = me
        self._pieces = Pieces(job.split, job.config.exchange, ranks, me)
        self._names = tuple(f"rank {rank}" for rank in range(ranks))
        self._membership = membership
        self._meter = meter
        self._own_traffic = Meter()
        self._channel = Channel(membership, self._own_traffic)
        self._early = membership.backend == "gloo"
        self._worker = Worker(job, slot_of(job, me), membership.device, assignments(job), location)
        self._subnet = WorkerBuffers(job, membership.device)
        self._outgoing = BufferCache(membership.device)  # by worker: this owner's pieces
        self._incoming = BufferCache(membership.device)  # by owner: this worker's pieces
        self._peers = PeerWatch(membership)
        self._round = 0
        self._submitted: dict[int, Subnet] = {}

    def gather(self, round_number: int) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of all ranks, which are always available: torch.distributed ends the run if one is lost."""
        return self._names

    def process(self, worker: int) -> str:
        """Return the name of a worker's rank, which is the same process during the whole run."""
        return self._names[worker]

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return the buffers of the piece that this rank's shard has of a worker's subnet."""
        return self._outgoing.buffers(worker, layouts)

    def submit(self, round_number: int, subnet: Subnet) -> None:
        """Note a piece; `results` sends all pieces."""
        self._round = round_number
        self._submitted[subnet.worker] = subnet

    def results(self) -> Generator[Subnet | Lost | Part]:
        """Exchange the pieces, yield the part of this rank's worker, and then each worker's piece for this shard."""
        outgoing, self._submitted = self._submitted, {}
        neurons = self._worker.neurons(self._round)
        buffers = self._subnet.of(neurons)
        cut = self._job.split.cut(neurons)
        pieces = self._buffers_of_pieces(cut)
        reuses_frozen = self._exchange_down(outgoing, pieces, cut, buffers)
        frozen = self._exchange_frozen(outgoing, neurons, reuses_frozen)
        infinite = {name for name, tensor in buffers.down.tensors.items() if not is_finite([tensor])}
        returning = [(rank, rank, subnet.buffers.up.flat) for rank, subnet in outgoing.items() if rank != self._me]
        # With gloo, post the receives now, so that pieces arrive while this rank trains. A piece overwrites the memory
        # of the one that was sent, which is safe: that one has been sent completely.
        receives = self._channel.receive(returning) if self._early else []
        yield from self._worker.train(self._round, buffers, frozen, self._peers.is_over)
        self._pieces.divide(pieces, buffers, cut, infinite, self._round)
        returned = [(owner, self._me, piece.up.flat) for owner, piece in pieces.items() if owner != self._me]
        sends, late = self._channel.swap(returned, [] if self._early else returning)
        yield outgoing[self._me]
        for (rank, _, flat), work in zip(returning, receives or late, strict=True):
            wait_for_all([work], f"rank {rank}")
            self._channel.finish(rank, flat)
            yield outgoing[rank]
        wait_for_all(sends, "returning a subnet")
        self._count()

    def _buffers_of_pieces(self, cut: Cut) -> dict[int, MessageBuffers]:
        """Return the buffers of the pieces of this worker's subnet, by owner."""
        return {
            owner: (self._outgoing if owner == self._me else self._incoming).buffers(owner, layouts)
            for owner, layouts in enumerate(self._pieces.layouts(cut))
        }

    def _exchange_down(
        self, outgoing: Mapping[int, Subnet], pieces: Mapping[int, MessageBuffers], cut: Cut, buffers: MessageBuffers
    ) -> bool:
        """Send this shard's pieces, receive those of this worker's subnet, and join them; see `Pieces.join`."""
        down = [(w, w, subnet.buffers.flat[: subnet.sent_bytes]) for w, subnet in outgoing.items() if w != self._me]
        wanted = [
            (owner, self._me, piece.flat[: self._pieces.down_bytes(owner, piece.layouts, self._round)])
            for owner, piece in pieces.items()
            if owner != self._me
        ]
        self._complete(down, wanted)
        received = ((owner, piece.down) for owner, piece in pieces.items())
        return self._pieces.join(received, buffers.down, cut, self._round)

    def _exchange_frozen(
        self, outgoing: Mapping[int, Subnet], neurons: Sequence[Indices], reuses_frozen: bool
    ) -> Message | None:
        """Exchange the frozen parameters that workers lack; return this worker's message, None if it lacks none."""
        needed = self._worker.frozen.needed(self._round, neurons)
        if not needed.specs:
            return None
        missing = self._worker.frozen.missing(self._round, neurons, reuses_frozen)
        carrier = self._membership.carrier
        incoming = {
            owner: Message(layout, carrier)
            for owner, layout in self._pieces.frozen_layouts(needed, missing).items()
            if owner != self._me
        }
        sent = [(w, w, s.frozen.flat.to(carrier)) for w, s in outgoing.items() if s.frozen and w != self._me]
        self._complete(sent, [(owner, self._me, message.flat) for owner, message in incoming.items()])
        own = outgoing[self._me].frozen
        if own is not None:
            incoming[self._me] = own
        return self._pieces.join_frozen(incoming, needed, missing, self._round)

    def _complete(self, sent: Sequence[tuple[int, int, Tensor]], wanted: Sequence[tuple[int, int, Tensor]]) -> None:
        """Send and receive (rank, worker, flat) buffers, and wait for all of them."""
        sends, receives = self._channel.swap(sent, wanted)
        for (rank, _, _), work in zip(wanted, receives, strict=True):
            wait_for_all([work], f"worker {self._me} lost rank {rank} in round {self._round}")
        for _, worker, flat in wanted:
            self._channel.finish(worker, flat)
        wait_for_all(sends, "sending pieces of subnets")

    def _count(self) -> None:
        """Add the bytes to and from each worker, of all owners, to the meter."""
        sent, received = self._own_traffic.sent, self._own_traffic.received
        ranks = range(len(self._names))
        # As an owner, a rank sends to other workers; what it sent as worker `me` it counts under its own number.
        counts = torch.tensor(
            [[sent[w] if w != self._me else 0 for w in ranks], [received[w] if w != self._me else 0 for w in ranks]],
            device=self._membership.carrier,
        )
        with peer_errors("counting bytes"):
            dist.all_reduce(counts)
        for worker in ranks:
            self._meter.sent[worker] = int(counts[0, worker])
            self._meter.received[worker] = int(counts[1, worker])

    def close(self) -> None:
        """Release what the worker holds; the process group outlives the run."""
        self._worker.close()
