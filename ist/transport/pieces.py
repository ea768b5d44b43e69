"""Join the pieces of a worker's subnet, which come from the owners of shards, and divide the trained subnet again.

If the full network is stored in shards, every owner sends a worker a piece: the part of the worker's subnet that is in
the owner's shard, as a message of its own. The worker joins the pieces of all owners, trains the subnet, and returns a
piece to every owner.
Where it sits: the pools whose owners are other processes use it on the worker's side (`ist/pools/shard_pool.py`,
`ist/pools/ray_shards/worker.py`).
Law: a subnet that is divided and joined again is the same, bit for bit.
Not here: which rows an owner has (`ist/subnet/stores/shards.py`), sending pieces (`ist/pools/`).
"""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from ist.config.partition import Exchange
from ist.errors import PoolError
from ist.subnet.cut import Cut, cut_specs
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.shards import rows_within, shard_of
from ist.tensors import TensorSpec, is_finite
from ist.transport.codec import SCALE, MessageBuffers, MessageLayouts
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.frozen_parameters import Needed
from ist.transport.message import EVERY_WORKER, Header, Layout, Message


class Pieces:
    """The pieces of one worker's subnets.

    Args:
        split: The full split network.
        exchange: How messages are encoded.
        owners: The number of owners.
        worker: The worker.
    """

    def __init__(self, split: SplitModel, exchange: Exchange, owners: int, worker: int) -> None:
        self._split = split
        self._exchange = exchange
        self._worker = worker
        self._shards = [shard_of(split, owner, owners) for owner in range(owners)]

    def layouts(self, cut: Cut) -> list[MessageLayouts]:
        """Return the layouts of the pieces of a cut of the full network, by owner."""
        return [message_layouts(shard, self._exchange, shard.within(cut)) for shard in self._shards]

    def down_bytes(self, owner: int, layouts: MessageLayouts, round_number: int) -> int:
        """Return how many bytes of an owner's piece are sent to the worker."""
        return down_bytes(self._shards[owner], layouts, round_number)

    def join(self, pieces: Iterable[tuple[int, Message]], subnet: Message, cut: Cut, round_number: int) -> bool:
        """Copy the owners' pieces into the message with the worker's subnet.

        Args:
            pieces: Each owner and its piece.
            subnet: The message down to the worker, which is written.
            cut: The worker's positions in the full network.
            round_number: The round.

        Returns:
            Whether the worker must reuse the frozen parameters that it has.

        Raises:
            PoolError: A piece is not one of this worker's subnet of this round, or the owners disagree.
        """
        reuses = set()
        for owner, piece in pieces:
            reuses.add(piece.read_header(round_number, self._worker).reuses_frozen)
            for tensor, rows in self._pairs(piece, subnet, self._split.specs, cut, owner):
                rows.copy_(tensor)
        if len(reuses) > 1:
            raise PoolError(f"worker {self._worker}: owners disagree on whether it has its frozen parameters")
        return reuses.pop()

    def divide(
        self, pieces: Mapping[int, MessageBuffers], buffers: MessageBuffers, cut: Cut, infinite: set[str], number: int
    ) -> Header:
        """Write the pieces of a trained subnet, each with the whole header, which is returned.

        Args:
            pieces: The buffers of the pieces, by owner; the messages up are written.
            buffers: The buffers of the subnet; the message up is read.
            cut: The worker's positions in the full network.
            infinite: Tensors of the subnet that were not finite before training, such as masks.
            number: The round.
        """
        trained = buffers.up
        header = trained.read_header(number, self._worker)
        checked = (name for name in trained.tensors if name.removesuffix(SCALE) not in infinite)
        bad = next((name for name in checked if not is_finite([trained.tensors[name]])), None)
        place = 0 if bad is None else list(self._split.specs).index(bad.removesuffix(SCALE)) + 1
        returned = Header(number, self._worker, header.numbers, logged=header.logged, non_finite=place)
        for owner, piece in pieces.items():
            for tensor, rows in self._pairs(piece.up, trained, self._split.specs, cut, owner):
                tensor.copy_(rows)
            piece.up.write_header(returned)
        return returned

    def frozen_layouts(self, needed: Needed, missing: Collection[str]) -> dict[int, Layout]:
        """Return the layouts of the pieces with what a worker lacks of that which it reads and does not train.

        Args:
            needed: What it reads of the full network.
            missing: The names of what it lacks; owners that have no row of it send nothing.

        Returns:
            The layouts, by owner.
        """
        found = {}
        for owner, shard in enumerate(self._shards):
            within = shard.within({name: dims for name, dims in needed.cut.items() if name in missing})
            if within:
                specs = {**shard.model_specs, **shard.frozen_specs}
                found[owner] = needed.layout(cut_specs({name: specs[name] for name in within}, within))
        return found

    def join_frozen(
        self, pieces: Mapping[int, Message], needed: Needed, missing: Mapping[str, TensorSpec], round_number: int
    ) -> Message | None:
        """Return the message with what a worker lacks of that which it reads and does not train; None: nothing.

        Args:
            pieces: The message of each owner of `frozen_layouts`.
            needed: What the worker reads of the full network.
            missing: The specs of what it lacks.
            round_number: The round.
        """
        if not missing:
            return None
        device = next(iter(pieces.values())).flat.device
        message = Message(needed.layout(missing), device)
        message.write_header(Header(round_number, EVERY_WORKER if needed.has_rest else self._worker))
        specs = {**self._split.model_specs, **self._split.frozen_specs}
        for owner, piece in pieces.items():
            for tensor, rows in self._pairs(piece, message, specs, needed.cut, owner):
                rows.copy_(tensor)
        return message

    def _pairs(
        self, piece: Message, subnet: Message, specs: Mapping[str, TensorSpec], cut: Cut, owner: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of a piece, with its rows in the subnet."""
        found = []
        for name, tensor in piece.tensors.items():
            base, rows = name.removesuffix(SCALE), subnet.tensors[name]
            if specs[base].shape:
                within = rows_within(specs[base], cut[base], owner, len(self._shards))
                each = len(rows) // max(1, len(subnet.tensors[base]))  # a row may have several scales
                rows = rows[within.start * each : within.stop * each]
            found.append((tensor, rows))
        return found
