"""How data are dealt: every sample once an epoch, even batches, fixed shards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ist.data.batches import Dealing, fetch, length, take_shard
from ist.errors import DataError


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.integers(0, 5))
def test_every_sample_is_seen_once_an_epoch(samples: int, workers: int, batch_size: int, epoch: int) -> None:
    if samples < workers:
        with pytest.raises(DataError, match=f"{samples} training samples cannot be dealt to {workers} workers"):
            Dealing(samples, workers, batch_size, 0)
        return
    dealing = Dealing(samples, workers, batch_size, 0)
    steps = range(epoch * dealing.steps_per_epoch, (epoch + 1) * dealing.steps_per_epoch)

    seen = [dealing.shard(worker)[dealing.batch(worker, step)] for worker in range(workers) for step in steps]

    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(samples))
    sizes = [len(batch) for batch in seen]
    assert min(sizes) >= 1
    for worker in range(workers):
        own = sizes[worker * len(steps) : (worker + 1) * len(steps)]
        assert max(own) - min(own) <= 1
    assert max(sizes) <= batch_size + 1


def test_workers_and_epochs_have_orders_of_their_own() -> None:
    dealing = Dealing(400, 4, 25, 0)

    assert not np.array_equal(dealing.batch(0, 0), dealing.batch(1, 0))
    assert not np.array_equal(dealing.batch(0, 0), dealing.batch(0, dealing.steps_per_epoch))
    assert not np.array_equal(dealing.shard(0), Dealing(400, 4, 25, 1).shard(0))


class Squares(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index**2)]), index


def test_any_map_style_data_set_gives_the_batches_of_a_tensor_data_set() -> None:
    tensors = TensorDataset(torch.arange(10.0).pow(2).unsqueeze(1), torch.arange(10))
    shard = np.array([1, 4, 7, 9])

    for dataset in (Squares(), tensors):
        inputs, targets = fetch(take_shard(dataset, shard), np.array([2, 0]), torch.device("cpu"))
        assert inputs.tolist() == [[49.0], [1.0]]
        assert targets.tolist() == [7, 1]


def test_a_stream_is_refused() -> None:
    class Stream(Dataset[int]):
        pass

    with pytest.raises(DataError, match="Stream has no length"):
        length(Stream())
