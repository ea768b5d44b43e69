"""A subnet as one flat buffer: what crosses the network, and how many bytes that is.

A message is a header of 128 bytes and then every tensor, each beginning at a multiple of 64 bytes, so
that a worker trains on the received buffer itself: nothing is unpacked, and the trained buffer goes
back as it is. Both ends derive the layout from the partition; only values are sent, and a fingerprint
of the layout in the header proves that both derived the same.

Law: Message.tensors are views; writing them is packing, reading them is unpacking.
Not here: sending (`ist/pools/`), loss, data, who owns what.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ist.errors import PoolError
from ist.measurements import Numbers, check_worker, nothing_measured, worker_slots
from ist.tensors import TensorSpec

HEADER_BYTES = 128
_FINGERPRINT, _ROUND, _WORKER, _REUSES_FROZEN = 0, 1, 2, 10
"""Slots of a header, of 8 bytes each; `ist/measurements.py` names those of what a worker measures."""
ALIGNMENT = 64  # a cache line, and what torch's own allocator guarantees its kernels


@dataclass(frozen=True)
class Header:
    """What a message says beside its tensors; travels as float64 values.

    Attributes:
        round_number: The round, from 0.
        worker: Which worker the message goes to or comes from.
        numbers: What the worker has measured; all 0 on the way to it.
        reuses_frozen: On the way to a worker, whether it is to keep the frozen parameters that it holds.
    """

    round_number: int
    worker: int
    numbers: Numbers = field(default_factory=nothing_measured)
    reuses_frozen: bool = False

    def __post_init__(self) -> None:
        check_worker(self.numbers)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a message lies."""

    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    nbytes: int
    fingerprint: int

    def end_of(self, names: Sequence[str]) -> int:
        """Return the length in bytes of the part that holds the header and `names`, the layout's first tensors."""
        assert list(self.specs)[: len(names)] == list(names)
        after = list(self.offsets.values())[len(names) :]
        return after[0] if after else self.nbytes


def layout_of(specs: Mapping[str, TensorSpec]) -> Layout:
    """Lay out tensors in a message, in the order given."""
    offsets, end = {}, HEADER_BYTES
    for name, spec in specs.items():
        offsets[name] = end
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    text = ";".join(f"{name}:{spec.shape}:{spec.dtype}" for name, spec in specs.items())
    return Layout(dict(specs), offsets, end, zlib.crc32(text.encode()))


class Message:
    """A flat byte buffer, and views of the tensors in it.

    Attributes:
        layout: Where each tensor lies.
        flat: uint8, shape (layout.nbytes,): what is sent.
        tensors: Name to a view into `flat`.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", flat: Tensor | None = None) -> None:
        self.layout = layout
        # Zeros, once: padding must not leak old memory into the network.
        self.flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device) if flat is None else flat
        self.tensors: dict[str, Tensor] = {
            name: self.flat[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)
            for (name, spec), offset in zip(layout.specs.items(), layout.offsets.values(), strict=True)
        }

    @property
    def nbytes(self) -> int:
        """Bytes that cross the network."""
        return self.layout.nbytes

    def write_header(self, header: Header) -> None:
        """Write the header, with the layout's fingerprint."""
        values = torch.zeros(HEADER_BYTES // 8, dtype=torch.float64)
        values[_FINGERPRINT] = self.layout.fingerprint
        values[_ROUND], values[_WORKER], values[_REUSES_FROZEN] = (
            header.round_number,
            header.worker,
            header.reuses_frozen,
        )
        for slot, measured in worker_slots():
            values[slot] = header.numbers[measured.name]
        self._header().copy_(values)

    def read_header(self, round_number: int, worker: int) -> Header:
        """Return the header after checking that it is of this round, worker and layout.

        Raises:
            PoolError: The message belongs to something else.
        """
        values = self._header().tolist()
        found = values[_FINGERPRINT]
        numbers = {measured.name: measured.kind(values[slot]) for slot, measured in worker_slots()}
        header = Header(int(values[_ROUND]), int(values[_WORKER]), numbers, bool(values[_REUSES_FROZEN]))
        expected = (self.layout.fingerprint, round_number, worker)
        if (found, header.round_number, header.worker) != expected:
            raise PoolError(
                f"expected a message of (layout, round, worker) {expected}, received "
                f"{(int(found), header.round_number, header.worker)}: are all processes running the same "
                "version with the same configuration?"
            )
        return header

    def _header(self) -> Tensor:
        return self.flat[:HEADER_BYTES].view(torch.float64)
