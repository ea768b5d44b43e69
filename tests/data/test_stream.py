"""Streams as training data: each worker's items, passes, seeding, skipping, and what needs a length is refused."""

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import ist
from ist.data.batches import as_numbered
from ist.data.loading.stream import StreamPart
from ist.errors import ConfigError, DataError
from tests.conftest import assert_same, clone, data, generators_left_alone, naming
from tests.networks import NETWORKS, seeded


class Numbers(IterableDataset[Any]):
    """The numbers from `pass` * 100 on."""

    def __init__(self, length: int = 10) -> None:
        self.length, self.passes, self.epochs = length, 0, list[int]()

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from range(self.length)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_each_worker_takes_its_own_items_of_a_stream_and_a_stream_that_ends_starts_again() -> None:
    stream = Numbers(10)
    parts = [StreamPart(stream, 0).part(3, worker) for worker in range(3)]

    found = [[part[position] for position in range(5)] for part in parts]

    assert found == [[0, 3, 6, 9, 2], [1, 4, 7, 0, 3], [2, 5, 8, 1, 4]]
    assert stream.epochs == [0, 1] * 3


def test_a_position_before_the_last_one_is_read_from_the_start() -> None:
    stream = Numbers(10)
    part = StreamPart(stream, 0)

    assert [part[position] for position in (4, 5, 2, 12)] == [4, 5, 2, 2]
    assert stream.passes == 3


def test_a_copy_for_another_process_reads_from_the_start() -> None:
    part = StreamPart(Endless(), 0).part(2, 1)
    before = [part[position].tolist() for position in (0, 3)]

    copy = pickle.loads(pickle.dumps(part))

    assert [copy[position].tolist() for position in (0, 3)] == before


class Endless(IterableDataset[Any]):
    """Items that torch, `random` and `numpy.random` have drawn, without an end; as with a shuffling buffer, what is
    drawn for an item changes a later one."""

    def __iter__(self) -> Iterator[Tensor]:
        before = 0.0
        while True:
            drawn = torch.tensor([float(torch.rand(())), random.random(), np.random.normal(), before])
            before = float(drawn[1])
            yield drawn


def test_what_a_stream_draws_does_not_depend_on_the_process_or_on_which_items_are_skipped() -> None:
    torch.manual_seed(1)
    with generators_left_alone():
        part = StreamPart(Endless(), 3)
        expected = [part[position].tolist() for position in range(8)]
    torch.manual_seed(2)

    skipping = StreamPart(Endless(), 3)
    assert [skipping[position].tolist() for position in (2, 5, 7)] == [expected[position] for position in (2, 5, 7)]
    assert StreamPart(Endless(), 4)[0].tolist() != expected[0]
    assert len({tuple(item) for item in expected}) == 8


class Pairs(IterableDataset[Any]):
    """The items of a small data set, with noise."""

    def __init__(self, size: int = 30, bad: int = -1) -> None:
        self.inner, self.bad = data(size), bad

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (inputs, target) in enumerate(self.inner):  # type: ignore[arg-type]
            if number == self.bad:
                raise OSError(f"shard {number} is gone")
            yield inputs + torch.randn(12) / 10, target


SETTINGS: dict[str, Any] = {"workers": 2, "rounds": 4, "local_steps": 2, "batch_size": 4, "progress": False}


def trained(stream: Any, **arguments: Any) -> dict[str, Tensor]:
    model = seeded(NETWORKS["no batch norm"])
    ist.train(model, stream, **{**SETTINGS, **arguments})
    return clone(model.state_dict())


def test_one_worker_on_a_stream_is_a_plain_loop() -> None:
    ours, plain = (seeded(NETWORKS["no batch norm"]) for _ in range(2))
    items = as_numbered(Pairs(), 5)
    ist.train(ours, Pairs(), **{**SETTINGS, "workers": 1, "rounds": 1, "local_steps": 9, "seed": 5})

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(9):  # more than one pass
        inputs, targets = zip(*(items[4 * step + place] for place in range(4)), strict=True)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(torch.stack(inputs)), torch.stack(targets)).backward()
        optimizer.step()

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


@pytest.mark.procs
def test_a_loader_process_and_a_resumed_run_give_the_same_bits_on_a_stream(tmp_path: Path) -> None:
    expected = trained(Pairs(), test_data=data(20))

    assert_same(trained(Pairs(), test_data=data(20), loader={"workers": 1}), expected)

    class StopError(Exception):
        pass

    model, calls = seeded(NETWORKS["no batch norm"]), []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            raise StopError
        return nn.functional.cross_entropy(outputs, targets)

    stop_at = 12
    with pytest.raises(DataError, match="StopError"):
        ist.train(model, Pairs(), loss=loss, run_dir=tmp_path / "run", **SETTINGS)
    model, stop_at = seeded(NETWORKS["no batch norm"]), -1
    ist.train(model, Pairs(), loss=loss, run_dir=tmp_path / "run", resume=True, **SETTINGS)
    assert_same(clone(model.state_dict()), expected)


def test_a_stream_that_fails_is_reported_with_the_item_the_round_and_the_worker() -> None:
    with pytest.raises(DataError, match=naming("round 1, worker ", "of Pairs", "OSError: shard 18 is gone")):
        trained(Pairs(bad=18))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rounds": None, "epochs": 2}, ["'train.epochs' is 2", "stream", "'train.rounds'"]),
        ({"shuffle": "global"}, ["'data.shuffle' is global", "stream"]),
        ({"skew": {"alpha": 0.3}}, ["'data.skew'", "stream"]),
        ({"loader": {"workers": 2}}, ["'data.loader.workers' is 2", "stream", "1 or 0"]),
    ],
)
def test_what_needs_a_length_is_refused_for_a_stream(arguments: Any, named: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*named)):
        trained(Pairs(), **arguments)


def test_a_stream_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(DataError, match=naming("Pairs", "IterableDataset", "map-style")):
        trained(data(), test_data=Pairs())
    with pytest.raises(DataError, match=naming("data is a DataLoader", "Pairs", "loader.dataset")):
        trained(DataLoader(Pairs(), batch_size=4))
    with pytest.raises(DataError, match=naming("Numbers", "no items")):
        trained(Numbers(0))
    with pytest.raises(DataError, match=naming("Numbers", "pair (inputs, targets)")):
        trained(Numbers(10))


def test_batch_norm_statistics_come_from_the_first_items_of_a_stream() -> None:
    model = seeded(NETWORKS["two hidden layers, batch norm"])

    result = ist.train(
        model, Pairs(), test_data=data(20), evaluate={"batch_size": 8, "statistics_batches": 3}, **SETTINGS
    )

    assert result.history[-1]["test_loss"] < 10
    assert "epoch" not in result.history[-1]
