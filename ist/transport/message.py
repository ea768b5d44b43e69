"""A message: a header and tensors in one flat buffer.

A message is a header of 128 bytes (more, if a step logs numbers), followed by the tensors; each starts at a multiple
of 64 bytes. So a worker can train on the received buffer itself, without unpacking, and return the trained buffer. Both
ends derive the layout from the partition, so only values are sent. The header contains a fingerprint of the layout,
which the receiver compares with its own.

Where it sits: `ist/transport/codec.py` and `frozen_parameters.py` derive layouts; pools send `Message.flat`.
Law: `Message.tensors` are views; writing them packs the message, reading them unpacks it.
Not here: sending (`ist/pools/`), which tensors a message holds, what the measured numbers mean (`ist/measurements.py`).
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
_FINGERPRINT, _ROUND, _WORKER, _REUSES_FROZEN, _NON_FINITE = 0, 1, 2, 10, 11
"""Slots of a header, of 8 bytes each; `ist/measurements.py` names the slots of measured numbers."""
_LOGGED = HEADER_BYTES // 8
"""The slot of the first logged number; a header is longer if numbers are logged."""
EVERY_WORKER = -1
"""The worker in the header of a message that is the same for all workers."""
ALIGNMENT = 64  # a cache line; torch's allocator guarantees the same to its kernels


@dataclass(frozen=True)
class Header:
    """The header of a message; it is sent as float64 values.

    Attributes:
        round_number: The round, from 0.
        worker: The worker that receives or returns the message.
        numbers: The numbers that the worker has measured; all are 0 in a message to it.
        reuses_frozen: In a message to a worker: whether it must reuse the frozen parameters that it already has.
        logged: The sums over the worker's samples of the numbers that `train.logged` names; empty in a message to it.
        non_finite: In a message with a piece of a returned subnet, whose other pieces go to other processes: which
            tensor of the subnet holds non-finite values, counted from 1; 0: none.
    """

    round_number: int
    worker: int
    numbers: Numbers = field(default_factory=nothing_measured)
    reuses_frozen: bool = False
    logged: tuple[float, ...] = ()
    non_finite: int = 0

    def __post_init__(self) -> None:
        check_worker(self.numbers)


@dataclass(frozen=True)
class Layout:
    """The positions of the tensors in a message.

    Attributes:
        specs: The tensors, by name, in order.
        offsets: The first byte of each tensor.
        nbytes: Bytes of the message.
        fingerprint: A checksum of names, shapes and dtypes.
        header_bytes: Bytes of the header.
    """

    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    nbytes: int
    fingerprint: int
    header_bytes: int = HEADER_BYTES

    def end_of(self, names: Sequence[str]) -> int:
        """Return the bytes of the header and of `names`, which are the first tensors of the layout."""
        assert list(self.specs)[: len(names)] == list(names)
        after = list(self.offsets.values())[len(names) :]
        return after[0] if after else self.nbytes


def header_bytes(num_logged: int) -> int:
    """Return the bytes of a header with as many logged numbers."""
    return HEADER_BYTES + -(-8 * num_logged // ALIGNMENT) * ALIGNMENT


def layout_of(specs: Mapping[str, TensorSpec], header: int = HEADER_BYTES) -> Layout:
    """Lay out tensors in a message, in the order given, after a header of so many bytes."""
    offsets, end = {}, header
    for name, spec in specs.items():
        offsets[name] = end
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    text = ";".join(f"{name}:{spec.shape}:{spec.dtype}" for name, spec in specs.items())
    return Layout(dict(specs), offsets, end, zlib.crc32(text.encode()), header)


class Message:
    """A flat byte buffer, and views of the tensors in it.

    Attributes:
        layout: The positions of the tensors.
        flat: uint8, shape (layout.nbytes,): the bytes that are sent.
        tensors: Name to a view into `flat`.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", flat: Tensor | None = None) -> None:
        self.layout = layout
        # Zeros: the padding between tensors must not send old memory.
        self.flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device) if flat is None else flat
        self.tensors: dict[str, Tensor] = {
            name: self.flat[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)
            for (name, spec), offset in zip(layout.specs.items(), layout.offsets.values(), strict=True)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the whole message."""
        return self.layout.nbytes

    def write_header(self, header: Header) -> None:
        """Write the header, with the layout's fingerprint."""
        values = torch.zeros(self.layout.header_bytes // 8, dtype=torch.float64)
        values[_FINGERPRINT] = self.layout.fingerprint
        values[_ROUND], values[_WORKER] = header.round_number, header.worker
        values[_REUSES_FROZEN], values[_NON_FINITE] = header.reuses_frozen, header.non_finite
        for slot, measured in worker_slots():
            values[slot] = header.numbers[measured.name]
        for place, number in enumerate(header.logged, start=_LOGGED):
            values[place] = number
        self._header().copy_(values)

    def read_header(self, round_number: int, worker: int) -> Header:
        """Return the header, after a check that it belongs to this round, worker and layout.

        Raises:
            PoolError: The message belongs to another round, worker or layout.
        """
        values = self._header().tolist()
        found = values[_FINGERPRINT]
        numbers = {measured.name: measured.kind(values[slot]) for slot, measured in worker_slots()}
        header = Header(
            int(values[_ROUND]), int(values[_WORKER]), numbers, bool(values[_REUSES_FROZEN]), tuple(values[_LOGGED:]),
            int(values[_NON_FINITE]),
        )  # fmt: skip
        expected = (self.layout.fingerprint, round_number, worker)
        if (found, header.round_number, header.worker) != expected:
            raise PoolError(
                f"expected a message of (layout, round, worker) {expected}, received "
                f"{(int(found), header.round_number, header.worker)}: are all processes running the same "
                "version with the same configuration?"
            )
        return header

    def _header(self) -> Tensor:
        return self.flat[: self.layout.header_bytes].view(torch.float64)
