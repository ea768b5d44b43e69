"""Frozen parameters: which of them a worker lacks, their message, and the worker's cache.

A parameter that is not trained (`requires_grad` is False) does not change in a run. The coordinator sends a worker its
part of it if the worker does not have that part: in the worker's first round, and when the part differs from that of
its last round. Frozen parameters are sent in a message of their own, beside the subnet, and are never returned.

Both ends derive the layout of that message from the partition. The header of the subnet's message says whether the
worker must reuse its cache. The coordinator allows this only if the last subnet that it sent to the same process was
returned without an error; otherwise it sends all frozen parameters. A worker compares its cache with what it needs, so
a mistake raises an error and an old value is never used.

Where it sits: the coordinator writes the message (`FrozenSender`), pools send it, a worker reads it (`FrozenCache`).
Not here: sending bytes (`ist/pools/`), rounding (`codec.py`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ist.config.partition import Exchange
from ist.config.schema import Config
from ist.errors import ModelError, PoolError
from ist.optimization.schedule import Schedule
from ist.rng import Indices
from ist.subnet.assignments import Assignments
from ist.subnet.cut import Cut, cut_specs, on_device
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.parameter_store import LocalStore
from ist.subnet.stores.shards import shard_of
from ist.tensors import TensorSpec, checksum
from ist.transport.codec import coded_specs, decoded, encode
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.message import Header, Layout, Message, layout_of

PartKey = tuple[bytes | None, ...]
"""Identifies a part of a tensor: for every dim a hash of its positions; None: all positions."""

PartKeys = Mapping[str, PartKey]
"""The keys of a worker's parts, by name of the tensor."""


def part_keys(cut: Cut) -> PartKeys:
    """Return the key of each part of a cut."""
    return {name: tuple(None if dim is None else _hash(dim) for dim in dims) for name, dims in cut.items()}


def _hash(positions: Indices | Tensor) -> bytes:
    assert isinstance(positions, np.ndarray)  # before `on_device`
    return hashlib.sha256(positions.tobytes()).digest()


def missing_specs(split: SplitModel, cut: Cut, needed: PartKeys, cached: PartKeys) -> dict[str, TensorSpec]:
    """Return the specs of the parts of frozen parameters that a worker needs and does not have.

    Args:
        split: The split network.
        cut: The positions that the worker needs: `split.frozen_cut`.
        needed: The keys of these parts.
        cached: The keys of the parts that the worker has.
    """
    return {name: spec for name, spec in cut_specs(split.frozen_specs, cut).items() if cached.get(name) != needed[name]}


def frozen_layout(exchange: Exchange, specs: Mapping[str, TensorSpec]) -> Layout:
    """Return the layout of a message with parts of frozen parameters of the given specs."""
    return layout_of(coded_specs(specs, exchange.down))


def frozen_bytes(
    split: SplitModel, exchange: Exchange, neurons: Sequence[Indices], before: Sequence[Indices] | None
) -> int:
    """Return the length of the message with the frozen parameters that a worker lacks in a round.

    Args:
        split: The split network.
        exchange: How messages are encoded.
        neurons: For each group, the neurons that the worker holds.
        before: The same in its last round; None: it has no frozen parameters yet.
    """
    if not split.frozen_specs:
        return 0
    cached = part_keys(split.whole.frozen_cut(before)) if before is not None else {}
    needed = part_keys(split.whole.frozen_cut(neurons))
    specs = missing_specs(split, split.frozen_cut(neurons), needed, cached)
    return frozen_layout(exchange, specs).nbytes if specs else 0


def exchanged_bytes(
    split: SplitModel,
    exchange: Exchange,
    neurons: Sequence[Indices],
    before: Sequence[Indices] | None,
    round_number: int,
) -> tuple[int, int]:
    """Return (bytes to a worker, bytes from it) of a round's messages between a store and a worker.

    Args:
        split: The split network, or the shard that an owner stores.
        exchange: How messages are encoded.
        neurons: For each group, the neurons that the worker holds.
        before: The same in its last round; None: it has no frozen parameters yet.
        round_number: The round, from 0.
    """
    layouts = message_layouts(split, exchange, split.cut(neurons))
    frozen = frozen_bytes(split, exchange, neurons, before)
    return down_bytes(split, layouts, round_number) + frozen, layouts.up.nbytes


def stores_for(config: Config, split: SplitModel, worker: int) -> Sequence[SplitModel]:
    """Return what a worker exchanges with over a link: the full network, or shards.

    Under torchrun these are the shards of all other ranks. On Ray the owners are other processes than the workers.
    """
    if not config.store_is_sharded:
        return [split]
    owners, own = config.train.workers, worker if config.pool.spec.is_launched else None
    return [shard_of(split, owner, owners) for owner in range(owners) if owner != own]


def round_bytes(
    config: Config,
    split: SplitModel,
    worker: int,
    neurons: Sequence[Indices],
    before: Sequence[Indices] | None,
    round_number: int,
) -> tuple[int, int]:
    """Return (bytes to a worker, bytes from it) that cross a link in a round; for the arguments see `exchanged_bytes`.

    With a sharded store every owner sends and receives a piece; under torchrun the worker's own crosses no link.
    """
    pieces = [
        exchanged_bytes(store, config.exchange, neurons, before, round_number)
        for store in stores_for(config, split, worker)
    ]
    return sum(down for down, _ in pieces), sum(up for _, up in pieces)


def message_bytes(
    config: Config, split: SplitModel, schedule: Schedule, assignments: Assignments, worker: int
) -> tuple[int, int]:
    """Return (bytes to a worker, bytes from it) that cross a link in a full round after the first.

    Args:
        config: The configuration.
        split: The split network.
        schedule: The rounds of the run.
        assignments: The neurons of every worker in every round.
        worker: Which worker.
    """
    main = schedule.main_round
    held = assignments.of(main)[worker]
    down, up = round_bytes(config, split, worker, held, held, 1)
    continues = main + 1 < schedule.num_rounds and schedule.spans[main + 1].stage == schedule.spans[main].stage
    earlier, later = (main, main + 1) if continues else (max(0, main - 1), main)
    if split.frozen_specs:  # what is lacking depends on the round before
        before, neurons = assignments.of(earlier)[worker], assignments.of(later)[worker]
        down += sum(
            frozen_bytes(store, config.exchange, neurons, before) for store in stores_for(config, split, worker)
        )
    return down, up


class FrozenSender:
    """Writes the messages with frozen parameters, on the coordinator.

    Args:
        split: The split network.
        exchange: How messages are encoded.
        tensors: Full tensors by name, contiguous; those of `split.frozen_specs` are read.
        device: The device of the tensors.
    """

    def __init__(
        self, split: SplitModel, exchange: Exchange, tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._split = split
        self._exchange = exchange
        self._store = LocalStore({name: tensors[name] for name in split.frozen_specs})
        self._device = device
        self._cached: dict[str, PartKeys] = {}
        self._sent: dict[str, PartKeys] = {}

    def begin(self, processes: Iterable[str]) -> None:
        """Start a round: forget processes that do not take part in it."""
        present = set(processes)
        self._cached = {process: keys for process, keys in self._cached.items() if process in present}
        self._sent.clear()

    def write(
        self, process: str, worker: int, round_number: int, neurons: Sequence[Indices]
    ) -> tuple[Message | None, bool]:
        """Write the frozen parameters that a process lacks in a round.

        Args:
            process: The process that runs the worker; until `returned`, the content of its cache is unknown.
            worker: Which worker of the round.
            round_number: The round.
            neurons: For each group, the neurons that the worker holds.

        Returns:
            The message, or None if the process lacks nothing; and whether the process must reuse its cache.
        """
        cached = self._cached.pop(process, None)
        cut = self._split.frozen_cut(neurons)
        needed = self._sent[process] = part_keys(self._split.whole.frozen_cut(neurons))
        specs = missing_specs(self._split, cut, needed, cached or {})
        if not specs:
            return None, cached is not None
        message = Message(frozen_layout(self._exchange, specs), self._device)
        message.write_header(Header(round_number, worker))
        [placed] = on_device([cut], self._device)
        for name, spec in specs.items():
            part = {name: torch.empty(spec.shape, dtype=spec.dtype, device=self._device)}
            self._store.extract(placed, into=part)
            encode(part, message.tensors, self._exchange.down)
        return message, cached is not None

    def returned(self, process: str) -> None:
        """Record that a process has returned its subnet of this round without an error."""
        self._cached[process] = self._sent[process]


class FrozenCache:
    """A worker's parts of frozen parameters, which it reuses from round to round.

    Args:
        split: The split network.
        exchange: How messages are encoded.

    Attributes:
        tensors: Name to the worker's part of the tensor; these tensors are never written.
    """

    def __init__(self, split: SplitModel, exchange: Exchange) -> None:
        self._split = split
        self._exchange = exchange
        self.tensors: dict[str, Tensor] = {}
        self._keys: PartKeys = {}

    def layout(self, neurons: Sequence[Indices], reuses_frozen: bool) -> Layout | None:
        """Return the layout of the message with frozen parameters that is sent beside a subnet; None: none is sent.

        Args:
            neurons: For each group, the neurons that the worker holds in the round.
            reuses_frozen: Whether the worker must reuse this cache, as the subnet's header says.
        """
        specs = self.missing(neurons, reuses_frozen)
        return frozen_layout(self._exchange, specs) if specs else None

    def missing(self, neurons: Sequence[Indices], reuses_frozen: bool) -> dict[str, TensorSpec]:
        """Return the specs of the parts that are sent beside a subnet; see `layout`."""
        cut = self._split.frozen_cut(neurons)
        return missing_specs(self._split, cut, part_keys(cut), self._keys if reuses_frozen else {})

    def update(
        self,
        neurons: Sequence[Indices],
        worker: int,
        round_number: int,
        received: Message | None,
        device: torch.device,
    ) -> Mapping[str, Tensor]:
        """Store the received parts, drop those that are no longer needed, and return the parts of a round.

        Args:
            neurons: For each group, the neurons that the worker holds in the round.
            worker: Which worker of the round.
            round_number: The round.
            received: The message that was sent beside the subnet; None: none was sent.
            device: The device on which the worker trains.

        Raises:
            PoolError: The message belongs to another round or worker, or a part is neither cached nor received.
        """
        cut = self._split.frozen_cut(neurons)
        needed, specs = part_keys(cut), cut_specs(self._split.frozen_specs, cut)
        if received is not None:
            received.read_header(round_number, worker)
        sent = received.tensors if received is not None else {}
        parts: dict[str, Tensor] = {}
        for name, spec in specs.items():
            if name in sent:
                value = decoded(sent, name, spec, self._exchange.down)
                parts[name] = value.to(device, copy=True)  # the message's memory is reused
            elif self._keys.get(name) == needed[name]:
                parts[name] = self.tensors[name]
            else:
                raise PoolError(
                    f"worker {worker} does not have its part of '{name}' (frozen) and was not sent it for round "
                    f"{round_number}: are all processes running the same version with the same configuration?"
                )
        self.tensors, self._keys = parts, needed
        return parts


def check_frozen(module: nn.Module, bound: Mapping[str, Tensor], sums: Mapping[str, int]) -> None:
    """Check that training did not change frozen parameters.

    Args:
        module: The network.
        bound: Its frozen parameters before training, by name.
        sums: Their checksums.

    Raises:
        ModelError: The forward or the optimizer has changed one.
    """
    for name, parameter in module.named_parameters():
        if name not in bound:
            continue
        before = bound[name]
        same = checksum(before) == sums[name] and (
            # A forward may replace it by a copy in another precision.
            parameter.data_ptr() == before.data_ptr()
            or (parameter.shape == before.shape and bool(torch.equal(parameter.detach(), before.to(parameter.dtype))))
        )
        if not same:
            raise ModelError(
                f"'{name}' is frozen (requires_grad is False) but training changes it, and workers do not return "
                "frozen parameters. Make it a buffer (register_buffer), which is merged, or train it "
                "(requires_grad_(True))"
            )
