"""How a subnet is written for the way: as it is, or its matrices in fewer bits; and what comes back.

Where it sits: the coordinator writes what a worker reads, and reads what the worker writes; pools carry the bytes.
Matrices (tensors of the network with two or more dims, floating point) are rounded; everything else travels as it is:
vectors are few bytes and sensitive, optimiser state and integers are not ours to round.
Law: with 'exact' and 'weights' nothing is copied: the worker trains the very bytes that travel.
Not here: rounding (`ist/transport/quantize.py`), moving bytes, who owns what.
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
"""Marks the scales of a rounded matrix: `linear_1.weight#scale`."""

_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MessageLayouts:
    """A subnet's messages.

    Attributes:
        plain: What the worker trains.
        down: What travels to it; the same object as `plain` where nothing is rounded or subtracted.
        up: What it returns; likewise.
    """

    plain: Layout
    down: Layout
    up: Layout

    @property
    def is_plain(self) -> bool:
        """Whether the worker trains the very bytes that travel."""
        return self.down is self.plain and self.up is self.plain

    @property
    def nbytes(self) -> int:
        """Bytes of memory for either message."""
        return max(self.down.nbytes, self.up.nbytes)


def coded_layouts(plain: Layout, settings: Exchange) -> MessageLayouts:
    """Return the layouts of a subnet."""
    if settings.down == settings.up == "exact" and settings.values == "weights":
        return MessageLayouts(plain, plain, plain)
    return MessageLayouts(plain, _coded(plain, settings.down), _coded(plain, settings.up))


def sent_bytes(layouts: MessageLayouts, names: Sequence[str]) -> int:
    """Return the length of the part of the message down that holds the header and `names`, the plain layout's first."""
    sent = set(names)
    return layouts.down.end_of([name for name in layouts.down.specs if name.removesuffix(SCALE) in sent])


class MessageBuffers:
    """Memory of a subnet's messages: of the one that goes to a worker and, over it, of the one that comes back.

    Args:
        layouts: What the messages look like.
        device: Where to allocate.
        flat: uint8, memory that is already there, as long as the message that will be used.
    """

    def __init__(self, layouts: MessageLayouts, device: torch.device | str = "cpu", flat: Tensor | None = None) -> None:
        self.layouts = layouts
        # Zeros, once: padding must not leak old memory into the network.
        self.flat = torch.zeros(layouts.nbytes, dtype=torch.uint8, device=device) if flat is None else flat

    @cached_property
    def down(self) -> Message:
        """The message to the worker."""
        return Message(self.layouts.down, flat=self.flat[: self.layouts.down.nbytes])

    @cached_property
    def up(self) -> Message:
        """The message that comes back."""
        if self.layouts.up is self.layouts.down:
            return self.down
        return Message(self.layouts.up, flat=self.flat[: self.layouts.up.nbytes])


def encode(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], coding: Coding) -> None:
    """Write tensors into a message's.

    Args:
        tensors: Plain tensors, by name.
        into: The message's tensors, overwritten; of `coded_specs` shape.
        coding: How matrices are written.
    """
    bits = _bits(coding)
    for name, tensor in tensors.items():
        if name + SCALE in into:
            codes, scale = quantize(tensor.detach().reshape(len(tensor), -1), bits)
            into[name].copy_(codes)
            into[name + SCALE].copy_(scale)
        else:
            into[name].copy_(tensor)


def decode(
    coded: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], coding: Coding
) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors of a message, one after the other; see `decoded`."""
    for name, spec in specs.items():
        yield name, decoded(coded, name, spec, coding)


def decoded(coded: Mapping[str, Tensor], name: str, spec: TensorSpec, coding: Coding) -> Tensor:
    """Return a plain tensor of a message: a new one, or the message's own where it is plain.

    Args:
        coded: The message's tensors.
        name: Which.
        spec: Its shape and dtype.
        coding: How matrices were written.
    """
    if name + SCALE not in coded:
        return coded[name].to(spec.dtype)
    matrix = dequantize(coded[name], coded[name + SCALE], prod(spec.shape[1:]), _bits(coding))
    return matrix.view(spec.shape).to(spec.dtype)


def travels_as_delta(name: str, spec: TensorSpec) -> bool:
    """Return whether a tensor's change is sent where changes are: the network's own floating-point tensors."""
    return "@" not in name and spec.dtype.is_floating_point


def coded_specs(specs: Mapping[str, TensorSpec], coding: Coding) -> dict[str, TensorSpec]:
    """Return the specs of a message that holds tensors of the given specs, in the same order."""
    bits, found = _bits(coding), {}
    for name, spec in specs.items():
        if not _is_matrix(name, spec) or coding == "exact":
            found[name] = spec
        elif bits:
            rows, columns = spec.shape[0], prod(spec.shape[1:])
            found[name] = TensorSpec((rows, packed_columns(columns, bits)), torch.uint8)
            found[name + SCALE] = TensorSpec((rows,), torch.float32)
        else:
            half = _HALF[coding]
            found[name] = TensorSpec(spec.shape, half if half.itemsize < spec.dtype.itemsize else spec.dtype)
    return found


def _coded(plain: Layout, coding: Coding) -> Layout:
    return layout_of(coded_specs(plain.specs, coding))


def _is_matrix(name: str, spec: TensorSpec) -> bool:
    return travels_as_delta(name, spec) and len(spec.shape) >= 2


def _bits(coding: Coding) -> int:
    """Bits of a number with a scale for its row; 0 for any other coding."""
    return int(coding.removeprefix("int")) if coding.startswith("int") else 0
