"""The table of measured numbers, and that what is in it reaches everyone who writes or shows numbers."""

import struct

import pytest
import torch

from ist.measurements import MEASUREMENTS, check_round, check_worker, combined, worker_slots
from ist.tensors import TensorSpec
from ist.transport.message import HEADER_BYTES, Header, Message, layout_of
from tests.conftest import round_numbers, worker_numbers

# What is in a message's header, 8 bytes each, from its beginning. Another order is another format.
HEADER = (
    "fingerprint", "round_number", "worker", "steps", "samples", "loss_sum", "compute_s", "cpu_s", "memory_bytes",
    "aside_s", "relies",
)  # fmt: skip


def test_every_number_has_a_name_and_a_slot_of_its_own_that_the_header_has_room_for() -> None:
    names = [measured.name for measured in MEASUREMENTS]
    slots = [slot for slot, _ in worker_slots()]
    taken = [HEADER.index(name) for name in ("fingerprint", "round_number", "worker", "relies")]

    assert len(set(names)) == len(names)
    assert len({*slots, *taken}) == len(slots) + len(taken)
    assert max(slots) < HEADER_BYTES // 8
    for measured in MEASUREMENTS:
        assert (measured.slot is not None) == (measured.source == "worker"), measured.name
        assert measured.combine is None or measured.source == "worker", measured.name
        assert measured.meaning.endswith("."), measured.name


def test_a_header_has_the_bytes_that_it_always_had() -> None:
    layout = layout_of({"a": TensorSpec((3,), torch.float32)})
    told = worker_numbers(
        steps=4, samples=10, loss_sum=0.1, compute_s=2.5, cpu_s=1 / 3, memory_bytes=2**40 + 1, aside_s=0.25
    )
    message = Message(layout)
    message.flat.fill_(255)  # of another message that lay here

    message.write_header(Header(7, 2, told, relies=True))

    values = (layout.fingerprint, 7, 2, 4, 10, 0.1, 2.5, 1 / 3, 2**40 + 1, 0.25, 1)
    assert len(values) == len(HEADER)
    assert bytes(message.flat[:HEADER_BYTES].tolist()) == struct.pack("<11d", *values) + bytes(HEADER_BYTES - 88)
    back = message.read_header(7, 2)
    assert back == Header(7, 2, told, relies=True)
    assert {name: type(value) for name, value in back.numbers.items()} == {m.name: m.kind for _, m in worker_slots()}


@pytest.mark.parametrize("parallel", [True, False])
def test_the_numbers_of_workers_make_those_of_the_round(parallel: bool) -> None:
    one = worker_numbers(steps=2, samples=5, compute_s=1.0, memory_bytes=70, aside_s=0.5)
    other = worker_numbers(steps=3, samples=6, compute_s=4.0, memory_bytes=40, aside_s=1.0)

    assert combined([one, other], parallel) == {
        "steps": 3, "samples": 11, "compute_s": 2.5, "memory_bytes": 70, "aside_s": 1.0 if parallel else 1.5,
    }  # fmt: skip


def test_a_number_that_nobody_measured_or_that_is_not_in_the_table_is_an_error_that_names_it() -> None:
    whole = worker_numbers()

    with pytest.raises(AssertionError, match=r"\['cpu_s'\] of a worker"):
        check_worker({name: value for name, value in whole.items() if name != "cpu_s"})
    with pytest.raises(AssertionError, match=r"\['volts'\] of a worker"):
        Header(0, 0, {**whole, "volts": 3.0})
    with pytest.raises(AssertionError, match=r"\['volts'\] of a round"):
        check_round(round_numbers([whole], volts=3.0))
