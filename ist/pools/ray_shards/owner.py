"""The Ray actor that owns a shard of the full network: it cuts pieces of subnets from its rows, and merges them.

An owner runs the same `Coordinator` as a driver that holds the full network, of its own shard: a piece is a subnet to
it. A round is two calls. In the first, the coordinator cuts all pieces, and then waits for the results of its pool; in
the second it merges them. Every owner gets the same results in the same order, so that all merge the same workers.
Where it sits: `ist/pools/ray_shards/owners.py` starts the actors and calls them.
Not here: the workers (`worker.py`), which workers' results are merged (`method.py`), which rows an owner has
(`ist/subnet/stores/shards.py`).
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ist.errors import PoolError
from ist.loops.part import Part
from ist.monitoring.meter import Meter
from ist.pools.ray_actor import Flat, as_tensor
from ist.pools.shard_network import shard_network
from ist.subnet.job import Job
from ist.subnet.stores.shards import shard_of
from ist.tensors import TensorSpec
from ist.training.average import PREFIX as AVERAGE
from ist.training.average import averaged
from ist.training.coordinator import Coordinator
from ist.training.rounds import Method, RoundReport
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import BufferCache, Lost, Subnet
from ist.transport.message import Message, layout_of

Piece = tuple[Flat, Flat | None]
"""The bytes of a worker's subnet that an owner sends, and those of frozen parameters that the worker lacks."""


@dataclass(frozen=True)
class Rows:
    """An owner's rows of tensors, as Ray carries them: without a copy, and for every dtype.

    Attributes:
        specs: The rows' shapes and dtypes, by name.
        flat: Their bytes, in a message without its header's values.
    """

    specs: Mapping[str, TensorSpec]
    flat: NDArray[np.uint8]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Rows":
        """Pack tensors."""
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        message = Message(layout_of(specs, 0))
        for name, tensor in tensors.items():
            message.tensors[name].copy_(tensor.detach())
        return cls(specs, message.flat.numpy())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, which must not be written to."""
        return Message(layout_of(self.specs, 0), flat=as_tensor(self.flat)).tensors


class _TrainedElsewhere(Part):
    """The parts of workers in other processes: the caller continues the round when their results are there."""

    def __init__(self) -> None:
        pass


class OwnerPool:
    """The pieces of a round, which an owner's coordinator has written, and their results; a `WorkerPool`.

    Attributes:
        names: The workers of the round.
        processes: The processes that run them.
        submitted: The pieces that are to be sent, by worker.
        returned: The results of the round, in the order in which they are merged.
    """

    parallel = True

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.processes: tuple[str, ...] = ()
        self.submitted: dict[int, Subnet] = {}
        self.returned: list[Subnet | Lost] = []
        self._cache = BufferCache(torch.device("cpu"))

    def gather(self, round_number: int) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the workers, which the driver has gathered."""
        return self.names

    def process(self, worker: int) -> str:
        """Return the name of a worker's process."""
        return self.processes[worker]

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        """Return the buffers of a worker's piece."""
        return self._cache.buffers(worker, layouts)

    def submit(self, round_number: int, subnet: Subnet) -> None:  # noqa: ARG002
        """Note a piece, which the owner returns to the driver."""
        self.submitted[subnet.worker] = subnet

    def results(self) -> Generator[Subnet | Lost | Part]:
        """Wait until the results are there, and yield them."""
        yield _TrainedElsewhere()
        yield from self.returned

    def close(self) -> None:
        """Do nothing: the workers are the driver's."""


class RayOwner:
    """The actor: the owner of a shard.

    Args:
        job: The run, with the full split network and without data.
        owner: Which owner, from 0.
        owners: The number of owners.
    """

    def __init__(self, job: Job, owner: int, owners: int) -> None:
        self._threads = job.config.pool.threads
        # The driver decides whether a round is repeated: it knows the results of all owners.
        pool = job.config.pool.model_copy(update={"round_attempts": 1})
        config = job.config.model_copy(update={"pool": pool})
        self._shard = shard_of(job.split, owner, owners)
        self._job = replace(job, config=config, split=self._shard)
        self._pool = OwnerPool()
        self._loaded: dict[str, Tensor] = {}
        self._method: Method | None = None
        self._round: Generator[Part, None, RoundReport] | None = None
        self._number = -1
        self._arrived: dict[int, Subnet] = {}
        self._held: dict[int, dict[int, Rows]] = {}  # by owner and number of rounds

    @ray.method(enable_task_events=False)
    def alive(self) -> None:
        """Answer, which shows that the actor is alive."""

    @ray.method(enable_task_events=False)
    def load(self, rows: Rows) -> None:
        """Keep rows of tensors for the next `restore`."""
        self._loaded |= {name: tensor.clone() for name, tensor in rows.tensors().items()}

    @ray.method(enable_task_events=False)
    def restore(self, rows: Rows | None, is_resumed: bool) -> dict[str, TensorSpec]:
        """Start, or start again, with the rows of a state between two rounds.

        Args:
            rows: This shard's rows of the network, and of all that a checkpoint has beside it if the run is resumed;
                None: those that are loaded.
            is_resumed: Whether rounds precede this state.

        Returns:
            The shapes of this shard's rows of every tensor of a checkpoint.
        """
        torch.set_num_threads(self._threads)
        self._drop_round()
        self._method = None  # its memory is no longer needed
        if rows is not None:
            self._loaded = {name: tensor.clone() for name, tensor in rows.tensors().items()}
        tensors, self._loaded = self._loaded, {}
        network = shard_network(self._shard, tensors)
        names, job = network.state_dict(), self._job
        further = {name: tensor for name, tensor in tensors.items() if name not in names}
        average = {name: tensor for name, tensor in further.items() if name.startswith(AVERAGE)}
        carried = {name: tensor for name, tensor in further.items() if name not in average}
        self._pool = OwnerPool()
        method = Coordinator(job, self._pool, network, Meter(), carried if is_resumed else None)
        self._method = averaged(method, job.config.recipe.average, job.schedule.num_rounds, average, is_resumed)
        state = self._method.checkpoint_state()
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}

    # With task events, Ray would record every call, and the cluster's memory would grow with the number of rounds.
    @ray.method(enable_task_events=False)
    def cut(
        self, round_number: int, names: tuple[str, ...], processes: tuple[str, ...]
    ) -> tuple[list[int] | Piece, ...]:
        """Start a round: return the bytes for each worker, and then each worker's piece.

        Args:
            round_number: The round, from 0.
            names: The workers of the round.
            processes: The processes that run them.
        """
        assert self._method is not None
        torch.set_num_threads(self._threads)
        self._drop_round()
        self._pool.names, self._pool.processes, self._number = names, processes, round_number
        self._round = self._method.train_round(round_number)
        next(self._round)
        subnets = [self._pool.submitted[worker] for worker in range(len(names))]
        pieces = [
            (s.buffers.flat[: s.sent_bytes].numpy(), s.frozen.flat.numpy() if s.frozen is not None else None)
            for s in subnets
        ]
        return ([subnet.down_bytes for subnet in subnets], *pieces)

    @ray.method(enable_task_events=False)
    def receive(self, worker: int, piece: Flat) -> int:
        """Keep a worker's trained piece until the round is merged; return its bytes.

        Raises:
            PoolError: It is not the worker's piece of this round.
        """
        sent = self._pool.submitted[worker]
        layouts = sent.buffers.layouts
        if not isinstance(piece, np.ndarray) or piece.dtype != np.uint8 or piece.shape != (layouts.up.nbytes,):
            raise PoolError(f"worker {worker} returned a piece of another size than {layouts.up.nbytes} bytes")
        buffers = MessageBuffers(layouts, flat=as_tensor(piece))
        buffers.up.read_header(self._number, worker)
        self._arrived[worker] = Subnet(sent.slot, buffers, sent.sent_bytes)
        return piece.nbytes

    @ray.method(enable_task_events=False)
    def merge(self, order: Sequence[int], lost: Sequence[Lost]) -> RoundReport:
        """Merge the pieces of a round, and return its report.

        Args:
            order: The workers whose pieces are merged, in this order.
            lost: The workers that the merge leaves out.
        """
        assert self._round is not None
        torch.set_num_threads(self._threads)
        self._pool.returned = [*(self._arrived[worker] for worker in order), *lost]
        try:
            next(self._round)
        except StopIteration as ended:
            report: RoundReport = ended.value
            return report
        finally:
            self._drop_round()
        raise AssertionError("a round that is merged has ended")

    @ray.method(enable_task_events=False)
    def rows(self, names: Sequence[str] | None = None) -> Rows:
        """Return this shard's rows of tensors of a checkpoint; None: of all of them."""
        assert self._method is not None
        state = self._method.checkpoint_state()
        return Rows.of(state if names is None else {name: state[name] for name in names})

    @ray.method(enable_task_events=False)
    def hold(self, owner: int, rounds_done: int, rows: Rows) -> None:
        """Hold a replica of another owner's rows, and the one before: the next state may not be complete yet."""
        earlier = self._held.get(owner, {})
        self._held[owner] = {**dict(list(earlier.items())[-1:]), rounds_done: rows}

    @ray.method(enable_task_events=False)
    def held(self, owner: int, rounds_done: int) -> Rows:
        """Return the replica of another owner's rows, as they were after so many rounds."""
        return self._held[owner][rounds_done]

    def _drop_round(self) -> None:
        """Forget a round: what is not merged changes nothing."""
        if self._round is not None:
            self._round.close()
        self._round = None
        self._arrived.clear()
        self._pool.submitted, self._pool.returned = {}, []
