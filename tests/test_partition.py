"""The partition: disjoint, complete, even, and the same in every process."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ist.errors import ModelError
from ist.groups import Group
from ist.partition import assign, check_workers, share_sizes
from ist.rng import Purpose, permutation, torch_seed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**31), st.integers(0, 1000), st.data())
def test_every_neuron_has_exactly_one_owner(sizes: list[int], seed: int, number: int, draw: st.DataObject) -> None:
    workers = draw.draw(st.integers(1, min(sizes)))
    groups = [Group(str(number), size, ()) for number, size in enumerate(sizes)]

    shares = assign(groups, workers, seed, number)

    for index, size in enumerate(sizes):
        parts = [share[index] for share in shares]
        assert [len(part) for part in parts] == share_sizes(size, workers)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(size))
        assert all((np.diff(part) > 0).all() for part in parts)


def test_rounds_seeds_and_groups_are_dealt_independently() -> None:
    groups = [Group("a", 64, ()), Group("b", 64, ())]

    base = assign(groups, 4, 0, 0)

    assert not np.array_equal(base[0][0], base[0][1])
    assert not np.array_equal(base[0][0], assign(groups, 4, 0, 1)[0][0])
    assert not np.array_equal(base[0][0], assign(groups, 4, 1, 0)[0][0])


def test_neurons_meet_each_other_evenly() -> None:
    rounds, size, workers = 4000, 8, 2
    together = sum(
        {0, 1} <= set(share[0].tolist())
        for round_number in range(rounds)
        for share in assign([Group("a", size, ())], workers, 0, round_number)
    )

    # Two of eight neurons share a half with probability 3/7; the sample's deviation is 0.008.
    assert abs(together / rounds - 3 / 7) < 0.04


def test_the_random_stream_is_frozen() -> None:
    """Other versions must draw the same: checkpoints and processes on other machines depend on it."""
    assert permutation(8, 1, Purpose.PARTITION, 2, 3).tolist() == [0, 5, 7, 6, 1, 2, 4, 3]
    assert torch_seed(1, Purpose.MODEL) == 616139784949098269


def test_fewer_neurons_than_workers_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"group 'narrow' has 3 neurons, fewer than the 4 workers \(train.workers\)"):
        check_workers([Group("wide", 8, ()), Group("narrow", 3, ())], 4)


def test_a_network_without_hidden_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no hidden neurons to split"):
        check_workers([], 2)
