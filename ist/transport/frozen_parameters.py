"""Frozen parameters: which of them a worker lacks, how they travel, and how a worker holds them.

A parameter that is not trained (`requires_grad` is False) has one value in the whole run. A worker is sent its part of
it when it does not have it: in its first round, and when its part is another one than in its last round. That travels
beside the subnet, in a message of its own, and never comes back.

Both ends derive that message from the partition. The coordinator says in a subnet's header whether it relies on what
the worker holds: only where the last subnet that it sent to this very process came back well. In all other cases
everything is sent. A worker checks what it has against what it needs: a mistake is an error and never an old value.

Where it sits: the coordinator writes (`FrozenSender`), pools carry, a worker holds (`FrozenCache`).
Not here: moving bytes (`ist/pools/`), rounding them (`codec.py`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ist.config.partition import Exchange
from ist.errors import ModelError, PoolError
from ist.optimization.schedule import Schedule
from ist.rng import Indices
from ist.subnet.assignments import Assignments
from ist.subnet.cut import Cut, cut_specs, on_device
from ist.subnet.split_model import SplitModel
from ist.subnet.store import LocalStore
from ist.tensors import TensorSpec
from ist.transport.codec import coded_specs, decoded, encode
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.message import Header, Layout, Message, layout_of

PartKey = tuple[bytes | None, ...]
"""What identifies a part of a tensor: for every dim a hash of the positions; None: all of them."""

PartKeys = Mapping[str, PartKey]
"""The parts of a worker, by name of the tensor."""


def part_keys(cut: Cut) -> PartKeys:
    """Return what identifies each part of a cut."""
    return {name: tuple(_hash(held) if held is not None else None for held in dims) for name, dims in cut.items()}


def _hash(positions: Indices | Tensor) -> bytes:
    assert isinstance(positions, np.ndarray)  # not `on_device` yet
    return hashlib.sha256(positions.tobytes()).digest()


def missing_specs(split: SplitModel, cut: Cut, needed: PartKeys, held: PartKeys) -> dict[str, TensorSpec]:
    """Return the narrow specs of the frozen parameters that a worker needs and does not hold.

    Args:
        split: The network.
        cut: What the worker needs: `split.frozen_cut`.
        needed: The keys of that.
        held: Those of what it holds.
    """
    return {name: spec for name, spec in cut_specs(split.frozen_specs, cut).items() if held.get(name) != needed[name]}


def frozen_layout(exchange: Exchange, specs: Mapping[str, TensorSpec]) -> Layout:
    """Return the layout of a message with frozen parameters of the given narrow specs."""
    return layout_of(coded_specs(specs, exchange.down))


def frozen_bytes(
    split: SplitModel, exchange: Exchange, neurons: Sequence[Indices], before: Sequence[Indices] | None
) -> int:
    """Return the length of the message with the frozen parameters that a worker lacks in a round.

    Args:
        split: The network.
        exchange: How values are coded on the way.
        neurons: For each group, those that the worker holds.
        before: The same in its last round; None: it holds nothing.
    """
    held = part_keys(split.frozen_cut(before)) if before is not None else {}
    cut = split.frozen_cut(neurons)
    specs = missing_specs(split, cut, part_keys(cut), held)
    return frozen_layout(exchange, specs).nbytes if specs else 0


def message_bytes(
    split: SplitModel, schedule: Schedule, exchange: Exchange, held: Assignments, worker: int
) -> tuple[int, int]:
    """Return (bytes to a worker, bytes from it) of all messages in a full round after the first.

    Args:
        split: The network.
        schedule: The rounds of the run.
        exchange: How values are coded on the way.
        held: Who holds which neurons.
        worker: Which worker.
    """
    main = schedule.main_round
    layouts = message_layouts(split, exchange, split.cut(held.of(main)[worker]))
    goes_on = main + 1 < schedule.num_rounds and schedule.spans[main + 1].stage == schedule.spans[main].stage
    earlier, later = (main, main + 1) if goes_on else (max(0, main - 1), main)
    frozen = 0
    if split.frozen_specs:
        frozen = frozen_bytes(split, exchange, held.of(later)[worker], held.of(earlier)[worker])
    return down_bytes(split, layouts, 1) + frozen, layouts.up.nbytes


class FrozenSender:
    """The coordinator's end.

    Args:
        split: The network.
        exchange: How values are coded on the way.
        tensors: Whole tensors by name, contiguous; those of `split.frozen_specs` are read.
        device: Where they are.
    """

    def __init__(
        self, split: SplitModel, exchange: Exchange, tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._split = split
        self._exchange = exchange
        self._store = LocalStore({name: tensors[name] for name in split.frozen_specs})
        self._device = device
        self._held: dict[str, PartKeys] = {}
        self._sent: dict[str, PartKeys] = {}

    def begin(self, processes: Iterable[str]) -> None:
        """Forget processes that are not there in a round."""
        there = set(processes)
        self._held = {process: keys for process, keys in self._held.items() if process in there}
        self._sent.clear()

    def write(self, process: str, worker: int, round_number: int, cut: Cut) -> tuple[Message | None, bool]:
        """Write what a process lacks in a round.

        Args:
            process: The process that plays the worker; what it holds is unknown until `returned`.
            worker: Which worker of the round.
            round_number: The round.
            cut: What it needs.

        Returns:
            The message, None where it lacks nothing; and whether that relies on what the process holds.
        """
        held = self._held.pop(process, None)
        needed = self._sent[process] = part_keys(cut)
        specs = missing_specs(self._split, cut, needed, held or {})
        if not specs:
            return None, held is not None
        message = Message(frozen_layout(self._exchange, specs), self._device)
        message.write_header(Header(round_number, worker))
        [there] = on_device([cut], self._device)
        for name, spec in specs.items():
            part = {name: torch.empty(spec.shape, dtype=spec.dtype, device=self._device)}
            self._store.extract(there, into=part)
            encode(part, message.tensors, self._exchange.down)
        return message, held is not None

    def returned(self, process: str) -> None:
        """Note that a process has brought back, well, the subnet that it was sent in this round."""
        self._held[process] = self._sent[process]


class FrozenCache:
    """A worker's end: its parts of frozen parameters, which stay from round to round.

    Args:
        split: The network.
        exchange: How values are coded on the way.

    Attributes:
        tensors: Name to narrow tensor; nobody writes to them.
    """

    def __init__(self, split: SplitModel, exchange: Exchange) -> None:
        self._split = split
        self._exchange = exchange
        self.tensors: dict[str, Tensor] = {}
        self._keys: PartKeys = {}

    def layout(self, neurons: Sequence[Indices], reuses_frozen: bool) -> Layout | None:
        """Return the layout of the message that comes beside a subnet; None: there is none.

        Args:
            neurons: For each group, those that the worker holds in the round.
            reuses_frozen: Whether the coordinator relies on what is held here.
        """
        cut = self._split.frozen_cut(neurons)
        specs = missing_specs(self._split, cut, part_keys(cut), self._keys if reuses_frozen else {})
        return frozen_layout(self._exchange, specs) if specs else None

    def update(
        self,
        neurons: Sequence[Indices],
        worker: int,
        round_number: int,
        received: Message | None,
        device: torch.device,
    ) -> Mapping[str, Tensor]:
        """Take what was received, let go what is not needed any more, and return the parts of a round.

        Args:
            neurons: For each group, those that the worker holds in the round.
            worker: Which worker of the round.
            round_number: The round.
            received: The message that came beside the subnet, if one did.
            device: Where the worker computes.

        Raises:
            PoolError: The message is of another round or worker, or something is neither there nor received.
        """
        cut = self._split.frozen_cut(neurons)
        now, specs = part_keys(cut), cut_specs(self._split.frozen_specs, cut)
        if received is not None:
            received.read_header(round_number, worker)
        came = received.tensors if received is not None else {}
        held: dict[str, Tensor] = {}
        for name, spec in specs.items():
            if name in came:
                value = decoded(came, name, spec, self._exchange.down)
                held[name] = value.to(device, copy=True)  # the message's memory is not kept
            elif self._keys.get(name) == now[name]:
                held[name] = self.tensors[name]
            else:
                raise PoolError(
                    f"worker {worker} does not have its part of '{name}' (frozen) and was not sent it for round "
                    f"{round_number}: are all processes running the same version with the same configuration?"
                )
        self.tensors, self._keys = held, now
        return held


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a number for each tensor that is another one, in all likelihood, when the values are."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """Return a number that is another one, in all likelihood, when the tensor's values are."""
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(_INTEGERS[min(8, flat.element_size())]).sum(dtype=torch.int64)) if flat.numel() else 0


def check_frozen(module: nn.Module, bound: Mapping[str, Tensor], sums: Mapping[str, int]) -> None:
    """Check that training has left frozen parameters as they were.

    Args:
        module: The network.
        bound: What its frozen parameters were before, by name.
        sums: The checksums of that.

    Raises:
        ModelError: The forward or the optimiser has changed one.
    """
    for name, parameter in module.named_parameters():
        if name not in bound:
            continue
        before = bound[name]
        same = checksum(before) == sums[name] and (
            # A forward may put a copy in another precision in its place.
            parameter.data_ptr() == before.data_ptr()
            or (parameter.shape == before.shape and bool(torch.equal(parameter.detach(), before.to(parameter.dtype))))
        )
        if not same:
            raise ModelError(
                f"'{name}' is frozen (requires_grad is False) but training changes it, and what is frozen does not "
                "come back from workers. Make it a buffer (register_buffer), which is merged, or let it be trained"
            )
