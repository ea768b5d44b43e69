"""Write subnets for the way and read them, on both ends: the coordinator's and the worker's.

Where it sits: between cutting and merging (`ist/subnet/cut.py`) on one end and training (`ist/training/worker.py`) on
the other; a pool carries what is written.
Law: a worker that reads a subnet and writes it back untouched changes nothing, where nothing is rounded ('exact').
Not here: how matrices are rounded (`ist/transport/codec.py`).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ist.config.partition import Coding, Exchange
from ist.rng import Indices
from ist.subnet.cut import Cut, cut_specs, extract, positions, reassemble
from ist.subnet.split_model import SplitModel
from ist.subnet.store import ParameterStore
from ist.tensors import TensorSpec
from ist.transport.codec import (
    MessageBuffers,
    MessageLayouts,
    coded_layouts,
    coded_specs,
    decode,
    decoded,
    encode,
    sent_bytes,
    travels_as_delta,
)
from ist.transport.message import Layout, Message, layout_of


def message_layouts(split: SplitModel, exchange: Exchange, cut: Cut) -> MessageLayouts:
    """Return what a worker's messages look like.

    Args:
        split: The network.
        exchange: How values are coded on the way.
        cut: The worker's positions: `split.cut`.
    """
    return coded_layouts(layout_of(cut_specs(split.specs, cut)), exchange)


def sent_names(split: SplitModel, layout: Layout, round_number: int) -> list[str]:
    """Return the tensors that go to a worker: carried optimizer state does not exist before the first round."""
    return [name for name in layout.specs if round_number > 0 or name in split.model_specs]


def down_bytes(split: SplitModel, layouts: MessageLayouts, round_number: int) -> int:
    """Return how much of the message to a worker is sent; see `sent_names`."""
    return sent_bytes(layouts, sent_names(split, layouts.plain, round_number))


class SubnetWriter:
    """The coordinator's end of the way down."""

    def __init__(self, split: SplitModel, exchange: Exchange) -> None:
        self._split = split
        self._exchange = exchange

    def layouts(self, cut: Cut) -> MessageLayouts:
        """Return what the messages of a cut look like."""
        return message_layouts(self._split, self._exchange, cut)

    def write(self, store: ParameterStore, cut: Cut, round_number: int, buffers: MessageBuffers) -> int:
        """Cut a subnet into its buffers; return how many bytes of it are to be sent."""
        layouts, into = buffers.layouts, buffers.down.tensors
        for name in sent_names(self._split, layouts.plain, round_number):
            if layouts.is_plain:
                store.extract(cut, into={name: into[name]})
            else:  # one tensor after the other: a subnet more would be the memory of a whole network in a finish
                spec = layouts.plain.specs[name]
                part = {name: torch.empty(spec.shape, dtype=spec.dtype, device=buffers.flat.device)}
                store.extract(cut, into=part)
                encode(part, into, self._exchange.down)
        return down_bytes(self._split, layouts, round_number)


def read_trained(exchange: Exchange, store: ParameterStore, cut: Cut, buffers: MessageBuffers) -> Mapping[str, Tensor]:
    """Return what a worker trained, by name: the coordinator's end of the way up.

    Args:
        exchange: How values are coded on the way.
        store: The full network. A tensor, when it is read, must be as it was when the subnet was cut, but for what
            other workers alone hold.
        cut: The worker's positions.
        buffers: Its messages; the one up is read.
    """
    return buffers.up.tensors if buffers.layouts.is_plain else _Trained(exchange, store, cut, buffers)


class _Trained(Mapping[str, Tensor]):
    """Tensors that are made of what has travelled when they are read, so that not all of all workers are in memory."""

    def __init__(self, settings: Exchange, store: ParameterStore, cut: Cut, buffers: MessageBuffers) -> None:
        self._settings = settings
        self._store = store
        self._cut = cut
        self._coded = buffers.up.tensors
        self._specs = buffers.layouts.plain.specs

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        value = decoded(self._coded, name, spec, self._settings.up)
        if not (self._settings.values == "deltas" and travels_as_delta(name, spec)):
            return value
        before = torch.empty(spec.shape, dtype=spec.dtype, device=value.device)
        self._store.extract(self._cut, into={name: before})
        return before.add_(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class WorkerEndpoint:
    """A worker's end of both ways.

    Holds memory for the subnet where what travels is not what is trained, and what rounding took where it is fed back.

    Args:
        split: The network.
        exchange: How values are coded on the way.
        device: Where it computes.

    Attributes:
        taken: What rounding took from this worker's changes and was not made up for yet, whole tensors by name.

    Reference: Seide et al., Interspeech 2014, and Karimireddy et al., arXiv 1901.09847 (error feedback).
    """

    def __init__(self, split: SplitModel, exchange: Exchange, device: torch.device) -> None:
        self._split = split
        self._device = device
        self._settings = exchange
        self._plain: Message | None = None
        self.residuals: dict[str, Tensor] = {}

    def open(self, buffers: MessageBuffers) -> Message:
        """Return the subnet that the buffers hold, to be trained in place."""
        layouts = buffers.layouts
        if layouts.is_plain:
            return buffers.down
        if self._plain is None or self._plain.layout != layouts.plain:
            self._plain = Message(layouts.plain, self._device)
        for name, value in decode(buffers.down.tensors, layouts.plain.specs, self._settings.down):
            self._plain.tensors[name].copy_(value)
        return self._plain

    def close(self, buffers: MessageBuffers, trained: Message, neurons: Sequence[Indices]) -> None:
        """Write the trained subnet into the buffers.

        Args:
            buffers: The messages of the round; the one up is written.
            trained: The subnet; it is overwritten.
            neurons: For each group, those that the worker holds.
        """
        layouts, settings = buffers.layouts, self._settings
        if layouts.is_plain:
            return
        tensors = trained.tensors
        if settings.values == "deltas":
            for name, start in decode(buffers.down.tensors, layouts.plain.specs, settings.down):
                if travels_as_delta(name, layouts.plain.specs[name]):
                    tensors[name].sub_(start)
        if settings.error_feedback:
            self._encode_with_feedback(buffers, tensors, neurons)
        else:
            encode(tensors, buffers.up.tensors, settings.up)

    def _encode_with_feedback(
        self, buffers: MessageBuffers, tensors: Mapping[str, Tensor], neurons: Sequence[Indices]
    ) -> None:
        split, plain, coding = self._split, buffers.layouts.plain.specs, self._settings.up
        rounded = {name: spec for name, spec in split.specs.items() if _is_rounded(name, spec, coding)}
        if not self.residuals:
            self.residuals = {
                name: torch.zeros(spec.shape, dtype=torch.float32, device=self._device)
                for name, spec in rounded.items()
            }
        cut = positions(split.groups, rounded, neurons)
        parts = {name: torch.empty(plain[name].shape, device=self._device) for name in cut}
        extract(self.residuals, cut, into=parts)
        # In float32, whatever the network's dtype: what was taken is small beside the change.
        for name, part in parts.items():
            part.add_(tensors[name])
        encode({**tensors, **parts}, buffers.up.tensors, coding)
        for name, value in decode(buffers.up.tensors, plain, coding):
            if name in parts:
                parts[name].sub_(value)
        reassemble(self.residuals, [cut], [(0, parts)], frozenset(parts))


def _is_rounded(name: str, spec: TensorSpec, coding: Coding) -> bool:
    return coded_specs({name: spec}, coding)[name] != spec
