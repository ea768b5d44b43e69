"""Write and read subnets as messages, for the coordinator and for a worker.

Where it sits: on the coordinator's side between the parameter store (`ist/subnet/stores/parameter_store.py`) and a
pool, on the worker's side between a pool and training (`ist/training/worker.py`).
Law: without rounding ('exact'), a worker that reads a subnet and writes it back unchanged does not change the network.
Not here: how matrices are encoded (`ist/transport/codec.py`), sending messages (`ist/pools/`).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ist.config.partition import Coding, Exchange
from ist.rng import Indices
from ist.subnet.cut import Cut, cut_specs, extract, positions, reassemble
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.parameter_store import ParameterStore
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
from ist.transport.message import Layout, Message, header_bytes, layout_of


def message_layouts(split: SplitModel, exchange: Exchange, cut: Cut) -> MessageLayouts:
    """Return the layouts of a worker's messages.

    Args:
        split: The split network.
        exchange: How messages are encoded.
        cut: The worker's positions: `split.cut`.
    """
    return coded_layouts(layout_of(cut_specs(split.specs, cut), header_bytes(split.num_logged)), exchange)


def sent_names(split: SplitModel, layout: Layout, round_number: int) -> list[str]:
    """Return the tensors that are sent to a worker: before the first round there is no carried optimizer state."""
    return [name for name in layout.specs if round_number > 0 or name in split.model_specs]


def down_bytes(split: SplitModel, layouts: MessageLayouts, round_number: int) -> int:
    """Return how many bytes of the message to a worker are sent; see `sent_names`."""
    return sent_bytes(layouts, sent_names(split, layouts.plain, round_number))


class SubnetWriter:
    """Writes the messages from the coordinator to workers.

    Args:
        split: The split network.
        exchange: How messages are encoded.
    """

    def __init__(self, split: SplitModel, exchange: Exchange) -> None:
        self._split = split
        self._exchange = exchange

    def layouts(self, cut: Cut) -> MessageLayouts:
        """Return the layouts of the messages of a cut."""
        return message_layouts(self._split, self._exchange, cut)

    def write(self, store: ParameterStore, cut: Cut, round_number: int, buffers: MessageBuffers) -> int:
        """Extract a subnet into its message down; return how many of its bytes are to be sent."""
        layouts, into = buffers.layouts, buffers.down.tensors
        for name in sent_names(self._split, layouts.plain, round_number):
            if layouts.is_plain:
                store.extract(cut, into={name: into[name]})
            else:  # tensor by tensor: in a full-width phase a second subnet would need the memory of a full network
                spec = layouts.plain.specs[name]
                part = {name: torch.empty(spec.shape, dtype=spec.dtype, device=buffers.flat.device)}
                store.extract(cut, into=part)
                encode(part, into, self._exchange.down)
        return down_bytes(self._split, layouts, round_number)


def read_trained(exchange: Exchange, store: ParameterStore, cut: Cut, buffers: MessageBuffers) -> Mapping[str, Tensor]:
    """Return the tensors that a worker trained, by name, from its message up.

    Args:
        exchange: How messages are encoded.
        store: The full network. When a tensor is read, the entries that the worker holds must have the values that they
            had when the subnet was extracted.
        cut: The worker's positions.
        buffers: The worker's messages; the message up is read.
    """
    return buffers.up.tensors if buffers.layouts.is_plain else _Trained(exchange, store, cut, buffers)


class _Trained(Mapping[str, Tensor]):
    """Decodes each tensor when it is read, so that the decoded subnets of all workers are never in memory together."""

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
    """Reads and writes the messages of a worker.

    It has memory for the decoded subnet, if messages are encoded, and the residuals of error feedback.

    Args:
        split: The split network.
        exchange: How messages are encoded.
        device: The device on which the worker trains.

    Attributes:
        residuals: The error-feedback buffer: rounding errors of this worker that are not sent yet, by name, in full
            shape.

    Reference: Seide et al., Interspeech 2014, and Karimireddy et al., arXiv 1901.09847 (error feedback).
    """

    def __init__(self, split: SplitModel, exchange: Exchange, device: torch.device) -> None:
        self._split = split
        self._device = device
        self._settings = exchange
        self._plain: Message | None = None
        self.residuals: dict[str, Tensor] = {}

    def open(self, buffers: MessageBuffers) -> Message:
        """Read the message down: return the subnet, which is trained in place."""
        layouts = buffers.layouts
        if layouts.is_plain:
            return buffers.down
        if self._plain is None or self._plain.layout != layouts.plain:
            self._plain = Message(layouts.plain, self._device)
        for name, value in decode(buffers.down.tensors, layouts.plain.specs, self._settings.down):
            self._plain.tensors[name].copy_(value)
        return self._plain

    def close(self, buffers: MessageBuffers, trained: Message, neurons: Sequence[Indices]) -> None:
        """Write the message up from the trained subnet.

        Args:
            buffers: The messages of the round; the message up is written.
            trained: The subnet; it is overwritten.
            neurons: For each group, the neurons that the worker holds.
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
        # Add in float32 for every dtype of the network: residuals are small compared with the change.
        for name, part in parts.items():
            part.add_(tensors[name])
        encode({**tensors, **parts}, buffers.up.tensors, coding)
        for name, value in decode(buffers.up.tensors, plain, coding):
            if name in parts:
                parts[name].sub_(value)
        reassemble(self.residuals, [cut], [(0, parts)], frozenset(parts))


def _is_rounded(name: str, spec: TensorSpec, coding: Coding) -> bool:
    return coded_specs({name: spec}, coding)[name] != spec
