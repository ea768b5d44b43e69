"""Assigning samples to workers: every sample once per epoch, even batches, fixed shards or new ones every epoch."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ist.data.batches import ShardedSampler, fetch, length, take_shard
from ist.errors import DataError

Shuffle = Literal["local", "global"]
SHUFFLES: tuple[Shuffle, ...] = ("local", "global")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.integers(0, 5), st.sampled_from(SHUFFLES))
def test_every_sample_is_used_once_per_epoch(
    samples: int, workers: int, batch_size: int, epoch: int, shuffle: Shuffle
) -> None:
    if samples < workers:
        with pytest.raises(DataError, match=rf"\b{samples} training samples .*\b{workers} workers"):
            ShardedSampler(samples, workers, batch_size, 0)
        return
    sampler = ShardedSampler(samples, workers, batch_size, 0, shuffle)
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)

    seen = [sampler.shard(worker)[sampler.batch(worker, step)] for worker in range(workers) for step in steps]

    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(samples))
    sizes = [len(batch) for batch in seen]
    assert min(sizes) >= 1
    for worker in range(workers):
        own = sizes[worker * len(steps) : (worker + 1) * len(steps)]
        assert max(own) - min(own) <= 1
    assert max(sizes) <= batch_size + 1


def test_each_worker_and_each_epoch_has_its_own_order() -> None:
    sampler = ShardedSampler(400, 4, 25, 0)

    assert not np.array_equal(sampler.batch(0, 0), sampler.batch(1, 0))
    assert not np.array_equal(sampler.batch(0, 0), sampler.batch(0, sampler.steps_per_epoch))
    assert not np.array_equal(sampler.shard(0), ShardedSampler(400, 4, 25, 1).shard(0))


def test_a_local_shuffle_keeps_samples_with_their_worker_and_a_global_one_does_not() -> None:
    def seen(sampler: ShardedSampler, epoch: int) -> set[int]:
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        return {int(number) for step in steps for number in sampler.shard(1)[sampler.batch(1, step)]}

    local, everywhere = (ShardedSampler(400, 4, 25, 0, shuffle) for shuffle in SHUFFLES)

    assert seen(local, 0) == seen(local, 1)
    shared = seen(everywhere, 0) & seen(everywhere, 1)
    assert len(seen(everywhere, 0)) == len(seen(everywhere, 1)) == 100
    assert 10 < len(shared) < 45  # the expected number is 25


def test_a_single_worker_has_the_same_order_in_both_shuffles() -> None:
    local, everywhere = (ShardedSampler(100, 1, 30, 3, shuffle) for shuffle in SHUFFLES)

    assert all(np.array_equal(local.batch(0, step), everywhere.batch(0, step)) for step in range(12))


def test_a_data_set_is_not_copied_for_a_worker_that_needs_all_of_it() -> None:
    whole = TensorDataset(torch.arange(40.0))

    assert take_shard(whole, ShardedSampler(40, 4, 5, 0, "global").shard(2)) is whole
    assert take_shard(whole, ShardedSampler(40, 4, 5, 0, "local").shard(2)) is not whole


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

    with pytest.raises(DataError, match="Stream .*__len__"):
        length(Stream())
