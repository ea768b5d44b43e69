"""How data are dealt: every sample once an epoch, even batches, fixed shards or new ones every epoch."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ist.data.batches import Dealing, fetch, length, take_shard
from ist.errors import DataError

Shuffle = Literal["local", "global"]
SHUFFLES: tuple[Shuffle, ...] = ("local", "global")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.integers(0, 5), st.sampled_from(SHUFFLES))
def test_every_sample_is_seen_once_an_epoch(
    samples: int, workers: int, batch_size: int, epoch: int, shuffle: Shuffle
) -> None:
    if samples < workers:
        with pytest.raises(DataError, match=f"{samples} training samples cannot be dealt to {workers} workers"):
            Dealing(samples, workers, batch_size, 0)
        return
    dealing = Dealing(samples, workers, batch_size, 0, shuffle)
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


def test_a_local_shuffle_keeps_samples_with_their_worker_and_a_global_one_does_not() -> None:
    def seen(dealing: Dealing, epoch: int) -> set[int]:
        steps = range(epoch * dealing.steps_per_epoch, (epoch + 1) * dealing.steps_per_epoch)
        return {int(number) for step in steps for number in dealing.shard(1)[dealing.batch(1, step)]}

    local, everywhere = (Dealing(400, 4, 25, 0, shuffle) for shuffle in SHUFFLES)

    assert seen(local, 0) == seen(local, 1)
    shared = seen(everywhere, 0) & seen(everywhere, 1)
    assert len(seen(everywhere, 0)) == len(seen(everywhere, 1)) == 100
    assert 10 < len(shared) < 45  # a quarter of a hundred, by chance


def test_a_single_worker_sees_the_same_order_in_both_shuffles() -> None:
    local, everywhere = (Dealing(100, 1, 30, 3, shuffle) for shuffle in SHUFFLES)

    assert all(np.array_equal(local.batch(0, step), everywhere.batch(0, step)) for step in range(12))


def test_what_a_worker_needs_all_of_is_not_copied() -> None:
    whole = TensorDataset(torch.arange(40.0))

    assert take_shard(whole, Dealing(40, 4, 5, 0, "global").shard(2)) is whole
    assert take_shard(whole, Dealing(40, 4, 5, 0, "local").shard(2)) is not whole


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
