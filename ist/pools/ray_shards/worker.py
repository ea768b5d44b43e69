"""The Ray actor that runs a worker whose subnet comes in pieces, from the owners of the network's shards.

Where it sits: `ist/pools/ray_shards/pool.py` starts the actors and calls `train_pieces`.
Not here: the local steps (`ist/loops/local_loop.py`), the owners (`owner.py`).
"""

from collections.abc import Iterator, Sequence

import ray
import torch

from ist.errors import PoolError
from ist.loops.part import completed
from ist.pools.ray_actor import Flat, RayWorker, as_tensor
from ist.pools.ray_shards.owner import Piece
from ist.rng import Indices
from ist.subnet.assignments import WorkerSlot
from ist.subnet.cut import Cut
from ist.tensors import is_finite
from ist.training.worker import Worker
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.endpoints import message_layouts
from ist.transport.message import Header, Message
from ist.transport.pieces import Pieces


class RayShardWorker(RayWorker):
    """The actor: one worker of a run whose network is in shards."""

    _divided: tuple[WorkerSlot, int, Pieces] | None = None

    @ray.method(enable_task_events=False)
    def train_pieces(
        self, ticket: int, round_number: int, slot: WorkerSlot, *received: Piece
    ) -> tuple[Header | Flat, ...]:
        """Train the subnet that is in the owners' pieces for a round.

        Args:
            ticket: The number of this attempt; see `RayWorker.train`.
            round_number: The round, from 0.
            slot: The worker's number in the round, and its team.
            received: The pieces, by owner; their arrays are read-only views of the object store.

        Returns:
            The header of the trained subnet, and the trained pieces, by owner.

        Raises:
            PoolError: The pieces are not those of this worker's subnet of this round.
            AbandonedRoundError: The round continues without this worker.
        """
        torch.set_num_threads(self._threads)  # Ray calls actors on another thread than their constructor
        worker = self._host.worker(slot)
        split, neurons = worker.job.split, worker.neurons(round_number)
        cut = split.cut(neurons)
        buffers = self._buffers_for(message_layouts(split, worker.job.config.exchange, cut))
        pieces = self._pieces(worker, len(received))
        layouts = pieces.layouts(cut)
        reuses = self._join(round_number, [flat for flat, _ in received], pieces, layouts, buffers, cut)
        frozen = self._join_frozen(round_number, worker, [beside for _, beside in received], pieces, neurons, reuses)
        infinite = {name for name, tensor in buffers.down.tensors.items() if not is_finite([tensor])}
        completed(worker.train(round_number, buffers, frozen, lambda: self._over >= ticket))
        returned = {owner: MessageBuffers(each) for owner, each in enumerate(layouts)}
        header = pieces.divide(returned, buffers, cut, infinite, round_number)
        return (header, *(piece.up.flat.numpy() for piece in returned.values()))

    def _pieces(self, worker: Worker, owners: int) -> Pieces:
        if self._divided is None or self._divided[:2] != (worker.slot, owners):
            pieces = Pieces(worker.job.split, worker.job.config.exchange, owners, worker.number)
            self._divided = worker.slot, owners, pieces
        return self._divided[2]

    def _join(
        self,
        round_number: int,
        received: Sequence[Flat],
        pieces: Pieces,
        layouts: Sequence[MessageLayouts],
        buffers: MessageBuffers,
        cut: Cut,
    ) -> bool:
        """Join the pieces in `buffers`; return whether the worker must reuse the frozen parameters that it has."""

        def opened() -> Iterator[tuple[int, Message]]:
            for owner, (flat, each) in enumerate(zip(received, layouts, strict=True)):
                expected = pieces.down_bytes(owner, each, round_number)
                if flat.shape != (expected,):
                    raise PoolError(f"{self.name} expected {expected} bytes of owner {owner}, received {flat.shape}")
                piece = MessageBuffers(each)  # not all of its tensors are sent before the first round
                piece.flat[:expected].copy_(as_tensor(flat))
                yield owner, piece.down

        return pieces.join(opened(), buffers.down, cut, round_number)

    def _join_frozen(
        self,
        round_number: int,
        worker: Worker,
        received: Sequence[Flat | None],
        pieces: Pieces,
        neurons: Sequence[Indices],
        reuses_frozen: bool,
    ) -> Message | None:
        """Return the message with the frozen parameters that the worker lacks; None if it lacks none."""
        missing = worker.frozen.missing(round_number, neurons, reuses_frozen)
        needed = worker.frozen.needed(round_number, neurons)
        incoming = {}
        for owner, layout in pieces.frozen_layouts(needed, missing).items():
            flat = received[owner]
            if flat is None or flat.shape != (layout.nbytes,):
                raise PoolError(f"{self.name} expected {layout.nbytes} bytes of frozen parameters of owner {owner}")
            incoming[owner] = Message(layout, flat=as_tensor(flat))
        return pieces.join_frozen(incoming, needed, missing, round_number)
