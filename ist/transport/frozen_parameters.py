"""What a worker reads and does not train: which of it the worker lacks, its message, and the worker's cache.

A parameter that is not trained (`requires_grad` is False) does not change in a run. The coordinator sends a worker its
part of it if the worker does not have that part: in the worker's first round, and when the part differs from that of
its last round. Frozen parameters are sent in a message of their own, beside the subnet, and are never returned.

In a round with the frozen rest of the network (`partition.rest`), the message also has every tensor that is split, as a
whole, in the encoding `exchange.rest`: it is the same message for all workers. Workers hold these tensors in encoded
form.

Both ends derive the layout of that message from the partition. The header of the subnet's message says whether the
worker must reuse its cache. The coordinator allows this only if the last subnet that it sent to the same process was
returned without an error; otherwise it sends all frozen parameters. A worker compares its cache with what it needs, so
a mistake raises an error and an old value is never used.

Where it sits: the coordinator writes the message (`FrozenSender`), pools send it, a worker reads it (`FrozenCache`).
Not here: sending bytes (`ist/pools/`), rounding (`codec.py`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ist.config.partition import Coding, Exchange
from ist.errors import ModelError, PoolError
from ist.rng import Indices
from ist.subnet.assignments import Assignments
from ist.subnet.cut import Cut, cut_specs, on_device
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.parameter_store import LocalStore
from ist.subnet.stores.shards import ModelShard
from ist.tensors import TensorSpec, checksum
from ist.transport.codec import GROUP, SCALE, CodedTensor, coded_specs, decoded, encode
from ist.transport.message import EVERY_WORKER, Header, Layout, Message, layout_of

PartKey = tuple[bytes | int | str | None, ...]
"""Identifies a part of a tensor: for each dim a hash of its positions, None for all. Or a version of the rest."""

PartKeys = Mapping[str, PartKey]
"""The keys of a worker's parts, by name of the tensor."""


_OF_A_ROUND = "round"
"""The first entry of the key of what is another one in each round."""


def part_keys(cut: Cut) -> PartKeys:
    """Return the key of each part of a cut."""
    return {name: tuple(None if dim is None else _hash(dim) for dim in dims) for name, dims in cut.items()}


def _hash(positions: Indices | Tensor) -> bytes:
    assert isinstance(positions, np.ndarray)  # before `on_device`
    return hashlib.sha256(positions.tobytes()).digest()


@dataclass(frozen=True)
class Needed:
    """What a worker reads in a round and does not train.

    Attributes:
        cut: Its positions in each tensor.
        keys: The keys of these parts.
        specs: Their specs.
        coding: How they are encoded.
        has_rest: Whether they are the frozen rest of the network, whose message is the same for all workers.
    """

    cut: Cut
    keys: PartKeys
    specs: Mapping[str, TensorSpec]
    coding: Coding
    has_rest: bool

    @property
    def lasting_keys(self) -> PartKeys:
        """The keys of the parts that are not sent again.

        The rest is: if a round is repeated, the results of its first attempt may have changed it.
        """
        return {name: key for name, key in self.keys.items() if key[:1] != (_OF_A_ROUND,)}

    def missing(self, cached: PartKeys) -> dict[str, TensorSpec]:
        """Return the specs of the parts that a worker with these keys lacks."""
        return {name: spec for name, spec in self.specs.items() if cached.get(name) != self.keys[name]}

    def layout(self, specs: Mapping[str, TensorSpec]) -> Layout:
        """Return the layout of a message with parts of the given specs."""
        return layout_of(coded_specs(specs, self.coding, GROUP if self.has_rest else None))


def needed(split: SplitModel, exchange: Exchange, neurons: Sequence[Indices], rest_of: int | None) -> Needed:
    """Return what a worker reads in a round and does not train.

    Args:
        split: The split network, or the shard that an owner stores.
        exchange: How messages are encoded.
        neurons: For each group, the neurons that the worker holds.
        rest_of: The round, if the worker holds the frozen rest of the network; None: frozen parameters only.
    """
    if rest_of is None:
        cut = split.frozen_cut(neurons)
        keys = part_keys(split.whole.frozen_cut(neurons) if cut else {})
        return Needed(cut, keys, cut_specs(split.frozen_specs, cut), exchange.down, has_rest=False)
    whole = split.whole
    full: Cut = {
        name: (None,) * len(spec.shape)
        for name, spec in {**whole.model_specs, **whole.frozen_specs}.items()
        if name in whole.partly_held
    }
    # Frozen parameters never change; the rest is another one in each round.
    keys = {name: ("full",) if name in split.frozen_specs else (_OF_A_ROUND, rest_of) for name in full}
    cut = split.within(full) if isinstance(split, ModelShard) else full
    specs = cut_specs({**split.model_specs, **split.frozen_specs}, cut)
    return Needed(cut, keys, {name: specs[name] for name in cut}, exchange.rest, has_rest=True)


def rest_specs(split: SplitModel, exchange: Exchange) -> Mapping[str, TensorSpec]:
    """Return the specs of the frozen rest of the network in the encoded form in which workers hold it."""
    full = {name: split.all_specs[name] for name in split.partly_held}
    return coded_specs(full, exchange.rest, GROUP)


def rest_fraction(split: SplitModel, exchange: Exchange) -> float:
    """Return the bytes of the encoded frozen rest, relative to the bytes of all parameters of the network."""
    rest = sum(spec.nbytes for spec in rest_specs(split, exchange).values())
    return rest / sum(parameter.nbytes for parameter in split.template.parameters())


def frozen_bytes(
    split: SplitModel,
    exchange: Exchange,
    neurons: Sequence[Indices],
    before: Sequence[Indices] | None,
    has_rest: bool = False,
    had_rest: bool = False,
) -> int:
    """Return the length of the message with what a worker lacks of that which it reads and does not train.

    Args:
        split: The split network.
        exchange: How messages are encoded.
        neurons: For each group, the neurons that the worker holds.
        before: The same in its last round; None: it has nothing yet.
        has_rest: Whether the worker holds the frozen rest of the network in this round.
        had_rest: The same of its last round.
    """
    if not (split.frozen_specs or has_rest):
        return 0
    cached = needed(split, exchange, before, 0 if had_rest else None).keys if before is not None else {}
    parts = needed(split, exchange, neurons, 1 if has_rest else None)
    specs = parts.missing(cached)
    return parts.layout(specs).nbytes if specs else 0


class FrozenSender:
    """Writes the messages with what workers read and do not train, on the coordinator.

    Args:
        split: The split network.
        exchange: How messages are encoded.
        held: The neurons of each worker in each round.
        tensors: Full tensors by name, contiguous, with their current values.
        device: The device of the tensors.
    """

    def __init__(
        self,
        split: SplitModel,
        exchange: Exchange,
        held: Assignments,
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self._split = split
        self._exchange = exchange
        self._held = held
        names = split.frozen_specs.keys() | (split.partly_held if held.ever_has_rest else frozenset())
        self._store = LocalStore({name: tensors[name] for name in names})
        self._device = device
        self._cached: dict[str, PartKeys] = {}
        self._sent: dict[str, PartKeys] = {}
        self._rest: Message | None = None

    def begin(self, processes: Iterable[str]) -> None:
        """Start a round: forget processes that do not take part in it."""
        present = set(processes)
        self._cached = {process: keys for process, keys in self._cached.items() if process in present}
        self._sent.clear()
        self._rest = None

    def write(
        self, process: str, worker: int, round_number: int, neurons: Sequence[Indices]
    ) -> tuple[Message | None, bool]:
        """Write what a process lacks in a round of that which it reads and does not train.

        Args:
            process: The process that runs the worker; until `returned`, the content of its cache is unknown.
            worker: Which worker of the round.
            round_number: The round.
            neurons: For each group, the neurons that the worker holds.

        Returns:
            The message, or None if the process lacks nothing; and whether the process must reuse its cache.
        """
        cached = self._cached.pop(process, None)
        rest_of = round_number if self._held.has_rest(round_number, neurons) else None
        parts = needed(self._split, self._exchange, neurons, rest_of)
        self._sent[process] = parts.lasting_keys
        specs = parts.missing(cached or {})
        if not specs:
            return None, cached is not None
        layout = parts.layout(specs)
        if rest_of is not None and self._rest is not None and self._rest.layout == layout:
            return self._rest, cached is not None
        message = Message(layout, self._device)
        message.write_header(Header(round_number, worker if rest_of is None else EVERY_WORKER))
        [placed] = on_device([parts.cut], self._device)
        for name, spec in specs.items():
            part = {name: torch.empty(spec.shape, dtype=spec.dtype, device=self._device)}
            self._store.extract(placed, into=part)
            encode(part, message.tensors, parts.coding)
        if rest_of is not None:
            self._rest = message
        return message, cached is not None

    def returned(self, process: str) -> None:
        """Record that a process has returned its subnet of this round without an error."""
        self._cached[process] = self._sent[process]


class FrozenCache:
    """What a process reads and does not train; it reuses this from round to round.

    Args:
        split: The split network.
        exchange: How messages are encoded.
        held: The neurons of each worker in each round.

    Attributes:
        tensors: Name to the worker's part of a frozen parameter; these tensors are never written.
        rest: Name to a full tensor of the frozen rest, in encoded form; empty in other rounds.
    """

    def __init__(self, split: SplitModel, exchange: Exchange, held: Assignments) -> None:
        self._split = split
        self._exchange = exchange
        self._held = held
        self.tensors: dict[str, Tensor] = {}
        self.rest: dict[str, CodedTensor] = {}
        self._keys: PartKeys = {}

    def layout(self, round_number: int, neurons: Sequence[Indices], reuses_frozen: bool) -> Layout | None:
        """Return the layout of the message that is sent beside a subnet; None: none is sent.

        Args:
            round_number: The round.
            neurons: For each group, the neurons that the worker holds in the round.
            reuses_frozen: Whether the worker must reuse this cache, as the subnet's header says.
        """
        specs = self.missing(round_number, neurons, reuses_frozen)
        return self.needed(round_number, neurons).layout(specs) if specs else None

    def missing(self, round_number: int, neurons: Sequence[Indices], reuses_frozen: bool) -> dict[str, TensorSpec]:
        """Return the specs of the parts that are sent beside a subnet; see `layout`."""
        return self.needed(round_number, neurons).missing(self._keys if reuses_frozen else {})

    def needed(self, round_number: int, neurons: Sequence[Indices]) -> Needed:
        """Return what the process reads in a round and does not train; for the arguments see `layout`."""
        rest_of = round_number if self._held.has_rest(round_number, neurons) else None
        return needed(self._split, self._exchange, neurons, rest_of)

    def update(
        self,
        neurons: Sequence[Indices],
        worker: int,
        round_number: int,
        received: Message | None,
        device: torch.device,
    ) -> None:
        """Store the received parts, and drop those that are not needed in a round.

        Args:
            neurons: For each group, the neurons that the worker holds in the round.
            worker: Which worker of the round.
            round_number: The round.
            received: The message that was sent beside the subnet; None: none was sent.
            device: The device on which the worker trains.

        Raises:
            PoolError: The message belongs to another round or worker, or a part is neither cached nor received.
        """
        parts = self.needed(round_number, neurons)
        has_rest = parts.has_rest
        if received is not None:
            received.read_header(round_number, EVERY_WORKER if has_rest else worker)
        sent = received.tensors if received is not None else {}
        tensors: dict[str, Tensor] = {}
        rest: dict[str, CodedTensor] = {}
        for name, spec in parts.specs.items():
            if name in sent:  # copies: the message's memory is reused
                if has_rest:
                    coded = {key: sent[key].to(device, copy=True) for key in (name, name + SCALE) if key in sent}
                    rest[name] = CodedTensor(name, coded, spec, parts.coding)
                else:
                    tensors[name] = decoded(sent, name, spec, parts.coding).to(device, copy=True)
            elif self._keys.get(name) == parts.keys[name]:
                if has_rest:
                    rest[name] = self.rest[name]
                else:
                    tensors[name] = self.tensors[name]
            else:
                raise PoolError(
                    f"worker {worker} does not have its part of '{name}' (frozen) and was not sent it for round "
                    f"{round_number}: are all processes running the same version with the same configuration?"
                )
        self.tensors, self.rest, self._keys = tensors, rest, parts.lasting_keys


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
