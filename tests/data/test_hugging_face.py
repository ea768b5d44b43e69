"""Data sets of Hugging Face's `datasets`: rows as mappings, read several at once, and streams with shards."""

from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

import ist
from ist.data.loading.stream import StreamPart
from ist.errors import DataError
from tests.conftest import assert_same, clone, data, naming
from tests.networks import NETWORKS, seeded


def rows(size: int = 60) -> datasets.Dataset:
    inputs, labels = data(size).tensors
    return datasets.Dataset.from_dict({"input": inputs.tolist(), "label": labels.tolist()}).with_format("torch")


def pairs(items: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([item["input"] for item in items]), torch.stack([item["label"] for item in items])


def trained(dataset: Any, **arguments: Any) -> dict[str, Tensor]:
    model = seeded(NETWORKS["no batch norm"])
    settings = {"workers": 2, "rounds": 2, "local_steps": 3, "batch_size": 5, "progress": False}
    ist.train(model, dataset, **{**settings, **arguments})
    return clone(model.state_dict())


@pytest.mark.procs
def test_rows_and_a_collate_function_give_the_bits_of_tensors() -> None:
    expected = trained(data(60), test_data=data(60))

    assert_same(trained(rows(), test_data=rows(), collate_fn=pairs), expected)
    assert_same(trained(rows(), test_data=rows(), collate_fn=pairs, loader={"workers": 1}), expected)


def test_rows_without_a_collate_function_are_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=naming("item of Dataset is a dict", "collate_fn")):
        trained(rows())


def test_a_worker_reads_its_own_shards_of_a_stream_if_they_can_be_divided() -> None:
    stream = rows(24).to_iterable_dataset(num_shards=4)

    def read(num_workers: int, worker: int) -> list[int]:
        part = StreamPart(stream, 0).part(num_workers, worker)
        return [number_of(part[position]["input"]) for position in range(24 // num_workers)]

    inputs = data(24).tensors[0]

    def number_of(item: Tensor) -> int:
        return int((inputs == item).all(dim=1).nonzero())

    assert [read(2, worker) for worker in range(2)] == [list(range(12)), list(range(12, 24))]
    assert [read(3, worker) for worker in range(3)] == [list(range(worker, 24, 3)) for worker in range(3)]


@pytest.mark.procs
def test_a_shuffled_stream_gives_the_same_bits_in_a_loader_process_and_another_order_in_each_pass() -> None:
    stream = rows(24).to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=10)
    part = StreamPart(stream, 0)

    expected = trained(stream, collate_fn=pairs)

    assert_same(trained(stream, collate_fn=pairs, loader={"workers": 1}), expected)
    passes = [[part[position]["input"].tolist() for position in range(first, first + 24)] for first in (0, 24)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])


def whole_batch(network: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(network(batch["input"]), batch["label"])


@pytest.mark.procs
def test_a_step_gets_batches_of_rows_as_they_are_also_of_a_stream() -> None:
    example = torch.zeros(2, 12)
    stream = rows(24).to_iterable_dataset(num_shards=4)

    found = trained(rows(), step=whole_batch, example=example, loader={"workers": 1})
    of_stream = trained(stream, step=whole_batch, example=example)

    assert_same(found, trained(data(60)))
    assert_same(of_stream, trained(stream, collate_fn=pairs))
