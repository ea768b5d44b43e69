"""Encode a subnet's tensors for a message, and decode them: unchanged, or matrices in fewer bits.

Where it sits: `ist/transport/endpoints.py` uses it on both ends, `frozen_parameters.py` for frozen parameters.
Only matrices are rounded: floating-point tensors of the network with two or more dims. All other tensors are sent
unchanged: vectors are small and sensitive to rounding; optimizer state and integers must not be rounded.
Law: with 'exact' coding and 'weights' as values nothing is copied: the worker trains the received bytes themselves.
Not here: rounding (`ist/transport/quantize.py`), sending bytes (`ist/pools/`), who holds which neurons.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ist.config.partition import Coding, Exchange
from ist.tensors import TensorSpec
from ist.transport.message import Layout, Message, layout_of
from ist.transport.quantize import dequantize, packed_columns, quantize

SCALE = "#scale"
"""Suffix of the scales of a rounded matrix: `linear_1.weight#scale`."""

GROUP = 32
"""In the frozen rest of the network, as many consecutive numbers of a row have a common scale, a bfloat16."""

_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MessageLayouts:
    """The layouts of a subnet's two messages.

    Attributes:
        plain: The layout of the tensors that the worker trains.
        down: The layout of the message to the worker; the same object as `plain` if nothing is rounded or subtracted.
        up: The layout of the message that it returns; like `down`.
    """

    plain: Layout
    down: Layout
    up: Layout

    @property
    def is_plain(self) -> bool:
        """Whether the worker trains the received bytes themselves."""
        return self.down is self.plain and self.up is self.plain

    @property
    def nbytes(self) -> int:
        """Bytes of memory that hold either message."""
        return max(self.down.nbytes, self.up.nbytes)


def coded_layouts(plain: Layout, settings: Exchange) -> MessageLayouts:
    """Return the layouts of a subnet's messages from the layout of its tensors."""
    if settings.down == settings.up == "exact" and settings.values == "weights":
        return MessageLayouts(plain, plain, plain)
    return MessageLayouts(plain, _coded(plain, settings.down), _coded(plain, settings.up))


def sent_bytes(layouts: MessageLayouts, names: Sequence[str]) -> int:
    """Return the bytes of the message down up to the end of `names`, which are the first tensors of `plain`."""
    sent = set(names)
    return layouts.down.end_of([name for name in layouts.down.specs if name.removesuffix(SCALE) in sent])


class MessageBuffers:
    """The memory of a subnet's messages: the returned message overwrites the one that was sent.

    Args:
        layouts: The layouts of the messages.
        device: The device of the memory.
        flat: Existing memory, uint8, at least as long as each message that is used; None: allocate it.
    """

    def __init__(self, layouts: MessageLayouts, device: torch.device | str = "cpu", flat: Tensor | None = None) -> None:
        self.layouts = layouts
        # Zeros: the padding between tensors must not send old memory.
        self.flat = torch.zeros(layouts.nbytes, dtype=torch.uint8, device=device) if flat is None else flat

    @cached_property
    def down(self) -> Message:
        """The message to the worker."""
        return Message(self.layouts.down, flat=self.flat[: self.layouts.down.nbytes])

    @cached_property
    def up(self) -> Message:
        """The message that the worker returns."""
        if self.layouts.up is self.layouts.down:
            return self.down
        return Message(self.layouts.up, flat=self.flat[: self.layouts.up.nbytes])


def encode(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], coding: Coding) -> None:
    """Encode tensors into the tensors of a message.

    Args:
        tensors: Plain tensors, by name.
        into: The message's tensors, overwritten; their shapes are those of `coded_specs`.
        coding: How matrices are encoded.
    """
    bits = _bits(coding)
    for name, tensor in tensors.items():
        if name + SCALE in into:
            scales = into[name + SCALE]
            if not len(scales):
                continue
            codes, scale = quantize(tensor.detach().reshape(len(scales), -1), bits, scales.dtype)
            into[name].copy_(codes.view(into[name].shape))
            scales.copy_(scale)
        else:
            into[name].copy_(tensor)


def decode(
    coded: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], coding: Coding
) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors of a message one by one; see `decoded`."""
    for name, spec in specs.items():
        yield name, decoded(coded, name, spec, coding)


def decoded(coded: Mapping[str, Tensor], name: str, spec: TensorSpec, coding: Coding) -> Tensor:
    """Return a plain tensor of a message: a new tensor, or the message's own if it is not encoded.

    Args:
        coded: The message's tensors.
        name: The tensor's name.
        spec: Its plain shape and dtype.
        coding: How matrices are encoded.
    """
    if name + SCALE not in coded:
        return coded[name].to(spec.dtype)
    scales = coded[name + SCALE]  # one for each row, or for each group of numbers in a row
    if not len(scales):
        return torch.empty(spec.shape, dtype=spec.dtype, device=scales.device)
    codes, columns = coded[name].view(len(scales), -1), prod(spec.shape) // len(scales)
    return dequantize(codes, scales, columns, _bits(coding)).view(spec.shape).to(spec.dtype)


@dataclass(frozen=True)
class CodedTensor:
    """A full tensor in encoded form, as it has arrived in a message.

    Attributes:
        name: Its name.
        coded: Its encoded tensors, as in the message.
        spec: Its plain shape and dtype.
        coding: How it is encoded.
    """

    name: str
    coded: Mapping[str, Tensor]
    spec: TensorSpec
    coding: Coding

    def decode(self) -> Tensor:
        """Return the plain tensor: a new one at each call."""
        value = decoded(self.coded, self.name, self.spec, self.coding)
        return value.clone() if value is self.coded.get(self.name) else value


def travels_as_delta(name: str, spec: TensorSpec) -> bool:
    """Return whether 'deltas' sends this tensor's change: true for floating-point tensors of the network."""
    return "@" not in name and spec.dtype.is_floating_point


def coded_specs(specs: Mapping[str, TensorSpec], coding: Coding, group: int | None = None) -> dict[str, TensorSpec]:
    """Return the specs of a message that holds tensors of the given specs, in the same order.

    Args:
        specs: The specs of plain tensors.
        coding: How matrices are encoded.
        group: As many consecutive numbers of a row have a common scale, a bfloat16, where they divide a row; None: a
            row has one scale, a float32.
    """
    bits, found = _bits(coding), {}
    for name, spec in specs.items():
        if not _is_matrix(name, spec) or coding == "exact":
            found[name] = spec
        elif bits:
            rows, columns = spec.shape[0], prod(spec.shape[1:])
            found[name] = TensorSpec((rows, packed_columns(columns, bits)), torch.uint8)
            is_grouped = group is not None and columns and columns % group == 0
            scales = rows * (columns // group) if is_grouped and group else rows
            found[name + SCALE] = TensorSpec((scales,), torch.bfloat16 if is_grouped else torch.float32)
        else:
            half = _HALF[coding]
            found[name] = TensorSpec(spec.shape, half if half.itemsize < spec.dtype.itemsize else spec.dtype)
    return found


def _coded(plain: Layout, coding: Coding) -> Layout:
    return layout_of(coded_specs(plain.specs, coding), plain.header_bytes)


def _is_matrix(name: str, spec: TensorSpec) -> bool:
    return travels_as_delta(name, spec) and len(spec.shape) >= 2


def _bits(coding: Coding) -> int:
    """Return the bits of a number in a coding with a scale for each row; 0 for all other codings."""
    return int(coding.removeprefix("int")) if coding.startswith("int") else 0
